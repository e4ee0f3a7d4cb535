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
    ("vm_console_and_screen_are_websockets", websockets),
    ("vm_softreboot_starts_the_guest_again", soft_reboot),
    ("vm_an_ova_becomes_a_machine", ova),
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

/// Says `obeys` on COM1, waits for the power button and powers off, by q35's ACPI registers.
fn obedient_sector() -> Vec<u8> {
    let mut code = vec![0xfa]; // cli
    for byte in b"\nobeys\n" {
        code.extend([0xba, 0xf8, 0x03, 0xb0, *byte, 0xee]); // mov dx, 0x3f8; mov al, byte; out dx, al
    }
    code.extend([0xba, 0x02, 0x06, 0xb8, 0x00, 0x01, 0xef]); // mov dx, 0x602; mov ax, 0x100; out dx, ax
    code.extend([0xba, 0x00, 0x06, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xf7]); // again: mov dx, 0x600; in ax, dx; test ah, 1; jz again
    code.extend([0xb8, 0x00, 0x01, 0xef]); // mov ax, 0x100; out dx, ax
    code.extend([0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, 0xf4, 0xeb, 0xfd]); // mov dx, 0x604; mov ax, 0x2000; out dx, ax; hlt
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

fn address(c: &Cluster, ns: &str) -> String {
    instance(c, ns)["status"]["interfaces"][0]["ipAddress"].as_str().unwrap_or_default().to_owned()
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
    let kept = address(c, &ns);
    assert!(kept.contains('.'), "{kept}");
    vm(c, &ns, "restart").good();
    assert_ne!(instance(c, &ns)["metadata"]["uid"], before);
    assert_eq!(address(c, &ns), kept, "one address for life");
    vm(c, &ns, "stop").good();
    c.until("it has stopped", || status(c, &ns) == "Stopped");
    vm(c, &ns, "start").good();
    assert_eq!(address(c, &ns), kept, "and over a stop");
    vm(c, &ns, "stop").good();
    c.until("nothing is left of it", || {
        c.kubectl(&["get", "pods,vmi", "-n", &ns, "-o", "name"]).good().trim().is_empty()
    });
    c.kubectl(&["delete", "vm", "m", "-n", &ns]).good();
    let given_back = format!("{{\"forget\":{{\"key\":\"vm/{ns}/m\"}}}}");
    c.until("the address of a machine that is gone is free again", || {
        std::fs::read_to_string(c.data().join("network/addresses")).unwrap().contains(&given_back)
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

/// A client of KubeVirt's websockets with nothing but Python's sockets: `client.py KUBECONFIG PATH PROTOCOL`. What it is given in hex
/// goes into one message; all that comes is printed in hex, until as many bytes came as asked for.
const CLIENT: &str = r#"
import base64, os, re, socket, ssl, struct, sys, tempfile
config, path, protocol, send, want = sys.argv[1:]
text = open(config).read()
field = lambda name: re.search(name + r":\s*(\S+)", text).group(1)
def file(name):
    handle, path = tempfile.mkstemp()
    os.write(handle, base64.b64decode(field(name)))
    return path
host, port = re.search(r"https://([^:]+):(\d+)", text).groups()
context = ssl.create_default_context(cafile=file("certificate-authority-data"))
context.load_cert_chain(file("client-certificate-data"), file("client-key-data"))
stream = context.wrap_socket(socket.create_connection((host, int(port))), server_hostname=host)
stream.settimeout(60)
key = base64.b64encode(os.urandom(16)).decode()
head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
if protocol: head += f"Sec-WebSocket-Protocol: {protocol}\r\n"
stream.sendall((head + "\r\n").encode())
data = b""
def take(n):
    global data
    while len(data) < n:
        more = stream.recv(4096)
        if not more: sys.exit("closed early: " + repr(data))
        data += more
    out, data = data[:n], data[n:]
    return out
answer = b""
while not answer.endswith(b"\r\n\r\n"): answer += take(1)
print(answer.decode().split("\r\n")[0])
chosen = re.search(rb"(?i)sec-websocket-protocol: (\S+)", answer)
print(chosen.group(1).decode() if chosen else "")
if b" 101 " not in answer.split(b"\r\n")[0]: sys.exit(take(20).decode())
def message(payload):
    mask = os.urandom(4)
    stream.sendall(bytes([0x82, 0x80 | len(payload)]) + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(payload)))
if send: message(bytes.fromhex(send))
got = b""
while len(got) < int(want):
    first, length = take(2)
    if length == 126: length = struct.unpack(">H", take(2))[0]
    payload = take(length)
    if first & 15 == 2: got += payload
print(got.hex())
"#;

fn websockets(c: &Cluster) -> Outcome {
    if !c.host("sh", &["-c", "command -v python3"]).ok {
        return Outcome::Skipped("needs python3".into());
    }
    let ns = prepared!(c, "t-vm-ws", "Always");
    c.until("the machine runs", || status(c, &ns) == "Running");
    let pod = c.kubectl(&["get", "pods", "-n", &ns, "-o", "name"]).good().trim().to_owned();
    c.until("its first line is logged", || c.kubectl(&["logs", "-n", &ns, &pod]).good().contains("up"));
    let client = c.scratch("client.py");
    std::fs::write(&client, CLIENT).unwrap();
    let config = c.data().join("kubeconfig").to_string_lossy().into_owned();
    let call = |stream: &str, protocol: &str, send: &str, want: &str| {
        let path = format!("/apis/subresources.kubevirt.io/v1/namespaces/{ns}/virtualmachineinstances/m/{stream}");
        c.host("python3", &[&client.to_string_lossy(), &config, &path, protocol, send, want])
    };
    // "ping" is echoed by the guest
    let said = call("console", "plain.kubevirt.io", "70696e67", "4").good();
    assert_eq!(lines(&said), ["HTTP/1.1 101 Switching Protocols", "plain.kubevirt.io", "70696e67"]);
    // "RFB 003.008", as QEMU says
    let said = call("vnc", "plain.kubevirt.io", "", "12").good();
    assert!(said.trim_end().ends_with("524642203030332e3030380a"), "{said}");
    let other = call("console", "v4.channel.k8s.io", "", "0");
    assert!(!other.ok && other.out.contains(" 403 "), "{}{}", other.out, other.err);

    let mut proxy = c
        .inside(env!("CARGO_BIN_EXE_atoll"))
        .args(["vm", "vnc", "m", "-n", &ns, "--proxy-only", "--data-dir"])
        .arg(c.data())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(proxy.stdout.take().unwrap()), &mut line).unwrap();
    let port = json(&line)["port"].to_string();
    let hear = format!(
        "import socket\ns = socket.create_connection(('127.0.0.1', {port}), 60)\nb = b''\n\
         while len(b) < 11: b += s.recv(11 - len(b))\nprint(b.decode(), end='')"
    );
    let said = c.host("python3", &["-c", &hear]).good();
    proxy.kill().unwrap();
    proxy.wait().unwrap();
    assert_eq!(said, "RFB 003.008");
    c.kubectl(&["delete", "vm", "m", "-n", &ns]).good();
    Outcome::Passed
}

fn soft_reboot(c: &Cluster) -> Outcome {
    let ns = prepared!(c, "t-vm-soft", "Halted");
    let disk = c.scratch("obedient.raw");
    std::fs::write(&disk, obedient_sector()).unwrap();
    let (data, disk) = (c.data().to_string_lossy().into_owned(), disk.to_string_lossy().into_owned());
    c.atoll(&["image", "import", "--data-dir", &data, &disk, "--tag", "test/obedient:1"]).good();
    c.apply(&machine(&ns, "m", "Always").replace(IMAGE, "test/obedient:1"));
    c.until("the machine runs", || status(c, &ns) == "Running");
    let (before, pod) = (pod_uid(c, &ns), c.kubectl(&["get", "pods", "-n", &ns, "-o", "name"]).good());
    let ups = || c.kubectl(&["logs", "-n", &ns, pod.trim()]).good().matches("obeys").count();
    c.until("the guest is up", || ups() == 1);
    vm(c, &ns, "softreboot").good();
    c.until("the guest is up again", || ups() == 2);
    assert_eq!((pod_uid(c, &ns), status(c, &ns)), (before, "Running".to_owned()));
    vm(c, &ns, "pause").good();
    let why = vm(c, &ns, "softreboot").bad();
    assert!(why.contains("paused"), "{why}");
    c.kubectl(&["delete", "vm", "m", "-n", &ns]).good();
    Outcome::Passed
}

/// As VMware writes it, of one SATA disk.
fn description(disk: &std::path::Path) -> String {
    let item = |fields: &[(&str, &str)]| {
        let inner: String = fields.iter().map(|(name, value)| format!("<rasd:{name}>{value}</rasd:{name}>")).collect();
        format!("<Item>{inner}</Item>")
    };
    format!(
        r#"<?xml version="1.0" encoding="UTF-8"?><Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="r"
           xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"><References><File ovf:href="m-disk1.vmdk" ovf:id="file1"
           ovf:size="{}"/></References><DiskSection><Info/><Disk ovf:capacity="1" ovf:capacityAllocationUnits="byte * 2^20"
           ovf:diskId="vmdisk1" ovf:fileRef="file1"/></DiskSection><VirtualSystem ovf:id="vm"><Name>Imported</Name>
           <VirtualHardwareSection><Info/>{}{}{}{}{}</VirtualHardwareSection></VirtualSystem></Envelope>"#,
        std::fs::metadata(disk).unwrap().len(),
        item(&[("InstanceID", "1"), ("ResourceType", "3"), ("VirtualQuantity", "1")]),
        item(&[("AllocationUnits", "byte * 2^20"), ("ResourceType", "4"), ("VirtualQuantity", "64")]),
        item(&[("InstanceID", "3"), ("ResourceSubType", "vmware.sata.ahci"), ("ResourceType", "20")]),
        item(&[("HostResource", "ovf:/disk/vmdisk1"), ("Parent", "3"), ("ResourceType", "17")]),
        item(&[("Connection", "VM Network"), ("ResourceSubType", "VmxNet3"), ("ResourceType", "10")]),
    )
}

fn ova(c: &Cluster) -> Outcome {
    if !std::path::Path::new("/usr/bin/qemu-img").exists() {
        return Outcome::Skipped("needs qemu-img (qemu-utils)".into());
    }
    let ns = c.namespace("t-vm-ova");
    let (raw, file) = (c.scratch("ova.raw"), c.scratch("m.ova"));
    let dir = raw.parent().unwrap();
    std::fs::write(&raw, boot_sector()).unwrap();
    let run = |program: &str, args: &[&str]| {
        let output = std::process::Command::new(program).args(args).current_dir(dir).output().unwrap();
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let convert = ["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"];
    run("qemu-img", &[&convert[..], &["ova.raw", "m-disk1.vmdk"]].concat());
    std::fs::write(dir.join("m.ovf"), description(&dir.join("m-disk1.vmdk"))).unwrap();
    let sums = run("sha256sum", &["--tag", "m.ovf", "m-disk1.vmdk"]);
    std::fs::write(dir.join("m.mf"), sums.replace(" (", "(").replace(") =", ")=")).unwrap();
    run("tar", &["--format=ustar", "-cf", "m.ova", "m.ovf", "m.mf", "m-disk1.vmdk"]);

    let (data, file) = (c.data().to_string_lossy().into_owned(), file.to_string_lossy().into_owned());
    let import = ["image", "import", "--data-dir", &data, &file, "--tag", "test/imported:1", "--manifest", "-"];
    let manifest = c.atoll(&import).good();
    assert!(manifest.starts_with("apiVersion: kubevirt.io/v1\n"), "{manifest}");
    c.apply(&manifest.replacen("metadata:", &format!("metadata:\n  namespace: {ns}"), 1));
    c.until("the machine is seen", || {
        let state = ["get", "vm", "imported", "-n", &ns, "-o", "jsonpath={.status.printableStatus}"];
        c.kubectl(&state).good() == "Stopped"
    });
    c.atoll(&["vm", "start", "imported", "-n", &ns, "--wait", "120"]).good();
    let pod = c.kubectl(&["get", "pods", "-n", &ns, "-o", "name"]).good().trim().to_owned();
    c.until("its disk boots", || c.kubectl(&["logs", "-n", &ns, &pod]).good().contains("up"));
    let to = dir.join("machine.yaml").to_string_lossy().into_owned();
    c.atoll(&[&import[..8], &[&to]].concat()).good();
    assert_eq!(std::fs::read_to_string(&to).unwrap(), manifest);
    let raw = raw.to_string_lossy().into_owned();
    let refused = c.atoll(&["image", "import", "--data-dir", &data, &raw, "--manifest", "-"]).bad();
    assert!(refused.contains("describes no machine"), "{refused}");
    // firmware without a system keeps a processor busy
    c.kubectl(&["delete", "vm", "imported", "-n", &ns]).good();
    Outcome::Passed
}
