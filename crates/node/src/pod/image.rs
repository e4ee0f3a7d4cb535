//! Getting a container's image: pull policies, back-off, and the words kubelet has for what goes wrong.

use super::slot::{Ahead, Pull, Task};
use super::{Role, Wake, Worker};
use crate::events::Level;
use crate::ports::{Credentials, ImageError, ResolvedImage};
use crate::shared::Shared;
use api::client::Client;
use api::k8s::api::core::v1::Secret;
use api::kind::Resource;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// How long the plain error shows before it becomes a back-off.
const ERROR_SHOWN: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Policy {
    Always,
    IfNotPresent,
    Never,
}

/// `imagePullPolicy`, or what it defaults to.
pub(super) fn policy(given: Option<&str>, image: &str) -> Policy {
    match given {
        Some("Always") => Policy::Always,
        Some("Never") => Policy::Never,
        Some("IfNotPresent") => Policy::IfNotPresent,
        _ => {
            let last = image.rsplit('/').next().unwrap_or(image);
            let latest = !image.contains('@') && last.split_once(':').is_none_or(|(_, tag)| tag == "latest");
            if latest { Policy::Always } else { Policy::IfNotPresent }
        }
    }
}

fn reason_of(error: &ImageError) -> &'static str {
    match error {
        ImageError::InvalidName { .. } => "InvalidImageName",
        ImageError::Pull { .. } => "ErrImagePull",
        ImageError::Unusable { .. } => "ImageInspectError",
    }
}

impl Worker {
    /// Looks for the images of the containers that start at once while their sandbox is made.
    pub(super) fn look_for_images(&mut self) {
        let at_once = if self.slots.iter().all(|s| s.role == Role::Main) { self.slots.len() } else { 1 };
        for index in 0..at_once {
            let Some(container) = self.container(index) else { continue };
            let reference = container.image.unwrap_or_default();
            let wanted = policy(container.image_pull_policy.as_deref(), &reference) != Policy::Always;
            let Some(slot) = self.slots.get_mut(index).filter(|s| wanted && matches!(s.pull, Pull::Idle)) else {
                continue;
            };
            let (images, name) = (self.shared.images.clone(), reference.clone());
            let found = tokio::spawn(async move { images.find(&name).await });
            slot.ahead = Some(Ahead { reference, found });
        }
    }

    /// The image if it is ready; otherwise sees to it that it comes, and says so in the slot's state.
    pub(super) async fn image(&mut self, index: usize) -> Option<ResolvedImage> {
        let container = self.container(index)?;
        let reference = container.image.clone().unwrap_or_default();
        let slot = self.slots.get_mut(index)?;
        match &slot.pull {
            Pull::Done(image) => return Some((**image).clone()),
            Pull::Busy(_) => return None,
            Pull::Failed { retry, .. } if *retry > Instant::now() => {
                self.show_back_off(index);
                return None;
            }
            Pull::Failed { .. } | Pull::Idle => slot.pull = Pull::Idle,
        }
        let policy = policy(container.image_pull_policy.as_deref(), &reference);
        if policy != Policy::Always {
            let ahead = match slot.ahead.take().filter(|ahead| ahead.reference == reference) {
                Some(Ahead { found, .. }) => found.await.ok(),
                None => None,
            };
            let found = match ahead {
                Some(found) => found,
                None => self.shared.images.find(&reference).await,
            };
            match found {
                Ok(Some(image)) => {
                    let text = format!("Container image \"{reference}\" already present on machine");
                    self.container_event(index, Level::Normal, "Pulled", text);
                    let slot = self.slots.get_mut(index)?;
                    slot.pull = Pull::Done(Box::new(image.clone()));
                    return Some(image);
                }
                Ok(None) if policy == Policy::Never => {
                    let text = format!("Container image \"{reference}\" is not present with pull policy of Never");
                    self.pull_failed(index, "ErrImageNeverPull", text);
                    return None;
                }
                Ok(None) => {}
                Err(error) => {
                    self.pull_error(index, &error);
                    return None;
                }
            }
        }
        self.container_event(index, Level::Normal, "Pulling", format!("Pulling image \"{reference}\""));
        let (shared, wake, pod) = (self.shared.clone(), self.wake.clone(), self.pod.clone());
        let slot = self.slots.get_mut(index)?;
        slot.wait("ContainerCreating", "");
        slot.pull = Pull::Busy(Task::spawn(async move {
            let since = Instant::now();
            let result = pull(&shared, &pod, &reference).await.map(Box::new);
            let _ = wake.send(Wake::Pulled { slot: index, result, took: since.elapsed() }).await;
        }));
        None
    }

    pub(super) fn on_pulled(&mut self, index: usize, result: Result<Box<ResolvedImage>, ImageError>, took: Duration) {
        match result {
            Ok(image) => {
                let text = format!(
                    "Successfully pulled image \"{}\" in {took:.3?}. Image size: {} bytes.",
                    image.reference, image.size
                );
                self.container_event(index, Level::Normal, "Pulled", text);
                if let Some(slot) = self.slots.get_mut(index) {
                    slot.pull = Pull::Done(image);
                    slot.pull_delay = super::slot::Delay::first();
                }
            }
            Err(error) => self.pull_error(index, &error),
        }
    }

    fn pull_error(&mut self, index: usize, error: &ImageError) {
        let reference = self.slots.get(index).map(|s| s.image_ref.clone()).unwrap_or_default();
        let (event, text) = match error {
            ImageError::InvalidName { .. } => {
                ("InspectFailed", format!("Failed to apply default image tag \"{reference}\": {error}"))
            }
            ImageError::Pull { .. } => ("Failed", format!("Failed to pull image \"{reference}\": {error}")),
            ImageError::Unusable { .. } => {
                ("InspectFailed", format!("Failed to inspect image \"{reference}\": {error}"))
            }
        };
        self.container_event(index, Level::Warning, event, text.clone());
        let message = if matches!(error, ImageError::Pull { .. }) { error.to_string() } else { text };
        self.pull_failed(index, reason_of(error), message);
    }

    fn pull_failed(&mut self, index: usize, reason: &'static str, message: String) {
        let now = Instant::now();
        let event = if reason == "ErrImageNeverPull" { message.clone() } else { format!("Error: {reason}") };
        self.container_event(index, Level::Warning, "Failed", event);
        let Some(slot) = self.slots.get_mut(index) else { return };
        let retry = now + slot.pull_delay.take();
        slot.wait(reason, message.clone());
        slot.pull = Pull::Failed { since: now, retry, reason, message, announced: false };
        self.wake_at(if reason == "ErrImagePull" { now + ERROR_SHOWN } else { retry });
    }

    fn show_back_off(&mut self, index: usize) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        let Pull::Failed { since, retry, reason, message, announced } = &mut slot.pull else { return };
        let (since, retry) = (*since, *retry);
        if *reason != "ErrImagePull" || *announced {
            return self.wake_at(retry);
        }
        if since + ERROR_SHOWN > Instant::now() {
            return self.wake_at(since + ERROR_SHOWN);
        }
        *announced = true;
        let image = slot.image_ref.clone();
        let text = format!("Back-off pulling image \"{image}\": ErrImagePull: {message}");
        slot.wait("ImagePullBackOff", text);
        self.container_event(index, Level::Normal, "BackOff", format!("Back-off pulling image \"{image}\""));
        self.container_event(index, Level::Warning, "Failed", "Error: ImagePullBackOff");
        self.wake_at(retry);
    }

    /// The image of a container may be changed in a running pod: it is then started anew from the new one.
    pub(super) fn take_images(&mut self) {
        for index in 0..self.slots.len() {
            let Some(image) = self.container(index).and_then(|c| c.image) else { continue };
            let Some(slot) = self.slots.get_mut(index) else { continue };
            if slot.image_ref == image {
                continue;
            }
            slot.image_ref = image;
            slot.pull = Pull::Idle;
            slot.retry_at = None;
            if !slot.is_running() {
                continue;
            }
            let name = slot.name.clone();
            let Some(sandbox) = self.live_sandbox().cloned() else { continue };
            let text = format!("Container {name} definition changed, will be restarted");
            self.kill(&sandbox, index, Instant::now() + self.spec_grace(), &text);
        }
    }

    /// Images of a machine's disks and kernel; `true` once all are here.
    pub(super) fn machine_images_ready(&mut self, references: Vec<(String, Policy)>) -> bool {
        match &self.machine_images {
            Pull::Done(_) => return true,
            Pull::Busy(_) => return false,
            Pull::Failed { retry, .. } if *retry > Instant::now() => {
                let retry = *retry;
                self.wake_at(retry);
                return false;
            }
            Pull::Failed { .. } | Pull::Idle => {}
        }
        let (shared, wake, pod) = (self.shared.clone(), self.wake.clone(), self.pod.clone());
        self.machine_images = Pull::Busy(Task::spawn(async move {
            let mut result = Ok(());
            for (reference, policy) in references {
                result = ensure(&shared, &pod, &reference, policy).await;
                if result.is_err() {
                    break;
                }
            }
            let _ = wake.send(Wake::MachineImages { result }).await;
        }));
        false
    }

    pub(super) fn on_machine_images(&mut self, result: Result<(), ImageError>) {
        match result {
            Ok(()) => self.machine_images = Pull::Done(Box::new(nothing())),
            Err(error) => {
                let now = Instant::now();
                let text = format!("Failed to pull image: {error}");
                self.event(Level::Warning, "Failed", text);
                let reason = reason_of(&error);
                let mut retry = now + Duration::from_secs(10);
                for slot in &mut self.slots {
                    retry = now + slot.pull_delay.take();
                    slot.wait(reason, error.to_string());
                }
                let message = error.to_string();
                self.machine_images = Pull::Failed { since: now, retry, reason, message, announced: true };
            }
        }
        if let super::Stage::Absent { retry, .. } = &mut self.stage {
            *retry = None;
        }
    }
}

/// Stands for "all are here" where no single image is meant.
fn nothing() -> ResolvedImage {
    ResolvedImage {
        reference: String::new(),
        id: String::new(),
        size: 0,
        config: crate::ports::ImageConfig::default(),
        rootfs: crate::boundary::Rootfs::Machine,
    }
}

async fn ensure(
    shared: &Shared,
    pod: &api::k8s::api::core::v1::Pod,
    reference: &str,
    policy: Policy,
) -> Result<(), ImageError> {
    if policy != Policy::Always && shared.images.find(reference).await?.is_some() {
        return Ok(());
    }
    if policy == Policy::Never {
        let message = format!("Container image \"{reference}\" is not present with pull policy of Never");
        return Err(ImageError::Pull { reference: reference.to_owned(), message });
    }
    pull(shared, pod, reference).await.map(drop)
}

async fn pull(
    shared: &Shared,
    pod: &api::k8s::api::core::v1::Pod,
    reference: &str,
) -> Result<ResolvedImage, ImageError> {
    let _permit = shared.pulls.acquire().await;
    let credentials = credentials(shared.client.as_ref(), pod).await;
    shared.images.pull(reference, &credentials).await
}

/// From `imagePullSecrets`; what cannot be read is left out, as kubelet does.
async fn credentials(client: &dyn Client, pod: &api::k8s::api::core::v1::Pod) -> Vec<Credentials> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let mut out = Vec::new();
    for name in pod.spec.iter().flat_map(|s| s.image_pull_secrets.iter().flatten()).map(|r| &r.name) {
        let Ok(object) = client.get(&Resource::new("", "v1", "secrets"), namespace, name).await else { continue };
        let Ok(secret) = Secret::deserialize(&*object) else { continue };
        let data = secret.data.unwrap_or_default();
        if let Some(config) = data.get(".dockerconfigjson") {
            out.extend(docker_config(&config.0));
        } else if let Some(config) = data.get(".dockercfg") {
            out.extend(docker_auths(&config.0));
        }
    }
    out
}

#[derive(Deserialize)]
struct DockerAuth {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    /// base64 of `user:password`.
    #[serde(default)]
    auth: String,
}

fn docker_config(bytes: &[u8]) -> Vec<Credentials> {
    #[derive(Deserialize)]
    struct Config {
        #[serde(default)]
        auths: BTreeMap<String, DockerAuth>,
    }
    serde_json::from_slice::<Config>(bytes).map(|c| auths(c.auths)).unwrap_or_default()
}

fn docker_auths(bytes: &[u8]) -> Vec<Credentials> {
    serde_json::from_slice(bytes).map(auths).unwrap_or_default()
}

fn auths(map: BTreeMap<String, DockerAuth>) -> Vec<Credentials> {
    use base64::Engine;
    let decode = |text: &str| -> Option<(String, String)> {
        let bytes = base64::engine::general_purpose::STANDARD.decode(text.trim()).ok()?;
        let text = String::from_utf8(bytes).ok()?;
        let (user, password) = text.split_once(':')?;
        Some((user.to_owned(), password.to_owned()))
    };
    map.into_iter()
        .filter_map(|(registry, auth)| {
            let (username, password) = match decode(&auth.auth) {
                Some(pair) if !auth.auth.is_empty() => pair,
                _ if !auth.username.is_empty() => (auth.username, auth.password),
                _ => return None,
            };
            let host = registry.trim_start_matches("https://").trim_start_matches("http://");
            let registry = host.split('/').next().unwrap_or(host).to_owned();
            Some(Credentials { registry, username, password })
        })
        .collect()
}

/// References of a machine's images with the policy of each.
pub(super) fn machine_references(images: &[(String, Option<String>)]) -> Vec<(String, Policy)> {
    images.iter().map(|(reference, given)| (reference.clone(), policy(given.as_deref(), reference))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_policies() {
        for (image, want) in [
            ("nginx", Policy::Always),
            ("nginx:latest", Policy::Always),
            ("nginx:1", Policy::IfNotPresent),
            ("127.0.0.1:5000/nginx", Policy::Always),
            ("127.0.0.1:5000/nginx:1", Policy::IfNotPresent),
            ("nginx@sha256:00", Policy::IfNotPresent),
        ] {
            assert_eq!(policy(None, image), want, "{image}");
        }
        assert_eq!(policy(Some("Never"), "nginx"), Policy::Never);
    }

    #[test]
    fn pull_secrets() {
        let config = br#"{"auths": {"https://r.example/v1/": {"auth": "dTpwOnE="}, "b": {"username": "x", "password": "y"}, "c": {}}}"#;
        let found = docker_config(config);
        let of = |c: &Credentials| (c.registry.clone(), c.username.clone(), c.password.clone());
        let found: Vec<_> = found.iter().map(of).collect();
        assert_eq!(
            found,
            [("b".into(), "x".into(), "y".into()), ("r.example".to_owned(), "u".to_owned(), "p:q".to_owned()),]
        );
        assert!(docker_config(b"[").is_empty());
        assert!(docker_auths(br#"{"r": {"auth": "!!"}}"#).is_empty());
    }
}
