//! Containers in a machine of their own, `runtimeClassName: microvm`: what a pod does in the other boundary it does here.

use crate::cluster::Cluster;
use crate::{Outcome, Test};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub const TESTS: &[Test] = &[
    ("microvm_without_a_kernel_says_how_to_get_one", no_kernel),
    ("microvm_pod", pod),
    ("microvm_ends", ends),
    ("microvm_network", network),
    ("microvm_life", life),
    ("microvm_outlives_the_daemon", daemon),
];

const IMAGE: &str = "127.0.0.1:5000/test/busybox:1";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// What the machines need of Debian's cloud kernel; others are built in.
const MODULES: [&str; 18] = [
    "virtio",
    "virtio_ring",
    "virtio_pci",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "net_failover",
    "failover",
    "virtio_console",
    "virtio-rng",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
    "erofs",
    "libcrc32c",
    "overlay",
];

fn lacks() -> Option<String> {
    let program = Path::new("/usr/bin/qemu-system-x86_64");
    (std::env::var_os(crate::nested::INSIDE).is_none() && !program.exists())
        .then(|| format!("{} is not here; apt-get install qemu-system-x86", program.display()))
}

fn kernel_ls(c: &Cluster) -> String {
    c.atoll(&["kernel", "ls", "--data-dir", &c.data().to_string_lossy()]).good()
}

/// The kernel is there, with all its modules.
pub fn with_kernel(c: &Cluster) -> Result<(), Outcome> {
    if let Some(why) = lacks() {
        return Err(Outcome::Skipped(why));
    }
    if kernel_ls(c).contains("yes") {
        return Ok(());
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let cache = root.join(".cache/nested");
    let made = Command::new(root.join("scripts/nested.sh")).arg(&cache).output().unwrap();
    if !made.status.success() {
        return Err(Outcome::Skipped(String::from_utf8_lossy(&made.stderr).trim().to_owned()));
    }
    let files = MODULES.iter().map(|name| cache.join("modules").join(format!("{name}.ko"))).filter(|p| p.exists());
    let files: Vec<PathBuf> = files.chain([cache.join("vmlinuz")]).collect();
    let data = c.data().to_string_lossy().into_owned();
    let mut args = vec!["kernel", "add", "--data-dir", &data, "--name", "cloud"];
    args.extend(files.iter().filter_map(|p| p.to_str()));
    assert_eq!(c.atoll(&args).good().trim(), "cloud (default)");
    Ok(())
}

fn wait(c: &Cluster, ns: &str, what: &str, condition: &str) {
    c.kubectl(&["wait", "-n", ns, what, &format!("--for={condition}"), "--timeout=300s"]).good();
}

fn sh(c: &Cluster, ns: &str, pod: &str, container: &str, script: &str) -> String {
    c.kubectl(&["exec", "-n", ns, pod, "-c", container, "--", "sh", "-c", script]).good().trim().to_owned()
}

fn field(c: &Cluster, ns: &str, pod: &str, path: &str) -> String {
    c.kubectl(&["get", "pod", "-n", ns, pod, "-o", &format!("jsonpath={{{path}}}")]).out
}

fn no_kernel(c: &Cluster) -> Outcome {
    if let Some(why) = lacks() {
        return Outcome::Skipped(why);
    }
    if kernel_ls(c).contains("yes") {
        return Outcome::Skipped("an earlier test has added a kernel".into());
    }
    let ns = c.namespace("t-microvm-none");
    c.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: {ns}}}\nspec:\n  runtimeClassName: microvm\n  \
         terminationGracePeriodSeconds: 0\n  containers: [{{name: c, image: {IMAGE}, command: [sleep, '1000']}}]\n"
    ));
    let doctor = || c.atoll(&["doctor", "--data-dir", &c.data().to_string_lossy()]).good();
    let told = doctor().lines().find(|line| line.starts_with("guest kernel")).unwrap_or_default().to_owned();
    assert!(told.contains(" no ") && told.contains("atoll kernel add --from-deb"), "{told}");
    let reason = ".status.containerStatuses[0].state.waiting.reason";
    c.until("the pod says what it waits for", || field(c, &ns, "p", reason) == "NoGuestKernel");
    let said = c.kubectl(&["get", "events", "-n", &ns]).good();
    assert!(said.contains("atoll kernel add --from-deb"), "{said}");
    assert!(with_kernel(c).is_ok());
    let told = doctor().lines().find(|line| line.starts_with("guest kernel")).unwrap_or_default().to_owned();
    assert!(told.contains(" yes ") && told.contains("cloud, "), "{told}");
    wait(c, &ns, "pod/p", "condition=Ready");
    c.kubectl(&["delete", "pod", "-n", &ns, "p"]).good();
    Outcome::Passed
}

/// Two containers, an init container, all kinds of volumes; exec, attach, logs, copy, port-forward.
fn pod(c: &Cluster) -> Outcome {
    if let Err(outcome) = with_kernel(c) {
        return outcome;
    }
    let ns = c.namespace("t-microvm");
    c.kubectl(&["create", "-n", &ns, "configmap", "settings", "--from-literal=colour=blue"]).good();
    c.kubectl(&["create", "-n", &ns, "secret", "generic", "login", "--from-literal=password=s3cret"]).good();
    c.apply(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: p, namespace: {ns}, labels: {{app: p}}}}
spec:
  runtimeClassName: microvm
  terminationGracePeriodSeconds: 1
  volumes:
  - {{name: settings, configMap: {{name: settings}}}}
  - {{name: login, secret: {{secretName: login, defaultMode: 0400}}}}
  - {{name: scratch, emptyDir: {{}}}}
  - {{name: me, downwardAPI: {{items: [{{path: labels, fieldRef: {{fieldPath: metadata.labels}}}}]}}}}
  initContainers:
  - {{name: first, image: {IMAGE}, command: [sh, -c, 'echo from-init > /scratch/f'], volumeMounts: [{{name: scratch, mountPath: /scratch}}]}}
  containers:
  - name: web
    image: {IMAGE}
    command: [sh, -c, 'mkdir /tmp/w; echo hi > /tmp/w/index.html; echo started; echo problem >&2; exec httpd -f -p 127.0.0.1:8000 -h /tmp/w']
    env: [{{name: COLOUR, valueFrom: {{configMapKeyRef: {{name: settings, key: colour}}}}}}]
    resources: {{limits: {{memory: 64Mi, cpu: '1'}}}}
    readinessProbe: {{exec: {{command: [wget, -qO-, 'http://127.0.0.1:8000/']}}, periodSeconds: 1, timeoutSeconds: 20}}
    volumeMounts:
    - {{name: settings, mountPath: /settings}}
    - {{name: login, mountPath: /login}}
    - {{name: scratch, mountPath: /scratch}}
    - {{name: scratch, mountPath: /sub, subPath: a/b}}
    - {{name: me, mountPath: /me}}
  - name: side
    image: {IMAGE}
    command: [sh, -c, 'trap \"exit 7\" TERM; while :; do sleep 0.2; done']
    securityContext: {{runAsUser: 1000, readOnlyRootFilesystem: true}}
    volumeMounts: [{{name: scratch, mountPath: /scratch}}]
"
    ));
    wait(c, &ns, "pod/p", "condition=Ready");
    let host = std::fs::read_to_string(BOOT_ID).unwrap();
    assert_ne!(sh(c, &ns, "p", "web", &format!("cat {BOOT_ID}")), host.trim(), "a kernel of its own");
    assert_eq!(
        sh(c, &ns, "p", "web", "echo $COLOUR; cat /settings/colour; echo; cat /login/password"),
        "blue\nblue\ns3cret"
    );
    assert_eq!(sh(c, &ns, "p", "web", "cat /me/labels /scratch/f; hostname"), "app=\"p\"from-init\np");
    assert_eq!(sh(c, &ns, "p", "web", "echo below > /sub/g; cat /scratch/a/b/g"), "below");
    assert_eq!(
        sh(c, &ns, "p", "side", "id -u; cat /scratch/a/b/g; wget -qO- http://127.0.0.1:8000/"),
        "1000\nbelow\nhi"
    );
    assert!(!c.kubectl(&["exec", "-n", &ns, "p", "-c", "side", "--", "touch", "/x"]).ok, "its root is read-only");
    assert_eq!(sh(c, &ns, "p", "web", "grep CapEff /proc/self/status | grep -c ffffffff; :"), "0");
    let code =
        c.inside("kubectl").args(["exec", "-n", &ns, "p", "-c", "web", "--", "sh", "-c", "exit 3"]).output().unwrap();
    assert_eq!(code.status.code(), Some(3));
    let missing = c.kubectl(&["exec", "-n", &ns, "p", "-c", "web", "--", "/no/such"]).bad();
    assert!(missing.contains("/no/such"), "{missing}");
    let tty = format!(
        "stty rows 33 cols 77; kubectl exec -it -n {ns} p -c web -- sh -c 'tty; for i in 1 2 3 4 5 6 7 8 9; do stty size 2>/dev/null | grep 33 && break; sleep 0.5; done'"
    );
    let said = c.inside("script").args(["-qec", &tty, "/dev/null"]).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("/dev/pts/") && said.contains("33 77"), "{said}");
    let log = c.kubectl(&["logs", "-n", &ns, "p", "-c", "web"]).good();
    assert!(log.contains("started\n") && log.contains("problem\n"), "{log}");
    copy_and_forward(c, &ns);
    c.kubectl(&["patch", "-n", &ns, "configmap", "settings", "-p", "{\"data\":{\"colour\":\"green\"}}"]).good();
    c.until("the volume follows its source", || sh(c, &ns, "p", "web", "cat /settings/colour") == "green");
    c.kubectl(&["delete", "pod", "-n", &ns, "p", "--timeout=60s"]).good();
    assert!(!c.kubectl(&["get", "pod", "-n", &ns, "p"]).ok);
    Outcome::Passed
}

fn copy_and_forward(c: &Cluster, ns: &str) {
    let (file, back) = (c.scratch("vm-cp.bin"), c.scratch("vm-cp.back"));
    let bytes: Vec<u8> = (0..700_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    std::fs::write(&file, &bytes).unwrap();
    c.kubectl(&["cp", "-c", "web", &file.to_string_lossy(), &format!("{ns}/p:/tmp/w/there")]).good();
    c.kubectl(&["cp", "-c", "web", &format!("{ns}/p:/tmp/w/there"), &back.to_string_lossy()]).good();
    assert!(std::fs::read(&back).unwrap() == bytes, "what came back differs");
    let mut command = c.inside("kubectl");
    command.args(["port-forward", "-n", ns, "pod/p", "18077:8000"]);
    let mut forward = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let get = |path: &str| {
        c.inside("curl").args(["-fsS", "-m", "20", &format!("http://127.0.0.1:18077/{path}")]).output().unwrap().stdout
    };
    c.until("the forwarded port answers", || get("") == b"hi\n");
    assert!(get("there") == bytes);
    forward.kill().unwrap();
    forward.wait().unwrap();
}

/// Exit codes, restarts, messages, the log of a run that is over; what a machine cannot have is refused by name.
fn ends(c: &Cluster) -> Outcome {
    if let Err(outcome) = with_kernel(c) {
        return outcome;
    }
    let ns = c.namespace("t-microvm-ends");
    let pod = |name: &str, policy: &str, rest: &str| {
        c.apply(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {ns}}}\nspec:\n  runtimeClassName: microvm\n  \
             restartPolicy: {policy}\n  terminationGracePeriodSeconds: 0\n{rest}"
        ));
    };
    let one = |script: &str| format!("  containers: [{{name: c, image: {IMAGE}, command: [sh, -c, '{script}']}}]\n");
    pod("once", "Never", &one("echo last words; echo why > /dev/termination-log; exit 5"));
    pod("again", "OnFailure", &one("[ $(cat /proc/uptime | cut -d. -f1) -gt 0 ] && echo run; exit 1"));
    pod(
        "hostpath",
        "Never",
        &format!(
            "  volumes: [{{name: h, hostPath: {{path: /etc}}}}]\n  containers: [{{name: c, image: {IMAGE}, command: [sleep, '9'], \
             volumeMounts: [{{name: h, mountPath: /h}}]}}]\n"
        ),
    );
    wait(c, &ns, "pod/once", "jsonpath={.status.phase}=Failed");
    let ended = ".status.containerStatuses[0].state.terminated";
    assert_eq!(field(c, &ns, "once", &format!("{ended}.exitCode")), "5");
    assert_eq!(field(c, &ns, "once", &format!("{ended}.message")), "why\n");
    assert_eq!(c.kubectl(&["logs", "-n", &ns, "once"]).good(), "last words\n");
    let count = ".status.containerStatuses[0].restartCount";
    c.until("it was started again", || field(c, &ns, "again", count).parse::<u32>().is_ok_and(|n| n > 0));
    c.until("the pod with a hostPath says why not", || {
        c.kubectl(&["get", "events", "-n", &ns]).out.contains("hostPath /etc is on the host")
    });
    c.kubectl(&["delete", "pod", "-n", &ns, "--all"]).good();
    Outcome::Passed
}

/// A Service in front, names, and a namespace that is private.
fn network(c: &Cluster) -> Outcome {
    if let Err(outcome) = with_kernel(c) {
        return outcome;
    }
    let (ns, other) = (c.namespace("t-microvm-net"), c.namespace("t-microvm-other"));
    let client = |ns: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: client, namespace: {ns}}}\nspec:\n  terminationGracePeriodSeconds: 0\n  \
             containers: [{{name: c, image: {IMAGE}, command: [sh, -c, 'while :; do echo hello from a container | nc -l -p 9000; \
             done']}}]\n---\n"
        )
    };
    c.apply(&format!(
        "{}{}apiVersion: v1\nkind: Pod\nmetadata: {{name: web, namespace: {ns}, labels: {{app: web}}}}\nspec:\n  \
         runtimeClassName: microvm\n  terminationGracePeriodSeconds: 0\n  containers:\n  - name: c\n    image: {IMAGE}\n    \
         command: [sh, -c, 'mkdir /tmp/w; hostname > /tmp/w/index.html; exec httpd -f -p 8000 -h /tmp/w']\n    \
         livenessProbe: {{httpGet: {{port: 8000}}, timeoutSeconds: 20, failureThreshold: 10}}\n    \
         readinessProbe: {{tcpSocket: {{port: 8000}}, periodSeconds: 1, timeoutSeconds: 20}}\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: {ns}}}\nspec:\n  selector: {{app: web}}\n  \
         ports: [{{port: 80, targetPort: 8000}}]\n",
        client(&ns),
        client(&other)
    ));
    wait(c, &ns, "pod/web", "condition=Ready");
    c.wait_ready(&ns, "pod/client");
    c.wait_ready(&other, "pod/client");
    let service = c.kubectl(&["get", "service", "-n", &ns, "web", "-o", "jsonpath={.spec.clusterIP}"]).good();
    // Debian's static busybox has a wget that crashes; nc does
    let get = format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {service} 80 | tail -n 1");
    let from = |ns: &str, pod: &str| c.kubectl(&["exec", "-n", ns, pod, "-c", "c", "--", "sh", "-c", &get]).out;
    c.until("the Service leads to the machine", || from(&ns, "client") == "web\n");
    c.until("the machine reaches itself through its Service", || from(&ns, "web") == "web\n");
    let name = format!("web.{ns}.svc.cluster.local");
    assert!(sh(c, &ns, "web", "c", &format!("nslookup -type=a {name} 2>&1; :")).contains(&service));
    let address = field(c, &ns, "client", ".status.podIP");
    assert_eq!(sh(c, &ns, "web", "c", &format!("nc -w 20 {address} 9000")), "hello from a container");
    assert_eq!(from(&other, "client"), "", "a namespace is private");
    let stranger = field(c, &other, "client", ".status.podIP");
    assert_eq!(sh(c, &ns, "web", "c", &format!("nc -w 3 {stranger} 9000; :")), "", "a machine's as well");
    c.kubectl(&["delete", "pod", "-n", &ns, "--all"]).good();
    c.kubectl(&["delete", "pod", "-n", &other, "--all"]).good();
    Outcome::Passed
}

/// Standard input and attach, hooks, a limit on memory, what was said before a restart, IPv6.
fn life(c: &Cluster) -> Outcome {
    if let Err(outcome) = with_kernel(c) {
        return outcome;
    }
    let ns = c.namespace("t-microvm-life");
    c.apply(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: p, namespace: {ns}}}
spec:
  runtimeClassName: microvm
  terminationGracePeriodSeconds: 20
  volumes:
  - {{name: shared, emptyDir: {{}}}}
  - {{name: token, projected: {{sources: [{{serviceAccountToken: {{path: token, audience: shop}}}}]}}}}
  containers:
  - name: talks
    image: {IMAGE}
    stdin: true
    command: [sh, -c, 'while read line; do echo heard $line; done; sleep 1000']
    env:
    - {{name: WHERE, valueFrom: {{fieldRef: {{fieldPath: status.podIP}}}}}}
    - {{name: MOST, valueFrom: {{resourceFieldRef: {{resource: limits.memory}}}}}}
    resources: {{limits: {{memory: 32Mi}}}}
    lifecycle: {{postStart: {{exec: {{command: [sh, -c, 'echo begun > /shared/hook']}}}}}}
    volumeMounts: [{{name: shared, mountPath: /shared}}, {{name: token, mountPath: /token}}]
  - name: hungry
    image: {IMAGE}
    command: [sh, -c, 'echo hungry; [ -e /shared/full ] && exec sleep 1000; touch /shared/full; exec tail /dev/zero']
    resources: {{limits: {{memory: 48Mi}}}}
    volumeMounts: [{{name: shared, mountPath: /shared}}]
"
    ));
    let of =
        |name: &str, path: &str| field(c, &ns, "p", &format!(".status.containerStatuses[?(@.name==\"{name}\")]{path}"));
    c.until("it was killed for its memory", || of("hungry", ".lastState.terminated.reason") == "OOMKilled");
    assert_eq!(of("hungry", ".lastState.terminated.exitCode"), "137");
    wait(c, &ns, "pod/p", "condition=Ready");
    assert_eq!(of("talks", ".restartCount"), "0", "its neighbour goes on");
    assert_eq!(c.kubectl(&["logs", "-n", &ns, "p", "-c", "hungry", "--previous"]).good(), "hungry\n");
    assert_eq!(sh(c, &ns, "p", "talks", "cat /shared/hook"), "begun");
    let (v4, v6) = (field(c, &ns, "p", ".status.podIPs[0].ip"), field(c, &ns, "p", ".status.podIPs[1].ip"));
    assert_eq!(sh(c, &ns, "p", "talks", "echo $WHERE $MOST"), format!("{v4} 33554432"));
    assert_eq!(sh(c, &ns, "p", "talks", "tr . '\\n' < /token/token | wc -l"), "2", "a token of three parts");

    let mut command = c.inside("kubectl");
    command.args(["attach", "-i", "-n", &ns, "p", "-c", "talks"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut attached = command.stderr(Stdio::null()).spawn().unwrap();
    let mut stdin = attached.stdin.take().unwrap();
    c.until("what is typed is heard", || {
        std::io::Write::write_all(&mut stdin, b"you\n").unwrap();
        c.kubectl(&["logs", "-n", &ns, "p", "-c", "talks"]).good().contains("heard you")
    });
    let _ = (attached.kill(), attached.wait());

    assert!(v6.contains(':'), "{v6}");
    let serve = "while :; do echo over six | nc -l -p 9000; done > /dev/null 2>&1 &";
    sh(c, &ns, "p", "talks", serve);
    c.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: client, namespace: {ns}}}\nspec:\n  terminationGracePeriodSeconds: 0\n  \
         containers: [{{name: c, image: {IMAGE}, command: [sleep, '1000']}}]\n"
    ));
    c.wait_ready(&ns, "pod/client");
    c.until("it is reached by IPv6", || {
        let ask = format!("nc -w 5 {v6} 9000");
        c.kubectl(&["exec", "-n", &ns, "client", "--", "sh", "-c", &ask]).out == "over six\n"
    });
    c.kubectl(&["delete", "pod", "-n", &ns, "--all", "--timeout=90s"]).good();
    Outcome::Passed
}

/// `atoll up` is killed: the pod goes on, and what it said meanwhile is in its log.
fn daemon(c: &Cluster) -> Outcome {
    if let Err(outcome) = with_kernel(c) {
        return outcome;
    }
    let ns = c.namespace("t-microvm-daemon");
    c.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: {ns}}}\nspec:\n  runtimeClassName: microvm\n  \
         terminationGracePeriodSeconds: 0\n  containers: [{{name: c, image: {IMAGE}, command: [sh, -c, \
         'i=0; while :; do i=$((i+1)); echo line $i; sleep 0.5; done']}}]\n"
    ));
    wait(c, &ns, "pod/p", "condition=Ready");
    let logged = || c.kubectl(&["logs", "-n", &ns, "p"]).out.lines().count();
    c.until("it says something", || logged() > 2);
    let boot = sh(c, &ns, "p", "c", &format!("cat {BOOT_ID}"));
    c.stop(rustix::process::Signal::KILL);
    c.up();
    let before = logged();
    c.until("it says more", || logged() > before + 4);
    assert_eq!(sh(c, &ns, "p", "c", &format!("cat {BOOT_ID}")), boot, "it is the same machine");
    assert_eq!(field(c, &ns, "p", ".status.containerStatuses[0].restartCount"), "0");
    let log = c.kubectl(&["logs", "-n", &ns, "p"]).good();
    let mut numbers: Vec<u32> = log.lines().filter_map(|l| l.strip_prefix("line ")?.parse().ok()).collect();
    numbers.dedup();
    let missing: Vec<u32> = (1..=*numbers.last().unwrap()).filter(|n| !numbers.contains(n)).collect();
    assert!(missing.is_empty(), "{missing:?} of {} lines are missing", numbers.len());
    c.kubectl(&["delete", "pod", "-n", &ns, "p"]).good();
    Outcome::Passed
}
