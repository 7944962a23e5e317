//! Changes are seen soon, whole, and once.

use std::time::{Duration, Instant};

use super::*;

/// Waits until the snapshot is as wanted; how long that took.
async fn until(
    watch: &mut Receiver<Arc<Observed>>,
    what: &str,
    good: impl Fn(&Observed) -> bool,
) -> Duration {
    let start = Instant::now();
    let wait = watch.wait_for(|observed| good(observed));
    match tokio::time::timeout(Duration::from_secs(10), wait).await {
        Ok(seen) => {
            seen.unwrap();
        }
        Err(_) => panic!("not seen: {what}"),
    }
    start.elapsed()
}

#[tokio::test]
async fn changes_are_seen_soon() {
    let (_temporary, directory) = directory();
    let mut watch = directory.observe();
    until(&mut watch, "the first reading", |o| o.services.is_known() && o.imports.is_known()).await;
    let mut worst = Duration::ZERO;
    for turn in 0..20 {
        let name = format!("s{turn}");
        put(&directory, &format!("team-{}/{name}.yaml", turn % 3), service(&name));
        worst = worst.max(until(&mut watch, &name, |o| names(o).contains(&name)).await);
    }
    for turn in 0..20 {
        let name = format!("s{turn}");
        remove(&directory, &format!("team-{}/{name}.yaml", turn % 3));
        worst = worst.max(until(&mut watch, &name, |o| !names(o).contains(&name)).await);
    }
    let node = TunnelNode {
        devices: BTreeMap::new(),
        candidates: vec![],
        outside: BTreeSet::new(),
        prefixes: BTreeSet::new(),
        unreached: BTreeSet::new(),
    };
    let mut worst_state = Duration::ZERO;
    for turn in 0..20 {
        let name = NodeName::new(&format!("n{turn}")).unwrap();
        directory.write_tunnel_node(&name, &node).await.unwrap();
        let seen = until(&mut watch, "a node", |o| o.tunnel_nodes.get().unwrap().contains_key(&name)).await;
        worst_state = worst_state.max(seen);
    }
    eprintln!("seen at the latest after {worst:?} (manifests) and {worst_state:?} (state)");
    assert!(worst < Duration::from_secs(2) && worst_state < Duration::from_secs(2));
}

#[tokio::test]
async fn a_file_is_read_when_its_writer_closes_it() {
    use std::io::Write;
    let (_temporary, directory) = directory();
    let both = format!("{}---\n{}", service("a"), service("b"));
    put(&directory, "a.yaml", &both);
    let mut watch = directory.observe();
    until(&mut watch, "both", |o| names(o).len() == 2).await;
    // As an editor or `cat >` does it: cut, half, pause, rest.
    let mut file = std::fs::File::create(directory.root().join(MANIFESTS).join("a.yaml")).unwrap();
    file.write_all(service("a").as_bytes()).unwrap();
    file.flush().unwrap();
    let other = format!("{}x", "o".repeat(3));
    put(&directory, "other.yaml", service(&other));
    until(&mut watch, "the other", |o| names(o).contains(&other)).await;
    assert_eq!(names(&watch.borrow()).len(), 3, "half a file is not read");
    file.write_all(b"---\n").unwrap();
    file.write_all(service("c").as_bytes()).unwrap();
    drop(file);
    until(&mut watch, "the new", |o| names(o) == ["a", "c", &other]).await;
}

#[tokio::test]
async fn a_disk_that_goes_and_comes_back_takes_nothing_away() {
    let (_temporary, directory) = directory();
    put(&directory, "a.yaml", service("a"));
    let mut watch = directory.observe();
    until(&mut watch, "the service", |o| names(o) == ["a"]).await;
    let away = directory.root().join("away");
    std::fs::rename(directory.root().join(MANIFESTS), &away).unwrap();
    until(&mut watch, "that it is gone", |o| !o.services.is_known()).await;
    assert!(watch.borrow().findings.iter().any(|f| f.reason == "DirectoryMissing"));
    std::fs::rename(&away, directory.root().join(MANIFESTS)).unwrap();
    until(&mut watch, "that it is back", |o| names(o) == ["a"]).await;
    put(&directory, "b.yaml", service("b"));
    until(&mut watch, "new files in it", |o| names(o) == ["a", "b"]).await;
}

#[tokio::test]
async fn a_thousand_objects() {
    let (_temporary, directory) = directory();
    let mut watch = directory.observe();
    until(&mut watch, "the first reading", |o| o.services.is_known()).await;
    let start = Instant::now();
    for number in 0..500 {
        put(&directory, &format!("{number}.yaml"), service(&format!("s{number}")));
    }
    let many: Vec<String> = (500..1000).map(|number| service(&format!("s{number}"))).collect();
    put(&directory, "many.yaml", many.join("---\n"));
    until(&mut watch, "all", |o| names(o).len() == 1000).await;
    let all = start.elapsed();
    put(&directory, "7.yaml", service("other"));
    let one = until(&mut watch, "one change", |o| names(o).contains(&"other".to_owned())).await;
    eprintln!("1,000 objects seen after {all:?}, one change among them after {one:?}");
    assert!(one < Duration::from_secs(2));
}

#[tokio::test]
async fn nothing_is_told_when_nothing_changed() {
    let (_temporary, directory) = directory();
    put(&directory, "a.yaml", service("a"));
    let mut watch = directory.observe();
    until(&mut watch, "the service", |o| names(o) == ["a"]).await;
    watch.mark_unchanged();
    // Written again with the same content, and a Lease renewed, which nobody plans by.
    put(&directory, "a.yaml", service("a"));
    let lease = Lease { holder: None, duration: 1, acquired: 1, renewed: 1, transitions: 0, epoch: 0 };
    directory.write_lease(&lease, None).await.unwrap();
    put(&directory, "b.yaml", service("b"));
    until(&mut watch, "the second", |o| names(o) == ["a", "b"]).await;
    assert!(!watch.has_changed().unwrap());
}

#[tokio::test]
async fn the_watch_ends_with_the_directory() {
    let (_temporary, directory) = directory();
    let mut watch = directory.observe();
    until(&mut watch, "the first reading", |o| o.services.is_known()).await;
    drop(directory);
    let ended = async { while watch.changed().await.is_ok() {} };
    tokio::time::timeout(Duration::from_secs(10), ended).await.unwrap();
}
