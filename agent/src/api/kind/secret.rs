//! v1 Secret `tombolo-cluster-key`: the cluster's signing key.

use serde_json::{Value, json};
use tombolo_proto::model::Namespace;
use tombolo_proto::trust::SigningKey;
use zeroize::Zeroizing;

use super::{Kind, MANAGED_BY, MANAGED_BY_LABEL, OWN_NAMESPACE, ObjectId, Problem, bad};

/// The Secret's name.
pub const NAME: &str = "tombolo-cluster-key";

/// Where it lies.
pub fn id() -> Result<ObjectId, Problem> {
    let namespace = Namespace::new(OWN_NAMESPACE).map_err(|e| bad(e.to_string()))?;
    ObjectId::namespaced(Kind::Secret, &namespace, NAME)
}

/// The cluster's key, and while it is being rotated the one before: which of them counts says the own Member, whose
/// membership binds it. Written with both before the new one is bound, so that a process that dies at any moment
/// leaves one that is bound.
pub struct ClusterKeys {
    /// The newest.
    pub newest: SigningKey,
    /// The one before, while it may be needed.
    pub previous: Option<SigningKey>,
}

/// The API's object; seeds are in base64 as all data of Secrets.
pub fn write(newest: &SigningKey, previous: Option<&SigningKey>) -> Value {
    let text = |key: &SigningKey| Zeroizing::new(data_encoding::BASE64.encode(key.seed().as_ref()));
    let mut data = json!({ "seed": text(newest).as_str() });
    if let (Some(previous), Some(data)) = (previous, data.as_object_mut()) {
        data.insert("previousSeed".to_owned(), Value::String(text(previous).to_string()));
    }
    json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": NAME,
            "namespace": OWN_NAMESPACE,
            "labels": { MANAGED_BY_LABEL: MANAGED_BY },
        },
        "type": "tombolo.dev/cluster-key",
        "data": data,
    })
}

/// The keys.
pub fn read(object: &Value) -> Result<ClusterKeys, Problem> {
    let newest = seed(object, "seed")?.ok_or_else(|| bad("data.seed is missing"))?;
    Ok(ClusterKeys { newest, previous: seed(object, "previousSeed")? })
}

fn seed(object: &Value, field: &str) -> Result<Option<SigningKey>, Problem> {
    let Some(value) = object.pointer(&format!("/data/{field}")) else { return Ok(None) };
    let text = value.as_str().ok_or_else(|| bad(format!("data.{field} is not a text")))?;
    let bytes = data_encoding::BASE64.decode(text.as_bytes()).map(Zeroizing::new);
    let bytes = bytes.map_err(|_| bad(format!("data.{field} is not base64")))?;
    let seed: Result<&[u8; 32], _> = bytes.as_slice().try_into();
    Ok(Some(SigningKey::from_seed(seed.map_err(|_| bad(format!("data.{field} is not 32 bytes long")))?)))
}
