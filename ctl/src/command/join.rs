//! What a cluster does to become a member: `key` and `join`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use tombolo_agent::api::directory::Directory;
use tombolo_agent::api::{ClusterApi as _, ClusterSet, Error, Member, Versioned, kind};
use tombolo_agent_core::known::Known;
use tombolo_agent_core::world::{ClustersetRanges, Reach, Topology};
use tombolo_proto::model::Prefix;
use tombolo_proto::trust::{Grant, Invitation, Membership, RootChain, SigningKey, Verified};
use tombolo_proto::wire::decode_grant;
use zeroize::Zeroizing;

use super::{now, say};
use crate::cli::{ClusterArgs, Join};
use crate::output::{Format, Printer};
use crate::set::new_key;

/// Makes the cluster's key if there is none, and prints its public half.
pub(super) fn key(printer: &Printer, args: &ClusterArgs) -> Result<()> {
    let directory = Directory::create(&args.cluster_dir)?;
    let made = directory.read_cluster_key()?.is_none();
    let key = directory.ensure_cluster_key()?;
    if made {
        say(format!(
            "Made the cluster's key in {}. Its public half, for the administrator:",
            args.cluster_dir.display()
        ));
    }
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Key {
        public_key: String,
    }
    let key = Key { public_key: key.public().to_string() };
    printer.print("ClusterKey", &key, |_| format!("{}\n", key.public_key))?;
    say(format!("There: tombolo admit CLUSTER --pod-cidr CIDR --key {}", key.public_key));
    Ok(())
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Joined {
    cluster: String,
    set: String,
    set_name: String,
    serial: u64,
    pod_cidrs: Vec<String>,
    tunnel: Vec<String>,
    namespaces: Vec<String>,
    reach: Reach,
    topology: Topology,
    /// Where ClusterSetIPs come from; none under Kubernetes.
    clusterset: Option<ClustersetRanges>,
    brokers: Vec<String>,
    directory: String,
    /// False if it was a member by the same grant already.
    changed: bool,
}

/// Makes the directory's cluster a member. Needs no network: the agent goes to the brokers.
pub(super) fn join(printer: &Printer, args: &Join) -> Result<()> {
    let invitation = Invitation::parse(&read_token(&args.token)?)?;
    if args.kubernetes {
        return manifests(printer, args, &invitation);
    }
    let directory = match Directory::open(&args.cluster.cluster_dir) {
        Ok(directory) => Some(directory),
        Err(Error::NotADirectory { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let known = match &directory {
        Some(directory) => directory.read_clusterset()?,
        None => None,
    };
    let joining = match (&directory, known) {
        (Some(directory), Some(known)) => match rejoining(directory, known, &invitation, args)? {
            Again::Same(known) => return same(printer, directory, &known, &invitation, args),
            Again::Newer(joining) => joining,
        },
        _ => Box::new(Joining::first(&invitation, args)?),
    };
    in_time(&invitation)?;
    let key = match key_for(directory.as_ref(), &invitation, &args.cluster.cluster_dir)? {
        Some(_) if args.new_key && invitation.invite_key.is_none() => bail!(
            "an admission is for one key, so --new-key does not fit: ask the administrator for a token (`tombolo invite {} --renew`)",
            invitation.grant.cluster
        ),
        Some(_) if args.new_key => Some(new_key()?),
        key => key,
    };
    let (directory, key) = match (directory, key) {
        (Some(directory), Some(key)) => (directory, key),
        (directory, _) => {
            let directory = match directory {
                Some(directory) => directory,
                None => Directory::create(&args.cluster.cluster_dir)?,
            };
            let key = directory.ensure_cluster_key()?;
            (directory, key)
        }
    };
    let member = member_of(&invitation, &joining, &key)?;
    directory.join(&joining.set, &key, &member)?;
    let joined = Joined::of(&joining.set, &invitation, &directory, true);
    printer.print("Membership", &joined, |_| {
        format!(
            "{dir} is now cluster {} of set {} ({}): grant {}, pods {}, tunnel addresses {}, reach {}, topology {}.\n\n\
             On each of its nodes, which share that directory:\n  tombolo-wireguard serve\n  \
             tombolo-agent --cluster-dir {dir}\n\n\
             Describe nodes, namespaces and services in {dir}/manifests/, then:\n  \
             tombolo export NAMESPACE/SERVICE --cluster-dir {dir}\n  tombolo status --cluster-dir {dir}\n",
            joined.cluster,
            joined.set_name,
            joined.set,
            joined.serial,
            joined.pod_cidrs.join(", "),
            joined.tunnel.join(", "),
            word(joined.reach),
            topology(joined.topology),
            dir = joined.directory,
        )
    })
}

/// Prints what makes a Kubernetes cluster a member: its set, its own Member, and its key. Its API server is not asked.
fn manifests(printer: &Printer, args: &Join, invitation: &Invitation) -> Result<()> {
    if invitation.invite_key.is_none() {
        bail!(
            "an admission is for a key that a directory holds; for a Kubernetes cluster ask the administrator for a token \
             (`tombolo invite {} ...`)",
            invitation.grant.cluster
        );
    }
    in_time(invitation)?;
    let mut joining = Joining::first(invitation, args)?;
    // Services carry ClusterSetIPs there.
    joining.set.clusterset = None;
    let key = new_key()?;
    let member = member_of(invitation, &joining, &key)?;
    let built = |problem: kind::Problem| anyhow!("the objects cannot be made: {problem}");
    let objects = [
        kind::secret::write(&key, None),
        serde_json::to_value(kind::cluster_set::write(&joining.set).map_err(built)?)?,
        serde_json::to_value(kind::member::write(&joining.set.cluster, &member).map_err(built)?)?,
    ];
    let text = match printer.format {
        Format::Json => {
            let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
            Zeroizing::new(format!("{}\n", serde_json::to_string_pretty(&list)?))
        }
        Format::Table | Format::Wide | Format::Yaml => {
            let mut text = Zeroizing::new(String::new());
            for object in &objects {
                text.push_str("---\n");
                text.push_str(&Zeroizing::new(serde_saphyr::to_string(object)?));
            }
            text
        }
    };
    printer.text(&text)?;
    say(format!(
        "These make a Kubernetes cluster {} of set {}. The first holds its key: pipe them to `kubectl apply -f -`, after \
         deploy/ was applied there, and keep no copy.",
        joining.set.cluster,
        invitation.roots.current().name
    ));
    Ok(())
}

/// A token may be for a while only.
fn in_time(invitation: &Invitation) -> Result<()> {
    if let Some(before) = invitation.grant.bind_before
        && now() > before
    {
        bail!(
            "the token was to be used before {}; ask the administrator for another (`tombolo invite {} --renew ...`)",
            time(before),
            invitation.grant.cluster
        );
    }
    Ok(())
}

/// The own Member that has not spoken yet.
fn member_of(invitation: &Invitation, joining: &Joining, key: &SigningKey) -> Result<Member> {
    let binding = invitation.accept(key).context("the token cannot be used")?;
    let bindings: Vec<_> = binding.bindings().iter().map(|b| b.envelope().clone()).collect();
    // Again, by the newest roots that are known here.
    Membership::verify(&joining.roots, invitation.grant.envelope(), &bindings)
        .context("the token is older than the set's present root keys; ask the administrator for another")?;
    Ok(Member {
        grant: invitation.grant.envelope().clone(),
        bindings,
        spoken: None,
        statement: None,
        namespaces: None,
    })
}

/// What is to be written.
struct Joining {
    set: ClusterSet,
    roots: RootChain,
}

enum Again {
    /// By the grant it has.
    Same(Box<Versioned<ClusterSet>>),
    /// By a newer one.
    Newer(Box<Joining>),
}

impl Joining {
    fn first(invitation: &Invitation, args: &Join) -> Result<Self> {
        let clusterset = ClustersetRanges {
            v4: Some(args.clusterset_v4.unwrap_or(DEFAULT_V4)),
            v6: Some(args.clusterset_v6.unwrap_or(DEFAULT_V6)),
        };
        let reserved: BTreeSet<Prefix> = args.reserve.iter().copied().collect();
        let clusterset = Some(clusterset);
        judge_ranges(clusterset.as_ref(), &reserved, &invitation.grant)?;
        let set = ClusterSet {
            set: invitation.roots.set(),
            cluster: invitation.grant.cluster.clone(),
            roots: invitation.roots.envelopes().cloned().collect(),
            brokers: Some(invitation.brokers.envelope().clone()),
            revocations: None,
            reach: args.reach.unwrap_or_default(),
            topology: args.topology.unwrap_or_default(),
            clusterset,
            reserved,
            rotations: BTreeMap::new(),
            leaving: false,
        };
        Ok(Self { set, roots: invitation.roots.clone() })
    }
}

const DEFAULT_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(198, 19, 0, 0), 16);
const DEFAULT_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd19, 0x746f, 0x6d62, 0, 0, 0, 0, 0), 112);

/// Of a directory that is a member: what the invitation changes. Nothing that is known gets older by it.
fn rejoining(
    directory: &Directory,
    known: Versioned<ClusterSet>,
    invitation: &Invitation,
    args: &Join,
) -> Result<Again> {
    let (was, path) = (&known.value, directory.root().display());
    let grant = &invitation.grant;
    if was.set != invitation.roots.set() || was.cluster != grant.cluster {
        bail!(
            "{path} is cluster {} of set {}, and the token is for cluster {} of set {} ({}): use another --cluster-dir, \
             or remove {path}/state first if this cluster is to leave its set",
            was.cluster,
            was.set,
            grant.cluster,
            invitation.roots.set(),
            invitation.roots.current().name
        );
    }
    let Known::Yes(members) = directory.read().members else {
        bail!("the members in {path}/state cannot be read; nothing was changed");
    };
    let mut set = was.clone();
    let mut roots =
        RootChain::pinned(was.set, &was.roots).context("the roots in the directory are damaged")?;
    for envelope in invitation.roots.envelopes() {
        roots.advance(envelope).context("the token's root keys do not follow those that are known here")?;
    }
    let held = members.get(&was.cluster).map(|member| &member.grant);
    if held.is_some_and(|held| held.same_document(grant.envelope())) {
        return Ok(Again::Same(Box::new(known)));
    }
    if let Some(held) = held.and_then(|held| decode_grant(&held.payload).ok())
        && held.serial >= grant.serial
    {
        bail!(
            "the token is for grant {} of cluster {}, which has the newer grant {} already; nothing was changed",
            grant.serial,
            was.cluster,
            held.serial
        );
    }
    let revocations = set.revocations.as_ref().and_then(|list| roots.revocations(list).ok());
    if revocations.is_some_and(|list| list.revokes(grant)) {
        bail!(
            "the administrator has revoked grant {} of cluster {}; ask for another (`tombolo invite {} ...`)",
            grant.serial,
            was.cluster,
            was.cluster
        );
    }
    let newer = set.brokers.as_ref().and_then(|list| roots.brokers(list).ok()).map(|list| list.version);
    if newer.is_none_or(|version| version < invitation.brokers.version) {
        set.brokers = Some(invitation.brokers.envelope().clone());
    }
    set.roots = roots.envelopes().cloned().collect();
    apply_settings(&mut set, directory, args)?;
    judge_ranges(set.clusterset.as_ref(), &set.reserved, grant)?;
    Ok(Again::Newer(Box::new(Joining { set, roots })))
}

/// A member by this very grant: only settings can change.
fn same(
    printer: &Printer,
    directory: &Directory,
    known: &Versioned<ClusterSet>,
    invitation: &Invitation,
    args: &Join,
) -> Result<()> {
    if args.new_key {
        bail!(
            "{} has joined by this very grant ({}), and a grant takes one first key: `tombolo rotate cluster-key` changes it, \
             or ask for another token if the key may be stolen (`tombolo invite {} --renew`)",
            known.value.cluster,
            invitation.grant.serial,
            known.value.cluster
        );
    }
    let mut set = known.value.clone();
    apply_settings(&mut set, directory, args)?;
    judge_ranges(set.clusterset.as_ref(), &set.reserved, &invitation.grant)?;
    let changed = set != known.value;
    if changed {
        let runtime = tokio::runtime::Builder::new_current_thread().build().context("no runtime")?;
        runtime.block_on(directory.write_clusterset(&set, Some(&known.version)))?;
    }
    let ranges = set.clusterset.iter().flat_map(ClustersetRanges::nets);
    let ranges: Vec<String> = ranges.map(|net| net.to_string()).collect();
    let ranges = ranges.join(", ");
    let joined = Joined::of(&set, invitation, directory, changed);
    printer.print("Membership", &joined, |_| {
        format!(
            "{} is cluster {} of set {} by this very grant ({}) already; {}.\n",
            joined.directory,
            joined.cluster,
            joined.set_name,
            joined.serial,
            if changed {
                format!(
                    "its settings were changed: reach {}, topology {}, ClusterSetIPs {ranges}",
                    word(joined.reach),
                    topology(joined.topology)
                )
            } else {
                "nothing was changed".to_owned()
            }
        )
    })
}

/// What the command line says beside the token. ClusterSetIPs that are given out do not move.
fn apply_settings(set: &mut ClusterSet, directory: &Directory, args: &Join) -> Result<()> {
    let held = set.clusterset;
    if let Some(ranges) = &mut set.clusterset {
        ranges.v4 = args.clusterset_v4.or(ranges.v4);
        ranges.v6 = args.clusterset_v6.or(ranges.v6);
    }
    let in_use = directory.read().imports.get().is_none_or(|imports| !imports.is_empty());
    if set.clusterset != held && in_use {
        bail!(
            "the range of ClusterSetIPs cannot be changed while services are imported: addresses are in use"
        );
    }
    if let Some(reach) = args.reach {
        set.reach = reach;
    }
    if let Some(topology) = args.topology {
        set.topology = topology;
    }
    set.reserved.extend(&args.reserve);
    // Who joins again has come back.
    set.leaving = false;
    Ok(())
}

fn judge_ranges(ranges: Option<&ClustersetRanges>, reserved: &BTreeSet<Prefix>, grant: &Grant) -> Result<()> {
    let mut ours: Vec<(&str, Prefix)> = Vec::new();
    for net in ranges.into_iter().flat_map(ClustersetRanges::nets) {
        let name = if matches!(net, IpNet::V4(_)) { "--clusterset-v4" } else { "--clusterset-v6" };
        let prefix = Prefix::new(net).context(name)?;
        if net.max_prefix_len() - net.prefix_len() < 4 {
            bail!("{name} {net} is too small: at least 16 addresses are needed");
        }
        ours.push((name, prefix));
    }
    ours.extend(reserved.iter().map(|prefix| ("--reserve", *prefix)));
    for (name, prefix) in ours {
        if let Some(range) = grant.ranges().find(|range| range.overlaps(&prefix)) {
            bail!(
                "{name} {prefix} overlaps {range}, which this cluster was granted for pods or tunnels; name another"
            );
        }
    }
    Ok(())
}

/// The key that is there, if there must be one. An admission serves only the cluster whose key it names.
fn key_for(
    directory: Option<&Directory>,
    invitation: &Invitation,
    path: &Path,
) -> Result<Option<SigningKey>> {
    let key = match directory {
        Some(directory) => directory.read_cluster_key()?,
        None => None,
    };
    if invitation.invite_key.is_none() {
        let subject = invitation.grant.subject;
        match &key {
            Some(key) if key.public() == subject => {}
            Some(key) => bail!(
                "the admission is for the cluster with key {subject}; {} has {}: is it the right directory?",
                path.display(),
                key.public()
            ),
            None => bail!(
                "the admission is for the cluster with key {subject}; {} has no key: join where `tombolo key` was run",
                path.display()
            ),
        }
    }
    Ok(key)
}

impl Joined {
    fn of(set: &ClusterSet, invitation: &Invitation, directory: &Directory, changed: bool) -> Self {
        let grant: &Verified<Grant> = &invitation.grant;
        let text = |list: &BTreeSet<Prefix>| list.iter().map(ToString::to_string).collect();
        Self {
            cluster: set.cluster.to_string(),
            set: set.set.to_string(),
            set_name: invitation.roots.current().name.to_string(),
            serial: grant.serial,
            pod_cidrs: text(&grant.owned),
            tunnel: text(&grant.tunnel),
            namespaces: grant.namespaces.iter().map(ToString::to_string).collect(),
            reach: set.reach,
            topology: set.topology,
            clusterset: set.clusterset,
            brokers: invitation.brokers.brokers.iter().map(|b| b.address.clone()).collect(),
            directory: directory.root().display().to_string(),
            changed,
        }
    }
}

fn read_token(argument: &str) -> Result<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::with_capacity(4 * Invitation::MAX_TEXT));
    let limit = 2 * Invitation::MAX_TEXT as u64 + 1;
    if argument == "-" {
        let read = std::io::stdin().lock().take(limit).read_to_string(&mut text);
        read.context("the token cannot be read from standard input")?;
    } else if let Some(path) = argument.strip_prefix('@') {
        let read = File::open(path).and_then(|file| file.take(limit).read_to_string(&mut text));
        read.with_context(|| format!("the token cannot be read from {path}"))?;
    } else {
        text.push_str(argument);
    }
    if text.trim().is_empty() {
        bail!("the token is empty: give it as @FILE, or '-' and on standard input");
    }
    Ok(text)
}

fn time(seconds: u64) -> String {
    let time = i64::try_from(seconds).ok().and_then(|s| Timestamp::from_second(s).ok());
    time.map_or_else(|| seconds.to_string(), |t| t.to_string())
}

fn topology(topology: Topology) -> &'static str {
    match topology {
        Topology::Gateway => "gateway",
        Topology::Mesh => "mesh",
    }
}

fn word(reach: Reach) -> &'static str {
    match reach {
        Reach::Exports => "exports",
        Reach::All => "all",
    }
}
