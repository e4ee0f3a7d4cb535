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
