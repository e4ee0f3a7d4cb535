//! Volumes of a pod.

use super::field::{Problems, at, int, items, present, text};
use crate::names;
use serde_json::Value;
use std::collections::HashSet;

/// Every kind of volume Kubernetes knows; which of them a node can provide is the node's to say.
const SOURCES: [&str; 31] = [
    "emptyDir",
    "hostPath",
    "configMap",
    "secret",
    "projected",
    "downwardAPI",
    "image",
    "persistentVolumeClaim",
    "ephemeral",
    "csi",
    "nfs",
    "iscsi",
    "fc",
    "rbd",
    "cephfs",
    "cinder",
    "glusterfs",
    "flexVolume",
    "flocker",
    "gcePersistentDisk",
    "awsElasticBlockStore",
    "azureDisk",
    "azureFile",
    "gitRepo",
    "vsphereVolume",
    "quobyte",
    "photonPersistentDisk",
    "portworxVolume",
    "scaleIO",
    "storageos",
    "serviceAccount",
];

/// Checks the volumes and returns their names.
pub fn validate<'a>(p: &mut Problems, path: &str, volumes: &'a [Value]) -> HashSet<&'a str> {
    let mut seen = HashSet::new();
    for (index, volume) in volumes.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let name = text(volume, "name");
        if name.is_empty() {
            p.required(&format!("{path}.name"), "");
        } else {
            p.rule(&format!("{path}.name"), name, names::dns_label);
        }
        if !seen.insert(name) {
            p.duplicate(&format!("{path}.name"), &name.into());
        }
        source(p, &path, volume);
    }
    seen
}

fn source(p: &mut Problems, path: &str, volume: &Value) {
    let given = present(volume, &SOURCES);
    if given.is_empty() {
        p.required(path, "must specify a volume type");
    }
    for extra in given.iter().skip(1) {
        p.forbidden(&format!("{path}.{extra}"), "may not specify more than 1 volume type");
    }
    let Some(kind) = given.first() else { return };
    let (path, value) = (format!("{path}.{kind}"), at(volume, kind));
    match *kind {
        "hostPath" => host_path(p, &path, value),
        "configMap" | "secret" => {
            let field = if *kind == "secret" { "secretName" } else { "name" };
            if text(value, field).is_empty() {
                p.required(&format!("{path}.{field}"), "");
            }
            files(p, &path, value);
        }
        "downwardAPI" => files(p, &path, value),
        "projected" => {
            mode(p, &format!("{path}.defaultMode"), int(value, "defaultMode"));
            for (index, source) in items(value, "sources").iter().enumerate() {
                projection(p, &format!("{path}.sources[{index}]"), source);
            }
        }
        "emptyDir" => {
            if let Ok(size) = crate::quantity::Quantity::from_value(at(value, "sizeLimit"))
                && size.is_negative()
            {
                p.forbidden(&format!("{path}.sizeLimit"), "SizeLimit field must be a valid resource quantity");
            }
        }
        _ => {}
    }
}

fn projection(p: &mut Problems, path: &str, source: &Value) {
    let given = present(source, &["secret", "configMap", "downwardAPI", "serviceAccountToken", "clusterTrustBundle"]);
    if given.len() > 1 {
        p.forbidden(path, "may not specify more than 1 volume type");
    }
    let Some(kind) = given.first() else {
        p.required(path, "must specify a volume type");
        return;
    };
    let (path, value) = (format!("{path}.{kind}"), at(source, kind));
    match *kind {
        "secret" | "configMap" if text(value, "name").is_empty() => p.required(&format!("{path}.name"), ""),
        "serviceAccountToken" => {
            let seconds = int(value, "expirationSeconds").unwrap_or(3600);
            if seconds < 600 {
                let detail = "may not specify a duration less than 10 minutes";
                p.invalid(&format!("{path}.expirationSeconds"), &seconds.into(), detail);
            }
            relative(p, &format!("{path}.path"), text(value, "path"));
        }
        _ => {}
    }
    files(p, &path, value);
}

/// `items` and `defaultMode` of a volume made of keys.
fn files(p: &mut Problems, path: &str, value: &Value) {
    mode(p, &format!("{path}.defaultMode"), int(value, "defaultMode"));
    for (index, item) in items(value, "items").iter().enumerate() {
        let path = format!("{path}.items[{index}]");
        relative(p, &format!("{path}.path"), text(item, "path"));
        mode(p, &format!("{path}.mode"), int(item, "mode"));
        let fields = present(item, &["fieldRef", "resourceFieldRef"]);
        if fields.len() > 1 {
            p.invalid_text(&path, "resource", "fieldRef and resourceFieldRef can not be specified simultaneously");
        }
    }
}

fn mode(p: &mut Problems, path: &str, mode: Option<i64>) {
    if let Some(mode) = mode.filter(|mode| !(0..=0o777).contains(mode)) {
        p.invalid(path, &mode.into(), "must be a number between 0 and 0777 (octal), both inclusive");
    }
}

/// A path inside a volume: relative, without `..`.
pub fn relative(p: &mut Problems, path: &str, value: &str) {
    if value.is_empty() {
        p.required(path, "");
    }
    inside(p, path, value);
}

/// Like [`relative`], but empty is fine.
pub fn inside(p: &mut Problems, path: &str, value: &str) {
    if value.starts_with('/') {
        p.invalid_text(path, value, "must be a relative path");
    }
    no_way_up(p, path, value);
}

fn no_way_up(p: &mut Problems, path: &str, value: &str) {
    if value.split('/').any(|part| part == "..") {
        p.invalid_text(path, value, "must not contain '..'");
    }
}

fn host_path(p: &mut Problems, path: &str, value: &Value) {
    let host = text(value, "path");
    if host.is_empty() {
        p.required(&format!("{path}.path"), "");
    }
    no_way_up(p, &format!("{path}.path"), host);
    let kinds = ["DirectoryOrCreate", "Directory", "FileOrCreate", "File", "Socket", "CharDevice", "BlockDevice"];
    p.one_of(&format!("{path}.type"), text(value, "type"), &kinds);
}
