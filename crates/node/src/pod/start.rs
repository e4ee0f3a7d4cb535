//! Starting containers and what follows a start: hooks and probes; and how ends are explained.

use super::handler::Place;
use super::probes::{self, Kind};
use super::slot::{Ended, State, Task};
use super::spec::termination_file;
use super::{Sandbox, Wake, Worker, limited};
use crate::boundary::{BoundaryError, ContainerState, Phase, Rootfs};
use crate::config::log_path;
use crate::events::Level;
use crate::kept_logs;
use crate::logs;
use crate::ports::{ImageConfig, ResolvedImage};
use api::object::Meta;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// <https://kubernetes.io/docs/tasks/debug/debug-application/determine-reason-pod-failure/>
const MESSAGE_LIMIT: usize = 4096;
const LOG_MESSAGE_BYTES: u64 = 2048;
const LOG_MESSAGE_LINES: usize = 80;

/// Refusals with these reasons happened after the container was made: they count as a run that failed.
const STARTED_AND_FAILED: &[&str] = &["StartError", "ContainerCannotRun", "RunContainerError"];

impl Worker {
    /// Takes the container as far as it goes now; `true` if it runs.
    pub(super) async fn start(&mut self, sandbox: &Sandbox, index: usize) -> bool {
        if self.backing_off(index) {
            return false;
        }
        let image = if sandbox.spec.machine.is_some() { Some(machine_image()) } else { self.image(index).await };
        let Some(image) = image else { return false };
        let spec = match self.container_spec(sandbox, index, &image).await {
            Ok(spec) => spec,
            Err(error) => {
                self.container_event(index, Level::Warning, "Failed", format!("Error: {}", error.message));
                self.try_again(index, error.reason, &error.message);
                return false;
            }
        };
        let Some(slot) = self.slots.get_mut(index) else { return false };
        slot.image_id.clone_from(&image.id);
        if let Some(container) = super::plan::containers(&self.pod.spec.clone().unwrap_or_default()).nth(index) {
            slot.stop_signal = Self::stop_signal(container.1, &image.config);
        }
        let (name, signal, begun) = (slot.name.clone(), slot.stop_signal, slot.begun);
        self.note_signal(sandbox, &name, signal).await;
        self.done("image");
        if begun
            && let Err(error) = limited(sandbox.boundary.remove(&sandbox.spec, &name)).await
            && !matches!(error, BoundaryError::NotRunning(_) | BoundaryError::NoSandbox(_))
        {
            tracing::debug!(container = name, "cannot be removed before its restart: {error}");
        }
        match limited(sandbox.boundary.start(&sandbox.spec, &spec)).await {
            Ok(state) => {
                self.done("container");
                self.container_event(index, Level::Normal, "Created", format!("Created container: {name}"));
                self.container_event(index, Level::Normal, "Started", format!("Started container {name}"));
                self.begun(sandbox, index, &state).await;
                true
            }
            Err(error) => {
                self.start_failed(index, spec.attempt, error);
                false
            }
        }
    }

    async fn begun(&mut self, sandbox: &Sandbox, index: usize, state: &ContainerState) {
        let started = match &state.phase {
            Phase::Running { started } | Phase::Exited { started, .. } => *started,
        };
        if let Some(slot) = self.slots.get_mut(index) {
            slot.begin(state.attempt, started);
        }
        // `list` tells of an end that came before we looked; and only a list re-arms the wake-up.
        self.dirty = true;
        self.after_start(sandbox, index, true);
        self.trim_logs(index).await;
    }

    fn start_failed(&mut self, index: usize, attempt: u32, error: BoundaryError) {
        let (reason, message) = match error {
            BoundaryError::NoSandbox(_) => {
                self.dirty = true;
                return;
            }
            BoundaryError::Refused { reason, message } => (reason, message),
            other @ BoundaryError::Unsupported { .. } => ("CreateContainerError".into(), other.to_string()),
            other @ (BoundaryError::NotRunning(_) | BoundaryError::Failed { .. }) => {
                ("CreateContainerError".into(), other.to_string())
            }
        };
        self.container_event(index, Level::Warning, "Failed", format!("Error: {message}"));
        if !STARTED_AND_FAILED.contains(&reason.as_str()) {
            self.try_again(index, &reason, &message);
            return;
        }
        let now = api::time::now_micros().saturating_mul(1000);
        let reason = "StartError".to_owned();
        let ended = Ended { attempt, code: 128, signal: None, reason, message, started: now, finished: now };
        if let Some(slot) = self.slots.get_mut(index) {
            slot.begin(attempt, now);
            slot.end(ended, Instant::now());
        }
        // The end is acted on at once.
        self.wake_at(Instant::now());
    }

    fn try_again(&mut self, index: usize, reason: &str, message: &str) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        slot.wait(reason, message);
        // A missing ConfigMap may come any moment.
        let at = Instant::now() + slot.retry_delay.take().min(Duration::from_secs(10));
        slot.retry_at = Some(at);
        slot.pull = super::slot::Pull::Idle;
        self.wake_at(at);
    }

    /// Whether the container has to wait before it may be started (again).
    fn backing_off(&mut self, index: usize) -> bool {
        let full_name = self.full_name();
        let now = Instant::now();
        let Some(slot) = self.slots.get_mut(index) else { return true };
        if let Some(at) = slot.retry_at.filter(|at| *at > now) {
            self.wake_at(at);
            return true;
        }
        slot.retry_at = None;
        let Some(at) = slot.not_before.filter(|at| *at > now) else { return false };
        let shown = matches!(&slot.state, State::Waiting { reason, .. } if reason == "CrashLoopBackOff");
        if !shown {
            let name = slot.name.clone();
            let wait = human(slot.waits);
            let text = format!("back-off {wait} restarting failed container={name} pod={full_name}");
            slot.wait("CrashLoopBackOff", text);
            let text = format!("Back-off restarting failed container {name} in pod {full_name}");
            self.container_event(index, Level::Warning, "BackOff", text);
        }
        self.wake_at(at);
        true
    }

    /// Hook, then probes. `fresh` is false for a container that an earlier agent started: its hook ran then.
    pub(super) fn after_start(&mut self, sandbox: &Sandbox, index: usize, fresh: bool) {
        let Some(container) = self.container(index) else { return };
        let hook = container.lifecycle.as_ref().and_then(|l| l.post_start.clone()).filter(|_| fresh);
        let Some(hook) = hook else { return self.start_probes(sandbox, index) };
        let Some(slot) = self.slots.get_mut(index) else { return };
        slot.hook_pending = true;
        let attempt = slot.attempt;
        let place =
            Place { boundary: sandbox.boundary.clone(), sandbox: sandbox.spec.clone(), container: Arc::new(container) };
        let wake = self.wake.clone();
        slot.probes.push(Task::spawn(async move {
            let result = match place.hook(&hook) {
                Ok(action) => place.run(&action).await,
                Err(error) => Err(error),
            };
            let _ = wake.send(Wake::PostStart { slot: index, attempt, error: result.err() }).await;
        }));
    }

    pub(super) fn on_post_start(&mut self, index: usize, attempt: u32, error: Option<String>) {
        let current = self.slots.get(index).is_some_and(|s| s.is_running() && s.attempt == attempt && s.hook_pending);
        let Some(sandbox) = self.live_sandbox().cloned().filter(|_| current) else { return };
        match error {
            None => {
                if let Some(slot) = self.slots.get_mut(index) {
                    slot.hook_pending = false;
                    slot.probes.clear();
                }
                self.start_probes(&sandbox, index);
            }
            Some(message) => {
                let text = format!("PostStartHook failed: {message}");
                self.container_event(index, Level::Warning, "FailedPostStartHook", text);
                self.kill(&sandbox, index, Instant::now() + self.spec_grace(), "FailedPostStartHook");
            }
        }
    }

    /// Startup probe first; once that has succeeded, liveness and readiness.
    pub(super) fn start_probes(&mut self, sandbox: &Sandbox, index: usize) {
        let Some(container) = self.container(index) else { return };
        let (about, events, wake) = (self.about(index), self.shared.events.clone(), self.wake.clone());
        let Some(slot) = self.slots.get_mut(index) else { return };
        let State::Running { started } = slot.state else { return };
        let now = api::time::now_micros().saturating_mul(1000);
        let age = Duration::from_nanos(u64::try_from(now.saturating_sub(started)).unwrap_or(0));
        let wanted: Vec<(Kind, api::k8s::api::core::v1::Probe)> = match &container.startup_probe {
            Some(probe) if !slot.startup_done => vec![(Kind::Startup, probe.clone())],
            _ => {
                slot.startup_done = true;
                slot.ready |= container.readiness_probe.is_none();
                let both = [(Kind::Liveness, &container.liveness_probe), (Kind::Readiness, &container.readiness_probe)];
                both.into_iter().filter_map(|(kind, probe)| probe.clone().map(|p| (kind, p))).collect()
            }
        };
        let place = Place {
            boundary: sandbox.boundary.clone(),
            sandbox: sandbox.spec.clone(),
            container: Arc::new(container.clone()),
        };
        slot.probes.clear();
        for (kind, probe) in wanted {
            let (place, about) = (place.clone(), about.clone());
            let job =
                probes::Job { kind, slot: index, attempt: slot.attempt, probe, place, about, age, ready: slot.ready };
            slot.probes.push(probes::spawn(job, events.clone(), wake.clone()));
        }
    }

    pub(super) fn on_probe(&mut self, index: usize, attempt: u32, kind: Kind, ok: bool, message: &str) {
        let current =
            self.slots.get(index).is_some_and(|s| s.is_running() && s.attempt == attempt && s.killer.is_none());
        let Some(sandbox) = self.live_sandbox().cloned().filter(|_| current) else { return };
        let Some(slot) = self.slots.get_mut(index) else { return };
        match (kind, ok) {
            (Kind::Readiness, _) => slot.ready = ok,
            (Kind::Startup, true) => {
                slot.startup_done = true;
                self.start_probes(&sandbox, index);
            }
            (Kind::Liveness, true) => {}
            (Kind::Startup | Kind::Liveness, false) => {
                let name = slot.name.clone();
                let word = kind.word().to_lowercase();
                tracing::debug!(container = name, "{word} probe failed: {message}");
                let text = format!("Container {name} failed {word} probe, will be restarted");
                let grace = self.probe_grace(index, kind);
                self.kill(&sandbox, index, Instant::now() + grace, &text);
            }
        }
    }

    fn probe_grace(&self, index: usize, kind: Kind) -> Duration {
        let container = self.container(index).unwrap_or_default();
        let probe = if kind == Kind::Startup { container.startup_probe } else { container.liveness_probe };
        let own = probe.and_then(|p| p.termination_grace_period_seconds).and_then(|s| u64::try_from(s).ok());
        own.map_or_else(|| self.spec_grace(), Duration::from_secs)
    }

    /// The message a container left behind, or the end of its log if it asks for that.
    pub(super) async fn read_message(&self, index: usize, ended: &mut Ended) {
        let Some(container) = self.container(index) else { return };
        let file = termination_file(&self.dir, &container.name, ended.attempt);
        let log = log_path(&self.dir, &container.name, ended.attempt);
        let from_log =
            container.termination_message_policy.as_deref() == Some("FallbackToLogsOnError") && ended.code != 0;
        let read = tokio::task::spawn_blocking(move || {
            let own = read_small(&file);
            if own.is_empty() && from_log { logs::tail_text(&log, LOG_MESSAGE_BYTES, LOG_MESSAGE_LINES) } else { own }
        });
        match read.await {
            Ok(text) if !text.is_empty() => ended.message = text,
            _ => {}
        }
    }

    /// Drops logs of attempts long past.
    async fn trim_logs(&self, index: usize) {
        let Some(slot) = self.slots.get(index) else { return };
        let keep = self.shared.config.log_keep_attempts.max(1);
        let Some(oldest) = slot.attempt.checked_sub(keep) else { return };
        let current = log_path(&self.dir, &slot.name, slot.attempt);
        let Some(dir) = current.parent().map(PathBuf::from) else { return };
        let termination = self.dir.join("termination").join(&slot.name);
        let (data, pod, namespace) =
            (self.shared.config.data_dir.clone(), self.dir.clone(), self.object.namespace().to_owned());
        let owner = self.object.label(kept_logs::OWNER).map(str::to_owned);
        let _ = tokio::task::spawn_blocking(move || {
            kept_logs::keep(&data, &namespace, owner.as_deref(), &pod, Some(oldest));
            for dir in [dir, termination] {
                for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                    let name = entry.file_name();
                    let number = name.to_str().and_then(|n| n.split('.').next()).and_then(|n| n.parse::<u32>().ok());
                    if number.is_some_and(|n| n <= oldest) {
                        let _ = std::fs::remove_file(entry.path());
                    }
                }
            }
        })
        .await;
    }
}

fn machine_image() -> ResolvedImage {
    ResolvedImage {
        reference: String::new(),
        id: String::new(),
        size: 0,
        config: ImageConfig::default(),
        rootfs: Rootfs::Machine,
    }
}

/// The file is written by the tenant: bounded, and only if it still is a plain file.
fn read_small(path: &std::path::Path) -> String {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits().cast_signed();
    let Ok(file) = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path) else { return String::new() };
    if !file.metadata().is_ok_and(|m| m.is_file()) {
        return String::new();
    }
    let mut bytes = Vec::new();
    let _ = file.take(MESSAGE_LIMIT as u64).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// `10s`, `2m40s`, as Go prints durations.
fn human(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds < 60 { format!("{seconds}s") } else { format!("{}m{}s", seconds / 60, seconds % 60) }
}
