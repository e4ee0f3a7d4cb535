//! The status of TrafficPolicies: whether what they are for and what they need is there.

use super::{GRPC_ROUTES, INGRESSES, POLICIES, SECRETS, attach::Refusal, observe};
use crate::context::{Condition, Context, GATEWAYS, HTTP_ROUTES};
use crate::objects::list;
use crate::runner::{Again, Reconcile, Source};
use api::informer::{Informer, Key};
use api::object::{Meta, Object};
use api::status::StatusResult;
use async_trait::async_trait;
use serde_json::json;
use std::sync::Arc;

pub(crate) struct Policies {
    context: Arc<Context>,
    policies: Informer,
    secrets: Informer,
    /// By kind.
    targets: [(&'static str, Informer); 4],
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let informers = &context.informers;
    let (policies, secrets) = (informers.of(&POLICIES), informers.of(&SECRETS));
    let kinds =
        [("Gateway", &*GATEWAYS), ("HTTPRoute", &*HTTP_ROUTES), ("GRPCRoute", &*GRPC_ROUTES), ("Ingress", &*INGRESSES)];
    let targets = kinds.map(|(kind, resource)| (kind, informers.of(resource)));
    let mut sources = vec![Source::own(policies.clone())];
    for informer in targets.iter().map(|(_, informer)| informer).chain([&secrets]) {
        let known = policies.clone();
        let beside = move |object: &Object| known.list_in(object.namespace()).iter().map(Key::of).collect();
        // Only that they are there matters, not what they are like.
        let filter = |old: Option<&Object>, new: Option<&Object>| old.is_some() != new.is_some();
        sources.push(Source::new(informer.clone(), beside).filtered(filter));
    }
    (Arc::new(Policies { context: Arc::clone(context), policies, secrets, targets }), sources)
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
}

#[async_trait]
impl Reconcile for Policies {
    fn name(&self) -> &'static str {
        "trafficpolicy-controller"
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
        self.context.write_status(&POLICIES, &policy, status).await?;
        Ok(None)
    }
}
