//! The limits that a pod's annotations set to what it sends and receives.

use super::{Sandbox, Worker};
use crate::events::Level;
use crate::ports::Bandwidth;
use api::bandwidth::{EGRESS, INGRESS, parse};
use api::object::{Meta, Object};

/// What the annotations ask for, or what is wrong with them.
pub(super) fn wanted(pod: &Object) -> Result<Bandwidth, String> {
    let limit = |key: &str| match pod.annotation(key) {
        Some(text) => parse(text).map(Some).map_err(|why| format!("metadata.annotations[{key}]: {text:?}: {why}")),
        None => Ok(None),
    };
    Ok(Bandwidth { ingress: limit(INGRESS)?, egress: limit(EGRESS)? })
}

impl Worker {
    /// Brings a running pod's limits up to its annotations.
    pub(super) async fn update_bandwidth(&mut self, sandbox: &Sandbox) {
        if sandbox.spec.network.host {
            return;
        }
        let wanted = match wanted(&self.object) {
            Ok(wanted) if self.bandwidth == Some(wanted) => return,
            Ok(wanted) => wanted,
            // The API took it before it knew better; the limits stay as they are.
            Err(_) => return,
        };
        match self.shared.networks.set_bandwidth(&self.uid, wanted).await {
            Ok(()) => self.bandwidth = Some(wanted),
            Err(error) => self.event(Level::Warning, "FailedBandwidth", error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn limits_are_read_and_nonsense_is_named() {
        let pod = |value: &str| json!({"metadata": {"annotations": {INGRESS: value, "other": "x"}}});
        assert_eq!(wanted(&pod("10M")), Ok(Bandwidth { ingress: Some(10_000_000), egress: None }));
        assert_eq!(wanted(&json!({"metadata": {}})), Ok(Bandwidth::default()));
        let error = wanted(&pod("fast")).unwrap_err();
        assert!(error.starts_with("metadata.annotations[kubernetes.io/ingress-bandwidth]: \"fast\": "), "{error}");
    }
}
