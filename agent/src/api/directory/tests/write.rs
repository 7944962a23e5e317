//! What we write: compare-and-swap, nothing when equal, whole or not at all.

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tombolo_agent_core::object::Condition;
use tombolo_agent_core::world::{ClustersetRanges, Reach, Topology};
use tombolo_proto::model::{Backend, Family, Port, Protocol, ServiceType};
use tombolo_proto::testing::{cluster, invitation, key as seed_key};

use super::*;
use crate::api::cache::Cache;

fn import(clusters: &[&str]) -> Import {
    Import {
        kind: ServiceType::ClusterSetIP,
        ports: vec![Port { name: None, protocol: Protocol::Tcp, port: 80, app_protocol: None }],
        ips: vec!["198.19.0.2".parse().unwrap()],
        families: vec![Family::V4],
        affinity: None,
        internal_local: false,
        traffic_distribution: None,
        labels: [("team".to_owned(), "sea".to_owned())].into(),
        annotations: BTreeMap::new(),
        clusters: clusters.iter().map(|c| cluster(c)).collect(),
        preferences: Default::default(),
    }
}

fn slices(count: u32) -> Objects<SliceKey, Slice> {
    let entry = |index: u32| {
        let service = key(&format!("ns-{}/api", index % 20));
        let address = std::net::Ipv4Addr::from(0x0a01_0000 + index).into();
        let backend = Backend { address, hostname: None, ready: true, serving: true, terminating: false };
        let ports = vec![Port { name: None, protocol: Protocol::Tcp, port: 8080, app_protocol: None }];
        let key = SliceKey { service, source: cluster("eu"), family: Family::V4, index };
        (key, Slice { ports, backends: vec![backend], ..Slice::default() })
    };
    Objects { set: (0..count).map(entry).collect(), keep: BTreeSet::new() }
}

fn lease(epoch: u64) -> Lease {
    Lease { holder: Some("a".to_owned()), duration: 15, acquired: 1, renewed: 2, transitions: 0, epoch }
}

#[tokio::test]
async fn equal_objects_are_not_written() {
    let (_temporary, directory) = directory();
    let mut imports: Objects<ServiceKey, Import> = Objects::default();
    imports.set.insert(key("production/a"), import(&["eu", "us"]));
    imports.set.insert(key("production/b"), import(&["eu"]));
    let applied = directory.apply_imports(&imports).await.unwrap();
    assert_eq!(applied, Applied { written: 2, deleted: 0 });
    assert_eq!(directory.read().imports, Known::Yes(imports.set.clone().into()));
    assert_eq!(directory.read().findings, []);

    let before = snapshot(&directory.root().join(STATE));
    assert!(directory.apply_imports(&imports).await.unwrap().is_nothing());
    // Another process, which has no cache, finds nothing to do either.
    let other = Directory::open(directory.root()).unwrap();
    assert!(other.apply_imports(&imports).await.unwrap().is_nothing());
    assert_eq!(snapshot(&directory.root().join(STATE)), before);

    // One changes, one goes; what is to be kept is left.
    imports.set.insert(key("production/a"), import(&["us"]));
    imports.set.remove(&key("production/b"));
    imports.keep.insert(key("production/b"));
    assert_eq!(directory.apply_imports(&imports).await.unwrap(), Applied { written: 1, deleted: 0 });
    imports.keep.clear();
    assert_eq!(directory.apply_imports(&imports).await.unwrap(), Applied { written: 0, deleted: 1 });
    assert_eq!(directory.read().imports, Known::Yes(imports.set.clone().into()));
}

#[tokio::test]
async fn what_others_changed_is_mended() {
    let (_temporary, directory) = directory();
    let wanted = slices(3);
    directory.apply_slices(&wanted).await.unwrap();
    let state = directory.root().join(STATE).join(Kind::EndpointSlice.plural());
    let files: Vec<_> = snapshot(&state).into_keys().collect();
    let text = std::fs::read_to_string(state.join(&files[0])).unwrap();
    std::fs::write(state.join(&files[0]), text.replace("\"ready\": true", "\"ready\": false")).unwrap();
    std::fs::write(state.join(&files[1]), "half an obj").unwrap();
    std::fs::remove_file(state.join(&files[2])).unwrap();
    std::fs::write(state.join("stray.json"), "{}").unwrap();
    let observed = directory.read();
    assert_eq!(observed.slices.get().unwrap().len(), 1);
    assert_eq!(observed.findings.len(), 2, "{:#?}", observed.findings);
    assert_eq!(directory.apply_slices(&wanted).await.unwrap().written, 3);
    assert_eq!(directory.read().slices, Known::Yes(wanted.set.into()));
}

#[tokio::test]
async fn the_lease_is_compared_and_swapped() {
    let (_temporary, directory) = directory();
    assert_eq!(directory.lease().await.unwrap(), None);
    let first = directory.write_lease(&lease(1), None).await.unwrap();
    let read = directory.lease().await.unwrap().unwrap();
    assert_eq!((read.value, &read.version), (lease(1), &first));
    let second = directory.write_lease(&lease(2), Some(&first)).await.unwrap();
    for stale in [None, Some(&first)] {
        let error = directory.write_lease(&lease(3), stale).await.unwrap_err();
        assert!(matches!(error, Error::Conflict { .. }), "{error}");
    }
    assert_eq!(directory.lease().await.unwrap().unwrap().value, lease(2));
    // Deleted and made anew, it never has a version again that it had before.
    let path = directory
        .root()
        .join(STATE)
        .join("leases.coordination.k8s.io/tombolo-system/tombolo-controller.json");
    std::fs::remove_file(path).unwrap();
    let third = directory.write_lease(&lease(2), None).await.unwrap();
    assert_ne!(third, first);
    assert_ne!(third, second);
}

#[tokio::test]
async fn a_deposed_leader_writes_nothing() {
    let (_temporary, directory) = directory();
    let successor = Directory::open(directory.root()).unwrap();
    let first = directory.write_lease(&lease(1), None).await.unwrap();
    directory.lead_as(1);
    directory.apply_slices(&slices(2)).await.unwrap();
    successor.write_lease(&lease(2), Some(&first)).await.unwrap();
    let before = snapshot(&directory.root().join(STATE));
    for outcome in [
        directory.apply_slices(&Objects::default()).await,
        directory.apply_imports(&Objects::default()).await,
        directory.delete_member(&cluster("eu")).await,
    ] {
        assert!(matches!(outcome, Err(Error::NotLeading)), "{outcome:?}");
    }
    assert_eq!(snapshot(&directory.root().join(STATE)), before);
    successor.lead_as(2);
    assert_eq!(successor.apply_slices(&slices(1)).await.unwrap().deleted, 1);
}

#[tokio::test]
async fn the_lease_waits_for_no_other_write() {
    let (_temporary, directory) = directory();
    directory.write_lease(&lease(1), None).await.unwrap();
    let lock = std::fs::File::open(directory.root().join(STATE).join(".lock"))
        .or_else(|_| std::fs::File::create(directory.root().join(STATE).join(".lock")));
    let lock = lock.unwrap();
    lock.lock().unwrap();
    let version = directory.lease().await.unwrap().unwrap().version;
    directory.write_lease(&lease(2), Some(&version)).await.unwrap();
    assert_eq!(directory.lease().await.unwrap().unwrap().value.epoch, 2);
    lock.unlock().unwrap();
}

#[tokio::test]
async fn an_older_grant_does_not_replace_a_newer_one() {
    let (_temporary, directory) = directory();
    let (_, _, member) = joined(&directory);
    let newer = invitation("eu", 2, &["10.1.0.0/16"]).accept(&seed_key(9)).unwrap();
    let newer = Member {
        grant: newer.grant().envelope().clone(),
        bindings: newer.bindings().iter().map(|b| b.envelope().clone()).collect(),
        ..member.clone()
    };
    directory.write_member(&cluster("eu"), &newer, &BTreeMap::new()).await.unwrap();
    let error = directory.write_member(&cluster("eu"), &member, &BTreeMap::new()).await.unwrap_err();
    assert!(matches!(error, Error::Conflict { .. }), "{error}");
    assert_eq!(directory.read().members.get().unwrap()[&cluster("eu")], newer);
}

/// Adds one to the epoch so many times, whatever others do in between.
fn count_up(root: &Path, times: u64) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let directory = Directory::open(root).unwrap();
    let mut done = 0;
    while done < times {
        let known = directory.read_lease().unwrap();
        let next = lease(known.as_ref().map_or(0, |l| l.value.epoch) + 1);
        match runtime.block_on(directory.write_lease(&next, known.as_ref().map(|l| &l.version))) {
            Ok(_) => done += 1,
            Err(Error::Conflict { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

const CHILD: &str = "TOMBOLO_TEST_DIRECTORY";

/// Not a test of its own: the other process of the tests below.
#[test]
#[ignore = "run by others"]
fn child() {
    let Ok(text) = std::env::var(CHILD) else { return };
    let (what, root) = text.split_once(':').unwrap();
    match what {
        "count" => count_up(Path::new(root), 40),
        _ => {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let directory = Directory::open(root).unwrap();
            for turn in 0_u32.. {
                let wanted = if turn % 2 == 0 { slices(12) } else { slices(4) };
                runtime.block_on(directory.apply_slices(&wanted)).unwrap();
                count_up(Path::new(root), 1);
            }
        }
    }
}

fn spawn(what: &str, root: &Path) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["api::directory::tests::write::child", "--exact", "--ignored"])
        .env(CHILD, format!("{what}:{}", root.display()))
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn no_swap_is_lost_between_processes_and_threads() {
    let (_temporary, directory) = directory();
    let mut children = [spawn("count", directory.root()), spawn("count", directory.root())];
    std::thread::scope(|scope| {
        scope.spawn(|| count_up(directory.root(), 40));
        scope.spawn(|| count_up(directory.root(), 40));
    });
    assert!(children.iter_mut().all(|child| child.wait().unwrap().success()));
    assert_eq!(directory.read_lease().unwrap().unwrap().value.epoch, 160);
}

#[test]
fn a_killed_writer_leaves_whole_objects() {
    let (_temporary, directory) = directory();
    let mut epoch = 0;
    for round in 0..12_u64 {
        let mut child = spawn("write", directory.root());
        // Once it writes, at another moment each time.
        let deadline = Instant::now() + Duration::from_secs(20);
        while directory.read_lease().unwrap().map_or(0, |l| l.value.epoch) <= epoch {
            assert!(Instant::now() < deadline, "the other process does not write");
        }
        let mut spins = 0_u64;
        while spins < round * 300_000 {
            spins = std::hint::black_box(spins + 1);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let observed = directory.read();
        assert_eq!(observed.findings, [], "round {round}");
        assert!((4..=12).contains(&observed.slices.get().unwrap().len()));
        // Its lock died with it; the next writer goes on at once.
        count_up(directory.root(), 1);
        epoch = directory.read_lease().unwrap().unwrap().value.epoch;
    }
}

#[test]
fn what_a_killed_writer_left_is_ignored_and_cleaned() {
    let (_temporary, directory) = directory();
    count_up(directory.root(), 1);
    let temporary = directory.root().join(STATE).join(".lease.tmp");
    std::fs::write(temporary.join("0"), "{\"half").unwrap();
    assert_eq!(directory.read().findings, []);
    count_up(directory.root(), 1);
    assert_eq!(std::fs::read_dir(temporary).unwrap().count(), 0);
    assert_eq!(directory.read_lease().unwrap().unwrap().value.epoch, 2);
}

#[test]
fn a_refused_write_changes_nothing() {
    let (_temporary, directory) = directory();
    count_up(directory.root(), 1);
    let before = snapshot(&directory.root().join(STATE));
    let lease_id = lease_id();
    let result = directory.store.transact(|t| {
        let id = ObjectId::cluster(Kind::TunnelNode, "a").unwrap();
        t.put(&id, serde_json::json!({ "metadata": {} }))?;
        t.swap(&lease_id, serde_json::json!({ "metadata": {} }), None)?;
        Ok(())
    });
    assert!(matches!(result, Err(Error::Conflict { .. })));
    assert_eq!(snapshot(&directory.root().join(STATE)), before);
}

fn lease_id() -> ObjectId {
    lease::id().unwrap()
}

use crate::api::kind::lease;

#[tokio::test]
async fn a_held_lock_ends_in_an_error_that_names_it() {
    let (_temporary, directory) = directory();
    let path = directory.root().join(STATE).join(".lock");
    let held = std::fs::File::create(&path).unwrap();
    held.lock().unwrap();
    let error = directory.apply_slices(&slices(1)).await.unwrap_err();
    assert!(error.to_string().contains(".lock"), "{error}");
}

#[tokio::test]
async fn exports_get_a_creation_that_stays() {
    let (_temporary, directory) = directory();
    put(&directory, "a.yaml", export("api"));
    let observed = directory.read();
    assert_eq!(observed.exports.get().unwrap().len(), 0, "its creation is not known yet");
    assert_eq!(observed.declared_exports.get().unwrap().len(), 1);
    assert_eq!(directory.stamp_exports(1000).await.unwrap().written, 1);
    assert!(directory.stamp_exports(2000).await.unwrap().is_nothing());
    assert_eq!(directory.read().exports.get().unwrap()[&key("production/api")].created, 1000);

    // A status beside it changes nothing of that, nor does it count as a change when it is the same.
    let condition = Condition { status: true, reason: "Valid".to_owned(), message: "all is well".to_owned() };
    let status = ExportStatus { conditions: [("Valid".to_owned(), condition)].into() };
    let mut statuses = BTreeMap::from([(key("production/api"), status.clone())]);
    statuses.insert(key("production/gone"), status.clone());
    assert_eq!(directory.apply_statuses(&statuses, 3000).await.unwrap().written, 1);
    assert!(directory.apply_statuses(&statuses, 4000).await.unwrap().is_nothing());
    let observed = directory.read();
    assert_eq!(observed.statuses.get().unwrap()[&key("production/api")], status);
    assert_eq!(observed.exports.get().unwrap()[&key("production/api")].created, 1000);

    // Exported anew, it is new.
    remove(&directory, "a.yaml");
    assert_eq!(directory.stamp_exports(5000).await.unwrap().deleted, 1);
    put(&directory, "b.yaml", export("api"));
    directory.stamp_exports(6000).await.unwrap();
    assert_eq!(directory.read().exports.get().unwrap()[&key("production/api")].created, 6000);
}

#[tokio::test]
async fn a_disk_that_is_gone_stamps_nothing() {
    let (_temporary, directory) = directory();
    put(&directory, "a.yaml", export("api"));
    directory.stamp_exports(1000).await.unwrap();
    let manifests = directory.root().join(MANIFESTS);
    std::fs::rename(&manifests, directory.root().join("away")).unwrap();
    let observed = directory.read();
    assert_eq!(observed.exports, Known::No);
    assert_eq!(observed.services, Known::No);
    assert!(observed.statuses.is_known());
    assert!(directory.stamp_exports(2000).await.unwrap().is_nothing());
    std::fs::rename(directory.root().join("away"), &manifests).unwrap();
    assert_eq!(directory.read().exports.get().unwrap()[&key("production/api")].created, 1000);
    std::fs::rename(directory.root().join(STATE), directory.root().join("away")).unwrap();
    let observed = directory.read();
    assert_eq!((&observed.imports, &observed.members), (&Known::No, &Known::No));
    assert_eq!(observed.exports, Known::No);
    assert!(observed.services.is_known());
    assert!(directory.apply_imports(&Objects::default()).await.is_err());
}

fn joined(directory: &Directory) -> (ClusterSet, SigningKey, Member) {
    let invitation = invitation("eu", 1, &["10.1.0.0/16"]);
    let key = seed_key(9);
    let membership = invitation.accept(&key).unwrap();
    let set = ClusterSet {
        set: invitation.roots.set(),
        cluster: cluster("eu"),
        roots: invitation.roots.envelopes().cloned().collect(),
        brokers: Some(invitation.brokers.envelope().clone()),
        revocations: None,
        reach: Reach::Exports,
        topology: Topology::Gateway,
        clusterset: Some(ClustersetRanges { v4: Some("198.19.0.0/16".parse().unwrap()), v6: None }),
        reserved: BTreeSet::new(),
        rotations: BTreeMap::new(),
        leaving: false,
    };
    let member = Member {
        grant: membership.grant().envelope().clone(),
        bindings: membership.bindings().iter().map(|b| b.envelope().clone()).collect(),
        spoken: None,
        statement: None,
        namespaces: None,
    };
    directory.join(&set, &key, &member).unwrap();
    (set, key, member)
}

#[tokio::test]
async fn joining_makes_a_member() {
    let (_temporary, directory) = directory();
    assert_eq!(directory.read().clusterset, Known::Yes(None));
    assert!(directory.cluster_key().await.unwrap().is_none());
    let (mut set, key, member) = joined(&directory);
    let observed = directory.read();
    assert_eq!(observed.findings, []);
    assert_eq!(observed.clusterset, Known::Yes(Some(set.clone())));
    assert_eq!(observed.members.get().unwrap()[&cluster("eu")], member);
    assert_eq!(directory.cluster_key().await.unwrap().unwrap().public(), key.public());
    assert_eq!(directory.ensure_cluster_key().unwrap().public(), key.public());
    let secret = directory.root().join(STATE).join("secrets/tombolo-system/tombolo-cluster-key.json");
    assert_eq!(std::fs::metadata(&secret).unwrap().permissions().mode() & 0o777, 0o600);
    let above = secret.parent().unwrap();
    assert_eq!(std::fs::metadata(above).unwrap().permissions().mode() & 0o777, 0o700);

    directory.join(&set, &key, &member).unwrap();
    let read = directory.clusterset().await.unwrap().unwrap();
    set.reach = Reach::All;
    let version = directory.write_clusterset(&set, Some(&read.version)).await.unwrap();
    assert_ne!(version, read.version);
    assert!(directory.write_clusterset(&set, Some(&read.version)).await.is_err());

    set.cluster = cluster("us");
    let error = directory.join(&set, &key, &member).unwrap_err();
    assert!(matches!(error, Error::AlreadyMember { .. }), "{error}");
    directory.leave().unwrap();
    assert_eq!(directory.read().clusterset, Known::Yes(None));
    assert!(directory.cluster_key().await.unwrap().is_none());
    directory.join(&set, &key, &member).unwrap();
}

#[tokio::test]
async fn members_and_their_nodes() {
    let (_temporary, directory) = directory();
    let (_, _, member) = joined(&directory);
    let record = |n: usize| {
        let key = RecordKey::new(1, &[&format!("node-{n:04}")]).unwrap();
        (key.clone(), Record { key, body: vec![7; 300].into() })
    };
    let mut nodes: BTreeMap<_, _> = (0..250).map(record).collect();
    let us = cluster("us");
    assert_eq!(directory.write_member(&us, &member, &nodes).await.unwrap().written, 4);
    assert!(directory.write_member(&us, &member, &nodes).await.unwrap().is_nothing());
    assert_eq!(directory.read().member_nodes.get().unwrap()[&us], nodes);
    nodes.remove(&record(120).0);
    assert_eq!(
        directory.write_member(&us, &member, &nodes).await.unwrap(),
        Applied { written: 1, deleted: 0 }
    );
    nodes.clear();
    assert_eq!(
        directory.write_member(&us, &member, &nodes).await.unwrap(),
        Applied { written: 0, deleted: 3 }
    );
    let nodes = (0..3).map(record).collect();
    directory.write_member(&us, &member, &nodes).await.unwrap();
    assert_eq!(directory.delete_member(&us).await.unwrap().deleted, 2);
    let observed = directory.read();
    assert!(!observed.members.get().unwrap().contains_key(&us));
    assert!(observed.members.get().unwrap().contains_key(&cluster("eu")));
    assert_eq!(observed.findings, []);
}

#[tokio::test]
async fn a_node_too_long_for_a_file_is_refused() {
    let (_temporary, directory) = directory();
    let label = "a".repeat(62);
    let name = NodeName::new(&format!("{label}.{label}.{label}.{label}")).unwrap();
    let node = TunnelNode {
        devices: BTreeMap::new(),
        candidates: vec![],
        outside: BTreeSet::new(),
        prefixes: BTreeSet::new(),
        unreached: BTreeSet::new(),
    };
    let error = directory.write_tunnel_node(&name, &node).await.unwrap_err();
    assert!(error.to_string().contains("longer"), "{error}");
    let name = NodeName::new("gw-1.eu").unwrap();
    directory.write_tunnel_node(&name, &node).await.unwrap();
    assert_eq!(directory.read().tunnel_nodes, Known::Yes([(name.clone(), node)].into()));
    assert_eq!(directory.delete_tunnel_node(&name).await.unwrap().deleted, 1);
}

#[test]
fn export_edits_only_its_own_documents() {
    let (_temporary, directory) = directory();
    let file = directory.root().join(MANIFESTS).join("tombolo-exports.yaml");
    let read = || std::fs::read_to_string(&file).unwrap();
    assert_eq!(directory.unexport(&key("production/a")).unwrap(), Edited::Already(vec![]));
    assert_eq!(directory.export(&key("production/a")).unwrap(), Edited::Changed(file.clone()));
    assert_eq!(directory.export(&key("production/a")).unwrap(), Edited::Already(vec![file.clone()]));
    let people = "---\n# ours, by hand\napiVersion: multicluster.x-k8s.io/v1beta1\nkind: ServiceExport\nmetadata: {name: b,   namespace: production}\n---\nx: [ broken\n";
    std::fs::write(&file, read() + people).unwrap();
    directory.export(&key("production/c")).unwrap();
    let declared = directory.read().declared_exports;
    let wanted = ["a", "b", "c"].map(|n| key(&format!("production/{n}")));
    assert_eq!(declared.get().unwrap().iter().collect::<Vec<_>>(), wanted.iter().collect::<Vec<_>>());
    directory.unexport(&key("production/a")).unwrap();
    directory.unexport(&key("production/c")).unwrap();
    assert!(read().contains(people.trim_end()), "{}", read());
    assert_eq!(
        directory.read().declared_exports.get().unwrap().iter().collect::<Vec<_>>(),
        [&key("production/b")]
    );

    // What stands in another file is people's.
    put(&directory, "mine.yaml", export("d"));
    let mine = directory.root().join(MANIFESTS).join("mine.yaml");
    assert_eq!(directory.export(&key("production/d")).unwrap(), Edited::Already(vec![mine]));
    let error = directory.unexport(&key("production/d")).unwrap_err();
    assert!(error.to_string().contains("mine.yaml"), "{error}");

    // The last one takes the file with it.
    std::fs::remove_file(&file).unwrap();
    directory.export(&key("production/a")).unwrap();
    directory.unexport(&key("production/a")).unwrap();
    assert!(!file.exists());
}

#[tokio::test]
async fn the_cache_gives_back_what_was_observed() {
    let (temporary, directory) = directory();
    let (_, _, member) = joined(&directory);
    let nodes = [0, 1].map(|n| RecordKey::new(1, &[&format!("n{n}")]).unwrap());
    let nodes = nodes.map(|key| (key.clone(), Record { key, body: vec![1].into() })).into();
    directory.write_member(&cluster("us"), &member, &nodes).await.unwrap();
    directory.apply_slices(&slices(5)).await.unwrap();
    let imports = Objects { set: [(key("ns-1/api"), import(&["eu"]))].into(), keep: BTreeSet::new() };
    directory.apply_imports(&imports).await.unwrap();
    let observed = directory.read();

    let state_dir = temporary.path().join("node");
    let mut cache = Cache::new(&state_dir);
    assert_eq!(cache.load().unwrap(), None);
    assert!(!cache.save(&Observed::default()).unwrap(), "the unknown is not saved");
    assert!(cache.save(&observed).unwrap());
    assert!(!cache.save(&observed).unwrap());
    let loaded = Cache::new(&state_dir).load().unwrap().unwrap();
    assert_eq!(loaded.members, observed.members);
    assert_eq!(loaded.member_nodes, observed.member_nodes);
    assert_eq!(loaded.imports, observed.imports);
    assert_eq!(loaded.slices, observed.slices);
    assert_eq!(loaded.clusterset, observed.clusterset);
    assert_eq!(loaded.nodes, observed.nodes);
    assert_eq!(loaded.services, Known::No);
    std::fs::write(state_dir.join("world.json"), "{\"apiVersion\": ").unwrap();
    let mut cache = Cache::new(&state_dir);
    assert!(cache.load().unwrap_err().to_string().contains("damaged"));
    assert!(cache.save(&observed).unwrap());
}

#[tokio::test]
async fn a_thousand_slices_are_one_batch() {
    let (_temporary, directory) = directory();
    let wanted = slices(1000);
    let start = Instant::now();
    assert_eq!(directory.apply_slices(&wanted).await.unwrap().written, 1000);
    let written = start.elapsed();
    let start = Instant::now();
    assert!(directory.apply_slices(&wanted).await.unwrap().is_nothing());
    let equal = start.elapsed();
    let start = Instant::now();
    assert_eq!(directory.read().slices.get().unwrap().len(), 1000);
    eprintln!(
        "1,000 slices: written in {written:?}, found equal in {equal:?}, read in {:?}",
        start.elapsed()
    );
    // Far above what it takes; one flush for each would be far above this.
    assert!(written < Duration::from_secs(20) && equal < Duration::from_secs(5));
}
