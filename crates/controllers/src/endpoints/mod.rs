//! EndpointSlices: for each Service with a selector, the addresses of the pods that it means.
//!
//! `desired` says what there should be; here it is compared with what there is, so that an endpoint stays in its slice
//! and few slices change at a time.

mod desired;
#[cfg(test)]
mod tests;

use crate::context::{Context, ENDPOINT_SLICES, NODES, PODS, SERVICES};
use crate::objects::{controller_reference, is_controlled_by};
use crate::runner::{Again, Reconcile, Source, is_race};
use api::client::DeleteOptions;
use api::informer::{Informer, Key};
use api::object::{Meta, Object, SharedObject, object_of};
use api::selector::Selector;
use api::status::StatusResult;
use api::topology::ZONE;
use async_trait::async_trait;
use desired::{Endpoint, Group};
use serde_json::{Value, json};
use std::sync::Arc;

pub(crate) const SERVICE_NAME: &str = "kubernetes.io/service-name";
pub(crate) const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const MANAGER: &str = "endpointslice-controller.k8s.io";
const HEADLESS: &str = "service.kubernetes.io/headless";
/// Endpoints in one slice.
const SLICE: usize = 100;

pub(crate) struct Endpoints {
    context: Arc<Context>,
    services: Informer,
    pods: Informer,
    slices: Informer,
    nodes: Informer,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let informers = &context.informers;
    let (services, pods) = (informers.of(&SERVICES), informers.of(&PODS));
    let (slices, nodes) = (informers.of(&ENDPOINT_SLICES), informers.of(&NODES));
    let all = services.clone();
    let selected = Source::new(pods.clone(), move |pod| {
        let means = |service: &SharedObject| selector(service).is_some_and(|selector| selector.matches_object(pod));
        all.list_in(pod.namespace()).iter().filter(|service| means(service)).map(Key::of).collect()
    });
    let own = Source::new(slices.clone(), |slice| match (slice.label(MANAGED_BY), slice.label(SERVICE_NAME)) {
        (Some(MANAGER), Some(service)) => vec![Key::new(slice.namespace(), service)],
        _ => Vec::new(),
    });
    let all = services.clone();
    let zoned = Source::new(nodes.clone(), move |_| all.keys());
    let sources = vec![Source::own(services.clone()), selected.filtered(matters), own, zoned.filtered(is_elsewhere)];
    (Arc::new(Endpoints { context: Arc::clone(context), services, pods, slices, nodes }), sources)
}

/// Whether a change of a pod can change an endpoint.
fn matters(old: Option<&Object>, new: Option<&Object>) -> bool {
    let (Some(old), Some(new)) = (old, new) else { return true };
    let part = |pod: &Object| {
        (
            pod.pointer("/metadata/labels").cloned(),
            pod.is_deleting(),
            pod.pointer("/status/podIP").cloned(),
            pod.pointer("/status/podIPs").cloned(),
            pod.str_at("/status/phase").to_owned(),
            crate::objects::is_ready(pod),
            pod.str_at("/spec/nodeName").to_owned(),
        )
    };
    part(old) != part(new)
}

/// Whether a node has come to another zone.
fn is_elsewhere(old: Option<&Object>, new: Option<&Object>) -> bool {
    let [old, new] = [old, new].map(|node| node.and_then(|node| node.label(ZONE)));
    old != new
}

/// `None` when somebody else makes the endpoints.
fn selector(service: &Object) -> Option<Selector> {
    let map = service.pointer("/spec/selector").filter(|map| map.as_object().is_some_and(|map| !map.is_empty()))?;
    if service.str_at("/spec/type") == "ExternalName" {
        return None;
    }
    Selector::from_map(map).ok()
}

#[async_trait]
impl Reconcile for Endpoints {
    fn name(&self) -> &'static str {
        "endpointslice-controller"
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let mut known = self.slices.list_in(&key.namespace);
        known.retain(|slice| slice.label(SERVICE_NAME) == Some(&key.name) && slice.label(MANAGED_BY) == Some(MANAGER));
        let service = self.services.get_key(key).filter(|service| !service.is_deleting());
        let Some((service, selector)) = service.and_then(|service| Some((selector(&service)?, service))).map(swap)
        else {
            for slice in known {
                self.delete(&slice).await?;
            }
            return Ok(None);
        };
        let mut pods = self.pods.list_in(&key.namespace);
        pods.retain(|pod| selector.matches_object(pod));
        let families = families(&service);
        let zone_of = |node: &str| self.nodes.get("", node)?.label(ZONE).map(str::to_owned);
        for family in families {
            let of_family = known.extract_if(.., |slice| slice.str_at("/addressType") == family).collect();
            self.apply(&service, family, desired::groups(&service, family, &pods, &zone_of), of_family).await?;
        }
        // Of a family that the Service has no longer.
        for slice in known {
            self.delete(&slice).await?;
        }
        Ok(None)
    }
}

/// The Service's address families as EndpointSlices name them.
fn families(service: &Object) -> Vec<&'static str> {
    let asked: Vec<&str> = crate::objects::list(service, "/spec/ipFamilies").iter().filter_map(Value::as_str).collect();
    let all = ["IPv4", "IPv6"];
    if asked.is_empty() { vec!["IPv4"] } else { all.into_iter().filter(|family| asked.contains(family)).collect() }
}

fn swap<A, B>((a, b): (A, B)) -> (B, A) {
    (b, a)
}

impl Endpoints {
    async fn apply(
        &self,
        service: &SharedObject,
        family: &'static str,
        groups: Vec<Group>,
        known: Vec<SharedObject>,
    ) -> StatusResult<()> {
        let (mut mine, strangers): (Vec<_>, Vec<_>) =
            known.into_iter().partition(|slice| is_controlled_by(slice, service.uid()));
        // Of a Service of the same name that is gone.
        for slice in strangers {
            self.delete(&slice).await?;
        }
        mine.sort_by(|a, b| a.name().cmp(b.name()));
        for group in groups {
            let same = |slice: &SharedObject| slice.get("ports").unwrap_or(&Value::Null) == &group.ports;
            let (fitting, rest): (Vec<_>, Vec<_>) = mine.into_iter().partition(same);
            mine = rest;
            self.fill(service, family, group, fitting).await?;
        }
        for slice in mine {
            self.delete(&slice).await?;
        }
        Ok(())
    }

    /// Puts a group's endpoints into its slices: each stays where it is, new ones go where there is room.
    async fn fill(
        &self,
        service: &SharedObject,
        family: &'static str,
        group: Group,
        slices: Vec<SharedObject>,
    ) -> StatusResult<()> {
        let mut left = group.endpoints;
        let mut filled: Vec<(Option<SharedObject>, Vec<Endpoint>)> = Vec::new();
        for slice in slices {
            let is_here = |endpoint: &Endpoint| {
                crate::objects::list(&slice, "/endpoints")
                    .iter()
                    .any(|old| old.str_at("/targetRef/uid") == endpoint.uid)
            };
            let (stay, rest): (Vec<_>, Vec<_>) = left.into_iter().partition(is_here);
            left = rest;
            filled.push((Some(slice), stay));
        }
        for (_, endpoints) in &mut filled {
            let room = SLICE.saturating_sub(endpoints.len()).min(left.len());
            endpoints.extend(left.drain(..room));
        }
        while !left.is_empty() {
            let room = SLICE.min(left.len());
            filled.push((None, left.drain(..room).collect()));
        }
        // A Service without endpoints has one slice that says so.
        let all_empty = filled.iter().all(|(_, endpoints)| endpoints.is_empty());
        if filled.is_empty() {
            filled.push((None, Vec::new()));
        }
        for (at, (slice, mut endpoints)) in filled.into_iter().enumerate() {
            endpoints.sort_by(|a, b| a.uid.cmp(&b.uid));
            let values: Vec<Value> = endpoints.into_iter().map(|endpoint| endpoint.value).collect();
            match slice {
                Some(slice) if values.is_empty() && !(all_empty && at == 0) => self.delete(&slice).await?,
                Some(slice) => self.update(service, &slice, values).await?,
                None => self.create(service, family, group.ports.clone(), values).await?,
            }
        }
        Ok(())
    }

    async fn update(&self, service: &SharedObject, slice: &SharedObject, endpoints: Vec<Value>) -> StatusResult<()> {
        let mut new = (**slice).clone();
        object_of(&mut new).insert("endpoints".into(), endpoints.into());
        new.metadata_mut().insert("labels".into(), labels(service));
        self.context.write(&ENDPOINT_SLICES, slice, new).await.map(drop)
    }

    async fn create(
        &self,
        service: &SharedObject,
        family: &'static str,
        ports: Value,
        endpoints: Vec<Value>,
    ) -> StatusResult<()> {
        // Named after what it holds, so that making it twice is a conflict and not a second slice.
        let mark = crate::objects::fnv32a(
            format!("{}{family}{ports}{}", service.uid(), Value::from(endpoints.clone())).bytes(),
        );
        let suffix = format!("-{}", api::names::safe_encode(&mark.to_string()));
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": crate::objects::joined(service.name(), &suffix, 253),
                         "labels": labels(service),
                         "ownerReferences": [controller_reference(&SERVICES, "Service", service)]},
            "addressType": family, "ports": ports, "endpoints": endpoints,
        });
        self.context.client.create(&ENDPOINT_SLICES, service.namespace(), slice).await.map(drop)
    }

    async fn delete(&self, slice: &SharedObject) -> StatusResult<()> {
        let options = DeleteOptions { uid: Some(slice.uid().to_owned()), ..Default::default() };
        match self.context.client.delete(&ENDPOINT_SLICES, slice.namespace(), slice.name(), &options).await {
            Err(error) if !is_race(&error) => Err(error),
            _ => Ok(()),
        }
    }
}

fn labels(service: &Object) -> Value {
    let mut labels = service.pointer("/metadata/labels").cloned().filter(Value::is_object).unwrap_or_else(|| json!({}));
    let fields = object_of(&mut labels);
    fields.remove(HEADLESS);
    if service.str_at("/spec/clusterIP") == "None" {
        fields.insert(HEADLESS.into(), "".into());
    }
    fields.insert(SERVICE_NAME.into(), service.name().into());
    fields.insert(MANAGED_BY.into(), MANAGER.into());
    labels
}
