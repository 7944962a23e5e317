//! The demo runs, and neither it nor a lab that is killed leaves anything.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const LAB: &str = env!("CARGO_BIN_EXE_tombolo-lab");

/// What a lab could leave: namespaces, links, tables, rules, mounts, files in /run.
fn traces() -> BTreeSet<String> {
    let mut traces = BTreeSet::new();
    for args in [
        &["ip", "netns", "list"][..],
        &["ip", "-o", "link", "show"],
        &["ip", "rule", "show"],
        &["ip", "route", "show", "table", "all"],
        &["nft", "list", "tables"],
        &["ls", "-A", "/run"],
    ] {
        let output = Command::new(args[0]).args(&args[1..]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        traces.extend(text.lines().filter(|l| l.contains("tombolo") || l.contains("lab")).map(str::to_owned));
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    traces.extend(mounts.lines().filter(|l| l.starts_with("lab ")).map(str::to_owned));
    traces
}

/// Living processes of a lab of this name: they carry its arguments.
fn processes(mark: &str) -> Vec<String> {
    let mut list = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(line) = std::fs::read(entry.path().join("environ")) else { continue };
        if String::from_utf8_lossy(&line).contains(mark) {
            list.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    list
}

#[test]
fn the_demo_tells_its_story_and_leaves_nothing() {
    let before = traces();
    let rounds = if std::env::var_os("TOMBOLO_FULL").is_some() { 3 } else { 1 };
    for _ in 0..rounds {
        let mut command = Command::new(LAB);
        // Built already: the test's own cargo must not be asked again.
        let output =
            command.arg("demo").env_remove("CARGO").env("TOMBOLO_TEST_MARK", "demo-story").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.contains("0 lost") && text.contains("Done."), "{text}");
    }
    assert_eq!(processes("TOMBOLO_TEST_MARK=demo-story"), Vec::<String>::new());
    assert_eq!(traces().difference(&before).collect::<Vec<_>>(), Vec::<&String>::new());
}

#[test]
fn a_lab_that_is_killed_leaves_nothing() {
    let before = traces();
    let mut lab = Command::new(LAB)
        .args(["up", "two", "--bare", "--name", "to-be-killed"])
        .env("TOMBOLO_TEST_MARK", "killed-lab")
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let wait = |what: &str, look: &dyn Fn() -> bool| {
        let start = Instant::now();
        while !look() {
            assert!(start.elapsed() < Duration::from_secs(30), "waited for: {what}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    wait("the lab to answer", &|| {
        let exec =
            ["exec", "--lab", "to-be-killed", "eu-c", "--", LAB, "fetch", "http://10.1.1.10:8080/health"];
        let output = Command::new(LAB).args(exec).output().unwrap();
        output.stdout == b"ok eu-a\n"
    });
    lab.kill().unwrap();
    lab.wait().unwrap();
    wait("everything to be gone", &|| {
        let names = tombolo_lab::control::names().unwrap();
        processes("TOMBOLO_TEST_MARK=killed-lab").is_empty() && !names.contains(&"to-be-killed".to_owned())
    });
    assert_eq!(traces().difference(&before).collect::<Vec<_>>(), Vec::<&String>::new());
}
