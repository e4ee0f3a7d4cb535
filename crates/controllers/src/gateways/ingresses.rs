//! The status of Ingresses of our class: where they are served.

use super::{CONTROLLER, INGRESS_CLASSES, INGRESSES};
use crate::context::Context;
use crate::objects::list;
use crate::runner::{Again, Reconcile, Source};
use api::informer::{Informer, Key};
use api::object::{Meta, Object, object_of};
use api::status::StatusResult;
use async_trait::async_trait;
use serde_json::{Value, json};
use std::sync::Arc;

const IS_DEFAULT: &str = "/metadata/annotations/ingressclass.kubernetes.io~1is-default-class";
const OLD_CLASS: &str = "/metadata/annotations/kubernetes.io~1ingress.class";

pub(crate) struct Ingresses {
    context: Arc<Context>,
    classes: Informer,
    ingresses: Informer,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let (classes, ingresses) = (context.informers.of(&INGRESS_CLASSES), context.informers.of(&INGRESSES));
    let known = ingresses.clone();
    let of_class = Source::new(classes.clone(), move |_| known.keys());
    let sources = vec![Source::own(ingresses.clone()), of_class];
    (Arc::new(Ingresses { context: Arc::clone(context), classes, ingresses }), sources)
}

impl Ingresses {
    fn is_ours(&self, ingress: &Object) -> bool {
        let ours = |class: &Object| class.str_at("/spec/controller") == CONTROLLER;
        match (ingress.str_at("/spec/ingressClassName"), ingress.str_at(OLD_CLASS)) {
            ("", "") => self.classes.list().iter().any(|class| ours(class) && class.str_at(IS_DEFAULT) == "true"),
            ("", name) | (name, _) => self.classes.get("", name).is_some_and(|class| ours(&class)),
        }
    }
}

#[async_trait]
impl Reconcile for Ingresses {
    fn name(&self) -> &'static str {
        "ingress-controller"
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let Some(ingress) = self.ingresses.get_key(key) else { return Ok(None) };
        let address = self.context.config.gateway_address.as_ref().filter(|_| self.is_ours(&ingress));
        let addresses: Vec<Value> = address.iter().map(|ip| json!({"ip": ip})).collect();
        if addresses.is_empty() && list(&ingress, "/status/loadBalancer/ingress").is_empty() {
            return Ok(None);
        }
        let mut status = ingress.get("status").cloned().unwrap_or_else(|| json!({}));
        object_of(&mut status).insert("loadBalancer".into(), json!({"ingress": addresses}));
        self.context.write_status(&INGRESSES, &ingress, status).await?;
        Ok(None)
    }
}
