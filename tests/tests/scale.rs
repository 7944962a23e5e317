//! Many services on real API servers: how fast they are known, what that costs, and what it costs at rest.
//!
//! A landing makes 200 exports, with ten backends each; `TOMBOLO_FULL=1` 1,000. 10,000 take most of an hour and are made
//! by a command of their own, `TOMBOLO_FULL=1 cargo test --release -p tombolo-lab --test scale -- --ignored`, or as many as
//! `TOMBOLO_EXPORTS` says.

#![allow(clippy::print_stderr)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::ApiResource;
use kube::{Client, Config};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tombolo_lab::probe::{Question, ask};
use tombolo_lab::topology::{CLUSTER_DNS, KUBERNETES};
use tombolo_lab::{Lab, Topology, measured, scenario_kubernetes, strict, wait_until};

const FROM: &str = "eu-west";
const TO: &str = "us-east";
const NAMESPACE: &str = "production";
/// Objects that are written at a time, as our own controller does.
const WRITES: usize = 16;
/// Of each service.
const BACKENDS: usize = 10;

fn resource(api_version: &str, kind: &str, plural: &str) -> ApiResource {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    ApiResource {
        group: group.to_owned(),
        version: version.to_owned(),
        api_version: api_version.to_owned(),
        kind: kind.to_owned(),
        plural: plural.to_owned(),
    }
}

fn services() -> ApiResource {
    resource("v1", "Service", "services")
}

fn slices() -> ApiResource {
    resource("discovery.k8s.io/v1", "EndpointSlice", "endpointslices")
}

fn exports() -> ApiResource {
    resource("multicluster.x-k8s.io/v1beta1", "ServiceExport", "serviceexports")
}

fn imports() -> ApiResource {
    resource("multicluster.x-k8s.io/v1beta1", "ServiceImport", "serviceimports")
}

/// The administrator of a lab cluster, in the place of its API.
struct Admin {
    client: Client,
    runtime: Runtime,
}

impl Admin {
    fn of(lab: &Lab, cluster: &str) -> Result<Self> {
        let place = lab.place(&format!("api-{cluster}"))?;
        let build = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = place.run(build)??;
        let file = lab.cluster_dir(cluster).join("admin.kubeconfig");
        let connect = async move {
            let file = Kubeconfig::read_from(file)?;
            let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
            anyhow::Ok(Client::try_from(config)?)
        };
        let client = runtime.block_on(runtime.spawn(connect))??;
        Ok(Self { client, runtime })
    }

    /// Runs something on the place's own network.
    fn run<T: Send + 'static>(&self, work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        self.runtime.block_on(self.runtime.spawn(work))?
    }

    fn api(&self, resource: &ApiResource, namespace: &str) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), namespace, resource)
    }

    /// Makes objects, some at a time; how long that took.
    fn create(&self, objects: Vec<(ApiResource, Value)>) -> Result<Duration> {
        let start = Instant::now();
        let client = self.client.clone();
        self.run(async move {
            let one = |(resource, value): (ApiResource, Value)| {
                let client = client.clone();
                async move {
                    let object: DynamicObject = serde_json::from_value(value)?;
                    let namespace = object.metadata.namespace.clone().context("a namespace")?;
                    let api: Api<DynamicObject> = Api::namespaced_with(client, &namespace, &resource);
                    api.create(&PostParams::default(), &object).await?;
                    anyhow::Ok(())
                }
            };
            stream::iter(objects).map(one).buffer_unordered(WRITES).try_collect::<Vec<()>>().await.map(drop)
        })?;
        Ok(start.elapsed())
    }

    /// Writes objects, some at a time, what belongs to one in order.
    fn apply(&self, namespace: &'static str, objects: Vec<Vec<Write>>) -> Result<()> {
        let client = self.client.clone();
        self.run(async move {
            let one = |writes: Vec<Write>| {
                let client = client.clone();
                async move {
                    for Write { resource, name, body, status } in writes {
                        let api: Api<DynamicObject> =
                            Api::namespaced_with(client.clone(), namespace, &resource);
                        let (params, patch) = (PatchParams::apply("bare").force(), Patch::Apply(&body));
                        if status {
                            api.patch_status(&name, &params, &patch).await?;
                        } else {
                            api.patch(&name, &params, &patch).await?;
                        }
                    }
                    anyhow::Ok(())
                }
            };
            stream::iter(objects).map(one).buffer_unordered(WRITES).try_collect::<Vec<()>>().await.map(drop)
        })
    }

    fn delete_all(&self, resource: &ApiResource, namespace: &str) -> Result<()> {
        let api = self.api(resource, namespace);
        self.run(async move {
            api.delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
            Ok(())
        })
    }

    fn list(&self, resource: &ApiResource, namespace: &str, labels: &str) -> Result<Vec<DynamicObject>> {
        let (api, labels) = (self.api(resource, namespace), labels.to_owned());
        self.run(async move {
            let mut params = ListParams::default().labels(&labels).limit(500);
            let mut all = Vec::new();
            loop {
                let page = api.list(&params).await?;
                all.extend(page.items);
                params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
                if params.continue_token.is_none() {
                    return Ok(all);
                }
            }
        })
    }

    /// Writes that the API server took, by resource; the Lease's, and what it does for itself, do not count.
    fn writes(&self) -> Result<BTreeMap<String, u64>> {
        let client = self.client.clone();
        let text = self.run(async move {
            let request = http::Request::get("/metrics").body(Vec::new())?;
            Ok(client.request_text(request).await?)
        })?;
        let mut writes = BTreeMap::new();
        for line in text.lines().filter(|line| line.starts_with("apiserver_request_total{")) {
            let label = |name: &str| {
                let (_, rest) = line.split_once(&format!("{name}=\""))?;
                Some(rest.split_once('"')?.0)
            };
            let (Some(verb), Some(resource)) = (label("verb"), label("resource")) else { continue };
            let is_write = matches!(verb, "POST" | "PUT" | "PATCH" | "APPLY" | "DELETE" | "DELETECOLLECTION");
            let ours = !matches!(
                resource,
                "leases" | "subjectaccessreviews" | "tokenreviews" | "serviceaccounts" | "selfsubjectreviews"
            );
            if is_write && ours {
                let count: f64 = line.rsplit(' ').next().context("a count")?.parse()?;
                *writes
                    .entry(format!(
                        "{resource}{}",
                        if line.contains("subresource=\"status\"") { "/status" } else { "" }
                    ))
                    .or_insert(0) += count as u64;
            }
        }
        Ok(writes)
    }
}

fn name(number: usize) -> String {
    format!("load-{number:05}")
}

fn export(name: &str) -> (ApiResource, Value) {
    let (exports, metadata) = (exports(), json!({ "name": name, "namespace": NAMESPACE }));
    let value = json!({ "apiVersion": exports.api_version, "kind": exports.kind, "metadata": metadata });
    (exports, value)
}

/// A Service and its backends, which somebody else keeps.
fn service(number: usize) -> [(ApiResource, Value); 2] {
    let name = name(number);
    let endpoints: Vec<Value> = (0..BACKENDS)
        .map(|n| {
            // Inside of the cluster's pod range, and no pod of the lab.
            let at = (number * BACKENDS + n) % 50_000 + 10_000;
            json!({ "addresses": [format!("10.1.{}.{}", at / 256, at % 256)], "conditions": { "ready": true } })
        })
        .collect();
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": name, "namespace": NAMESPACE },
        "spec": { "ports": [{ "name": "http", "port": 80, "targetPort": 8080 }] },
    });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{name}-1"), "namespace": NAMESPACE,
            "labels": { "kubernetes.io/service-name": name },
        },
        "addressType": "IPv4",
        "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
        "endpoints": endpoints,
    });
    [(services(), service), (slices(), slice)]
}

/// Asks for names, in a pod of the other cluster as pods do, until all are there (or gone).
fn asked(lab: &Lab, names: &BTreeSet<String>, wanted: bool, within: Duration) -> Result<Duration> {
    let server: SocketAddr = (CLUSTER_DNS, 53).into();
    let start = Instant::now();
    lab.place("us-b")?.run(|| {
        let mut waiting: Vec<&String> = names.iter().collect();
        while !waiting.is_empty() {
            let mut missed = 0;
            waiting.retain(|name| {
                // A few are asked for again and again, not all.
                if missed >= 3 {
                    return true;
                }
                let name = format!("{name}.{NAMESPACE}.svc.clusterset.local");
                let answer = ask(server, &Question { name, kind: 1 }, Duration::from_secs(1));
                let good = match answer {
                    Ok((0, addresses)) => wanted && !addresses.is_empty(),
                    Ok((3, _)) => !wanted,
                    _ => false,
                };
                missed += u32::from(!good);
                !good
            });
            ensure!(
                start.elapsed() < within,
                "{} of {} names are not right after {within:?}",
                waiting.len(),
                names.len()
            );
            if missed > 0 {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(start.elapsed())
    })?
}

/// Resident memory of an agent proper (below its holder), in MB: all, and that which is not the program itself.
fn memory(lab: &Lab, place: &str, program: &str) -> Result<(f64, f64)> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", lab.child_pid(place, program)?))?;
    let of = |name: &str| -> Result<f64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).context("a line of status")?;
        let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib * 1024.0 / 1e6)
    };
    Ok((of("VmRSS:")?, of("RssAnon:")?))
}

/// Seconds of processor that programs of the lab have used, by name.
fn used() -> Result<BTreeMap<String, f64>> {
    let mut used = BTreeMap::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        // Not a process, or one that ended meanwhile.
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        let Some((name, rest)) = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')')) else {
            continue;
        };
        // utime and stime, in ticks of 1/100 s (proc(5)).
        let ticks: f64 = rest.split_whitespace().skip(11).take(2).flat_map(str::parse::<f64>).sum();
        *used.entry(name.to_owned()).or_insert(0.0) += ticks / 100.0;
    }
    Ok(used)
}

/// From the first export to the last name in the other cluster.
fn burst(
    lab: &Lab,
    [admin, other]: [&Admin; 2],
    count: usize,
    within: Duration,
) -> Result<(Instant, Duration)> {
    let names: BTreeSet<String> = (0..count).map(name).collect();
    let before = [admin.writes()?, other.writes()?];
    let (busy, start) = (used()?, Instant::now());
    let written = admin.create(names.iter().map(|name| export(name)).collect())?;
    asked(lab, &names, true, within)?;
    let all = start.elapsed();
    for (admin, before) in [admin, other].into_iter().zip(before) {
        let more = admin.writes()?.into_iter().filter_map(|(resource, count)| {
            let new = count - before.get(&resource).copied().unwrap_or(0);
            (new > 0).then(|| format!("{new} of {resource}"))
        });
        eprintln!("writes: {}", more.collect::<Vec<_>>().join(", "));
    }
    eprintln!("{count} exports: all written after {written:.1?}, all known after {all:.1?}");
    let used = used()?
        .into_iter()
        .map(|(program, time)| (time - busy.get(&program).copied().unwrap_or(0.0), program));
    let mut used: Vec<(f64, String)> = used.filter(|(time, _)| *time > 0.01 * all.as_secs_f64()).collect();
    used.sort_by(|a, b| b.0.total_cmp(&a.0));
    let used: Vec<String> = used.iter().map(|(time, program)| format!("{program} {time:.1}")).collect();
    eprintln!("seconds of processor: {}", used.join(", "));
    Ok((start, all))
}

/// A write of a bare program: server-side apply, of an object or of its status.
struct Write {
    resource: ApiResource,
    name: String,
    body: Value,
    status: bool,
}

/// What Tombolo wrote in a cluster for the exports, as a bare program would write it: the same objects, in a namespace of
/// their own, and of nobody that Tombolo knows. Where the exports are, each has a status too, which is written here as
/// another one of its import.
fn copies(admin: &Admin, namespace: &str, statuses: usize) -> Result<Vec<Vec<Write>>> {
    let mut copies = Vec::new();
    let mut left = statuses;
    for resource in [services(), slices(), imports()] {
        let made = admin.list(&resource, NAMESPACE, "tombolo.dev/managed-by=tombolo.dev")?;
        for object in made {
            let labels = object.metadata.labels.clone().unwrap_or_default();
            let foreign = |key: &&String| !key.contains("managed-by");
            let labels: BTreeMap<&String, &String> = labels.iter().filter(|(key, _)| foreign(key)).collect();
            let mut value = serde_json::to_value(&object)?;
            // Lists leave that out.
            value["apiVersion"] = json!(resource.api_version);
            value["kind"] = json!(resource.kind);
            value["metadata"] =
                json!({ "name": object.metadata.name, "namespace": namespace, "labels": labels });
            if let Some(spec) = value.get_mut("spec").and_then(Value::as_object_mut) {
                spec.remove("clusterIP");
                spec.remove("clusterIPs");
            }
            let name = object.metadata.name.clone().context("a name")?;
            let status = value.as_object_mut().and_then(|object| object.remove("status"));
            let write =
                |body: Value, status| Write { resource: resource.clone(), name: name.clone(), body, status };
            let mut writes = vec![write(value.clone(), false)];
            if let Some(mut status) = status.filter(|_| resource.kind == "ServiceImport") {
                let mut of = |status: &Value| {
                    let body = json!({
                        "apiVersion": resource.api_version, "kind": resource.kind,
                        "metadata": { "name": name }, "status": status,
                    });
                    writes.push(write(body, true));
                };
                of(&status);
                if left > 0 {
                    left -= 1;
                    status["conditions"][0]["message"] = json!("another");
                    of(&status);
                }
            }
            copies.push(writes);
        }
    }
    Ok(copies)
}

/// What the same writes take by themselves, to both API servers at once.
fn bare(from: &Admin, to: &Admin, lab: &Lab) -> Result<Duration> {
    let exports = from.list(&exports(), NAMESPACE, "")?.len();
    let (a, b) = (copies(from, "bare", exports)?, copies(to, "bare", 0)?);
    for cluster in [FROM, TO] {
        lab.kubectl(cluster, &["create", "namespace", "bare"], "")?;
    }
    let count = |all: &[Vec<Write>]| all.iter().map(Vec::len).sum::<usize>();
    let (counts, start) = ((count(&a), count(&b)), Instant::now());
    std::thread::scope(|scope| {
        let other = scope.spawn(|| from.apply("bare", a));
        to.apply("bare", b)?;
        other.join().map_err(|_| anyhow::anyhow!("the bare loop panicked"))??;
        let took = start.elapsed();
        eprintln!("a bare loop: {} and {} writes in {took:.1?}", counts.0, counts.1);
        Ok(took)
    })
}

/// Writes at rest, in so long.
fn rest(admins: &[&Admin], time: Duration) -> Result<f64> {
    let count = || admins.iter().map(|admin| admin.writes()).collect::<Result<Vec<_>>>();
    let before = count()?;
    // At rest means that nothing is done for a while: this is what is measured, and waits for nothing.
    std::thread::sleep(time);
    let after = count()?;
    let mut more = 0;
    for (before, after) in before.iter().zip(&after) {
        for (resource, count) in after {
            let new = count - before.get(resource).copied().unwrap_or(0);
            if new > 0 {
                eprintln!("{new} writes of {resource} at rest");
            }
            more += new;
        }
    }
    Ok(more as f64)
}

#[test]
fn exports_by_the_thousand() {
    let limit = Duration::from_secs(if strict() { 900 } else { 600 });
    scenario_kubernetes("exports_by_the_thousand", limit, || {
        let lab = Lab::build(Topology::parse(KUBERNETES)?)?;
        lab.bring_up()?;
        let admins = (Admin::of(&lab, FROM)?, Admin::of(&lab, TO)?);
        one_at_a_time(&lab, &admins)?;
        let took = many(&lab, &admins, if strict() { 1000 } else { 200 })?;
        measured("kubernetes-burst", took.as_secs_f64() * 1000.0, "ms")
    });
}

#[test]
#[ignore = "takes most of an hour"]
fn exports_by_the_ten_thousand() {
    scenario_kubernetes("exports_by_the_ten_thousand", Duration::from_secs(2 * 3600), || {
        let lab = Lab::build(Topology::parse(KUBERNETES)?)?;
        lab.bring_up()?;
        let count = std::env::var("TOMBOLO_EXPORTS").ok().map_or(Ok(10_000), |count| count.parse())?;
        many(&lab, &(Admin::of(&lab, FROM)?, Admin::of(&lab, TO)?), count).map(drop)
    });
}

/// How long an export takes where nothing else happens.
fn one_at_a_time(lab: &Lab, (from, _): &(Admin, Admin)) -> Result<()> {
    let one = BTreeSet::from(["api-service".to_owned()]);
    let soon = Duration::from_secs(20);
    let mut times = Vec::new();
    for _ in 0..if strict() { 100 } else { 20 } {
        let start = Instant::now();
        from.create(vec![export("api-service")])?;
        asked(lab, &one, true, soon)?;
        times.push(start.elapsed().as_secs_f64() * 1000.0);
        from.delete_all(&exports(), NAMESPACE)?;
        asked(lab, &one, false, soon)?;
    }
    times.sort_by(f64::total_cmp);
    let p99 = times[(times.len() * 99).div_ceil(100) - 1];
    eprintln!("one export: half are known within {:.0} ms", times[times.len() / 2]);
    measured("kubernetes-export-p99", p99, "ms")
}

/// So many at once: how long until all names are known, what that took of memory, and what a bare loop takes.
fn many(lab: &Lab, (from, to): &(Admin, Admin), count: usize) -> Result<Duration> {
    // Proxies write a firewall for every one of these Services, on the same two cores. They are not what is measured.
    for node in lab.topology().nodes() {
        lab.stop(&node.name, "kube-proxy")?;
    }
    from.create((0..count).flat_map(service).collect())?;
    let within = Duration::from_secs(240).max(Duration::from_millis(300) * u32::try_from(count)?);
    let (start, known) = burst(lab, [from, to], count, within)?;
    // The cluster that exports writes on after the other one has it all.
    let took = settle(from, to)?.saturating_duration_since(start);
    for (place, program, event) in [
        ("us-w1", "agent", "kubernetes-node-memory"),
        ("us-gw1", "agent", "kubernetes-node-memory"),
        ("eu-w1", "agent", "kubernetes-node-memory"),
        ("controller-us-east-0", "controller", "kubernetes-controller-memory"),
        ("controller-us-east-1", "controller", "kubernetes-controller-memory"),
        ("controller-eu-west-0", "controller", "kubernetes-controller-memory"),
        ("controller-eu-west-1", "controller", "kubernetes-controller-memory"),
    ] {
        let (mb, own) = memory(lab, place, program)?;
        eprintln!(
            "{program} in {place} with {count} imports: {mb:.0} MB, {own:.0} of it not the program's file"
        );
        measured(event, mb, "MB")?;
    }
    let writes = rest(&[from, to], Duration::from_secs(if strict() { 60 } else { 10 }))?;
    measured("kubernetes-writes-at-rest", writes, "writes")?;
    let bare = bare(from, to, lab)?;
    measured("kubernetes-bulk", took.as_secs_f64() / bare.as_secs_f64(), "times")?;
    Ok(known)
}

/// Waits until nothing is written any more; when the last was.
fn settle(from: &Admin, to: &Admin) -> Result<Instant> {
    let mut last = Vec::new();
    let mut since = Instant::now();
    wait_until("the writes to end", Duration::from_secs(600), || {
        let now = vec![from.writes()?, to.writes()?];
        if now != last {
            (last, since) = (now, Instant::now());
        }
        // Between two looks: the API server counts for nobody else's sake.
        std::thread::sleep(Duration::from_millis(100));
        ensure!(since.elapsed() > Duration::from_secs(5), "something is still written");
        Ok(())
    })?;
    Ok(since)
}
