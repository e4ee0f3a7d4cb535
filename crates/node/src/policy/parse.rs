//! Policies read from the API, once for each version of an object.

use api::object::{Meta, Object};
use api::selector::Selector;
use network::Protocol;
use network::policy::{Action, Block, Direction, Network, Ports};
use serde_json::Value;
use std::sync::Arc;

/// One NetworkPolicy.
#[derive(Clone, Debug)]
pub struct Policy {
    pub namespace: String,
    pub name: String,
    /// Which pods of its namespace it isolates.
    pub selector: Selector,
    /// `None`: it is not about this direction.
    egress: Option<Vec<Rule>>,
    ingress: Option<Vec<Rule>>,
}

#[derive(Clone, Debug)]
pub(super) struct Rule {
    /// Where it comes from, for people.
    pub origin: Arc<str>,
    pub action: Action,
    /// Empty: anyone.
    pub peers: Vec<Peer>,
    /// Empty: everything.
    pub ports: Vec<Port>,
}

#[derive(Clone, Debug)]
pub(super) enum Peer {
    /// `namespaces` is absent for the policy's own.
    Pods {
        namespaces: Option<Selector>,
        pods: Selector,
    },
    Block(Block),
    Nodes(Selector),
}

#[derive(Clone, Debug)]
pub(super) enum Port {
    Numbers(Ports),
    Name(PortName),
}

#[derive(Clone, Debug)]
pub(super) struct PortName {
    /// `None`: any.
    pub protocol: Option<Protocol>,
    pub name: String,
}

impl Port {
    pub fn name(&self) -> Option<&PortName> {
        match self {
            Port::Name(name) => Some(name),
            Port::Numbers(_) => None,
        }
    }
}

impl Rule {
    /// What its peers mean, as text: rules with the same share one set in the kernel.
    /// A set that a rule refuses is one of its own, since its members change in another order.
    pub fn peers_key(&self, namespace: &str) -> String {
        let text = |peer: &Peer| match peer {
            Peer::Pods { namespaces: None, pods } => format!("{namespace}:{pods}"),
            Peer::Pods { namespaces: Some(namespaces), pods } => format!("({namespaces}):{pods}"),
            Peer::Block(block) => format!("{block:?}"),
            Peer::Nodes(nodes) => format!("nodes {nodes}"),
        };
        let peers = if self.peers.is_empty() {
            "anyone".to_owned()
        } else {
            self.peers.iter().map(text).collect::<Vec<_>>().join("|")
        };
        if self.action == Action::Deny { format!("denied {peers}") } else { peers }
    }
}

impl Policy {
    /// Reads a validated object; what cannot be read selects or allows nothing.
    pub fn read(object: &Object) -> Policy {
        let spec = object.get("spec").unwrap_or(&Value::Null);
        let types = list(spec, "policyTypes");
        let about = |name: &str| types.iter().any(|one| one.as_str() == Some(name));
        let (egress, ingress) = match types {
            [] => (!list(spec, "egress").is_empty(), true),
            _ => (about("Egress"), about("Ingress")),
        };
        let rules = |field, peers| -> Vec<Rule> {
            let rule = |(index, one): (usize, &Value)| Rule {
                origin: format!("NetworkPolicy {}/{} {field}[{index}]", object.namespace(), object.name()).into(),
                action: Action::Allow,
                peers: list(one, peers).iter().map(peer).collect(),
                ports: list(one, "ports").iter().filter_map(port).collect(),
            };
            list(spec, field).iter().enumerate().map(rule).collect()
        };
        Policy {
            namespace: object.namespace().to_owned(),
            name: object.name().to_owned(),
            selector: selector(spec.get("podSelector").unwrap_or(&Value::Object(serde_json::Map::new()))),
            egress: egress.then(|| rules("egress", "to")),
            ingress: ingress.then(|| rules("ingress", "from")),
        }
    }

    pub(super) fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Egress => self.egress.as_deref(),
            Direction::Ingress => self.ingress.as_deref(),
        }
    }

    /// For people.
    pub(super) fn origin(&self) -> String {
        format!("NetworkPolicy {}/{}", self.namespace, self.name)
    }
}

pub(super) fn list<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    value.get(field).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

pub(super) fn selector(value: &Value) -> Selector {
    Selector::from_object(value).unwrap_or_else(|_| Selector::nothing())
}

fn peer(value: &Value) -> Peer {
    if let Some(block) = value.get("ipBlock").filter(|block| !block.is_null()) {
        let text = |value: &Value| value.as_str().and_then(|text| text.parse::<Network>().ok());
        let except = list(block, "except").iter().filter_map(text).collect();
        // No network: matches no address that there is.
        return match block.get("cidr").and_then(text) {
            Some(network) => Peer::Block(Block { network, except }),
            None => Peer::Pods { namespaces: None, pods: Selector::nothing() },
        };
    }
    let field = |name: &str| value.get(name).filter(|value| !value.is_null());
    Peer::Pods {
        namespaces: field("namespaceSelector").map(selector),
        pods: field("podSelector").map_or_else(Selector::everything, selector),
    }
}

fn port(value: &Value) -> Option<Port> {
    let protocol_name = value.get("protocol").and_then(Value::as_str).unwrap_or("TCP");
    let number = |field: &str| value.get(field).and_then(Value::as_u64).and_then(|n| u16::try_from(n).ok());
    let protocol = protocol(protocol_name);
    match value.get("port") {
        None | Some(Value::Null) => Some(Port::Numbers(Ports { protocol, first: 0, last: u16::MAX })),
        Some(Value::String(name)) => Some(Port::Name(PortName { protocol: Some(protocol), name: name.clone() })),
        Some(_) => {
            let first = number("port")?;
            Some(Port::Numbers(Ports { protocol, first, last: number("endPort").unwrap_or(first) }))
        }
    }
}

pub(super) fn protocol(name: &str) -> Protocol {
    match name {
        "UDP" => Protocol::Udp,
        "SCTP" => Protocol::Sctp,
        _ => Protocol::Tcp,
    }
}
