//! What runtimes have fallen to, tried from inside a pod. The bundle runtime's half is in `tests/oci/attacks.rs`; mount
//! races, leaked descriptors and the binary are in `isolation`.

use crate::support::*;
use container::process::all_capabilities;

pub const TESTS: &[(&str, fn())] = &[
    ("attacks::leaked_working_directory", leaked_working_directory),
    ("attacks::device_cgroup", device_cgroup),
    ("attacks::release_agent", release_agent),
    ("attacks::cgroup_writes", cgroup_writes),
    ("attacks::core_pattern", core_pattern),
    ("attacks::keyring", keyring),
    ("attacks::setgroups", setgroups),
    ("attacks::ptrace_across_pods", ptrace),
    ("attacks::hidden_processes", hidden_processes),
    ("attacks::raw_sockets", raw_sockets),
    ("attacks::abstract_sockets_across_pods", abstract_sockets),
    ("attacks::signals_across_pods", signals),
];

/// CVE-2024-21626: a working directory through a descriptor of the host's.
fn leaked_working_directory() {
    let pod = Pod::new();
    for n in 3..16 {
        let mut start = pod.script(&format!("c{n}"), "ls; cat ../../../../../etc/shadow 2>/dev/null; true");
        start.spec.process.cwd = format!("/proc/self/fd/{n}");
        let log = start.log_path.clone();
        if pod.client().start(start).is_ok() {
            pod.ended(&format!("c{n}"));
            let said = output(&log, "stdout");
            assert!(!said.contains("usr") && !said.contains("root:"), "{n}: {said}");
        }
    }
}

/// Even the host's root with every capability gets nothing out of a device node that it makes.
fn device_cgroup() {
    let pod = Pod::with(|s| s.id_map = None);
    let script = "mount -t tmpfs x /tmp; mknod /tmp/mem c 1 1; mknod /tmp/disk b 254 0; cat /tmp/mem /tmp/disk 2>&1 | head -c 400; \
        mknod /tmp/zero c 1 5; head -c 3 /tmp/zero | wc -c";
    let mut start = pod.script("a", script);
    start.spec.process = process(&["sh", "-c", script], all_capabilities());
    start.confinement.seccomp_unconfined = true;
    let (_, said) = pod.run(start);
    assert_eq!(said.matches("Operation not permitted").count(), 2, "{said}");
    assert!(said.ends_with("3\n"), "{said}");
}

/// CVE-2022-0492: a control group's helper program runs on the host.
fn release_agent() {
    let pod = Pod::new();
    let script = "for d in /sys/fs/cgroup /sys/fs/cgroup/*; do (echo /x > $d/release_agent) 2>/dev/null && echo WRITTEN; done; \
        mkdir -p /tmp/c; mount -t cgroup -o memory none /tmp/c 2>/dev/null && (echo /x > /tmp/c/release_agent) 2>/dev/null && echo WRITTEN; echo done";
    assert_eq!(pod.output_of(script), "done\n");
    let mut start = pod.script("all", script);
    start.spec.process = process(&["sh", "-c", script], all_capabilities());
    start.confinement.seccomp_unconfined = true;
    assert_eq!(pod.run(start).1, "done\n");
}

fn cgroup_writes() {
    let pod = Pod::new();
    let script = "find /sys/fs/cgroup -type f 2>/dev/null | while read f; do (echo 0 > $f) 2>/dev/null && echo WRITTEN $f; done; \
        find /sys/fs/cgroup -type d | while read d; do mkdir $d/x 2>/dev/null && echo MADE $d; done; echo done";
    assert_eq!(pod.output_of(script), "done\n");
}

fn core_pattern() {
    let before = std::fs::read_to_string("/proc/sys/kernel/core_pattern").expect("read");
    let script = "for f in core_pattern modprobe hotplug; do (echo '|/evil' > /proc/sys/kernel/$f) 2>/dev/null && echo WRITTEN; done; \
        umount /proc/sys 2>/dev/null && echo UMOUNTED; echo done";
    let pod = Pod::new();
    assert_eq!(pod.output_of(script), "done\n");
    let mut start = pod.script("all", script);
    start.spec.process = process(&["sh", "-c", script], all_capabilities());
    assert!(!pod.run(start).1.contains("WRITTEN"));
    assert_eq!(std::fs::read_to_string("/proc/sys/kernel/core_pattern").expect("read"), before);
}

/// Keys are not to be had, neither by calls nor by looking.
fn keyring() {
    let pod = Pod::new();
    assert_eq!(pod.output_of("cat /proc/keys /proc/key-users 2>/dev/null | grep -c _ses; true"), "0\n");
    if !has_probe() {
        println!("SKIPPED: no C compiler for the calls");
        return;
    }
    assert_eq!(pod.output_of("probe | grep keyctl"), "keyctl EPERM\n");
}

/// CVE-2018-7169: the host's groups do not come along, and those given cannot be dropped.
fn setgroups() {
    let pod = Pod::new();
    let mut start =
        pod.script("a", "grep Groups /proc/self/status; setpriv --clear-groups true 2>/dev/null && echo DROPPED; true");
    start.spec.process.user.additional_gids = vec![10, 20];
    let (_, said) = pod.run(start);
    assert_eq!(said.split_whitespace().collect::<Vec<_>>(), ["Groups:", "10", "20"]);
}

fn ptrace() {
    let victim = Pod::new();
    let pid = victim.client().start(victim.script("v", "exec sleep 1000")).expect("started").pid.expect("pid");
    let pod = Pod::new();
    let script = format!(
        "ls /proc/{pid} 2>/dev/null && echo SEEN; kill -9 {pid} 2>/dev/null && echo KILLED; cat /proc/{pid}/environ 2>/dev/null && echo READ; echo done"
    );
    let mut start = pod.script("a", &script);
    start.spec.process = process(&["sh", "-c", &script], all_capabilities());
    start.confinement.seccomp_unconfined = true;
    assert_eq!(pod.run(start).1, "done\n");
    assert!(victim.state("v").is_some_and(|s| s.pid == Some(pid)));
}

/// hidepid: a user of the pod sees its own processes alone.
fn hidden_processes() {
    let pod = Pod::with(|s| s.share_pid = true);
    pod.client().start(pod.script("a", "exec sleep 1000")).expect("started");
    let mut start = pod.script("b", "ps -o args; ls -d /proc/1 2>/dev/null; true");
    start.spec.process.user.uid = 1000;
    let (_, said) = pod.run(start);
    assert!(said.contains("ps -o args") && !said.contains("sleep"), "{said}");
    assert!(!said.lines().any(|l| l == "/proc/1"), "{said}");
}

fn raw_sockets() {
    let pod = Pod::new();
    let said = pod.output_of("arping -c 1 -I lo 127.0.0.1 2>&1; true");
    assert!(said.contains("permitted") || said.contains("denied"), "{said}");
}

fn has_scopes() -> bool {
    let has = container::landlock_abi().is_some_and(|abi| abi >= container::LANDLOCK_SCOPES);
    if !has {
        println!("SKIPPED: Landlock here knows no scopes (Linux 6.12 does)");
    }
    has
}

/// A pod in another's network namespace, should it ever get there, does not reach its abstract sockets: Landlock's doing
/// alone, as the same without it shows. Containers of one pod reach each other's.
fn abstract_sockets() {
    if !has_scopes() {
        return;
    }
    if !has_probe() {
        println!("SKIPPED: no C compiler for the abstract sockets");
        return;
    }
    let victim = Pod::new();
    let start = victim.command("v", &["probe", "listen", "victim"]);
    let log = start.log_path.clone();
    let pid = victim.client().start(start).expect("started").pid.expect("pid");
    eventually("it listens", || output(&log, "stdout").contains("listen ok").then_some(()));
    assert_eq!(victim.output_of("probe victim"), "abstract ok\n");
    assert_eq!(victim.exec_output("v", &["probe", "victim"]), (0, "abstract ok\n".into()));
    let pinned = victim.base.join("net");
    std::fs::write(&pinned, "").expect("made");
    rustix::mount::mount_bind(format!("/proc/{pid}/ns/net"), &pinned).expect("pinned");
    for (scoped, expected) in [(false, "abstract ok\n"), (true, "abstract EPERM\n")] {
        let intruder = Pod::with(|s| {
            s.network = container::shim::protocol::Network::At(pinned.clone());
            s.scoped = scoped;
        });
        assert_eq!(intruder.output_of("probe victim"), expected, "scoped: {scoped}");
    }
    rustix::mount::unmount(&pinned, rustix::mount::UnmountFlags::DETACH).expect("unpinned");
}

/// The same for a process of another pod that is in a pod's PID namespace and has its user.
fn signals() {
    if !has_scopes() {
        return;
    }
    if std::process::Command::new("setpriv").arg("--version").output().is_err() {
        println!("SKIPPED: setpriv is not installed (package util-linux)");
        return;
    }
    for scoped in [false, true] {
        let pod = Pod::with(|s| s.scoped = scoped);
        let pid = pod.client().start(pod.script("a", "exec sleep 1000")).expect("started").pid.expect("pid");
        let (id, target) = (ID_BASE.to_string(), pid.to_string());
        let mut other = std::process::Command::new("nsenter")
            .args(["--target", &target, "--pid", "setpriv", "--reuid", &id, "--regid", &id, "--clear-groups"])
            .args(["sleep", "1000"])
            .spawn()
            .expect("executed");
        // nsenter(1) waits for the process that is in the namespace; its number there is the last one.
        let seen = eventually("the other process is there", || {
            let own = other.id();
            let child = std::fs::read_to_string(format!("/proc/{own}/task/{own}/children")).ok()?;
            let status = std::fs::read_to_string(format!("/proc/{}/status", child.trim())).ok()?;
            let ready = status.starts_with("Name:\tsleep");
            let numbers = status.lines().find_map(|l| l.strip_prefix("NSpid:")).filter(|_| ready)?;
            numbers.split_whitespace().last().map(str::to_owned)
        });
        let (code, _) = pod.exec_output("a", &["kill", "-9", &seen]);
        assert_eq!(code == 0, !scoped, "scoped: {scoped}");
        if scoped {
            assert!(other.try_wait().expect("asked").is_none(), "it lives");
            // It ends with the first process of its namespace.
            pod.client().signal("a", 9).expect("the pod's own supervisor may");
        }
        let _ = other.wait();
        // Within the pod nothing is in the way.
        if !scoped {
            continue;
        }
        pod.ended("a");
        assert_eq!(pod.output_of("sleep 1000 & kill -9 $! && wait $!; echo $?"), "137\n");
    }
}
