//! `features` and `spec`: what this runtime can do, and a configuration to begin with.

use super::args::Args;
use super::print;
use crate::error::{During, Error, Result};
use crate::hooks::OCI_VERSION;
use crate::process::all_capabilities;
use crate::rootfs::options::KNOWN;
use crate::seccomp;
use crate::spec::{MASKED_PATHS, READONLY_PATHS};
use serde_json::{Value, json};
use std::path::Path;

/// features.md of the specification.
pub fn features() -> Result<i32> {
    let names = |list: &[(&str, u32)]| list.iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>();
    let flags: Vec<&str> = seccomp::FLAGS.iter().map(|(name, _)| *name).collect();
    let features = json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": KNOWN,
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "capabilities": all_capabilities(),
            "cgroup": {"v1": true, "v2": true, "systemd": true, "systemdUser": true, "rdma": true},
            "seccomp": {
                "enabled": true,
                "actions": names(seccomp::ACTIONS),
                "operators": seccomp::OPERATORS,
                "archs": seccomp::ARCHITECTURES,
                "knownFlags": flags,
                "supportedFlags": flags,
            },
            "apparmor": {"enabled": true},
            "selinux": {"enabled": true},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": true}},
        },
        "annotations": {},
        "potentiallyUnsafeConfigAnnotations": [],
    });
    Ok(print(&format!("{features:#}\n")))
}

pub fn spec(args: &[String]) -> Result<i32> {
    let (args, rest) = Args::parse(args, &["bundle", "b"], &["rootless"])?;
    if let [extra, ..] = rest {
        return Err(Error::Refused(format!("{extra:?}: spec takes no words")));
    }
    let path = Path::new(args.get("bundle").or(args.get("b")).unwrap_or(".")).join("config.json");
    let text = format!("{:#}\n", default_config(args.has("rootless")));
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&path)
        .during(|| format!("{} (an existing one is kept)", path.display()))?;
    std::io::Write::write_all(&mut file, text.as_bytes()).during(|| format!("writing {}", path.display()))?;
    Ok(0)
}

fn default_config(rootless: bool) -> Value {
    let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    let kinds = ["pid", "network", "ipc", "uts", "mount", "cgroup"];
    let mut namespaces: Vec<Value> = kinds.iter().map(|kind| json!({"type": kind})).collect();
    let mut linux = json!({
        "resources": {"devices": [{"allow": false, "access": "rwm"}]},
        "maskedPaths": MASKED_PATHS,
        "readonlyPaths": READONLY_PATHS,
    });
    let mut devpts = vec!["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"];
    let mut sys = json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]});
    if rootless {
        namespaces.retain(|n| n["type"] != "network");
        namespaces.push(json!({"type": "user"}));
        let map = |id: u32| json!([{"containerID": 0, "hostID": id, "size": 1}]);
        linux["uidMappings"] = map(rustix::process::geteuid().as_raw());
        linux["gidMappings"] = map(rustix::process::getegid().as_raw());
        linux["resources"] = json!({});
        // The host's network is not this user's to show, but its /sys may be bound.
        sys = json!({"destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "nosuid", "noexec", "nodev", "ro"]});
    } else {
        devpts.push("gid=5");
    }
    linux["namespaces"] = json!(namespaces);
    json!({
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": true,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "atoll",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": devpts},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            sys,
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
        ],
        "linux": linux,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_configuration_is_a_good_one() {
        for rootless in [false, true] {
            let spec = serde_json::from_value(default_config(rootless)).expect("parses");
            crate::oci::validate::config(&spec, rootless).expect("valid");
        }
    }
}
