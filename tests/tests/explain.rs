//! `tombolo explain` on two joined clusters: whole, then broken in one place after another. Each time it names that place.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tombolo_lab::fault::Fault;
use tombolo_lab::topology::{TWO, Topology};
use tombolo_lab::{Lab, program, scenario, wait_until};

const LIMIT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(30);
const API: &str = "api-service.production";

/// The steps and whether the command failed.
fn explain(lab: &Lab, node: &str, words: &[&str]) -> Result<Value> {
    let words = [&["explain", "-o", "json"], words].concat();
    let output = lab.command(node, &program::tombolo(&words)?)?.output()?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let told: Value =
        serde_json::from_slice(&output.stdout).with_context(|| format!("{words:?}: {error}"))?;
    ensure!(output.status.success() == told["broken"].is_null(), "{words:?}: {} and {told:#}", output.status);
    Ok(told)
}

fn step<'a>(told: &'a Value, step: &str) -> Result<&'a Value> {
    let steps = told["steps"].as_array().context("steps")?;
    steps.iter().find(|s| s["step"] == step).with_context(|| format!("no step {step} in {told:#}"))
}

/// Waits until every step is good.
fn whole(lab: &Lab, node: &str, words: &[&str]) -> Result<Value> {
    let mut last = Value::Null;
    wait_until("a way without fault", SOON, || {
        last = explain(lab, node, words)?;
        ensure!(last["verdict"] == "ok", "{last:#}");
        Ok(())
    })?;
    Ok(last)
}

/// Waits until it breaks at `at`, and says so by `say`; what comes after is not reached.
fn broken(lab: &Lab, node: &str, words: &[&str], at: &str, say: &str) -> Result<()> {
    wait_until(&format!("it to break at {at}"), SOON, || {
        let told = explain(lab, node, words)?;
        ensure!(told["broken"] == at, "{told:#}");
        let found = step(&told, at)?;
        ensure!(found["message"].as_str().is_some_and(|m| m.contains(say)), "not {say:?}: {found}");
        ensure!(found["remedy"].as_array().is_some_and(|r| !r.is_empty()), "no remedy: {found}");
        let steps = told["steps"].as_array().context("steps")?;
        let place = steps.iter().position(|s| s["step"] == at).unwrap_or(0);
        let after = &steps[place + 1..];
        ensure!(after.iter().all(|s| s["outcome"] == "notReached"), "it goes on: {told:#}");
        Ok(())
    })
    .map(drop)
}

fn up() -> Result<Lab> {
    let lab = Lab::build(Topology::parse(TWO)?)?;
    lab.bring_up()?;
    lab.export("eu-west", "production", "api-service")?;
    Ok(lab)
}

#[test]
fn it_names_what_is_broken() {
    scenario("it_names_what_is_broken", LIMIT, || {
        let lab = up()?;
        let pod = lab.topology().pod("us-c")?.v4.to_string();
        let six = lab.topology().pod("us-c")?.v6.to_string();
        // From a pod in both families, from its node, and from a gateway.
        let told = whole(&lab, "us-w1", &[&pod, "->", &format!("{API}:8080")])?;
        for name in [
            "from", "set", "export", "import", "name", "vip", "eligible", "reach", "route", "slot", "peer",
            "mtu", "answer",
        ] {
            step(&told, name)?;
        }
        whole(&lab, "us-w1", &[&six, API])?;
        whole(&lab, "us-w1", &[API])?;
        whole(&lab, "us-gw1", &["us-gw1", &format!("{API}.svc.clusterset.local")])?;
        // A backend itself: the exported port, and one that is not.
        let backend = lab.topology().pod("eu-c")?.v4;
        whole(&lab, "us-w1", &[&pod, &format!("{backend}:8080")])?;
        let closed = explain(&lab, "us-w1", &[&pod, &format!("{backend}:7001")])?;
        ensure!(
            closed["broken"] == "answer" && step(&closed, "reach")?["outcome"] == "warning",
            "{closed:#}"
        );
        people(&lab, &pod)?;
        resolved(&lab)?;
        services(&lab, &pod)?;
        network(&lab, &pod)
    });
}

/// What people type wrong.
fn people(lab: &Lab, pod: &str) -> Result<()> {
    broken(lab, "us-gw1", &[pod, API], "from", "a pod of node us-w1")?;
    broken(lab, "us-w1", &["10.1.1.1", API], "from", "of cluster eu-west")?;
    broken(lab, "us-w1", &["192.0.2.1", API], "from", "in no range")?;
    broken(lab, "us-w1", &[pod, &format!("{API}:9")], "vip", "9 is no port of production/api-service")?;
    broken(lab, "us-w1", &[pod, "nothing.production"], "export", "no cluster exports production/nothing")?;
    broken(lab, "us-w1", &[pod, "192.0.2.7:80"], "reach", "no cluster of the set owns 192.0.2.7")
}

/// `resolve --explain`: each address, and why one is not used.
fn resolved(lab: &Lab) -> Result<()> {
    let told = lab.tombolo("us-w1", &["resolve", "--explain", API, "-o", "json"])?;
    let told: Value = serde_json::from_str(&told)?;
    let addresses = told["addresses"].as_array().context("addresses")?;
    // Two ClusterSetIPs, three pods of two families.
    ensure!(addresses.len() == 8 && addresses.iter().all(|a| a["used"] == true), "{told:#}");
    Ok(())
}

/// The export taken back; the namespace gone here.
fn services(lab: &Lab, pod: &str) -> Result<()> {
    lab.unexport("eu-west", "production", "api-service")?;
    broken(lab, "us-w1", &[pod, API], "export", "no cluster exports production/api-service")?;
    lab.export("eu-west", "production", "api-service")?;
    whole(lab, "us-w1", &[pod, API])?;

    let manifests = lab.cluster_dir("us-east").join("manifests");
    let kept: Vec<_> = std::fs::read_dir(&manifests)?
        .map(|entry| Ok::<_, std::io::Error>(entry?.path()))
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .filter(|path| path.to_string_lossy().contains("production"))
        .map(|path| Ok((path.clone(), std::fs::read(&path)?)))
        .collect::<Result<_>>()?;
    for (path, _) in &kept {
        std::fs::remove_file(path)?;
    }
    broken(lab, "us-w1", &[pod, API], "import", "namespace production does not exist in us-east")?;
    // The agent takes the import down a moment later.
    wait_until("resolve to say why", SOON, || {
        let words = program::tombolo(&["resolve", "--explain", API])?;
        let output = lab.command("us-w1", &words)?.output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(text.contains("namespace production does not exist in us-east"), "{text}");
        Ok(())
    })?;
    for (path, bytes) in &kept {
        std::fs::write(path, bytes)?;
    }
    whole(lab, "us-w1", &[pod, API]).map(drop)
}

/// Tunnels cut, devices killed, an agent dead, and the cluster revoked at last.
fn network(lab: &Lab, pod: &str) -> Result<()> {
    for gateway in ["eu-gw1", "eu-gw2"] {
        lab.fault(Fault::Cut { a: gateway.to_owned(), b: "us-east".to_owned() })?;
    }
    broken(lab, "us-w1", &[pod, API], "peer", "those of eu-west (eu-gw1, eu-gw2) do not")?;
    broken(lab, "us-gw1", &["us-gw1", API], "peer", "nobody answers")?;
    lab.heal()?;
    whole(lab, "us-w1", &[pod, API])?;

    // Nothing heals what the agent does not see.
    lab.kill("us-w1", "agent")?;
    broken(lab, "us-w1", &[pod, API], "name", "the resolver of this node")?;
    lab.restart("us-w1", "agent")?;
    lab.wait_ready()?;
    whole(lab, "us-w1", &[pod, API])?;

    lab.kill("us-w1", "wireguard")?;
    let place = lab.place("us-w1")?;
    for device in place.capture(&["ip", "-o", "link", "show"])?.lines().filter_map(|l| l.split(": ").nth(1)) {
        if device.starts_with("tombolo") {
            let _ = place.output(&["ip", "link", "del", device])?;
        }
    }
    broken(lab, "us-w1", &[pod, API], "slot", "missing or down")?;
    lab.restart("us-w1", "wireguard")?;
    whole(lab, "us-w1", &[pod, API])?;

    lab.revoke("eu-west")?;
    broken(lab, "us-w1", &[pod, API], "set", "eu-west was revoked")
}
