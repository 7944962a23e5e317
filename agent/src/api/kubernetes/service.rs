//! Makes the Services that carry ClusterSetIPs.

use tombolo_agent_core::object::{DerivedService, ServiceKey};

use super::object::Object;
use super::own;
use super::table::Entry;
use super::write::{Part, Writer, object};
use crate::api::Error;
use crate::api::kind::{derived, json};

/// Makes an import's Service so, with the addresses that it shall have if the API server can give them. Returns what is
/// there then.
pub(super) async fn make(
    writer: &Writer,
    key: &ServiceKey,
    wanted: &DerivedService,
) -> Result<DerivedService, Error> {
    let id = own(derived::id(key))?;
    match object(writer.entry(&id).as_ref()) {
        Some(Object::Derived { value, .. }) if is(value, wanted) => return Ok(DerivedService::clone(value)),
        // The first family of a Service never changes: it is made anew, and its address is another.
        Some(Object::Derived { value, .. }) if other_family(value, wanted) => {
            writer.delete(&id).await?;
        }
        _ => {}
    }
    let written = match apply(writer, key, wanted).await {
        // Its addresses are somebody else's by now, or of no range that Services have: it takes others.
        Err(Error::Refused { invalid: true, .. }) if !wanted.ips.is_empty() => {
            apply(writer, key, &DerivedService { ips: Vec::new(), ..wanted.clone() }).await
        }
        other => other,
    }?;
    let there = written.or_else(|| writer.entry(&id));
    match object(there.as_ref()) {
        Some(Object::Derived { value, .. }) if is(value, wanted) => Ok(DerivedService::clone(value)),
        Some(Object::Derived { value, .. }) => {
            // Something of somebody else's is in it, which server-side apply leaves.
            let ips = value.ips.clone();
            let body = json(&own(derived::write(key, &DerivedService { ips, ..wanted.clone() }))?);
            let entry = writer.replace(&id, Part::Main, body).await?;
            match object(Some(&entry)) {
                Some(Object::Derived { value, .. }) => Ok(DerivedService::clone(value)),
                _ => Err(Error::Conflict { object: id.to_string() }),
            }
        }
        _ => Err(Error::Conflict { object: id.to_string() }),
    }
}

async fn apply(writer: &Writer, key: &ServiceKey, wanted: &DerivedService) -> Result<Option<Entry>, Error> {
    let id = own(derived::id(key))?;
    let body = json(&own(derived::write(key, wanted))?);
    let ask = |there: Option<&Entry>| match object(there) {
        Some(Object::Derived { value, .. }) if is(value, wanted) => Ok(None),
        Some(Object::Service(..)) => Err(Error::Object {
            object: id.to_string(),
            message: "a Service of this name is there that Tombolo has not made; remove it".to_owned(),
        }),
        _ => Ok(Some(body.clone())),
    };
    writer.apply(&id, Part::Main, ask).await
}

/// Whether it is as it should be. Addresses that are not asked for are the API server's.
fn is(there: &DerivedService, wanted: &DerivedService) -> bool {
    wanted.ips.iter().all(|ip| there.ips.contains(ip))
        && *there == DerivedService { ips: there.ips.clone(), ..wanted.clone() }
}

fn other_family(there: &DerivedService, wanted: &DerivedService) -> bool {
    !there.families.is_empty() && there.families.first() != wanted.families.first()
}
