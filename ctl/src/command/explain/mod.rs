//! `explain`: the way from a pod of this node to a service of another cluster, step by step, up to the first that is
//! broken.

pub(super) mod backend;
pub(super) mod here;
mod kernel;
mod walk;

use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use tombolo_agent::api::Observed;
use tombolo_agent::api::directory::Directory;
use tombolo_agent::observe::netlink::{Monitor, Underlay};
use tombolo_proto::model::NodeName;

use self::here::Here;
use self::kernel::Machine;
use self::walk::{From, Outcome, Step, To};
use super::{admin, check, resolve};
use crate::cli::Explain;
use crate::output::{Printer, Verdict};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Explanation {
    from: String,
    to: String,
    verdict: Verdict,
    /// The first step that is broken.
    #[serde(skip_serializing_if = "Option::is_none")]
    broken: Option<&'static str>,
    steps: Vec<Step>,
}

pub(super) fn explain(printer: &Printer, args: &Explain) -> Result<ExitCode> {
    let (from_text, to_text) = ends(&args.words)?;
    let to = parse_to(&to_text)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let underlay = underlay(&runtime)?;
    let observed = Directory::open(&args.cluster.cluster_dir)?.read();
    let node = match &args.node {
        Some(node) => node.clone(),
        None => this_node(&observed, &underlay)?,
    };
    let from = from_text.as_deref().map_or(Ok(From::Here), |text| parse_from(text, &node))?;
    // Of another node, or without an agent, it is planned as if nothing were known to be bad.
    let found = match &args.node {
        Some(_) => None,
        None => admin::health(args.agent.admin).ok().flatten(),
    };
    let here = Here::of(observed, Some(&node), &underlay, found)
        .with_context(|| format!("{} cannot be explained", args.cluster.cluster_dir.display()))?;
    let machine = Machine::new(runtime).context("no netlink socket")?;
    let steps = walk::walk(&here, &machine, &from, &to, &check::dropping());
    let worst = steps.iter().map(|s| s.outcome).filter(|o| *o != Outcome::NotReached).max();
    let verdict = match worst {
        Some(Outcome::Failure) => Verdict::Failure,
        Some(Outcome::Warning) => Verdict::Warning,
        Some(Outcome::Ok | Outcome::NotReached) | None => Verdict::Ok,
    };
    let broken = steps.iter().find(|s| s.outcome == Outcome::Failure).map(|s| s.step);
    let explanation = Explanation {
        from: from_text.unwrap_or_else(|| node.to_string()),
        to: to_text,
        verdict,
        broken,
        steps,
    };
    printer.print("Explanation", &explanation, |printer| text(printer, &explanation))?;
    Ok(if broken.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn text(printer: &Printer, explanation: &Explanation) -> String {
    let mut text = String::new();
    for step in &explanation.steps {
        let mark = match step.outcome {
            Outcome::Ok => printer.mark(Verdict::Ok),
            Outcome::Warning => printer.mark(Verdict::Warning),
            Outcome::Failure => printer.mark(Verdict::Failure),
            Outcome::NotReached => "-".to_owned(),
        };
        let cluster = step.cluster.as_ref().map(|id| format!(" ({id})")).unwrap_or_default();
        text += &format!("{mark} {}{cluster}: {}\n", step.step, step.message);
        for remedy in &step.remedy {
            text += &format!("    {remedy}\n");
        }
    }
    text + &match explanation.broken {
        Some(step) => format!("\nfrom {} to {}: broken at {step}\n", explanation.from, explanation.to),
        None => format!("\nfrom {} to {}: nothing is broken\n", explanation.from, explanation.to),
    }
}

/// Its links, and which of the cluster's nodes it is.
pub(super) fn this_machine(observed: &Observed) -> Result<(Underlay, Option<NodeName>)> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let underlay = underlay(&runtime)?;
    let node = this_node(observed, &underlay).ok();
    Ok((underlay, node))
}

fn underlay(runtime: &tokio::runtime::Runtime) -> Result<Underlay> {
    let monitor = runtime.block_on(Monitor::start()).context("links and routes cannot be read")?;
    Ok(Underlay::clone(&monitor.underlay()))
}

/// The node whose addresses this machine has.
fn this_node(observed: &Observed, underlay: &Underlay) -> Result<NodeName> {
    let nodes =
        observed.nodes.get().context("the cluster's Nodes cannot be read: tombolo status tells why")?;
    let mine = |addresses: &[IpAddr]| addresses.iter().any(|a| underlay.addresses.contains(a));
    let found = nodes.iter().find(|(_, node)| mine(&node.addresses)).map(|(name, _)| name.clone());
    let said = || {
        let said = observed.tunnel_nodes.get()?;
        said.iter().find(|(_, node)| mine(&node.candidates)).map(|(name, _)| name.clone())
    };
    found
        .or_else(said)
        .context("this machine is none of the cluster's nodes: run it on one, or give --node NAME")
}

/// `A -> B`, `A B` or `B`.
fn ends(words: &[String]) -> Result<(Option<String>, String)> {
    match words {
        [to] => match to.split_once("->") {
            Some((from, to)) => Ok((Some(from.trim().to_owned()), to.trim().to_owned())),
            None => Ok((None, to.clone())),
        },
        // A shell has taken `>` for itself, and the output goes to a file of that name.
        [_, arrow] if arrow == "-" => {
            bail!(
                "the shell took '>' for itself, and wrote a file of that name: leave the arrow out, or write '->' in quotes"
            )
        }
        [from, to] => Ok((Some(from.clone()), to.clone())),
        [from, arrow, to] if arrow == "->" || arrow == "to" => Ok((Some(from.clone()), to.clone())),
        _ => bail!("FROM TO is expected, such as 10.2.1.7 api.production:8080"),
    }
}

fn parse_from(text: &str, here: &NodeName) -> Result<From> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(From::Address(address));
    }
    match NodeName::new(text) {
        Ok(node) if node == *here => Ok(From::Here),
        Ok(node) => Ok(From::Node(node)),
        Err(error) => bail!("{text:?} is neither an address nor a node of this cluster: {error}"),
    }
}

fn parse_to(text: &str) -> Result<To> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok(To::Address(address.ip(), Some(address.port())));
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(To::Address(address, None));
    }
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) => {
            let port = port.parse::<u16>().ok().filter(|p| *p > 0);
            (name, Some(port.with_context(|| format!("{text:?} does not end in a port"))?))
        }
        None => (text, None),
    };
    let labels = resolve::labels(name)?;
    match resolve::service_key(&labels) {
        Some(key) => Ok(To::Name(key, port)),
        None => bail!("{name} names no service: SERVICE.NAMESPACE is expected"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_read_in_all_their_forms() {
        let words = |text: &[&str]| text.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let both = (Some("10.2.1.7".to_owned()), "api.production:80".to_owned());
        for form in [
            &["10.2.1.7", "->", "api.production:80"][..],
            &["10.2.1.7", "api.production:80"],
            &["10.2.1.7 -> api.production:80"],
        ] {
            assert_eq!(ends(&words(form)).unwrap(), both, "{form:?}");
        }
        assert_eq!(ends(&words(&["api.production"])).unwrap(), (None, "api.production".to_owned()));
        assert!(ends(&words(&["10.2.1.7", "-"])).unwrap_err().to_string().contains("quotes"));
        assert!(ends(&words(&["a", "b", "c"])).is_err());

        let To::Name(key, port) = parse_to("api.production.svc.clusterset.local:8080").unwrap() else {
            panic!()
        };
        assert_eq!((key.to_string().as_str(), port), ("production/api", Some(8080)));
        assert_eq!(parse_to("[fd00::1]:80").unwrap(), To::Address("fd00::1".parse().unwrap(), Some(80)));
        assert_eq!(parse_to("fd00::1").unwrap(), To::Address("fd00::1".parse().unwrap(), None));
        for bad in ["api", "api.production:0", "api.production:http", "example.com.org", ""] {
            assert!(parse_to(bad).is_err(), "{bad}");
        }
    }
}
