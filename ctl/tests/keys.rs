//! Keys and grants that change, by the real binary.
#![allow(clippy::unwrap_used)]

use std::io::Write as _;
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

struct Bench(TempDir);

struct Ran {
    code: i32,
    out: String,
    err: String,
}

impl Bench {
    /// With a set `harbour`, and `eu` joined to it in the directory `c`.
    fn joined() -> Self {
        let bench = Self(tempfile::tempdir().unwrap());
        bench.ok("init harbour --broker 127.0.0.1:9");
        let token = bench.ok("invite eu --pod-cidr 10.1.0.0/16 --namespaces production,team-*");
        bench.join(&token, "");
        bench
    }

    fn run(&self, line: &str, input: &str) -> Ran {
        let mut child = Command::new(env!("CARGO_BIN_EXE_tombolo"))
            .args(line.split_whitespace())
            .current_dir(self.0.path())
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let output = child.wait_with_output().unwrap();
        Ran {
            code: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    fn ok(&self, line: &str) -> String {
        let ran = self.run(line, "");
        assert_eq!(ran.code, 0, "{line}: {}{}", ran.out, ran.err);
        ran.out
    }

    fn join(&self, token: &str, options: &str) -> String {
        let ran = self.run(&format!("join - --cluster-dir c {options}"), token);
        assert_eq!(ran.code, 0, "{}{}", ran.out, ran.err);
        ran.out
    }

    fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.ok(&format!("{line} -o json"))).unwrap()
    }

    fn refuses(&self, line: &str, code: i32, words: &[&str]) {
        let members = self.ok("members");
        let ran = self.run(line, "");
        assert_eq!((ran.code, ran.out.as_str()), (code, ""), "{line}: {}", ran.err);
        for word in words {
            assert!(ran.err.contains(word), "{line}: {word:?} is not in {:?}", ran.err);
        }
        assert_eq!(self.ok("members"), members, "{line} changed something");
    }

    fn member(&self) -> Value {
        self.json("status --cluster-dir c --admin 127.0.0.1:9")["members"][0].clone()
    }

    fn key(&self) -> String {
        self.ok("key --cluster-dir c")
    }
}

#[test]
fn the_cluster_key_rotates() {
    let bench = Bench::joined();
    assert_eq!((&bench.member()["serial"], &bench.member()["generation"]), (&1.into(), &0.into()));
    let mut keys = vec![bench.key()];
    for generation in 1..4 {
        let rotated = bench.json("rotate cluster-key --cluster-dir c --wait 0");
        assert_eq!(rotated["generation"], generation);
        assert_eq!((&rotated["resumed"], &rotated["position"]), (&false.into(), &Value::Null));
        assert_eq!(rotated["left"], 63 - generation);
        assert_eq!(bench.key().trim(), rotated["publicKey"]);
        assert_eq!(bench.member()["generation"], generation);
        keys.push(bench.key());
    }
    keys.dedup();
    assert_eq!(keys.len(), 4);
    let ran = bench.run("rotate cluster-key --cluster-dir c --wait 0", "");
    assert!(ran.out.contains("The key of eu is of generation 4 now (grant 1)"), "{}", ran.out);
    assert!(ran.err.contains("has not spoken with the new key yet"), "{}", ran.err);
    assert!(bench.ok("status --cluster-dir c --admin 127.0.0.1:9").contains("KEY"));
    // A newer grant begins anew, with the key that is there.
    let token = bench.ok("invite eu --renew --pod-cidr 10.1.0.0/16");
    let key = bench.key();
    bench.join(&token, "");
    assert_eq!((&bench.member()["serial"], &bench.member()["generation"]), (&2.into(), &0.into()));
    assert_eq!(bench.key(), key);
}

#[test]
fn rotating_nothing_says_what_to_do() {
    let bench = Bench(tempfile::tempdir().unwrap());
    let ran = bench.run("rotate cluster-key --cluster-dir nowhere", "");
    assert!(ran.code == 1 && ran.err.contains("tombolo join"), "{}", ran.err);
    bench.ok("key --cluster-dir c");
    let ran = bench.run("rotate cluster-key --cluster-dir c", "");
    assert!(ran.code == 1 && ran.err.contains("no member of a set yet"), "{}", ran.err);
}

#[test]
fn grants_are_extended_and_narrowed() {
    let bench = Bench::joined();
    let token = bench.ok("invite eu --add-pod-cidr 10.9.0.0/16 --add-pod-cidr fd00:9::/48");
    let granted = &bench.json("members")["items"][1];
    assert_eq!(granted["podCidrs"].as_array().unwrap().len(), 3);
    assert_eq!(granted["namespaces"], serde_json::json!(["production", "team-*"]), "they stay");
    let first = &bench.json("members")["items"][0];
    assert_eq!((&granted["tunnel"], &granted["memberSince"]), (&first["tunnel"], &first["memberSince"]));
    bench.join(&token, "");
    assert_eq!(bench.member()["podCidrs"].as_array().unwrap().len(), 3);

    bench.refuses("invite eu --add-pod-cidr 10.9.3.0/24", 1, &["overlaps what cluster eu has already"]);
    bench.refuses(
        "invite eu --remove-pod-cidr 10.8.0.0/16",
        1,
        &["was not granted 10.8.0.0/16", "10.9.0.0/16"],
    );
    bench.refuses("invite us --add-pod-cidr 10.8.0.0/16", 1, &["no grant that could be changed"]);
    bench.refuses("invite eu --add-pod-cidr 10.8.0.0/16 --pod-cidr 10.1.0.0/16", 2, &["cannot be used with"]);
    bench.refuses("invite eu", 2, &["--pod-cidr"]);
    let all = "--remove-pod-cidr 10.1.0.0/16 --remove-pod-cidr 10.9.0.0/16 --remove-pod-cidr fd00:9::/48";
    bench.refuses(&format!("invite eu {all}"), 1, &["no pod range left", "tombolo revoke eu"]);

    // Without a secret, and both at once.
    let key = bench.key();
    let line =
        format!("admit eu --key {} --remove-pod-cidr 10.9.0.0/16 --add-pod-cidr 10.7.0.0/16", key.trim());
    let ran = bench.run(&line, "");
    assert!(ran.code == 0 && ran.err.contains("tombolo revoke eu --older"), "{}", ran.err);
    bench.join(&ran.out, "");
    let owned = bench.member()["podCidrs"].clone();
    assert_eq!(owned, serde_json::json!(["10.1.0.0/16", "10.7.0.0/16", "fd00:9::/48"]));
}

#[test]
fn a_stolen_key_is_replaced() {
    let bench = Bench::joined();
    bench.refuses("revoke eu --older --yes --offline", 1, &["no grant but 1"]);
    let stolen = bench.key();
    let token = bench.ok("invite eu --renew --pod-cidr 10.1.0.0/16");
    bench.join(&token, "--new-key");
    assert_ne!(bench.key(), stolen);
    assert_eq!((&bench.member()["serial"], &bench.member()["state"]), (&2.into(), &"silent".into()));
    let again = bench.run("join - --cluster-dir c --new-key", &token);
    assert!(again.code == 1 && again.err.contains("tombolo rotate cluster-key"), "{}", again.err);
    let admission =
        bench.ok(&format!("admit eu --renew --pod-cidr 10.1.0.0/16 --key {}", bench.key().trim()));
    let refused = bench.run("join - --cluster-dir c --new-key", &admission);
    assert!(refused.code == 1 && refused.err.contains("an admission is for one key"), "{}", refused.err);

    let revoked = bench.json("revoke eu --older --yes --offline");
    assert_eq!((&revoked["upToSerial"], &revoked["version"]), (&2.into(), &1.into()));
    let states: Vec<Value> = bench.json("members")["items"].as_array().unwrap().clone();
    let states: Vec<&Value> = states.iter().map(|m| &m["state"]).collect();
    assert_eq!(states, ["revoked", "revoked", "granted"]);
    // Handed out again, not signed again; the newest is ended by its own name alone.
    assert_eq!(bench.json("revoke eu --older --yes --offline")["version"], 1);
    assert_eq!(bench.json("revoke eu --yes --offline")["upToSerial"], 3);
}

#[test]
fn leaving_is_marked_and_undone_by_joining() {
    let bench = Bench::joined();
    let refused = bench.run("leave --cluster-dir c", "");
    assert!(refused.code == 1 && refused.err.contains("add --yes"), "{}", refused.err);
    let left = bench.run("leave --cluster-dir c --yes --wait 0", "");
    assert!(left.code == 0 && left.out.contains("tombolo revoke eu"), "{}{}", left.out, left.err);
    assert!(left.err.contains("It does as soon as it runs"), "{}", left.err);
    let status = bench.json("status --cluster-dir c --admin 127.0.0.1:9");
    assert!(status["findings"].to_string().contains("Leaving"), "{status}");
    let token = bench.ok("invite eu --renew --pod-cidr 10.1.0.0/16");
    bench.join(&token, "");
    let status = bench.json("status --cluster-dir c --admin 127.0.0.1:9");
    assert!(!status["findings"].to_string().contains("Leaving"), "{status}");
}
