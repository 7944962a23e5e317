//! `status`: members, nodes, exports and imports, as this cluster knows them.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use tombolo_agent::api::directory::Directory;
use tombolo_agent::api::{ClusterSet, Member, Observed};
use tombolo_agent::observe::member::{Members, Verifier};
use tombolo_agent_core::known::Known;
use tombolo_agent_core::object::{Condition, LocalKind, ServiceKey};
use tombolo_agent_core::world::{ClustersetRanges, MemberNodes, Reach};
use tombolo_proto::model::{ClusterId, Endpoint, NodeName, Port, ServiceType};
use tombolo_proto::trust::RootChain;
use tombolo_proto::wire::{decode_grant, decode_statement};

use super::admin::{self, Finding};
use crate::cli;
use crate::output::{Printer, Table, Verdict, plain};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    cluster: Cluster,
    members: Vec<MemberRow>,
    nodes: Vec<NodeRow>,
    exports: Vec<ExportRow>,
    imports: Vec<ImportRow>,
    agent: Agent,
    findings: Vec<Finding>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Cluster {
    id: String,
    set: String,
    set_name: String,
    reach: Reach,
    clusterset_ranges: Vec<String>,
    resolvers: Vec<String>,
    brokers: Vec<String>,
    leader: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MemberRow {
    cluster: String,
    /// This cluster itself.
    own: bool,
    /// ok; silent: it has not spoken yet; refused: see the findings.
    state: &'static str,
    serial: Option<u64>,
    /// Of its signing key under that grant: how often it was rotated.
    generation: Option<usize>,
    nodes: usize,
    gateways: usize,
    pod_cidrs: Vec<String>,
    tunnel: Vec<String>,
    position: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeRow {
    name: String,
    ready: bool,
    /// 1 to 3 of a gateway, 0 of another node; none before it was stated.
    rank: Option<u8>,
    role: &'static str,
    tunnel_addresses: Vec<String>,
    candidates: Vec<String>,
    prefixes: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ExportRow {
    namespace: String,
    name: String,
    service: &'static str,
    conditions: Vec<ConditionRow>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ConditionRow {
    #[serde(rename = "type")]
    kind: String,
    status: bool,
    reason: String,
    message: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ImportRow {
    namespace: String,
    name: String,
    #[serde(rename = "type")]
    kind: ServiceType,
    clusters: Vec<String>,
    ips: Vec<String>,
    ports: Vec<String>,
    ready_backends: usize,
    backends: usize,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Agent {
    address: String,
    answers: bool,
    ready: bool,
    problems: Vec<String>,
    /// Packets that this node's firewall has dropped, by counter.
    dropped: BTreeMap<String, u64>,
}

pub(super) fn status(printer: &Printer, args: &cli::Status) -> Result<()> {
    let directory = Directory::open(&args.cluster.cluster_dir)?;
    let observed = directory.read();
    let set = match &observed.clusterset {
        Known::Yes(Some(set)) => set,
        Known::Yes(None) => bail!(
            "{0} is no member of a set yet: tombolo join --cluster-dir {0} @TOKEN",
            directory.root().display()
        ),
        Known::No => bail!("{}/state cannot be read", directory.root().display()),
    };
    let verified = Verifier::default().verify(&observed);
    let verified = verified.get().context("the members of the set cannot be read")?;
    let mut findings: BTreeSet<Finding> =
        observed.findings.iter().chain(&verified.findings).map(Finding::from).collect();
    let agent = agent(args, &mut findings);
    let leader = directory.read_lease().ok().flatten().and_then(|lease| lease.value.holder);
    let status = Status {
        cluster: cluster(set, leader),
        members: members(set, &observed, verified),
        nodes: nodes(&observed, verified.nodes.get(&set.cluster)),
        exports: exports(&observed),
        imports: imports(&observed),
        agent,
        findings: findings.into_iter().collect(),
    };
    printer.print("Status", &status, |printer| text(printer, &status))
}

fn agent(args: &cli::Status, findings: &mut BTreeSet<Finding>) -> Agent {
    let address = args.agent.admin.to_string();
    let answer =
        admin::findings(args.agent.admin).and_then(|told| Ok((told, admin::readiness(args.agent.admin)?)));
    match answer {
        Ok((told, (ready, problems))) => {
            findings.extend(told);
            let dropped = admin::dropped(args.agent.admin).unwrap_or_default();
            Agent { address, answers: true, ready, problems, dropped }
        }
        Err(error) => {
            let (problems, dropped) = (vec![error.to_string()], BTreeMap::new());
            Agent { address, answers: false, ready: false, problems, dropped }
        }
    }
}

fn cluster(set: &ClusterSet, leader: Option<String>) -> Cluster {
    let roots = RootChain::pinned(set.set, &set.roots).ok();
    let brokers = roots.as_ref().and_then(|roots| roots.brokers(set.brokers.as_ref()?).ok());
    let ranges = set.clusterset.iter();
    Cluster {
        id: set.cluster.to_string(),
        set: set.set.to_string(),
        set_name: roots.as_ref().map(|roots| roots.current().name.to_string()).unwrap_or_default(),
        reach: set.reach,
        clusterset_ranges: ranges.clone().flat_map(ClustersetRanges::nets).map(|n| n.to_string()).collect(),
        resolvers: texts(ranges.flat_map(ClustersetRanges::resolvers)),
        brokers: brokers.iter().flat_map(|list| &list.brokers).map(|b| b.address.clone()).collect(),
        leader,
    }
}

fn members(set: &ClusterSet, observed: &Observed, verified: &Members) -> Vec<MemberRow> {
    let row = |(id, member): (&ClusterId, &Member)| {
        let good = verified.nodes.get(id);
        let grant = decode_grant(&member.grant.payload).ok();
        let gateways = |m: &MemberNodes| m.nodes.values().filter(|e| e.rank.is_gateway()).count();
        // Shown only of a member whose statement was verified.
        let position = good.and(member.statement.as_ref()).and_then(|s| decode_statement(&s.payload).ok());
        MemberRow {
            cluster: id.to_string(),
            own: *id == set.cluster,
            state: match (good.is_some(), member.statement.is_some()) {
                (false, _) => "refused",
                (true, false) => "silent",
                (true, true) => "ok",
            },
            serial: grant.map(|grant| grant.serial),
            generation: good.and(member.bindings.len().checked_sub(1)),
            nodes: good.map_or(0, |m| m.nodes.len()),
            gateways: good.map_or(0, gateways),
            pod_cidrs: good.map(|m| texts(&m.owned)).unwrap_or_default(),
            tunnel: good.map(|m| texts(&m.tunnel)).unwrap_or_default(),
            position: position.map(|statement| statement.position.to_string()),
        }
    };
    observed.members.get().into_iter().flatten().map(row).collect()
}

fn nodes(observed: &Observed, own: Option<&MemberNodes>) -> Vec<NodeRow> {
    let stated = own.map(|own| &own.nodes);
    let described = observed.nodes.get();
    let names: BTreeSet<&NodeName> = stated
        .into_iter()
        .flat_map(BTreeMap::keys)
        .chain(described.into_iter().flat_map(BTreeMap::keys))
        .collect();
    let row = |name: &NodeName| {
        let endpoint: Option<&Endpoint> = stated.and_then(|nodes| nodes.get(name));
        let node = described.and_then(|nodes| nodes.get(name));
        NodeRow {
            name: name.to_string(),
            ready: node.is_some_and(|node| node.ready),
            rank: endpoint.map(|e| e.rank.get()),
            role: match endpoint {
                Some(endpoint) if endpoint.rank.is_gateway() => "gateway",
                Some(_) => "node",
                None => "unknown",
            },
            tunnel_addresses: endpoint.map(|e| texts(e.tunnel())).unwrap_or_default(),
            candidates: endpoint.map(|e| texts(&e.candidates)).unwrap_or_default(),
            prefixes: endpoint.map(|e| texts(&e.prefixes)).unwrap_or_default(),
        }
    };
    names.into_iter().map(row).collect()
}

fn exports(observed: &Observed) -> Vec<ExportRow> {
    let none = BTreeMap::new();
    let row = |key: &ServiceKey| {
        let status = observed.statuses.get().and_then(|statuses| statuses.get(key));
        let condition = |(kind, c): (&String, &Condition)| ConditionRow {
            kind: kind.clone(),
            status: c.status,
            reason: c.reason.clone(),
            message: c.message.clone(),
        };
        ExportRow {
            namespace: key.namespace.to_string(),
            name: key.name.to_string(),
            service: match observed.services.get().map(|services| services.get(key).map(|s| s.kind)) {
                Some(Some(LocalKind::ClusterIP)) => "ClusterIP",
                Some(Some(LocalKind::Headless)) => "Headless",
                Some(Some(LocalKind::ExternalName)) => "ExternalName",
                Some(Some(LocalKind::Derived)) => "Derived",
                Some(None) => "missing",
                None => "unknown",
            },
            conditions: status.map_or(&none, |s| &s.conditions).iter().map(condition).collect(),
        }
    };
    observed.declared_exports.get().into_iter().flat_map(|all| all.iter()).map(row).collect()
}

fn imports(observed: &Observed) -> Vec<ImportRow> {
    let slices = observed.slices.get();
    let mut rows = Vec::new();
    for (key, import) in observed.imports.get().into_iter().flatten() {
        let of = slices.into_iter().flatten().filter(|(slice, _)| slice.service == *key);
        // A backend is one pod: its families are counted once each.
        let (mut ready, mut all) = (BTreeSet::new(), BTreeSet::new());
        for backend in of.flat_map(|(_, slice)| &slice.backends) {
            all.insert(backend.address);
            if backend.ready {
                ready.insert(backend.address);
            }
        }
        rows.push(ImportRow {
            namespace: key.namespace.to_string(),
            name: key.name.to_string(),
            kind: import.kind,
            clusters: texts(&import.clusters),
            ips: texts(&import.ips),
            ports: import.ports.iter().map(port).collect(),
            ready_backends: ready.len(),
            backends: all.len(),
        });
    }
    rows
}

fn port(port: &Port) -> String {
    let name = port.name.as_ref().map(|name| format!("{name}:")).unwrap_or_default();
    format!("{name}{}/{}", port.port, port.protocol)
}

fn texts<T: ToString>(items: impl IntoIterator<Item = T>) -> Vec<String> {
    items.into_iter().map(|item| item.to_string()).collect()
}

fn text(printer: &Printer, status: &Status) -> String {
    let cluster = &status.cluster;
    let or = |text: String, empty: &str| if text.is_empty() { empty.to_owned() } else { text };
    let mut text = format!(
        "Cluster {} of set {} ({}), reach {}\nClusterSetIPs {}, resolver {}\nBrokers {}; leader {}\n",
        cluster.id,
        cluster.set_name,
        cluster.set,
        match cluster.reach {
            Reach::Exports => "exports",
            Reach::All => "all",
        },
        or(cluster.clusterset_ranges.join(", "), "none"),
        or(cluster.resolvers.join(", "), "none"),
        or(cluster.brokers.join(", "), "none"),
        cluster.leader.as_deref().map_or_else(|| "none".to_owned(), plain),
    );
    section(&mut text, printer, "Members", &members_table(&status.members));
    section(&mut text, printer, "Nodes", &nodes_table(&status.nodes));
    section(&mut text, printer, "Exports", &exports_table(&status.exports));
    section(&mut text, printer, "Imports", &imports_table(&status.imports));
    let agent = &status.agent;
    text.push('\n');
    if agent.dropped.values().any(|packets| *packets > 0) {
        let counts: Vec<String> =
            agent.dropped.iter().map(|(name, n)| format!("{} {n}", plain(name))).collect();
        text += &format!("Packets dropped on this node: {}\n", counts.join(", "));
    }
    match (agent.answers, agent.ready) {
        (true, true) => text += &format!("{} the agent of this node is ready\n", printer.mark(Verdict::Ok)),
        (true, false) => {
            text += &format!("{} the agent of this node is not ready\n", printer.mark(Verdict::Warning));
            for problem in &agent.problems {
                text += &format!("    {}\n", plain(problem));
            }
        }
        (false, _) => {
            text += &format!(
                "{} no agent answers at {} ({}): what an agent alone knows is not shown\n",
                printer.mark(Verdict::Warning),
                agent.address,
                plain(&agent.problems.join(", "))
            );
        }
    }
    for finding in &status.findings {
        let verdict = if finding.severity == "error" { Verdict::Failure } else { Verdict::Warning };
        text += &format!(
            "{} {}: {}: {}\n",
            printer.mark(verdict),
            plain(&finding.reason),
            plain(&finding.object),
            plain(&finding.message)
        );
    }
    let pages: BTreeSet<String> = status.findings.iter().map(Finding::page).collect();
    if !pages.is_empty() {
        let pages: Vec<String> = pages.into_iter().collect();
        text += &format!("  what they mean and what to do: {}\n", pages.join(", "));
    }
    text
}

fn section(text: &mut String, printer: &Printer, title: &str, table: &Table) {
    if table.rows.is_empty() {
        text.push_str(&format!("\n{title}: none\n"));
    } else {
        text.push_str(&format!("\n{title}\n{}", printer.table(table)));
    }
}

fn members_table(members: &[MemberRow]) -> Table {
    let row = |m: &MemberRow| {
        vec![
            if m.own { format!("{} (own)", m.cluster) } else { m.cluster.clone() },
            m.state.to_owned(),
            m.nodes.to_string(),
            m.gateways.to_string(),
            m.serial.map(|serial| serial.to_string()).unwrap_or_default(),
            m.generation.map(|generation| generation.to_string()).unwrap_or_default(),
            m.pod_cidrs.join(","),
            m.tunnel.join(","),
            m.position.clone().unwrap_or_default(),
        ]
    };
    Table {
        headers: vec![
            "CLUSTER",
            "STATE",
            "NODES",
            "GATEWAYS",
            "SERIAL",
            "KEY",
            "POD-CIDRS",
            "TUNNEL",
            "POSITION",
        ],
        narrow: 7,
        rows: members.iter().map(row).collect(),
    }
}

fn nodes_table(nodes: &[NodeRow]) -> Table {
    let row = |n: &NodeRow| {
        vec![
            n.name.clone(),
            n.role.to_owned(),
            n.rank.map(|rank| rank.to_string()).unwrap_or_default(),
            if n.ready { "yes" } else { "no" }.to_owned(),
            n.tunnel_addresses.join(","),
            n.candidates.join(","),
            n.prefixes.join(","),
        ]
    };
    Table {
        headers: vec!["NAME", "ROLE", "RANK", "READY", "TUNNEL-ADDRESSES", "CANDIDATES", "PREFIXES"],
        narrow: 5,
        rows: nodes.iter().map(row).collect(),
    }
}

fn exports_table(exports: &[ExportRow]) -> Table {
    let row = |e: &ExportRow| {
        let of = |kind: &str| {
            let condition = e.conditions.iter().find(|c| c.kind == kind);
            condition.map_or("Unknown", |c| if c.status { "True" } else { "False" }).to_owned()
        };
        // The message that a person should see: a conflict, what keeps it from being exported, or a preference that
        // cannot be read.
        let wrong = |c: &&ConditionRow| c.status == (c.kind == "Conflict");
        let but = |c: &&ConditionRow| c.kind == "Ready" && c.message.contains(", but ");
        let told = e.conditions.iter().find(wrong).or_else(|| e.conditions.iter().find(but));
        let message = told.map(|c| c.message.clone()).unwrap_or_default();
        vec![
            e.namespace.clone(),
            e.name.clone(),
            e.service.to_owned(),
            of("Valid"),
            of("Ready"),
            of("Conflict"),
            message,
        ]
    };
    Table {
        headers: vec!["NAMESPACE", "NAME", "SERVICE", "VALID", "READY", "CONFLICT", "MESSAGE"],
        narrow: 7,
        rows: exports.iter().map(row).collect(),
    }
}

fn imports_table(imports: &[ImportRow]) -> Table {
    let row = |i: &ImportRow| {
        vec![
            i.namespace.clone(),
            i.name.clone(),
            match i.kind {
                ServiceType::ClusterSetIP => "ClusterSetIP",
                ServiceType::Headless => "Headless",
            }
            .to_owned(),
            i.clusters.join(","),
            i.ips.join(","),
            i.ports.join(","),
            format!("{}/{}", i.ready_backends, i.backends),
        ]
    };
    Table {
        headers: vec!["NAMESPACE", "NAME", "TYPE", "CLUSTERS", "IPS", "PORTS", "READY-BACKENDS"],
        narrow: 7,
        rows: imports.iter().map(row).collect(),
    }
}
