//! Pods come and go through the API: what `atoll up` holds and what lies about is as before. `ATOLL_LOOPS` sets how many.

use crate::build::run_dir;
use crate::cluster::Cluster;
use crate::{Outcome, Test};
use std::fmt::Write;
use std::fs;
use std::path::Path;

pub const TESTS: &[Test] = &[("pods_leave_nothing", leave_nothing)];

const AT_ONCE: usize = 30;

/// All below it.
fn tree(path: &Path) -> usize {
    fs::read_dir(path).into_iter().flatten().flatten().fold(0, |sum, entry| {
        let below = if entry.file_type().is_ok_and(|t| t.is_dir()) { tree(&entry.path()) } else { 0 };
        sum + 1 + below
    })
}

/// What must not grow.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    mounts: usize,
    links: usize,
    namespaces: usize,
    descriptors: usize,
    groups: usize,
    shims: usize,
    files: usize,
}

impl Traces {
    fn now(c: &Cluster) -> Self {
        let up = c.up_pid();
        let read = |file: &str| fs::read_to_string(format!("/proc/{up}/{file}")).unwrap_or_default();
        let processes: Vec<u32> =
            fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
        let data = c.data().to_string_lossy().into_owned();
        // Of this instance: each shim's files are in its data directory.
        let is_shim = |pid: &u32| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(b"atoll\0shim\0"))
                && fs::read_link(format!("/proc/{pid}/fd/2")).is_ok_and(|log| log.to_string_lossy().starts_with(&data))
        };
        let run = run_dir(c);
        let instance = run.file_name().unwrap_or_default().to_owned();
        let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
        let groups = hierarchies.map(|h| tree_of_directories(&h.path().join("atoll").join(&instance))).sum::<usize>()
            + tree_of_directories(&Path::new("/sys/fs/cgroup/atoll").join(&instance));
        Self {
            mounts: read("mountinfo").lines().count(),
            links: router_links(c),
            namespaces: fs::read_dir(run.join("netns")).map_or(0, Iterator::count),
            descriptors: fs::read_dir(format!("/proc/{up}/fd")).map_or(0, Iterator::count),
            groups,
            shims: processes.iter().filter(|pid| is_shim(pid)).count(),
            files: tree(&c.data().join("pods")) + tree(&run.join("pods")),
        }
    }
}

fn tree_of_directories(path: &Path) -> usize {
    fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .fold(0, |sum, entry| sum + 1 + tree_of_directories(&entry.path()))
}

/// In the namespaces of all threads: some are in the router's.
fn router_links(c: &Cluster) -> usize {
    let up = c.up_pid();
    let mut seen = std::collections::BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{up}/task")).into_iter().flatten().flatten() {
        let (Ok(net), Ok(text)) =
            (fs::read_link(task.path().join("ns/net")), fs::read_to_string(task.path().join("net/dev")))
        else {
            continue;
        };
        seen.insert(net, text.lines().count());
    }
    seen.values().sum()
}

/// So many pods, at once; each says a word and ends.
fn round(c: &Cluster, ns: &str, count: usize) {
    let mut yaml = String::new();
    for n in 0..count {
        let _ = write!(
            yaml,
            "---
apiVersion: v1
kind: Pod
metadata: {{name: p{n}, namespace: {ns}}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  volumes: [{{name: v, emptyDir: {{}}}}]
  containers: [{{name: c, image: '127.0.0.1:5000/test/busybox:1', command: [echo, hello], volumeMounts: [{{name: v, mountPath: /v}}]}}]
"
        );
    }
    c.apply(&yaml);
    c.kubectl(&["wait", "-n", ns, "pod", "--all", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s"]).good();
    c.kubectl(&["delete", "-n", ns, "pod", "--all", "--wait"]).good();
}

fn leave_nothing(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-leaks");
    let rounds =
        std::env::var("ATOLL_LOOPS").ok().and_then(|n| n.parse::<usize>().ok()).unwrap_or(30).div_ceil(AT_ONCE);
    round(c, &ns, AT_ONCE);
    let before = Traces::now(c);
    for _ in 0..rounds {
        round(c, &ns, AT_ONCE);
    }
    let mut now = Traces::now(c);
    c.until(&format!("{} pods have left nothing: {before:?}", rounds * AT_ONCE), || {
        now = Traces::now(c);
        let settled = now == before;
        if !settled {
            eprintln!("  still {now:?}");
        }
        settled
    });
    Outcome::Passed
}
