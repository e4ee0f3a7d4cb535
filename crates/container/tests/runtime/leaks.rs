//! What was there before a thousand containers is there after them, and nothing else. `ATOLL_LOOPS` and `ATOLL_AT_ONCE`
//! set how many; the bench takes 1,000 and 100.

use crate::support::*;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

pub const TESTS: &[(&str, fn())] =
    &[("leaks::one_pod", one_pod), ("leaks::many_pods", many_pods), ("leaks::at_once", at_once)];

fn count(name: &str, usual: usize) -> usize {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(usual)
}

fn entries(path: impl AsRef<Path>) -> usize {
    fs::read_dir(path).map_or(0, Iterator::count)
}

/// All below it.
fn tree(path: &Path) -> usize {
    fs::read_dir(path).into_iter().flatten().flatten().fold(0, |sum, entry| {
        let below = if entry.file_type().is_ok_and(|t| t.is_dir()) { tree(&entry.path()) } else { 0 };
        sum + 1 + below
    })
}

/// Others on this machine mount too: those that lie in these tests' directories.
fn mounts() -> usize {
    let own = [format!("atoll-container-test-{}/", std::process::id()), format!("atoll-test-{}/", std::process::id())];
    let text = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    text.lines().filter(|line| own.iter().any(|name| line.contains(name.as_str()))).count()
}

/// Directories of control groups that these tests made, in every hierarchy.
fn groups() -> usize {
    let name = format!("atoll-test-{}", std::process::id());
    let root = Path::new("/sys/fs/cgroup");
    let trees = fs::read_dir(root).into_iter().flatten().flatten().map(|e| e.path()).chain([root.to_owned()]);
    let directories = |path: &Path| -> usize {
        let mut below = vec![path.to_owned()];
        let mut found = 0;
        while let Some(directory) = below.pop() {
            let all = fs::read_dir(directory).into_iter().flatten().flatten();
            let inner: Vec<_> = all.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect();
            found += inner.len();
            below.extend(inner);
        }
        found
    };
    trees.map(|tree| tree.join(&name)).filter(|path| path.is_dir()).map(|path| 1 + directories(&path)).sum()
}

/// Of this process and of all that came from it.
fn processes() -> usize {
    let mut parents = BTreeMap::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let Ok(text) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let Some((_, rest)) = text.rsplit_once(')') else { continue };
        let parent = rest.split_ascii_whitespace().nth(1).and_then(|p| p.parse::<u32>().ok()).unwrap_or(0);
        let shim = fs::read(entry.path().join("cmdline")).is_ok_and(|c| {
            let words: Vec<&[u8]> = c.split(|b| *b == 0).collect();
            words.get(1) == Some(&&b"shim"[..]) && words.get(2).is_some_and(|w| w.starts_with(b"test/"))
        });
        parents.insert(pid, (parent, shim));
    }
    let own = std::process::id();
    let ours = |mut pid: u32| {
        for _ in 0..64 {
            match parents.get(&pid) {
                _ if pid == own => return true,
                Some((_, true)) => return true,
                Some((parent, _)) => pid = *parent,
                None => return false,
            }
        }
        false
    };
    parents.keys().filter(|pid| ours(**pid)).count()
}

/// What must not grow.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    mounts: usize,
    descriptors: usize,
    groups: usize,
    processes: usize,
    run_files: usize,
    files: usize,
}

impl Traces {
    fn now(base: &Path) -> Self {
        Self {
            mounts: mounts(),
            descriptors: entries("/proc/self/fd"),
            groups: groups(),
            processes: processes(),
            run_files: tree(Path::new(&format!("/run/atoll-test-{}", std::process::id()))),
            files: tree(base),
        }
    }
}

/// The kernel lets go of control groups and processes a moment after they ended.
#[track_caller]
fn comes_back_to(before: &Traces, base: &Path) {
    let mut last = None;
    let deadline = std::time::Instant::now() + LIMIT;
    while std::time::Instant::now() < deadline {
        let now = Traces::now(base);
        if now == *before {
            return;
        }
        last = Some(now);
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("before: {before:?}\nafter: {last:?}");
}

fn anonymous(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("smaps");
    let field = text.lines().find_map(|l| l.strip_prefix("Anonymous:")).expect("field");
    field.trim().trim_end_matches(" kB").trim().parse().expect("number")
}

/// Containers of one pod come and go; the shim stays as it was.
fn one_pod() {
    let pod = Pod::new();
    let shim = pod.client().shim_pid;
    let once = |n: usize| {
        let name = format!("c{}", n % 3);
        let mut start = pod.script(&name, "echo hello; exit 3");
        start.attempt = n as u32;
        let log = start.log_path.clone();
        pod.client().start(start).expect("started");
        assert_eq!(code(&pod.ended(&name)), 3);
        let (code, _) = if n.is_multiple_of(7) { run_and_exec(&pod, n) } else { (0, String::new()) };
        assert_eq!(code, 0);
        pod.client().remove(&pod.sandbox.dir, &name).expect("removed");
        let _ = fs::remove_file(log);
    };
    for n in 0..12 {
        once(n);
    }
    let descriptors = || entries(format!("/proc/{shim}/fd"));
    // The set-up process for the next start is made a moment after one, on version 1 of control groups.
    let (before, of_shim) = eventually("nothing changes for a while", || {
        let traces = || (Traces::now(&pod.base), descriptors());
        let before = traces();
        std::thread::sleep(std::time::Duration::from_millis(300));
        (before == traces()).then_some(before)
    });
    let memory = anonymous(shim);
    let loops = count("ATOLL_LOOPS", 100);
    for n in 0..loops {
        once(12 + n);
    }
    comes_back_to(&before, &pod.base);
    eventually("the shim's descriptors are as they were", || (descriptors() == of_shim).then_some(()));
    let grown = anonymous(shim).saturating_sub(memory);
    // Pages of the set-up process that waits move between shared and private.
    assert!(grown < 256, "the shim has grown by {grown} KiB in {loops} containers");
    println!("  {loops} containers of one pod: the shim grew by {grown} KiB");
}

fn run_and_exec(pod: &Pod, n: usize) -> (i32, String) {
    let mut start = pod.script("long", "exec sleep 1000");
    start.attempt = n as u32;
    let log = start.log_path.clone();
    pod.client().start(start).expect("started");
    let said = pod.exec_output("long", &["true"]);
    pod.client().signal("long", 9).expect("signalled");
    pod.ended("long");
    pod.client().remove(&pod.sandbox.dir, "long").expect("removed");
    let _ = fs::remove_file(log);
    said
}

fn many_pods() {
    let base = layers()[0].parent().expect("base").to_owned();
    let once = || {
        let pod = Pod::new();
        pod.client().start(pod.script("a", "exit 0")).expect("started");
        pod.client().start(pod.script("b", "exec sleep 1000")).expect("started");
        let base = pod.base.clone();
        drop(pod);
        let _ = fs::remove_dir_all(base);
    };
    once();
    let before = Traces::now(&base);
    let loops = count("ATOLL_LOOPS", 100).div_ceil(4);
    for _ in 0..loops {
        once();
    }
    comes_back_to(&before, &base);
    println!("  {loops} pods: nothing is left");
}

fn at_once() {
    let base = layers()[0].parent().expect("base").to_owned();
    let before = Traces::now(&base);
    let wanted = count("ATOLL_AT_ONCE", 30);
    let pods: Vec<Pod> = (0..wanted.div_ceil(10)).map(|_| Pod::new()).collect();
    std::thread::scope(|scope| {
        for n in 0..wanted {
            let pod = &pods[n % pods.len()];
            scope.spawn(move || {
                let name = format!("c{n}");
                pod.client().start(pod.script(&name, "exec sleep 1000")).expect("started");
            });
        }
    });
    let running: usize = pods.iter().map(|p| p.client().list().expect("list").1.len()).sum();
    assert_eq!(running, wanted);
    for pod in pods {
        let base = pod.base.clone();
        drop(pod);
        let _ = fs::remove_dir_all(base);
    }
    comes_back_to(&before, &base);
    println!("  {wanted} containers at once: nothing is left");
}
