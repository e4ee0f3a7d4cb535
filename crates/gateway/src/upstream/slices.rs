//! Endpoint addresses from EndpointSlices (`discovery.k8s.io/v1`).

use api::object::{Meta, SharedObject};
use api::topology::{Hints, Place};
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

/// Addresses of the port named `port` in these slices of one service: the ready ones that their hints lead here, or, if
/// there are none, those that still serve while they terminate.
pub fn addresses<'a>(slices: impl Iterator<Item = &'a SharedObject>, port: &str, place: &Place) -> Vec<SocketAddr> {
    let (mut ready, mut ending) = (BTreeMap::new(), BTreeMap::new());
    for slice in slices {
        let ports = slice.get("ports").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let Some(number) = ports
            .iter()
            .find(|p| p.str_at("/name") == port)
            .and_then(|p| p.get("port"))
            .and_then(Value::as_u64)
            .and_then(|number| u16::try_from(number).ok())
        else {
            continue;
        };
        for endpoint in slice.get("endpoints").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default() {
            let condition = |name: &str| endpoint.pointer(&format!("/conditions/{name}")).and_then(Value::as_bool);
            let list = if condition("ready").unwrap_or(true) {
                &mut ready
            } else if condition("serving").unwrap_or(false) && condition("terminating").unwrap_or(false) {
                &mut ending
            } else {
                continue;
            };
            // All addresses of an endpoint are the same one; the first is enough.
            if let Ok(address) = endpoint.str_at("/addresses/0").parse::<IpAddr>() {
                list.insert(SocketAddr::new(address, number), endpoint);
            }
        }
    }
    let chosen = if ready.is_empty() { ending } else { ready }.into_iter().collect();
    place.near(chosen, |(_, endpoint)| hints(endpoint)).into_iter().map(|(address, _)| address).collect()
}

fn hints(endpoint: &Value) -> Hints<'_> {
    let names = |field: &str| {
        let list = endpoint.pointer(field).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        list.iter().filter_map(|one| one.get("name")?.as_str()).collect()
    };
    Hints { nodes: names("/hints/forNodes"), zones: names("/hints/forZones") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::sync::Arc;

    #[test]
    fn ready_before_ending() {
        let slice = |conditions: Value, address: &str| {
            Arc::new(json!({
                "addressType": "IPv4",
                "ports": [{"name": "http", "port": 8080}, {"name": "admin", "port": 9}],
                "endpoints": [{"addresses": [address], "conditions": conditions}],
            }))
        };
        let ready = slice(json!({"ready": true}), "10.0.0.1");
        let ending = slice(json!({"ready": false, "serving": true, "terminating": true}), "10.0.0.2");
        let down = slice(json!({"ready": false}), "10.0.0.3");
        let at = |all: &[&SharedObject], port| addresses(all.iter().copied(), port, &Place::default());
        assert_eq!(at(&[&ready, &ending, &down], "http"), ["10.0.0.1:8080".parse().unwrap()]);
        assert_eq!(at(&[&ending, &down], "http"), ["10.0.0.2:8080".parse().unwrap()]);
        let near = |zone: &str| {
            let mut hinted = [&ready, &slice(json!({"ready": true}), "10.0.0.4")].map(|slice| (**slice).clone());
            for (slice, zone) in hinted.iter_mut().zip(["a", "b"]) {
                slice["endpoints"][0]["hints"] = json!({"forZones": [{"name": zone}]});
            }
            let place = Place { node: "n".into(), zone: Some(zone.into()) };
            addresses(hinted.map(Arc::new).iter(), "http", &place).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!((near("a"), near("b")), (vec!["10.0.0.1:8080".into()], vec!["10.0.0.4:8080".into()]));
        assert_eq!(near("c"), ["10.0.0.1:8080", "10.0.0.4:8080"]);
        assert!(at(&[&down], "http").is_empty() && at(&[&ready], "none").is_empty());
    }
}
