//! What a pod asks of a node, read once from its specification.

use crate::objects::{int, list, map};
use api::object::{Meta, Object};
use api::quantity::Quantity;
use serde_json::Value;
use std::collections::BTreeMap;

/// Amounts by resource name: `cpu` in thousandths, everything else in units (bytes).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Amounts(pub BTreeMap<String, i64>);

impl Amounts {
    pub fn of(amounts: Option<&Value>) -> Amounts {
        let mut all = Amounts::default();
        for (name, value) in amounts.and_then(Value::as_object).into_iter().flatten() {
            // What is no quantity was refused when the object was written.
            let quantity = Quantity::from_value(value).unwrap_or(Quantity::ZERO);
            let amount = if name == "cpu" { quantity.milli_value() } else { quantity.value() };
            all.0.insert(name.clone(), amount.max(0));
        }
        all
    }

    pub fn get(&self, name: &str) -> i64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    pub fn add(&mut self, other: &Amounts) {
        for (name, amount) in &other.0 {
            let sum = self.0.entry(name.clone()).or_default();
            *sum = sum.saturating_add(*amount);
        }
    }

    pub fn take(&mut self, other: &Amounts) {
        for (name, amount) in &other.0 {
            let sum = self.0.entry(name.clone()).or_default();
            *sum = sum.saturating_sub(*amount);
        }
    }

    fn at_least(&mut self, other: &Amounts) {
        for (name, amount) in &other.0 {
            let most = self.0.entry(name.clone()).or_default();
            *most = (*most).max(*amount);
        }
    }
}

/// What a pod needs while it runs: its containers together, or its largest init step if that is more, and its overhead.
pub(super) fn requests(pod: &Object, class: Option<&Object>) -> Amounts {
    let of = |container: &Value| Amounts::of(container.pointer("/resources/requests"));
    let mut running = Amounts::default();
    list(pod, "/spec/containers").iter().for_each(|container| running.add(&of(container)));
    let (mut sidecars, mut starting) = (Amounts::default(), Amounts::default());
    for container in list(pod, "/spec/initContainers") {
        let mut step = of(container);
        if container.str_at("/restartPolicy") == "Always" {
            sidecars.add(&step);
            step = sidecars.clone();
        } else {
            step.add(&sidecars);
        }
        starting.at_least(&step);
    }
    running.add(&sidecars);
    running.at_least(&starting);
    running.at_least(&Amounts::of(pod.pointer("/spec/resources/requests")));
    let overhead = pod.pointer("/spec/overhead").or_else(|| class?.pointer("/overhead/podFixed"));
    running.add(&Amounts::of(overhead));
    running
}

/// A port of the host: address, protocol, number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HostPort {
    pub address: String,
    pub protocol: String,
    pub port: i64,
}

impl HostPort {
    pub fn conflicts(&self, other: &HostPort) -> bool {
        let any = |port: &HostPort| port.address == "0.0.0.0";
        self.port == other.port
            && self.protocol == other.protocol
            && (any(self) || any(other) || self.address == other.address)
    }
}

pub(super) fn host_ports(pod: &Object) -> Vec<HostPort> {
    let or = |text: &str, default: &str| if text.is_empty() { default.to_owned() } else { text.to_owned() };
    list(pod, "/spec/containers")
        .iter()
        .flat_map(|container| list(container, "/ports"))
        .filter_map(|port| {
            let number = int(port, "/hostPort").filter(|number| *number > 0)?;
            let address = or(port.str_at("/hostIP"), "0.0.0.0");
            Some(HostPort { address, protocol: or(port.str_at("/protocol"), "TCP"), port: number })
        })
        .collect()
}

pub(super) struct Demand<'a> {
    pub pod: &'a Object,
    pub requests: Amounts,
    pub ports: Vec<HostPort>,
    /// Labels a node must have: the pod's and its runtime class's.
    pub selector: Vec<(String, String)>,
    pub tolerations: Vec<&'a Value>,
}

impl<'a> Demand<'a> {
    pub fn of(pod: &'a Object, class: Option<&'a Object>) -> Demand<'a> {
        let labels = |object: &Object, pointer: &str| -> Vec<(String, String)> {
            map(object, pointer).map(|(key, value)| (key.clone(), value.as_str().unwrap_or("").to_owned())).collect()
        };
        let mut selector = labels(pod, "/spec/nodeSelector");
        let mut tolerations: Vec<&Value> = list(pod, "/spec/tolerations").iter().collect();
        if let Some(class) = class {
            selector.extend(labels(class, "/scheduling/nodeSelector"));
            tolerations.extend(list(class, "/scheduling/tolerations"));
        }
        Demand { pod, requests: requests(pod, class), ports: host_ports(pod), selector, tolerations }
    }

    pub fn tolerates(&self, taint: &Value) -> bool {
        self.tolerations.iter().any(|toleration| tolerates(toleration, taint))
    }
}

fn tolerates(toleration: &Value, taint: &Value) -> bool {
    let (effect, key) = (toleration.str_at("/effect"), toleration.str_at("/key"));
    if !effect.is_empty() && effect != taint.str_at("/effect") {
        return false;
    }
    if !key.is_empty() && key != taint.str_at("/key") {
        return false;
    }
    match toleration.str_at("/operator") {
        "Exists" => true,
        "" | "Equal" => !key.is_empty() && toleration.str_at("/value") == taint.str_at("/value"),
        _ => false,
    }
}
