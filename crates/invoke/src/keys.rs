//! Access keys: Secrets of a type of their own. Each acts for the namespace that it is in.

use api::client::{Client, ListOptions};
use api::informer::Informer;
use api::kind::Resource;
use api::object::{Meta, SharedObject};
use base64::Engine as _;
use std::sync::Arc;

/// The Secret's type; its keys are `accessKeyId` and `secretAccessKey`.
pub const TYPE: &str = "functions.atoll.dev/access-key";
const LEAST: usize = 16;

pub struct Keys(Informer);

impl Keys {
    pub fn new(client: Arc<dyn Client>) -> Keys {
        Keys(Informer::spawn(client, Resource::new("", "v1", "secrets"), "", ListOptions::default()))
    }

    /// Namespace and secret of a key. None where two Secrets have the same id: nobody could tell whom it is for.
    pub fn find(&self, id: &str) -> Option<(String, String)> {
        let all = self.0.list();
        let mut found = all.iter().filter(|secret| is_key(secret, id));
        let secret = found.next().filter(|_| found.next().is_none())?;
        let value = field(secret, "secretAccessKey")?;
        (value.len() >= LEAST).then(|| (secret.namespace().to_owned(), value))
    }
}

fn is_key(secret: &SharedObject, id: &str) -> bool {
    secret.str_at("/type") == TYPE
        && !secret.is_deleting()
        && !id.is_empty()
        && field(secret, "accessKeyId").is_some_and(|known| known == id)
}

fn field(secret: &SharedObject, key: &str) -> Option<String> {
    let encoded = secret.get("data")?.get(key)?.as_str()?;
    let bytes = base64::engine::general_purpose::STANDARD.decode(encoded).ok()?;
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_secrets_of_the_type_are_keys() {
        let secret = |kind: &str, id: &str| -> SharedObject {
            let id = base64::engine::general_purpose::STANDARD.encode(id);
            Arc::new(json!({"type": kind, "metadata": {"name": "s", "namespace": "n"}, "data": {"accessKeyId": id}}))
        };
        assert!(is_key(&secret(TYPE, "AKID"), "AKID"));
        assert!(!is_key(&secret("Opaque", "AKID"), "AKID") && !is_key(&secret(TYPE, ""), ""));
        assert!(!is_key(&secret(TYPE, "AKID"), "OTHER"));
    }
}
