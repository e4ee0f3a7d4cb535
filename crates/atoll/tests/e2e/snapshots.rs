//! Snapshots, restores and clones of machines with Debian's kernel, through kubectl and the command line: the disk and the
//! memory of one moment come back together, clones are machines of their own, and a kill in the middle leaves nothing.

use crate::archive::Archive;
use crate::cluster::{Cluster, json, sleeper};
use crate::{Outcome, Test, outer};
use rustix::process::Signal;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

pub const TESTS: &[Test] = &[
    ("snapshots_bring_back_disk_and_memory_of_one_moment", restores),
    ("snapshots_make_clones_with_addresses_of_their_own", clones),
    ("snapshots_survive_kills_and_refuse_what_is_damaged", kills),
];

const KERNEL: &str = "test/guest-kernel:1";
const DISK: &str = "test/guest-disk:1";
const MODULES: &[&str] = &[
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "crc16",
    "mbcache",
    "jbd2",
    "ext4",
];

/// A shell on the serial line, a counter in memory, files of the disk by HTTP.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /sbin /usr/bin /usr/sbin /mnt
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /run
for module in MODULES; do [ -f /modules/$module.ko ] && insmod /modules/$module.ko; done
mount -t ext4 /dev/vda /mnt || echo no disk
ip link set lo up
ip link set eth0 up
udhcpc -i eth0 -n -q -t 30 -T 1 -s /dhcp >/dev/null 2>&1 || echo no address
(i=0; while true; do i=$((i+1)); echo $i > /run/new; mv /run/new /run/count; sleep 0.1; done) &
httpd -h /mnt
echo guest is up
exec setsid sh -c 'exec sh </dev/ttyS0 >/dev/ttyS0 2>&1'
"#;

const DHCP: &str = r#"#!/bin/busybox sh
[ "$1" = bound ] || exit 0
ip addr add $ip/32 dev $interface
ip route add 169.254.1.1 dev $interface
ip route add default via 169.254.1.1 dev $interface
"#;

pub fn inputs() -> Result<PathBuf, String> {
    outer::inputs(&[("/sbin/mkfs.ext4", "e2fsprogs")])
}

/// Imports a kernel, with an initial file system of these programs and busybox, and an empty disk.
pub fn guest(c: &Cluster, cache: &Path, tag: &str, programs: &[(&Path, &str)]) {
    let data = c.data().to_string_lossy().into_owned();
    let import = |path: &Path, tag: &str| {
        c.atoll(&["image", "import", "--data-dir", &data, &path.to_string_lossy(), "--tag", tag]).good();
    };
    let boot = c.scratch(&tag.replace(['/', ':'], "-"));
    if boot.exists() {
        return;
    }
    std::fs::create_dir_all(boot.join("boot")).unwrap();
    let mut archive = Archive::new();
    archive.program(Path::new("/usr/bin/busybox"), "bin/busybox");
    programs.iter().for_each(|(from, to)| archive.program(from, to));
    archive.modules(&cache.join("modules"), MODULES);
    archive.file("init", INIT.replace("MODULES", &MODULES.join(" ")).as_bytes(), true);
    archive.file("dhcp", DHCP.as_bytes(), true);
    std::fs::write(boot.join("boot/initrd"), archive.finish()).unwrap();
    std::fs::copy(cache.join("vmlinuz"), boot.join("boot/vmlinuz")).unwrap();
    let tar = boot.join("image.tar");
    c.host("tar", &["-C", &boot.to_string_lossy(), "-cf", &tar.to_string_lossy(), "boot"]).good();
    import(&tar, tag);
    let disk = boot.join("disk.raw");
    std::fs::File::create(&disk).unwrap().set_len(32 << 20).unwrap();
    c.host("/sbin/mkfs.ext4", &["-q", "-F", &disk.to_string_lossy()]).good();
    import(&disk, DISK);
}

pub fn machine(ns: &str, name: &str, kernel: &str) -> String {
    format!(
        "apiVersion: kubevirt.io/v1\nkind: VirtualMachine\nmetadata: {{name: {name}, namespace: {ns}}}\nspec:\n  \
         runStrategy: Always\n  template:\n    spec:\n      terminationGracePeriodSeconds: 0\n      domain:\n        \
         cpu: {{cores: 1}}\n        memory: {{guest: 128Mi}}\n        firmware:\n          kernelBoot:\n            \
         kernelArgs: console=ttyS0 quiet net.ifnames=0 panic=1\n            \
         container: {{image: {kernel}, kernelPath: /boot/vmlinuz, initrdPath: /boot/initrd}}\n        \
         devices: {{disks: [{{name: root, disk: {{bus: virtio}}}}]}}\n      \
         volumes: [{{name: root, containerDisk: {{image: {DISK}}}}}]\n"
    )
}

/// A namespace with a machine `m` in it that runs.
fn prepare(c: &Cluster, ns: &str) -> Result<String, Outcome> {
    let cache = inputs().map_err(Outcome::Skipped)?;
    guest(c, &cache, KERNEL, &[]);
    let ns = c.namespace(ns);
    c.apply(&machine(&ns, "m", KERNEL));
    up(c, &ns, "m");
    Ok(ns)
}

macro_rules! prepared {
    ($c:expr, $ns:expr) => {
        match prepare($c, $ns) {
            Ok(ns) => ns,
            Err(skipped) => return skipped,
        }
    };
}

/// Longer than the rest: Debian's kernel boots under translation, on a computer that may be busy.
#[track_caller]
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(300);
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within 300 s");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn status(c: &Cluster, ns: &str, name: &str) -> String {
    c.kubectl(&["get", "vm", name, "-n", ns, "-o", "jsonpath={.status.printableStatus}"]).good()
}

/// Waits until the guest's shell answers.
pub fn up(c: &Cluster, ns: &str, name: &str) {
    until("the machine runs", || status(c, ns, name) == "Running");
    until("the guest is up", || ask(c, ns, name, "cat /run/count").is_some_and(|n| n.parse::<u64>().is_ok()));
}

fn console(c: &Cluster, ns: &str, name: &str) -> Child {
    c.inside("timeout")
        .args(["20", env!("CARGO_BIN_EXE_atoll"), "vm", "console", name, "-n", ns, "--data-dir"])
        .arg(c.data())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// What a command in the guest prints; `None` if nothing answers within seconds.
fn ask(c: &Cluster, ns: &str, name: &str, command: &str) -> Option<String> {
    let mut child = console(c, ns, name);
    let mut stdin = child.stdin.take().unwrap();
    // The line as it is echoed has quotes where the answer has none. ^C: a guest may have been saved in the middle of a line,
    // whose open quote would take in all that follows.
    let _ = stdin.write_all(format!("\x03\necho \"BE\"\"GIN\"; {command}; echo \"EN\"\"D\"\n").as_bytes());
    let mut said = Vec::new();
    let mut out = child.stdout.take().unwrap();
    let mut buffer = [0u8; 512];
    while let Ok(n) = out.read(&mut buffer) {
        said.extend_from_slice(&buffer[..n]);
        if n == 0 || String::from_utf8_lossy(&said).contains("END\r\n") {
            break;
        }
    }
    let _ = stdin.write_all(b"\x1d");
    drop(stdin);
    let _ = child.wait();
    let text = String::from_utf8_lossy(&said).into_owned();
    let (_, rest) = text.rsplit_once("BEGIN\r\n")?;
    Some(rest.split_once("END\r\n")?.0.trim().to_owned())
}

/// Types what is not a whole line, and waits until the guest has all of it.
fn typed(c: &Cluster, ns: &str, name: &str, text: &str) {
    let mut child = console(c, ns, name);
    let mut stdin = child.stdin.take().unwrap();
    let _ = stdin.write_all(text.as_bytes());
    let mut said = Vec::new();
    let mut out = child.stdout.take().unwrap();
    let mut buffer = [0u8; 512];
    while !String::from_utf8_lossy(&said).contains(text) {
        let n = out.read(&mut buffer).unwrap();
        assert!(n > 0, "{text:?} is not echoed: {:?}", String::from_utf8_lossy(&said));
        said.extend_from_slice(&buffer[..n]);
    }
    let _ = stdin.write_all(b"\x1d");
    drop(stdin);
    let _ = child.wait();
}

#[track_caller]
pub fn told(c: &Cluster, ns: &str, name: &str, command: &str) -> String {
    let mut answer = None;
    until("the guest answers", || {
        answer = ask(c, ns, name, command);
        answer.is_some()
    });
    answer.unwrap_or_default()
}

fn count(c: &Cluster, ns: &str, name: &str) -> u64 {
    told(c, ns, name, "cat /run/count").parse().unwrap()
}

fn address(c: &Cluster, ns: &str, name: &str) -> String {
    c.kubectl(&["get", "vmi", name, "-n", ns, "-o", "jsonpath={.status.interfaces[0].ipAddress}"]).good()
}

fn vm(c: &Cluster, args: &[&str]) -> crate::cluster::Said {
    c.atoll(&[&["vm"], args].concat())
}

fn rubbish(c: &Cluster) -> Vec<String> {
    let entries = std::fs::read_dir(c.data().join("snapshots")).into_iter().flatten().flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned()).filter(|n| n.starts_with('.')).collect()
}

fn kept(c: &Cluster) -> usize {
    std::fs::read_dir(c.data().join("snapshots")).into_iter().flatten().count()
}

fn restores(c: &Cluster) -> Outcome {
    let ns = prepared!(c, "t-snap-restore");
    told(c, &ns, "m", "echo before > /mnt/file; sync");
    // written, but not to the disk yet: only memory has it
    told(c, &ns, "m", "echo in memory > /mnt/unsynced");
    let (then, home) = (count(c, &ns, "m"), address(c, &ns, "m"));
    typed(c, &ns, "m", "echo \"half");
    let said = vm(c, &["snapshot", "m", "--name", "s", "-n", &ns]).good();
    assert!(said.contains("Disks, memory and devices are saved"), "{said}");
    println!("{}", said.trim());
    let listed = vm(c, &["snapshots", "-n", &ns]).good();
    assert!(listed.contains("Succeeded") && listed.contains("disks, memory"), "{listed}");
    let object = json(&c.kubectl(&["get", "vmsnapshot", "s", "-n", &ns, "-o", "json"]).good());
    assert_eq!(object["status"]["readyToUse"], true);
    assert_eq!(object["status"]["snapshotVolumes"]["includedVolumes"][0], "root");
    c.kubectl(&["wait", "-n", &ns, "vmsnapshot/s", "--for=condition=Ready", "--timeout=5s"]).good();

    told(c, &ns, "m", "echo after > /mnt/file; rm /mnt/unsynced; touch /mnt/later; sync");
    until("it counts on", || count(c, &ns, "m") > then + 100);
    let why = vm(c, &["restore", "m", "--snapshot", "s", "-n", &ns]).bad();
    assert!(why.contains("runs;") && why.contains("--stop"), "{why}");
    vm(c, &["restore", "m", "--snapshot", "s", "--stop", "-n", &ns]).good();
    assert_eq!(status(c, &ns, "m"), "Running");
    let now = count(c, &ns, "m");
    assert!(now >= then && now < then + 100, "it counts on from {then}: {now}");
    assert_eq!(told(c, &ns, "m", "cat /mnt/file /mnt/unsynced"), "before\r\nin memory");
    assert_eq!(told(c, &ns, "m", "ls /mnt/later 2>&1 | grep -c 'No such'"), "1");
    assert_eq!(address(c, &ns, "m"), home);

    // its disks alone: it boots, and what was never written to the disk is not there
    vm(c, &["stop", "m", "-n", &ns, "--wait", "120"]).good();
    vm(c, &["restore", "m", "--snapshot", "s", "--disks-only", "-n", &ns]).good();
    up(c, &ns, "m");
    assert_eq!(told(c, &ns, "m", "cat /mnt/file"), "before");
    assert_eq!(address(c, &ns, "m"), home);

    c.kubectl(&["delete", "vmsnapshot", "s", "-n", &ns]).good();
    assert_eq!(kept(c), 1, "its machine may start again from it");
    c.kubectl(&["delete", "vm", "m", "-n", &ns]).good();
    c.until("the files are gone", || kept(c) == 0);
    Outcome::Passed
}

fn clones(c: &Cluster) -> Outcome {
    let ns = prepared!(c, "t-snap-clone");
    c.apply(&sleeper("caller", &ns));
    told(c, &ns, "m", "echo original > /mnt/index.html; sync");
    for name in ["one", "two"] {
        vm(c, &["clone", "m", name, "--start", "-n", &ns]).good();
    }
    let why = vm(c, &["clone", "m", "one", "-n", &ns]).bad();
    assert!(why.contains("exists already"), "{why}");
    for name in ["one", "two"] {
        up(c, &ns, name);
        told(c, &ns, name, &format!("echo {name} >> /mnt/index.html; sync"));
    }
    c.wait_ready(&ns, "pod/caller");
    let mut addresses: Vec<String> = Vec::new();
    for (name, page) in [("m", "original"), ("one", "original\none"), ("two", "original\ntwo")] {
        let address = address(c, &ns, name);
        assert!(told(c, &ns, name, "ip -4 addr show dev eth0").contains(&address), "{name} knows its address");
        let call = format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 20 {address} 80");
        let mut said = String::new();
        c.until("it answers", || {
            said = c.kubectl(&["exec", "-n", &ns, "caller", "--", "sh", "-c", &call]).out;
            said.contains("original")
        });
        assert!(said.trim_end().ends_with(page), "{name}: {said}");
        assert!(!addresses.contains(&address), "{name} has an address of its own");
        addresses.push(address);
    }
    let macs: std::collections::BTreeSet<String> =
        ["m", "one", "two"].iter().map(|name| told(c, &ns, name, "cat /sys/class/net/eth0/address")).collect();
    assert_eq!(macs.len(), 3, "{macs:?}");
    assert!(c.kubectl(&["get", "vmsnapshot", "-n", &ns, "-o", "name"]).good().trim().is_empty());
    c.kubectl(&["delete", "namespace", &ns]).good();
    c.until("the files are gone", || kept(c) == 0);
    Outcome::Passed
}

fn kills(c: &Cluster) -> Outcome {
    let ns = prepared!(c, "t-snap-kill");
    let boot = told(c, &ns, "m", "cat /proc/sys/kernel/random/boot_id");
    for round in 0..3 {
        let name = format!("s{round}");
        c.apply(&format!(
            "apiVersion: snapshot.kubevirt.io/v1beta1\nkind: VirtualMachineSnapshot\n\
             metadata: {{name: {name}, namespace: {ns}}}\nspec:\n  failureDeadline: 10m\n  \
             source: {{apiGroup: kubevirt.io, kind: VirtualMachine, name: m}}\n"
        ));
        let begun = Instant::now();
        while rubbish(c).is_empty() && kept(c) <= round && begun.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(30 * round as u64));
        c.stop(Signal::KILL);
        c.up();
        let before = count(c, &ns, "m");
        until("the machine goes on", || count(c, &ns, "m") > before);
        until("the snapshot is taken after all", || {
            let path = "jsonpath={.status.phase}";
            c.kubectl(&["get", "vmsnapshot", &name, "-n", &ns, "-o", path]).good() == "Succeeded"
        });
        assert!(rubbish(c).is_empty(), "{:?}", rubbish(c));
    }
    assert_eq!(told(c, &ns, "m", "cat /proc/sys/kernel/random/boot_id"), boot, "it never booted again");

    // the engine is killed in the middle: the snapshot fails with the reason or was complete, nothing half is left
    let group = pod_group(c, &ns);
    let mut taking = c
        .inside(env!("CARGO_BIN_EXE_atoll"))
        .args(["vm", "snapshot", "m", "--name", "s3", "-n", &ns])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while rubbish(c).is_empty() && kept(c) <= 3 && begun.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(1));
    }
    for pid in group {
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    }
    let _ = taking.wait();
    until("the snapshot is over", || {
        let phase = c.kubectl(&["get", "vmsnapshot", "s3", "-n", &ns, "-o", "jsonpath={.status.phase}"]).good();
        matches!(phase.as_str(), "Succeeded" | "Failed")
    });
    c.until("nothing half is left", || rubbish(c).is_empty());

    // one byte of a disk differs: it is refused, and says so
    let damaged = content(c, &ns, "s0");
    let overlay = c.data().join("snapshots").join(damaged).join("disk0.qcow2");
    let mut bytes = std::fs::read(&overlay).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&overlay, bytes).unwrap();
    vm(c, &["restore", "m", "--snapshot", "s0", "--stop", "--wait", "5", "-n", &ns]).bad();
    until("the reason shows", || {
        c.kubectl(&["get", "pods", "-n", &ns, "-o", "json"]).good().contains("its checksum differs")
    });
    vm(c, &["restore", "m", "--snapshot", "s1", "--stop", "-n", &ns]).good();
    assert_eq!(told(c, &ns, "m", "cat /proc/sys/kernel/random/boot_id"), boot, "it goes on from another one");
    c.kubectl(&["delete", "namespace", &ns]).good();
    c.until("the files are gone", || kept(c) == 0);
    Outcome::Passed
}

fn content(c: &Cluster, ns: &str, name: &str) -> String {
    let path = "jsonpath={.status.virtualMachineSnapshotContentName}";
    let content = c.kubectl(&["get", "vmsnapshot", name, "-n", ns, "-o", path]).good();
    c.kubectl(&["get", "vmsnapshotcontent", &content, "-n", ns, "-o", "jsonpath={.metadata.uid}"]).good()
}

/// Monitor and engine of `m`: what is in its pod's control group.
fn pod_group(c: &Cluster, ns: &str) -> Vec<rustix::process::Pid> {
    let instance = json(&c.kubectl(&["get", "vmi", "m", "-n", ns, "-o", "json"]).good());
    let uid = instance["status"]["activePods"].as_object().and_then(|p| p.keys().next()).unwrap().clone();
    let pids = std::fs::read_dir("/proc").unwrap().filter_map(|e| e.ok()?.file_name().into_string().ok()?.parse().ok());
    let of_pod = |pid: &i32| {
        std::fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|group| group.contains(&format!("pod{uid}")))
    };
    pids.filter(of_pod).filter_map(rustix::process::Pid::from_raw).collect()
}
