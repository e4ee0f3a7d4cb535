//! Starts, ends, and what stays in between.

use crate::support::*;
use container::Error;
use container::client::{self, Client, Waiting};
use container::shim::protocol::{Phase, Sandbox, Start};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

pub const TESTS: &[(&str, fn())] = &[
    ("lifecycle::exit_codes", exit_codes),
    ("lifecycle::start_errors", start_errors),
    ("lifecycle::idempotent", idempotent),
    ("lifecycle::waiting_shims", waiting_shims),
    ("lifecycle::watch", watch),
    ("lifecycle::logs", logs),
    ("lifecycle::log_rotation", log_rotation),
    ("lifecycle::daemon_killed", daemon_killed),
    ("lifecycle::shim_killed", shim_killed),
    ("lifecycle::pause_and_stats", pause_and_stats),
    ("lifecycle::leaves_nothing", leaves_nothing),
    ("lifecycle::hostile_requests", hostile_requests),
];

fn exit_codes() {
    let pod = Pod::new();
    let (state, _) = pod.run(pod.script("a", "exit 42"));
    assert!(matches!(state.phase, Phase::Exited { code: 42, signal: None, oom_killed: false, .. }), "{state:?}");
    let saved = pod.sandbox.dir.join("containers/a.0/state.json");
    assert!(fs::read_to_string(saved).expect("saved").contains("\"code\":42"));
    pod.client().start(pod.script("b", "sleep 1000")).expect("started");
    pod.client().signal("b", 9).expect("signalled");
    assert!(matches!(pod.ended("b").phase, Phase::Exited { code: 137, signal: Some(9), .. }));
    // A first process has no default actions: it gets the signals that it handles.
    pod.client()
        .start(pod.script("c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.01; done"))
        .expect("started");
    let log = pod.base.join("logs/c/0.log");
    eventually("the trap is set", || output(&log, "stdout").contains("ready").then_some(()));
    pod.client().signal("c", 15).expect("signalled");
    assert_eq!(code(&pod.ended("c")), 7);
    assert!(matches!(pod.client().signal("c", 15), Err(Error::NotRunning(_))));
    assert!(matches!(pod.client().signal("nobody", 15), Err(Error::NoContainer(_))));
    pod.client().start(pod.script("d", "sleep 1000")).expect("started");
    assert!(pod.client().signal("d", 99).is_err());
}

fn start_errors() {
    let pod = Pod::new();
    let refuse = |args: &[&str]| pod.client().start(pod.command("a", args)).expect_err("refused");
    let e = refuse(&["foo"]);
    assert!(matches!(e, Error::Exec { code: 127, .. }));
    assert_eq!(e.to_string(), r#"exec: "foo": executable file not found in $PATH"#);
    assert!(matches!(refuse(&["/no/such"]), Error::Exec { code: 127, .. }));
    assert!(matches!(refuse(&["/bin/noexec"]), Error::Exec { code: 126, .. }));
    assert!(matches!(refuse(&["/etc"]), Error::Exec { code: 126, .. }));
    assert!(refuse(&[]).to_string().contains("args"));
    let mut start = pod.script("a", "true");
    start.layers.push("/no/such/layer".into());
    assert!(pod.client().start(start).expect_err("refused").to_string().contains("/no/such/layer"));
    let mut start = pod.script("a", "true");
    pod.mount(&mut start, "/x", Path::new("/no/such/source"), &["bind"]);
    assert!(pod.client().start(start).expect_err("refused").to_string().contains("/no/such/source"));
    // Nothing is left of any of them, and the name is free.
    assert!(pod.state("a").is_none());
    assert_eq!(fs::read_dir(pod.sandbox.dir.join("containers")).expect("read").count(), 0);
    assert_eq!(pod.run(pod.script("a", "echo ok")).1, "ok\n");
}

fn idempotent() {
    let pod = Pod::new();
    let first = pod.client().start(pod.script("a", "sleep 1000")).expect("started");
    let again = pod.client().start(pod.script("a", "sleep 1000")).expect("found");
    assert_eq!(first, again);
    let mut next = pod.script("a", "echo second");
    next.attempt = 1;
    assert!(pod.client().start(next.clone()).is_err(), "the first attempt still runs");
    assert!(pod.client().remove(&pod.sandbox.dir, "a").is_err(), "it still runs");
    pod.client().signal("a", 9).expect("signalled");
    pod.ended("a");
    pod.client().start(next).expect("takes the place of the one that has ended");
    let state = pod.ended("a");
    assert_eq!(state.attempt, 1);
    pod.client().remove(&pod.sandbox.dir, "a").expect("removed");
    pod.client().remove(&pod.sandbox.dir, "a").expect("removed again");
    assert!(pod.state("a").is_none());
    assert!(!pod.sandbox.dir.join("containers/a.1").exists());
    // A second shim for the same sandbox is refused.
    assert!(client::launch(&shim_executable(), &pod.sandbox).is_err());
    assert_eq!(pod.run(pod.script("b", "echo fine")).1, "fine\n");
}

/// A shim is executed before it is known what for, and then has the pod's name.
fn waiting_shims() {
    let mut waiting = Waiting::execute(&shim_executable()).expect("executed");
    let unused = waiting.pid();
    assert!(waiting.is_alive());
    drop(waiting);
    assert!(fs::metadata(format!("/proc/{unused}")).is_err(), "it has ended");

    let mut waiting = Waiting::execute(&shim_executable()).expect("executed");
    let pod = Pod::unlaunched(|_| {});
    waiting.launch(&pod.sandbox).expect("shim");
    let line = fs::read(format!("/proc/{}/cmdline", pod.client().shim_pid)).expect("cmdline");
    let words: Vec<&[u8]> = line.split(|b| *b == 0).collect();
    assert_eq!(words.get(..3), Some(&[b"atoll".as_slice(), b"shim", pod.sandbox.title.as_bytes()][..]));
    assert_eq!(pod.run(pod.script("a", "echo runs")).1, "runs\n");

    // Whoever would tell it has gone.
    let mut waiting = Waiting::execute(&shim_executable()).expect("executed");
    waiting.hang_up();
    eventually("it ends", || (!waiting.is_alive()).then_some(()));
}

fn watch() {
    let pod = Pod::new();
    let (sequence, _) = pod.client().list().expect("list");
    let changed = pod.client().watch(sequence).expect("watching");
    pod.client().start(pod.script("a", "exit 3")).expect("started");
    wait_readable(&changed);
    let (later, _) = pod.client().list().expect("list");
    assert!(later > sequence);
    // What has already changed is told at once.
    wait_readable(pod.client().watch(sequence).expect("watching"));
    pod.ended("a");
}

fn logs() {
    let pod = Pod::new();
    let start = pod.script("a", "echo one; echo two >&2; printf '%020000d\\n' 7; printf end");
    let log = start.log_path.clone();
    pod.run(start);
    let text = fs::read_to_string(&log).expect("log");
    let lines: Vec<Vec<&str>> = text.lines().map(|l| l.splitn(4, ' ').collect()).collect();
    let stamp = lines[0][0];
    assert!(stamp.len() == 30 && stamp.ends_with('Z') && stamp.as_bytes()[19] == b'.', "{stamp}");
    let of = |stream: &str| -> Vec<(&str, usize)> {
        lines.iter().filter(|l| l[1] == stream).map(|l| (l[2], l[3].len())).collect()
    };
    assert_eq!(of("stdout"), [("F", 3), ("P", 16384), ("F", 20000 - 16384), ("P", 3)]);
    assert_eq!(of("stderr"), [("F", 3)]);
}

fn log_rotation() {
    let pod = Pod::new();
    let mut start = pod.script("a", "i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); done");
    start.log_max_bytes = 4096;
    let log = start.log_path.clone();
    pod.run(start);
    let now = fs::read_to_string(&log).expect("log");
    let old = fs::read_to_string(log.with_extension("log.1")).expect("old log");
    assert!(now.len() <= 4096 && old.len() <= 4096);
    assert!(now.ends_with("stdout F line 299\n"));
    let first: usize =
        now.lines().next().and_then(|l| l.rsplit(' ').next()).and_then(|n| n.parse().ok()).expect("number");
    assert!(old.ends_with(&format!("line {}\n", first - 1)), "nothing is lost between the two");
}

/// The role `daemon` of this test's executable: starts a sandbox and a container as told, then waits to be killed.
pub fn daemon(orders: &str) {
    let orders = fs::File::open(orders).expect("orders");
    let (sandbox, start): (Sandbox, Start) = serde_json::from_reader(orders).expect("orders");
    client::launch(&shim_executable(), &sandbox).expect("shim");
    let mut connection = Client::connect(&sandbox.run_dir).expect("connected");
    connection.start(start).expect("started");
    println!("ready");
    std::thread::sleep(LIMIT);
}

/// The daemon is another process here, which is killed in the middle.
fn daemon_killed() {
    use std::io::{BufRead, BufReader};
    let pod = Pod::unlaunched(|_| {});
    let start = pod.script("a", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done");
    let log = start.log_path.clone();
    fs::create_dir_all(&pod.base).expect("made");
    let orders = pod.base.join("orders.json");
    fs::write(&orders, serde_json::to_vec(&(&pod.sandbox, &start)).expect("orders")).expect("written");
    let mut daemon = Command::new(std::env::current_exe().expect("own path"))
        .arg("daemon")
        .arg(&orders)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("spawned");
    let mut line = String::new();
    BufReader::new(daemon.stdout.take().expect("stdout")).read_line(&mut line).expect("read");
    assert_eq!(line, "ready\n");
    let state = pod.state("a").expect("started");
    let pid = pod.client().shim_pid;
    // Neither a child of the daemon's, nor in its session or its control group.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
    assert_ne!(fields[1], daemon.id().to_string());
    assert_eq!(fields[3], pid.to_string());
    let groups = eventually("the shim is in its own group", || {
        Some(fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("read")).filter(|t| t.contains("/shims"))
    });
    assert!(!groups.contains("/pod"), "{groups}");
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/environ")).expect("read"), "");
    daemon.kill().expect("killed");
    daemon.wait().expect("reaped");
    let before = output(&log, "stdout").lines().count();
    eventually("it writes on", || (output(&log, "stdout").lines().count() > before + 3).then_some(()));
    assert_eq!(pod.state("a").and_then(|s| s.pid), state.pid);
}

fn shim_killed() {
    let pod = Pod::new();
    let state = pod.client().start(pod.script("a", "sleep 1000")).expect("started");
    pod.run(pod.script("b", "exit 5"));
    let shim = pod.client().shim_pid as i32;
    rustix::process::kill_process(rustix::process::Pid::from_raw(shim).expect("pid"), rustix::process::Signal::KILL)
        .expect("killed");
    eventually("it is gone", || Client::connect(&pod.sandbox.run_dir).is_err().then_some(()));
    assert!(matches!(Client::connect(&pod.sandbox.run_dir), Err(Error::NoShim { .. })));
    // A new one ends what the old one left, and knows how the others ended.
    client::launch(&shim_executable(), &pod.sandbox).expect("shim");
    assert!(!Path::new(&format!("/proc/{}", state.pid.expect("pid"))).join("fd/0").exists());
    assert!(matches!(pod.state("a").expect("known").phase, Phase::Exited { code: 137, .. }));
    assert_eq!(code(&pod.state("b").expect("known")), 5);
    pod.client().remove(&pod.sandbox.dir, "a").expect("removed");
    assert_eq!(pod.run(pod.script("a", "echo again")).1, "again\n");
}

fn pause_and_stats() {
    let pod = Pod::new();
    let start = pod.script("a", "while :; do :; done");
    let state = pod.client().start(start).expect("started");
    let cpu = || client::stats(&state.cgroup).expect("stats");
    let used = eventually("it uses the processor", || Some(cpu()).filter(|s| s.cpu_nanos > 20_000_000));
    assert!(used.pids >= 1 && used.memory_bytes > 0, "{used:?}");
    pod.client().pause().expect("paused");
    let frozen = eventually("it stands still", || {
        let first = cpu().cpu_nanos;
        std::thread::sleep(std::time::Duration::from_millis(20));
        (cpu().cpu_nanos == first).then_some(first)
    });
    pod.client().resume().expect("resumed");
    eventually("it goes on", || (cpu().cpu_nanos > frozen).then_some(()));
    // What is paused can still be ended.
    pod.client().pause().expect("paused");
}

fn count(path: &str) -> usize {
    fs::read_dir(path).map_or(0, Iterator::count)
}

fn leaves_nothing() {
    let fds = count("/proc/self/fd");
    let pod = Pod::new();
    // Others on this host come and go: only mounts on what is the pod's own count.
    let own = [pod.sandbox.dir.clone(), pod.sandbox.run_dir.clone()].map(|p| p.to_string_lossy().into_owned());
    let mounts = || {
        let text = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        text.lines().filter(|l| own.iter().any(|path| l.contains(path))).count()
    };
    let shim = pod.client().shim_pid;
    let shim_fds = || count(&format!("/proc/{shim}/fd"));
    pod.run(pod.script("warm", "true"));
    let open = shim_fds();
    for n in 0..100 {
        let mut start = pod.script("a", "true");
        start.attempt = n;
        pod.client().start(start).expect("started");
        pod.ended("a");
    }
    pod.client().remove(&pod.sandbox.dir, "a").expect("removed");
    eventually("the shim has closed all", || (shim_fds() <= open).then_some(()));
    let zombies = fs::read_to_string(format!("/proc/{shim}/task/{shim}/children")).expect("children");
    assert!(zombies.split_whitespace().count() <= 1, "one set-up process at most waits: {zombies}");
    let groups = |name: &str| {
        let trees = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|e| e.path());
        trees.chain(["/sys/fs/cgroup".into()]).any(|tree| tree.join(name).exists())
    };
    let cgroup = pod.sandbox.cgroup.clone();
    let (dir, run_dir) = (pod.sandbox.dir.clone(), pod.sandbox.run_dir.clone());
    assert!(groups(cgroup.to_str().expect("text")));
    drop(pod);
    assert_eq!(mounts(), 0);
    assert_eq!(count("/proc/self/fd"), fds);
    assert!(!dir.exists() && !run_dir.exists());
    assert!(!groups(cgroup.parent().and_then(Path::to_str).expect("text")), "control groups are left");
    assert!(!Path::new(&format!("/proc/{shim}")).join("fd/0").exists());
}

/// Whoever can connect is root, but a shim must not fall over for a broken daemon.
fn hostile_requests() {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    let pod = Pod::new();
    let socket = pod.sandbox.run_dir.join("shim.sock");
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(fs::metadata(&socket).expect("socket").permissions().mode() & 0o777, 0o600);
    for bytes in [&b"\xff\xff\xff\xff"[..], b"\x05\0\0\0\"x\"xx", b"\x0b\0\0\0{\"Nonsense\"}", b"\x02\0"] {
        let mut stream = UnixStream::connect(&socket).expect("connected");
        stream.write_all(bytes).expect("written");
        stream.shutdown(std::net::Shutdown::Write).expect("shut");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
    }
    let mut start = pod.script("../../etc", "true");
    assert!(pod.client().start(start.clone()).is_err());
    start.name = "a".into();
    start.spec.mounts.push(container::spec::Mount::new("/x", "ext4", "/dev/vda", &[]));
    assert!(pod.client().start(start).expect_err("refused").to_string().contains("ext4"));
    assert_eq!(pod.run(pod.script("b", "echo alive")).1, "alive\n");
}
