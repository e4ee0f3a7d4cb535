//! Commands, their order, their errors and exit codes.

use crate::support::*;
use serde_json::{Value, json};
use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::Stdio;

pub const TESTS: &[(&str, fn())] = &[
    ("commands::lifecycle", lifecycle),
    ("commands::exit_codes", exit_codes),
    ("commands::outlives_the_command_line", outlives),
    ("commands::exec", exec),
    ("commands::exec_from_process_json", exec_process),
    ("commands::console_socket", console_socket),
    ("commands::preserved_descriptors", preserved_descriptors),
    ("commands::pause_and_resume", pause),
    ("commands::update_and_events", update_events),
    ("commands::kill", kill),
    ("commands::features", features),
    ("commands::log_file", log_file),
    ("commands::killed_in_between", killed_in_between),
    ("commands::leaves_nothing", leaves_nothing),
];

fn lifecycle() {
    let b = Bundle::new("echo started > /tmp/out; exec sleep 1000");
    b.save();
    let pid_file = b.path.join("pid");
    let create = ["create", "--pid-file", pid_file.to_str().expect("text"), &b.id];
    assert!(b.command(&create).stdout(Stdio::null()).status().expect("executed").success());
    let state = b.state();
    assert_eq!((state["status"].as_str(), state["id"].as_str()), (Some("created"), Some(b.id.as_str())));
    assert_eq!(state["bundle"].as_str(), b.path.to_str());
    assert!(state["ociVersion"].as_str().is_some_and(|v| v.starts_with("1.")));
    assert_eq!(fs::read_to_string(&pid_file).expect("pid file"), state["pid"].to_string());
    // Nothing of the program has run.
    assert!(!b.root().join("tmp/out").exists());
    assert!(b.bad(&["create", &b.id]).contains("already exists"));
    b.good(&["start", &b.id]);
    b.wait_status("running");
    eventually("it runs", || b.root().join("tmp/out").exists().then_some(()));
    assert!(b.bad(&["start", &b.id]).contains("running"));
    assert!(b.bad(&["delete", &b.id]).contains("not stopped"));
    let list: Value = serde_json::from_str(&b.good(&["list", "--format", "json"])).expect("JSON");
    assert!(list.as_array().expect("list").iter().any(|c| c["id"] == b.id.as_str() && c["status"] == "running"));
    assert!(b.good(&["list", "-q"]).lines().any(|l| l == b.id));
    let pids: Vec<u32> = serde_json::from_str(&b.good(&["ps", "--format", "json", &b.id])).expect("JSON");
    assert_eq!(pids, [b.pid()]);
    b.good(&["kill", &b.id, "KILL"]);
    b.wait_status("stopped");
    assert_eq!(b.state()["pid"], 0);
    assert!(b.bad(&["kill", &b.id]).contains("not running"));
    assert!(b.bad(&["exec", &b.id, "true"]).contains("stopped"));
    assert!(b.bad(&["start", &b.id]).contains("stopped"));
    b.good(&["delete", &b.id]);
    for command in ["state", "start", "kill", "delete", "pause", "resume"] {
        assert!(b.bad(&[command, &b.id]).contains("does not exist"), "{command}");
    }
    b.good(&["delete", "--force", &b.id]);
    assert!(b.bad(&["state", "../x"]).contains("container id"));
}

fn exit_codes() {
    assert_eq!(Bundle::new("exit 7").run().0, 7);
    // In the host's PID namespace: the first process of one of its own does not get its own signals.
    let killed = Bundle::with("kill -9 $$", |c| {
        c["linux"]["namespaces"].as_array_mut().expect("list").retain(|n| n["type"] != "pid");
    });
    assert_eq!(killed.run().0, 137);
    let missing = Bundle::with("", |c| c["process"]["args"] = json!(["no-such"]));
    let (code, _, err) = missing.run();
    assert!(code == 1 && err.contains("executable file not found in $PATH"), "{code} {err}");
    let directory = Bundle::with("", |c| c["process"]["args"] = json!(["/etc"]));
    assert!(directory.run().2.contains("is a directory"));
    assert!(missing.bad(&["nonsense"]).contains("no such command"));
    assert!(missing.bad(&["run", "--nonsense", "x"]).contains("--nonsense"));
    assert!(missing.bad(&["--systemd-cgroup", "run", &missing.id]).contains("--systemd-cgroup"));
}

fn outlives() {
    let b = Bundle::new("sleep 1000 & exec sleep 1001");
    b.detached();
    b.wait_status("running");
    let parent = fs::read_to_string(format!("/proc/{}/status", b.pid())).expect("status");
    assert!(!parent.contains(&format!("PPid:\t{}\n", std::process::id())), "the command line has gone: {parent}");
    b.good(&["delete", "--force", &b.id]);
}

fn exec() {
    let b = Bundle::with("exec sleep 1000", |c| c["process"]["env"] = json!(["PATH=/bin", "OLD=1"]));
    b.detached();
    let script =
        "echo $OLD $NEW; id -u; id -g; pwd; hostname; cat /proc/1/comm; grep NoNewPrivs /proc/self/status; exit 5";
    let args = ["exec", "--env", "NEW=2", "--user", "7:8", "--cwd", "/tmp", &b.id, "sh", "-c", script];
    let output = b.call(&args);
    assert_eq!(output.status.code(), Some(5), "{}", text(&output.stderr));
    assert_eq!(words(&text(&output.stdout)), ["1", "2", "7", "8", "/tmp", "atoll", "sleep", "NoNewPrivs:", "1"]);
    let missing = b.call(&["exec", &b.id, "no-such"]);
    assert_eq!(missing.status.code(), Some(255));
    assert!(text(&missing.stderr).contains("executable file not found in $PATH"));
    let pid_file = b.path.join("exec.pid");
    let path = pid_file.to_str().expect("text");
    let detach = ["exec", "--detach", "--pid-file", path, &b.id, "sleep", "999"];
    assert!(b.command(&detach).stdout(Stdio::null()).status().expect("executed").success());
    let pid: u32 = fs::read_to_string(&pid_file).expect("pid file").parse().expect("pid");
    assert!(fs::read(format!("/proc/{pid}/cmdline")).expect("cmdline").starts_with(b"sleep\x00999"));
    // In the container's groups too.
    let group = |pid: u32| fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("cgroup");
    assert_eq!(group(pid), group(b.pid()));
    assert!(b.bad(&["exec", &b.id]).contains("command is missing"));
    assert!(b.bad(&["exec", "--user", "root", &b.id, "true"]).contains("UID"));
}

fn exec_process() {
    let b = Bundle::new("exec sleep 1000");
    b.detached();
    let process = b.path.join("process.json");
    let write = |value: Value| fs::write(&process, value.to_string()).expect("written");
    write(
        json!({"user": {"uid": 3, "gid": 4, "additionalGids": [6]}, "args": ["sh", "-c", "id -u; id -G; echo $A; grep CapEff /proc/self/status"],
        "env": ["PATH=/bin", "A=b"], "cwd": "/data"}),
    );
    let path = process.to_str().expect("text");
    let said = b.good(&["exec", "--process", path, &b.id]);
    assert_eq!(words(&said), ["3", "4", "6", "b", "CapEff:", "0000000000000000"]);
    write(json!({"args": ["true"], "cwd": "relative"}));
    assert!(b.bad(&["exec", "--process", path, &b.id]).contains("process.cwd"));
    fs::write(&process, "{").expect("written");
    assert!(b.bad(&["exec", "--process", path, &b.id]).contains("--process"));
}

/// The terminal's master, as conmon takes it.
fn receive(listener: &UnixListener) -> OwnedFd {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let (stream, _) = listener.accept().expect("connected");
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; 4096];
    recvmsg(&stream, &mut [std::io::IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        .expect("received");
    let fds = ancillary
        .drain()
        .find_map(|m| if let RecvAncillaryMessage::ScmRights(mut fds) = m { fds.next() } else { None });
    fds.expect("a descriptor")
}

fn console_socket() {
    let b = Bundle::with("tty; stty size; exec sleep 1000", |c| {
        c["process"]["terminal"] = json!(true);
        c["process"]["consoleSize"] = json!({"height": 33, "width": 101});
    });
    b.save();
    assert!(b.bad(&["create", &b.id]).contains("--console-socket"));
    let path = b.path.join("tty.sock");
    let listener = UnixListener::bind(&path).expect("bound");
    let socket = path.to_str().expect("text");
    b.good(&["create", "--console-socket", socket, &b.id]);
    let master = receive(&listener);
    b.good(&["start", &b.id]);
    assert_eq!(words(&read_lines(&master, 2)), ["/dev/pts/0", "33", "101"]);
    b.good(&["exec", "--tty", "--detach", "--console-socket", socket, &b.id, "tty"]);
    assert_eq!(words(&read_lines(&receive(&listener), 1)), ["/dev/pts/1"]);
    assert!(b.bad(&["exec", "--console-socket", socket, &b.id, "true"]).contains("terminal"));
}

fn read_lines(master: &OwnedFd, lines: usize) -> String {
    let mut got = String::new();
    while got.matches('\n').count() < lines {
        let mut bytes = [0; 1024];
        match rustix::io::read(master, &mut bytes) {
            Ok(n) if n > 0 => got.push_str(&text(&bytes[..n])),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => {
                let mut fds = [rustix::event::PollFd::new(master, rustix::event::PollFlags::IN)];
                rustix::event::poll(&mut fds, None).expect("poll");
            }
            _ => break,
        }
    }
    got
}

fn preserved_descriptors() {
    let b = Bundle::new("ls /proc/self/fd | tr '\\n' ' '; cat <&3");
    b.save();
    let file = b.path.join("three");
    fs::write(&file, "inherited").expect("written");
    // A shell opens descriptor 3; 4 is open too and must not come along.
    let run = format!(
        "exec 3< {} 4< /dev/null; exec \"$0\" oci --root {} run --preserve-fds $1 {}",
        file.display(),
        base().join("state").display(),
        b.id
    );
    let with = |n: &str| {
        let mut command = std::process::Command::new("/bin/sh");
        command.args(["-c", &run]).arg(executable()).arg(n).current_dir(&b.path).output().expect("executed")
    };
    let output = with("1");
    assert_eq!(text(&output.stdout), "0 1 2 3 4 inherited", "{}", text(&output.stderr));
    let none = with("0");
    assert!(!text(&none.stdout).contains("inherited"), "{}", text(&none.stdout));
    assert!(text(&with("9").stderr).contains("is not open"));
}

fn pause() {
    let b = Bundle::new("i=0; while true; do i=$((i+1)); echo $i > /tmp/n; done");
    b.detached();
    let n = b.root().join("tmp/n");
    let count = || fs::read_to_string(&n).ok().and_then(|t| t.trim().parse::<u64>().ok());
    eventually("it counts", count);
    b.good(&["pause", &b.id]);
    assert_eq!(b.state()["status"], "paused");
    let before = fs::read(&n).expect("read");
    assert!(b.bad(&["exec", &b.id, "true"]).contains("paused"));
    assert!(b.bad(&["pause", &b.id]).contains("paused"));
    assert_eq!(fs::read(&n).expect("read"), before, "it stands still");
    b.good(&["resume", &b.id]);
    assert!(b.bad(&["resume", &b.id]).contains("not paused"));
    let then = eventually("it counts", count);
    eventually("it goes on", || count().filter(|now| *now > then));
    // A kill reaches what is paused.
    b.good(&["pause", &b.id]);
    b.good(&["kill", &b.id, "9"]);
    b.wait_status("stopped");
}

fn update_events() {
    let b = Bundle::with("exec sleep 1000", |c| c["linux"]["resources"]["pids"] = json!({"limit": 20}));
    b.detached();
    let event: Value = serde_json::from_str(&b.good(&["events", "--stats", &b.id])).expect("JSON");
    assert_eq!((event["type"].as_str(), event["id"].as_str()), (Some("stats"), Some(b.id.as_str())));
    assert_eq!(event["data"]["pids"]["current"], 1);
    let file = |controller: &str, name: &str| format!("/sys/fs/cgroup/{controller}/atoll-oci-test/{}/{name}", b.id);
    if fs::read_to_string(file("pids", "pids.max")).is_err() {
        println!("SKIPPED: no version 1 controllers for the rest of the update test");
        return;
    }
    let read = |controller: &str, name: &str| fs::read_to_string(file(controller, name)).expect(name).trim().to_owned();
    assert_eq!(read("pids", "pids.max"), "20");
    b.good(&[
        "update",
        "--pids-limit",
        "30",
        "--memory",
        "64m",
        "--cpu-quota",
        "20000",
        "--cpu-period",
        "50000",
        "--cpu-share",
        "100",
        &b.id,
    ]);
    assert_eq!((read("pids", "pids.max"), read("memory", "memory.limit_in_bytes")), ("30".into(), "67108864".into()));
    assert_eq!((read("cpu", "cpu.cfs_quota_us"), read("cpu", "cpu.cfs_period_us")), ("20000".into(), "50000".into()));
    assert_eq!(read("cpu", "cpu.shares"), "100");
    let resources = b.path.join("resources.json");
    fs::write(&resources, r#"{"memory":{"limit":33554432},"pids":{"limit":-1}}"#).expect("written");
    b.good(&["update", "--resources", resources.to_str().expect("text"), &b.id]);
    assert_eq!((read("pids", "pids.max"), read("memory", "memory.limit_in_bytes")), ("max".into(), "33554432".into()));
    assert!(b.bad(&["update", "--memory", "lots", &b.id]).contains("lots"));
    // Events end with the container.
    let mut events =
        b.command(&["events", "--interval", "20ms", &b.id]).stdout(Stdio::piped()).spawn().expect("spawned");
    let mut first = [0; 1];
    events.stdout.as_mut().expect("pipe").read_exact(&mut first).expect("an event");
    b.good(&["kill", &b.id, "KILL"]);
    assert!(events.wait().expect("ended").success());
}

fn kill() {
    let b = Bundle::new(
        "trap 'echo usr1 >> /tmp/got' USR1; trap 'exit 0' TERM; echo ready > /tmp/ready; while true; do sleep 0.01; done",
    );
    b.detached();
    eventually("ready", || b.root().join("tmp/ready").exists().then_some(()));
    for name in ["USR1", "SIGUSR1", "10"] {
        let before = fs::read_to_string(b.root().join("tmp/got")).unwrap_or_default().lines().count();
        b.good(&["kill", &b.id, name]);
        eventually(name, || {
            let now = fs::read_to_string(b.root().join("tmp/got")).unwrap_or_default().lines().count();
            (now > before).then_some(())
        });
    }
    assert!(b.bad(&["kill", &b.id, "NOPE"]).contains("NOPE"));
    // The default is TERM.
    b.good(&["kill", &b.id]);
    b.wait_status("stopped");
    let all = Bundle::new("sleep 1000 & sleep 1001 & wait");
    all.detached();
    let pids = |b: &Bundle| serde_json::from_str::<Vec<u32>>(&b.good(&["ps", "-f", "json", &b.id])).expect("JSON");
    eventually("three processes", || (pids(&all).len() == 3).then_some(()));
    all.good(&["kill", "--all", &all.id, "KILL"]);
    all.wait_status("stopped");
}

fn features() {
    let b = Bundle::new("true");
    let features: Value = serde_json::from_str(&b.good(&["features"])).expect("JSON");
    assert_eq!(features["ociVersionMax"], "1.2.0");
    assert!(features["mountOptions"].as_array().expect("list").iter().any(|o| o == "rro"));
    assert_eq!(features["linux"]["intelRdt"]["enabled"], false);
    assert!(b.good(&["--version"]).contains("spec: 1.2.0"));
    assert!(b.good(&["help"]).contains("COMMANDS"));
    assert!(b.bad(&["spec"]).contains("existing one is kept"));
}

fn log_file() {
    let b = Bundle::with("", |c| c["process"]["args"] = json!(["no-such"]));
    b.save();
    let log = b.path.join("log.json");
    b.bad(&["--log", log.to_str().expect("text"), "--log-format", "json", "run", &b.id]);
    let entry: Value =
        serde_json::from_str(fs::read_to_string(log).expect("log").lines().last().expect("line")).expect("JSON");
    assert_eq!(entry["level"], "error");
    assert!(entry["msg"].as_str().is_some_and(|m| m.contains("no-such")) && entry["time"].is_string());
}

/// The runtime may be killed at any time: what it leaves can be deleted, and its name be used again.
fn killed_in_between() {
    let b = Bundle::new("exec sleep 1000");
    b.save();
    for n in 0..12u64 {
        let mut child =
            b.command(&["create", &b.id]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("spawned");
        // Different points of its way, from before its first step to behind its last.
        std::thread::sleep(std::time::Duration::from_millis(n));
        let _ = child.kill();
        let _ = child.wait();
        b.good(&["delete", "--force", &b.id]);
        assert!(b.bad(&["state", &b.id]).contains("does not exist"), "after {n} ms");
    }
    b.detached();
    b.wait_status("running");
}

fn leaves_nothing() {
    let counts = || {
        let own = base().to_string_lossy();
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        let mounts = mounts.lines().filter(|l| l.contains(&*own)).count();
        let fds = fs::read_dir("/proc/self/fd").expect("descriptors").count();
        (mounts, fds)
    };
    let before = counts();
    let b = Bundle::new("true");
    for _ in 0..20 {
        assert_eq!(b.run().0, 0);
    }
    assert_eq!(counts(), before);
    let left = |path: &str| fs::metadata(format!("{path}/atoll-oci-test/{}", b.id)).is_ok();
    for entry in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        assert!(!left(&entry.path().to_string_lossy()), "{:?}", entry.path());
    }
    assert!(!base().join("state").join(&b.id).exists());
}
