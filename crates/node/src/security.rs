//! Who a container runs as and what it may do: pod and container security contexts over the image's `USER`.

use crate::boundary::{Rootfs, Security};
use crate::layers;
use api::k8s::api::core::v1::{Container, PodSpec};
use container::process::DEFAULT_CAPABILITIES;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// All capabilities of Linux 6 (`capabilities(7)`).
const ALL_CAPABILITIES: &[&str] = &[
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_AUDIT_WRITE",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_KILL",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_RAW",
    "CAP_PERFMON",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_CHROOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
];

const PASSWD_LIMIT: u64 = 1 << 20;
/// Ids inside a pod's range.
const MAX_ID: u32 = 65_535;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum SecurityError {
    #[error("container has runAsNonRoot and image will run as root (container: {container})")]
    RunsAsRoot { container: String },
    #[error("image's USER \"{user}\": no such {what} in the image's {file}")]
    UnknownUser { user: String, what: &'static str, file: &'static str },
    #[error("{field}: {value} is outside the pod's range of ids, 0 to 65535")]
    IdOutOfRange { field: &'static str, value: i64 },
    #[error("securityContext.capabilities: \"{0}\" is not a Linux capability")]
    UnknownCapability(String),
    #[error("securityContext.seccompProfile.type: \"{0}\" is not supported; use RuntimeDefault or Unconfined")]
    Seccomp(String),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Identity {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    home: Option<String>,
}

/// What was resolved for a container: its [`Security`] and its user's home directory.
#[derive(Clone, Debug)]
pub(crate) struct Resolved {
    pub security: Security,
    pub home: Option<String>,
}

/// Whether any container asks for the host's user namespace.
pub(crate) fn host_users(spec: &PodSpec) -> bool {
    spec.host_users == Some(true)
        || spec
            .containers
            .iter()
            .chain(spec.init_containers.iter().flatten())
            .any(|c| c.security_context.as_ref().and_then(|s| s.privileged) == Some(true))
}

/// Reads the image's user database, so it blocks for a few small reads.
pub(crate) fn resolve(
    spec: &PodSpec,
    container: &Container,
    image_user: &str,
    rootfs: &Rootfs,
) -> Result<Resolved, SecurityError> {
    let own = container.security_context.clone().unwrap_or_default();
    let pod = spec.security_context.clone().unwrap_or_default();
    let layers: &[PathBuf] = match rootfs {
        Rootfs::Layers { layers, .. } => layers,
        Rootfs::Component { .. } | Rootfs::Machine => &[],
    };
    let users = Users::read(layers);
    let mut who = match own.run_as_user.or(pod.run_as_user) {
        Some(uid) => users.by_uid(id("runAsUser", uid)?),
        None => users.by_image_user(image_user)?,
    };
    if let Some(gid) = own.run_as_group.or(pod.run_as_group) {
        who.gid = id("runAsGroup", gid)?;
    }
    if own.run_as_non_root.or(pod.run_as_non_root) == Some(true) && who.uid == 0 {
        return Err(SecurityError::RunsAsRoot { container: container.name.clone() });
    }
    let mut groups: BTreeSet<u32> = match pod.supplemental_groups_policy.as_deref() {
        Some("Strict") => BTreeSet::new(),
        _ => who.groups.iter().copied().collect(),
    };
    for group in pod.supplemental_groups.iter().flatten() {
        groups.insert(id("supplementalGroups", *group)?);
    }
    if let Some(group) = pod.fs_group {
        groups.insert(id("fsGroup", group)?);
    }
    groups.remove(&who.gid);
    let privileged = own.privileged == Some(true);
    let capabilities = capabilities(&own.capabilities.unwrap_or_default(), privileged)?;
    let seccomp = own.seccomp_profile.or(pod.seccomp_profile);
    let seccomp_unconfined = match seccomp.as_ref().map(|p| p.type_.as_str()) {
        None | Some("RuntimeDefault") => privileged,
        Some("Unconfined") => true,
        Some(other) => return Err(SecurityError::Seccomp(other.to_owned())),
    };
    let may_gain = own.allow_privilege_escalation.unwrap_or(false);
    let no_new_privileges = !(privileged || may_gain || capabilities.iter().any(|c| c == "CAP_SYS_ADMIN"));
    Ok(Resolved {
        security: Security {
            uid: who.uid,
            gid: who.gid,
            groups: groups.into_iter().collect(),
            privileged,
            no_new_privileges,
            read_only_root: own.read_only_root_filesystem == Some(true),
            capabilities,
            seccomp_unconfined,
        },
        home: who.home,
    })
}

fn id(field: &'static str, value: i64) -> Result<u32, SecurityError> {
    u32::try_from(value).ok().filter(|v| *v <= MAX_ID).ok_or(SecurityError::IdOutOfRange { field, value })
}

fn capabilities(
    wanted: &api::k8s::api::core::v1::Capabilities,
    privileged: bool,
) -> Result<Vec<String>, SecurityError> {
    if privileged {
        return Ok(ALL_CAPABILITIES.iter().map(|c| (*c).to_owned()).collect());
    }
    let full = |name: &String| -> Result<Option<&'static str>, SecurityError> {
        let upper = name.to_ascii_uppercase();
        if upper == "ALL" {
            return Ok(None);
        }
        let want = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
        let found = ALL_CAPABILITIES.iter().find(|c| **c == want);
        found.map(|c| Some(*c)).ok_or_else(|| SecurityError::UnknownCapability(name.clone()))
    };
    let add = wanted.add.iter().flatten().map(full).collect::<Result<Vec<_>, _>>()?;
    let drop = wanted.drop.iter().flatten().map(full).collect::<Result<Vec<_>, _>>()?;
    let mut set: BTreeSet<&'static str> = DEFAULT_CAPABILITIES.iter().copied().collect();
    if add.contains(&None) {
        set.extend(ALL_CAPABILITIES);
    }
    if drop.contains(&None) {
        set.clear();
        if add.contains(&None) {
            set.extend(ALL_CAPABILITIES);
        }
    }
    for cap in add.iter().flatten() {
        set.insert(cap);
    }
    for cap in drop.iter().flatten() {
        set.remove(cap);
    }
    Ok(set.into_iter().map(str::to_owned).collect())
}

/// The image's `/etc/passwd` and `/etc/group`.
struct Users {
    passwd: String,
    group: String,
}

impl Users {
    fn read(layers: &[PathBuf]) -> Self {
        let text = |path: &str| layers::read_text(layers, Path::new(path), PASSWD_LIMIT).unwrap_or_default();
        Users { passwd: text("etc/passwd"), group: text("etc/group") }
    }

    /// name, uid, gid, home
    fn entries(&self) -> impl Iterator<Item = (&str, u32, u32, &str)> {
        self.passwd.lines().filter_map(|line| {
            let mut f = line.split(':');
            let (name, _, uid, gid, _, home) = (f.next()?, f.next()?, f.next()?, f.next()?, f.next()?, f.next()?);
            Some((name, uid.parse().ok()?, gid.parse().ok()?, home))
        })
    }
    /// name, gid, members
    fn groups(&self) -> impl Iterator<Item = (&str, u32, &str)> {
        self.group.lines().filter_map(|line| {
            let mut f = line.split(':');
            let (name, _, gid) = (f.next()?, f.next()?, f.next()?);
            Some((name, gid.parse().ok()?, f.next().unwrap_or_default()))
        })
    }
    fn groups_of(&self, user: &str) -> Vec<u32> {
        let mine = self.groups().filter(|(_, gid, members)| *gid <= MAX_ID && members.split(',').any(|m| m == user));
        mine.map(|(_, gid, _)| gid).take(256).collect()
    }
    fn by_uid(&self, uid: u32) -> Identity {
        match self.entries().find(|e| e.1 == uid && e.2 <= MAX_ID) {
            Some((name, uid, gid, home)) => {
                Identity { uid, gid, groups: self.groups_of(name), home: Some(home.to_owned()) }
            }
            None => Identity { uid, home: (uid == 0).then(|| "/root".to_owned()), ..Identity::default() },
        }
    }
    /// `""`, `uid`, `name`, `uid:gid`, `name:group` (OCI image spec, `config.User`).
    fn by_image_user(&self, text: &str) -> Result<Identity, SecurityError> {
        let (user, group) = text.split_once(':').map_or((text, ""), |(u, g)| (u, g));
        let unknown = |what, file| SecurityError::UnknownUser { user: text.to_owned(), what, file };
        let mut who = if user.is_empty() {
            self.by_uid(0)
        } else if let Ok(uid) = user.parse::<u32>() {
            self.by_uid(id("image's USER", i64::from(uid))?)
        } else {
            let found = self.entries().find(|e| e.0 == user).map(|e| e.1);
            let uid = match found {
                Some(uid) => uid,
                None if user == "root" => 0,
                None => return Err(unknown("user", "/etc/passwd")),
            };
            let mut who = self.by_uid(id("image's USER", i64::from(uid))?);
            who.groups = self.groups_of(user);
            who
        };
        if !group.is_empty() {
            let gid = match group.parse::<u32>() {
                Ok(gid) => gid,
                Err(_) => match self.groups().find(|g| g.0 == group).map(|g| g.1) {
                    Some(gid) => gid,
                    None if group == "root" => 0,
                    None => return Err(unknown("group", "/etc/group")),
                },
            };
            who.gid = id("image's USER", i64::from(gid))?;
            who.groups.clear();
        }
        Ok(who)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn image() -> (tempfile::TempDir, Rootfs) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(
            dir.path().join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nweb:x:101:102::/srv:/bin/sh\nbad\nbig:x:70000:1::/:/\n",
        )
        .unwrap();
        std::fs::write(dir.path().join("etc/group"), "root:x:0:\nweb:x:102:\nextra:x:7:web,x\n").unwrap();
        let rootfs = Rootfs::Layers { image: "i".into(), layers: vec![dir.path().to_owned()] };
        (dir, rootfs)
    }

    fn go(pod: serde_json::Value, own: serde_json::Value, user: &str) -> Result<Resolved, SecurityError> {
        let (_keep, rootfs) = image();
        let spec: PodSpec = serde_json::from_value(json!({"securityContext": pod, "containers": [
            {"name": "c", "securityContext": own}]}))
        .unwrap();
        resolve(&spec, &spec.containers[0], user, &rootfs)
    }

    #[test]
    fn users() {
        let s = |pod, own, user: &str| go(pod, own, user).map(|r| (r.security.uid, r.security.gid, r.security.groups));
        assert_eq!(s(json!({}), json!({}), ""), Ok((0, 0, vec![])));
        assert_eq!(s(json!({}), json!({}), "web"), Ok((101, 102, vec![7])));
        assert_eq!(s(json!({}), json!({}), "101"), Ok((101, 102, vec![7])));
        assert_eq!(s(json!({}), json!({}), "web:extra"), Ok((101, 7, vec![])));
        assert_eq!(s(json!({}), json!({}), "9:9"), Ok((9, 9, vec![])));
        assert_eq!(s(json!({"runAsUser": 5}), json!({"runAsUser": 6, "runAsGroup": 8}), "web"), Ok((6, 8, vec![])));
        assert_eq!(s(json!({"fsGroup": 9, "supplementalGroups": [3]}), json!({}), "5"), Ok((5, 0, vec![3, 9])));
        assert!(matches!(s(json!({}), json!({}), "nobody"), Err(SecurityError::UnknownUser { .. })));
        assert!(matches!(s(json!({}), json!({}), "big"), Err(SecurityError::IdOutOfRange { .. })));
        assert!(matches!(s(json!({"runAsUser": 70000}), json!({}), ""), Err(SecurityError::IdOutOfRange { .. })));
        assert!(matches!(s(json!({"runAsNonRoot": true}), json!({}), ""), Err(SecurityError::RunsAsRoot { .. })));
        assert!(s(json!({"runAsNonRoot": true}), json!({}), "web").is_ok());
    }

    proptest::proptest! {
        #[test]
        fn foreign_user_databases_never_panic(passwd in "[a-z0-9:\\n,]{0,200}", group in "[a-z0-9:\\n,]{0,200}", user in "[a-z0-9:]{0,12}") {
            let users = Users { passwd, group };
            if let Ok(who) = users.by_image_user(&user) {
                proptest::prop_assert!(who.uid <= MAX_ID && who.gid <= MAX_ID && who.groups.iter().all(|g| *g <= MAX_ID));
            }
        }
    }

    #[test]
    fn powers() {
        let base = go(json!({}), json!({}), "").unwrap().security;
        assert!(base.no_new_privileges && !base.seccomp_unconfined && !base.privileged);
        assert!(!base.capabilities.iter().any(|c| c == "CAP_NET_RAW"));
        let drop = go(json!({}), json!({"capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}}), "").unwrap();
        assert_eq!(drop.security.capabilities, ["CAP_NET_BIND_SERVICE"]);
        let bad = go(json!({}), json!({"capabilities": {"add": ["FLY"]}}), "").unwrap_err();
        assert_eq!(bad, SecurityError::UnknownCapability("FLY".into()));
        let privileged = go(json!({}), json!({"privileged": true}), "").unwrap().security;
        assert!(privileged.privileged && privileged.seccomp_unconfined && !privileged.no_new_privileges);
        let p = go(json!({"seccompProfile": {"type": "Unconfined"}}), json!({}), "").unwrap().security;
        assert!(p.seccomp_unconfined);
        let own = json!({"seccompProfile": {"type": "RuntimeDefault"}});
        assert!(!go(json!({"seccompProfile": {"type": "Unconfined"}}), own, "").unwrap().security.seccomp_unconfined);
        assert!(go(json!({"seccompProfile": {"type": "Localhost"}}), json!({}), "").is_err());
    }
}
