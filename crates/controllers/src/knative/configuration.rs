//! Configurations: one Revision for each change of the template.

use super::{CONFIGURATION, CONFIGURATION_UID, GENERATION, ROUTING_STATE, SERVICE, SERVICE_UID, State, handed_down};
use crate::context::{Context, KN_CONFIGURATIONS, KN_REVISIONS};
use crate::objects::{controller_name, controller_reference, is_controlled_by};
use crate::runner::{Again, Reconcile, Source};
use api::client::DeleteOptions;
use api::informer::{Informer, Key};
use api::object::{Meta, Object, SharedObject, child, object_of};
use api::status::StatusResult;
use async_trait::async_trait;
use serde_json::{Value, json};
use std::sync::Arc;

const COMPONENT: &str = "configuration-controller";
/// Revisions without requests that are kept for going back.
const KEPT: usize = 20;

pub(crate) struct Configurations {
    context: Arc<Context>,
    configurations: Informer,
    revisions: Informer,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let informers = &context.informers;
    let (configurations, revisions) = (informers.of(&KN_CONFIGURATIONS), informers.of(&KN_REVISIONS));
    let of_revision = Source::new(revisions.clone(), |revision| {
        let name = controller_name(revision, &KN_CONFIGURATIONS, "Configuration");
        name.map(|name| Key::new(revision.namespace(), name)).into_iter().collect()
    });
    let sources = vec![Source::own(configurations.clone()), of_revision];
    (Arc::new(Configurations { context: Arc::clone(context), configurations, revisions }), sources)
}

pub(super) fn generation(revision: &Object) -> i64 {
    revision.label(GENERATION).and_then(|text| text.parse().ok()).unwrap_or(0)
}

#[async_trait]
impl Reconcile for Configurations {
    fn name(&self) -> &'static str {
        COMPONENT
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let Some(configuration) = self.configurations.get_key(key).filter(|found| !found.is_deleting()) else {
            return Ok(None);
        };
        let mut revisions = self.revisions.list_in(&key.namespace);
        revisions.retain(|revision| is_controlled_by(revision, configuration.uid()));
        revisions.sort_by_key(|revision| generation(revision));
        let latest = self.latest(&configuration, &revisions).await?;
        let status = self.status(&configuration, &revisions, &latest);
        self.clean_up(&configuration, &status, &revisions).await?;
        self.context.write_status(&KN_CONFIGURATIONS, &configuration, status).await?;
        Ok(None)
    }
}

impl Configurations {
    /// The Revision of the template as it is now, made if missing; or why it cannot be.
    async fn latest(
        &self,
        configuration: &SharedObject,
        revisions: &[SharedObject],
    ) -> StatusResult<Result<SharedObject, State>> {
        let wanted = revision(configuration);
        let same = |revision: &&SharedObject| generation(revision) == configuration.generation();
        if let Some(found) = revisions.iter().find(same) {
            return Ok(Ok(Arc::clone(found)));
        }
        let found = match self.revisions.get(configuration.namespace(), wanted.name()) {
            Some(found) => found,
            None => {
                let name = wanted.name().to_owned();
                let made = self.context.create_or_get(&KN_REVISIONS, configuration.namespace(), wanted.clone()).await?;
                if is_controlled_by(&made, configuration.uid()) && generation(&made) == configuration.generation() {
                    let message = format!("Created Revision {name:?}");
                    self.context.events.normal(COMPONENT, configuration, "Created", message);
                    return Ok(Ok(made));
                }
                made
            }
        };
        // A name that the template gives: going back to an earlier state of it, or taken.
        let spec = |object: &Object| object.get("spec").cloned().unwrap_or(Value::Null);
        if is_controlled_by(&found, configuration.uid()) && spec(&found) == spec(&wanted) {
            return Ok(Ok(found));
        }
        let name = found.name();
        let message =
            format!("Revision creation failed with message: revisions.serving.knative.dev {name:?} already exists.");
        Ok(Err(State::failed("RevisionFailed", message)))
    }

    fn status(
        &self,
        configuration: &SharedObject,
        revisions: &[SharedObject],
        latest: &Result<SharedObject, State>,
    ) -> Value {
        let mut status = configuration.get("status").cloned().unwrap_or_else(|| json!({}));
        let is_ready = |revision: &&SharedObject| State::of(Some(revision), "Ready") == State::True;
        let known = status.str_at("/latestReadyRevisionName").to_owned();
        let known = revisions.iter().find(|revision| revision.name() == known).map_or(0, |known| generation(known));
        // What is served goes forward only, unless the newest one is an older one by name.
        let newest_ready = revisions.iter().rev().find(is_ready).filter(|ready| generation(ready) >= known);
        let named_ready = latest.as_ref().ok().filter(is_ready);
        let fields = object_of(&mut status);
        fields.insert("observedGeneration".into(), configuration.generation().into());
        if let Ok(latest) = latest {
            fields.insert("latestCreatedRevisionName".into(), latest.name().into());
        }
        if let Some(ready) = named_ready.or(newest_ready) {
            fields.insert("latestReadyRevisionName".into(), ready.name().into());
        }
        let state = match latest {
            Err(state) => state.clone(),
            Ok(latest) => match State::of(Some(latest), "Ready") {
                State::True => State::True,
                State::False(_, why) => {
                    let message = format!("Revision {:?} failed with message: {why}.", latest.name());
                    State::failed("RevisionFailed", message)
                }
                State::Unknown(..) => State::unknown("", ""),
            },
        };
        let now = self.context.timestamp();
        // `Ready` is this Configuration's only condition.
        let (kind, reason, message) = match &state {
            State::True => ("True", "", ""),
            State::False(reason, message) => ("False", reason.as_str(), message.as_str()),
            State::Unknown(reason, message) => ("Unknown", reason.as_str(), message.as_str()),
        };
        let ready = crate::context::Condition { kind: "Ready", status: kind, reason, message };
        crate::context::set_condition(&mut status, ready, &now, &[]);
        status
    }

    /// Deletes the oldest revisions that no route names, beyond those kept.
    async fn clean_up(
        &self,
        configuration: &SharedObject,
        status: &Value,
        revisions: &[SharedObject],
    ) -> StatusResult<()> {
        let in_use = |revision: &&SharedObject| {
            revision.label(ROUTING_STATE) != Some("reserve")
                || revision.name() == status.str_at("/latestReadyRevisionName")
                || revision.name() == status.str_at("/latestCreatedRevisionName")
        };
        let idle: Vec<&SharedObject> = revisions.iter().filter(|revision| !in_use(revision)).collect();
        let surplus = idle.len().saturating_sub(KEPT);
        for revision in idle.into_iter().take(surplus) {
            let options = DeleteOptions { uid: Some(revision.uid().to_owned()), ..Default::default() };
            let name = revision.name();
            match self.context.client.delete(&KN_REVISIONS, configuration.namespace(), name, &options).await {
                Err(error) if !crate::runner::is_race(&error) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

fn revision(configuration: &Object) -> Object {
    let template = configuration.pointer("/spec/template").cloned().unwrap_or_else(|| json!({}));
    let name = match template.str_at("/metadata/name") {
        "" => super::child_name(configuration.name(), &format!("-{:05}", configuration.generation())),
        name => name.to_owned(),
    };
    let mut metadata = json!({"name": name, "annotations": handed_down(&template, "annotations"),
        "ownerReferences": [controller_reference(&KN_CONFIGURATIONS, "Configuration", configuration)]});
    let mut labels = handed_down(&template, "labels");
    let fields = object_of(&mut labels);
    fields.insert(CONFIGURATION.into(), configuration.name().into());
    fields.insert(CONFIGURATION_UID.into(), configuration.uid().into());
    fields.insert(GENERATION.into(), configuration.generation().to_string().into());
    fields.insert(ROUTING_STATE.into(), "pending".into());
    for label in [SERVICE, SERVICE_UID] {
        if let Some(value) = configuration.label(label) {
            fields.insert(label.into(), value.into());
        }
    }
    child(object_of(&mut metadata), "labels").append(object_of(&mut labels));
    let spec = template.get("spec").cloned().unwrap_or_else(|| json!({}));
    json!({"apiVersion": "serving.knative.dev/v1", "kind": "Revision", "metadata": metadata, "spec": spec})
}
