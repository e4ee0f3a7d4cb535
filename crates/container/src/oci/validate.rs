//! What a configuration may not ask for, said before anything is made.

use crate::error::{Error, Result};
use crate::namespaces::check_sysctl;
use crate::spec::{Hook, NamespaceKind, Spec};
use std::path::Path;

/// Bounds what a hostile configuration can make of this process.
const MAX_MOUNTS: usize = 4096;
const MAX_DEVICES: usize = 4096;

fn refuse<T>(why: String) -> Result<T> {
    Err(Error::Refused(why))
}

/// For a container that is to be made.
pub fn config(spec: &Spec, rootless: bool) -> Result<()> {
    if !spec.oci_version.starts_with("1.") {
        return refuse(format!("ociVersion: {:?}: 1.x is implemented", spec.oci_version));
    }
    if spec.root.as_ref().is_none_or(|r| r.path.as_os_str().is_empty()) {
        return refuse("root.path: is missing".into());
    }
    if spec.mounts.len() > MAX_MOUNTS || spec.linux.devices.len() > MAX_DEVICES {
        return refuse(format!("mounts and linux.devices: {MAX_MOUNTS} of each are possible"));
    }
    process(&spec.process.cwd, &spec.process.args)?;
    namespaces(spec, rootless)?;
    sysctls(spec)?;
    for (n, mount) in spec.mounts.iter().enumerate() {
        if !mount.destination.is_absolute() {
            return refuse(format!("mounts[{n}].destination: {:?}: must be absolute", mount.destination));
        }
        if mount.uid_mappings.is_empty() != mount.gid_mappings.is_empty() {
            return refuse(format!("mounts[{n}]: uidMappings and gidMappings: either both or none"));
        }
    }
    for (n, device) in spec.linux.devices.iter().enumerate() {
        if !device.path.is_absolute() {
            return refuse(format!("linux.devices[{n}].path: {:?}: must be absolute", device.path));
        }
    }
    for path in spec.linux.masked_paths.iter().chain(&spec.linux.readonly_paths) {
        if !path.is_absolute() {
            return refuse(format!("linux.maskedPaths, readonlyPaths: {path:?}: must be absolute"));
        }
    }
    if spec.linux.intel_rdt.is_some() {
        return refuse("linux.intelRdt: is not supported; leave it out".into());
    }
    hooks(spec)
}

/// For any process.
pub fn process(cwd: &str, args: &[String]) -> Result<()> {
    if !Path::new(cwd).is_absolute() {
        return refuse(format!("process.cwd: {cwd:?}: must be absolute"));
    }
    if args.is_empty() {
        return refuse("process.args: is empty: nothing to run".into());
    }
    Ok(())
}

fn namespaces(spec: &Spec, rootless: bool) -> Result<()> {
    let list = &spec.linux.namespaces;
    for (n, namespace) in list.iter().enumerate() {
        if list.iter().take(n).any(|other| other.kind == namespace.kind) {
            return refuse(format!("linux.namespaces: {:?} is there twice", namespace.kind));
        }
        if namespace.path.as_ref().is_some_and(|p| !p.is_absolute()) {
            return refuse(format!("linux.namespaces: {:?}: path must be absolute", namespace.kind));
        }
    }
    if spec.namespace(NamespaceKind::Mount).is_none_or(|n| n.path.is_some()) {
        return refuse(
            "linux.namespaces: a mount namespace of the container's own is needed: its mounts would be the host's"
                .into(),
        );
    }
    let user = spec.namespace(NamespaceKind::User);
    let mapped = !spec.linux.uid_mappings.is_empty() && !spec.linux.gid_mappings.is_empty();
    if user.is_some_and(|n| n.path.is_none()) && !mapped {
        return refuse("linux.uidMappings and gidMappings: a new user namespace needs both".into());
    }
    if user.is_none() && (mapped || !spec.linux.uid_mappings.is_empty() || !spec.linux.gid_mappings.is_empty()) {
        return refuse("linux.uidMappings and gidMappings: need a user namespace in linux.namespaces".into());
    }
    if rootless && user.is_none() {
        return refuse(
            "linux.namespaces: a plain user needs a user namespace here; atoll oci spec --rootless has one".into(),
        );
    }
    if spec.namespace(NamespaceKind::Uts).is_none() && (spec.hostname.is_some() || spec.domainname.is_some()) {
        return refuse(
            "hostname, domainname: need a uts namespace in linux.namespaces: they would be the host's".into(),
        );
    }
    if !spec.linux.time_offsets.is_empty() {
        if spec.namespace(NamespaceKind::Time).is_none_or(|n| n.path.is_some()) {
            return refuse("linux.timeOffsets: need a new time namespace in linux.namespaces".into());
        }
        if let Some(clock) = spec.linux.time_offsets.keys().find(|c| !matches!(c.as_str(), "monotonic" | "boottime")) {
            return refuse(format!("linux.timeOffsets: {clock:?}: monotonic or boottime"));
        }
    }
    Ok(())
}

fn sysctls(spec: &Spec) -> Result<()> {
    for name in spec.linux.sysctl.keys() {
        if name == "kernel.domainname" && spec.namespace(NamespaceKind::Uts).is_some() {
            continue;
        }
        check_sysctl(name, spec.namespace(NamespaceKind::Network).is_none())
            .map_err(|e| Error::Refused(format!("linux.sysctl: {e}")))?;
        if !name.starts_with("net.") && spec.namespace(NamespaceKind::Ipc).is_none() {
            return refuse(format!("linux.sysctl: {name:?}: needs an ipc namespace in linux.namespaces"));
        }
    }
    Ok(())
}

fn hooks(spec: &Spec) -> Result<()> {
    let Some(hooks) = &spec.hooks else { return Ok(()) };
    let check = |kind: &str, list: &[Hook]| {
        for (n, hook) in list.iter().enumerate() {
            if !hook.path.is_absolute() {
                return refuse(format!("hooks.{kind}[{n}].path: {:?}: must be absolute", hook.path));
            }
            if hook.timeout.is_some_and(|t| t <= 0) {
                return refuse(format!("hooks.{kind}[{n}].timeout: must be above zero"));
            }
        }
        Ok(())
    };
    check("prestart", &hooks.prestart)?;
    check("createRuntime", &hooks.create_runtime)?;
    check("createContainer", &hooks.create_container)?;
    check("startContainer", &hooks.start_container)?;
    check("poststart", &hooks.poststart)?;
    check("poststop", &hooks.poststop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn base() -> Value {
        json!({"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "process": {"cwd": "/", "args": ["sh"]},
            "linux": {"namespaces": [{"type": "mount"}, {"type": "uts"}, {"type": "network"}, {"type": "ipc"}]}})
    }

    #[track_caller]
    fn refused(change: impl FnOnce(&mut Value), named: &str) {
        let mut text = base();
        change(&mut text);
        let spec: Spec = serde_json::from_value(text).expect("parses");
        let e = config(&spec, false).expect_err(named);
        assert!(e.to_string().contains(named), "{named}: {e}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        config(&serde_json::from_value(base()).expect("parses"), false).expect("good");
        refused(|c| c["ociVersion"] = json!("2.0.0"), "ociVersion");
        refused(|c| c["root"] = json!({}), "root.path");
        refused(|c| c["process"]["cwd"] = json!("x"), "process.cwd");
        refused(|c| c["process"]["args"] = json!([]), "process.args");
        refused(|c| c["linux"]["namespaces"] = json!([]), "mount namespace");
        refused(|c| c["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "mount"}]), "twice");
        refused(|c| c["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "user"}]), "uidMappings");
        refused(|c| c["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 1, "size": 1}]), "user namespace");
        refused(
            |c| {
                c["linux"]["namespaces"] = json!([{"type": "mount"}]);
                c["hostname"] = json!("h");
            },
            "uts namespace",
        );
        refused(|c| c["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1}}), "time namespace");
        refused(|c| c["linux"]["sysctl"] = json!({"kernel.core_pattern": "|/x"}), "core_pattern");
        refused(|c| c["linux"]["sysctl"] = json!({"vm.swappiness": "1"}), "vm.swappiness");
        refused(|c| c["mounts"] = json!([{"destination": "x"}]), "mounts[0].destination");
        refused(|c| c["linux"]["devices"] = json!([{"path": "x", "type": "c"}]), "linux.devices[0]");
        refused(|c| c["linux"]["intelRdt"] = json!({"closID": "x"}), "intelRdt");
        refused(|c| c["linux"]["maskedPaths"] = json!(["x"]), "maskedPaths");
        refused(|c| c["hooks"] = json!({"prestart": [{"path": "x"}]}), "hooks.prestart[0].path");
        refused(|c| c["hooks"] = json!({"poststop": [{"path": "/x", "timeout": 0}]}), "hooks.poststop[0].timeout");
        let spec: Spec = serde_json::from_value(base()).expect("parses");
        assert!(config(&spec, true).expect_err("rootless").to_string().contains("user namespace"));
    }
}
