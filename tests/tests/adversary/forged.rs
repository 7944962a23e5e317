//! What is said in the name of others.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use tombolo_proto::model::{ClusterId, Position, Record, Scope};
use tombolo_proto::trust::{Binding, Broker, Brokers, Envelope, Grant, Revocations, Roots, ScopeDigest};
use tombolo_proto::wire::{Chunk, Documents, MembershipParts, Message, Update};
use tombolo_replica::LocalOrigin;

use crate::mallory::{Mallory, Said, at, backends, export, service};

/// A lie and what it is about, for the test's own words.
pub type Forgery = (&'static str, Vec<Message>);

/// A statement of `victim` as the liar would have it, and the messages that bring it.
fn rewritten(mallory: &Mallory, victim: &ClusterId) -> Result<(Said, Position)> {
    let held =
        mallory.with_replica(|r| r.origin(victim).map(|s| s.position())).context("the victim is known")?;
    let mut said = Said::new();
    let pwned = at(&[("pwned", "10.66.9.9".parse()?), ("pwned", "10.2.2.10".parse()?)]);
    for (scope, record) in
        [export("production", "pwned", &service(true))?, backends("production", "pwned", 0, &pwned)?]
    {
        said.entry(scope).or_default().insert(record.key.clone(), record);
    }
    Ok((said, Position { sequence: held.sequence + 1000, ..held }))
}

fn whole(
    origin: &ClusterId,
    statement: Envelope,
    said: &Said,
    local: &LocalOrigin,
    mallory: &Mallory,
) -> Vec<Message> {
    let leaves =
        said.iter().map(|(scope, records)| (scope.clone(), ScopeDigest::of(records.values()))).collect();
    // The second hash does not hang on who signs.
    let hash = local.sign(&mallory.key, Position::default()).namespaces_hash();
    let update = Update {
        origin: origin.clone(),
        base: None,
        statement,
        leaves,
        deltas: Vec::new(),
        namespaces_hash: hash,
    };
    let mut messages = vec![Message::Update(update)];
    for (scope, records) in said {
        messages.push(Message::Chunk(Chunk {
            origin: origin.clone(),
            scope: scope.clone(),
            index: 0,
            last: true,
            records: records.values().cloned().collect(),
        }));
    }
    messages
}

/// Statements in another's name.
pub fn statements(mallory: &Mallory, victim: &str) -> Result<Vec<Forgery>> {
    let victim = ClusterId::new(victim)?;
    let (said, position) = rewritten(mallory, &victim)?;
    let set = mallory.roots.set();
    let mut local = LocalOrigin::new(set, victim.clone());
    local.set_records(&said);
    let by_mallory = local.sign(&mallory.key, position).envelope().clone();
    let higher = Position { serial: mallory.position.serial, ..position };
    let under_own_serial = local.sign(&mallory.key, higher).envelope().clone();
    let own = mallory.with_replica(|r| r.origin(&mallory.id).map(|s| s.statement().envelope().clone()));
    let (truth, scopes) = mallory
        .with_replica(|r| {
            let state = r.origin(&victim)?;
            Some((state.statement().envelope().clone(), state.leaves().clone()))
        })
        .context("the victim is known")?;
    let mut bent = truth.clone();
    let mut payload = bent.payload.to_vec();
    if let Some(byte) = payload.last_mut() {
        *byte ^= 1;
    }
    bent.payload = payload.into();
    let scopes: Vec<Scope> = scopes.keys().cloned().collect();
    let foreign_records: Vec<Message> = scopes
        .iter()
        .map(|scope| {
            Message::Chunk(Chunk {
                origin: victim.clone(),
                scope: scope.clone(),
                index: 0,
                last: true,
                records: said.values().flat_map(BTreeMap::values).cloned().collect(),
            })
        })
        .collect();
    let make = |statement: Envelope| whole(&victim, statement, &said, &local, mallory);
    Ok(vec![
        ("signed by another's key", make(by_mallory)),
        ("under another's serial", make(under_own_serial)),
        ("altered after it was signed", make(bent)),
        ("another's own statement", make(own.context("its own")?)),
        ("true, with other records", make(truth).into_iter().chain(foreign_records).collect()),
    ])
}

/// Documents that only the administrator, or the victim, could sign.
pub fn documents(mallory: &Mallory, victim: &str) -> Result<Vec<(&'static str, Documents)>> {
    let victim = ClusterId::new(victim)?;
    let set = mallory.roots.set();
    let key = &mallory.key;
    let truth = mallory.with_replica(|r| r.membership(&victim).cloned()).context("the victim is known")?;
    let grant: &Grant = truth.grant();
    let bindings: Vec<Envelope> = truth.bindings().iter().map(|b| b.envelope().clone()).collect();
    let binding = |serial: u64, generation: u32, cluster: &ClusterId| {
        Binding { set, cluster: cluster.clone(), serial, generation, key: key.public() }.sign(key)
    };
    let member = |grant: Envelope, bindings: Vec<Envelope>| Documents {
        memberships: vec![MembershipParts { grant, bindings }],
        ..Documents::default()
    };
    let own = Grant {
        subject: key.public(),
        serial: 1_000_000,
        owned: BTreeSet::from(["10.0.0.0/8".parse()?]),
        ..grant.clone()
    };
    let wider = Grant {
        cluster: mallory.id.clone(),
        serial: 1_000_001,
        member_since: 1,
        namespaces: Vec::new(),
        ..own.clone()
    };
    let rotated = [bindings.clone(), vec![binding(grant.serial, 1, &victim)]].concat();
    let up_to = BTreeMap::from([(victim.clone(), 1_000_000)]);
    let broker = Broker { address: "172.30.0.254:4500".to_owned(), key: key.public() };
    let name = mallory.roots.current().name.clone();
    let roots = Roots { version: 2, name, keys: vec![key.public()], previous: Some([7; 32]) };
    Ok(vec![
        ("a grant of its own making", member(own.sign(key), vec![binding(own.serial, 0, &victim)])),
        ("a wider grant for itself", member(wider.sign(key), vec![binding(wider.serial, 0, &mallory.id)])),
        (
            "the victim's grant, bound to another key",
            member(grant_of(&truth), vec![binding(grant.serial, 0, &victim)]),
        ),
        ("a rotation of the victim's key", member(grant_of(&truth), rotated)),
        (
            "its own grant with the victim's bindings",
            member(mallory.membership.grant().envelope().clone(), bindings),
        ),
        (
            "a revocation",
            Documents {
                revocations: Some(Revocations { set, version: 99, up_to }.sign(key)),
                ..Documents::default()
            },
        ),
        (
            "a list of brokers",
            Documents {
                brokers: Some(Brokers { set, version: 99, brokers: vec![broker] }.sign(key)),
                ..Documents::default()
            },
        ),
        ("new roots", Documents { roots: vec![roots.sign(key)], ..Documents::default() }),
    ])
}

fn grant_of(membership: &tombolo_proto::trust::Membership) -> Envelope {
    membership.grant().envelope().clone()
}

/// Two statements of the liar at one position.
pub fn fork(mallory: &Mallory, left: &str, right: &str) -> Result<[Vec<Message>; 2]> {
    let position = Position { sequence: mallory.position.sequence + 1, ..mallory.position };
    let make = |name: &str| -> Result<Vec<Message>> {
        let mut said = mallory.said.clone();
        for (scope, record) in mark(name)? {
            said.entry(scope).or_default().insert(record.key.clone(), record);
        }
        let mut local = LocalOrigin::new(mallory.roots.set(), mallory.id.clone());
        local.set_records(&said);
        let statement = local.sign(&mallory.key, position).envelope().clone();
        Ok(whole(&mallory.id, statement, &said, &local, mallory))
    };
    Ok([make(left)?, make(right)?])
}

/// An honest service of the liar.
pub fn mark(name: &str) -> Result<Vec<(Scope, Record)>> {
    Ok(vec![
        export("team-blue", name, &service(false))?,
        backends(
            "team-blue",
            name,
            0,
            &at(&[("a", "10.66.1.5".parse()?), ("a", "fd00:10:66:1::5".parse()?)]),
        )?,
    ])
}

/// Record keys that are tricks. All are printable ASCII: what is not does not get through a broker at all.
pub fn tricks() -> Vec<(u32, Vec<&'static str>)> {
    let texts = [
        "../../../../run/lab/pwned",
        "..",
        ".",
        "/etc/cron.d/pwned",
        "$(touch${IFS}/run/lab/pwned)",
        "`id`",
        ";nft",
        "a;flush",
        "%2e%2e%2fpwned",
        "<script>",
        "a\"b",
        "a'b",
        "a\\b",
        "{{.}}",
        "*",
        "?",
        "-rf",
        "--help",
        "A",
        "a_b",
        "a.b",
        "#",
        "&",
        "|",
    ];
    let mut keys = Vec::new();
    for text in texts {
        for kind in [1, 2, 3, 4, u32::MAX] {
            keys.push((kind, vec![text]));
            keys.push((kind, vec![text, "0"]));
            keys.push((kind, vec!["pwned", text]));
        }
    }
    keys
}
