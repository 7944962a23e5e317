//! The real binary, on directories of its own.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

struct Bench {
    dir: TempDir,
}

struct Ran {
    code: i32,
    out: String,
    err: String,
}

impl Bench {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// With a set `harbour`.
    fn founded() -> Self {
        let bench = Self::new();
        bench.run("init harbour --broker 127.0.0.1:9").ok();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, line: &str) -> Ran {
        self.run_with(line, "")
    }

    fn run_with(&self, line: &str, input: &str) -> Ran {
        let mut child = Command::new(env!("CARGO_BIN_EXE_tombolo"))
            .args(line.split_whitespace())
            .current_dir(self.dir.path())
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A command that does not read it closes the pipe.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let output = child.wait_with_output().unwrap();
        Ran {
            code: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    fn token(&self, cluster: &str, ranges: &str) -> String {
        let ranges: String = ranges.split_whitespace().map(|r| format!(" --pod-cidr {r}")).collect();
        self.run(&format!("invite {cluster}{ranges}")).ok()
    }

    fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.run(&format!("{line} -o json")).ok()).unwrap()
    }

    /// Every file and what is in it.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        fn walk(dir: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    found.insert(path.clone(), Vec::new());
                    walk(&path, found);
                } else {
                    found.insert(path.clone(), fs::read(&path).unwrap());
                }
            }
        }
        let mut found = BTreeMap::new();
        walk(self.dir.path(), &mut found);
        found
    }

    /// It fails by `code`, with one line that says `words`, and changes nothing.
    fn refuses_with(&self, line: &str, input: &str, code: i32, words: &[&str]) {
        let before = self.files();
        let ran = self.run_with(line, input);
        assert_eq!(ran.code, code, "{line}: {}{}", ran.out, ran.err);
        assert_eq!(ran.out, "", "{line}");
        let first = ran.err.lines().find(|l| l.starts_with("error:")).expect("an error");
        if code == 1 {
            assert_eq!(ran.err.trim_end(), first, "{line}: one line");
        }
        for word in words {
            assert!(ran.err.contains(word), "{line}: {word:?} is not in {:?}", ran.err);
        }
        assert_eq!(self.files(), before, "{line} changed something");
    }

    fn refuses(&self, line: &str, words: &[&str]) {
        self.refuses_with(line, "", 1, words);
    }
}

impl Ran {
    fn ok(self) -> String {
        assert_eq!(self.code, 0, "{}{}", self.out, self.err);
        self.out
    }
}

const SERVICE: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: production}
---
apiVersion: v1
kind: Service
metadata: {name: api, namespace: production}
spec:
  clusterIP: 10.96.0.10
  ports: [{name: http, port: 8080, protocol: TCP}]
---
apiVersion: v1
kind: Service
metadata: {name: elsewhere, namespace: production}
spec: {type: ExternalName, externalName: example.com}
";

/// As the agent writes it.
const IMPORT: &str = r#"{
  "apiVersion": "multicluster.x-k8s.io/v1beta1",
  "kind": "ServiceImport",
  "metadata": {"name": "shop", "namespace": "production", "labels": {"tombolo.dev/managed-by": "tombolo.dev"}},
  "spec": {"type": "ClusterSetIP", "ips": ["198.19.0.7"], "ipFamilies": ["IPv4"],
           "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]},
  "status": {"clusters": [{"cluster": "us-east"}]}
}"#;

#[test]
fn the_readme_s_way_by_hand() {
    let bench = Bench::new();
    let told = bench.run("init harbour --broker broker.example:4500").ok();
    assert!(told.contains("tombolo-broker --listen [::]:4500 --identity tombolo-set/broker-1.key --set tombolo-set/broker.set"), "{told}");
    let token = bench.token("eu-west", "10.1.0.0/16 fd00:10:1::/48");
    fs::write(bench.path("eu-west.token"), &token).unwrap();
    assert_eq!(token.lines().count(), 1, "the token alone is on standard output");

    let told = bench.run("join --cluster-dir cluster @eu-west.token").ok();
    assert!(told.contains("cluster eu-west of set harbour"), "{told}");
    assert!(told.contains("tombolo-agent --cluster-dir cluster"), "{told}");

    fs::write(bench.path("cluster/manifests/production.yaml"), SERVICE).unwrap();
    let exported = bench.run("export production/api --cluster-dir cluster");
    assert_eq!(exported.err, "", "nothing to warn about");
    assert!(exported.ok().contains("api.production.svc.clusterset.local"));
    let again = bench.run("export production/api --cluster-dir cluster").ok();
    assert!(again.contains("exported already"), "{again}");

    let status = bench.json("status --cluster-dir cluster");
    assert_eq!(status["members"][0]["state"], "silent");
    assert_eq!(status["exports"][0]["service"], "ClusterIP");
    let text = bench.run("status --cluster-dir cluster").ok();
    assert!(text.contains("eu-west (own)"), "{text}");

    let resolved = bench.run("resolve api.production --cluster-dir cluster");
    assert_eq!(resolved.code, 1);
    assert!(
        resolved.out.contains("NXDOMAIN: production/api is exported here, and no agent"),
        "{}",
        resolved.out
    );

    let back = bench.run("unexport production/api --cluster-dir cluster").ok();
    assert!(back.contains("Took the export"), "{back}");
    assert!(!bench.path("cluster/manifests/tombolo-exports.yaml").exists());
    let back = bench.run("unexport production/api --cluster-dir cluster").ok();
    assert!(back.contains("is not exported"), "{back}");
}

#[test]
fn secrets_are_for_their_owner_alone() {
    let bench = Bench::founded();
    let token = bench.token("a", "10.1.0.0/16");
    bench.run_with("join - --cluster-dir c", &token).ok();
    let mode = |name: &str| fs::metadata(bench.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("tombolo-set"), 0o700);
    for name in ["tombolo-set/root-1.key", "tombolo-set/root-2.key", "tombolo-set/broker-1.key"] {
        assert_eq!(mode(name), 0o600, "{name}");
    }
    assert_eq!(mode("c/state/secrets/tombolo-system/tombolo-cluster-key.json"), 0o600);
    // The one-use key signs the binding and is kept nowhere.
    let seed = token.trim().get(token.trim().len() - 40..).unwrap().to_owned();
    for (path, bytes) in bench.files() {
        assert!(!String::from_utf8_lossy(&bytes).contains(&seed), "{} holds the token", path.display());
    }
}

#[test]
fn joining_twice_loses_nothing() {
    let bench = Bench::founded();
    let token = bench.token("a", "10.1.0.0/16");
    let other = bench.token("b", "10.2.0.0/16");
    bench.run_with("join - --cluster-dir c --reach all", &token).ok();
    let before = bench.files();
    let again = bench.run_with("join - --cluster-dir c", &token).ok();
    assert!(again.contains("by this very grant (1) already; nothing was changed"), "{again}");
    assert_eq!(bench.files(), before);
    bench.refuses_with(
        "join - --cluster-dir c",
        &other,
        1,
        &["is cluster a of set", "the token is for cluster b"],
    );

    let changed = bench.run_with("join - --cluster-dir c --reach exports", &token).ok();
    assert!(changed.contains("settings were changed: reach exports"), "{changed}");
    let moved = bench.run_with("join - --cluster-dir c --clusterset-v4 198.18.201.0/24", &token).ok();
    assert!(moved.contains("ClusterSetIPs 198.18.201.0/24"), "{moved}");
    let imports = bench.path("c/state/serviceimports.multicluster.x-k8s.io/production");
    fs::create_dir_all(&imports).unwrap();
    fs::write(imports.join("shop.json"), IMPORT).unwrap();
    let line = "join - --cluster-dir c --clusterset-v4 198.18.200.0/24";
    bench.refuses_with(line, &token, 1, &["cannot be changed while services are imported"]);

    // A newer grant, with another range: the same key, the same tunnel range.
    let key = bench.run("key --cluster-dir c").ok();
    let renewed = bench.run("invite a --renew --pod-cidr 10.1.0.0/16 --pod-cidr 10.3.0.0/16").ok();
    let joined: Value =
        serde_json::from_str(&bench.run_with("join - --cluster-dir c -o json", &renewed).ok()).unwrap();
    assert_eq!(joined["serial"], 3);
    assert_eq!(joined["reach"], "exports", "settings stay");
    assert_eq!(joined["tunnel"][0], "198.18.0.0/24");
    assert_eq!(bench.run("key --cluster-dir c").ok(), key);
    bench.refuses_with("join - --cluster-dir c", &token, 1, &["has the newer grant 3"]);
    let states: Vec<Value> =
        bench.json("members")["items"].as_array().unwrap().iter().map(|m| m["state"].clone()).collect();
    assert_eq!(states, ["replaced", "granted", "granted"]);
}

#[test]
fn an_admission_needs_no_secret() {
    let bench = Bench::founded();
    let key = bench.run("key --cluster-dir c").ok();
    assert_eq!(bench.run("key --cluster-dir c").ok(), key, "made once");
    bench.run("key --cluster-dir other").ok();
    let admission = bench.run(&format!("admit a --pod-cidr 10.1.0.0/16 --key {key}")).ok();
    bench.refuses_with("join - --cluster-dir none", &admission, 1, &["has no key", "tombolo key"]);
    bench.refuses_with("join - --cluster-dir other", &admission, 1, &["is it the right directory?"]);
    bench.run_with("join - --cluster-dir c", &admission).ok();
    assert_eq!(bench.json("status --cluster-dir c")["cluster"]["id"], "a");
    bench.refuses_with("admit b --pod-cidr 10.2.0.0/16 --key AAAA", "", 2, &["not a public key"]);
}

#[test]
fn bad_words_for_the_administrator_change_nothing() {
    let bench = Bench::new();
    bench.refuses("init harbour --broker nonsense", &["\"nonsense\" is not an address"]);
    bench.refuses("init harbour --broker a:1 --broker a:1", &["named twice"]);
    bench.refuses("init harbour --broker a:1 --tunnel-pool 10.0.0.1/16", &["did you mean 10.0.0.0/16?"]);
    bench.refuses("init harbour --broker a:1 --tunnel-pool 10.0.0.0/25", &["smaller than a /24"]);
    bench.refuses_with("init Harbour --broker a:1", "", 2, &["\"Harbour\""]);
    bench.refuses_with("init harbour", "", 2, &["--broker"]);
    bench.refuses("invite a --pod-cidr 10.1.0.0/16", &["holds no set", "tombolo init"]);

    bench.run("init harbour --broker 127.0.0.1:9").ok();
    bench.refuses("init harbour --broker a:1", &["is not empty"]);
    bench.token("a", "10.1.0.0/16");
    bench.refuses("invite b --pod-cidr 10.1.128.0/17", &["overlaps 10.1.0.0/16 of cluster a"]);
    bench.refuses("invite b --pod-cidr 198.18.128.0/17", &["tunnel pool"]);
    bench.refuses("invite a --pod-cidr 10.9.0.0/16", &["already has grant 1", "--renew"]);
    bench.refuses("invite b --renew --pod-cidr 10.9.0.0/16", &["no grant that could be renewed"]);
    bench.refuses_with("invite b --pod-cidr 10.1.1.0/16", "", 2, &["did you mean 10.1.0.0/16?"]);
    bench.refuses_with("invite b --pod-cidr 127.0.0.0/8", "", 2, &["loopback"]);
    bench.refuses_with("invite b --pod-cidr ten", "", 2, &["is not a CIDR"]);
    bench.refuses_with("invite B --pod-cidr 10.2.0.0/16", "", 2, &["cluster id"]);
    bench.refuses("revoke nobody --yes", &["cluster nobody has no grant", "tombolo members"]);
    bench.refuses("revoke a", &["add --yes"]);

    let root = bench.path("tombolo-set/root-1.key");
    fs::set_permissions(&root, fs::Permissions::from_mode(0o644)).unwrap();
    bench.refuses("invite b --pod-cidr 10.2.0.0/16", &["others can read (mode 0644)", "chmod 600"]);
    fs::set_permissions(&root, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&root, "x").unwrap();
    bench.refuses("invite b --pod-cidr 10.2.0.0/16", &["root-1.key is damaged"]);
    fs::remove_file(&root).unwrap();
    bench.token("b", "10.2.0.0/16");
    fs::remove_file(bench.path("tombolo-set/root-2.key")).unwrap();
    bench.refuses("invite c --pod-cidr 10.3.0.0/16", &["no root key of this set"]);
    fs::write(bench.path("tombolo-set/grants/1"), "AAAA").unwrap();
    bench.refuses("members", &["grants/1 is damaged"]);
}

#[test]
fn bad_tokens_change_nothing() {
    let bench = Bench::founded();
    let token = bench.token("a", "10.1.0.0/16");
    let token = token.trim();
    for cut in [0, 1, 9, 20, token.len() / 2, token.len() - 1] {
        let before = bench.files();
        let ran = bench.run_with("join - --cluster-dir c", &token[..cut]);
        assert_eq!((ran.code, ran.err.lines().count()), (1, 1), "cut at {cut}: {}", ran.err);
        assert_eq!(bench.files(), before);
        assert!(cut < 20 || !ran.err.contains(&token[10..20]), "a token is no text for an error");
    }
    bench.refuses_with("join - --cluster-dir c", "hello", 1, &["should begin with"]);
    bench.refuses_with("join - --cluster-dir c", "", 1, &["the token is empty"]);
    bench.refuses("join @nofile --cluster-dir c", &["cannot be read from nofile"]);
    let mut altered = token.to_owned();
    altered.replace_range(50..51, if &token[50..51] == "A" { "B" } else { "A" });
    bench.refuses_with("join - --cluster-dir c", &altered, 1, &["the token is damaged"]);
    let broken = format!("{}\n{}\r\n", &token[..100], &token[100..]);

    let late = "join - --cluster-dir c --clusterset-v4 10.1.0.0/20";
    bench.refuses_with(late, token, 1, &["overlaps 10.1.0.0/16"]);
    bench.refuses_with("join - --cluster-dir c --clusterset-v4 198.19.0.1/16", token, 1, &["did you mean"]);
    bench.refuses_with("join - --cluster-dir c --clusterset-v4 198.19.0.0/31", token, 1, &["too small"]);
    bench.refuses_with("join - --cluster-dir c --reach some", token, 2, &["exports, all"]);
    // Lines that a mail program broke are mended.
    bench.run_with("join - --cluster-dir c", &broken).ok();
}

#[test]
fn a_late_token_is_refused_with_what_to_do() {
    let bench = Bench::founded();
    let token = bench.token("a", "10.1.0.0/16");
    // No clock is set here: the administrator's own tool makes tokens of an hour and more, so sign one by its keys.
    let late = late_token(&bench, token.trim());
    bench.refuses_with(
        "join - --cluster-dir c",
        &late,
        1,
        &["was to be used before 2020-09-13", "invite a --renew"],
    );
}

/// The same grant, to be used before 2020.
fn late_token(bench: &Bench, token: &str) -> String {
    use tombolo_proto::trust::{Grant, Invitation, SigningKey};
    let invitation = Invitation::parse(token).unwrap();
    let text = fs::read_to_string(bench.path("tombolo-set/root-1.key")).unwrap();
    let seed = data_encoding::BASE64.decode(text.trim().as_bytes()).unwrap();
    let root = SigningKey::from_seed(&seed.try_into().unwrap());
    let grant = Grant { bind_before: Some(1_600_000_000), ..(*invitation.grant).clone() };
    let grant = invitation.roots.grant(&grant.sign(&root)).unwrap();
    Invitation { grant, ..invitation }.to_text()
}

#[test]
fn exports_that_will_not_do_are_told() {
    let bench = Bench::founded();
    bench.refuses(
        "export production/api --cluster-dir none",
        &["is not a cluster's directory", "tombolo join"],
    );
    let token = bench.run("invite a --pod-cidr 10.1.0.0/16 --namespaces production,team-*").ok();
    bench.run_with("join - --cluster-dir c", &token).ok();
    fs::write(bench.path("c/manifests/production.yaml"), SERVICE).unwrap();
    bench.refuses_with("export api --cluster-dir c", "", 2, &["NAMESPACE/SERVICE is expected"]);
    bench.refuses_with("export production/API --cluster-dir c", "", 2, &["service name"]);
    bench.refuses("export kube-system/dns --cluster-dir c", &["nothing in it is ever exported"]);
    let warns = |service: &str, word: &str| {
        let ran = bench.run(&format!("export {service} --cluster-dir c"));
        assert!(ran.err.contains(word), "{service}: {}", ran.err);
        assert_eq!(ran.code, 0);
    };
    warns("production/nothing", "there is no service");
    warns("production/elsewhere", "ExternalName");
    warns("default/api", "did not grant this cluster namespace default");
    fs::write(
        bench.path("c/manifests/mine.yaml"),
        "apiVersion: multicluster.x-k8s.io/v1beta1\nkind: ServiceExport\nmetadata: {name: api, namespace: production}\n",
    )
    .unwrap();
    bench.refuses("unexport production/api --cluster-dir c", &["mine.yaml, which you wrote"]);
}

#[test]
fn resolving_says_what_and_why() {
    let bench = Bench::founded();
    let token = bench.token("a", "10.1.0.0/16");
    bench.run_with("join - --cluster-dir c", &token).ok();
    fs::write(bench.path("c/manifests/production.yaml"), SERVICE).unwrap();
    let imports = bench.path("c/state/serviceimports.multicluster.x-k8s.io/production");
    fs::create_dir_all(&imports).unwrap();
    fs::write(imports.join("shop.json"), IMPORT).unwrap();

    for name in ["shop.production", "SHOP.production.svc.clusterset.local."] {
        let found = bench.json(&format!("resolve {name} --cluster-dir c"));
        assert_eq!(found["status"], "NOERROR");
        assert_eq!(found["records"][0]["data"], "198.19.0.7");
        assert_eq!(found["name"], "shop.production.svc.clusterset.local");
    }
    let srv = bench.run("resolve _http._tcp.shop.production.svc --cluster-dir c").ok();
    assert!(srv.contains("0 50 8080 shop.production.svc.clusterset.local"), "{srv}");
    let version = bench.run("resolve dns-version.clusterset.local --cluster-dir c").ok();
    assert!(version.contains("\"1.0.0\""), "{version}");
    let fails = |line: &str, words: &str| {
        let ran = bench.run(&format!("resolve {line} --cluster-dir c"));
        assert_eq!(ran.code, 1, "{line}");
        assert!(ran.out.contains(words), "{line}: {}{}", ran.out, ran.err);
    };
    fails("shop.production -t AAAA", "NODATA: production/shop is IPv4 only");
    fails("shop.production -t txt", "NODATA: only dns-version");
    fails("x.shop.production.svc", "NXDOMAIN: production/shop is imported, but has no such name below it");
    fails("nothing.production", "NXDOMAIN: no cluster exports production/nothing");
    fails("api.production", "exists here, but neither this cluster nor another exports it");
    fails("shop.staging", "NXDOMAIN: namespace staging does not exist in a");
    bench.refuses("resolve shop --cluster-dir c", &["SERVICE.NAMESPACE"]);
    bench.refuses("resolve example.com.org --cluster-dir c", &["is not in clusterset.local"]);
}

/// Address, ready, terminating.
type Endpoints<'a> = &'a [(&'a str, bool, bool)];

/// Writes imported slices of production/db by source, as an agent does.
fn write_slices(directory: &Path, all: &[(&str, Endpoints<'_>)]) {
    use tombolo_agent::api::ClusterApi as _;
    use tombolo_agent::api::directory::Directory;
    use tombolo_agent_core::known::Objects;
    use tombolo_agent_core::object::{ServiceKey, Slice, SliceKey};
    use tombolo_proto::model::{Backend, Family, Namespace, ServiceName};
    let service = ServiceKey {
        namespace: Namespace::new("production").unwrap(),
        name: ServiceName::new("db").unwrap(),
    };
    let mut objects = Objects::default();
    for (source, endpoints) in all {
        let source = tombolo_proto::model::ClusterId::new(source).unwrap();
        let backend = |(address, ready, terminating): &(&str, bool, bool)| Backend {
            address: address.parse().unwrap(),
            hostname: None,
            ready: *ready,
            serving: *ready,
            terminating: *terminating,
        };
        let slice = Slice { backends: endpoints.iter().map(backend).collect(), ..Slice::default() };
        objects
            .set
            .insert(SliceKey { service: service.clone(), source, family: Family::V4, index: 0 }, slice);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(Directory::open(directory).unwrap().apply_slices(&objects)).unwrap();
}

#[test]
fn resolving_explains_each_address() {
    let bench = Bench::founded();
    let token = bench.token("a", "10.1.0.0/16");
    bench.run_with("join - --cluster-dir c", &token).ok();
    fs::write(bench.path("c/manifests/production.yaml"), SERVICE).unwrap();
    let imports = bench.path("c/state/serviceimports.multicluster.x-k8s.io/production");
    fs::create_dir_all(&imports).unwrap();
    let headless =
        IMPORT.replace("shop", "db").replace("ClusterSetIP", "Headless").replace("\"198.19.0.7\"", "");
    fs::write(imports.join("db.json"), headless).unwrap();
    let own = [
        ("10.1.0.1", true, false),
        ("10.1.0.2", false, false),
        ("10.1.0.3", false, true),
        ("10.9.0.4", true, false),
    ];
    write_slices(&bench.path("c"), &[("a", &own), ("b", &[("10.2.0.5", true, false)])]);

    let found = bench.json("resolve --explain db.production --cluster-dir c");
    // What the resolver answers, and nothing that was written into state/ by others.
    assert_eq!(found["records"].as_array().unwrap().len(), 1, "{found:#}");
    let all = found["addresses"].as_array().unwrap();
    let why = |address: &str, used: bool, words: &str| {
        let row =
            all.iter().find(|r| r["address"] == address).unwrap_or_else(|| panic!("{address}: {found:#}"));
        assert_eq!(row["used"], used, "{row}");
        assert!(row["reason"].as_str().unwrap().contains(words), "{row}");
    };
    why("10.1.0.1", true, "ready");
    why("10.1.0.2", false, "not ready");
    why("10.1.0.3", false, "terminating");
    why("10.9.0.4", false, "outside of what cluster a was granted");
    why("10.2.0.5", false, "cluster b is not known here");
}

#[test]
fn a_revocation_counts_before_a_broker_knows_it() {
    let bench = Bench::founded();
    bench.token("a", "10.1.0.0/16");
    bench.token("b", "10.2.0.0/16");
    let ran = bench.run("revoke a --yes");
    assert_eq!(ran.code, 1, "nobody listens on the discard port");
    assert!(ran.err.contains("broker 127.0.0.1:9 was not told"), "{}", ran.err);
    assert!(
        ran.err.ends_with("no broker was reached; run the same command again when one is\n"),
        "{}",
        ran.err
    );
    let again: Value = serde_json::from_str(&bench.run("revoke a --yes --offline -o json").ok()).unwrap();
    assert_eq!(again["version"], 1, "the same list is handed out again");
    let next: Value = serde_json::from_str(&bench.run("revoke b --yes --offline -o json").ok()).unwrap();
    assert_eq!(next["version"], 2);
    // The next list names both.
    let states = bench.json("members");
    assert!(states["items"].as_array().unwrap().iter().all(|m| m["state"] == "revoked"), "{states}");
    // Its range is free again, its id too, under a higher serial.
    bench.token("a", "10.1.0.0/16");
    assert_eq!(bench.json("members")["items"][2]["serial"], 3);
}

/// As the agent of a node writes it.
const TUNNEL_NODE: &str = r#"{
  "apiVersion": "tombolo.dev/v1alpha1",
  "kind": "TunnelNode",
  "metadata": {"name": "gw1", "labels": {"tombolo.dev/managed-by": "tombolo.dev"}},
  "spec": {"devices": [{"number": 1, "key": "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=", "port": 4511}],
           "candidates": ["192.0.2.1"], "prefixes": []}
}"#;

fn write_tunnel_node(bench: &Bench, cluster: &str) {
    let nodes = bench.path(&format!("{cluster}/state/tunnelnodes.tombolo.dev/_"));
    fs::create_dir_all(&nodes).unwrap();
    fs::write(nodes.join("gw1.json"), TUNNEL_NODE).unwrap();
}

#[test]
fn nodes_are_asked_for_other_wireguard_keys_by_a_number_that_grows() {
    let bench = Bench::founded();
    let token = bench.token("a", "10.1.0.0/16");
    bench.run_with("join - --cluster-dir c", &token).ok();
    bench.refuses("rotate wireguard --all --cluster-dir c", &["no agent has told of any node"]);
    write_tunnel_node(&bench, "c");
    bench.refuses("rotate wireguard gw2 --cluster-dir c", &["no agent has told of a node gw2", "gw1"]);
    bench.refuses_with("rotate wireguard --cluster-dir c", "", 2, &["<NODE>"]);
    bench.refuses_with("rotate wireguard gw1 --all --cluster-dir c", "", 2, &["cannot be used with"]);
    let wish = || {
        let set =
            fs::read_to_string(bench.path("c/state/clustersets.tombolo.dev/_/clusterset.json")).unwrap();
        serde_json::from_str::<Value>(&set).unwrap()["spec"]["rotations"]["gw1"].as_u64().unwrap()
    };
    let out = bench.run("rotate wireguard gw1 --cluster-dir c --wait 0").ok();
    assert!(out.contains("gw1") && out.contains("asked for"), "{out}");
    let first = wish();
    let ran = bench.run("rotate wireguard --all --cluster-dir c --wait 1");
    assert!(ran.code == 0 && ran.err.contains("1 of 1 nodes have not told new keys"), "{}", ran.err);
    assert!(wish() > first);
}

/// The broker of a set that was made with `address`, out of the files that `init` wrote.
async fn broker(bench: &Bench, address: std::net::SocketAddr) -> tombolo_broker::Broker {
    use tombolo_broker::config::{read_identity, read_set};
    let config = tombolo_broker::Config {
        listen: address,
        admin: None,
        identity: read_identity(&bench.path("tombolo-set/broker-1.key")).unwrap(),
        set: read_set(&bench.path("tombolo-set/broker.set")).unwrap(),
        quota: tombolo_replica::Quota::default(),
    };
    let set = config.set.roots.set();
    let store = tombolo_broker::store::Embedded::open(&bench.path("store"), set).unwrap();
    tombolo_broker::Broker::start(config, Box::new(store), tombolo_broker::Hooks::default()).await.unwrap()
}

#[test]
fn a_revocation_reaches_the_broker_and_keeps_what_others_revoked() {
    let bench = Bench::new();
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    bench.run(&format!("init harbour --broker {address}")).ok();
    for (id, range) in [("a", "10.1.0.0/16"), ("b", "10.2.0.0/16"), ("c", "10.3.0.0/16")] {
        bench.token(id, range);
    }
    // The administrator has two copies of the directory.
    let copied =
        Command::new("cp").args(["-a", "tombolo-set", "copy"]).current_dir(bench.dir.path()).status();
    assert!(copied.unwrap().success());

    let runtime = tokio::runtime::Runtime::new().unwrap();
    let broker = runtime.block_on(broker(&bench, address));
    let first = bench.json("revoke b --yes --dir copy");
    assert_eq!(first["told"][0], address.to_string());
    // The other copy knows nothing of it; a list of its own would let b back in.
    let second = bench.run("revoke a --yes -o json");
    assert!(second.err.contains("had a newer list of revocations"), "{}", second.err);
    let second: Value = serde_json::from_str(&second.ok()).unwrap();
    assert_eq!(second["version"], 2);
    let held: Vec<String> = broker.with_replica(|replica| {
        let list = replica.revocations().expect("the broker has the list");
        assert_eq!(list.version, 2);
        list.up_to.keys().map(ToString::to_string).collect()
    });
    assert_eq!(held, ["a", "b"]);
    runtime.block_on(broker.stop());

    // Somebody else's key at that address is told nothing.
    let stranger = Bench::new();
    stranger.run(&format!("init other --broker {address}")).ok();
    stranger.token("x", "10.1.0.0/16");
    let broker = runtime.block_on(self::broker(&bench, address));
    let refused = stranger.run("revoke x --yes");
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("none of this set's brokers"), "{}", refused.err);
    runtime.block_on(broker.stop());
}

/// All paths to values.
fn fields(value: &Value, path: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            map.iter().for_each(|(key, value)| fields(value, &format!("{path}.{key}"), found))
        }
        Value::Array(list) => match list.first() {
            Some(first) => fields(first, &format!("{path}[]"), found),
            None => found.push(format!("{path}[]")),
        },
        _ => found.push(path.to_owned()),
    }
}

/// Programs read these names: they change only with `apiVersion`.
#[test]
fn names_of_fields_are_stable() {
    let bench = Bench::new();
    let mut all = String::new();
    let mut show = |title: &str, value: &Value| {
        assert_eq!(value["apiVersion"], "cli.tombolo.dev/v1alpha1");
        let mut found = Vec::new();
        fields(value, "", &mut found);
        found.sort();
        all += &format!("{title} {}\n  {}\n", value["kind"].as_str().unwrap(), found.join("\n  "));
    };
    let parse = |ran: Ran| serde_json::from_str::<Value>(&ran.out).unwrap();
    show("init", &bench.json("init harbour --broker 127.0.0.1:9"));
    let invitation = bench.json("invite a --pod-cidr 10.1.0.0/16");
    let token = invitation["token"].as_str().unwrap().to_owned();
    show("invite", &invitation);
    show("members", &bench.json("members"));
    show("key", &bench.json("key --cluster-dir c"));
    show("join", &parse(bench.run_with("join - --cluster-dir c -o json", &token)));
    fs::write(
        bench.path("c/manifests/production.yaml"),
        format!("{SERVICE}---\napiVersion: v1\nkind: Node\nmetadata: {{name: one}}\n"),
    )
    .unwrap();
    show("export", &bench.json("export production/api --cluster-dir c"));
    let imports = bench.path("c/state/serviceimports.multicluster.x-k8s.io/production");
    fs::create_dir_all(&imports).unwrap();
    fs::write(imports.join("shop.json"), IMPORT).unwrap();
    fs::write(bench.path("c/manifests/bad.yaml"), "kind: [").unwrap();
    show("status", &bench.json("status --cluster-dir c --admin 127.0.0.1:9"));
    show("resolve", &bench.json("resolve shop.production --cluster-dir c"));
    show("resolve --explain", &bench.json("resolve --explain shop.production --cluster-dir c"));
    show("explain", &parse(bench.run("explain shop.production --node one --cluster-dir c -o json")));
    write_tunnel_node(&bench, "c");
    show("rotate wireguard", &bench.json("rotate wireguard --all --wait 0 --cluster-dir c"));
    show("rotate cluster-key", &bench.json("rotate cluster-key --cluster-dir c --wait 0"));
    show("leave", &bench.json("leave --cluster-dir c --yes --wait 0"));
    show("revoke", &bench.json("revoke a --yes --offline"));
    let check = parse(bench.run("check --pre -o json"));
    assert!(check["checks"].as_array().unwrap().len() > 3);
    show("check", &check);
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fields.txt");
    if std::env::var_os("UPDATE").is_some() {
        fs::write(path, &all).unwrap();
    }
    let known = fs::read_to_string(path).unwrap_or_default();
    assert_eq!(all, known, "field names changed; if that is meant: UPDATE=1 cargo test -p tombolo");
}

#[test]
fn yaml_and_help_and_completion() {
    let bench = Bench::founded();
    bench.token("a", "10.1.0.0/16");
    let yaml = bench.run("members -o yaml").ok();
    assert!(yaml.contains("apiVersion: cli.tombolo.dev/v1alpha1") && yaml.contains("cluster: a"), "{yaml}");
    assert!(!bench.run("members --no-headers").ok().contains("CLUSTER"));
    assert!(bench.run("--help").ok().contains("Exit codes"));
    assert!(bench.run("completion bash").ok().contains("_tombolo"));
    assert_eq!(bench.run("nonsense").code, 2);
}

#[test]
fn a_large_cluster_has_tunnel_addresses_for_its_nodes() {
    let bench = Bench::founded();
    let token = bench.run("invite a --pod-cidr 10.0.0.0/9 --nodes 1000").ok();
    let joined = bench.run_with("join - --cluster-dir c -o json", &token).ok();
    let joined: Value = serde_json::from_str(&joined).unwrap();
    assert_eq!(joined["tunnel"][0], "198.18.0.0/22");
    bench.refuses_with("invite b --pod-cidr 10.128.0.0/16 --nodes 0", "", 2, &["--nodes"]);
    bench.refuses("invite b --pod-cidr 10.128.0.0/16 --nodes 65534", &["no free /16"]);
}

#[test]
fn manifests_make_a_kubernetes_cluster_a_member() {
    use tombolo_agent::api::kind::{cluster_set, member, secret};
    use tombolo_proto::trust::{Membership, RootChain};

    let bench = Bench::founded();
    fs::write(bench.path("eu.token"), bench.token("eu", "10.1.0.0/16")).unwrap();
    let before = bench.files();
    let list = bench.json("join --kubernetes @eu.token --reserve 192.0.2.0/24");
    assert_eq!(bench.files(), before, "nothing is written");
    let find = |kind: &str| {
        let items = list["items"].as_array().unwrap();
        items.iter().find(|item| item["kind"] == kind).unwrap().clone()
    };
    let set = cluster_set::read(&serde_json::from_value(find("ClusterSet")).unwrap()).unwrap();
    assert_eq!((set.cluster.as_str(), set.clusterset), ("eu", None), "Services carry ClusterSetIPs");
    assert_eq!(set.reserved.len(), 1);
    let (cluster, own) = member::read(&serde_json::from_value(find("Member")).unwrap()).unwrap();
    assert_eq!(cluster, set.cluster);
    let keys = secret::read(&find("Secret")).unwrap();
    let roots = RootChain::pinned(set.set, &set.roots).unwrap();
    let membership = Membership::verify(&roots, &own.grant, &own.bindings).unwrap();
    assert_eq!(membership.key(), keys.newest.public(), "the key is the one that is bound");

    // As YAML for kubectl, and each time with another key.
    let text = bench.run("join --kubernetes @eu.token").ok();
    let documents: Vec<Value> =
        text.split("---\n").skip(1).map(|part| serde_saphyr::from_str(part).unwrap()).collect();
    assert_eq!(documents.len(), 3);
    assert_ne!(documents[0]["data"], find("Secret")["data"]);
    bench.refuses_with("join --kubernetes @eu.token --new-key", "", 2, &["--new-key"]);
}
