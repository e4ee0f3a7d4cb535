//! Pods that sleep and go on where they were: revisions at zero, and pods by annotation.

use crate::cluster::{Cluster, Said};
use crate::{Outcome, Test, microvm};
use rustix::process::Signal;

pub const TESTS: &[Test] = &[
    ("sleep_frozen_revision_goes_on_where_it_was", frozen),
    ("sleep_by_annotation", by_annotation),
    ("sleep_as_a_snapshot", snapshot),
];

const IMAGE: &str = "127.0.0.1:5000/test/busybox:1";
/// Its page is what the kernel gave to this life of it, and its log grows while it runs.
const PROGRAM: &str = "cat /proc/sys/kernel/random/uuid > /tmp/index.html; httpd -p 8080 -h /tmp; n=0; \
                       while :; do n=$((n+1)); echo $n; sleep 0.2; done";

fn web(ns: &str, annotation: &str, class: &str) -> String {
    format!(
        "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {{name: web, namespace: {ns}}}\nspec:\n  template:\n    \
         metadata:\n      annotations:\n        autoscaling.knative.dev/min-scale: '0'\n        \
         autoscaling.knative.dev/window: 6s\n        autoscaling.knative.dev/max-scale: '1'\n{annotation}    spec:\n{class}      \
         timeoutSeconds: 100\n      containers:\n      - image: {IMAGE}\n        command: [sh, -c, '{PROGRAM}']\n"
    )
}

fn page(c: &Cluster, host: &str) -> String {
    let args = ["-sf", "-m", "100", "-H", &format!("Host: {host}"), "http://127.0.0.1:8080/"];
    Said::of(c.inside("curl").args(args).output().unwrap()).good()
}

fn pods(c: &Cluster, ns: &str, path: &str) -> String {
    c.kubectl(&["get", "pods", "-n", ns, "-o", &format!("jsonpath={{{path}}}")]).good()
}

/// Its pod is there and sleeps.
fn asleep(c: &Cluster, ns: &str) {
    let said = ".items[0].status.conditions[?(@.type==\"Ready\")].reason";
    c.until("it sleeps", || pods(c, ns, said) == "Asleep");
}

fn revision(c: &Cluster, ns: &str, path: &str) -> String {
    c.kubectl(&["get", "-n", ns, "revision/web-00001", "-o", &format!("jsonpath={{{path}}}")]).good()
}

fn stands_still(c: &Cluster, ns: &str, pod: &str) {
    let log = || c.kubectl(&["logs", "-n", ns, pod]).good();
    let before = log();
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert_eq!(before, log());
}

fn frozen(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-frozen");
    let wrong = web(&ns, "        functions.atoll.dev/sleep: snapshot\n", "");
    let told = c.kubectl_with(&["apply", "-f", "-"], &wrong).bad();
    assert!(told.contains("runtimeClassName: microvm") && told.contains("functions.atoll.dev/sleep"), "{told}");
    c.apply(&web(&ns, "        functions.atoll.dev/sleep: frozen\n", ""));
    c.wait_ready(&ns, "ksvc/web");
    let host = "web.t-frozen.atoll.local";
    c.until("it is served", || !page_or_nothing(c, host).is_empty());
    let life = page(c, host);
    let uid = pods(c, &ns, ".items[*].metadata.uid");
    for restart in [false, true, false] {
        asleep(c, &ns);
        if restart {
            c.stop(Signal::KILL);
            c.up();
        }
        let name = pods(c, &ns, ".items[0].metadata.name");
        stands_still(c, &ns, &name);
        c.until("its revision says so", || {
            let said = [".status.desiredReplicas", ".status.conditions[?(@.type==\"Active\")].reason"];
            said.map(|path| revision(c, &ns, path)) == ["0", "NoTraffic"]
        });
        c.wait_ready(&ns, "ksvc/web");
        assert!(c.kubectl(&["get", "pods", "-n", &ns]).good().contains("Asleep"));
        let told = c.kubectl(&["exec", "-n", &ns, &name, "--", "true"]).bad();
        assert!(told.contains("sleeps (frozen)") && told.contains("atoll.dev/asleep-"), "{told}");
        let url = "http://127.0.0.1:8080/?[1-60]";
        let args = ["-s", "-Z", "--parallel-immediate", "--parallel-max", "60", "-H", &format!("Host: {host}"), url];
        let all = Said::of(c.inside("curl").args(args).output().unwrap()).good();
        assert_eq!(all, life.repeat(60), "the same program answers everybody");
    }
    assert_eq!(pods(c, &ns, ".items[*].metadata.uid"), uid);
    assert_eq!(pods(c, &ns, ".items[0].status.containerStatuses[0].restartCount"), "0");
    asleep(c, &ns);
    c.kubectl(&["delete", "ksvc", "web", "-n", &ns]).good();
    c.until("who sleeps can be deleted", || pods(c, &ns, ".items[*].metadata.name").is_empty());
    Outcome::Passed
}

fn page_or_nothing(c: &Cluster, host: &str) -> String {
    let args = ["-sf", "-m", "100", "-H", &format!("Host: {host}"), "http://127.0.0.1:8080/"];
    Said::of(c.inside("curl").args(args).output().unwrap()).out
}

fn by_annotation(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-asleep");
    c.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: {ns}}}\nspec:\n  terminationGracePeriodSeconds: 5\n  \
         containers:\n  - name: c\n    image: {IMAGE}\n    command: [sh, -c, 'trap \"exit 0\" TERM; {PROGRAM}']\n    \
         livenessProbe: {{exec: {{command: ['true']}}, periodSeconds: 1, timeoutSeconds: 1, failureThreshold: 1}}\n"
    ));
    c.wait_ready(&ns, "pod/p");
    let annotate = |value: &str| c.kubectl(&["annotate", "pod", "p", "-n", &ns, "--overwrite", value]);
    let told = annotate("atoll.dev/asleep=deep").bad();
    assert!(told.contains("must be frozen or snapshot"), "{told}");
    annotate("atoll.dev/asleep=snapshot").good();
    let events = || c.kubectl(&["get", "events", "-n", &ns]).good();
    c.until("it says why it does not", || events().contains("only pods with runtimeClassName microvm can"));
    c.wait_ready(&ns, "pod/p");
    annotate("atoll.dev/asleep=frozen").good();
    asleep(c, &ns);
    stands_still(c, &ns, "p");
    annotate("atoll.dev/asleep-").good();
    c.wait_ready(&ns, "pod/p");
    let lines = || c.kubectl(&["logs", "-n", &ns, "p"]).good().lines().count();
    let before = lines();
    c.until("it goes on", || lines() > before);
    assert_eq!(pods(c, &ns, ".items[0].status.containerStatuses[0].restartCount"), "0", "no probe judged it");
    annotate("atoll.dev/asleep=frozen").good();
    asleep(c, &ns);
    c.kubectl(&["delete", "pod", "p", "-n", &ns, "--timeout=20s"]).good();
    Outcome::Passed
}

fn snapshot(c: &Cluster) -> Outcome {
    if let Err(outcome) = microvm::with_kernel(c) {
        return outcome;
    }
    let ns = c.namespace("t-snapshot-sleep");
    c.apply(&web(&ns, "", "      runtimeClassName: microvm\n"));
    c.kubectl(&["wait", "-n", &ns, "ksvc/web", "--for=condition=Ready", "--timeout=300s"]).good();
    let host = "web.t-snapshot-sleep.atoll.local";
    c.until("it is served", || !page_or_nothing(c, host).is_empty());
    let life = page(c, host);
    let uid = pods(c, &ns, ".items[*].metadata.uid");
    let files = c.data().join("pods").join(&uid).join("asleep");
    let name = pods(c, &ns, ".items[0].metadata.name");
    for restart in [false, true] {
        asleep(c, &ns);
        assert!(files.join("memory").exists() && files.join("state").exists());
        assert!(!machine_runs(&uid), "no process holds its memory");
        if restart {
            c.stop(Signal::KILL);
            c.up();
        }
        stands_still(c, &ns, &name);
        assert_eq!(page(c, host), life, "the same program answers");
        assert!(!files.exists());
        let clock = || c.kubectl(&["exec", "-n", &ns, &name, "--", "date", "+%s"]).good();
        let there: i64 = clock().trim().parse().unwrap();
        assert!((api::time::now() - there).abs() < 20, "{there}");
    }
    assert_eq!(pods(c, &ns, ".items[*].metadata.uid"), uid);
    assert_eq!(pods(c, &ns, ".items[0].status.containerStatuses[0].restartCount"), "0");
    // Files that cannot be gone on from: the pod begins anew, and nobody is refused.
    asleep(c, &ns);
    std::fs::write(files.join("state"), "nonsense").unwrap();
    let anew = page(c, host);
    assert!(!anew.is_empty() && anew != life, "{anew}");
    assert!(c.kubectl(&["get", "events", "-n", &ns]).good().contains("FailedWake"));
    asleep(c, &ns);
    c.kubectl(&["delete", "ksvc", "web", "-n", &ns]).good();
    c.until("who sleeps can be deleted", || pods(c, &ns, ".items[*].metadata.name").is_empty());
    assert!(!files.exists());
    Outcome::Passed
}

/// Whether any process was started for this pod's machine.
fn machine_runs(uid: &str) -> bool {
    let lines = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path().join("cmdline"));
    lines.filter_map(|path| std::fs::read(path).ok()).any(|line| String::from_utf8_lossy(&line).contains(uid))
}
