//! The controller on a directory, as it runs; what it says goes nowhere, since the set has no broker.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tombolo_agent_core::known::{Known, Objects};
use tombolo_agent_core::lease::Timing;
use tombolo_agent_core::object::{
    DerivedService, ExportStatus, Import, ServiceKey, Slice, SliceKey, TunnelNode,
};
use tombolo_agent_core::world::{ClustersetRanges, Reach, Topology};
use tombolo_proto::model::{ClusterId, NodeName, Position, Record, RecordKey};
use tombolo_proto::testing::{binding, cluster, grant, key, membership, set};
use tombolo_proto::trust::{Membership, Revocations, SigningKey};
use tombolo_proto::wire::{decode_endpoint, decode_grant, decode_statement};
use tombolo_replica::verify_nodes;

use crate::admin::Shown;
use crate::api::directory::{Directory, MANIFESTS, STATE, Step};
use crate::api::{Applied, ClusterApi, ClusterSet, Error, Lease, Member, Observed, Version, Versioned};
use crate::control::lead;

struct Bench {
    _temporary: TempDir,
    directory: Directory,
    shown: Arc<Shown>,
}

struct Running {
    task: JoinHandle<anyhow::Result<()>>,
    stop: DropGuard,
}

impl Running {
    async fn end(self) {
        drop(self.stop);
        self.task.await.unwrap().unwrap();
    }
}

fn eu() -> ClusterId {
    cluster("eu")
}

/// A membership of `eu` whose key is the one of `seed`.
fn ours(serial: u64, seed: u8) -> (Membership, SigningKey) {
    let (root, roots) = set();
    let key = key(seed);
    let grant = grant("eu", serial, &["10.1.0.0/16"], key.public());
    let first = binding(&grant, 0, key.public()).sign(&key);
    (Membership::verify(&roots, &grant.sign(&root), &[first]).unwrap(), key)
}

fn object(membership: &Membership) -> Member {
    Member {
        grant: membership.grant().envelope().clone(),
        bindings: membership.bindings().iter().map(|b| b.envelope().clone()).collect(),
        spoken: None,
        statement: None,
        namespaces: None,
    }
}

/// What a Member says fits what is kept of its nodes.
fn is_whole(member: &Member, nodes: &BTreeMap<RecordKey, Record>) -> bool {
    let (Some(statement), Some(namespaces)) = (&member.statement, &member.namespaces) else { return false };
    verify_nodes(&decode_statement(&statement.payload).unwrap(), namespaces, nodes.values())
}

impl Bench {
    /// A directory of cluster `eu`, joined by a grant of serial 1.
    fn new() -> Self {
        let temporary = TempDir::new().unwrap();
        let directory = Directory::create(temporary.path().join("cluster")).unwrap();
        let bench = Self { _temporary: temporary, directory, shown: Shown::new() };
        bench.put("ns.yaml", "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: production\n");
        for (number, name) in ["a", "b", "c", "d"].into_iter().enumerate() {
            bench.put(
                &format!("node-{name}.yaml"),
                &format!(
                    "apiVersion: v1\nkind: Node\nmetadata:\n  name: {name}\nspec:\n  podCIDRs: [10.1.{number}.0/24]\n\
                     status:\n  addresses:\n  - type: InternalIP\n    address: 192.0.2.{}\n",
                    number + 1
                ),
            );
        }
        bench.join(1, 40);
        bench
    }

    fn put(&self, file: &str, text: &str) {
        std::fs::write(self.directory.root().join(MANIFESTS).join(file), text).unwrap();
    }

    fn export(&self, name: &str) {
        let text = "apiVersion: v1\nkind: Service\nmetadata: {name: api, namespace: production}\nspec:\n  ports: [{port: 80}]\n---\n\
             apiVersion: multicluster.x-k8s.io/v1beta1\nkind: ServiceExport\nmetadata: {name: api, namespace: production}\n---\n\
             apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
             metadata: {name: api-1, namespace: production, labels: {kubernetes.io/service-name: api}}\n\
             ports: [{port: 8080, name: \"\", protocol: TCP}]\nendpoints: [{addresses: [10.1.0.7], conditions: {ready: true}}]\n";
        self.put(
            &format!("{name}.yaml"),
            &text
                .replace("api-1", &format!("{name}-1"))
                .replace("name: api,", &format!("name: {name},"))
                .replace("service-name: api}", &format!("service-name: {name}}}")),
        );
    }

    fn join(&self, serial: u64, seed: u8) {
        let (_, roots) = set();
        let (membership, key) = ours(serial, seed);
        let known = self.directory.read_clusterset().unwrap().map(|known| known.value);
        let set = known.unwrap_or_else(|| ClusterSet {
            set: roots.set(),
            cluster: eu(),
            roots: roots.envelopes().cloned().collect(),
            brokers: None,
            revocations: None,
            reach: Reach::Exports,
            topology: Topology::Gateway,
            clusterset: Some(ClustersetRanges { v4: Some("198.19.0.0/29".parse().unwrap()), v6: None }),
            reserved: BTreeSet::new(),
            rotations: BTreeMap::new(),
            leaving: false,
        });
        self.directory.join(&set, &key, &object(&membership)).unwrap();
    }

    async fn tunnel_node(&self, name: &str) {
        let value = TunnelNode {
            devices: BTreeMap::new(),
            candidates: Vec::new(),
            outside: BTreeSet::new(),
            prefixes: BTreeSet::new(),
            unreached: BTreeSet::new(),
        };
        self.directory.write_tunnel_node(&NodeName::new(name).unwrap(), &value).await.unwrap();
    }

    async fn revoke(&self, version: u64, entries: &[(&str, u64)]) {
        let (root, roots) = set();
        let up_to = entries.iter().map(|&(name, serial)| (cluster(name), serial)).collect();
        let mut known = self.directory.clusterset().await.unwrap().unwrap();
        known.value.revocations = Some(Revocations { set: roots.set(), version, up_to }.sign(&root));
        self.directory.write_clusterset(&known.value, Some(&known.version)).await.unwrap();
    }

    /// An agent that contends for the lead, as in a process of its own.
    fn lead(&self) -> Running {
        let api = Arc::new(Directory::open(self.directory.root()).unwrap());
        let stop = CancellationToken::new();
        let task = lead::run(api, "a".to_owned(), self.shown.clone(), stop.clone());
        Running { task: tokio::spawn(task), stop: stop.drop_guard() }
    }

    /// A leader that never loses the lead, however slow this machine is.
    async fn lead_by(&self, api: Arc<dyn ClusterApi>) -> Running {
        let lease = Lease { holder: None, duration: 3, acquired: 0, renewed: 0, transitions: 0, epoch: 1 };
        self.directory.write_lease(&lease, None).await.unwrap();
        let fence = lead::Fence::new(Instant::now());
        fence.set(Duration::MAX);
        let (shown, stop) = (self.shown.clone(), CancellationToken::new());
        let leading = super::lead(api, shown, lease.epoch, fence, stop.clone());
        let task = async { leading.await.map(|outcome| assert_eq!(outcome, super::Outcome::Stopped)) };
        Running { task: tokio::spawn(task), stop: stop.drop_guard() }
    }

    fn member(&self) -> Option<(Member, BTreeMap<RecordKey, Record>)> {
        let observed = self.directory.read();
        let member = observed.members.get()?.get(&eu())?.clone();
        Some((member, observed.member_nodes.get()?.get(&eu()).cloned().unwrap_or_default()))
    }

    fn position(&self) -> Option<Position> {
        Some(decode_statement(&self.member()?.0.statement?.payload).unwrap().position)
    }

    /// Who reads only the Member and its nodes can check them.
    fn is_whole(&self) -> bool {
        self.member().is_some_and(|(member, nodes)| is_whole(&member, &nodes))
    }

    fn tunnels(&self) -> BTreeMap<String, Ipv4Addr> {
        let (_, nodes) = self.member().unwrap();
        let endpoint = |record: &Record| {
            let name = record.key.name()[0].to_string();
            let endpoint = decode_endpoint(NodeName::new(&name).unwrap(), &record.body).unwrap();
            (name, endpoint.tunnel_v4.unwrap())
        };
        nodes.values().map(endpoint).collect()
    }

    fn ips(&self, name: &str) -> Option<Vec<IpAddr>> {
        let observed = self.directory.read();
        let import = observed.imports.get()?.iter().find(|(key, _)| key.name.as_str() == name)?.1;
        Some(import.ips.clone())
    }

    fn imports(&self) -> usize {
        self.directory.read().imports.get().map_or(0, |imports| imports.len())
    }

    fn found(&self, reason: &str) -> bool {
        self.shown.cluster_findings.load().iter().any(|f| f.reason == reason)
    }
}

/// Waits for a condition; panics with `what`.
async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "timed out: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A directory whose watch never shows what the leader wrote.
struct Blind {
    directory: Directory,
    shown: watch::Sender<Arc<Observed>>,
    /// Statuses, one after the other.
    told: Mutex<Vec<(ServiceKey, ExportStatus)>>,
}

impl Blind {
    fn open(root: &Path) -> Arc<Self> {
        let directory = Directory::open(root).unwrap();
        let mut all = directory.observe();
        let (shown, _) = watch::channel(Arc::default());
        let sender = shown.clone();
        tokio::spawn(async move {
            let nothing = Known::Yes(BTreeMap::new());
            while all.changed().await.is_ok() {
                let mut now = Observed::clone(&all.borrow_and_update());
                if now.members.is_known() {
                    (now.member_nodes, now.imports) = (nothing.clone(), Known::Yes([].into()));
                }
                sender.send_replace(Arc::new(now));
            }
        });
        Arc::new(Self { directory, shown, told: Mutex::default() })
    }
}

#[async_trait::async_trait]
impl ClusterApi for Blind {
    fn observe(&self) -> watch::Receiver<Arc<Observed>> {
        self.shown.subscribe()
    }

    async fn apply_imports(&self, desired: &Objects<ServiceKey, Import>) -> Result<Applied, Error> {
        self.directory.apply_imports(desired).await
    }

    async fn apply_slices(&self, desired: &Objects<SliceKey, Slice>) -> Result<Applied, Error> {
        self.directory.apply_slices(desired).await
    }

    async fn write_imports(
        &self,
        set: BTreeMap<ServiceKey, Import>,
        gone: BTreeSet<ServiceKey>,
    ) -> Result<Applied, Error> {
        self.directory.write_imports(set, gone).await
    }

    async fn write_slices(
        &self,
        set: BTreeMap<SliceKey, Slice>,
        gone: BTreeSet<SliceKey>,
    ) -> Result<Applied, Error> {
        self.directory.write_slices(set, gone).await
    }

    async fn apply_properties(&self, desired: &BTreeMap<&'static str, String>) -> Result<Applied, Error> {
        self.directory.apply_properties(desired).await
    }

    async fn apply_statuses(
        &self,
        desired: &BTreeMap<ServiceKey, ExportStatus>,
        now: u64,
    ) -> Result<Applied, Error> {
        let statuses = desired.iter().map(|(key, status)| (key.clone(), status.clone()));
        self.told.lock().unwrap().extend(statuses);
        self.directory.apply_statuses(desired, now).await
    }

    async fn stamp_exports(&self, now: u64) -> Result<Applied, Error> {
        self.directory.stamp_exports(now).await
    }

    async fn write_member(
        &self,
        cluster: &ClusterId,
        member: &Member,
        nodes: &BTreeMap<RecordKey, Record>,
    ) -> Result<Applied, Error> {
        self.directory.write_member(cluster, member, nodes).await
    }

    async fn delete_member(&self, cluster: &ClusterId) -> Result<Applied, Error> {
        self.directory.delete_member(cluster).await
    }

    async fn write_tunnel_node(&self, node: &NodeName, value: &TunnelNode) -> Result<Applied, Error> {
        self.directory.write_tunnel_node(node, value).await
    }

    async fn delete_tunnel_node(&self, node: &NodeName) -> Result<Applied, Error> {
        self.directory.delete_tunnel_node(node).await
    }

    async fn clusterset(&self) -> Result<Option<Versioned<ClusterSet>>, Error> {
        self.directory.clusterset().await
    }

    async fn write_clusterset(
        &self,
        value: &ClusterSet,
        expected: Option<&Version>,
    ) -> Result<Version, Error> {
        self.directory.write_clusterset(value, expected).await
    }

    async fn write_derived(
        &self,
        set: BTreeMap<ServiceKey, DerivedService>,
        gone: BTreeSet<ServiceKey>,
    ) -> Result<BTreeMap<ServiceKey, DerivedService>, Error> {
        self.directory.write_derived(set, gone).await
    }

    fn lead_as(&self, epoch: u64) {
        self.directory.lead_as(epoch);
    }

    fn timing(&self) -> Timing {
        self.directory.timing()
    }

    async fn lease(&self) -> Result<Option<Versioned<Lease>>, Error> {
        self.directory.lease().await
    }

    async fn write_lease(&self, lease: &Lease, expected: Option<&Version>) -> Result<Version, Error> {
        self.directory.write_lease(lease, expected).await
    }

    async fn cluster_key(&self) -> Result<Option<SigningKey>, Error> {
        self.directory.cluster_key().await
    }
}

/// Nodes that come one after the other, later names first: an address given anew in order of names would move.
async fn nodes_come(bench: &Bench) {
    let mut given: BTreeMap<String, Ipv4Addr> = BTreeMap::new();
    for name in ["d", "c", "b", "a"] {
        bench.tunnel_node(name).await;
        until("it has an address", || bench.tunnels().contains_key(name)).await;
        let now = bench.tunnels();
        for (name, address) in &given {
            assert_eq!(now[name], *address, "{name} moved: {given:?}, {now:?}");
        }
        given = now;
    }
    assert_eq!(given["d"], Ipv4Addr::new(198, 18, 1, 1), "the first that came got the first: {given:?}");
}

#[tokio::test]
async fn nodes_keep_their_tunnel_addresses() {
    let bench = Bench::new();
    let running = bench.lead();
    until("it has spoken", || bench.position().is_some()).await;
    nodes_come(&bench).await;
    running.end().await;
}

#[tokio::test]
async fn addresses_hang_on_nothing_that_comes_late() {
    let bench = Bench::new();
    let running = bench.lead_by(Blind::open(bench.directory.root())).await;
    until("it has spoken", || bench.position().is_some()).await;
    nodes_come(&bench).await;
    // In so small a range names contend for addresses: whoever has one keeps it, whatever comes later and sorts before.
    let wanted = |name: &str| bench.ips(name);
    bench.export("api");
    until("it has an address", || wanted("api").is_some()).await;
    let first = wanted("api");
    for name in ["aaa", "aab", "aac"] {
        bench.export(name);
        until("it has an address", || wanted(name).is_some()).await;
        assert_eq!(wanted("api"), first);
    }
    running.end().await;
}

#[tokio::test]
async fn a_newer_grant_is_spoken_under_at_once() {
    let bench = Bench::new();
    let running = bench.lead();
    until("it has spoken", || bench.position().is_some()).await;
    bench.join(2, 40);
    until("it speaks under the newer grant", || bench.position().is_some_and(|p| p.serial == 2)).await;
    let (member, _) = bench.member().unwrap();
    assert_eq!(decode_grant(&member.grant.payload).unwrap().serial, 2);
    assert_eq!(member.spoken, None);
    assert!(bench.is_whole());
    running.end().await;
}

#[tokio::test]
async fn a_newer_grant_with_another_key_and_after_revocation() {
    let bench = Bench::new();
    let running = bench.lead();
    until("it has spoken", || bench.position().is_some()).await;
    bench.join(2, 41);
    until("it speaks with the new key", || bench.position().is_some_and(|p| p.serial == 2)).await;
    bench.revoke(1, &[("eu", 2)]).await;
    until("it is no member", || bench.found("NotAMember")).await;
    bench.join(3, 42);
    until("it is one again", || bench.position().is_some_and(|p| p.serial == 3)).await;
    until("all is well", || !bench.found("NotAMember")).await;
    running.end().await;
}

#[tokio::test]
async fn a_torn_member_is_mended() {
    let bench = Bench::new();
    let running = bench.lead();
    bench.tunnel_node("a").await;
    until("it has spoken", || bench.is_whole() && bench.tunnels().len() == 1).await;
    let (mut member, nodes) = bench.member().unwrap();
    member.namespaces = Some(tombolo_proto::trust::record_hash(b"of another statement"));
    assert!(!is_whole(&member, &nodes));
    // Who mends it may be as fast as a reader: only that it was written is looked at.
    let torn = bench.directory.write_member(&eu(), &member, &nodes).await.unwrap();
    assert_ne!(torn, Applied::default());
    until("it is whole again", || bench.is_whole()).await;
    running.end().await;
}

#[tokio::test]
async fn only_the_administrator_ends_a_member() {
    let bench = Bench::new();
    bench.export("api");
    let running = bench.lead();
    until("the export is imported", || bench.imports() == 1).await;
    running.end().await;
    // Somebody else's membership stands there: damage, not a revocation.
    let (stranger, _) = membership("us", 7, &["10.7.0.0/16"]);
    let good = bench.member().unwrap();
    bench.directory.write_member(&eu(), &object(&stranger), &BTreeMap::new()).await.unwrap();
    let running = bench.lead();
    until("it is told", || bench.found("NotAMember")).await;
    // It ends after what it does about that.
    running.end().await;
    assert_eq!(bench.imports(), 1);
    let file = bench.directory.root().join(STATE).join("members.tombolo.dev/_/eu.json");
    std::fs::remove_file(file).unwrap();
    bench.directory.write_member(&eu(), &good.0, &good.1).await.unwrap();
    let running = bench.lead();
    until("it speaks again", || !bench.found("NotAMember") && bench.is_whole()).await;
    bench.revoke(1, &[("eu", 1)]).await;
    until("what it imported is gone", || bench.imports() == 0).await;
    running.end().await;
}

#[tokio::test]
async fn a_write_that_fails_holds_up_no_other() {
    let bench = Bench::new();
    bench.export("api");
    let slices = bench.directory.root().join(STATE).join("endpointslices.discovery.k8s.io");
    std::fs::write(&slices, "a file where a directory should be").unwrap();
    let running = bench.lead();
    until("the import is there", || bench.imports() == 1).await;
    until("it has spoken", || bench.position().is_some()).await;
    let told = || {
        let now = bench.directory.read();
        now.statuses
            .get()
            .is_some_and(|all| all.values().any(|status| status.conditions.contains_key("Valid")))
    };
    until("the export's status is told", told).await;
    std::fs::remove_file(&slices).unwrap();
    until("the slices are there", || bench.directory.read().slices.get().is_some_and(|s| !s.is_empty()))
        .await;
    running.end().await;
}

/// Whether it conflicts with others is known only once its service was planned, and a write on an API server is dear.
#[tokio::test]
async fn of_many_exports_each_is_told_at_once_all_of_how_it_stands() {
    const MANY: usize = 200;
    let bench = Bench::new();
    (0..MANY).for_each(|n| bench.export(&format!("api-{n}")));
    let api = Blind::open(bench.directory.root());
    let running = bench.lead_by(api.clone()).await;
    let told = || api.told.lock().unwrap().clone();
    let keys = || told().into_iter().map(|(key, _)| key).collect::<BTreeSet<_>>();
    until("all are told", || keys().len() == MANY).await;
    assert!(told().iter().all(|(_, status)| status.conditions.contains_key("Conflict")));
    running.end().await;
}

#[tokio::test]
async fn it_never_speaks_below_what_its_member_says() {
    let bench = Bench::new();
    let running = bench.lead();
    until("it has spoken", || bench.position().is_some()).await;
    running.end().await;
    // The Lease is lost, and the clock was far ahead then.
    let (mut member, _) = bench.member().unwrap();
    let (membership, key) = ours(1, 40);
    let far = Position { serial: 1, generation: 0, epoch: 9_000_000_000, sequence: 5 };
    let said = decode_statement(&member.statement.unwrap().payload).unwrap();
    let said = tombolo_proto::trust::Statement { position: far, ..said };
    member.statement = Some(said.sign(&key));
    membership.statement(member.statement.as_ref().unwrap()).unwrap();
    bench.directory.write_member(&eu(), &member, &BTreeMap::new()).await.unwrap();
    std::fs::remove_dir_all(bench.directory.root().join(STATE).join("leases.coordination.k8s.io")).unwrap();
    let running = bench.lead();
    until("it speaks above", || bench.position().is_some_and(|p| p > far)).await;
    assert_eq!(bench.position().unwrap().epoch, far.epoch + 1);
    assert!(matches!(bench.directory.read().members, Known::Yes(_)));
    running.end().await;
}

#[tokio::test]
async fn a_rotated_key_is_spoken_with_at_once() {
    let bench = Bench::new();
    let running = bench.lead();
    until("it has spoken", || bench.position().is_some()).await;
    for generation in 1..4 {
        assert_eq!(bench.directory.rotate_cluster_key().unwrap().generation, generation);
        until("it speaks with the new key", || bench.position().is_some_and(|p| p.generation == generation))
            .await;
        until("its Member is whole", || bench.is_whole()).await;
        let (member, _) = bench.member().unwrap();
        let (_, roots) = set();
        let membership = Membership::verify(&roots, &member.grant, &member.bindings).unwrap();
        membership.statement(member.statement.as_ref().unwrap()).unwrap();
    }
    assert!(!bench.found("KeyMismatch"));
    running.end().await;
}

#[tokio::test]
async fn a_rotation_that_was_cut_off_silences_nobody() {
    let bench = Bench::new();
    let running = bench.lead();
    until("it has spoken", || bench.position().is_some()).await;
    bench.directory.rotate_cluster_key_until(Step::Kept).unwrap();
    // It goes on with the old key, and so does one that starts now.
    let before = bench.position();
    bench.export("api");
    running.end().await;
    let running = bench.lead();
    until("it speaks on", || bench.position() > before).await;
    assert_eq!(bench.position().unwrap().generation, 0);
    bench.directory.rotate_cluster_key_until(Step::Bound).unwrap();
    until("it speaks with the new key", || bench.position().is_some_and(|p| p.generation == 1)).await;
    running.end().await;
    let running = bench.lead();
    let before = bench.position();
    until("it speaks on", || bench.position() > before).await;
    assert!(bench.directory.rotate_cluster_key().unwrap().resumed);
    assert!(!bench.found("KeyMismatch"));
    running.end().await;
}

#[tokio::test]
async fn who_leaves_says_nothing_and_may_come_back() {
    let bench = Bench::new();
    bench.export("api");
    bench.tunnel_node("a").await;
    let running = bench.lead();
    until("the export is imported", || bench.imports() == 1 && bench.tunnels().len() == 1).await;
    let before = bench.position();
    let leaving = |leaving: bool| {
        let mut known = bench.directory.read_clusterset().unwrap().unwrap();
        known.value.leaving = leaving;
        (known.value, known.version)
    };
    let (set, version) = leaving(true);
    bench.directory.write_clusterset(&set, Some(&version)).await.unwrap();
    until("nothing is left", || bench.imports() == 0 && bench.tunnels().is_empty() && bench.is_whole()).await;
    assert!(bench.position() > before);
    let silent = bench.position();
    bench.tunnel_node("b").await;
    running.end().await;
    // A leader that starts now says nothing either, but for its new epoch.
    let running = bench.lead();
    until("it has spoken", || bench.position() > silent).await;
    assert!(bench.tunnels().is_empty() && bench.imports() == 0);
    let (set, version) = leaving(false);
    bench.directory.write_clusterset(&set, Some(&version)).await.unwrap();
    until("all is back", || bench.imports() == 1 && bench.tunnels().len() == 2).await;
    running.end().await;
}
