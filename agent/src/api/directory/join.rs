//! What makes a directory a member.

use tombolo_proto::trust::SigningKey;
use tombolo_proto::wire::MembershipParts;

use super::{Directory, own, put_member};
use crate::api::kind::{cluster_set, json, member, secret, typed};
use crate::api::{ClusterSet, Error, Member};

impl Directory {
    /// Makes the directory a member: its set, its key and its own Member. Joining the same set as
    /// the same cluster again replaces them (a newer grant, a new key).
    ///
    /// # Errors
    /// [`Error::AlreadyMember`] if it is a member of another set, or as another cluster.
    pub fn join(&self, set: &ClusterSet, key: &SigningKey, own_member: &Member) -> Result<(), Error> {
        let (set_id, member_id) = (own(cluster_set::id())?, own(member::id(&set.cluster))?);
        let known = self.read_clusterset()?;
        if let Some(known) = &known
            && (known.value.set != set.set || known.value.cluster != set.cluster)
        {
            return Err(Error::AlreadyMember {
                path: self.root.clone(),
                cluster: known.value.cluster.clone(),
                set: known.value.set.to_string(),
            });
        }
        let set_value = json(&own(cluster_set::write(set))?);
        // A key that is replaced is kept until the Member that binds the new one is on the disk.
        let mut version = self.keys_version()?;
        let held = self.read_cluster_key()?;
        let replaced = held.as_ref().filter(|held| held.public() != key.public());
        version = Some(self.swap_keys(version.as_ref(), key, replaced)?);
        self.store.transact(|t| {
            let there = t.get(&member_id)?.flatten();
            let there =
                there.and_then(|value| member::read(&typed(&value).ok()?).ok()).map(|(_, member)| member);
            match there.and_then(|there| spoken_under(there, own_member)) {
                // What it said stays, and with it ranks and tunnel addresses, until it speaks under the new grant.
                Some(member) => t.put(&member_id, json(&own(member::write(&set.cluster, &member))?))?,
                None => {
                    let value = json(&own(member::write(&set.cluster, own_member))?);
                    put_member(t, &set.cluster, &member_id, value, &std::collections::BTreeMap::new())?;
                }
            }
            t.swap(&set_id, set_value, known.as_ref().map(|known| &known.version))?;
            Ok(())
        })?;
        if replaced.is_some() {
            self.swap_keys(version.as_ref(), key, None)?;
        }
        Ok(())
    }

    /// The cluster's key, made now if there is none: for `tombolo join --admit`, which shows its public half
    /// before there is a grant.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub fn ensure_cluster_key(&self) -> Result<SigningKey, Error> {
        if let Some(key) = self.read_cluster_key()? {
            return Ok(key);
        }
        let id = own(secret::id())?;
        let key = SigningKey::generate().map_err(|error| Error::Object {
            object: id.to_string(),
            message: format!("the system gives no randomness for a key ({error})"),
        })?;
        self.store.transact(|t| t.swap(&id, secret::write(&key, None), None).map(|_| ()))?;
        Ok(key)
    }

    /// Undoes [`Self::join`] and removes all that was written in `state/`; `manifests/` stays.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn leave(&self) -> Result<(), Error> {
        self.store.transact(|t| {
            for kind in crate::api::kind::Kind::ALL {
                for id in t.list(kind)?.keys() {
                    t.delete(id)?;
                }
            }
            Ok(())
        })?;
        Ok(())
    }
}

/// The new membership with what was said under the old one; None if nothing was.
fn spoken_under(old: Member, new: &Member) -> Option<Member> {
    let statement = old.statement?;
    let spoken = match old.spoken {
        Some(spoken) => Some(spoken),
        None if old.grant == new.grant => None,
        None => Some(MembershipParts { grant: old.grant, bindings: old.bindings }),
    };
    Some(Member { spoken, statement: Some(statement), namespaces: old.namespaces, ..new.clone() })
}
