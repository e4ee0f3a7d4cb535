//! Virtual machines through the API and the command line: life, console, limits. The machine is a boot sector, so that it
//! is up in a second under translation too.

use crate::cluster::{Cluster, Said, json, lines};
use crate::{Outcome, Test};
use std::io::{Read, Write};
use std::process::Stdio;

pub const TESTS: &[Test] = &[
    ("vm_starts_pauses_restarts_and_stops", life),
    ("vm_console_is_the_serial_line", console),
    ("vm_machines_are_held_in_their_control_group", held),
    ("vm_subresources_refuse_what_makes_no_sense", refused),
];

const IMAGE: &str = "test/bootsector:1";

/// Says `up` on COM1, then sends back what it is sent.
fn boot_sector() -> Vec<u8> {
    let mut code = vec![0xfa]; // cli
    for byte in b"up\r\n" {
        code.extend([0xba, 0xf8, 0x03, 0xb0, *byte, 0xee]); // mov dx, 0x3f8; mov al, byte; out dx, al
    }
    // again: mov dx, 0x3fd; in al, dx; test al, 1; jz again; mov dx, 0x3f8; in al, dx; out dx, al; jmp again
    code.extend([0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf8, 0xba, 0xf8, 0x03, 0xec, 0xee, 0xeb, 0xf1]);
    code.resize(510, 0);
    code.extend([0x55, 0xaa]);
    code.resize(1 << 20, 0);
    code
}

fn machine(ns: &str, name: &str, strategy: &str) -> String {
    format!(
        "apiVersion: kubevirt.io/v1\nkind: VirtualMachine\nmetadata: {{name: {name}, namespace: {ns}}}\nspec:\n  \
         runStrategy: {strategy}\n  template:\n    spec:\n      terminationGracePeriodSeconds: 0\n      domain:\n        \
         cpu: {{cores: 1}}\n        memory: {{guest: 64Mi}}\n        resources: {{limits: {{cpu: 500m}}}}\n        \
         devices: {{disks: [{{name: root, disk: {{bus: virtio}}}}]}}\n      \
         volumes: [{{name: root, containerDisk: {{image: {IMAGE}}}}}]\n"
    )
}

/// A namespace with a machine, if there is an engine.
fn prepare(c: &Cluster, ns: &str, strategy: &str) -> Result<String, Outcome> {
    if !std::path::Path::new("/usr/bin/qemu-system-x86_64").exists() {
        return Err(Outcome::Skipped("needs qemu-system-x86".into()));
    }
    let disk = c.scratch("bootsector.raw");
    std::fs::write(&disk, boot_sector()).unwrap();
    let data = c.data();
    c.atoll(&["image", "import", "--data-dir", &data.to_string_lossy(), &disk.to_string_lossy(), "--tag", IMAGE])
        .good();
    let ns = c.namespace(ns);
    c.apply(&machine(&ns, "m", strategy));
    Ok(ns)
}

macro_rules! prepared {
    ($c:expr, $ns:expr, $strategy:expr) => {
        match prepare($c, $ns, $strategy) {
            Ok(ns) => ns,
            Err(skipped) => return skipped,
        }
    };
}

fn vm(c: &Cluster, ns: &str, action: &str) -> Said {
    c.atoll(&["vm", action, "m", "-n", ns, "--wait", "120"])
}

fn status(c: &Cluster, ns: &str) -> String {
    c.kubectl(&["get", "vm", "m", "-n", ns, "-o", "jsonpath={.status.printableStatus}"]).good()
}

fn instance(c: &Cluster, ns: &str) -> serde_json::Value {
    json(&c.kubectl(&["get", "vmi", "m", "-n", ns, "-o", "json"]).good())
}

fn pod_uid(c: &Cluster, ns: &str) -> String {
    let pods = instance(c, ns)["status"]["activePods"].clone();
    pods.as_object().and_then(|pods| pods.keys().next()).expect("a pod").clone()
}

fn life(c: &Cluster) -> Outcome {
    let ns = prepared!(c, "t-vm-life", "Halted");
    c.until("the machine is seen", || status(c, &ns) == "Stopped");
    vm(c, &ns, "start").good();
    let listed = c.atoll(&["vm", "ls", "-n", &ns]).good();
    assert!(
        lines(&listed).iter().any(|l| l.contains(" m ") && l.contains("Running") && l.contains("64Mi")),
        "{listed}"
    );
    vm(c, &ns, "pause").good();
    assert_eq!(status(c, &ns), "Paused");
    vm(c, &ns, "unpause").good();
    assert_eq!(status(c, &ns), "Running");
    let before = instance(c, &ns)["metadata"]["uid"].clone();
    vm(c, &ns, "restart").good();
    assert_ne!(instance(c, &ns)["metadata"]["uid"], before);
    vm(c, &ns, "stop").good();
    c.until("nothing is left of it", || {
        c.kubectl(&["get", "pods,vmi", "-n", &ns, "-o", "name"]).good().trim().is_empty()
    });
    Outcome::Passed
}

fn console(c: &Cluster) -> Outcome {
    let ns = prepared!(c, "t-vm-console", "Always");
    c.until("the machine runs", || status(c, &ns) == "Running");
    let pod = c.kubectl(&["get", "pods", "-n", &ns, "-o", "name"]).good().trim().to_owned();
    c.until("its first line is logged", || c.kubectl(&["logs", "-n", &ns, &pod]).good().contains("up"));
    let mut child = c
        .inside(env!("CARGO_BIN_EXE_atoll"))
        .args(["vm", "console", "m", "-n", &ns, "--data-dir"])
        .arg(c.data())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"hello").unwrap();
    let mut echo = [0u8; 5];
    child.stdout.take().unwrap().read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"hello");
    stdin.write_all(b"\x1d").unwrap();
    assert!(child.wait().unwrap().success());
    c.kubectl(&["delete", "vm", "m", "-n", &ns]).good();
    Outcome::Passed
}

/// A file of the pod's control group, whichever version holds the controller.
fn limit(pid: &str, controller: &str, v1: &str, v2: &str) -> Option<String> {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    for line in groups.lines() {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let path = path.trim_start_matches('/');
        if !path.contains("pod") {
            continue;
        }
        let file = match controllers.split(',').any(|c| c == controller) {
            true => format!("/sys/fs/cgroup/{controller}/{path}/{v1}"),
            false if controllers.is_empty() => format!("/sys/fs/cgroup/{path}/{v2}"),
            false => continue,
        };
        if let Ok(text) = std::fs::read_to_string(file) {
            return Some(text.trim().to_owned());
        }
    }
    None
}

fn held(c: &Cluster) -> Outcome {
    let ns = prepared!(c, "t-vm-held", "Always");
    c.until("the machine runs", || status(c, &ns) == "Running");
    let uid = pod_uid(c, &ns);
    let started = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if !started.contains("/sys/fs/cgroup") {
        return Outcome::Skipped("this host has no control groups".into());
    }
    // the engine's name carries the machine's namespace
    let engines: Vec<String> = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|pid| {
            let group = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            pid.parse::<u32>().is_ok() && group.contains(&format!("pod{uid}"))
        })
        .collect();
    assert!(engines.len() >= 2, "monitor and engine are in the pod's group: {engines:?}");
    let Some(memory) = limit(&engines[0], "memory", "memory.limit_in_bytes", "memory.max") else {
        return Outcome::Skipped("no memory controller here".into());
    };
    assert_eq!(memory, ((64u64 << 20) + (512 << 20)).to_string());
    if let Some(cpu) = limit(&engines[0], "cpu", "cpu.cfs_quota_us", "cpu.max") {
        assert!(cpu.starts_with("50000"), "{cpu}");
    }
    c.kubectl(&["delete", "vm", "m", "-n", &ns]).good();
    c.until("the group is gone", || {
        let left = engines.iter().any(|pid| limit(pid, "memory", "memory.limit_in_bytes", "memory.max").is_some());
        !left
    });
    Outcome::Passed
}

fn refused(c: &Cluster) -> Outcome {
    let ns = prepared!(c, "t-vm-refused", "Halted");
    for (action, why) in
        [("stop", "VM is not running"), ("restart", "does not support manual restart"), ("pause", "not found")]
    {
        let said = vm(c, &ns, action).bad();
        assert!(said.contains(why), "{action}: {said}");
    }
    let said = c.atoll(&["vm", "start", "nothing", "-n", &ns]).bad();
    assert!(said.contains("not found"), "{said}");
    let said = c.atoll(&["vm", "console", "m", "-n", &ns]).bad();
    assert!(said.contains("not found") || said.contains("does not run"), "{said}");
    Outcome::Passed
}
