//! The demo: the whole story, step by step, on the real programs.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::capture::{Kind, Seen};
use crate::directory::export_manifest;
use crate::lab::{Lab, wait_until};
use crate::sandbox::interrupted;
use crate::topology::{Pod, Topology};

const NAME: &str = "api-service.production.svc.clusterset.local";

/// What a resolver answers for a name that does not exist.
const NXDOMAIN: u8 = 3;

/// Tells the story on the given output; the first thing that is not as promised ends it.
///
/// # Errors
/// What was not as promised.
pub fn demo(topology: Topology, out: &mut dyn Write) -> Result<()> {
    let mut story = Story { out, steps: 0 };
    story.step("Two clusters, eu-west and us-east, each a gateway and a worker; a broker between them")?;
    let begun = Instant::now();
    let lab = Lab::build(topology)?;
    lab.bring_up()?;
    let client = lab.topology().pods().find(|p| p.cluster == "us-east").cloned().context("a client pod")?;
    story.tell("each cluster holds a grant signed by the administrator and joined with a one-use token")?;
    story.done(&format!("agents and broker ready after {}", time(begun.elapsed())))?;

    story.step("A user of eu-west exports a service by a manifest")?;
    for line in export_manifest("production", "api-service").lines() {
        story.tell(&format!("  {line}"))?;
    }
    let wire = lab.watch_wire()?;
    let url = format!("http://{NAME}:8080/health");
    ensure!(
        lab.fetch(&client.name, &url, &["--timeout", "2"]).is_err(),
        "{NAME} answers before it is exported"
    );
    let exported = Instant::now();
    lab.export("eu-west", "production", "api-service")?;

    story.step(&format!("A pod of us-east, {} ({}), asks for it by name", client.name, client.v4))?;
    story.tell(&format!("$ curl {url}"))?;
    wait_until("the answer by name", Duration::from_secs(30), || {
        stopped().and_then(|()| fetch(&lab, &client, &url, "-4"))
    })?;
    let answer = lab.fetch(&client.name, &url, &["-4"])?;
    story.tell(answer.body.trim())?;
    let took = time(exported.elapsed());
    story.done(&format!("{NAME} is {}, answered {took} after the manifest was written", answer.peer))?;
    wait_until("the answer over IPv6", Duration::from_secs(30), || {
        stopped().and_then(|()| fetch(&lab, &client, &url, "-6"))
    })?;
    let answer = lab.fetch(&client.name, &url, &["-6"])?;
    story.done(&format!("and over IPv6 it is {}: {}", answer.peer, answer.body.trim()))?;

    story.step("The pod that answers sees who asks: no address is translated on the way")?;
    for (family, own) in [("-4", client.v4.to_string()), ("-6", client.v6.to_string())] {
        let seen = lab.fetch(&client.name, &format!("http://{NAME}:8080/ip"), &[family])?;
        ensure!(seen.body.trim() == own, "{own} was seen as {}", seen.body.trim());
        story.done(&format!("asked from {own}, seen as {}", seen.body.trim()))?;
    }

    story.step("What a capture on the wire between the clusters sees")?;
    let seen = wire.seen();
    story.capture(&seen)?;

    story.step("The broker is killed while traffic runs")?;
    let backend = lab.topology().pods().find(|p| p.app == "api").cloned().context("a backend")?;
    let broker = lab.topology().brokers.first().context("a broker")?.name.clone();
    // The echo port is exported too, so that it may be reached directly.
    let udp = lab.udp_flow(&client.name, backend.v4.into(), 1000)?;
    std::thread::sleep(Duration::from_millis(500));
    lab.kill(&broker, "broker")?;
    story.tell("broker: SIGKILL. 1,000 packets a second go on, and the name is asked again and again:")?;
    let killed = Instant::now();
    let mut asked = 0;
    while killed.elapsed() < Duration::from_secs(5) {
        stopped()?;
        fetch(&lab, &client, &url, "-4").context("while the broker was away")?;
        asked += 1;
    }
    lab.restart(&broker, "broker")?;
    lab.wait_ready()?;
    let report = udp.stop_udp()?;
    ensure!(report.lost == 0, "{} of {} packets lost: {report:?}", report.lost, report.sent);
    story.done(&format!(
        "{} packets sent and echoed, 0 lost; {asked} requests by name, all answered",
        report.sent
    ))?;

    story.step("The export is taken back")?;
    lab.unexport("eu-west", "production", "api-service")?;
    let gone = wait_until("the name to go", Duration::from_secs(30), || {
        stopped()?;
        let (code, _) = lab.ask(&client.name, NAME, 1)?;
        ensure!(code == NXDOMAIN, "it still answers");
        Ok(())
    })?;
    ensure!(lab.fetch(&client.name, &url, &["--timeout", "1"]).is_err(), "{NAME} is gone but still answers");
    story.done(&format!("{NAME} was gone from us-east after {}", time(gone)))?;
    let seen = wire.seen();
    seen.assert_protected()?;
    drop(wire);
    drop(lab);
    story.end()
}

fn stopped() -> Result<()> {
    ensure!(!interrupted(), "interrupted");
    Ok(())
}

fn fetch(lab: &Lab, client: &Pod, url: &str, family: &str) -> Result<()> {
    let answer = lab.fetch(&client.name, url, &[family, "--timeout", "3"])?;
    ensure!(answer.status == 200 && answer.body.starts_with("ok "), "{url} answered {answer:?}");
    Ok(())
}

fn time(time: Duration) -> String {
    if time.as_secs() < 1 {
        format!("{} ms", time.as_millis())
    } else {
        format!("{:.1} s", time.as_secs_f64())
    }
}

struct Story<'a> {
    out: &'a mut dyn Write,
    steps: u32,
}

impl Story<'_> {
    fn step(&mut self, text: &str) -> Result<()> {
        stopped()?;
        self.steps += 1;
        writeln!(self.out, "\n{}. {text}", self.steps)?;
        Ok(self.out.flush()?)
    }

    fn tell(&mut self, text: &str) -> Result<()> {
        Ok(writeln!(self.out, "   {text}")?)
    }

    fn done(&mut self, text: &str) -> Result<()> {
        writeln!(self.out, "   \u{2713} {text}")?;
        Ok(self.out.flush()?)
    }

    fn capture(&mut self, seen: &Seen) -> Result<()> {
        for (kind, what) in [
            (Kind::Wireguard, "WireGuard between nodes"),
            (Kind::Broker, "TLS with the broker"),
            (Kind::Housekeeping, "ARP, neighbour discovery, ICMP of the underlay"),
            (Kind::Other, "anything else between nodes"),
            (Kind::Clear, "traffic of pods or services in clear"),
        ] {
            self.tell(&format!("{:>8} packets   {what}", seen.count(kind)))?;
        }
        seen.assert_protected()?;
        self.done("everything between the clusters is in a tunnel")
    }

    fn end(&mut self) -> Result<()> {
        writeln!(
            self.out,
            "\nDone. Nothing is left behind: every namespace, process and file of this lab ends with it.\n\
             Try it yourself: cargo lab up, and in another terminal: cargo lab exec client -- bash"
        )?;
        Ok(())
    }
}
