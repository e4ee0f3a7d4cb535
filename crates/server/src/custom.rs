//! CustomResourceDefinitions at work: the kinds they define are served as soon as they are written, and when one is
//! deleted its objects go first.

use crate::admission::crds;
use crate::auth::Permit;
use crate::core::{Core, Target};
use crate::kinds::Custom;
use crate::rest::{ListRequest, Preconditions, Wanted, WriteOptions};
use crate::watch::{Change, Filter};
use api::client::DeleteOptions;
use api::kind::Kind;
use api::object::{Meta, Object};
use api::status::{Found, StatusResult};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

const GROUP: &str = "apiextensions.k8s.io";
const PLURAL: &str = "customresourcedefinitions";
/// Objects of a definition that goes may have finalizers: looked at again after this time.
const AGAIN: Duration = Duration::from_millis(500);

fn definitions(core: &Core) -> Option<Arc<Kind>> {
    core.kinds.current().any_version(GROUP, PLURAL).cloned()
}

impl Core {
    /// Tells the kinds about an object that was just written or removed, if it is a definition.
    pub(crate) fn written(&self, target: &Target, object: &Object, gone: bool) {
        if target.is(GROUP, PLURAL) {
            self.serve_definition(object, gone);
        }
    }

    fn serve_definition(&self, definition: &Object, gone: bool) {
        let revision = definition.resource_version().parse().unwrap_or(0);
        if gone || !crds::is_established(definition) {
            self.kinds.set_custom(definition.name(), revision, None);
            return;
        }
        match api::crd::parse(definition) {
            Ok(kinds) => {
                let kinds = kinds.into_iter().map(Arc::new).collect();
                let custom = Custom { kinds, revision, ending: definition.is_deleting() };
                self.kinds.set_custom(definition.name(), revision, Some(custom));
            }
            Err(causes) => {
                let why: Vec<String> = causes.iter().map(|c| format!("{}: {}", c.field, c.message)).collect();
                tracing::error!(definition = definition.name(), "not served: {}", why.join(", "));
            }
        }
    }
}

/// Serves what was defined before the server started.
pub async fn load(core: &Arc<Core>) -> StatusResult<()> {
    let Some(kind) = definitions(core) else { return Ok(()) };
    for definition in core.list(&ListRequest::all(&kind, Filter::default())).await?.items {
        core.serve_definition(&definition, false);
    }
    Ok(())
}

/// Follows definitions and ends those that are deleted. Runs until it is dropped.
pub async fn run(core: Arc<Core>) {
    let Some(kind) = definitions(&core) else { return };
    loop {
        if let Err(status) = follow(&core, &kind).await {
            tracing::warn!("custom kinds: {}", status.message);
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn follow(core: &Arc<Core>, kind: &Arc<Kind>) -> StatusResult<()> {
    let answer = core.list(&ListRequest::all(kind, Filter::default())).await?;
    let mut ending: BTreeSet<String> = BTreeSet::new();
    for definition in &answer.items {
        core.serve_definition(definition, false);
        if definition.is_deleting() {
            ending.insert(definition.name().to_owned());
        }
    }
    let watcher = core.feeds.watch(kind, answer.revision).await;
    let mut watcher = watcher.map_err(crate::rest::storage::status_of)?;
    loop {
        let mut left = BTreeSet::new();
        for name in &ending {
            if !end(core, kind, name).await? {
                left.insert(name.clone());
            }
        }
        ending = left;
        let wait = if ending.is_empty() { Duration::from_secs(3600) } else { AGAIN };
        let events = match tokio::time::timeout(wait, watcher.next()).await {
            Err(_) => continue,
            Ok(None) => return Ok(()),
            Ok(Some(events)) => events.map_err(crate::rest::storage::status_of)?,
        };
        for event in events {
            core.serve_definition(&event.object, event.change == Change::Deleted);
            if event.change != Change::Deleted && event.object.is_deleting() {
                ending.insert(event.object.name().to_owned());
            }
        }
    }
}

/// Deletes the objects of a definition that goes; once there are none, lets the definition go. The answer is whether
/// that was done.
async fn end(core: &Arc<Core>, kind: &Arc<Kind>, name: &str) -> StatusResult<bool> {
    let target = Target::new(kind, "", name);
    let Some(definition) = core.get(&target).await.found()? else { return Ok(true) };
    if !definition.is_deleting() || !definition.finalizers().contains(&crds::FINALIZER) {
        return Ok(true);
    }
    let permit = Permit::internal();
    let kinds = core.kinds.current();
    // A definition of what is built in defined nothing: its objects are not its own.
    let defined = kinds.custom(name).and_then(|c| c.kinds.first().cloned()).filter(|kind| !kinds.is_builtin(kind));
    if let Some(kind) = defined {
        let objects = core.list(&ListRequest::all(&kind, Filter::default())).await?.items;
        for object in &objects {
            let target = Target::new(&kind, object.namespace(), object.name());
            if object.is_deleting() {
                continue;
            }
            let nothing = Wanted { propagation: None };
            match core.delete(&permit, &target, &DeleteOptions::default(), nothing, false).await {
                Err(status) if !status.is_not_found() && !status.is_conflict() => return Err(status),
                _ => {}
            }
        }
        if !objects.is_empty() {
            return Ok(false);
        }
    }
    let change = |live: &Object| {
        let mut new = live.clone();
        let left: Vec<String> =
            live.finalizers().into_iter().filter(|f| *f != crds::FINALIZER).map(str::to_owned).collect();
        new.metadata_mut().insert("finalizers".into(), left.into());
        Ok(new)
    };
    let (options, always) = (WriteOptions::default(), Preconditions::default());
    core.modify(&permit, &target, &options, &always, change).await.found().map(|_| true)
}
