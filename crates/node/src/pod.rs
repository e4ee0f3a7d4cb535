//! One task per pod owns all that happens to it. It acts on what it observes (the pod object, what the boundary lists,
//! verdicts of probes), so it may be woken too often or stopped and begun anew at any point.
//!
//! ```text
//!                    set-up fails: back-off
//!                      +---------+
//!                      v         |
//!   (pod bound) --> Absent -- sandbox prepared --> Live -- all ended for good, ----> Stopping -- nothing runs, --> Ended
//!                    |  ^                            |     deadline, deletion          ^         sandbox gone       |
//!                    |  +-- supervisor lost ---------+                                 |                            |
//!                    |                                                                 |                     pod object
//!                    +-- deletion before there is anything ----------> Ended           +-- found at start       deleted
//!                                                                                          with its pod gone        |
//!                                                                                                                   v
//!                                                                                                                 Gone
//! ```

mod asleep;
mod bandwidth;
pub(crate) mod handler;
mod image;
mod look;
pub(crate) mod plan;
mod probes;
mod report;
mod setup;
mod slot;
mod spec;
mod start;
mod status;
mod stop;
mod watch;

use crate::boundary::{Boundary, BoundaryError, SandboxSpec};
use crate::events::{About, Level};
use crate::ports::{Bandwidth, ImageError, ResolvedImage};
use crate::record::Record;
use crate::shared::Shared;
use crate::views::{ContainerView, Live as LiveView, PodView, ViewState};
use api::k8s::api::core::v1 as core;
use api::k8s::apimachinery::pkg::apis::meta::v1::Time;
use api::object::{Meta, SharedObject};
use futures_util::future::BoxFuture;
use plan::{RestartPolicy, Role};
use serde::Deserialize;
use slot::{Slot, State};
use status::End;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, watch as latest};
use tokio::time::Instant;

/// Looked at again at least this often, should a wake-up be lost.
const RESYNC: Duration = Duration::from_secs(60);
/// Calls to a boundary that take longer have failed.
const CALL_LIMIT: Duration = Duration::from_secs(120);

/// What the agent tells a worker.
#[derive(Clone)]
pub(crate) enum Update {
    Present(SharedObject),
    /// The object is gone from the API.
    Gone,
    /// The agent ends; leave everything running.
    Leave,
}

/// What tasks of a worker report to it.
pub(crate) enum Wake {
    Pulled {
        slot: usize,
        result: Result<Box<ResolvedImage>, ImageError>,
        took: Duration,
    },
    MachineImages {
        result: Result<(), ImageError>,
    },
    Probe {
        slot: usize,
        attempt: u32,
        kind: probes::Kind,
        ok: bool,
        message: String,
    },
    PostStart {
        slot: usize,
        attempt: u32,
        error: Option<String>,
    },
    /// A ConfigMap or Secret that volumes show has changed.
    Source,
}

/// A prepared sandbox.
#[derive(Clone)]
pub(crate) struct Sandbox {
    spec: Arc<SandboxSpec>,
    /// As it is on disk.
    record: Arc<Mutex<Record>>,
    boundary: Arc<dyn Boundary>,
}

/// Why a pod is being stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Why {
    /// Deleted; the object goes when all is down.
    Deleted,
    Finished {
        succeeded: bool,
    },
    Deadline,
}

enum Stage {
    Absent { tries: u32, retry: Option<Instant> },
    Live(Sandbox),
    Stopping { sandbox: Sandbox, why: Why, deadline: Instant },
    Ended,
    Gone,
}

pub(crate) struct Worker {
    shared: Arc<Shared>,
    uid: String,
    dir: PathBuf,
    object: SharedObject,
    pod: core::Pod,
    /// Still in the API.
    present: bool,
    leaving: bool,
    updates: latest::Receiver<Update>,
    inbox: mpsc::Receiver<Wake>,
    wake: mpsc::Sender<Wake>,
    stage: Stage,
    slots: Vec<Slot>,
    initialized: bool,
    start_time: Option<Time>,
    end: Option<End>,
    trouble: Option<(String, String)>,
    /// The boundary may know news.
    dirty: bool,
    /// In a mutex only so that `&Worker` may cross threads; it is never locked.
    changed: Option<Mutex<BoxFuture<'static, Result<(), BoundaryError>>>>,
    /// Earliest moment for something to do.
    at: Instant,
    report: report::Report,
    machine_images: slot::Pull,
    /// User ids of a sandbox that was lost: the next one gets the same, for what they own in volumes.
    id_base: Option<u32>,
    source_watch: Option<watch::SourceWatch>,
    sources_dirty: bool,
    tokens: crate::volumes::Tokens,
    tokens_until: Option<Instant>,
    /// As the link has it; `None` is not known.
    bandwidth: Option<Bandwidth>,
    rest: asleep::Rest,
}

/// The task of one pod. `record` is what was found on disk.
pub(crate) fn worker(
    shared: Arc<Shared>,
    object: SharedObject,
    record: Option<Record>,
) -> (latest::Sender<Update>, impl Future<Output = ()> + Send + 'static) {
    let (tell, updates) = latest::channel(Update::Present(object.clone()));
    let task = async move {
        match Worker::new(shared, object.clone(), updates, record) {
            Ok(worker) => worker.run().await,
            Err(error) => tracing::error!(pod = object.name(), "pod cannot be read: {error}"),
        }
    };
    (tell, task)
}

impl Worker {
    fn new(
        shared: Arc<Shared>,
        object: SharedObject,
        updates: latest::Receiver<Update>,
        record: Option<Record>,
    ) -> Result<Worker, serde_json::Error> {
        let pod = core::Pod::deserialize(&*object)?;
        let uid = object.uid().to_owned();
        let dir = shared.config.pod_dir(&uid);
        let tokens_until = (!crate::volumes::token_projections(&pod).is_empty()).then(Instant::now);
        let empty = core::PodSpec::default();
        let spec = pod.spec.as_ref().unwrap_or(&empty);
        let slots: Vec<Slot> = plan::containers(spec).map(|(role, c)| Slot::new(role, c)).collect();
        let (wake, inbox) = mpsc::channel(64);
        let mut worker = Worker {
            uid,
            dir,
            start_time: pod.status.as_ref().and_then(|s| s.start_time.clone()),
            object,
            pod,
            present: true,
            leaving: false,
            updates,
            inbox,
            wake,
            stage: Stage::Absent { tries: 0, retry: None },
            slots,
            initialized: false,
            end: None,
            trouble: None,
            dirty: false,
            changed: None,
            at: Instant::now(),
            report: report::Report::default(),
            machine_images: slot::Pull::Idle,
            id_base: None,
            source_watch: None,
            sources_dirty: false,
            tokens: crate::volumes::Tokens::new(),
            tokens_until,
            bandwidth: None,
            rest: asleep::Rest::default(),
            shared,
        };
        worker.adopt(record);
        Ok(worker)
    }

    /// Takes up where an earlier agent left off: its last status, and the sandbox it made.
    fn adopt(&mut self, record: Option<Record>) {
        let on_disk = crate::record::read_status(&self.dir);
        let known = on_disk.or_else(|| self.pod.status.clone()).unwrap_or_default();
        let statuses = known.init_container_statuses.iter().flatten().chain(known.container_statuses.iter().flatten());
        for status in statuses {
            if let Some(slot) = self.slots.iter_mut().find(|s| s.name == status.name) {
                slot.restore(status);
            }
        }
        if self.start_time.is_none() {
            self.start_time.clone_from(&known.start_time);
        }
        self.initialized = known.conditions.iter().flatten().any(|c| c.type_ == "Initialized" && c.status == "True");
        let phases = [known.phase.as_deref(), self.pod.status.as_ref().and_then(|s| s.phase.as_deref())];
        if phases.iter().flatten().any(|p| matches!(*p, "Succeeded" | "Failed")) {
            self.end = Some(End {
                succeeded: !phases.contains(&Some("Failed")),
                reason: known.reason.clone().unwrap_or_default(),
                message: known.message.clone().unwrap_or_default(),
            });
        }
        let boundary = record.as_ref().and_then(|r| self.shared.boundaries.get(r.boundary.as_str()).cloned());
        match (record, boundary) {
            (Some(record), Some(boundary)) if !record.ended => {
                self.rest = asleep::Rest::of(record.asleep);
                for slot in &mut self.slots {
                    slot.stop_signal = record.stop_signals.get(&slot.name).copied().unwrap_or(15);
                }
                let sandbox =
                    Sandbox { spec: Arc::new(record.sandbox.clone()), record: Arc::new(Mutex::new(record)), boundary };
                self.stage = match &self.end {
                    Some(end) => {
                        let why = Why::Finished { succeeded: end.succeeded };
                        Stage::Stopping { sandbox, why, deadline: Instant::now() }
                    }
                    None => Stage::Live(sandbox),
                };
                self.dirty = true;
            }
            _ if self.end.is_some() => self.stage = Stage::Ended,
            _ => {
                self.lose_running();
                // `atoll down`, or a reboot: no fault of theirs.
                self.slots.iter_mut().for_each(|slot| slot.not_before = None);
            }
        }
    }

    async fn run(mut self) {
        self.done("agent");
        loop {
            self.at = Instant::now() + RESYNC;
            // Each round does what it can do at once; a few rounds later nothing is left. Should there be more, others
            // get their turn first.
            let mut rounds = 0;
            while self.step().await {
                rounds += 1;
                if rounds == 64 {
                    self.at = Instant::now();
                    break;
                }
            }
            self.publish().await;
            if matches!(self.stage, Stage::Gone) || self.leaving {
                break;
            }
            self.sleep().await;
        }
        if matches!(self.stage, Stage::Gone) {
            self.shared.views.remove(&self.uid);
        }
    }

    /// For `make bench`, which takes the times from the log: `ATOLL_LOG=node::steps=trace`.
    fn done(&self, step: &'static str) {
        tracing::trace!(target: "node::steps", pod = self.object.name(), step);
    }

    /// Waits for anything that may give reason to act.
    async fn sleep(&mut self) {
        let changed = async {
            match &mut self.changed {
                Some(future) => future.get_mut().unwrap_or_else(PoisonError::into_inner).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            told = self.updates.changed() => match told {
                Ok(()) => self.take_update(),
                Err(_) => self.leaving = true,
            },
            Some(wake) = self.inbox.recv() => self.on_wake(wake).await,
            result = changed => {
                self.changed = None;
                self.dirty = true;
                if result.is_err() {
                    // Its supervisor went away, or the machinery stumbles: `list` will tell; do not spin.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
            written = self.report.written() => self.on_written(written),
            () = tokio::time::sleep_until(self.at) => self.dirty = self.dirty || self.is_live(),
        }
        while let Ok(wake) = self.inbox.try_recv() {
            self.on_wake(wake).await;
        }
    }

    fn is_live(&self) -> bool {
        matches!(self.stage, Stage::Live(_) | Stage::Stopping { .. })
    }

    fn take_update(&mut self) {
        let update = self.updates.borrow_and_update().clone();
        match update {
            Update::Leave => self.leaving = true,
            Update::Gone => self.present = false,
            Update::Present(object) => self.take_object(object),
        }
    }

    async fn on_wake(&mut self, wake: Wake) {
        match wake {
            Wake::Pulled { slot, result, took } => self.on_pulled(slot, result, took),
            Wake::MachineImages { result } => self.on_machine_images(result),
            Wake::Probe { slot, attempt, kind, ok, message } => self.on_probe(slot, attempt, kind, ok, &message),
            Wake::PostStart { slot, attempt, error } => self.on_post_start(slot, attempt, error),
            Wake::Source => self.sources_dirty = true,
        }
    }

    /// Does the next thing; `true` if there may be more to do at once.
    async fn step(&mut self) -> bool {
        match std::mem::replace(&mut self.stage, Stage::Gone) {
            Stage::Gone => false,
            Stage::Absent { tries, retry } => self.step_absent(tries, retry).await,
            Stage::Live(sandbox) => self.step_live(sandbox).await,
            Stage::Stopping { sandbox, why, deadline } => self.step_stopping(sandbox, why, deadline).await,
            Stage::Ended => self.step_ended().await,
        }
    }

    async fn step_live(&mut self, sandbox: Sandbox) -> bool {
        // Who sleeps could not answer.
        if self.rest.how.is_none() && self.dirty && !self.refresh(&sandbox).await {
            return self.sandbox_lost(sandbox).await;
        }
        match self.rest(&sandbox).await {
            asleep::Resting::Awake => {}
            asleep::Resting::Asleep => {
                if let Some(at) = self.deadline() {
                    self.wake_at(at);
                }
                self.stage = Stage::Live(sandbox);
                return false;
            }
            asleep::Resting::Lost => return self.sandbox_lost(sandbox).await,
        }
        if self.dirty && !self.refresh(&sandbox).await {
            return self.sandbox_lost(sandbox).await;
        }
        if let Some((why, grace)) = self.must_stop() {
            self.stage = Stage::Stopping { sandbox, why, deadline: Instant::now() + grace };
            return true;
        }
        self.watch_sources();
        if self.sources_dirty || self.tokens_until.is_some_and(|at| at <= Instant::now()) {
            self.sources_dirty = false;
            self.update_volumes(&sandbox).await;
        }
        self.update_bandwidth(&sandbox).await;
        let progress: Vec<_> = self.slots.iter().map(|s| (s.role, s.progress())).collect();
        let began = self.slots.iter().any(|s| s.role == Role::Main && s.begun && !s.earlier);
        let plan = plan::plan(&progress, self.restart_policy(), began);
        self.initialized |= plan.initialized;
        if let Some(succeeded) = plan.finished {
            let grace = self.spec_grace();
            let why = Why::Finished { succeeded };
            self.stage = Stage::Stopping { sandbox, why, deadline: Instant::now() + grace };
            return true;
        }
        let mut more = false;
        for index in plan.start {
            more |= self.start(&sandbox, index).await;
        }
        if let Some(at) = self.deadline() {
            self.wake_at(at);
        }
        self.stage = Stage::Live(sandbox);
        more
    }

    /// The sandbox's supervisor is gone (killed, or the machine was rebooted): a new one, if anything has to run.
    async fn sandbox_lost(&mut self, sandbox: Sandbox) -> bool {
        self.changed = None;
        self.dirty = false;
        self.rest = asleep::Rest::default();
        self.lose_running();
        let progress: Vec<_> = self.slots.iter().map(|s| (s.role, s.progress())).collect();
        let mains: Vec<_> = progress.iter().filter(|p| p.0 == Role::Main).copied().collect();
        if let Some(succeeded) = plan::plan(&mains, self.restart_policy(), true).finished {
            self.stage = Stage::Stopping { sandbox, why: Why::Finished { succeeded }, deadline: Instant::now() };
            return true;
        }
        self.event(Level::Normal, "SandboxChanged", "Pod sandbox changed, it will be killed and re-created.");
        if let Err(error) = limited(sandbox.boundary.destroy(&sandbox.spec)).await {
            tracing::warn!(pod = self.object.name(), "leftovers of a lost sandbox: {error}");
        }
        self.initialized = !self.slots.iter().any(|s| s.role != Role::Main);
        self.id_base = Some(sandbox.spec.id_base);
        self.stage = Stage::Absent { tries: 0, retry: None };
        true
    }

    fn spec(&self) -> core::PodSpec {
        self.pod.spec.clone().unwrap_or_default()
    }

    fn restart_policy(&self) -> RestartPolicy {
        self.pod.spec.as_ref().map_or(RestartPolicy::Always, RestartPolicy::of)
    }

    fn container(&self, index: usize) -> Option<core::Container> {
        plan::containers(self.pod.spec.as_ref()?).nth(index).map(|(_, c)| c.clone())
    }

    fn wake_at(&mut self, at: Instant) {
        self.at = self.at.min(at);
    }

    fn event(&self, level: Level, reason: &'static str, message: impl Into<String>) {
        self.shared.events.record(About::pod(&self.object), level, reason, message);
    }

    fn about(&self, index: usize) -> About {
        match self.slots.get(index) {
            Some(slot) => About::container(&self.object, &slot.name, slot.role != Role::Main),
            None => About::pod(&self.object),
        }
    }

    fn container_event(&self, index: usize, level: Level, reason: &'static str, message: impl Into<String>) {
        self.shared.events.record(self.about(index), level, reason, message);
    }

    /// `pod_ns(uid)`, as kubelet names pods in messages.
    fn full_name(&self) -> String {
        format!("{}_{}({})", self.object.name(), self.object.namespace(), self.uid)
    }

    /// Keeps the signal that stops a container where `atoll down` finds it.
    async fn note_signal(&self, sandbox: &Sandbox, container: &str, signal: i32) {
        let changed = {
            let mut record = sandbox.record.lock().unwrap_or_else(PoisonError::into_inner);
            let known = record.stop_signals.get(container).copied().unwrap_or(15);
            if known == signal {
                return;
            }
            record.stop_signals.insert(container.to_owned(), signal);
            record.clone()
        };
        let dir = self.dir.clone();
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || changed.write(&dir)).await {
            tracing::warn!("{}", crate::volumes::chain(&error));
        }
    }

    fn live_sandbox(&self) -> Option<&Sandbox> {
        match &self.stage {
            Stage::Live(sandbox) | Stage::Stopping { sandbox, .. } => Some(sandbox),
            Stage::Absent { .. } | Stage::Ended | Stage::Gone => None,
        }
    }

    fn view(&self) -> PodView {
        let containers = self
            .slots
            .iter()
            .enumerate()
            .map(|(index, slot)| {
                let container = self.container(index).unwrap_or_default();
                ContainerView {
                    name: slot.name.clone(),
                    init: slot.role != Role::Main,
                    tty: container.tty == Some(true),
                    stdin: container.stdin == Some(true),
                    state: match &slot.state {
                        State::Waiting { reason, .. } => ViewState::Waiting { reason: reason.clone() },
                        State::Running { .. } => ViewState::Running,
                        State::Ended(_) => ViewState::Ended,
                    },
                    attempt: slot.begun.then_some(slot.attempt),
                }
            })
            .collect();
        let live = self.live_sandbox();
        PodView {
            namespace: self.object.namespace().to_owned(),
            name: self.object.name().to_owned(),
            uid: self.uid.clone(),
            dir: self.dir.clone(),
            live: live.map(|s| LiveView { sandbox: s.spec.clone(), boundary: s.boundary.clone() }),
            containers,
            images: self.slots.iter().map(|s| s.image_id.clone()).filter(|i| !i.is_empty()).collect(),
            asleep: self.rest.how,
        }
    }
}

/// A call to a boundary, bounded in time.
async fn limited<T>(call: impl Future<Output = Result<T, BoundaryError>>) -> Result<T, BoundaryError> {
    match tokio::time::timeout(CALL_LIMIT, call).await {
        Ok(result) => result,
        Err(_) => Err(BoundaryError::Failed {
            operation: "call",
            message: format!("no answer within {} s", CALL_LIMIT.as_secs()),
        }),
    }
}
