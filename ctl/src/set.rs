//! The administrator's directory: root keys, and every document they have signed.
//!
//! ```text
//! root-1.key root-2.key   seeds of the root keys (move one to a safe place)
//! broker-N.key            seed of broker N's TLS key; goes to that broker
//! broker.set              roots and brokers, for brokers
//! roots/N                 versions of the roots
//! brokers/N               versions of the list of brokers
//! grants/SERIAL           every grant ever signed
//! revocations/N           versions of the list of revocations
//! settings.json           tunnel pool
//! ```
//! Every document is one file, never changed once written.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::fs::TryLockError;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use data_encoding::BASE64;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prost::Message as _;
use serde::{Deserialize, Serialize};
use tombolo_proto::model::{ClusterId, NamespacePattern, Prefix, SetName};
use tombolo_proto::pb;
use tombolo_proto::trust::{
    Broker, Brokers, Envelope, Grant, Invitation, PublicKey, Revocations, RootChain, Roots, SigningKey,
    Verified,
};
use tombolo_proto::wire::{Documents, decode_envelope, encode_envelope};
use tombolo_replica::SetFile;
use zeroize::Zeroizing;

/// What a cluster asks to be.
pub(crate) struct NewGrant {
    pub(crate) cluster: ClusterId,
    pub(crate) owned: BTreeSet<Prefix>,
    pub(crate) namespaces: Vec<NamespacePattern>,
    /// That its tunnel range is to have room for.
    pub(crate) nodes: u32,
    pub(crate) subject: PublicKey,
    /// Unix seconds.
    pub(crate) bind_before: Option<u64>,
    /// Unix seconds.
    pub(crate) now: u64,
    /// Whether the cluster has a grant already, which this one replaces.
    pub(crate) renew: bool,
}

/// What is to be different from what a cluster has.
pub(crate) struct Change {
    pub(crate) add: BTreeSet<Prefix>,
    pub(crate) remove: BTreeSet<Prefix>,
}

#[derive(Serialize, Deserialize)]
struct Settings {
    tunnel_pool: Ipv4Net,
}

/// The administrator's directory, locked while it is open.
pub(crate) struct SetDir {
    path: PathBuf,
    pub(crate) roots: RootChain,
    pub(crate) brokers: Verified<Brokers>,
    pub(crate) grants: BTreeMap<u64, Verified<Grant>>,
    pub(crate) revocations: Option<Verified<Revocations>>,
    settings: Settings,
    _lock: fs::File,
}

impl SetDir {
    /// Makes a new set with two root keys and an identity for each broker.
    pub(crate) fn init(path: &Path, name: SetName, brokers: &[String], tunnel_pool: Ipv4Net) -> Result<Self> {
        judge_brokers(brokers)?;
        judge_pool(tunnel_pool)?;
        match fs::read_dir(path).map(|mut entries| entries.next().is_none()) {
            Ok(true) => {}
            Ok(false) => {
                bail!("{} exists and is not empty; name another directory with --dir", path.display())
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot use {} as a directory", path.display()));
            }
        }
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        for folder in ["roots", "brokers", "grants", "revocations"] {
            fs::create_dir(path.join(folder))
                .with_context(|| format!("cannot make {}", path.join(folder).display()))?;
        }
        let keys = [new_key()?, new_key()?];
        for (index, key) in keys.iter().enumerate() {
            write_secret(&path.join(format!("root-{}.key", index + 1)), key)?;
        }
        let roots =
            Roots { version: 1, name, keys: keys.iter().map(SigningKey::public).collect(), previous: None };
        let roots_envelope = roots.sign(&keys[0]);
        let chain = RootChain::first(&roots_envelope).context("the new roots do not verify")?;
        write_document(&path.join("roots/1"), &roots_envelope)?;

        let mut list = Vec::new();
        for (index, address) in brokers.iter().enumerate() {
            let key = new_key()?;
            list.push(Broker { address: address.clone(), key: key.public() });
            write_secret(&path.join(format!("broker-{}.key", index + 1)), &key)?;
        }
        let brokers = Brokers { set: chain.set(), version: 1, brokers: list }.sign(&keys[0]);
        let brokers =
            chain.brokers(&brokers).context("the brokers' addresses do not fit: HOST:PORT is expected")?;
        write_document(&path.join("brokers/1"), brokers.envelope())?;
        write(&path.join("settings.json"), &serde_json::to_vec_pretty(&Settings { tunnel_pool })?, 0o600)?;
        let set_file = SetFile { roots: chain, brokers };
        write(&path.join("broker.set"), format!("{}\n", set_file.to_text()).as_bytes(), 0o644)?;
        Self::open(path)
    }

    /// Opens a set and verifies all that is in it.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        if !path.join("roots/1").exists() {
            bail!("{} holds no set: make one with `tombolo init`, or name it with --dir", path.display());
        }
        let lock = lock(path)?;
        let mut roots: Option<RootChain> = None;
        for (_, envelope) in documents(&path.join("roots"))? {
            match &mut roots {
                None => roots = Some(RootChain::first(&envelope).context("roots/1 is damaged")?),
                Some(chain) => {
                    chain.advance(&envelope).context("the roots are damaged")?;
                }
            }
        }
        let roots = roots.context("no roots")?;
        let newest = documents(&path.join("brokers"))?.pop_last().context("no list of brokers")?;
        let brokers = roots.brokers(&newest.1).context("the list of brokers is damaged")?;
        let mut grants = BTreeMap::new();
        for (serial, envelope) in documents(&path.join("grants"))? {
            let grant = roots.grant(&envelope).with_context(|| format!("grants/{serial} is damaged"))?;
            grants.insert(grant.serial, grant);
        }
        let revocations = match documents(&path.join("revocations"))?.pop_last() {
            Some((version, envelope)) => Some(
                roots.revocations(&envelope).with_context(|| format!("revocations/{version} is damaged"))?,
            ),
            None => None,
        };
        let settings = fs::read(path.join("settings.json")).context("settings.json cannot be read")?;
        let settings = serde_json::from_slice(&settings).context("settings.json is damaged")?;
        Ok(Self { path: path.to_owned(), roots, brokers, grants, revocations, settings, _lock: lock })
    }

    /// Grants that are neither revoked nor replaced by a newer one.
    pub(crate) fn live(&self) -> BTreeMap<&ClusterId, &Verified<Grant>> {
        let revoked = |g: &Grant| self.revocations.as_ref().is_some_and(|list| list.revokes(g));
        self.grants.values().filter(|g| !revoked(g)).map(|g| (&g.cluster, g)).collect()
    }

    /// The pod ranges that a cluster has after a change, and the namespaces that it has.
    pub(crate) fn changed(
        &self,
        cluster: &ClusterId,
        change: &Change,
    ) -> Result<(BTreeSet<Prefix>, Vec<NamespacePattern>)> {
        let live = self.live();
        let Some(old) = live.get(cluster) else {
            bail!("cluster {cluster} has no grant that could be changed; `tombolo members` lists them");
        };
        let list = || old.owned.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        if let Some(prefix) = change.add.iter().find(|p| old.owned.iter().any(|o| o.overlaps(p))) {
            bail!("{prefix} overlaps what cluster {cluster} has already ({}); nothing was granted", list());
        }
        if let Some(prefix) = change.remove.iter().find(|p| !old.owned.contains(*p)) {
            bail!("cluster {cluster} was not granted {prefix}, but {}; nothing was granted", list());
        }
        let owned: BTreeSet<Prefix> = &(&old.owned - &change.remove) | &change.add;
        if owned.is_empty() {
            bail!(
                "cluster {cluster} would have no pod range left; end its membership with `tombolo revoke {cluster}`"
            );
        }
        Ok((owned, old.namespaces.clone()))
    }

    /// Signs a grant with the next serial and a tunnel range of its own.
    pub(crate) fn grant(&mut self, new: NewGrant) -> Result<Verified<Grant>> {
        let live = self.live();
        let old = live.get(&new.cluster).copied();
        match (old, new.renew) {
            (Some(old), false) => bail!(
                "cluster {0} already has grant {1}; add --renew to grant anew what it has (another key, token or \
                 range), or choose another id",
                new.cluster,
                old.serial
            ),
            (None, true) => bail!(
                "cluster {} has no grant that could be renewed; `tombolo members` lists them",
                new.cluster
            ),
            _ => {}
        }
        for prefix in &new.owned {
            for (cluster, grant) in live.iter().filter(|(cluster, _)| **cluster != &new.cluster) {
                if let Some(taken) = grant.ranges().find(|p| p.overlaps(prefix)) {
                    bail!(
                        "{prefix} overlaps {taken} of cluster {cluster}: every cluster needs ranges of its own"
                    );
                }
            }
            if prefix.net().contains(&IpNet::V4(self.settings.tunnel_pool))
                || IpNet::V4(self.settings.tunnel_pool).contains(&prefix.net())
            {
                bail!(
                    "{prefix} overlaps the tunnel pool {}; make the set with another --tunnel-pool",
                    self.settings.tunnel_pool
                );
            }
        }
        let serial = next(self.grants.last_key_value().map_or(0, |(serial, _)| *serial), "serials")?;
        // A renewed grant keeps what others know the cluster by.
        let (tunnel, member_since) = match old {
            Some(old) => (old.tunnel.clone(), old.member_since),
            None => {
                let taken = live.values().flat_map(|g| g.ranges().copied()).collect();
                (self.tunnel(serial, &taken, new.nodes)?, new.now)
            }
        };
        if let Some((owned, own)) =
            new.owned.iter().find_map(|o| tunnel.iter().find(|t| t.overlaps(o)).map(|t| (o, t)))
        {
            bail!(
                "{owned} overlaps {own}, where the cluster's tunnel addresses come from; name smaller ranges"
            );
        }
        let grant = Grant {
            set: self.roots.set(),
            cluster: new.cluster,
            serial,
            member_since,
            owned: new.owned,
            tunnel,
            namespaces: new.namespaces,
            subject: new.subject,
            bind_before: new.bind_before,
        };
        let envelope = grant.sign(&self.root_key()?);
        let verified = self.roots.grant(&envelope).context("the new grant does not verify")?;
        write_document(&self.path.join(format!("grants/{serial}")), &envelope)?;
        self.grants.insert(serial, verified.clone());
        Ok(verified)
    }

    fn tunnel(&self, serial: u64, taken: &BTreeSet<Prefix>, nodes: u32) -> Result<BTreeSet<Prefix>> {
        let pool = self.settings.tunnel_pool;
        // No node bears the first address or the last.
        let bits = nodes.saturating_add(2).next_power_of_two().trailing_zeros();
        let length = u8::try_from(32_u32.saturating_sub(bits)).unwrap_or(0).min(24);
        let v4 = pool
            .subnets(length)
            .with_context(|| format!("the tunnel pool {pool} is smaller than a /{length}"))?
            .filter_map(|net| Prefix::new(IpNet::V4(net)).ok())
            .find(|prefix| !taken.iter().any(|t| t.overlaps(prefix)))
            .with_context(|| {
                format!(
                    "the tunnel pool {pool} has no free /{length}; make room by revoking, or use a larger pool"
                )
            })?;
        let set = self.roots.set().0;
        let subnet = u16::try_from(serial).context("serials over 65535 have no tunnel range")?;
        let [high, low] = subnet.to_be_bytes();
        let ula = [0xfd, set[0], set[1], set[2], set[3], set[4], high, low, 0, 0, 0, 0, 0, 0, 0, 0];
        let v6 = Prefix::new(IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::from(ula), 64)))?;
        Ok(BTreeSet::from([v4, v6]))
    }

    /// Up to which serial a revocation ends the cluster's grants: its newest, or with `older` the one before.
    pub(crate) fn last_serial(&self, cluster: &ClusterId, older: bool) -> Result<u64> {
        let mut serials = self.grants.values().rev().filter(|g| g.cluster == *cluster).map(|g| g.serial);
        let newest = serials.next().with_context(|| {
            format!("cluster {cluster} has no grant in this set; `tombolo members` lists them")
        })?;
        if !older {
            return Ok(newest);
        }
        serials.next().with_context(|| {
            format!("cluster {cluster} has no grant but {newest}; `tombolo revoke {cluster}` ends that one")
        })
    }

    /// Signs a new list of revocations that ends the cluster's grants up to a serial.
    pub(crate) fn revoke(&mut self, cluster: &ClusterId, serial: u64) -> Result<Verified<Revocations>> {
        let (version, mut up_to) =
            self.revocations.as_ref().map(|r| (r.version, r.up_to.clone())).unwrap_or_default();
        let up_to_now = up_to.entry(cluster.clone()).or_default();
        *up_to_now = serial.max(*up_to_now);
        let version = next(version, "versions of the revocations")?;
        let list = Revocations { set: self.roots.set(), version, up_to };
        let envelope = list.sign(&self.root_key()?);
        let verified = self.roots.revocations(&envelope).context("the new list does not verify")?;
        write_document(&self.path.join(format!("revocations/{version}")), &envelope)?;
        self.revocations = Some(verified.clone());
        Ok(verified)
    }

    /// Takes a list of revocations that a broker has, if it is newer than ours: another copy of this directory
    /// signed it, and a list counts whole. True if it was taken.
    pub(crate) fn adopt(&mut self, envelope: &Envelope) -> Result<bool> {
        let list = self.roots.revocations(envelope)?;
        if self.revocations.as_ref().is_some_and(|known| known.version >= list.version) {
            return Ok(false);
        }
        write_document(&self.path.join(format!("revocations/{}", list.version)), envelope)?;
        self.revocations = Some(list);
        Ok(true)
    }

    /// An invitation to a grant.
    pub(crate) fn invitation(&self, grant: Verified<Grant>, invite_key: Option<SigningKey>) -> Invitation {
        Invitation { roots: self.roots.clone(), brokers: self.brokers.clone(), grant, invite_key }
    }

    /// The set's own documents, to offer to brokers.
    pub(crate) fn documents(&self) -> Documents {
        Documents {
            roots: self.roots.envelopes().cloned().collect(),
            brokers: Some(self.brokers.envelope().clone()),
            revocations: self.revocations.as_ref().map(|r| r.envelope().clone()),
            memberships: Vec::new(),
        }
    }

    fn root_key(&self) -> Result<SigningKey> {
        let current = self.roots.current();
        for index in 1..=Roots::MAX_KEYS {
            let path = self.path.join(format!("root-{index}.key"));
            if path.exists() {
                let key = read_secret(&path)?;
                if current.keys.contains(&key.public()) {
                    return Ok(key);
                }
            }
        }
        bail!("no root key of this set is in {}: put root-1.key or root-2.key there", self.path.display())
    }
}

/// Default pool of tunnel ranges: RFC 2544's benchmark network, which nobody routes.
pub(crate) fn default_tunnel_pool() -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(198, 18, 0, 0), 16)
}

/// How long to wait for another command in the same directory.
const PATIENCE: Duration = Duration::from_secs(5);

fn lock(path: &Path) -> Result<fs::File> {
    let file = path.join(".lock");
    let open = fs::OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&file);
    let lock = open.with_context(|| format!("cannot open {}", file.display()))?;
    let start = Instant::now();
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(lock),
            Err(TryLockError::WouldBlock) if start.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(TryLockError::WouldBlock) => {
                bail!("another tombolo command works in {}; try again when it has ended", path.display())
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", file.display()));
            }
        }
    }
}

fn judge_brokers(brokers: &[String]) -> Result<()> {
    if brokers.len() > Brokers::MAX_BROKERS {
        bail!("a set has at most {} brokers", Brokers::MAX_BROKERS);
    }
    for (index, address) in brokers.iter().enumerate() {
        if !Broker::is_address(address) {
            bail!("--broker {address:?} is not an address: HOST:PORT or [IPV6]:PORT is expected");
        }
        if brokers[..index].contains(address) {
            bail!("--broker {address} is named twice");
        }
    }
    Ok(())
}

fn judge_pool(pool: Ipv4Net) -> Result<()> {
    Prefix::new(IpNet::V4(pool)).context("--tunnel-pool")?;
    if pool.prefix_len() > 24 {
        bail!("--tunnel-pool {pool} is smaller than a /24, which each cluster takes one of");
    }
    Ok(())
}

/// Serials and versions only grow.
fn next(number: u64, what: &str) -> Result<u64> {
    number.checked_add(1).with_context(|| format!("the {what} of this set are used up; make a new set"))
}

/// A new key of the system's randomness.
pub(crate) fn new_key() -> Result<SigningKey> {
    SigningKey::generate().map_err(|error| anyhow::anyhow!("no randomness from the system: {error}"))
}

fn documents(folder: &Path) -> Result<BTreeMap<u64, Envelope>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).with_context(|| format!("{} cannot be read", folder.display()))? {
        let path = entry?.path();
        let Some(number) = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse().ok()) else {
            continue;
        };
        let read = || -> Result<Envelope> {
            let text = fs::read_to_string(&path)?;
            let bytes = BASE64.decode(text.trim().as_bytes())?;
            Ok(decode_envelope(&pb::Envelope::decode(bytes.as_slice())?)?)
        };
        found.insert(number, read().with_context(|| format!("{} is damaged", path.display()))?);
    }
    Ok(found)
}

fn write_document(path: &Path, envelope: &Envelope) -> Result<()> {
    let text = BASE64.encode(&encode_envelope(envelope).encode_to_vec());
    write(path, format!("{text}\n").as_bytes(), 0o644)
}

fn write_secret(path: &Path, key: &SigningKey) -> Result<()> {
    let mut text = Zeroizing::new(BASE64.encode(key.seed().as_ref()));
    text.push('\n');
    write(path, text.as_bytes(), 0o600)
}

fn read_secret(path: &Path) -> Result<SigningKey> {
    let read = || -> std::io::Result<(u32, Zeroizing<String>)> {
        let mut file = fs::File::open(path)?;
        let mut text = Zeroizing::new(String::with_capacity(128));
        (&mut file).take(128).read_to_string(&mut text)?;
        Ok((file.metadata()?.permissions().mode(), text))
    };
    let (mode, text) = read().with_context(|| format!("{} cannot be read", path.display()))?;
    if mode & 0o077 != 0 {
        bail!(
            "{0} is a secret that others can read (mode {1:04o}); if nobody has: chmod 600 {0}",
            path.display(),
            mode & 0o7777
        );
    }
    let seed = BASE64.decode(text.trim().as_bytes()).ok().map(Zeroizing::new);
    let seed: Option<&[u8; 32]> = seed.as_ref().and_then(|bytes| bytes.as_slice().try_into().ok());
    let seed =
        seed.with_context(|| format!("{} is damaged: 32 bytes in base64 are expected", path.display()))?;
    Ok(SigningKey::from_seed(seed))
}

/// Writes a new file, whole or not at all; an existing one is never overwritten.
fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    if path.exists() {
        bail!("{} exists already and is left as it is", path.display());
    }
    let parent = path.parent().unwrap_or(Path::new("."));
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("file");
    let temporary = parent.join(format!(".{name}.tmp"));
    let attempt = || -> std::io::Result<()> {
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        fs::File::open(parent)?.sync_all()
    };
    attempt().with_context(|| format!("cannot write {}", path.display()))
}
