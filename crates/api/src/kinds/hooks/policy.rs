//! TrafficPolicy and BackendPolicy: what their schemas cannot say.

use super::field::{Problems, at, has, items, text};
use crate::object::Object;
use crate::status::Cause;
use serde_json::Value;
use std::net::IpAddr;

pub fn validate(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let spec = at(new, "spec");
    for field in ["allow", "deny"] {
        for (index, network) in items(at(spec, "addresses"), field).iter().enumerate() {
            let network = network.as_str().unwrap_or("");
            if !is_network(network) {
                let path = format!("spec.addresses.{field}[{index}]");
                p.invalid_text(&path, network, "must be a network such as 10.0.0.0/8 or 2001:db8::/32");
            }
        }
    }
    for (index, limit) in items(spec, "rateLimits").iter().enumerate() {
        if (text(limit, "by") == "Header") != has(limit, "header") {
            let path = format!("spec.rateLimits[{index}].header");
            p.invalid_text(&path, text(limit, "header"), "must be there if, and only if, by is Header");
        }
    }
    let jwks = text(at(spec, "jwt"), "jwks");
    if has(spec, "jwt") {
        let set: Option<Value> = serde_json::from_str(jwks).ok();
        if set.is_none_or(|set| items(&set, "keys").is_empty()) {
            let shown: String = jwks.chars().take(40).collect();
            p.invalid_text("spec.jwt.jwks", &shown, "must be a JSON Web Key Set with at least one key (RFC 7517)");
        }
    }
    p.into_causes()
}

pub fn validate_backend(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let balancing = at(at(new, "spec"), "balancing");
    if (text(balancing, "algorithm") == "Hash") != has(balancing, "hash") {
        let algorithm = text(balancing, "algorithm");
        p.invalid_text("spec.balancing.hash", algorithm, "must be there if, and only if, algorithm is Hash");
    }
    let hash = at(balancing, "hash");
    if has(balancing, "hash") && (text(hash, "by") == "Client") == has(hash, "name") {
        p.invalid_text("spec.balancing.hash.name", text(hash, "name"), "must be there unless by is Client");
    }
    p.into_causes()
}

fn is_network(text: &str) -> bool {
    let (address, bits) = text.split_once('/').unwrap_or((text, ""));
    let Ok(address) = address.parse::<IpAddr>() else { return false };
    let most = if address.is_ipv4() { 32 } else { 128 };
    !text.contains('/') || bits.parse::<u8>().is_ok_and(|bits| bits <= most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn networks_limits_and_keys() {
        let told =
            |spec: Value| validate(&json!({"spec": spec}), None).into_iter().map(|c| c.field).collect::<Vec<_>>();
        assert!(told(json!({"addresses": {"allow": ["10.0.0.0/8", "::1", "2001:db8::/32"]}})).is_empty());
        assert_eq!(told(json!({"addresses": {"deny": ["10.0.0.0/33"]}})), ["spec.addresses.deny[0]"]);
        assert_eq!(told(json!({"rateLimits": [{"requests": 1, "by": "Header"}]})), ["spec.rateLimits[0].header"]);
        let told = |balancing: Value| {
            let causes = validate_backend(&json!({"spec": {"balancing": balancing}}), None);
            causes.into_iter().map(|c| c.field).collect::<Vec<_>>()
        };
        assert!(told(json!({"algorithm": "Hash", "hash": {"by": "Cookie", "name": "cart"}})).is_empty());
        assert!(told(Value::Null).is_empty() && told(json!({"algorithm": "RoundRobin"})).is_empty());
        assert_eq!(told(json!({"algorithm": "Hash"})), ["spec.balancing.hash"]);
        assert_eq!(told(json!({"algorithm": "Hash", "hash": {"by": "Header"}})), ["spec.balancing.hash.name"]);
    }

    #[test]
    fn tokens_need_keys() {
        let told =
            |spec: Value| validate(&json!({"spec": spec}), None).into_iter().map(|c| c.field).collect::<Vec<_>>();
        assert_eq!(told(json!({"jwt": {"issuer": "i", "jwks": "{}"}})), ["spec.jwt.jwks"]);
    }
}
