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

/// The API's object; the seed is in base64 as all data of Secrets.
pub fn write(key: &SigningKey) -> Value {
    let seed = Zeroizing::new(data_encoding::BASE64.encode(key.seed().as_ref()));
    json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": NAME,
            "namespace": OWN_NAMESPACE,
            "labels": { MANAGED_BY_LABEL: MANAGED_BY },
        },
        "type": "tombolo.dev/cluster-key",
        "data": { "seed": seed.as_str() },
    })
}

/// The key.
pub fn read(object: &Value) -> Result<SigningKey, Problem> {
    let text = object.pointer("/data/seed").and_then(Value::as_str);
    let text = text.ok_or_else(|| bad("data.seed is missing"))?;
    let bytes = data_encoding::BASE64.decode(text.as_bytes()).map(Zeroizing::new);
    let bytes = bytes.map_err(|_| bad("data.seed is not base64"))?;
    let seed: Result<&[u8; 32], _> = bytes.as_slice().try_into();
    Ok(SigningKey::from_seed(seed.map_err(|_| bad("data.seed is not 32 bytes long"))?))
}
