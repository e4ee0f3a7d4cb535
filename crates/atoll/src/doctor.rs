//! `atoll doctor`: what this machine offers, measured, and what follows for each boundary.

use crate::cli::Outcome;
use crate::output::{self, Format};
use serde_json::json;
use std::path::Path;
use vmm::kvm::Support;

struct Finding {
    what: &'static str,
    /// `yes`, `no`, `limited`.
    state: &'static str,
    detail: String,
    follows: String,
}

pub fn run(data_dir: &Path, format: Format) -> Outcome {
    let findings = [
        root(),
        kvm(),
        qemu(),
        guest_kernel(data_dir),
        cgroups(),
        namespaces(),
        overlay(),
        seccomp(),
        landlock(),
        nftables(),
        egress(),
    ];
    if format == Format::Table {
        let rows: Vec<Vec<String>> = findings
            .iter()
            .map(|f| vec![f.what.to_owned(), f.state.to_owned(), f.detail.clone(), f.follows.clone()])
            .collect();
        output::table(&["WHAT", "STATE", "FOUND", "WHAT FOLLOWS"], &rows);
    } else {
        let list: Vec<_> = findings
            .iter()
            .map(|f| json!({"what": f.what, "state": f.state, "found": f.detail, "follows": f.follows}))
            .collect();
        output::value(format, &json!({ "findings": list }));
    }
    Ok(())
}

fn finding(what: &'static str, state: &'static str, detail: impl Into<String>, follows: &str) -> Finding {
    Finding { what, state, detail: detail.into(), follows: follows.into() }
}

fn root() -> Finding {
    let uid = rustix::process::getuid().as_raw();
    if uid == 0 {
        return finding("root", "yes", "uid 0", "atoll up can run; workloads get users of their own");
    }
    finding("root", "no", format!("uid {uid}"), "atoll up needs root to make namespaces: sudo atoll up")
}

fn kvm() -> Finding {
    let speed = |n: f64| format!("{:.1} million kernel-mode instructions/s", n / 1e6);
    match vmm::kvm::probe() {
        Support::Hardware { instructions_per_second } => finding(
            "kvm",
            "yes",
            format!("hardware, {}", speed(instructions_per_second)),
            "microvm: machines with a kernel run in Atoll's own monitor, the rest in QEMU with KVM",
        ),
        Support::Emulated { instructions_per_second } => finding(
            "kvm",
            "limited",
            format!("emulated, {}", speed(instructions_per_second)),
            "microvm: machines run in QEMU's translator, slower than native",
        ),
        Support::Absent { why } => {
            finding("kvm", "no", why, "microvm: machines run in QEMU's translator, slower than native")
        }
    }
}

fn qemu() -> Finding {
    if Path::new("/usr/bin/qemu-system-x86_64").exists() {
        return finding("qemu", "yes", "/usr/bin/qemu-system-x86_64", "microvm: virtual machines can run");
    }
    let follows = "microvm: no machines but those that hardware KVM runs alone, until apt-get install qemu-system-x86";
    finding("qemu", "no", "not installed", follows)
}

/// Modules that a pod's machine cannot do without, unless its kernel has them built in.
const WANTED_MODULES: [&str; 4] = ["virtio_blk", "virtio_net", "erofs", "overlay"];

fn guest_kernel(data_dir: &Path) -> Finding {
    let how = "get a Debian package linux-image-*-cloud-amd64 (apt-get download) and give it to atoll kernel add --from-deb FILE";
    match image::kernels::Kernels::new(data_dir, None).default_one() {
        Ok(Some(kernel)) => {
            let lacks = |wanted: &&str| !kernel.modules.iter().any(|m| m.replace('-', "_") == *wanted);
            let absent: Vec<&str> = WANTED_MODULES.into_iter().filter(|m| lacks(m)).collect();
            let found = format!("{}, {} modules", kernel.name, kernel.modules.len());
            if absent.is_empty() {
                return finding("guest kernel", "yes", found, "microvm: pods boot it (atoll kernel ls)");
            }
            let follows = format!("microvm: pods boot it, which works if it has {} built in", absent.join(", "));
            finding("guest kernel", "yes", found, &follows)
        }
        Ok(None) => {
            let follows = format!("microvm: pods made of container images wait (NoGuestKernel); {how}");
            finding("guest kernel", "no", format!("none in {}/kernels", data_dir.display()), &follows)
        }
        Err(error) => finding("guest kernel", "no", error.to_string(), "microvm: pods made of container images wait"),
    }
}

fn cgroups() -> Finding {
    let root = Path::new("/sys/fs/cgroup");
    let v2_controllers = std::fs::read_to_string(root.join("cgroup.controllers")).ok();
    let v1: Vec<&str> = ["cpu", "memory", "pids", "freezer", "devices"]
        .into_iter()
        .filter(|c| root.join(c).join("tasks").exists())
        .collect();
    match (v2_controllers, v1.is_empty()) {
        (Some(list), _) if !list.trim().is_empty() => {
            finding("cgroups", "yes", format!("v2: {}", list.trim()), "limits on CPU, memory and processes hold")
        }
        (None, false) if root.join("unified").exists() => finding(
            "cgroups",
            "yes",
            format!("hybrid, v1: {}", v1.join(" ")),
            "limits on CPU, memory and processes hold",
        ),
        (None, false) => {
            finding("cgroups", "yes", format!("v1: {}", v1.join(" ")), "limits on CPU, memory and processes hold")
        }
        _ => finding("cgroups", "no", "no controllers", "workloads run without limits"),
    }
}

fn namespaces() -> Finding {
    let wanted = ["user", "net", "pid", "mnt", "uts", "ipc", "cgroup", "time"];
    let absent: Vec<&str> = wanted.into_iter().filter(|ns| !Path::new("/proc/self/ns").join(ns).exists()).collect();
    if absent.is_empty() {
        return finding("namespaces", "yes", wanted.join(" "), "container: every pod has user ids of its own");
    }
    finding(
        "namespaces",
        "no",
        format!("missing: {}", absent.join(" ")),
        "container: pods cannot be isolated; use another kernel",
    )
}

fn overlay() -> Finding {
    let has =
        std::fs::read_to_string("/proc/filesystems").unwrap_or_default().lines().any(|l| l.ends_with("\toverlay"));
    if has {
        return finding("overlayfs", "yes", "in the kernel", "container: image layers are shared");
    }
    finding("overlayfs", "no", "not in /proc/filesystems", "container: no pods until the overlay module is loaded")
}

fn seccomp() -> Finding {
    match std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail") {
        Ok(actions) if actions.contains("errno") => {
            finding("seccomp", "yes", "filters", "system calls of every workload are filtered")
        }
        _ => finding("seccomp", "no", "no filters", "workloads cannot be confined; use another kernel"),
    }
}

fn landlock() -> Finding {
    match container::landlock_abi() {
        Some(abi) if abi >= container::LANDLOCK_SCOPES => finding(
            "landlock",
            "yes",
            format!("ABI {abi}"),
            "roles are confined a second time; pods reach no abstract sockets and processes but their own",
        ),
        Some(abi) => finding(
            "landlock",
            "partly",
            format!("ABI {abi}"),
            "roles are confined a second time; for pods it takes Linux 6.12 (ABI 6), until then namespaces alone part them",
        ),
        None => finding("landlock", "no", "not in this kernel", "one layer of confinement less; the others hold"),
    }
}

fn nftables() -> Finding {
    match network::probe() {
        Ok(()) => {
            finding("nftables", "yes", "rules load in a private namespace", "network: Services and isolation work")
        }
        Err(why) => {
            finding("nftables", "no", why.to_string(), "network: atoll up cannot start; load the nf_tables module")
        }
    }
}

fn egress6() -> &'static str {
    match network::probe_uplink6() {
        true => "by all of them",
        false => {
            "by nat (relayed) and user: this kernel forwards it for routers alone (Linux 6.17 has force_forwarding)"
        }
    }
}

fn egress() -> Finding {
    let forwarding = rustix::fs::access("/proc/sys/net/ipv4/ip_forward", rustix::fs::Access::WRITE_OK).is_ok();
    match (forwarding && network::probe().is_ok(), network::probe_relay()) {
        (true, Ok(())) => finding(
            "egress",
            "yes",
            format!("nat, routed, user; IPv6 {}", egress6()),
            "network: any --egress lets workloads out that a policy lets out",
        ),
        (false, Ok(())) => finding(
            "egress",
            "limited",
            "user; this machine's forwarding cannot be turned on",
            "network: --egress user lets workloads out; nat and routed cannot",
        ),
        (true, Err(why)) => {
            finding("egress", "limited", format!("nat, routed; not user: {why}"), "network: --egress nat or routed")
        }
        (false, Err(why)) => finding("egress", "no", why.to_string(), "network: no way out for workloads"),
    }
}
