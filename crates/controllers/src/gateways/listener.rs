//! The status of one listener of a Gateway.

use super::{GROUP, Gateways, attach, observe};
use crate::context::Condition;
use crate::objects::{int, list};
use api::object::{Meta, Object, SharedObject, object_of};
use serde_json::{Value, json};

/// The kinds of routes that a listener of this protocol takes; none if it is not served at all.
fn kinds(listener: &Value) -> &'static [&'static str] {
    match (listener.str_at("/protocol"), listener.str_at("/tls/mode")) {
        ("HTTP", _) | ("HTTPS", "" | "Terminate") => &["HTTPRoute", "GRPCRoute"],
        ("TLS", "Passthrough") => &["TLSRoute"],
        _ => &[],
    }
}

impl Gateways {
    pub(super) fn listener(&self, gateway: &SharedObject, listener: &Value) -> Value {
        let name = listener.str_at("/name");
        let known = list(gateway, "/status/listeners").iter().find(|known| known.str_at("/name") == name);
        let mut status =
            json!({"conditions": known.and_then(|known| known.get("conditions")).cloned().unwrap_or(json!([]))});
        let kinds = kinds(listener);
        let allowed = list(listener, "/allowedRoutes/kinds");
        let is_known = |allowed: &Value| {
            kinds.contains(&allowed.str_at("/kind")) && matches!(allowed.str_at("/group"), "" | GROUP)
        };
        let taken = kinds.iter().filter(|kind| {
            allowed.is_empty() || allowed.iter().any(|allowed| is_known(allowed) && allowed.str_at("/kind") == **kind)
        });
        let taken: Vec<Value> = taken.map(|kind| json!({"group": GROUP, "kind": kind})).collect();
        let attached: usize = self
            .routes
            .iter()
            .map(|(kind, routes)| {
                routes.list().iter().filter(|route| self.is_attached(gateway, kind, name, route)).count()
            })
            .sum();
        let fields = object_of(&mut status);
        fields.insert("name".into(), name.into());
        fields.insert("attachedRoutes".into(), attached.into());
        fields.insert("supportedKinds".into(), taken.into());

        let accepted = self.accepted(listener, kinds);
        let resolved = match allowed.iter().all(is_known) {
            true if kinds.is_empty() => Ok(()),
            true => self.references.certificates(gateway, listener),
            false => Err(("InvalidRouteKinds", format!("Only {} can be attached", kinds.join(" and ")))),
        };
        let clash = list(gateway, "/spec/listeners").iter().any(|other| {
            other.str_at("/name") != name
                && int(other, "/port") == int(listener, "/port")
                && other.str_at("/hostname") == listener.str_at("/hostname")
        });
        let certified = !matches!(&resolved, Err((reason, _)) if *reason != "InvalidRouteKinds");
        let programmed = match accepted.is_ok() && certified && !clash {
            true => Ok(()),
            false => Err(("Invalid", "Listener is not served".to_owned())),
        };
        let outcomes = [
            ("Accepted", "Accepted", "Listener is accepted", accepted),
            ("Programmed", "Programmed", "Listener is served", programmed),
            ("ResolvedRefs", "ResolvedRefs", "All references are resolved", resolved),
        ];
        for (kind, good, message, outcome) in &outcomes {
            let new = match outcome {
                Ok(()) => Condition { kind, status: "True", reason: good, message },
                Err((reason, message)) => Condition { kind, status: "False", reason, message },
            };
            observe(&mut status, new, gateway, &self.context);
        }
        let conflict = match clash {
            true => ("True", "HostnameConflict", "Another listener has the same port and hostname"),
            false => ("False", "NoConflicts", "No conflicts"),
        };
        let (state, reason, message) = conflict;
        observe(&mut status, Condition { kind: "Conflicted", status: state, reason, message }, gateway, &self.context);
        status
    }

    fn accepted(&self, listener: &Value, kinds: &[&str]) -> Result<(), attach::Refusal> {
        let protocol = listener.str_at("/protocol");
        if kinds.is_empty() {
            let mode = listener.str_at("/tls/mode");
            let message = match (protocol, mode) {
                ("TLS", _) => "Protocol TLS is supported with tls.mode Passthrough only; use HTTPS to terminate".into(),
                _ => format!("Protocol {protocol} is not supported, only HTTP, HTTPS and TLS are"),
            };
            return Err(("UnsupportedProtocol", message));
        }
        if protocol != "HTTP" && !self.context.config.gateway_tls {
            let message = "There is no socket for TLS: start `atoll up` with --gateway-tls-addr".to_owned();
            return Err(("PortUnavailable", message));
        }
        Ok(())
    }

    fn is_attached(&self, gateway: &SharedObject, kind: &str, listener: &str, route: &Object) -> bool {
        attach::parents(route).filter(|parent| parent.means(gateway)).any(|parent| {
            attach::listeners(gateway, kind, route, &parent, &self.namespaces)
                .is_ok_and(|listeners| listeners.iter().any(|name| name == listener))
        })
    }
}
