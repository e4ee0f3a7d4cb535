//! Annotations of pods, and of what pods are made from, that the network and machines' disks read.

use super::field::{Problems, at};
use crate::bandwidth::{self, DISK_BANDWIDTH, DISK_OPERATIONS, EGRESS, INGRESS};
use crate::networks::NETWORK;
use crate::sleep::{ASLEEP, Sleep};
use serde_json::Value;

/// Checks the annotations at `path`. What `old` has too has been taken before, and stays.
pub fn validate(p: &mut Problems, path: &str, annotations: &Value, old: &Value) {
    for key in [INGRESS, EGRESS, DISK_BANDWIDTH, DISK_OPERATIONS, ASLEEP] {
        let wrong = |text: &str| match key {
            INGRESS | EGRESS => bandwidth::parse(text).err(),
            ASLEEP => Sleep::of_pod(text).err(),
            _ => bandwidth::parse_disks(key, text).err(),
        };
        if let Some(text) = at(annotations, key).as_str()
            && at(old, key).as_str() != Some(text)
            && let Some(detail) = wrong(text)
        {
            p.invalid_text(&format!("{path}[{key}]"), text, &detail);
        }
    }
    if let Some(name) = at(annotations, NETWORK).as_str()
        && at(old, NETWORK).as_str() != Some(name)
    {
        p.optional_rule(&format!("{path}[{NETWORK}]"), name, crate::names::dns_subdomain);
    }
}

/// A pod has its address for life.
pub fn validate_pod_update(p: &mut Problems, new: &Value, old: &Value) {
    if at(new, NETWORK) != at(old, NETWORK) {
        let detail = "may not be changed: a pod's address is for its life; make a new pod";
        p.forbidden(&format!("metadata.annotations[{NETWORK}]"), detail);
    }
}
