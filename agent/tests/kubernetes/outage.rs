//! An API server that goes and comes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kube::api::{Patch, PatchParams};
use serde_json::json;
use tokio::io::AsyncWriteExt as _;
use tombolo_agent::api::{ClusterApi, Error, Observed};
use tombolo_agent_core::known::Known;

use crate::objects::{connect, connect_as, derived, import, key, until};
use crate::server::{PATIENCE, Server, api_of, apply};

/// What it told, and does not take back.
fn holds(now: &Observed) -> bool {
    now.namespaces.get().is_some_and(|all| all.iter().any(|n| n.as_str() == "shop"))
        && now.exports.get().is_some_and(|all| all.contains_key(&key("shop/web")))
        && now.imports.get().is_some_and(|all| all.contains_key(&key("shop/web")))
        && now.derived.get().is_some_and(|all| all.contains_key(&key("shop/web")))
        && now.members.is_known()
        && now.slices.is_known()
}

/// Lists of ServiceExports that the API server has answered since it began; nobody else makes any.
fn lists(server: &Server) -> usize {
    let metrics = server.kubectl(&["get", "--raw=/metrics"]).unwrap();
    let of = |line: &&str| {
        line.starts_with("apiserver_request_total{")
            && ["verb=\"LIST\"", "resource=\"serviceexports\"", "code=\"200\""]
                .iter()
                .all(|label| line.contains(label))
    };
    metrics.lines().filter(of).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_server_that_goes_and_comes_withdraws_nothing() {
    let Some(mut server) = Server::start().await else { return };
    let client = server.install().await;
    let api = connect(&server).await;
    let mut observed = api.observe();
    let export = |name: &str| {
        json!({
            "apiVersion": "multicluster.x-k8s.io/v1beta1", "kind": "ServiceExport",
            "metadata": { "name": name, "namespace": "shop" },
        })
    };
    apply(&client, export("web")).await;
    until(&mut observed, "what writers need", |now| now.services.is_known() && now.imports.is_known()).await;
    let web = key("shop/web");
    let services = [(web.clone(), derived(&[], &[tombolo_proto::model::Family::V4]))].into();
    let made = api.write_derived(services, Default::default()).await.unwrap();
    let ip = made[&web].ips[0].to_string();
    api.write_imports([(web.clone(), import(&[&ip]))].into(), Default::default()).await.unwrap();
    until(&mut observed, "all of it", holds).await;

    // Every value that is told from now on is looked at.
    let mut told = api.observe();
    let watching = tokio::spawn(async move {
        let mut seen: Vec<Arc<Observed>> = Vec::new();
        while told.changed().await.is_ok() {
            let now = told.borrow_and_update().clone();
            if !holds(&now) {
                return Err(format!("{now:#?}"));
            }
            seen.push(now);
            if seen
                .last()
                .is_some_and(|now| now.exports.get().is_some_and(|all| all.contains_key(&key("shop/third"))))
            {
                return Ok(seen.len());
            }
        }
        Ok(0)
    });
    for name in ["second", "third"] {
        // etcd goes on to where the watch of ServiceExports is not: else a new API server, which may begin with that watch,
        // remembers all that the watch asks for.
        let beyond = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": name, "namespace": "shop" },
        });
        apply(&client, beyond).await;
        server.stop_api();
        until(&mut observed, "a finding on it", |now| now.findings.iter().any(|f| f.reason == "ApiTrouble"))
            .await;
        let refused = api.write_imports([(key("shop/new"), import(&[&ip]))].into(), Default::default()).await;
        assert!(matches!(refused, Err(Error::Api { .. })), "{refused:?}");
        assert!(server.etcd_lives());
        server.start_api().await;
        let back = Instant::now();
        apply(&client, export(name)).await;
        let new = key(&format!("shop/{name}"));
        until(&mut observed, "what is new", |now| {
            now.exports.get().is_some_and(|all| all.contains_key(&new)) && now.findings.is_empty()
        })
        .await;
        let took = back.elapsed();
        println!("measured caught up {took:?} after the API server came back");
        assert!(took < Duration::from_secs(5) * 2, "caught up only after {took:?}");
        // Where it was is too old for an API server that has just begun (410): it lists anew, which it does for no other
        // reason.
        assert!(lists(&server) > 0, "410 was not met");
    }
    let seen = watching.await.unwrap();
    assert!(seen.as_ref().is_ok_and(|count| *count > 0), "something was withdrawn: {seen:?}");
    // Writers go on where they were.
    assert!(
        api.write_imports(BTreeMap::from([(web, import(&[&ip]))]), Default::default())
            .await
            .unwrap()
            .is_nothing()
    );
    assert!(matches!(observed.borrow().clusterset, Known::Yes(None)));
}

/// An API server that takes one write at a time and sends everybody else away (429), while somebody's write does not end:
/// nothing is lost, and all is written in the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_sent_away_comes_again() {
    let Some(server) = Server::start_with(&[
        "--enable-priority-and-fairness=false",
        "--max-requests-inflight=3",
        "--max-mutating-requests-inflight=1",
    ])
    .await
    else {
        return;
    };
    server.install().await;
    // The administrator is never sent away: group system:masters is exempt.
    let api = connect_as(server.kubeconfig("user", "user")).await;
    let mut observed = api.observe();
    until(&mut observed, "what writers need", |now| now.services.is_known() && now.imports.is_known()).await;

    let mut proxy = server.proxy().await;
    let head = "POST /api/v1/namespaces/shop/configmaps HTTP/1.1\r\nhost: localhost\r\n\
                content-type: application/json\r\ncontent-length: 1000000\r\n\r\n";
    // As much as the proxy holds back, and more.
    let begin = format!("{head}{}", " ".repeat(100_000));
    proxy.stream.write_all(begin.as_bytes()).await.unwrap();
    let user = server.client(server.kubeconfig("user", "user")).await;
    let one = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "one", "namespace": "shop" } });
    let taken = async {
        let params = PatchParams::apply("user");
        while !matches!(
            api_of(&user, &one).patch("one", &params, &Patch::Apply(&one)).await,
            Err(kube::Error::Api(status)) if status.code == 429
        ) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, taken).await.expect("the only place is never taken");

    let all: BTreeMap<_, _> =
        (0..100).map(|n| (key(&format!("shop/s{n}")), import(&["10.96.3.3"]))).collect();
    let sent_away = api.write_imports(all.clone(), Default::default()).await;
    assert!(
        sent_away.as_ref().is_err_and(|error| format!("{error:?}").contains("Too many requests")),
        "not sent away: {sent_away:?}"
    );
    drop(proxy);
    // As the controller does: what failed in one turn is done in the next.
    let in_the_end = async { while api.write_imports(all.clone(), Default::default()).await.is_err() {} };
    tokio::time::timeout(PATIENCE, in_the_end).await.expect("it is never done");
    until(&mut observed, "all of them", |now| {
        now.imports.get().is_some_and(|there| all.iter().all(|(k, v)| there.get(k) == Some(v)))
    })
    .await;
}
