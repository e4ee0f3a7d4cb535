//! VirtualMachineSnapshotContents: kept as long as a machine begins as one. Their files and status are the node agent's.

use super::{DISKS_FROM, GO_ON_FROM};
use crate::context::{Context, MACHINES, SNAPSHOT_CONTENTS};
use crate::runner::{Again, Reconcile, Source};
use api::client::Patch;
use api::informer::{Informer, Key};
use api::object::{Meta, Object};
use api::status::{Found, StatusResult};
use async_trait::async_trait;
use serde_json::json;
use std::sync::Arc;

const COMPONENT: &str = "snapshot-content-controller";
/// Held here as long as a machine uses it; the node agent's goes after it.
pub(super) const IN_USE: &str = "snapshot.kubevirt.io/vmsnapshotcontent-protection";
pub(super) const FILES: &str = "atoll.dev/snapshot-files";

struct Contents {
    context: Arc<Context>,
    contents: Informer,
    machines: Informer,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let (contents, machines) = (context.informers.of(&SNAPSHOT_CONTENTS), context.informers.of(&MACHINES));
    let known = contents.clone();
    let of_machine = Source::new(machines.clone(), move |machine| {
        let used = |content: &Object| uses(machine, content.uid());
        known.list_in(machine.namespace()).iter().filter(|content| used(content)).map(Key::of).collect()
    });
    let sources = vec![Source::own(contents.clone()), of_machine];
    (Arc::new(Contents { context: Arc::clone(context), contents, machines }), sources)
}

fn uses(machine: &Object, uid: &str) -> bool {
    let template = machine.pointer("/spec/template").and_then(|template| template.annotation(DISKS_FROM));
    template == Some(uid) || machine.annotation(GO_ON_FROM) == Some(uid)
}

#[async_trait]
impl Reconcile for Contents {
    fn name(&self) -> &'static str {
        COMPONENT
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let Some(content) = self.contents.get_key(key).filter(|content| content.is_deleting()) else { return Ok(None) };
        let finalizers = content.finalizers();
        let machines = self.machines.list_in(content.namespace());
        if !finalizers.contains(&IN_USE) || machines.iter().any(|machine| uses(machine, content.uid())) {
            return Ok(None);
        }
        let kept: Vec<&str> = finalizers.into_iter().filter(|other| *other != IN_USE).collect();
        let patch = json!({"metadata": {"uid": content.uid(), "resourceVersion": content.resource_version(),
                                        "finalizers": kept}});
        let (namespace, name) = (content.namespace(), content.name());
        self.context.client.patch(&SNAPSHOT_CONTENTS, namespace, name, "", Patch::Merge(patch)).await.found()?;
        Ok(None)
    }
}
