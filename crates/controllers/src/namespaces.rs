//! Namespaces: each has its `default` ServiceAccount; one that is being deleted is emptied, then released through
//! `finalize`.

use crate::context::{Condition, Context, NAMESPACES, set_condition};
use crate::gc;
use crate::objects::list;
use crate::runner::{Again, Reconcile, Source, is_race};
use api::client::{DeleteOptions, ListOptions, Patch};
use api::informer::{Informer, Key};
use api::kind::{Resource, Scope};
use api::object::{Meta, SharedObject};
use api::status::{Found, Reason, StatusResult};
use async_trait::async_trait;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

/// Until the next look when something was deleted, and when all that is left is on its way out.
const SOON: Duration = Duration::from_millis(20);
const LATER: Duration = Duration::from_millis(500);
const FINALIZER: &str = "kubernetes";

static ACCOUNTS: LazyLock<Resource> = LazyLock::new(|| Resource::new("", "v1", "serviceaccounts"));

pub(crate) struct Namespaces {
    context: Arc<Context>,
    namespaces: Informer,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let namespaces = context.informers.of(&NAMESPACES);
    let sources = vec![Source::own(namespaces.clone())];
    (Arc::new(Namespaces { context: Arc::clone(context), namespaces }), sources)
}

/// What is left in a namespace.
#[derive(Default)]
struct Left {
    deleted_now: bool,
    /// Objects by resource.
    objects: BTreeMap<String, usize>,
    /// Objects by finalizer that holds them.
    held: BTreeMap<String, usize>,
}

#[async_trait]
impl Reconcile for Namespaces {
    fn name(&self) -> &'static str {
        "namespace-controller"
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let Some(namespace) = self.namespaces.get_key(key) else { return Ok(None) };
        if !namespace.is_deleting() {
            return self.complete(&namespace).await.map(|()| None);
        }
        let finalizers: Vec<&str> = list(&namespace, "/spec/finalizers").iter().filter_map(Value::as_str).collect();
        if !finalizers.contains(&FINALIZER) {
            return Ok(None);
        }
        let left = self.empty(namespace.name()).await?;
        if !left.objects.is_empty() {
            let again = if left.deleted_now { SOON } else { LATER };
            self.tell(&namespace, &left).await?;
            return Ok(Some(again));
        }
        let kept: Vec<&str> = finalizers.into_iter().filter(|finalizer| *finalizer != FINALIZER).collect();
        let patch = Patch::Merge(json!({"metadata": {"uid": namespace.uid()}, "spec": {"finalizers": kept}}));
        self.context.client.patch(&NAMESPACES, "", namespace.name(), "finalize", patch).await.found()?;
        Ok(None)
    }
}

impl Namespaces {
    async fn complete(&self, namespace: &SharedObject) -> StatusResult<()> {
        if self.context.client.get(&ACCOUNTS, namespace.name(), "default").await.found()?.is_some() {
            return Ok(());
        }
        let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
        match self.context.client.create(&ACCOUNTS, namespace.name(), account).await {
            Err(error) if error.reason != Reason::AlreadyExists => Err(error),
            _ => Ok(()),
        }
    }

    /// Deletes all there is. What is found counts as left: only a look that finds nothing says that it is empty.
    async fn empty(&self, namespace: &str) -> StatusResult<Left> {
        let mut left = Left::default();
        let mut all = gc::resources(&*self.context.client);
        all.push((crate::context::EVENTS.clone(), Scope::Namespaced, "Event".into()));
        for (resource, scope, _) in all {
            if scope != Scope::Namespaced {
                continue;
            }
            let found = self.context.client.list(&resource, namespace, &ListOptions::default()).await.found()?;
            // None: a custom resource that has gone meanwhile.
            for object in found.into_iter().flat_map(|found| found.items) {
                let suffix = if resource.group.is_empty() { String::new() } else { resource.group.to_string() };
                *left.objects.entry(format!("{}.{suffix}", resource.plural)).or_default() += 1;
                for finalizer in object.finalizers() {
                    *left.held.entry(finalizer.to_owned()).or_default() += 1;
                }
                if object.is_deleting() {
                    continue;
                }
                let options = DeleteOptions { uid: Some(object.uid().to_owned()), ..Default::default() };
                match self.context.client.delete(&resource, namespace, object.name(), &options).await {
                    Err(error) if !is_race(&error) => return Err(error),
                    _ => left.deleted_now = true,
                }
            }
        }
        Ok(left)
    }

    async fn tell(&self, namespace: &SharedObject, left: &Left) -> StatusResult<()> {
        if left.deleted_now {
            return Ok(());
        }
        let count = |(name, count): (&String, &usize)| format!("{name} has {count} resource instances");
        let objects = left.objects.iter().map(count).collect::<Vec<_>>().join(", ");
        let held = left.held.iter().map(|(name, count)| format!("{name} in {count} resource instances"));
        let held = held.collect::<Vec<_>>().join(", ");
        let remaining = format!("Some resources are remaining: {objects}");
        let finalizers = format!("Some content in the namespace has finalizers remaining: {held}");
        let mut status = namespace.get("status").cloned().unwrap_or_else(|| json!({}));
        let new = |kind, status, reason, message| Condition { kind, status, reason, message };
        let conditions = [
            new(
                "NamespaceDeletionDiscoveryFailure",
                "False",
                "ResourcesDiscovered",
                "All resources successfully discovered",
            ),
            new(
                "NamespaceDeletionGroupVersionParsingFailure",
                "False",
                "ParsedGroupVersions",
                "All legacy kube types successfully parsed",
            ),
            new(
                "NamespaceDeletionContentFailure",
                "False",
                "ContentDeleted",
                "All content successfully deleted, may be waiting on finalization",
            ),
            new("NamespaceContentRemaining", "True", "SomeResourcesRemain", &remaining),
            match left.held.is_empty() {
                true => new(
                    "NamespaceFinalizersRemaining",
                    "False",
                    "ContentHasNoFinalizers",
                    "All content-preserving finalizers finished",
                ),
                false => new("NamespaceFinalizersRemaining", "True", "SomeFinalizersRemain", &finalizers),
            },
        ];
        for condition in conditions {
            set_condition(&mut status, condition, &self.context.timestamp(), &[]);
        }
        self.context.write_status(&NAMESPACES, namespace, status).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::{DEPLOYMENTS, PODS};
    use crate::testing::{World, template};
    use api::client::Client;

    #[tokio::test]
    async fn has_an_account_and_is_emptied() {
        let world = World::new().await;
        world.node("n", |_| true).await;
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"},
                               "spec": {"finalizers": ["kubernetes"]}});
        world.client.put(&NAMESPACES, namespace);
        world.wait(&ACCOUNTS, "default", |_| true).await;
        let deployment = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": "x"},
            "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": template("web", "i")}});
        world.create(&DEPLOYMENTS, deployment).await;
        world.wait_all(&PODS, |pods| pods.len() == 2).await;
        let secrets = Resource::new("", "v1", "secrets");
        let secret = json!({"metadata": {"name": "held", "namespace": "x", "finalizers": ["example.com/f"]}});
        world.create(&secrets, secret).await;
        let other = json!({"metadata": {"name": "kept", "namespace": "y"}});
        world.create(&secrets, other).await;

        let mut doomed = (*world.client.get(&NAMESPACES, "", "x").await.unwrap()).clone();
        doomed.metadata_mut().insert("deletionTimestamp".into(), api::time::now_rfc3339().into());
        // The client of the tests knows nothing of `spec.finalizers`.
        doomed.metadata_mut().insert("finalizers".into(), json!(["example.com/hold"]));
        world.client.put(&NAMESPACES, doomed);
        world.wait_all(&PODS, |pods| pods.is_empty()).await;
        let told = |all: &[SharedObject]| {
            all.iter().any(|namespace| {
                list(namespace, "/status/conditions").iter().any(|condition| {
                    condition.str_at("/message") == "Some content in the namespace has finalizers remaining: example.com/f in 1 resource instances"
                })
            })
        };
        world.wait_all(&NAMESPACES, told).await;
        world.patch(&secrets, "held", json!({"metadata": {"finalizers": null}})).await;
        world.wait_all(&NAMESPACES, |all| list(&all[0], "/spec/finalizers").is_empty()).await;
        assert!(world.client.get(&secrets, "y", "kept").await.is_ok());
    }
}
