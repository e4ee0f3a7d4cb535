//! One container's place in a pod: what is known of it between and during its runs.

use super::plan::{Progress, Role};
use crate::boundary::{ContainerState, Phase};
use crate::ports::{ImageError, ResolvedImage};
use api::k8s::api::core::v1 as core;
use api::k8s::apimachinery::pkg::apis::meta::v1::Time;
use api::k8s::jiff::Timestamp;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::Instant;

const FIRST_DELAY: Duration = Duration::from_secs(10);
const MAX_DELAY: Duration = Duration::from_secs(300);
/// A run this long wipes out the crashes before it.
const FORGIVEN_AFTER: Duration = Duration::from_secs(600);

/// A task that ends with its handle.
pub(crate) struct Task(JoinHandle<()>);

impl Task {
    pub fn spawn(future: impl Future<Output = ()> + Send + 'static) -> Self {
        Task(tokio::spawn(future))
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// How a run ended. Times are unix nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub attempt: u32,
    pub code: i32,
    pub signal: Option<i32>,
    pub reason: String,
    pub message: String,
    pub started: i64,
    pub finished: i64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Waiting { reason: String, message: String },
    Running { started: i64 },
    Ended(Ended),
}

impl State {
    pub fn waiting(reason: &str, message: impl Into<String>) -> Self {
        State::Waiting { reason: reason.to_owned(), message: message.into() }
    }
}

/// Doubling delays, 10 s to 300 s.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Delay(Duration);

impl Delay {
    pub fn first() -> Self {
        Delay(FIRST_DELAY)
    }
    /// The delay to use now; the next one is twice as long.
    pub fn take(&mut self) -> Duration {
        let now = self.0;
        self.0 = (self.0 * 2).min(MAX_DELAY);
        now
    }
}

/// The image of a container, on its way.
pub(crate) enum Pull {
    Idle,
    Busy(#[allow(dead_code, reason = "held so that the pull ends with the slot")] Task),
    Done(Box<ResolvedImage>),
    Failed { since: Instant, retry: Instant, reason: &'static str, message: String, announced: bool },
}

/// A look for an image, begun before its container's turn.
pub(crate) struct Ahead {
    pub reference: String,
    pub found: JoinHandle<Result<Option<ResolvedImage>, ImageError>>,
}

pub(crate) struct Slot {
    pub name: String,
    pub role: Role,
    pub state: State,
    /// The run before the current one.
    pub last: Option<Ended>,
    /// Restart count: number of the current or latest run.
    pub attempt: u32,
    /// There was a run.
    pub begun: bool,
    /// An init container that has to run (again) in this sandbox although it has before.
    pub again: bool,
    /// What is known comes from a sandbox that is no more.
    pub earlier: bool,
    pub image_ref: String,
    pub image_id: String,
    pub pull: Pull,
    pub ahead: Option<Ahead>,
    pub pull_delay: Delay,
    crash_delay: Option<Delay>,
    /// Not started again before.
    pub not_before: Option<Instant>,
    /// Length of the wait that `not_before` ends, for messages.
    pub waits: Duration,
    /// Start failed for another reason than a crash: not tried again before.
    pub retry_at: Option<Instant>,
    pub retry_delay: Delay,
    pub hook_pending: bool,
    pub startup_done: bool,
    pub ready: bool,
    pub probes: Vec<Task>,
    pub killer: Option<Killer>,
    pub stop_signal: i32,
}

pub(crate) struct Killer {
    #[allow(dead_code, reason = "held so that it ends with the container")]
    pub task: Task,
    pub deadline: Instant,
}

impl Slot {
    pub fn new(role: Role, container: &core::Container) -> Self {
        let reason = if role == Role::Main { "ContainerCreating" } else { "PodInitializing" };
        Slot {
            name: container.name.clone(),
            role,
            state: State::waiting(reason, ""),
            last: None,
            attempt: 0,
            begun: false,
            again: false,
            earlier: false,
            image_ref: container.image.clone().unwrap_or_default(),
            image_id: String::new(),
            pull: Pull::Idle,
            ahead: None,
            pull_delay: Delay::first(),
            crash_delay: None,
            not_before: None,
            waits: Duration::ZERO,
            retry_at: None,
            retry_delay: Delay::first(),
            hook_pending: false,
            startup_done: false,
            ready: false,
            probes: Vec::new(),
            killer: None,
            stop_signal: 15,
        }
    }

    /// How the latest run ended, if none is on.
    pub fn latest_end(&self) -> Option<&Ended> {
        match &self.state {
            State::Ended(ended) => Some(ended),
            State::Waiting { .. } => self.last.as_ref(),
            State::Running { .. } => None,
        }
    }

    pub fn progress(&self) -> Progress {
        match &self.state {
            State::Running { .. } => Progress::Running { up: self.started() },
            _ if self.again => Progress::New,
            _ => self.latest_end().map_or(Progress::New, |e| Progress::Ended { code: e.code }),
        }
    }

    pub fn is_running(&self) -> bool {
        matches!(self.state, State::Running { .. })
    }

    pub fn started(&self) -> bool {
        self.is_running() && self.startup_done && !self.hook_pending
    }

    /// The number the next run gets.
    pub fn next_attempt(&self) -> u32 {
        if self.begun { self.attempt.saturating_add(1) } else { self.attempt }
    }

    /// A run has begun: forget what belongs to the one before.
    pub fn begin(&mut self, attempt: u32, started: i64) {
        if let State::Ended(ended) = &self.state {
            self.last = Some(ended.clone());
        }
        self.state = State::Running { started };
        self.attempt = attempt;
        self.begun = true;
        self.again = false;
        self.earlier = false;
        self.not_before = None;
        self.retry_at = None;
        self.retry_delay = Delay::first();
        self.pull = Pull::Idle;
        self.ready = false;
        self.startup_done = false;
        self.killer = None;
        self.probes.clear();
    }

    /// A run has ended: works out when the next may begin. The first crash is forgiven at once.
    pub fn end(&mut self, ended: Ended, now: Instant) {
        let ran = Duration::from_nanos(u64::try_from(ended.finished.saturating_sub(ended.started)).unwrap_or(0));
        if ran >= FORGIVEN_AFTER {
            self.crash_delay = None;
        }
        match &mut self.crash_delay {
            Some(delay) => {
                self.waits = delay.take();
                self.not_before = Some(now + self.waits);
            }
            None => {
                self.crash_delay = Some(Delay::first());
                self.not_before = None;
            }
        }
        self.attempt = ended.attempt;
        self.begun = true;
        self.state = State::Ended(ended);
        self.ready = false;
        self.hook_pending = false;
        self.startup_done = false;
        self.probes.clear();
        self.killer = None;
    }

    /// Puts the state aside while the container waits to be started again.
    pub fn wait(&mut self, reason: &str, message: impl Into<String>) {
        let next = State::waiting(reason, message);
        if let State::Ended(ended) = std::mem::replace(&mut self.state, next) {
            self.last = Some(ended);
        }
    }

    /// What an earlier agent reported.
    pub fn restore(&mut self, status: &core::ContainerStatus) {
        self.attempt = u32::try_from(status.restart_count).unwrap_or(0);
        self.image_id.clone_from(&status.image_id);
        let state = status.state.as_ref();
        let waits = state.is_none_or(|s| s.running.is_none() && s.terminated.is_none());
        let before = if waits { self.attempt } else { self.attempt.saturating_sub(1) };
        self.last = status.last_state.as_ref().and_then(|s| s.terminated.as_ref()).map(|t| from_status(t, before));
        if let Some(running) = state.and_then(|s| s.running.as_ref()) {
            self.state = State::Running { started: nanos(running.started_at.as_ref()) };
            self.begun = true;
            self.startup_done = status.started == Some(true);
            self.ready = status.ready;
        } else if let Some(terminated) = state.and_then(|s| s.terminated.as_ref()) {
            self.state = State::Ended(from_status(terminated, self.attempt));
            self.begun = true;
        } else {
            self.begun = self.last.is_some();
        }
        if self.attempt > 0 {
            let mut delay = Delay::first();
            for _ in 1..self.attempt.min(8) {
                delay.take();
            }
            self.crash_delay = Some(delay);
        }
    }
}

fn nanos(time: Option<&Time>) -> i64 {
    time.and_then(|t| i64::try_from(t.0.as_nanosecond()).ok()).unwrap_or(0)
}

pub(crate) fn time(nanos: i64) -> Option<Time> {
    Timestamp::from_second(nanos.div_euclid(1_000_000_000)).ok().map(Time)
}

fn from_status(t: &core::ContainerStateTerminated, attempt: u32) -> Ended {
    Ended {
        attempt,
        code: t.exit_code,
        signal: t.signal,
        reason: t.reason.clone().unwrap_or_default(),
        message: t.message.clone().unwrap_or_default(),
        started: nanos(t.started_at.as_ref()),
        finished: nanos(t.finished_at.as_ref()),
    }
}

/// How the boundary says a run ended; `None` while it runs.
pub(crate) fn ended(state: &ContainerState) -> Option<Ended> {
    let Phase::Exited { started, finished, code, signal, oom_killed, message } = &state.phase else { return None };
    let reason = if *oom_killed {
        "OOMKilled"
    } else if *code == 0 {
        "Completed"
    } else {
        "Error"
    };
    Some(Ended {
        attempt: state.attempt,
        code: *code,
        signal: *signal,
        reason: reason.to_owned(),
        message: message.clone(),
        started: *started,
        finished: *finished,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(slot: &mut Slot, seconds: i64, now: Instant) -> Option<Duration> {
        let attempt = slot.next_attempt();
        slot.begin(attempt, 0);
        let finished = seconds * 1_000_000_000;
        let ended = Ended {
            attempt,
            code: 1,
            signal: None,
            reason: "Error".into(),
            message: String::new(),
            started: 0,
            finished,
        };
        slot.end(ended, now);
        slot.not_before.map(|at| at - now)
    }

    #[tokio::test]
    async fn back_off_doubles_and_is_forgiven_after_ten_minutes() {
        let container = core::Container { name: "c".into(), ..Default::default() };
        let mut slot = Slot::new(Role::Main, &container);
        let now = Instant::now();
        let seconds: Vec<u64> = (0..9).map(|_| run(&mut slot, 1, now).map_or(0, |d| d.as_secs())).collect();
        assert_eq!(seconds, [0, 10, 20, 40, 80, 160, 300, 300, 300]);
        assert_eq!(slot.attempt, 8);
        assert_eq!(run(&mut slot, 600, now), None);
        assert_eq!(run(&mut slot, 1, now), Some(Duration::from_secs(10)));
    }
}
