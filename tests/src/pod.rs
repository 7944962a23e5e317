//! What tests do from a pod or node: fetch, ping, and run probes.

use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::fetch::Fetched;
use crate::lab::{Lab, host};
use crate::place::words;
use crate::probe::{DnsReport, Echo, Question, Report, TcpReport, UdpReport, ask, ping};
use crate::program;
use crate::serve::ECHO_PORT;
use crate::topology::NAMESERVER;

/// A probe that runs in a place; killed when dropped.
#[derive(Debug)]
pub struct Flow {
    child: Option<Child>,
    what: String,
}

impl Flow {
    /// Stops sending, waits for what is under way, and reports.
    ///
    /// # Errors
    /// If the probe failed.
    pub fn stop(mut self) -> Result<Report> {
        let mut child = self.child.take().context("a probe stops once")?;
        drop(child.stdin.take());
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{}: {}", self.what, words(&output));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// The same for a UDP probe.
    ///
    /// # Errors
    /// If the probe failed, or is another.
    pub fn stop_udp(self) -> Result<UdpReport> {
        match self.stop()? {
            Report::Udp(report) => Ok(report),
            other => bail!("not a UDP probe: {other:?}"),
        }
    }

    /// The same for a TCP probe.
    ///
    /// # Errors
    /// If the probe failed, or is another.
    pub fn stop_tcp(self) -> Result<TcpReport> {
        match self.stop()? {
            Report::Tcp(report) => Ok(report),
            other => bail!("not a TCP probe: {other:?}"),
        }
    }

    /// The same for a load of DNS questions.
    ///
    /// # Errors
    /// If the probe failed, or is another.
    pub fn stop_dns(self) -> Result<DnsReport> {
        match self.stop()? {
            Report::Dns(report) => Ok(report),
            other => bail!("not a DNS probe: {other:?}"),
        }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Lab {
    /// A command line to run in a place.
    ///
    /// # Errors
    /// If there is no such place or no words.
    pub fn command(&self, place: &str, args: &[String]) -> Result<Command> {
        let (first, rest) = args.split_first().context("an empty command")?;
        let mut command = self.place(place)?.command(first);
        command.args(rest).stdin(Stdio::null());
        Ok(command)
    }

    /// Fetches a URL in a place, as any program there would. `options` are `-4`, `-6`, `--timeout S`.
    ///
    /// # Errors
    /// Which step failed.
    pub fn fetch(&self, place: &str, url: &str, options: &[&str]) -> Result<Fetched> {
        let mut args = vec!["fetch", url, "--json"];
        args.extend(options);
        let output = self.command(place, &program::lab(&args)?)?.output()?;
        ensure!(!output.stdout.is_empty(), "{place}: fetch {url}: {}", words(&output));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// One ICMP echo from a place.
    ///
    /// # Errors
    /// If there is no such place.
    pub fn ping(&self, place: &str, to: IpAddr, timeout: Duration) -> Result<Echo> {
        self.place(place)?.run(|| ping(to, timeout))?
    }

    /// Routes, rules and firewall of ours on a node, as text without counters.
    ///
    /// # Errors
    /// If `ip` or `nft` fails.
    pub fn kernel(&self, node: &str) -> Result<String> {
        let place = self.place(node)?;
        let mut text = String::new();
        for args in [
            &["ip", "route", "show", "table", "all", "proto", "98"][..],
            &["ip", "-6", "route", "show", "table", "all", "proto", "98"],
            &["ip", "rule", "show"],
            &["ip", "-6", "rule", "show"],
            &["nft", "-s", "list", "table", "inet", "tombolo"],
        ] {
            text += &place.capture(args)?;
        }
        Ok(text)
    }

    /// TCP, UDP and ICMP, both families, from every pod to every pod of every other cluster, source kept.
    ///
    /// # Errors
    /// The first pair that does not reach each other, or with another source.
    pub fn everybody_reaches_everybody(&self) -> Result<()> {
        let pods: Vec<_> = self.topology().pods().collect();
        for from in &pods {
            for to in pods.iter().filter(|to| to.cluster != from.cluster) {
                for (own, other) in
                    [(IpAddr::from(from.v4), IpAddr::from(to.v4)), (from.v6.into(), to.v6.into())]
                {
                    self.reaches(&from.name, own, other)?;
                }
            }
        }
        Ok(())
    }

    /// TCP, UDP and ICMP from a place to a pod, seen there as `own`.
    ///
    /// # Errors
    /// What did not pass, or the other source.
    pub fn reaches(&self, place: &str, own: IpAddr, pod: IpAddr) -> Result<()> {
        let http = self.fetch(place, &format!("http://{}:8080/ip", host(pod)), &[])?;
        ensure!(http.body.trim() == own.to_string(), "{pod} saw {own} over TCP as {}", http.body);
        let udp = self.fetch(place, &format!("udp://{}:{ECHO_PORT}", host(pod)), &[])?;
        ensure!(udp.body.trim() == own.to_string(), "{pod} saw {own} over UDP as {}", udp.body);
        let echo = self.ping(place, pod, Duration::from_secs(2))?;
        ensure!(echo.is_answered(), "{own} pings {pod}: {echo:?}");
        Ok(())
    }

    /// Starts a UDP flow from a place to a pod's echo server.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn udp_flow(&self, place: &str, to: IpAddr, rate: u32) -> Result<Flow> {
        let (to, rate) = (format!("{}:{ECHO_PORT}", host(to)), rate.to_string());
        self.probe(place, &["udp", "--to", &to, "--rate", &rate])
    }

    /// The same with so many bytes of payload in each packet.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn udp_flow_of(&self, place: &str, to: IpAddr, rate: u32, size: usize) -> Result<Flow> {
        let (to, rate) = (format!("{}:{ECHO_PORT}", host(to)), rate.to_string());
        self.probe(place, &["udp", "--to", &to, "--rate", &rate, "--size", &size.to_string()])
    }

    /// Starts so many TCP flows, in one program, from a place to a pod's echo server, each with its own rate.
    ///
    /// # Errors
    /// If they cannot be started.
    pub fn tcp_flows(&self, place: &str, to: IpAddr, rate: u32, flows: usize) -> Result<Flow> {
        let (to, rate) = (format!("{}:{ECHO_PORT}", host(to)), rate.to_string());
        self.probe(place, &["tcp", "--to", &to, "--rate", &rate, "--flows", &flows.to_string()])
    }

    /// Starts a TCP flow from a place to a pod's echo server.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn tcp_flow(&self, place: &str, to: IpAddr, rate: u32) -> Result<Flow> {
        let (to, rate) = (format!("{}:{ECHO_PORT}", host(to)), rate.to_string());
        self.probe(place, &["tcp", "--to", &to, "--rate", &rate])
    }

    /// Starts a load of DNS questions as [`Self::dns_flow`] does, of which any answer with another address than these is
    /// counted as wrong.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn dns_flow_expecting(
        &self,
        place: &str,
        server: &str,
        question: &Question,
        rate: u32,
        expect: &[IpAddr],
    ) -> Result<Flow> {
        let (kind, rate) = (question.kind.to_string(), rate.to_string());
        let expect: Vec<_> = expect.iter().map(ToString::to_string).collect();
        let args = ["dns", "--to", server, "--name", &question.name, "--type", &kind, "--rate", &rate];
        self.probe(place, &[&args[..], &["--expect", &expect.join(",")]].concat())
    }

    /// Starts a load of DNS questions from a place; `kind` is 1 for A, 28 for AAAA.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn dns_flow(&self, place: &str, server: &str, name: &str, kind: u16, rate: u32) -> Result<Flow> {
        let (kind, rate) = (kind.to_string(), rate.to_string());
        self.probe(place, &["dns", "--to", server, "--name", name, "--type", &kind, "--rate", &rate])
    }

    /// What a place's resolver answers to one question: the response code and addresses. `kind` is 1 for A, 28 for
    /// AAAA.
    ///
    /// # Errors
    /// If nothing answers within a second.
    pub fn ask(&self, place: &str, name: &str, kind: u16) -> Result<(u8, Vec<IpAddr>)> {
        let question = Question { name: name.to_owned(), kind };
        let server = (NAMESERVER, 53).into();
        self.place(place)?.run(|| ask(server, &question, Duration::from_secs(1)))?
    }

    fn probe(&self, place: &str, args: &[&str]) -> Result<Flow> {
        let line = program::lab(&[&["probe"], args].concat())?;
        let mut command = self.command(place, &line)?;
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        Ok(Flow { child: Some(child), what: format!("{place}: probe {}", args.join(" ")) })
    }
}
