//! The way down: hooks, the signal to stop, grace, the signal to kill; then the sandbox, then the object.

use super::handler::Place;
use super::plan::Role;
use super::slot::{Killer, Pull, Task};
use super::status::End;
use super::{Sandbox, Stage, Why, Worker, limited};
use crate::boundary::BoundaryError;
use crate::events::{About, Level, Recorder};
use crate::kept_logs;
use crate::volumes::tree;
use api::client::DeleteOptions;
use api::k8s::api::core::v1::LifecycleHandler;
use api::object::Meta;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// A container gets at least this long after its preStop hook has used up the grace.
const LEAST: Duration = Duration::from_secs(2);
/// The signal to kill is repeated until the container is seen to be gone.
const KILL_AGAIN: Duration = Duration::from_secs(5);

impl Worker {
    pub(super) fn spec_grace(&self) -> Duration {
        let seconds = self.pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds).unwrap_or(30);
        Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
    }

    /// Time left of a deletion: after a restart of the agent only the rest of it.
    fn deletion_grace(&self) -> Duration {
        let whole = self.pod.metadata.deletion_grace_period_seconds.and_then(|s| u64::try_from(s).ok());
        let whole = whole.map_or_else(|| self.spec_grace(), Duration::from_secs);
        let until = self.pod.metadata.deletion_timestamp.as_ref().map(|t| t.0.as_second());
        // The timestamp is in whole seconds, so one more is given than it says.
        let left = until.map(|at| u64::try_from(at.saturating_sub(api::time::now()).saturating_add(1)).unwrap_or(0));
        left.map_or(whole, |left| whole.min(Duration::from_secs(left)))
    }

    /// When `activeDeadlineSeconds` runs out.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let seconds = self.pod.spec.as_ref()?.active_deadline_seconds?;
        let end = self.start_time.as_ref()?.0.as_second().saturating_add(seconds);
        let left = u64::try_from(end.saturating_sub(api::time::now())).unwrap_or(0);
        Some(Instant::now() + Duration::from_secs(left))
    }

    pub(super) fn must_stop(&self) -> Option<(Why, Duration)> {
        if !self.present || self.object.is_deleting() {
            return Some((Why::Deleted, self.deletion_grace()));
        }
        let told = self.pod.status.as_ref().and_then(|s| s.phase.as_deref());
        if let (None, Some(phase @ ("Succeeded" | "Failed"))) = (&self.end, told) {
            // Somebody else declared its end (an eviction).
            return Some((Why::Finished { succeeded: phase == "Succeeded" }, self.spec_grace()));
        }
        let over = self.deadline().is_some_and(|at| at <= Instant::now());
        over.then(|| (Why::Deadline, self.spec_grace()))
    }

    pub(super) async fn step_stopping(&mut self, sandbox: Sandbox, mut why: Why, mut deadline: Instant) -> bool {
        if self.dirty && !self.refresh(&sandbox).await {
            self.changed = None;
            self.dirty = false;
            for index in 0..self.slots.len() {
                self.lose(index);
            }
        }
        if let Some((Why::Deleted, grace)) = self.must_stop() {
            why = Why::Deleted;
            deadline = deadline.min(Instant::now() + grace);
        }
        for slot in &mut self.slots {
            slot.pull = Pull::Idle;
        }
        self.machine_images = Pull::Idle;
        // Sidecars go after the containers they serve, last started first.
        let running = |slots: &[super::slot::Slot], side: bool| -> Vec<usize> {
            let these = slots.iter().enumerate().filter(|(_, s)| s.is_running() && (s.role == Role::Sidecar) == side);
            these.map(|(index, _)| index).collect()
        };
        let mut next = running(&self.slots, false);
        if next.is_empty() {
            next = running(&self.slots, true).into_iter().next_back().into_iter().collect();
        }
        if !next.is_empty() {
            for index in next {
                let name = self.slots.get(index).map(|s| s.name.clone()).unwrap_or_default();
                self.kill(&sandbox, index, deadline, &format!("Stopping container {name}"));
            }
            self.stage = Stage::Stopping { sandbox, why, deadline };
            return false;
        }
        self.set_end(&why);
        self.stage = Stage::Stopping { sandbox: sandbox.clone(), why, deadline };
        // What ended how must be on disk before the boundary forgets it.
        self.publish().await;
        match self.tear_down(&sandbox).await {
            Ok(()) => {
                self.stage = Stage::Ended;
                true
            }
            Err(message) => {
                tracing::warn!(pod = self.object.name(), "sandbox cannot be removed, trying again: {message}");
                self.event(Level::Warning, "FailedKillPod", format!("error killing pod: {message}"));
                self.wake_at(Instant::now() + Duration::from_secs(2));
                false
            }
        }
    }

    fn set_end(&mut self, why: &Why) {
        if self.end.is_some() {
            return;
        }
        let mains = || self.slots.iter().filter(|s| s.role == Role::Main);
        let all_well = mains().all(|s| s.latest_end().is_some_and(|e| e.code == 0));
        let (succeeded, reason, message) = match why {
            Why::Finished { succeeded } => {
                let told = self.pod.status.as_ref().filter(|s| s.phase.as_deref() == Some("Failed"));
                let reason = told.and_then(|s| s.reason.clone()).unwrap_or_default();
                let message = told.and_then(|s| s.message.clone()).unwrap_or_default();
                self.end = Some(End { succeeded: *succeeded, reason, message });
                return;
            }
            Why::Deleted => (all_well, "", ""),
            Why::Deadline => {
                (false, "DeadlineExceeded", "Pod was active on the node longer than the specified deadline")
            }
        };
        if *why == Why::Deadline {
            self.event(Level::Normal, "DeadlineExceeded", message);
        }
        self.end = Some(End { succeeded, reason: reason.into(), message: message.into() });
    }

    /// Makes sure that a running container is on its way down by `deadline`.
    pub(super) fn kill(&mut self, sandbox: &Sandbox, index: usize, deadline: Instant, message: &str) {
        let Some(container) = self.container(index) else { return };
        let about = self.about(index);
        let Some(slot) = self.slots.get_mut(index) else { return };
        let again = match &slot.killer {
            Some(killer) if killer.deadline <= deadline + Duration::from_millis(500) => return,
            Some(_) => true,
            None => false,
        };
        slot.ready = false;
        slot.probes.clear();
        let hook =
            container.lifecycle.as_ref().and_then(|l| l.pre_stop.clone()).filter(|_| !again && slot.is_running());
        let job = KillJob {
            place: Place {
                boundary: sandbox.boundary.clone(),
                sandbox: sandbox.spec.clone(),
                container: Arc::new(container),
            },
            hook,
            signal: slot.stop_signal,
            deadline,
            about: about.clone(),
            events: self.shared.events.clone(),
        };
        slot.killer = Some(Killer { task: Task::spawn(job.run()), deadline });
        if !again {
            self.shared.events.record(about, Level::Normal, "Killing", message);
        }
    }

    /// Undoes set-up, in reverse. Idempotent. Logs and the last status stay until the object goes.
    async fn tear_down(&mut self, sandbox: &Sandbox) -> Result<(), String> {
        match limited(sandbox.boundary.destroy(&sandbox.spec)).await {
            Ok(()) | Err(BoundaryError::NoSandbox(_)) => {}
            Err(error) => return Err(error.to_string()),
        }
        self.changed = None;
        self.source_watch = None;
        if !sandbox.spec.network.host {
            self.shared.networks.detach(&self.uid).await.map_err(|e| e.to_string())?;
        }
        let mut record = sandbox.record.lock().unwrap_or_else(PoisonError::into_inner).clone();
        record.ended = true;
        let (dir, run_dir) = (self.dir.clone(), sandbox.spec.run_dir.clone());
        let cleaned = tokio::task::spawn_blocking(move || -> Result<(), String> {
            record.write(&dir).map_err(|e| crate::volumes::chain(&e))?;
            for part in ["subpaths", "volumes", "termination", "etc", "disks", "boundary"] {
                tree::remove(&dir.join(part)).map_err(|e| format!("{}: {e}", dir.join(part).display()))?;
            }
            tree::remove(&run_dir).map_err(|e| format!("{}: {e}", run_dir.display()))
        });
        cleaned.await.map_err(|e| e.to_string())??;
        self.shared.ids.release(sandbox.spec.id_base);
        Ok(())
    }

    pub(super) async fn step_ended(&mut self) -> bool {
        if self.end.is_none() {
            self.set_end(&Why::Deleted);
        }
        if !self.present {
            let dir = self.dir.clone();
            let (data, namespace) = (self.shared.config.data_dir.clone(), self.object.namespace().to_owned());
            let owner = self.object.label(kept_logs::OWNER).map(str::to_owned);
            let work = move || {
                kept_logs::keep(&data, &namespace, owner.as_deref(), &dir, None);
                tree::remove(&dir)
            };
            match tokio::task::spawn_blocking(work).await {
                Ok(Ok(())) => self.stage = Stage::Gone,
                Ok(Err(error)) => {
                    tracing::warn!(dir = %self.dir.display(), "pod directory cannot be removed, trying again: {error}");
                    self.wake_at(Instant::now() + Duration::from_secs(5));
                    self.stage = Stage::Ended;
                }
                Err(_) => self.stage = Stage::Gone,
            }
            return false;
        }
        self.stage = Stage::Ended;
        if !self.object.is_deleting() {
            return false;
        }
        self.publish().await;
        if !self.report.is_settled() {
            // The last status first; its write wakes us.
            return false;
        }
        let options =
            DeleteOptions { grace_period_seconds: Some(0), uid: Some(self.uid.clone()), ..DeleteOptions::default() };
        let (namespace, name) = (self.object.namespace().to_owned(), self.object.name().to_owned());
        match self.shared.client.delete(&super::report::pods(), &namespace, &name, &options).await {
            // With finalizers left the object stays; it is looked at again with the next change.
            Ok(()) if self.object.finalizers().is_empty() => self.present = false,
            Ok(()) => return false,
            Err(status) if status.is_not_found() || status.is_conflict() => self.present = false,
            Err(status) => {
                tracing::warn!(pod = name, "pod cannot be deleted, trying again: {status}");
                self.wake_at(Instant::now() + Duration::from_secs(1));
                return false;
            }
        }
        true
    }
}

struct KillJob {
    place: Place,
    hook: Option<LifecycleHandler>,
    signal: i32,
    deadline: Instant,
    about: About,
    events: Recorder,
}

impl KillJob {
    async fn run(self) {
        let name = &self.place.container.name;
        let signal = |number: i32| self.place.boundary.signal(&self.place.sandbox, name, number);
        let mut deadline = self.deadline;
        if deadline > Instant::now() {
            if let Some(hook) = &self.hook {
                let done = async {
                    let action = self.place.hook(hook)?;
                    self.place.run(&action).await
                };
                let failed = match tokio::time::timeout_at(deadline, done).await {
                    Ok(Ok(())) => None,
                    Ok(Err(message)) => Some(message),
                    Err(_) => Some("it did not end within the grace period".into()),
                };
                if let Some(message) = failed {
                    let text = format!("PreStopHook failed: {message}");
                    self.events.record(self.about.clone(), Level::Warning, "FailedPreStopHook", text);
                }
                deadline = deadline.max(Instant::now() + LEAST);
            }
            if let Err(error) = signal(self.signal).await {
                tracing::debug!(container = name, "signal {}: {error}", self.signal);
            }
            tokio::time::sleep_until(deadline).await;
        }
        loop {
            if let Err(error) = signal(9).await {
                tracing::debug!(container = name, "signal 9: {error}");
            }
            tokio::time::sleep(KILL_AGAIN).await;
        }
    }
}
