//! Services of type LoadBalancer get the host's addresses that the administrator chose. A port of these belongs to the oldest
//! Service that asks for it; another one's status says so, and its other ports work. Services of another
//! `loadBalancerClass` are others' to serve.

use crate::context::{Condition, Context, SERVICES, remove_condition, set_condition};
use crate::objects::{condition, list};
use crate::runner::{Again, Reconcile, Source};
use api::balancing::is_ours;
use api::informer::{Informer, Key};
use api::object::{Meta, Object, SharedObject, child, object_of};
use api::status::StatusResult;
use async_trait::async_trait;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const COMPONENT: &str = "load-balancer-controller";
/// Kubernetes' own name for it.
const PORTS_ERROR: &str = "LoadBalancerPortsError";
const IN_USE: &str = "atoll.dev/PortInUse";

pub(crate) struct Balancers {
    context: Arc<Context>,
    services: Informer,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let services = context.informers.of(&SERVICES);
    let all = services.clone();
    let concerned = Source::new(services.clone(), move |service| {
        let mut keys = vec![Key::new(service.namespace(), service.name())];
        if service.str_at("/spec/type") == "LoadBalancer" {
            let own = claims(service);
            let shares = |other: &&SharedObject| is_ours(other) && !own.is_disjoint(&claims(other));
            keys.extend(all.list().iter().filter(shares).map(Key::of));
        }
        keys
    });
    (Arc::new(Balancers { context: Arc::clone(context), services }), vec![concerned])
}

/// A family, a protocol and a port.
type Claim = (bool, String, i64);

fn ports(service: &Object) -> Vec<(String, i64)> {
    let port = |port: &Value| {
        let protocol = port.str_at("/protocol");
        (if protocol.is_empty() { "TCP" } else { protocol }.to_owned(), port["port"].as_i64().unwrap_or(0))
    };
    list(service, "/spec/ports").iter().map(port).collect()
}

/// Whether each is IPv4.
fn families(service: &Object) -> Vec<bool> {
    let named = list(service, "/spec/ipFamilies");
    if named.is_empty() { vec![true] } else { named.iter().map(|family| family == "IPv4").collect() }
}

fn claims(service: &Object) -> BTreeSet<Claim> {
    let ports = ports(service);
    let all = families(service).into_iter();
    all.flat_map(|v4| ports.iter().map(move |(protocol, port)| (v4, protocol.clone(), *port))).collect()
}

/// The oldest first.
fn age(service: &Object) -> (&str, &str, &str) {
    (service.str_at("/metadata/creationTimestamp"), service.namespace(), service.name())
}

#[async_trait]
impl Reconcile for Balancers {
    fn name(&self) -> &'static str {
        COMPONENT
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let Some(service) = self.services.get_key(key).filter(|service| !service.is_deleting()) else {
            return Ok(None);
        };
        let mut status = service.get("status").cloned().filter(Value::is_object).unwrap_or_else(|| json!({}));
        if is_ours(&service) {
            self.balance(&service, &mut status);
        } else if service.str_at("/spec/type") != "LoadBalancer" {
            // It was one before.
            if status.pointer("/loadBalancer/ingress").is_none() && condition(&status, PORTS_ERROR).is_none() {
                return Ok(None);
            }
            child(object_of(&mut status), "loadBalancer").remove("ingress");
            remove_condition(&mut status, PORTS_ERROR);
        } else {
            return Ok(None);
        }
        self.context.write_status(&SERVICES, &service, status).await?;
        Ok(None)
    }
}

impl Balancers {
    fn balance(&self, service: &SharedObject, status: &mut Value) {
        let own = claims(service);
        let older = self.services.list();
        let mut older: Vec<_> = older.iter().filter(|other| is_ours(other) && age(other) < age(service)).collect();
        older.sort_by_key(|other| age(other));
        let mut taken: BTreeMap<Claim, String> = BTreeMap::new();
        for other in older {
            for claim in claims(other).intersection(&own) {
                let name = || format!("{}/{}", other.namespace(), other.name());
                taken.entry(claim.clone()).or_insert_with(name);
            }
        }
        let (ports, families) = (ports(service), families(service));
        let mut problems = BTreeSet::new();
        let mut ingress = Vec::new();
        for address in self.context.config.load_balancers.iter().filter(|own| families.contains(&own.is_ipv4())) {
            let (mut told, mut failed) = (Vec::new(), 0);
            for (protocol, port) in &ports {
                let mut one = json!({"port": port, "protocol": protocol});
                if let Some(owner) = taken.get(&(address.is_ipv4(), protocol.clone(), *port)) {
                    one["error"] = IN_USE.into();
                    failed += 1;
                    problems.insert(format!("{port}/{protocol} is Service {owner}'s, which is older"));
                }
                told.push(one);
            }
            let mut one = json!({"ip": address.to_string(), "ipMode": "VIP"});
            if failed > 0 {
                one["ports"] = told.into();
            }
            if failed < ports.len() {
                ingress.push(one);
            }
        }
        let fields = child(object_of(status), "loadBalancer");
        match ingress.is_empty() {
            true => drop(fields.remove("ingress")),
            false => drop(fields.insert("ingress".into(), ingress.into())),
        }
        self.tell(service, status, problems.into_iter().collect());
    }

    fn tell(&self, service: &SharedObject, status: &mut Value, problems: Vec<String>) {
        if problems.is_empty() {
            return remove_condition(status, PORTS_ERROR);
        }
        let message = problems.join("; ");
        let known = condition(status, PORTS_ERROR).is_some_and(|old| old.str_at("/message") == message);
        if !known {
            self.context.events.warning(COMPONENT, service, "SyncLoadBalancerFailed", message.clone());
        }
        let new = Condition { kind: PORTS_ERROR, status: "True", reason: "PortsNotAvailable", message: &message };
        set_condition(status, new, &self.context.timestamp(), &[]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;
    use crate::testing::World;

    fn service(name: &str, second: u8, spec: Value) -> Value {
        let mut all =
            json!({"type": "LoadBalancer", "ipFamilies": ["IPv4"], "ports": [{"port": 80, "protocol": "TCP"}]});
        all.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        let created = format!("2026-01-01T00:00:{second:02}Z");
        json!({"apiVersion": "v1", "kind": "Service", "spec": all,
               "metadata": {"name": name, "namespace": "x", "creationTimestamp": created}})
    }

    async fn world() -> World {
        let load_balancers = ["192.0.2.1", "2001:db8::1"].map(|text| text.parse().unwrap()).to_vec();
        World::with(Config { load_balancers, ..Config::default() }).await
    }

    fn addresses(service: &Object) -> Vec<&str> {
        list(service, "/status/loadBalancer/ingress").iter().map(|one| one.str_at("/ip")).collect()
    }

    #[tokio::test]
    async fn a_load_balancer_gets_addresses_of_its_families() {
        let world = world().await;
        world.create(&SERVICES, service("foreign", 0, json!({"loadBalancerClass": "example.com/other"}))).await;
        world.create(&SERVICES, service("one", 1, json!({}))).await;
        world
            .create(&SERVICES, service("two", 2, json!({"ipFamilies": ["IPv6", "IPv4"], "ports": [{"port": 81}]})))
            .await;
        world.wait(&SERVICES, "one", |s| addresses(s) == ["192.0.2.1"]).await;
        let two = world.wait(&SERVICES, "two", |s| addresses(s).len() == 2).await;
        assert_eq!(two["status"]["loadBalancer"]["ingress"][0], json!({"ip": "192.0.2.1", "ipMode": "VIP"}));
        world.patch(&SERVICES, "one", json!({"spec": {"type": "NodePort"}})).await;
        world.wait(&SERVICES, "one", |s| addresses(s).is_empty()).await;
        assert!(addresses(&world.get(&SERVICES, "foreign").await.unwrap()).is_empty());
    }

    #[tokio::test]
    async fn a_port_is_the_oldest_services_until_that_goes() {
        let world = world().await;
        let made = world.create(&SERVICES, service("old", 1, json!({}))).await;
        let created = made.str_at("/metadata/creationTimestamp").to_owned();
        let both = json!([{"name": "a", "port": 80, "protocol": "TCP"}, {"name": "b", "port": 81, "protocol": "TCP"},
            {"name": "c", "port": 80, "protocol": "UDP"}]);
        // In the same second the name decides.
        world.create(&SERVICES, service("older-not", 2, json!({"ports": both}))).await;
        world.create(&SERVICES, service("with-nothing", 3, json!({}))).await;
        let partly = world.wait(&SERVICES, "older-not", |s| !addresses(s).is_empty()).await;
        assert!(partly.str_at("/metadata/creationTimestamp") >= &*created);
        let told = &partly["status"]["loadBalancer"]["ingress"][0]["ports"];
        assert_eq!(told[0], json!({"port": 80, "protocol": "TCP", "error": IN_USE}));
        assert!(told[1].get("error").is_none() && told[2].get("error").is_none(), "{told}");
        let nothing = world.wait(&SERVICES, "with-nothing", |s| condition(&s["status"], PORTS_ERROR).is_some()).await;
        assert!(addresses(&nothing).is_empty());
        let why = condition(&nothing["status"], PORTS_ERROR).unwrap().str_at("/message").to_owned();
        assert_eq!(why, "80/TCP is Service x/old's, which is older");
        world.wait_event("SyncLoadBalancerFailed: 80/TCP is Service x/old's").await;
        world.delete(&SERVICES, "old").await;
        let all =
            |s: &Object| s.pointer("/status/loadBalancer/ingress/0").is_some_and(|one| one.get("ports").is_none());
        let freed = world.wait(&SERVICES, "older-not", all).await;
        assert!(condition(&freed["status"], PORTS_ERROR).is_none());
        world
            .wait(&SERVICES, "with-nothing", |s| {
                condition(&s["status"], PORTS_ERROR).is_some_and(|c| c.str_at("/message").contains("older-not"))
            })
            .await;
    }
}
