//! What the administrator does: `init`, `invite`, `admit`, `revoke`, `members`.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead as _, IsTerminal as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Result, bail};
use jiff::Timestamp;
use serde::Serialize;
use tombolo_proto::trust::{Grant, PublicKey, SigningKey, Verified};
use zeroize::Zeroizing;

use super::{now, say};
use crate::cli::{Admit, GrantArgs, Init, Invite, Revoke, SetArgs};
use crate::output::{Printer, Table};
use crate::set::{Change, NewGrant, SetDir, new_key};

pub(super) fn init(printer: &Printer, args: Init) -> Result<()> {
    let dir = args.set.dir;
    let set = SetDir::init(&dir, args.name, &args.broker, args.tunnel_pool)?;
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Made {
        name: String,
        set: String,
        directory: String,
        brokers: Vec<String>,
    }
    let made = Made {
        name: set.roots.current().name.to_string(),
        set: set.roots.set().to_string(),
        directory: dir.display().to_string(),
        brokers: set.brokers.brokers.iter().map(|b| b.address.clone()).collect(),
    };
    printer.print("Set", &made, |_| {
        let mut text = format!(
            "Made set {} ({}) in {dir}.\n\nKeep {dir}/root-1.key and root-2.key: who has one can admit clusters. Move one to a safe place.\n",
            made.name,
            made.set,
            dir = made.directory
        );
        for (index, address) in made.brokers.iter().enumerate() {
            text += &format!(
                "\nRun the broker at {address}:\n  tombolo-broker --listen [::]:{} --identity {dir}/broker-{}.key --set {dir}/broker.set --data /var/lib/tombolo/broker\n",
                address.rsplit_once(':').map_or("4500", |(_, port)| port),
                index + 1,
                dir = made.directory
            );
        }
        text + "\nThen, for each cluster:\n  tombolo invite CLUSTER --pod-cidr CIDR\n"
    })
}

pub(super) fn invite(printer: &Printer, args: Invite) -> Result<()> {
    let key = new_key()?;
    let now = now();
    let bind_before = (args.valid_for > 0).then(|| now.saturating_add(args.valid_for.saturating_mul(3600)));
    let (set, grant) = grant(args.grant, key.public(), bind_before, now)?;
    hand_out(printer, &set, grant, Some(key))
}

pub(super) fn admit(printer: &Printer, args: Admit) -> Result<()> {
    let (set, grant) = grant(args.grant, args.key, None, now())?;
    hand_out(printer, &set, grant, None)
}

fn grant(
    args: GrantArgs,
    subject: PublicKey,
    bind_before: Option<u64>,
    now: u64,
) -> Result<(SetDir, Verified<Grant>)> {
    let mut set = SetDir::open(&args.set.dir)?;
    let change = Change {
        add: args.add_pod_cidr.into_iter().collect(),
        remove: args.remove_pod_cidr.into_iter().collect(),
    };
    let changes = !(change.add.is_empty() && change.remove.is_empty());
    let (owned, held) = if changes {
        set.changed(&args.cluster, &change)?
    } else {
        (args.pod_cidr.into_iter().collect(), Vec::new())
    };
    let namespaces = if args.namespaces.is_empty() { held } else { args.namespaces };
    let renew = args.renew || changes;
    let new = NewGrant {
        cluster: args.cluster,
        owned,
        namespaces,
        nodes: args.nodes,
        subject,
        bind_before,
        now,
        renew,
    };
    let grant = set.grant(new)?;
    if renew {
        say(format!(
            "It replaces what {0} has when {0} joins by it (`tombolo join` there, under traffic); until then nothing changes.",
            grant.cluster
        ));
    }
    if !change.remove.is_empty() {
        say(format!(
            "If {0} does not join by it, `tombolo revoke {0} --older` takes the removed ranges away, and all else, until it does.",
            grant.cluster
        ));
    }
    Ok((set, grant))
}

fn hand_out(printer: &Printer, set: &SetDir, grant: Verified<Grant>, key: Option<SigningKey>) -> Result<()> {
    let list =
        |prefixes: &BTreeSet<_>| prefixes.iter().map(ToString::to_string).collect::<Vec<String>>().join(", ");
    let secret = key.is_some();
    say(format!(
        "Granted {}: serial {}, pods {}, tunnel addresses {}.",
        grant.cluster,
        grant.serial,
        list(&grant.owned),
        list(&grant.tunnel)
    ));
    say(if secret {
        "The token below is a secret and admits one cluster, once: tombolo join - < TOKEN"
    } else {
        "The admission below is no secret and serves only the cluster that has the key: tombolo join - < FILE"
    });
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Handed<'a> {
        #[serde(flatten)]
        row: Row,
        token: &'a str,
    }
    let row = Row::of(&grant, "granted");
    let token = Zeroizing::new(set.invitation(grant, key).to_text());
    let handed = Handed { row, token: &token };
    printer.print("Invitation", &handed, |_| format!("{}\n", handed.token))?;
    if secret && others_can_read_output() {
        say("warning: the file that the token was written to can be read by others: chmod 600 it");
    }
    Ok(())
}

/// Whether standard output goes to a file that is not its owner's alone.
fn others_can_read_output() -> bool {
    let output = std::io::stdout().as_fd().try_clone_to_owned().map(File::from);
    output.and_then(|o| o.metadata()).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o077 != 0)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    cluster: String,
    serial: u64,
    state: &'static str,
    pod_cidrs: Vec<String>,
    tunnel: Vec<String>,
    namespaces: Vec<String>,
    member_since: String,
}

impl Row {
    fn of(grant: &Grant, state: &'static str) -> Self {
        let text = |list: &BTreeSet<_>| list.iter().map(ToString::to_string).collect();
        let since = i64::try_from(grant.member_since).ok().and_then(|s| Timestamp::from_second(s).ok());
        Self {
            cluster: grant.cluster.to_string(),
            serial: grant.serial,
            state,
            pod_cidrs: text(&grant.owned),
            tunnel: text(&grant.tunnel),
            namespaces: grant.namespaces.iter().map(ToString::to_string).collect(),
            member_since: since.map(|t| t.to_string()).unwrap_or_default(),
        }
    }
}

pub(super) fn members(printer: &Printer, args: &SetArgs) -> Result<()> {
    let set = SetDir::open(&args.dir)?;
    let live = set.live();
    let state = |grant: &Grant| match live.get(&grant.cluster) {
        Some(newest) if newest.serial == grant.serial => "granted",
        Some(_) if !set.revocations.as_ref().is_some_and(|r| r.revokes(grant)) => "replaced",
        _ => "revoked",
    };
    #[derive(Serialize)]
    struct List {
        items: Vec<Row>,
    }
    let list = List { items: set.grants.values().map(|g| Row::of(g, state(g))).collect() };
    printer.print("MemberList", &list, |printer| {
        let namespaces =
            |r: &Row| if r.namespaces.is_empty() { "*".to_owned() } else { r.namespaces.join(",") };
        printer.table(&Table {
            headers: vec!["CLUSTER", "SERIAL", "STATE", "POD-CIDRS", "NAMESPACES", "TUNNEL", "MEMBER-SINCE"],
            narrow: 5,
            rows: list
                .items
                .iter()
                .map(|r| {
                    vec![
                        r.cluster.clone(),
                        r.serial.to_string(),
                        r.state.to_owned(),
                        r.pod_cidrs.join(","),
                        namespaces(r),
                        r.tunnel.join(","),
                        r.member_since.clone(),
                    ]
                })
                .collect(),
        })
    })
}

pub(super) fn revoke(printer: &Printer, args: &Revoke) -> Result<()> {
    let mut set = SetDir::open(&args.set.dir)?;
    let serial = set.last_serial(&args.cluster, args.older)?;
    if !args.yes {
        let what = if args.older {
            format!(
                "ends the grants of {0} up to {serial} everywhere: it is no member unless it joined by a newer one",
                args.cluster
            )
        } else {
            format!("ends the membership of {} everywhere", args.cluster)
        };
        if !std::io::stdin().is_terminal() {
            bail!("this {what}; add --yes to do it without a terminal");
        }
        say(format!("This {what}. Type its id to go on:"));
        let mut answer = String::new();
        std::io::stdin().lock().read_line(&mut answer)?;
        if answer.trim() != args.cluster.as_str() {
            bail!("not revoked");
        }
    }
    // Another copy of this directory may have signed a newer list, and a list counts whole.
    if !args.offline {
        for (address, result) in super::broker::fetch(&set.brokers.brokers, set.roots.set())? {
            let newer = result.ok().and_then(|documents| documents.revocations);
            match newer.map(|envelope| set.adopt(&envelope)) {
                Some(Ok(true)) => {
                    say(format!("broker {address} had a newer list of revocations; it is kept and added to"))
                }
                Some(Err(error)) => say(format!(
                    "the list of revocations that broker {address} has is passed over: {error:#}"
                )),
                Some(Ok(false)) | None => {}
            }
        }
    }
    // Revoked already: the same list is handed out again.
    let list = match &set.revocations {
        Some(list) if list.up_to.get(&args.cluster).is_some_and(|&up_to| up_to >= serial) => list.clone(),
        _ => set.revoke(&args.cluster, serial)?,
    };
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Revoked {
        cluster: String,
        up_to_serial: u64,
        version: u64,
        told: Vec<String>,
        not_told: Vec<String>,
    }
    let mut told = Vec::new();
    let mut not_told = Vec::new();
    if args.offline {
        not_told.extend(set.brokers.brokers.iter().map(|b| b.address.clone()));
    } else {
        let results = super::broker::offer(&set.brokers.brokers, &set.documents())?;
        for (address, result) in results {
            match result {
                Ok(()) => told.push(address),
                Err(error) => {
                    say(format!("broker {address} was not told: {error:#}"));
                    not_told.push(address);
                }
            }
        }
    }
    let failed = told.is_empty() && !args.offline;
    let cluster = args.cluster.to_string();
    let revoked = Revoked { cluster, up_to_serial: serial, version: list.version, told, not_told };
    printer.print("Revocation", &revoked, |_| {
        let told = if revoked.told.is_empty() { "no broker".to_owned() } else { revoked.told.join(", ") };
        format!(
            "Revoked {} up to grant {} (list {}); told {told}.\n",
            revoked.cluster, revoked.up_to_serial, revoked.version
        )
    })?;
    if failed {
        bail!("no broker was reached; run the same command again when one is");
    }
    Ok(())
}
