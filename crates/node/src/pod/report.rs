//! Tells the API how the pod does: only what changed, one write at a time, the newest wins.

use super::{Worker, status};
use crate::record;
use api::client::Client;
use api::k8s::api::core::v1 as core;
use api::k8s::apimachinery::pkg::apis::meta::v1::Time;
use api::k8s::jiff::Timestamp;
use api::kind::Resource;
use api::object::{Meta, SharedObject};
use api::status::Status;
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::Instant;

const FIRST_RETRY: Duration = Duration::from_millis(200);
const MAX_RETRY: Duration = Duration::from_secs(30);

pub(super) enum Written {
    Done(SharedObject),
    /// Somebody else wrote the object: this is the newest state.
    Conflict(SharedObject),
    NotThere,
    Failed(Status),
}

pub(super) struct Report {
    writing: Option<JoinHandle<Written>>,
    on_disk: Option<core::PodStatus>,
    retry: Option<Instant>,
    delay: Duration,
    /// What was written last, and what the API made of it. Should it keep a status in another form than it was given,
    /// that is no reason to write again.
    last: Option<(core::PodStatus, Option<core::PodStatus>)>,
    sending: Option<core::PodStatus>,
    /// Everything known has been told.
    settled: bool,
}

impl Default for Report {
    fn default() -> Self {
        Report {
            writing: None,
            on_disk: None,
            retry: None,
            delay: FIRST_RETRY,
            last: None,
            sending: None,
            settled: false,
        }
    }
}

impl Report {
    /// Waits for the write that is on; forever if there is none. Cancel-safe.
    pub async fn written(&mut self) -> Written {
        let Some(writing) = &mut self.writing else { return std::future::pending().await };
        let result = writing.await;
        self.writing = None;
        result.unwrap_or_else(|e| Written::Failed(Status::internal(e)))
    }
    pub fn is_settled(&self) -> bool {
        self.settled && self.writing.is_none()
    }
}

pub(super) fn now() -> Time {
    Time(Timestamp::from_second(api::time::now()).unwrap_or_default())
}

pub(super) fn pods() -> Resource {
    Resource::new("", "v1", "pods")
}

fn version(object: &SharedObject) -> u64 {
    object.resource_version().parse().unwrap_or(0)
}

impl Worker {
    pub(super) fn current_status(&self) -> core::PodStatus {
        let sandbox = self.live_sandbox();
        let host_network = sandbox.is_some_and(|s| s.spec.network.host);
        let pod_ips = match sandbox {
            Some(_) if host_network => self.shared.config.node_ips(),
            Some(sandbox) => sandbox.spec.network.addresses(),
            // An ended pod keeps the addresses it had.
            None => {
                let known = self.pod.status.as_ref().and_then(|status| status.pod_ips.as_ref());
                known.into_iter().flatten().filter_map(|ip| ip.ip.parse().ok()).collect()
            }
        };
        let around = status::Surroundings {
            uid: self.uid.clone(),
            host_ips: self.shared.config.node_ips(),
            pod_ips,
            start_time: self.start_time.clone(),
            sandbox_ready: sandbox.is_some(),
            initialized: self.initialized,
            end: self.end.clone(),
            trouble: self.trouble.clone(),
            asleep: self.rest.how,
        };
        status::compute(&self.pod, &self.slots, &around, &now())
    }

    /// Puts the newest status on disk and under way to the API, if it differs from what is there.
    pub(super) async fn publish(&mut self) {
        self.shared.views.put(self.view());
        if matches!(self.stage, super::Stage::Gone) {
            return;
        }
        let status = self.current_status();
        if self.report.on_disk.as_ref() != Some(&status) && self.dir.is_dir() {
            let (dir, copy) = (self.dir.clone(), status.clone());
            match tokio::task::spawn_blocking(move || record::write_status(&dir, &copy)).await {
                Ok(Ok(())) => self.report.on_disk = Some(status.clone()),
                Ok(Err(error)) => tracing::warn!("{}", crate::volumes::chain(&error)),
                Err(error) => tracing::warn!("status writer: {error}"),
            }
        }
        if self.report.writing.is_some() || !self.present {
            return;
        }
        let known = self.report.last.as_ref().is_some_and(|(sent, kept)| *sent == status && *kept == self.pod.status);
        self.report.settled = known || self.pod.status.as_ref() == Some(&status);
        if self.report.settled {
            return;
        }
        if let Some(at) = self.report.retry.filter(|at| *at > Instant::now()) {
            return self.wake_at(at);
        }
        let Ok(value) = serde_json::to_value(&status) else { return };
        let client = self.shared.client.clone();
        let (object, uid) = (self.object.clone(), self.uid.clone());
        self.report.sending = Some(status);
        self.report.writing = Some(tokio::spawn(write(client, object, uid, value)));
    }

    pub(super) fn on_written(&mut self, written: Written) {
        match written {
            Written::Done(object) => {
                self.report.delay = FIRST_RETRY;
                self.report.retry = None;
                let kept = core::Pod::deserialize(&*object).ok().and_then(|p| p.status);
                self.report.last = self.report.sending.take().map(|sent| (sent, kept));
                self.take_object(object);
            }
            Written::Conflict(object) => self.take_object(object),
            Written::NotThere => self.present = false,
            Written::Failed(error) => {
                tracing::warn!(pod = self.object.name(), "status cannot be written, trying again: {error}");
                let at = Instant::now() + self.report.delay;
                self.report.retry = Some(at);
                self.report.delay = (self.report.delay * 2).min(MAX_RETRY);
            }
        }
    }

    /// Takes over a state of the object unless a newer one is known.
    pub(super) fn take_object(&mut self, object: SharedObject) {
        if version(&object) < version(&self.object) {
            return;
        }
        match core::Pod::deserialize(&*object) {
            Ok(pod) => {
                self.sources_dirty |= pod.metadata.labels != self.pod.metadata.labels
                    || pod.metadata.annotations != self.pod.metadata.annotations;
                self.pod = pod;
                self.object = object;
                self.take_images();
            }
            Err(error) => tracing::warn!(pod = object.name(), "update cannot be read, it is left out: {error}"),
        }
    }
}

async fn write(client: Arc<dyn Client>, object: SharedObject, uid: String, status: serde_json::Value) -> Written {
    let mut next = (*object).clone();
    if let Some(map) = next.as_object_mut() {
        map.insert("status".into(), status);
    }
    match client.update_status(&pods(), object.namespace(), next).await {
        Ok(object) if object.uid() == uid => Written::Done(object),
        Ok(_) => Written::NotThere,
        Err(status) if status.is_not_found() => Written::NotThere,
        Err(status) if status.is_conflict() => match client.get(&pods(), object.namespace(), object.name()).await {
            Ok(object) if object.uid() == uid => Written::Conflict(object),
            Ok(_) => Written::NotThere,
            Err(status) if status.is_not_found() => Written::NotThere,
            Err(status) => Written::Failed(status),
        },
        Err(status) => Written::Failed(status),
    }
}
