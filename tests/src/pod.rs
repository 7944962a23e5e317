//! What tests do from a pod or node: fetch, ping, and run probes.

use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::fetch::Fetched;
use crate::lab::{Lab, host};
use crate::place::words;
use crate::probe::{DnsReport, Echo, Report, TcpReport, UdpReport, ping};
use crate::program;
use crate::serve::ECHO_PORT;

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

    /// Starts a UDP flow from a place to a pod's echo server.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn udp_flow(&self, place: &str, to: IpAddr, rate: u32) -> Result<Flow> {
        let (to, rate) = (format!("{}:{ECHO_PORT}", host(to)), rate.to_string());
        self.probe(place, &["udp", "--to", &to, "--rate", &rate])
    }

    /// Starts a TCP flow from a place to a pod's echo server.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn tcp_flow(&self, place: &str, to: IpAddr, rate: u32) -> Result<Flow> {
        let (to, rate) = (format!("{}:{ECHO_PORT}", host(to)), rate.to_string());
        self.probe(place, &["tcp", "--to", &to, "--rate", &rate])
    }

    /// Starts a load of DNS questions from a place; `kind` is 1 for A, 28 for AAAA.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn dns_flow(&self, place: &str, server: &str, name: &str, kind: u16, rate: u32) -> Result<Flow> {
        let (kind, rate) = (kind.to_string(), rate.to_string());
        self.probe(place, &["dns", "--to", server, "--name", name, "--type", &kind, "--rate", &rate])
    }

    fn probe(&self, place: &str, args: &[&str]) -> Result<Flow> {
        let line = program::lab(&[&["probe"], args].concat())?;
        let mut command = self.command(place, &line)?;
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        Ok(Flow { child: Some(child), what: format!("{place}: probe {}", args.join(" ")) })
    }
}
