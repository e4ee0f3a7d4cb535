//! Networks (`atoll.dev`): subnets that pods of a namespace may have their addresses from.
//!
//! A Network that fits is made known to the router, oldest first, and holds a finalizer from before that on, so that it
//! stays until nobody has an address of it. One that does not fit says why in its status and is tried again.

use crate::ports::{NetworkError, Networks, Place, Refused};
use api::client::Client;
use api::informer::Informer;
use api::kind::Resource;
use api::networks::{FINALIZER, NETWORK};
use api::object::{Meta, Object, SharedObject, object_of};
use network::{Misfit, Subnet, SubnetUse};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

/// Changes that come together are looked at together.
const PAUSE: Duration = Duration::from_millis(50);
/// Everything is looked at again this often; sooner while a Network waits to go or to fit.
const RESYNC: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_secs(2);
/// Users that a condition names.
const NAMED: usize = 5;

pub(crate) struct Subnets {
    client: Arc<dyn Client>,
    networks: Arc<dyn Networks>,
    resource: Resource,
    objects: Informer,
    namespaces: Informer,
    pods: Informer,
}

/// `Ready`, as a Network's status says it.
struct Ready {
    status: &'static str,
    reason: &'static str,
    message: String,
}

impl Ready {
    fn not(reason: &'static str, message: String) -> Ready {
        Ready { status: "False", reason, message }
    }
}

impl Subnets {
    pub fn new(
        client: Arc<dyn Client>,
        networks: Arc<dyn Networks>,
        (objects, namespaces, pods): (Informer, Informer, Informer),
    ) -> Subnets {
        Subnets { client, networks, resource: resource(), objects, namespaces, pods }
    }

    /// Follows the API until cancelled.
    pub async fn run(self: Arc<Self>) {
        let mut networks = self.objects.subscribe();
        let mut pods = self.pods.subscribe();
        self.objects.synced().await;
        self.pods.synced().await;
        loop {
            while networks.try_next().is_some() {}
            while pods.try_next().is_some() {}
            let settled = self.settle().await;
            tokio::time::sleep(PAUSE).await;
            tokio::select! {
                _ = networks.next() => {}
                _ = pods.next(), if !self.objects.list().is_empty() => {}
                () = tokio::time::sleep(if settled { RESYNC } else { RETRY }) => {}
            }
        }
    }

    /// Brings the router and all statuses up to what the API says. Answers whether nothing is left to wait for.
    async fn settle(&self) -> bool {
        let mut objects = self.objects.list();
        let known = self.networks.subnets().await;
        for gone in known.iter().filter(|known| !objects.iter().any(|object| full_name(object) == known.subnet.name)) {
            if let Err(error) = self.networks.remove_subnet(&gone.subnet.name).await {
                tracing::warn!(network = gone.subnet.name, "cannot be removed: {error}");
            }
        }
        let is_known = |object: &SharedObject| known.iter().any(|known| known.subnet.name == full_name(object));
        objects.sort_by_key(|object| {
            let created = object.str_at("/metadata/creationTimestamp").to_owned();
            (!object.is_deleting(), !is_known(object), created, full_name(object))
        });
        let mut settled = true;
        for object in objects {
            match self.bring_up(&object).await {
                Ok(done) => settled &= done,
                Err(error) => {
                    tracing::debug!(network = full_name(&object), "status: {}", error.message);
                    settled = false;
                }
            }
        }
        settled
    }

    async fn bring_up(&self, object: &SharedObject) -> Result<bool, api::Status> {
        let name = full_name(object);
        if object.is_deleting() {
            return self.end(object, &name).await;
        }
        let object = self.hold(object).await?;
        let ready = match subnet(&object, &name) {
            Ok(subnet) => match self.networks.add_subnet(&subnet).await {
                Ok(()) => None,
                Err(Refused::Misfit(Misfit::Invalid(why))) => Some(Ready::not("Invalid", why)),
                Err(Refused::Misfit(Misfit::Overlaps(why))) => Some(Ready::not("Overlaps", why)),
                Err(Refused::Misfit(Misfit::Share(why))) => Some(Ready::not("ShareExceeded", why)),
                Err(Refused::Failed(error)) => Some(Ready::not("Failed", error.to_string())),
            },
            Err(why) => Some(Ready::not("Invalid", why)),
        };
        let used = self.use_of(&name).await;
        let fits = ready.is_none();
        let settled = fits && !used.as_ref().is_some_and(|used| self.has_leavers(used));
        let ready = ready.unwrap_or_else(|| match &used {
            Some(used) if used.free == 0 => {
                Ready::not("Exhausted", format!("all {} addresses of {} are in use", used.used, used.subnet.cidr))
            }
            _ => Ready { status: "True", reason: "Ready", message: "Workloads get addresses of it.".into() },
        });
        self.tell(&object, &ready, used.as_ref().filter(|_| fits)).await?;
        Ok(settled)
    }

    /// Whether a pod has an address that the API no longer has: nothing tells when it is given back.
    fn has_leavers(&self, used: &SubnetUse) -> bool {
        let pods: HashSet<String> = self.pods.list().iter().map(|pod| pod.uid().to_owned()).collect();
        used.workloads.iter().any(|uid| !pods.contains(uid))
    }

    /// It has a finalizer before anybody has an address of it.
    async fn hold(&self, object: &SharedObject) -> Result<SharedObject, api::Status> {
        let mut finalizers = finalizers(object);
        if finalizers.iter().any(|own| own == FINALIZER) {
            return Ok(object.clone());
        }
        finalizers.push(FINALIZER.into());
        self.client.update(&self.resource, object.namespace(), with_finalizers(object, finalizers)).await
    }

    /// Lets a Network go that nobody uses; answers whether it has gone.
    async fn end(&self, object: &SharedObject, name: &str) -> Result<bool, api::Status> {
        let mut finalizers = finalizers(object);
        if !finalizers.iter().any(|own| own == FINALIZER) {
            return Ok(true);
        }
        match self.networks.remove_subnet(name).await {
            Ok(true) => {
                finalizers.retain(|own| own != FINALIZER);
                let object = with_finalizers(object, finalizers);
                return match self.client.update(&self.resource, object.namespace(), object.clone()).await {
                    Err(status) if !status.is_not_found() => Err(status),
                    _ => Ok(true),
                };
            }
            Ok(false) => {}
            Err(error) => tracing::warn!(network = name, "cannot be removed: {error}"),
        }
        let used = self.use_of(name).await;
        let users = used.as_ref().map(|used| self.users(used)).unwrap_or_default();
        self.tell(object, &Ready::not("Terminating", format!("addresses of it are in use: {users}")), used.as_ref())
            .await?;
        Ok(false)
    }

    async fn use_of(&self, name: &str) -> Option<SubnetUse> {
        self.networks.subnets().await.into_iter().find(|used| used.subnet.name == name)
    }

    /// Who has addresses, for people.
    fn users(&self, used: &SubnetUse) -> String {
        let pods = self.pods.list();
        let pod = |uid: &String| {
            let pod = pods.iter().find(|pod| pod.uid() == uid);
            pod.map_or_else(|| format!("pod {uid}"), |pod| format!("pod {}/{}", pod.namespace(), pod.name()))
        };
        let mut all: Vec<String> = used.workloads.iter().map(pod).collect();
        all.extend(used.kept.iter().map(|key| format!("kept for {key}")));
        all.sort();
        let more = all.len().saturating_sub(NAMED);
        all.truncate(NAMED);
        if more > 0 {
            all.push(format!("{more} more"));
        }
        all.join(", ")
    }

    async fn tell(&self, object: &SharedObject, ready: &Ready, used: Option<&SubnetUse>) -> Result<(), api::Status> {
        let old = object.pointer("/status/conditions/0").unwrap_or(&Value::Null);
        let since = match old.str_at("/status") == ready.status {
            true => old.str_at("/lastTransitionTime").to_owned(),
            false => api::time::now_rfc3339(),
        };
        let mut status = json!({"conditions": [{"type": "Ready", "status": ready.status, "reason": ready.reason,
            "message": ready.message, "observedGeneration": object.generation(), "lastTransitionTime": since}]});
        if let Some(used) = used {
            status["used"] = used.used.into();
            status["free"] = used.free.into();
        }
        if object.get("status") == Some(&status) {
            return Ok(());
        }
        let mut new = (**object).clone();
        object_of(&mut new).insert("status".into(), status);
        self.client.update_status(&self.resource, object.namespace(), new).await.map(drop)
    }

    /// Where a pod's address is to be from: what its annotation says, or else its namespace's.
    pub async fn place(&self, uid: &str, namespace: &str, asked: Option<&str>) -> Result<Place, NetworkError> {
        let moves = asked.is_some();
        let name = match asked {
            Some(name) => name.to_owned(),
            None => {
                self.namespaces.synced().await;
                let own = self.namespaces.get("", namespace);
                own.and_then(|own| own.annotation(NETWORK).map(str::to_owned)).unwrap_or_default()
            }
        };
        if name.is_empty() {
            return Ok(Place { subnet: None, moves });
        }
        let full = format!("{namespace}/{name}");
        if self.networks.leases().await.iter().any(|lease| lease.uid == uid) {
            return Ok(Place { subnet: Some(full), moves });
        }
        let refused = |message: String| NetworkError {
            operation: "annotation atoll.dev/network",
            message,
            reason: Some("NetworkNotReady"),
        };
        self.objects.synced().await;
        let Some(object) = self.objects.get(namespace, &name) else {
            return Err(refused(format!("there is no Network {full}")));
        };
        if object.is_deleting() {
            return Err(refused(format!("Network {full} is being deleted")));
        }
        if self.use_of(&full).await.is_none() {
            let why = object.str_at("/status/conditions/0/message");
            let why = if why.is_empty() { "it was not looked at yet" } else { why };
            return Err(refused(format!("Network {full} is not ready: {why}")));
        }
        Ok(Place { subnet: Some(full), moves })
    }
}

pub(crate) fn resource() -> Resource {
    Resource::new("atoll.dev", "v1alpha1", "networks")
}

fn full_name(object: &Object) -> String {
    format!("{}/{}", object.namespace(), object.name())
}

fn subnet(object: &Object, name: &str) -> Result<Subnet, String> {
    let why = |error: network::Error| match error {
        network::Error::Config { value, why, .. } => format!("{value}: {why}"),
        other => other.to_string(),
    };
    let cidr = object.str_at("/spec/cidr").parse().map_err(why)?;
    let cidr6 = object.pointer("/spec/cidr6").and_then(Value::as_str).map(str::parse).transpose().map_err(why)?;
    Ok(Subnet { name: name.to_owned(), cidr, cidr6 })
}

fn finalizers(object: &Object) -> Vec<String> {
    let all = object.pointer("/metadata/finalizers").and_then(Value::as_array).into_iter().flatten();
    all.filter_map(Value::as_str).map(str::to_owned).collect()
}

fn with_finalizers(object: &SharedObject, finalizers: Vec<String>) -> Object {
    let mut new = (**object).clone();
    api::object::child(object_of(&mut new), "metadata").insert("finalizers".into(), finalizers.into());
    new
}
