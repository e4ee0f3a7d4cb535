//! The status of TrafficPolicies and BackendPolicies: whether what they are for and what they need is there.

use super::{BACKEND_POLICIES, GRPC_ROUTES, INGRESSES, POLICIES, SECRETS, attach::Refusal, observe};
use crate::context::{Condition, Context, GATEWAYS, HTTP_ROUTES, SERVICES};
use crate::objects::list;
use crate::runner::{Again, Reconcile, Source};
use api::informer::{Informer, Key};
use api::kind::Resource;
use api::object::{Meta, Object, SharedObject};
use api::status::StatusResult;
use async_trait::async_trait;
use serde_json::json;
use std::sync::Arc;

pub(crate) struct Policies {
    context: Arc<Context>,
    name: &'static str,
    resource: &'static Resource,
    policies: Informer,
    secrets: Informer,
    /// By kind.
    targets: Vec<(&'static str, Informer)>,
    /// Of several policies for one target only the oldest counts.
    alone: bool,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let kinds =
        [("Gateway", &*GATEWAYS), ("HTTPRoute", &*HTTP_ROUTES), ("GRPCRoute", &*GRPC_ROUTES), ("Ingress", &*INGRESSES)];
    of(context, "trafficpolicy-controller", &POLICIES, &kinds, false)
}

pub(crate) fn backends(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    of(context, "backendpolicy-controller", &BACKEND_POLICIES, &[("Service", &*SERVICES)], true)
}

fn of(
    context: &Arc<Context>,
    name: &'static str,
    resource: &'static Resource,
    kinds: &[(&'static str, &'static Resource)],
    alone: bool,
) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let informers = &context.informers;
    let (policies, secrets) = (informers.of(resource), informers.of(&SECRETS));
    let targets: Vec<_> = kinds.iter().map(|(kind, resource)| (*kind, informers.of(resource))).collect();
    let mut sources = vec![Source::own(policies.clone())];
    for informer in targets.iter().map(|(_, informer)| informer).chain([&secrets, &policies]) {
        let known = policies.clone();
        let beside = move |object: &Object| known.list_in(object.namespace()).iter().map(Key::of).collect();
        // Only that they are there matters, not what they are like.
        let filter = |old: Option<&Object>, new: Option<&Object>| old.is_some() != new.is_some();
        sources.push(Source::new(informer.clone(), beside).filtered(filter));
    }
    let context = Arc::clone(context);
    (Arc::new(Policies { context, name, resource, policies, secrets, targets, alone }), sources)
}

impl Policies {
    fn accepted(&self, policy: &Object) -> Result<(), Refusal> {
        let namespace = policy.namespace();
        for target in list(policy, "/spec/targetRefs") {
            let (kind, name) = (target.str_at("/kind"), target.str_at("/name"));
            let known = self.targets.iter().find(|(known, _)| *known == kind);
            if known.and_then(|(_, informer)| informer.get(namespace, name)).is_none() {
                return Err(("TargetNotFound", format!("{kind} {namespace}/{name} not found")));
            }
            if let Some(older) = self.older(policy, target).filter(|_| self.alone) {
                return Err(("Conflicted", format!("{kind} {name} has the older policy {:?}", older.name())));
            }
        }
        for field in ["apiKeys", "basicAuth"] {
            let name = policy.str_at(&format!("/spec/{field}/secretRef/name"));
            if !name.is_empty() && self.secrets.get(namespace, name).is_none() {
                let message = format!("spec.{field}: Secret {namespace}/{name} not found; nothing is let through");
                return Err(("Invalid", message));
            }
        }
        Ok(())
    }

    /// The oldest other policy for the same target that is older than this one.
    fn older(&self, policy: &Object, target: &Object) -> Option<SharedObject> {
        let age = |policy: &Object| (policy.str_at("/metadata/creationTimestamp").to_owned(), policy.name().to_owned());
        let same = |other: &SharedObject| {
            list(other, "/spec/targetRefs")
                .iter()
                .any(|t| (t.str_at("/kind"), t.str_at("/name")) == (target.str_at("/kind"), target.str_at("/name")))
        };
        let mut others = self.policies.list_in(policy.namespace());
        others.retain(|other| same(other) && age(other) < age(policy));
        others.into_iter().min_by_key(|other| age(other))
    }
}

#[async_trait]
impl Reconcile for Policies {
    fn name(&self) -> &'static str {
        self.name
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let Some(policy) = self.policies.get_key(key) else { return Ok(None) };
        let mut status = policy.get("status").cloned().unwrap_or_else(|| json!({}));
        let outcome = self.accepted(&policy);
        let new = match &outcome {
            Ok(()) => Condition {
                kind: "Accepted",
                status: "True",
                reason: "Accepted",
                message: "Policy is attached to all its targets",
            },
            Err((reason, message)) => Condition { kind: "Accepted", status: "False", reason, message },
        };
        observe(&mut status, new, &policy, &self.context);
        self.context.write_status(self.resource, &policy, status).await?;
        Ok(None)
    }
}
