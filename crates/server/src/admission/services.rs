//! Services: addresses from the service range and node ports. An allocation is a key of its own, written in the
//! transaction that writes the Service and compared to be absent there: two Services never get the same one.

use super::families::{self, Families};
use super::{Effects, Operation};
use crate::core::{Core, Target};
use crate::ranges::{Family, ServiceRange};
use crate::rest::{cause, storage};
use api::object::{Meta, Object, child, object_of};
use api::status::{Status, StatusResult};
use bytes::Bytes;
use serde_json::Value;
use std::net::IpAddr;
use store::{Compare, KeyRange, Op, RangeRequest};

const NODE_PORTS: std::ops::RangeInclusive<i64> = 30000..=32767;
/// Random picks before all allocations are read to find a free one.
const PICKS: usize = 16;

fn address_key(address: &str) -> Bytes {
    format!("/allocations/serviceips/{address}").into()
}

fn port_key(port: i64) -> Bytes {
    format!("/allocations/nodeports/{port}").into()
}

/// What a Service holds.
#[derive(Default, PartialEq, Eq, Clone, Debug)]
struct Held {
    /// As the kernel writes them: one address has one key, however it was spelt.
    addresses: Vec<String>,
    ports: Vec<i64>,
}

fn held(service: &Object) -> Held {
    let all = service.pointer("/spec/clusterIPs").and_then(Value::as_array);
    let listed: Vec<&str> = all.into_iter().flatten().filter_map(Value::as_str).collect();
    let texts = if listed.is_empty() { vec![service.str_at("/spec/clusterIP")] } else { listed };
    let addresses = texts.iter().filter_map(|text| text.parse::<IpAddr>().ok()).map(|a| a.to_string()).collect();
    let ports = service.pointer("/spec/ports").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let mut ports: Vec<i64> = ports.iter().filter_map(|p| p.get("nodePort")?.as_i64()).filter(|p| *p != 0).collect();
    let health = service.pointer("/spec/healthCheckNodePort").and_then(Value::as_i64).unwrap_or(0);
    if health != 0 {
        ports.push(health);
    }
    ports.sort_unstable();
    ports.dedup();
    Held { addresses, ports }
}

/// What is given back when a Service goes.
pub fn release(service: &Object) -> Effects {
    let held = held(service);
    let mut effects = Effects::default();
    for key in held.addresses.iter().map(|a| address_key(a)).chain(held.ports.iter().map(|p| port_key(*p))) {
        effects.then.push(Op::Delete(KeyRange::one(key)));
    }
    effects
}

pub async fn admit(
    core: &Core,
    target: &Target,
    operation: Operation<'_>,
    object: &mut Object,
) -> StatusResult<Effects> {
    let live = match operation {
        Operation::Create => None,
        Operation::Update { live, subresource: "" } => Some(live),
        Operation::Update { .. } | Operation::Delete => return Ok(Effects::default()),
    };
    let mut effects = Effects::default();
    let owner = Bytes::from(format!("{}/{}", target.namespace, target.name));
    let before = live.map(held).unwrap_or_default();
    if let Some(live) = live {
        carry_over(live, object);
    }
    settle_addresses(core, target, live, object, &before, &owner, &mut effects).await?;
    settle_ports(core, target, object, &before, &owner, &mut effects).await?;
    settle_health_port(core, target, object, &before, &owner, &mut effects).await?;
    let after = held(object);
    for address in before.addresses.iter().filter(|a| !after.addresses.contains(a)) {
        effects.then.push(Op::Delete(KeyRange::one(address_key(address))));
    }
    for port in before.ports.iter().filter(|p| !after.ports.contains(p)) {
        effects.then.push(Op::Delete(KeyRange::one(port_key(*port))));
    }
    Ok(effects)
}

fn type_of(service: &Object) -> &str {
    match service.str_at("/spec/type") {
        "" => "ClusterIP",
        other => other,
    }
}

fn wants_node_ports(service: &Object) -> bool {
    let load_balancer_ports =
        service.pointer("/spec/allocateLoadBalancerNodePorts").and_then(Value::as_bool).unwrap_or(true);
    match type_of(service) {
        "NodePort" => true,
        "LoadBalancer" => load_balancer_ports,
        _ => false,
    }
}

fn wants_health_port(service: &Object) -> bool {
    type_of(service) == "LoadBalancer" && service.str_at("/spec/externalTrafficPolicy") == "Local"
}

/// What was allocated stays when the update does not mention it; what belongs to a type that the Service has no longer
/// goes, if the update does not ask for it.
fn carry_over(live: &Object, new: &mut Object) {
    drop_of_other_types(live, new);
    let keep = wants_node_ports(new);
    let old = live.pointer("/spec/ports").and_then(Value::as_array).cloned().unwrap_or_default();
    for port in new.pointer_mut("/spec/ports").and_then(Value::as_array_mut).into_iter().flatten() {
        let same = |o: &&Value| o.get("port") == port.get("port") && o.get("protocol") == port.get("protocol");
        let known = old.iter().find(same).and_then(|o| o.get("nodePort")).cloned();
        let Some(fields) = port.as_object_mut() else { continue };
        if keep && fields.get("nodePort").and_then(Value::as_i64).unwrap_or(0) == 0 {
            if let Some(known) = known {
                fields.insert("nodePort".into(), known);
            }
        } else if !keep && fields.get("nodePort") == known.as_ref() {
            fields.remove("nodePort");
        }
    }
}

fn drop_of_other_types(live: &Object, new: &mut Object) {
    let balanced = type_of(new) == "LoadBalancer";
    let externals = new.pointer("/spec/externalIPs").and_then(Value::as_array).is_some_and(|all| !all.is_empty());
    let reachable = balanced || type_of(new) == "NodePort" || externals;
    let health = wants_health_port(new);
    let spec = child(object_of(new), "spec");
    let before = |field: &str| live.pointer(&format!("/spec/{field}")).cloned();
    for (field, needed) in [
        ("externalTrafficPolicy", reachable),
        ("healthCheckNodePort", health),
        ("allocateLoadBalancerNodePorts", balanced),
        ("loadBalancerClass", balanced),
    ] {
        if !needed && spec.get(field) == before(field).as_ref() {
            spec.remove(field);
        }
    }
    if health
        && spec.get("healthCheckNodePort").and_then(Value::as_i64).unwrap_or(0) == 0
        && let Some(known) = before("healthCheckNodePort")
    {
        spec.insert("healthCheckNodePort".into(), known);
    }
}

async fn settle_addresses(
    core: &Core,
    target: &Target,
    live: Option<&Object>,
    object: &mut Object,
    before: &Held,
    owner: &Bytes,
    effects: &mut Effects,
) -> StatusResult<()> {
    if type_of(object) == "ExternalName" {
        let spec = child(object_of(object), "spec");
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            spec.remove(field);
        }
        return Ok(());
    }
    let live = live.filter(|live| type_of(live) != "ExternalName");
    let settled = families::settle(&core.services, live, object).map_err(|causes| target.invalid(causes))?;
    let Families { policy, families, mut asked } = settled;
    if asked.first().is_none_or(|first| first != "None") {
        for (index, family) in families.iter().enumerate() {
            let Some(range) = core.services.of(*family) else { continue };
            match asked.get(index).and_then(|text| text.parse::<IpAddr>().ok()) {
                Some(address) if before.addresses.contains(&address.to_string()) => {}
                Some(address) => {
                    check_address(core, target, index, range, address).await?;
                    reserve(effects, address_key(&address.to_string()), owner);
                }
                None => {
                    let picked = pick_address(core, range).await?;
                    reserve(effects, address_key(&picked), owner);
                    asked.push(picked);
                }
            }
        }
    }
    let spec = child(object_of(object), "spec");
    spec.insert("clusterIP".into(), asked.first().cloned().unwrap_or_default().into());
    spec.insert("clusterIPs".into(), asked.into());
    let names: Vec<&str> = families.into_iter().map(Family::name).collect();
    spec.insert("ipFamilies".into(), names.into());
    spec.insert("ipFamilyPolicy".into(), policy.into());
    Ok(())
}

fn reserve(effects: &mut Effects, key: Bytes, owner: &Bytes) {
    effects.compare.push(Compare::ModRevision(key.clone(), 0));
    effects.then.push(storage::put(key, owner.clone()));
}

async fn check_address(
    core: &Core,
    target: &Target,
    index: usize,
    range: &ServiceRange,
    address: IpAddr,
) -> StatusResult<()> {
    let refuse = |why: String| {
        let text = format!("Invalid value: [\"{address}\"]: failed to allocate IP {address}: {why}");
        Err(target.invalid(vec![cause("FieldValueInvalid", &format!("spec.clusterIPs[{index}]"), text)]))
    };
    if !range.contains(address) {
        return refuse(format!(
            "the provided IP ({address}) is not in the valid range. The range of valid IPs is {range}"
        ));
    }
    if core.storage.get_kv(address_key(&address.to_string())).await?.is_some() {
        return refuse("provided IP is already allocated".into());
    }
    Ok(())
}

async fn pick_address(core: &Core, range: &ServiceRange) -> StatusResult<String> {
    for _ in 0..PICKS {
        let address = range.any(api::names::random_u64()).to_string();
        if core.storage.get_kv(address_key(&address)).await?.is_none() {
            return Ok(address);
        }
    }
    let taken = allocated(core, "/allocations/serviceips/").await?;
    let start = api::names::random_u64() >> 1;
    (0..1 << 20)
        .map(|step| range.any(start + step).to_string())
        .find(|address| !taken.contains(address))
        .ok_or_else(|| Status::internal("no free address is left in the range of Service addresses"))
}

async fn allocated(core: &Core, prefix: &'static str) -> StatusResult<std::collections::HashSet<String>> {
    let request = RangeRequest { range: KeyRange::prefix(prefix), revision: 0, limit: 0, count_only: false };
    let answer = core.storage.range(request).await?;
    let name = |key: &[u8]| String::from_utf8_lossy(key.get(prefix.len()..).unwrap_or_default()).into_owned();
    Ok(answer.kvs.iter().map(|kv| name(&kv.key)).collect())
}

async fn settle_ports(
    core: &Core,
    target: &Target,
    object: &mut Object,
    before: &Held,
    owner: &Bytes,
    effects: &mut Effects,
) -> StatusResult<()> {
    if !wants_node_ports(object) {
        return Ok(());
    }
    let mut given: Vec<(i64, String)> = Vec::new();
    let mut twins: Vec<(Value, i64)> = Vec::new();
    let mut ports = object.pointer("/spec/ports").and_then(Value::as_array).cloned().unwrap_or_default();
    for (index, port) in ports.iter().enumerate() {
        let asked = port.get("nodePort").and_then(Value::as_i64).unwrap_or(0);
        if asked == 0 {
            continue;
        }
        let refuse = |why: &str| {
            let field = format!("spec.ports[{index}].nodePort");
            Err(target.invalid(vec![cause("FieldValueInvalid", &field, format!("Invalid value: {asked}: {why}"))]))
        };
        if !NODE_PORTS.contains(&asked) && !before.ports.contains(&asked) {
            return refuse("provided port is not in the valid range. The range of valid ports is 30000-32767");
        }
        let protocol = protocol_of(port.get("protocol"));
        if given.iter().any(|(g, p)| *g == asked && *p == protocol) {
            return refuse("provided port is already allocated");
        }
        let new = !before.ports.contains(&asked) && !given.iter().any(|(g, _)| *g == asked);
        if new && core.storage.get_kv(port_key(asked)).await?.is_some() {
            return refuse("provided port is already allocated");
        }
        if new {
            reserve(effects, port_key(asked), owner);
        }
        twins.extend(port.get("port").cloned().map(|number| (number, asked)));
        given.push((asked, protocol));
    }
    for port in &mut ports {
        let Some(fields) = port.as_object_mut() else { continue };
        if fields.get("nodePort").and_then(Value::as_i64).unwrap_or(0) != 0 {
            continue;
        }
        let (number, protocol) = (fields.get("port").cloned(), protocol_of(fields.get("protocol")));
        // The same port of another protocol gets the same number, as in Kubernetes.
        let twin = twins.iter().find(|(twin, held)| {
            Some(twin) == number.as_ref() && !given.iter().any(|(g, p)| g == held && *p == protocol)
        });
        let picked = match twin {
            Some((_, held)) => *held,
            None => {
                let picked = pick_port(core, &given, before).await?;
                reserve(effects, port_key(picked), owner);
                picked
            }
        };
        twins.extend(number.map(|number| (number, picked)));
        given.push((picked, protocol));
        fields.insert("nodePort".into(), picked.into());
    }
    child(object_of(object), "spec").insert("ports".into(), ports.into());
    Ok(())
}

fn protocol_of(field: Option<&Value>) -> String {
    field.and_then(Value::as_str).unwrap_or("TCP").to_owned()
}

/// The port where a load balancer in front asks whether this machine has endpoints.
async fn settle_health_port(
    core: &Core,
    target: &Target,
    object: &mut Object,
    before: &Held,
    owner: &Bytes,
    effects: &mut Effects,
) -> StatusResult<()> {
    if !wants_health_port(object) {
        return Ok(());
    }
    let asked = object.pointer("/spec/healthCheckNodePort").and_then(Value::as_i64).unwrap_or(0);
    let ports = object.pointer("/spec/ports").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let given: Vec<(i64, String)> =
        ports.iter().filter_map(|p| p.get("nodePort")?.as_i64()).map(|port| (port, String::new())).collect();
    if asked == 0 {
        let picked = pick_port(core, &given, before).await?;
        reserve(effects, port_key(picked), owner);
        child(object_of(object), "spec").insert("healthCheckNodePort".into(), picked.into());
        return Ok(());
    }
    if before.ports.contains(&asked) {
        return Ok(());
    }
    let refuse = |why: &str| {
        let text = format!("Invalid value: {asked}: {why}");
        Err(target.invalid(vec![cause("FieldValueInvalid", "spec.healthCheckNodePort", text)]))
    };
    if !NODE_PORTS.contains(&asked) {
        return refuse("provided port is not in the valid range. The range of valid ports is 30000-32767");
    }
    if given.iter().any(|(port, _)| *port == asked) || core.storage.get_kv(port_key(asked)).await?.is_some() {
        return refuse("provided port is already allocated");
    }
    reserve(effects, port_key(asked), owner);
    Ok(())
}

async fn pick_port(core: &Core, given: &[(i64, String)], before: &Held) -> StatusResult<i64> {
    let span = (NODE_PORTS.end() - NODE_PORTS.start() + 1) as u64;
    let own = |port: i64| given.iter().any(|(g, _)| *g == port) || before.ports.contains(&port);
    let start = api::names::random_u64() % span;
    let nth = |step: u64| NODE_PORTS.start() + ((start + step * 7919) % span) as i64;
    for step in 0..PICKS as u64 {
        let port = nth(step);
        if !own(port) && core.storage.get_kv(port_key(port)).await?.is_none() {
            return Ok(port);
        }
    }
    let taken = allocated(core, "/allocations/nodeports/").await?;
    NODE_PORTS
        .into_iter()
        .find(|port| !own(*port) && !taken.contains(&port.to_string()))
        .ok_or_else(|| Status::internal("no free node port is left"))
}
