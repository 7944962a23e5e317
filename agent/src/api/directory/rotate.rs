//! Rotation of the cluster's signing key.

use tombolo_proto::model::ClusterId;
use tombolo_proto::trust::{Membership, RootChain, SigningKey};

use super::store::{self, version};
use super::{Directory, own};
use crate::api::kind::{ObjectId, cluster_set, json, member, secret, typed};
use crate::api::{Error, Member, Version};

/// What a rotation came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rotation {
    /// Whose key.
    pub cluster: ClusterId,
    /// Of the grant.
    pub serial: u64,
    /// Of the key that counts now.
    pub generation: u32,
    /// Whether an earlier rotation that was cut off was finished instead of making another.
    pub resumed: bool,
}

/// What a rotation does to the disk, one after the other. A process that dies after any of them leaves a key that
/// works, and the next rotation goes on from there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Step {
    /// The Secret holds both keys; the Member still binds the old one.
    #[cfg_attr(not(test), expect(dead_code, reason = "where tests cut it off"))]
    Kept,
    /// The Member binds the new one.
    Bound,
    /// The Secret holds the new one alone.
    Done,
}

impl Directory {
    /// Makes a new key, binds it by the present one, and forgets that. The leading agent does the rest: it hands the
    /// binding on and speaks under the new generation.
    ///
    /// # Errors
    /// If the cluster is no member, its key is not the one that its membership binds, it was rotated too often under
    /// one grant, or something cannot be read or written. One key or the other counts then, and works.
    pub fn rotate_cluster_key(&self) -> Result<Rotation, Error> {
        self.rotate_cluster_key_until(Step::Done)
    }

    /// The same, but no further than a step.
    pub(crate) fn rotate_cluster_key_until(&self, last: Step) -> Result<Rotation, Error> {
        let key_id = own(secret::id())?;
        let keys = self.read_typed(&key_id, secret::read)?;
        let keys = keys.ok_or_else(|| problem(&key_id, "it is missing; `tombolo join` makes it"))?;
        let (version, keys) = (keys.version, keys.value);
        let (cluster, membership) = self.own_membership()?;
        let (serial, bound) = (membership.grant().serial, membership.key());
        let rotation = |m: &Membership, resumed| Rotation {
            cluster: cluster.clone(),
            serial,
            generation: m.generation(),
            resumed,
        };
        let (present, next, resumed) = match keys.previous {
            Some(_) if keys.newest.public() == bound => {
                if last >= Step::Done {
                    self.swap_keys(Some(&version), &keys.newest, None)?;
                }
                return Ok(rotation(&membership, true));
            }
            Some(previous) if previous.public() == bound => (previous, keys.newest, true),
            _ if keys.newest.public() == bound => (keys.newest, generate(&key_id)?, false),
            _ => {
                let help = format!(
                    "it is not the key {bound} that the membership of {cluster} binds, so nothing can be signed with \
                     it: restore it from a backup, or ask the administrator for another grant \
                     (`tombolo invite {cluster} --renew`)"
                );
                return Err(problem(&key_id, &help));
            }
        };
        // Before anything is written: there may be no room for another binding.
        let member_id = own(member::id(&cluster))?;
        let rotated = membership.rotated(&present, next.public());
        let rotated = rotated.map_err(|error| problem(&member_id, &error.to_string()))?;
        let version = self.swap_keys(Some(&version), &next, Some(&present))?;
        if last >= Step::Bound {
            self.bind(&cluster, &membership, &rotated)?;
        }
        if last >= Step::Done {
            self.swap_keys(Some(&version), &next, None)?;
        }
        Ok(rotation(&rotated, resumed))
    }

    /// Replaces the Secret if it still is at `expected`, flushed to the disk. Two who do this at once must not lose
    /// each other's key.
    pub(super) fn swap_keys(
        &self,
        expected: Option<&Version>,
        newest: &SigningKey,
        previous: Option<&SigningKey>,
    ) -> Result<Version, Error> {
        let id = own(secret::id())?;
        let mut new = None;
        self.store.transact(|t| {
            new = Some(t.swap(&id, secret::write(newest, previous), expected)?);
            Ok(())
        })?;
        new.ok_or(Error::Ending)
    }

    /// The own membership as it stands here, verified.
    fn own_membership(&self) -> Result<(ClusterId, Membership), Error> {
        let set_id = own(cluster_set::id())?;
        let set = self.read_clusterset()?.map(|set| set.value);
        let set =
            set.ok_or_else(|| problem(&set_id, "this cluster is no member of a set yet: tombolo join"))?;
        let id = own(member::id(&set.cluster))?;
        let object = self.read_typed(&id, |value| member::read(&typed(value)?))?;
        let (_, object) =
            object.ok_or_else(|| problem(&id, "it is missing; restore it from a backup"))?.value;
        let roots = RootChain::pinned(set.set, &set.roots);
        let verified = roots.and_then(|roots| {
            let membership = Membership::verify(&roots, &object.grant, &object.bindings)?;
            let list = set.revocations.as_ref().and_then(|list| roots.revocations(list).ok());
            Ok((membership, list))
        });
        let (membership, list) = verified.map_err(|error| problem(&id, &error.to_string()))?;
        if list.is_some_and(|list| list.revokes(membership.grant())) {
            let help = "its grant was revoked by the administrator; ask for another (`tombolo invite`)";
            return Err(problem(&id, help));
        }
        Ok((set.cluster, membership))
    }

    /// Writes the Member with the new binding, if it still is as it was. Its statement may have moved on.
    fn bind(&self, cluster: &ClusterId, before: &Membership, after: &Membership) -> Result<(), Error> {
        let id = own(member::id(cluster))?;
        let bindings = |m: &Membership| m.bindings().iter().map(|b| b.envelope().clone()).collect::<Vec<_>>();
        let (was, is) = (bindings(before), bindings(after));
        self.store.transact(|t| {
            let there: store::Found = t.get(&id)?.flatten();
            let there = there.and_then(|value| member::read(&typed(&value).ok()?).ok()).map(|(_, m)| m);
            match there {
                Some(there) if there.grant == *before.grant().envelope() && there.bindings == is => Ok(()),
                Some(there) if there.grant == *before.grant().envelope() && there.bindings == was => {
                    let member = Member { bindings: is, ..there };
                    t.put(&id, json(&own(member::write(cluster, &member))?))
                }
                _ => Err(Error::Conflict { object: id.to_string() }),
            }
        })?;
        Ok(())
    }

    /// What the Secret holds now, for [`Self::swap_keys`].
    pub(super) fn keys_version(&self) -> Result<Option<Version>, Error> {
        Ok(self.store.read(&own(secret::id())?)?.map(|value| version(&value)))
    }
}

fn generate(id: &ObjectId) -> Result<SigningKey, Error> {
    SigningKey::generate()
        .map_err(|error| problem(id, &format!("the system gives no randomness for a key ({error})")))
}

fn problem(id: &ObjectId, message: &str) -> Error {
    Error::Object { object: id.to_string(), message: message.to_owned() }
}
