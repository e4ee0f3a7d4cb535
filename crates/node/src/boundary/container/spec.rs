//! From a pod's sandbox and container to what the shim is asked for: the OCI runtime specification's terms.

use super::*;
use ::container::process::Confinement;
use ::container::spec as oci;
use oci::{Capabilities, IdMapping, Linux, Process, Root, Spec, User};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// Ids of a pod's range.
const RANGE: u32 = 65_536;
const CPU_PERIOD: u64 = 100_000;
/// Device nodes that a privileged container is given besides the usual ones.
const MAX_DEVICES: usize = 512;

pub fn sandbox(sandbox: &SandboxSpec, dir: PathBuf, host_netns: Option<PathBuf>) -> protocol::Sandbox {
    let network = match (sandbox.network.host, &sandbox.network.netns, host_netns) {
        (true, _, Some(path)) => protocol::Network::At(path),
        (true, _, None) => protocol::Network::Host,
        (false, Some(path), _) => protocol::Network::At(path.clone()),
        (false, None, _) => protocol::Network::New,
    };
    protocol::Sandbox {
        title: format!("{}/{}", sandbox.namespace, sandbox.name),
        dir,
        run_dir: sandbox.run_dir.clone(),
        hostname: sandbox.hostname.clone(),
        id_map: (sandbox.id_base != 0).then_some(IdMapping { container_id: 0, host_id: sandbox.id_base, size: RANGE }),
        network,
        host_network: sandbox.network.host,
        cgroup: PathBuf::from(&sandbox.cgroup),
        resources: resources(&sandbox.limits),
        sysctl: sandbox.sysctls.clone(),
        share_pid: sandbox.share_pid,
        // Of those on the host's network each container is asked for by itself: a privileged one may reach the host's.
        scoped: !sandbox.network.host,
    }
}

pub fn start(sandbox: &SandboxSpec, container: &ContainerSpec) -> Result<protocol::Start> {
    let Rootfs::Layers { layers, .. } = &container.rootfs else {
        return Err(BoundaryError::Refused {
            reason: "CreateContainerError".into(),
            message: format!(
                "container {}: its image holds no root file system; a WebAssembly component needs runtimeClassName: wasm",
                container.name
            ),
        });
    };
    let security = &container.security;
    let spec = Spec {
        root: Some(Root { path: PathBuf::new(), readonly: security.read_only_root }),
        process: process(container),
        mounts: mounts(sandbox, container),
        linux: Linux {
            resources: oci::Resources {
                devices: if security.privileged { Vec::new() } else { ::container::cgroup::default_rules() },
                ..resources(&container.resources)
            },
            masked_paths: paths(if security.privileged { &[] } else { oci::MASKED_PATHS }),
            readonly_paths: paths(if security.privileged { &[] } else { oci::READONLY_PATHS }),
            ..Default::default()
        },
        ..Default::default()
    };
    Ok(protocol::Start {
        name: container.name.clone(),
        attempt: container.attempt,
        spec,
        layers: layers.clone(),
        confinement: Confinement {
            seccomp_unconfined: security.seccomp_unconfined || security.privileged,
            scope_abstract_sockets: sandbox.network.host && !security.privileged,
        },
        stdin: container.stdin,
        stdin_once: container.stdin_once,
        log_path: container.log_path.clone(),
        log_max_bytes: container.log_max_bytes,
    })
}

fn paths(list: &[&str]) -> Vec<PathBuf> {
    list.iter().map(PathBuf::from).collect()
}

fn process(container: &ContainerSpec) -> Process {
    let security = &container.security;
    let set =
        if security.privileged { ::container::process::all_capabilities() } else { security.capabilities.clone() };
    Process {
        terminal: container.tty,
        console_size: None,
        user: User { uid: security.uid, gid: security.gid, umask: None, additional_gids: security.groups.clone() },
        args: container.args.clone(),
        env: container.env.iter().map(|(name, value)| format!("{name}={value}")).collect(),
        cwd: if container.cwd.is_empty() { "/".into() } else { container.cwd.clone() },
        capabilities: Some(Capabilities {
            bounding: set.clone(),
            effective: set.clone(),
            permitted: set,
            ..Default::default()
        }),
        rlimits: Vec::new(),
        no_new_privileges: security.no_new_privileges,
        oom_score_adj: None,
        ..Default::default()
    }
}

pub(in crate::boundary) fn resources(wanted: &Resources) -> oci::Resources {
    let shares = (wanted.cpu_request_milli * 1024 / 1000).clamp(2, 262_144);
    // The kernel's least quota is a millisecond.
    let quota = wanted.cpu_limit_milli.map(|milli| (milli * CPU_PERIOD / 1000).max(1000));
    oci::Resources {
        memory: wanted.memory_limit.map(|limit| oci::Memory { limit: i64::try_from(limit).ok(), ..Default::default() }),
        cpu: Some(oci::Cpu {
            shares: Some(shares),
            quota: quota.and_then(|q| i64::try_from(q).ok()),
            period: quota.map(|_| CPU_PERIOD),
            ..Default::default()
        }),
        pids: wanted.pids_limit.map(|limit| oci::Pids { limit: i64::try_from(limit).ok() }),
        ..Default::default()
    }
}

/// The usual ones, then the pod's, outer ones first; what the pod mounts over a usual one replaces it.
fn mounts(sandbox: &SandboxSpec, container: &ContainerSpec) -> Vec<oci::Mount> {
    let privileged = container.security.privileged;
    let mut all = oci::default_mounts();
    all.retain(|usual| !container.mounts.iter().any(|own| own.target == usual.destination));
    if privileged {
        for mount in all.iter_mut().filter(|m| m.destination.starts_with("/sys")) {
            mount.options.retain(|o| o != "ro");
            mount.options.push("rw".into());
        }
        if sandbox.id_base == 0 && !container.mounts.iter().any(|m| m.target == Path::new("/dev")) {
            all.extend(host_devices());
        }
    }
    let mut own: Vec<&Mount> = container.mounts.iter().collect();
    own.sort_by_key(|m| m.target.components().count());
    all.extend(own.into_iter().map(|m| mount(m, privileged)));
    all
}

/// Device nodes work only for privileged containers, wherever they come from.
fn mount(mount: &Mount, privileged: bool) -> oci::Mount {
    let (kind, source, mut options): (&str, PathBuf, Vec<String>) = match &mount.source {
        MountSource::Pod(path) => ("bind", path.clone(), vec!["bind".into(), "idmap".into(), "nodev".into()]),
        MountSource::Host(path) => {
            ("bind", path.clone(), vec!["rbind".into(), if privileged { "dev" } else { "nodev" }.into()])
        }
        MountSource::Tmpfs { size, mode } => {
            let mut options = vec!["nosuid".into(), "nodev".into(), format!("mode={mode:o}")];
            options.extend(size.map(|size| format!("size={size}")));
            ("tmpfs", "tmpfs".into(), options)
        }
    };
    options.push(if mount.read_only { "ro" } else { "rw" }.into());
    let propagation = match mount.propagation.as_str() {
        "HostToContainer" => "rslave",
        "Bidirectional" => "rshared",
        _ => "rprivate",
    };
    options.push(propagation.into());
    oci::Mount {
        destination: mount.target.clone(),
        kind: Some(kind.into()),
        source: Some(source),
        options,
        ..Default::default()
    }
}

/// All device nodes of the host's `/dev`, two levels deep.
fn host_devices() -> Vec<oci::Mount> {
    let usual = ["null", "zero", "full", "random", "urandom", "tty", "console", "ptmx"];
    let mut found = Vec::new();
    let mut directories = vec![(PathBuf::from("/dev"), 0)];
    while let Some((directory, depth)) = directories.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            let (path, Ok(kind)) = (entry.path(), entry.file_type()) else { continue };
            let of_its_own = ["/dev/pts", "/dev/shm", "/dev/mqueue"].iter().any(|p| path == Path::new(p));
            if kind.is_dir() && depth < 1 && !of_its_own {
                directories.push((path, depth + 1));
            } else if (kind.is_char_device() || kind.is_block_device())
                && !(depth == 0 && usual.iter().any(|u| entry.file_name() == *u))
                && found.len() < MAX_DEVICES
            {
                let options = vec!["bind".into(), "dev".into()];
                let kind = Some("bind".into());
                found.push(oci::Mount {
                    destination: path.clone(),
                    kind,
                    source: Some(path),
                    options,
                    ..Default::default()
                });
            }
        }
    }
    found
}

#[cfg(test)]
pub(in crate::boundary) mod tests {
    use super::*;

    pub fn container(change: impl FnOnce(&mut ContainerSpec)) -> ContainerSpec {
        let mut spec = ContainerSpec {
            name: "web".into(),
            attempt: 2,
            rootfs: Rootfs::Layers { image: "i".into(), layers: vec!["/l0".into()] },
            args: vec!["a".into()],
            env: vec![("A".into(), "b=c".into())],
            cwd: String::new(),
            mounts: Vec::new(),
            resources: Resources::default(),
            security: Security { capabilities: vec!["CAP_CHOWN".into()], ..Default::default() },
            tty: false,
            stdin: false,
            stdin_once: false,
            log_path: "/log".into(),
            log_max_bytes: 1,
        };
        change(&mut spec);
        spec
    }

    pub fn pod() -> SandboxSpec {
        serde_json::from_value(serde_json::json!({
            "uid": "u", "namespace": "n", "name": "p", "dir": "/d", "run_dir": "/r", "hostname": "p",
            "network": {"mac": "", "mtu": 0, "dns_search": [], "host": false, "address": null, "netns": "/ns", "tap": null,
                "router_netns": null, "gateway": null, "dns": null},
            "id_base": 131_072, "cgroup": "atoll/i/podu", "limits": Resources::default(), "sysctls": {}, "share_pid": false,
            "labels": {}, "annotations": {}, "machine": null
        }))
        .unwrap()
    }

    #[test]
    fn resources_become_cgroup_terms() {
        let wanted = Resources {
            cpu_request_milli: 250,
            cpu_limit_milli: Some(1500),
            memory_limit: Some(64 << 20),
            pids_limit: Some(100),
            ..Default::default()
        };
        let made = resources(&wanted);
        let cpu = made.cpu.unwrap();
        assert_eq!((cpu.shares, cpu.quota, cpu.period), (Some(256), Some(150_000), Some(100_000)));
        assert_eq!(made.memory.unwrap().limit, Some(64 << 20));
        let none = resources(&Resources::default());
        assert_eq!(none.cpu.unwrap().shares, Some(2));
        assert_eq!((none.memory, none.pids), (None, None));
    }

    #[test]
    fn own_mounts_come_last_and_replace_the_usual() {
        let of = |target: &str, source| Mount {
            source,
            target: target.into(),
            read_only: true,
            propagation: "HostToContainer".into(),
            volume: None,
        };
        let container = container(|c| {
            c.mounts = vec![
                of("/a/b", MountSource::Pod("/src".into())),
                of("/a", MountSource::Host("/host".into())),
                of("/dev/shm", MountSource::Tmpfs { size: Some(9), mode: 0o1777 }),
            ];
        });
        let all = mounts(&pod(), &container);
        let targets: Vec<&Path> = all.iter().map(|m| m.destination.as_path()).collect();
        assert_eq!(targets.iter().filter(|t| **t == Path::new("/dev/shm")).count(), 1);
        let at = |t: &str| targets.iter().position(|x| *x == Path::new(t)).unwrap();
        assert!(at("/dev") < at("/dev/shm") && at("/a") < at("/a/b"));
        assert!(
            all[at("/a/b")].options.contains(&"idmap".to_owned()) && all[at("/a/b")].options.contains(&"ro".to_owned())
        );
        assert!(!all[at("/a")].options.contains(&"idmap".to_owned()));
        assert!(all[at("/dev/shm")].options.contains(&"mode=1777".to_owned()));
    }

    #[test]
    fn a_component_is_refused_with_the_way_out() {
        let container = container(|c| {
            c.rootfs = Rootfs::Component { image: "i".into(), path: "/x".into(), digest: "d".into() };
        });
        assert!(start(&pod(), &container).unwrap_err().to_string().contains("runtimeClassName: wasm"));
    }
}
