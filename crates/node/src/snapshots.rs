//! Snapshots of machines: files of each VirtualMachineSnapshotContent in `DATA/snapshots/<uid>`, taken when it appears and
//! removed when it goes. What a machine of this node begins as, if that is a snapshot, is read here too.
//!
//! Contents are made by the controllers, which say what to save in annotations; the status is written here, once.

use crate::config::is_plain_name;
use crate::machine::{self, InstanceSpec};
use crate::shared::Shared;
use api::client::{ListOptions, Patch};
use api::informer::Informer;
use api::kind::Resource;
use api::object::{Meta, Object, SharedObject};
use api::status::{Found, StatusResult};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, mpsc};
use vmm::saved::{self, Order, Saved};

/// Holds a content until its files are gone.
const FILES: &str = "atoll.dev/snapshot-files";
/// Held by the controllers as long as a machine uses it.
const IN_USE: &str = "snapshot.kubevirt.io/vmsnapshotcontent-protection";
/// On a content: name and uid of the pod of a machine that runs.
const POD: &str = "atoll.dev/pod";
const POD_UID: &str = "atoll.dev/pod-uid";
/// On a content: `false` for the disks alone.
const MEMORY: &str = "atoll.dev/memory";
/// On instances and pods: the content that their disks begin as, and that their memory goes on from.
pub(crate) const DISKS_FROM: &str = "atoll.dev/disks-from";
pub(crate) const GO_ON_FROM: &str = "atoll.dev/go-on-from";
/// Between two looks at a pod that this agent has not taken over yet.
const LOOK: Duration = Duration::from_millis(200);
/// Kept free on the disk.
const SPARE: u64 = 1 << 30;

fn root(shared: &Shared) -> PathBuf {
    shared.config.data_dir.join("snapshots")
}

/// A machine's disks as they were in a snapshot.
pub(crate) struct Origin {
    pub dir: PathBuf,
    pub saved: Saved,
    /// Memory and devices as well.
    pub go_on: bool,
}

/// What a pod's annotations say it begins as, read and compared with its checksums.
pub(crate) async fn origin(shared: &Shared, namespace: &str, object: &Object) -> Result<Option<Origin>, String> {
    let Some(uid) = object.annotation(DISKS_FROM) else { return Ok(None) };
    let go_on = match object.annotation(GO_ON_FROM) {
        None => false,
        Some(other) if other == uid => true,
        Some(_) => return Err(format!("metadata.annotations: {GO_ON_FROM} must be what {DISKS_FROM} is")),
    };
    if !is_plain_name(uid) {
        return Err(format!("metadata.annotations[{DISKS_FROM}]: \"{uid}\" is no snapshot's uid"));
    }
    let (dir, owner) = (root(shared).join(uid), namespace.to_owned());
    let read = move || {
        let saved = saved::open(&dir, &owner)?;
        saved.verify(&dir, go_on)?;
        Ok::<_, vmm::Error>(Origin { dir, saved, go_on })
    };
    match tokio::task::spawn_blocking(read).await {
        Ok(Ok(origin)) if go_on && origin.saved.running.is_none() => {
            Err("snapshot: holds disks alone, no memory to go on from".into())
        }
        Ok(Ok(origin)) => Ok(Some(origin)),
        Ok(Err(error)) => Err(format!("snapshot: {}", chain(&error))),
        Err(error) => Err(error.to_string()),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(&format!(": {inner}"));
        source = inner.source();
    }
    text
}

struct Keeper {
    shared: Arc<Shared>,
    contents: Resource,
    /// One at a time: what is left of the room is then known.
    taking: Mutex<()>,
}

/// Follows contents until it is dropped.
pub(crate) async fn run(shared: Arc<Shared>) {
    let place = root(&shared);
    if let Ok(Err(error)) = tokio::task::spawn_blocking(move || saved::sweep(&place)).await {
        tracing::warn!("snapshots that were begun: {}", chain(&error));
    }
    let contents = Resource::new("snapshot.kubevirt.io", "v1beta1", "virtualmachinesnapshotcontents");
    let informer = Informer::spawn(shared.client.clone(), contents.clone(), "", ListOptions::default());
    let keeper = Arc::new(Keeper { shared, contents, taking: Mutex::default() });
    let mut changes = informer.subscribe();
    informer.synced().await;
    let (done, mut ended) = mpsc::unbounded_channel::<String>();
    let mut busy = HashSet::new();
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        for content in informer.list() {
            let uid = content.uid().to_owned();
            if !keeper.concerns(&content) || !busy.insert(uid.clone()) {
                continue;
            }
            let (keeper, done) = (keeper.clone(), done.clone());
            tasks.spawn(async move {
                if let Err(error) = keeper.look(&content).await {
                    tracing::warn!(snapshot = content.name(), "{error}");
                    tokio::time::sleep(LOOK).await;
                }
                let _ = done.send(uid);
            });
        }
        tokio::select! {
            _ = changes.next() => {}
            Some(uid) = ended.recv() => drop(busy.remove(&uid)),
            Some(_) = tasks.join_next() => {}
        }
    }
}

impl Keeper {
    fn concerns(&self, content: &Object) -> bool {
        let finalizers = content.finalizers();
        if content.is_deleting() {
            return finalizers.contains(&FILES) && !finalizers.contains(&IN_USE);
        }
        finalizers.contains(&FILES) && content.pointer("/status/readyToUse").is_none()
    }

    async fn look(&self, content: &SharedObject) -> StatusResult<()> {
        if !is_plain_name(content.uid()) {
            return Ok(());
        }
        let dir = root(&self.shared).join(content.uid());
        if content.is_deleting() {
            return self.remove(content, dir).await;
        }
        let status = match self.take(content, &dir).await {
            Ok(saved) => describe(&saved, &dir),
            Err(Refused::Later) => {
                tokio::time::sleep(LOOK).await;
                return Ok(());
            }
            Err(Refused::For(message)) => {
                json!({"readyToUse": false, "error": {"time": api::time::now_rfc3339(), "message": message}})
            }
        };
        self.patch(content, "status", json!({"status": status})).await
    }

    async fn remove(&self, content: &SharedObject, dir: PathBuf) -> StatusResult<()> {
        let removed = tokio::task::spawn_blocking(move || saved::remove(&dir)).await;
        if let Ok(Err(error)) = removed {
            return Err(api::Status::internal(chain(&error)));
        }
        let kept: Vec<&str> = content.finalizers().into_iter().filter(|other| *other != FILES).collect();
        let metadata = json!({"resourceVersion": content.resource_version(), "finalizers": kept});
        self.patch(content, "", json!({"metadata": metadata})).await
    }

    async fn patch(&self, content: &SharedObject, subresource: &str, mut patch: Value) -> StatusResult<()> {
        patch.metadata_mut().insert("uid".into(), content.uid().into());
        let (namespace, name) = (content.namespace(), content.name());
        let client = &self.shared.client;
        client.patch(&self.contents, namespace, name, subresource, Patch::Merge(patch)).await.found().map(drop)
    }

    async fn take(&self, content: &SharedObject, dir: &Path) -> Result<Saved, Refused> {
        let _one = self.taking.lock().await;
        let owner = content.namespace().to_owned();
        if let Ok(saved) = saved::open(dir, &owner) {
            // It was complete before this was written down.
            return Ok(saved);
        }
        let memory = content.annotation(MEMORY) != Some("false");
        let (run_dir, disks) = match content.annotation(POD_UID) {
            Some(uid) => (Some(self.pod(content, uid).await?), Vec::new()),
            None => (None, self.stopped(content).await?),
        };
        let (dir, place, space) = (dir.to_owned(), root(&self.shared), self.shared.config.snapshot_space);
        let work = move || {
            let disks = match &run_dir {
                Some(run_dir) => saved::running(run_dir)?.1,
                None => disks,
            };
            let room = space.saturating_sub(saved::usage(&place)).min(free(&place).saturating_sub(SPARE));
            saved::remove(&dir)?;
            saved::take(&Order { owner: &owner, run_dir: run_dir.as_deref(), memory, disks, room }, &dir)
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(Ok(saved)) => Ok(saved),
            Ok(Err(vmm::Error::NotRunning)) => {
                Err(Refused::For("the machine ended while its snapshot was taken; take it again".into()))
            }
            Ok(Err(error)) => Err(Refused::For(chain(&error))),
            Err(error) => Err(Refused::For(error.to_string())),
        }
    }

    /// Where the machine's monitor is.
    async fn pod(&self, content: &Object, uid: &str) -> Result<PathBuf, Refused> {
        let live = self.shared.views.get(uid).filter(|view| view.namespace == content.namespace());
        if let Some(live) = live.and_then(|view| view.live.clone()) {
            return Ok(live.sandbox.run_dir.clone());
        }
        let pods = Resource::new("", "v1", "pods");
        let name = content.annotation(POD).unwrap_or_default();
        match self.shared.client.get(&pods, content.namespace(), name).await {
            Ok(pod) if pod.uid() == uid => Err(Refused::Later),
            Err(error) if !error.is_not_found() => Err(Refused::Later),
            _ => Err(Refused::For("the machine ended before its snapshot was taken; take it again".into())),
        }
    }

    /// The disks that a stopped machine would begin with.
    async fn stopped(&self, content: &Object) -> Result<Vec<saved::Source>, Refused> {
        let say = |why: String| Refused::For(why);
        let template = content.pointer("/spec/source/virtualMachine/spec/template").unwrap_or(&Value::Null);
        let spec = template.get("spec").unwrap_or(&Value::Null).to_string();
        let instance = InstanceSpec::parse(&spec).map_err(|e| say(e.to_string()))?;
        let origin = origin(&self.shared, content.namespace(), template).await.map_err(say)?;
        let found = machine::stopped_disks(self.shared.images.as_ref(), &instance, origin.as_ref()).await;
        found.map_err(|e| say(e.to_string()))
    }
}

enum Refused {
    Later,
    For(String),
}

/// Bytes that may still be written to the disk under `place`, or under what is above it.
fn free(place: &Path) -> u64 {
    let found = place.ancestors().find_map(|path| rustix::fs::statvfs(path).ok());
    found.map_or(0, |fs| fs.f_bavail.saturating_mul(fs.f_frsize))
}

fn describe(saved: &Saved, dir: &Path) -> Value {
    let names: Vec<&str> = saved.disks.iter().map(|disk| disk.name.as_str()).collect();
    let size = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|file| file.path());
    let size: u64 =
        size.filter(|path| path.extension().is_none_or(|e| e != "base")).map(|path| saved::allocated(&path)).sum();
    let mut status = json!({
        "readyToUse": true,
        "creationTime": api::time::rfc3339(saved.taken / 1_000_000_000),
        "volumes": names,
        "memory": saved.running.is_some(),
        "size": size,
        "heldMilliseconds": saved.held / 1_000_000,
    });
    if let (Some(run), Some(fields)) = (&saved.running, status.as_object_mut()) {
        fields.insert("engine".into(), run.engine.clone().into());
    }
    status
}
