//! [`PodStreams`]: exec, attach, port-forward and logs of the pods here, with the answers kubelet and the API server give.

use crate::boundary::{BoundaryError, ExecRequest};
use crate::config::log_path;
use crate::views::{ContainerView, Live, PodView, ViewState, Views};
use crate::{kept_logs, logs};
use api::sleep::ASLEEP;
use api::status::{Reason, Status, StatusResult};
use api::streams::{Duplex, LogOptions, MachineAction, MachineStream, PodStreams, Session, Target, Wanted};
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use std::path::PathBuf;
use std::sync::Arc;

const COMMAND_LIMIT: usize = 128 << 10;

pub(crate) struct Streams {
    pub views: Arc<Views>,
    pub data_dir: PathBuf,
}

impl Streams {
    fn pod(&self, target: &Target) -> StatusResult<Arc<PodView>> {
        let found = self.views.find(&target.namespace, &target.pod, &target.pod_uid);
        found.ok_or_else(|| Status::not_found("", "pods", &target.pod))
    }

    /// The pod of a machine, found by its uid.
    fn machine_pod(&self, target: &Target) -> StatusResult<Live> {
        let missing = || Status::not_found("", "pods", &target.pod_uid);
        let pod = self.views.get(&target.pod_uid).filter(|pod| pod.namespace == target.namespace);
        pod.ok_or_else(missing)?.live.clone().ok_or_else(missing)
    }

    /// The container meant, where it runs.
    fn running(&self, target: &Target) -> StatusResult<(Live, ContainerView)> {
        let pod = self.pod(target)?;
        awake(&pod)?;
        let container = choose(&pod, &target.container)?;
        let missing = || {
            let name = &container.name;
            Status::new(
                Reason::InternalError,
                format!("unable to upgrade connection: container not found (\"{name}\")"),
            )
        };
        let live = pod.live.clone().ok_or_else(missing)?;
        if container.state != ViewState::Running {
            return Err(missing());
        }
        Ok((live, container.clone()))
    }
}

/// Nothing could answer in one that sleeps.
fn awake(pod: &PodView) -> StatusResult<()> {
    let Some(how) = pod.asleep else { return Ok(()) };
    let (name, namespace, how) = (&pod.name, &pod.namespace, how.word());
    Err(Status::bad_request(format!(
        "pod {name} sleeps ({how}): a request to its Service wakes it, or kubectl annotate pod {name} -n {namespace} {ASLEEP}-"
    )))
}

fn names(pod: &PodView, init: bool) -> String {
    let names: Vec<&str> = pod.containers.iter().filter(|c| c.init == init).map(|c| c.name.as_str()).collect();
    names.join(" ")
}

fn choose<'a>(pod: &'a PodView, name: &str) -> StatusResult<&'a ContainerView> {
    if !name.is_empty() {
        let found = pod.containers.iter().find(|c| c.name == name);
        return found.ok_or_else(|| Status::bad_request(format!("container {name} is not valid for pod {}", pod.name)));
    }
    let mut mains = pod.containers.iter().filter(|c| !c.init);
    match (mains.next(), mains.next()) {
        (Some(only), None) => Ok(only),
        _ => {
            let mut text = format!(
                "a container name must be specified for pod {}, choose one of: [{}]",
                pod.name,
                names(pod, false)
            );
            if pod.containers.iter().any(|c| c.init) {
                text.push_str(&format!(" or one of the init containers: [{}]", names(pod, true)));
            }
            Err(Status::bad_request(text))
        }
    }
}

fn translate(error: BoundaryError) -> Status {
    match error {
        BoundaryError::NotRunning(name) => Status::new(
            Reason::InternalError,
            format!("unable to upgrade connection: container not found (\"{name}\")"),
        ),
        BoundaryError::NoSandbox(uid) => Status::new(Reason::NotFound, format!("sandbox of pod {uid} is not there")),
        BoundaryError::Refused { message, .. } => Status::bad_request(message),
        other @ BoundaryError::Unsupported { .. } => Status::bad_request(other.to_string()),
        other @ BoundaryError::Failed { .. } => Status::internal(other),
    }
}

/// Which run's log is meant.
fn attempt(pod: &PodView, container: &ContainerView, previous: bool) -> StatusResult<u32> {
    let (name, of) = (&container.name, &pod.name);
    if previous {
        let found = match (container.attempt, &container.state) {
            (Some(latest), ViewState::Waiting { .. }) => Some(latest),
            (Some(latest), ViewState::Running | ViewState::Ended) => latest.checked_sub(1),
            (None, _) => None,
        };
        return found.ok_or_else(|| {
            Status::bad_request(format!("previous terminated container \"{name}\" in pod \"{of}\" not found"))
        });
    }
    container.attempt.ok_or_else(|| {
        let why = match &container.state {
            ViewState::Waiting { reason } if reason == "ErrImagePull" => "image can't be pulled",
            ViewState::Waiting { reason } if reason == "ImagePullBackOff" => "trying and failing to pull image",
            ViewState::Waiting { reason } => reason,
            ViewState::Running | ViewState::Ended => "ContainerCreating",
        };
        Status::bad_request(format!("container \"{name}\" in pod \"{of}\" is waiting to start: {why}"))
    })
}

#[async_trait]
impl PodStreams for Streams {
    async fn exec(&self, target: &Target, command: Vec<String>, wanted: Wanted) -> StatusResult<Session> {
        if command.is_empty() {
            return Err(Status::bad_request("you must specify at least 1 command for the container"));
        }
        if command.iter().map(String::len).sum::<usize>() > COMMAND_LIMIT || command.iter().any(|c| c.contains('\0')) {
            return Err(Status::bad_request(format!("command: longer than {COMMAND_LIMIT} bytes, or contains NUL")));
        }
        let (live, container) = self.running(target)?;
        let request = ExecRequest { command, env: Vec::new(), wanted };
        live.boundary.exec(&live.sandbox, &container.name, request).await.map_err(translate)
    }

    async fn attach(&self, target: &Target, wanted: Wanted) -> StatusResult<Session> {
        let (live, container) = self.running(target)?;
        // A container's terminal is there or not; asking does not change it.
        let wanted = Wanted { tty: container.tty, stdin: wanted.stdin && container.stdin, ..wanted };
        live.boundary.attach(&live.sandbox, &container.name, wanted).await.map_err(translate)
    }

    async fn port_forward(&self, target: &Target, port: u16) -> StatusResult<Box<dyn Duplex>> {
        let pod = self.pod(target)?;
        awake(&pod)?;
        let Some(live) = pod.live.clone() else {
            return Err(Status::bad_request(format!("unable to forward port: pod {} is not running", pod.name)));
        };
        live.boundary.port_forward(&live.sandbox, port).await.map_err(translate)
    }

    async fn logs(
        &self,
        target: &Target,
        options: LogOptions,
    ) -> StatusResult<BoxStream<'static, std::io::Result<Bytes>>> {
        let pod = self.pod(target)?;
        let container = choose(&pod, &target.container)?;
        let attempt = attempt(&pod, container, options.previous)?;
        let path = log_path(&pod.dir, &container.name, attempt);
        let (views, uid, name) = (self.views.clone(), pod.uid.clone(), container.name.clone());
        let alive = move || {
            let view = views.get(&uid);
            let container = view.as_ref().and_then(|v| v.containers.iter().find(|c| c.name == name));
            container.is_some_and(|c| c.attempt == Some(attempt) && c.state == ViewState::Running)
        };
        Ok(logs::stream(path, options, alive))
    }

    async fn kept_logs(
        &self,
        namespace: &str,
        owner: &str,
        options: LogOptions,
    ) -> StatusResult<BoxStream<'static, std::io::Result<Bytes>>> {
        match kept_logs::path(&self.data_dir, namespace, owner) {
            Some(path) => Ok(logs::stream(path, options, || false)),
            None => Err(Status::bad_request(format!("{owner:?} is no uid"))),
        }
    }

    async fn machine(&self, target: &Target, action: MachineAction) -> StatusResult<()> {
        let live = self.machine_pod(target)?;
        let done = match action {
            MachineAction::Pause => live.boundary.pause(&live.sandbox).await,
            MachineAction::Unpause => live.boundary.resume(&live.sandbox).await,
            MachineAction::SoftReboot => live.boundary.soft_reboot(&live.sandbox).await,
        };
        done.map_err(translate)
    }

    async fn machine_stream(&self, target: &Target, stream: MachineStream) -> StatusResult<Box<dyn Duplex>> {
        let live = self.machine_pod(target)?;
        live.boundary.machine_stream(&live.sandbox, stream).await.map_err(translate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn pod(containers: Vec<(&str, bool, ViewState, Option<u32>)>) -> PodView {
        let view = |(name, init, state, attempt): (&str, bool, ViewState, Option<u32>)| ContainerView {
            name: name.into(),
            init,
            tty: false,
            stdin: false,
            state,
            attempt,
        };
        PodView {
            namespace: "ns".into(),
            name: "p".into(),
            uid: "u".into(),
            dir: PathBuf::new(),
            live: None,
            containers: containers.into_iter().map(view).collect(),
            images: Vec::new(),
            asleep: None,
        }
    }
    fn waiting(reason: &str) -> ViewState {
        ViewState::Waiting { reason: reason.into() }
    }

    #[test]
    fn containers_are_chosen_as_the_api_server_does() {
        let two = pod(vec![
            ("i", true, ViewState::Ended, Some(0)),
            ("a", false, ViewState::Running, Some(0)),
            ("b", false, ViewState::Running, Some(0)),
        ]);
        let error = choose(&two, "").unwrap_err().message;
        let want =
            "a container name must be specified for pod p, choose one of: [a b] or one of the init containers: [i]";
        assert_eq!(error, want);
        assert_eq!(choose(&two, "x").unwrap_err().message, "container x is not valid for pod p");
        assert_eq!(choose(&two, "i").unwrap().name, "i");
        let one = pod(vec![("a", false, ViewState::Running, Some(0))]);
        assert_eq!(choose(&one, "").unwrap().name, "a");
    }

    #[test]
    fn which_log() {
        let go = |state: ViewState, n, previous| {
            let pod = pod(vec![("a", false, state, n)]);
            attempt(&pod, &pod.containers[0], previous).map_err(|e| e.message)
        };
        assert_eq!(go(ViewState::Running, Some(2), false), Ok(2));
        assert_eq!(go(ViewState::Running, Some(2), true), Ok(1));
        assert_eq!(go(waiting("CrashLoopBackOff"), Some(2), false), Ok(2));
        assert_eq!(go(waiting("CrashLoopBackOff"), Some(2), true), Ok(2));
        assert_eq!(
            go(ViewState::Running, Some(0), true),
            Err("previous terminated container \"a\" in pod \"p\" not found".into())
        );
        let want = "container \"a\" in pod \"p\" is waiting to start: trying and failing to pull image";
        assert_eq!(go(waiting("ImagePullBackOff"), None, false), Err(want.into()));
    }
}
