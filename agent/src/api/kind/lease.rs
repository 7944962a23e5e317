//! coordination.k8s.io/v1 Lease: who leads.

use k8s_openapi::api::coordination::v1 as coordination;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff;
use tombolo_proto::model::Namespace;

use super::{Kind, OWN_NAMESPACE, ObjectId, Problem, bad, own_meta};
use crate::api::observed::Lease;

/// The controller's Lease.
pub const NAME: &str = "tombolo-controller";
/// Annotation with the epoch that the holder reserved.
pub const EPOCH_ANNOTATION: &str = "tombolo.dev/epoch";

/// Where it lies.
pub fn id() -> Result<ObjectId, Problem> {
    let namespace = Namespace::new(OWN_NAMESPACE).map_err(|e| bad(e.to_string()))?;
    ObjectId::namespaced(Kind::Lease, &namespace, NAME)
}

/// The API's object.
pub fn write(lease: &Lease) -> Result<coordination::Lease, Problem> {
    let mut metadata = own_meta(&id()?);
    metadata.annotations = Some([(EPOCH_ANNOTATION.to_owned(), lease.epoch.to_string())].into());
    let spec = coordination::LeaseSpec {
        holder_identity: Some(lease.holder.clone().unwrap_or_default()),
        lease_duration_seconds: i32::try_from(lease.duration).ok(),
        acquire_time: Some(micro_time(lease.acquired)),
        renew_time: Some(micro_time(lease.renewed)),
        lease_transitions: i32::try_from(lease.transitions).ok(),
        ..coordination::LeaseSpec::default()
    };
    Ok(coordination::Lease { metadata, spec: Some(spec) })
}

/// Our value. Fields that are missing or out of range are as in a Lease nobody holds: whoever takes it mends it.
/// Only the epoch must be readable, since one that is too low would take back what was said.
pub fn read(object: &coordination::Lease) -> Result<Lease, Problem> {
    let spec = object.spec.clone().unwrap_or_default();
    let number = |n: Option<i32>| n.and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
    let micros = |t: Option<MicroTime>| t.and_then(|t| u64::try_from(t.0.as_microsecond()).ok()).unwrap_or(0);
    let epoch = object.metadata.annotations.as_ref().and_then(|a| a.get(EPOCH_ANNOTATION));
    let epoch = epoch.map_or(Ok(0), |text| {
        text.parse().map_err(|_| bad(format!("annotation {EPOCH_ANNOTATION} is not a number")))
    });
    Ok(Lease {
        holder: spec.holder_identity.filter(|holder| !holder.is_empty()),
        duration: number(spec.lease_duration_seconds),
        acquired: micros(spec.acquire_time),
        renewed: micros(spec.renew_time),
        transitions: number(spec.lease_transitions),
        epoch: epoch?,
    })
}

fn micro_time(micros: u64) -> MicroTime {
    let micros = i64::try_from(micros).unwrap_or(i64::MAX);
    MicroTime(jiff::Timestamp::from_microsecond(micros).unwrap_or(jiff::Timestamp::MAX))
}
