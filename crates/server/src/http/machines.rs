//! What virtual machines can be asked to do, under KubeVirt's own group, so that its clients work:
//! `PUT /apis/subresources.kubevirt.io/v1/namespaces/N/virtualmachines/X/{start,stop,restart}` and
//! `.../virtualmachineinstances/X/{pause,unpause,softreboot}`, and as WebSockets `GET .../X/{console,vnc}`
//! (<https://kubevirt.io/api-reference/main/operations.html>).
//!
//! Starting and stopping is a change of the machine's `runStrategy`, or a request in its status that its controller
//! carries out; pausing is done to the running machine at once.

use super::{Request, Response, Service, method_not_allowed, no_such_path, respond, route::ResourcePath};
use crate::auth::Permit;
use crate::core::{Core, Target};
use crate::rest::WriteOptions;
use api::client::Patch;
use api::object::{Meta, Object};
use api::status::{Found, Status, StatusResult};
use api::streams::{self, Duplex, MachineAction, MachineStream};
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};

pub const GROUP: &str = "subresources.kubevirt.io";
const KUBEVIRT: &str = "kubevirt.io";
const MACHINES: &str = "virtualmachines";
const INSTANCES: &str = "virtualmachineinstances";

struct Asked<'a> {
    core: &'a Core,
    permit: &'a Permit,
    path: &'a ResourcePath,
}

pub async fn handle(
    service: &Service,
    permit: &Permit,
    request: Request,
    path: &ResourcePath,
) -> StatusResult<Response> {
    let known = matches!(path.version.as_str(), "v1" | "v1alpha3");
    if !known || path.namespace.is_empty() || path.name.is_empty() || !path.rest.is_empty() {
        return Err(no_such_path());
    }
    let asked = Asked { core: &service.core, permit, path };
    let (plural, action) = (path.plural.as_str(), path.subresource.as_str());
    let change = matches!(
        (plural, action),
        (MACHINES, "start" | "stop" | "restart") | (INSTANCES, "pause" | "unpause" | "softreboot")
    );
    if change && request.method() != Method::PUT {
        return Err(method_not_allowed());
    }
    let stream = match (plural, action) {
        (INSTANCES, "console") => Some(MachineStream::Console),
        (INSTANCES, "vnc") => Some(MachineStream::Display),
        _ => None,
    };
    if let Some(stream) = stream {
        if request.method() != Method::GET {
            return Err(method_not_allowed());
        }
        let response = crate::stream::plain(request, asked.stream(stream)).await;
        return Ok(response.map(|body| body.map_err(|never| match never {}).boxed_unsync()));
    }
    match (plural, action) {
        (MACHINES, "start") => asked.start().await?,
        (MACHINES, "stop") => asked.stop().await?,
        (MACHINES, "restart") => asked.restart().await?,
        (INSTANCES, "pause") => asked.pause(MachineAction::Pause).await?,
        (INSTANCES, "unpause") => asked.pause(MachineAction::Unpause).await?,
        (INSTANCES, "softreboot") => asked.soft_reboot().await?,
        _ => return Err(no_such_path()),
    }
    Ok(respond::text(StatusCode::ACCEPTED, ""))
}

/// `spec.runStrategy`, or what the older `spec.running` means.
fn strategy(machine: &Object) -> &str {
    match machine.str_at("/spec/runStrategy") {
        "" if machine.pointer("/spec/running") == Some(&Value::Bool(true)) => "Always",
        "" => "Halted",
        name => name,
    }
}

impl Asked<'_> {
    fn target(&self, plural: &str) -> StatusResult<Target> {
        let kinds = self.core.kinds.current();
        let kind = kinds.get(KUBEVIRT, "v1", plural).ok_or_else(no_such_path)?;
        Ok(Target::new(kind, &self.path.namespace, &self.path.name))
    }

    fn conflict(&self, why: &str) -> Status {
        Status::conflict(KUBEVIRT, &self.path.plural, &self.path.name, why)
    }

    async fn machine(&self) -> StatusResult<Object> {
        self.core.get(&self.target(MACHINES)?).await
    }

    /// The machine's instance, unless it has ended or is on its way out.
    async fn running(&self) -> StatusResult<Option<Object>> {
        let instance = self.core.get(&self.target(INSTANCES)?).await.found()?;
        let ended = |instance: &Object| matches!(instance.str_at("/status/phase"), "Succeeded" | "Failed");
        Ok(instance.filter(|instance| !ended(instance) && !instance.is_deleting()))
    }

    async fn patch(&self, plural: &str, subresource: &str, patch: Value) -> StatusResult<()> {
        let manager = format!("virt-api-{}", self.path.subresource);
        let options = WriteOptions { manager, subresource: subresource.into(), ..WriteOptions::default() };
        self.core.patch(self.permit, &self.target(plural)?, &Patch::Merge(patch), &options).await.map(drop)
    }

    async fn set_strategy(&self, machine: &Object, strategy: &str) -> StatusResult<()> {
        let on = strategy != "Halted";
        let spec = match machine.pointer("/spec/running") {
            Some(_) => json!({"running": on}),
            None => json!({"runStrategy": strategy}),
        };
        self.patch(MACHINES, "", json!({"spec": spec})).await
    }

    async fn request(&self, machine: &Object, actions: Value) -> StatusResult<()> {
        let patch = json!({"metadata": {"resourceVersion": machine.resource_version()},
                           "status": {"stateChangeRequests": actions}});
        self.patch(MACHINES, "status", patch).await
    }

    async fn start(&self) -> StatusResult<()> {
        let machine = self.machine().await?;
        if self.running().await?.is_some() {
            return Err(self.conflict("VM is already running"));
        }
        match strategy(&machine) {
            "Halted" => self.set_strategy(&machine, "Always").await,
            "Always" => Err(self.conflict("Always does not support manual start requests")),
            _ => self.request(&machine, json!([{"action": "Start"}])).await,
        }
    }

    async fn stop(&self) -> StatusResult<()> {
        let machine = self.machine().await?;
        let running = self.running().await?;
        match (strategy(&machine), running) {
            ("Halted", None) => Err(self.conflict("VM is not running")),
            ("Manual", None) => Err(self.conflict("VM is not running")),
            ("Manual", Some(instance)) => {
                self.request(&machine, json!([{"action": "Stop", "uid": instance.uid()}])).await
            }
            _ => self.set_strategy(&machine, "Halted").await,
        }
    }

    async fn restart(&self) -> StatusResult<()> {
        let machine = self.machine().await?;
        if strategy(&machine) == "Halted" {
            return Err(self.conflict("Halted does not support manual restart requests"));
        }
        let Some(instance) = self.running().await? else { return Err(self.conflict("VM is not running")) };
        self.request(&machine, json!([{"action": "Stop", "uid": instance.uid()}, {"action": "Start"}])).await
    }

    async fn soft_reboot(&self) -> StatusResult<()> {
        let instance = self.core.get(&self.target(INSTANCES)?).await?;
        if instance.str_at("/status/phase") != "Running" {
            return Err(self.conflict("VMI is not running"));
        }
        if is_paused(&instance) {
            return Err(self.conflict("VMI is paused"));
        }
        self.core.streams()?.machine(&self.pod(&instance)?, MachineAction::SoftReboot).await
    }

    async fn stream(&self, stream: MachineStream) -> StatusResult<Box<dyn Duplex>> {
        let instance = self.core.get(&self.target(INSTANCES)?).await?;
        if instance.str_at("/status/phase") != "Running" {
            return Err(self.conflict("VMI is not running"));
        }
        self.core.streams()?.machine_stream(&self.pod(&instance)?, stream).await
    }

    async fn pause(&self, action: MachineAction) -> StatusResult<()> {
        let target = self.target(INSTANCES)?;
        let instance = self.core.get(&target).await?;
        if instance.str_at("/status/phase") != "Running" {
            return Err(self.conflict("VMI is not running"));
        }
        match (action, is_paused(&instance)) {
            (MachineAction::Pause, true) => return Err(self.conflict("VMI is already paused")),
            (MachineAction::Unpause, false) => return Err(self.conflict("VMI is not paused")),
            (MachineAction::Pause, false) | (MachineAction::Unpause, true) | (MachineAction::SoftReboot, _) => {}
        }
        let pod = self.pod(&instance)?;
        self.core.streams()?.machine(&pod, action).await?;
        let conditions = instance.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default();
        let mut kept: Vec<Value> = conditions.into_iter().filter(|c| c.str_at("/type") != "Paused").collect();
        if action == MachineAction::Pause {
            let now = api::time::rfc3339(now());
            kept.push(json!({"type": "Paused", "status": "True", "reason": "PausedByUser",
                             "message": "VMI was paused by user", "lastTransitionTime": now, "lastProbeTime": now}));
        }
        self.patch(INSTANCES, "status", json!({"status": {"conditions": kept}})).await
    }

    /// The pod that an instance runs in.
    fn pod(&self, instance: &Object) -> StatusResult<streams::Target> {
        let pods = instance.pointer("/status/activePods").and_then(Value::as_object);
        let uid = pods.and_then(|pods| pods.keys().next()).cloned();
        let uid = uid.ok_or_else(|| self.conflict("VMI has no pod yet"))?;
        let (namespace, container) = (self.path.namespace.clone(), "compute".to_owned());
        Ok(streams::Target { namespace, pod: String::new(), pod_uid: uid, container })
    }
}

fn is_paused(instance: &Object) -> bool {
    let conditions = instance.pointer("/status/conditions").and_then(Value::as_array);
    let is = |c: &Value| c.str_at("/type") == "Paused" && c.str_at("/status") == "True";
    conditions.is_some_and(|all| all.iter().any(is))
}

fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
