//! `linux.seccomp`: every action and comparison, against real system calls of busybox.

use crate::support::*;
use serde_json::{Value, json};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

pub const TESTS: &[(&str, fn())] = &[
    ("seccomp::actions", actions),
    ("seccomp::operators", operators),
    ("seccomp::notify", notify),
    ("seccomp::refusals", refusals),
];

fn profile(rules: Value) -> impl FnOnce(&mut Value) {
    move |c| c["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"], "syscalls": rules})
}

fn actions() {
    let of = |action: &str, more: Value| {
        let mut rule = json!({"names": ["mkdir", "mkdirat", "no_such_call"], "action": action});
        if let (Some(rule), Some(more)) = (rule.as_object_mut(), more.as_object()) {
            rule.extend(more.clone());
        }
        Bundle::with("mkdir /tmp/d 2>&1; echo $?", profile(json!([rule]))).run().1
    };
    assert!(of("SCMP_ACT_ERRNO", json!({})).contains("Operation not permitted"));
    assert!(of("SCMP_ACT_ERRNO", json!({"errnoRet": 28})).contains("No space left"));
    assert!(of("SCMP_ACT_TRACE", json!({})).contains("not implemented"), "no tracer is there");
    assert_eq!(of("SCMP_ACT_ALLOW", json!({})), "0\n");
    assert_eq!(of("SCMP_ACT_LOG", json!({})), "0\n");
    for action in ["SCMP_ACT_KILL", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_TRAP"] {
        assert!(of(action, json!({})).ends_with("159\n"), "{action}: SIGSYS");
    }
    // With privileges to be gained the filter is loaded before they are dropped.
    let b = Bundle::with("mkdir /tmp/d 2>/dev/null || echo refused; grep Seccomp: /proc/self/status", |c| {
        profile(json!([{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]))(c);
        c["process"]["noNewPrivileges"] = json!(false);
    });
    assert_eq!(words(&b.run().1), ["refused", "Seccomp:", "2"]);
    // A list of what is allowed, as engines have it; an exec is under it too.
    let b = Bundle::with(
        "exec sleep 1000",
        profile(json!([{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}])),
    );
    b.detached();
    assert!(text(&b.call(&["exec", &b.id, "mkdir", "/tmp/e"]).stderr).contains("No space left"));
}

fn operators() {
    // chmod(2): the mode is argument 1.
    let refused = |op: &str, value: u64, two: u64| {
        let rule = json!([{"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28,
            "args": [{"index": 1, "value": value, "valueTwo": two, "op": op}]}]);
        let script = "cd /tmp; touch f; for m in 400 600 644; do chmod $m f 2>/dev/null || echo $m; done";
        words(&Bundle::with(script, profile(rule)).run().1).join(" ")
    };
    assert_eq!(refused("SCMP_CMP_EQ", 0o600, 0), "600");
    assert_eq!(refused("SCMP_CMP_NE", 0o600, 0), "400 644");
    assert_eq!(refused("SCMP_CMP_LT", 0o600, 0), "400");
    assert_eq!(refused("SCMP_CMP_LE", 0o600, 0), "400 600");
    assert_eq!(refused("SCMP_CMP_GT", 0o600, 0), "644");
    assert_eq!(refused("SCMP_CMP_GE", 0o600, 0), "600 644");
    assert_eq!(refused("SCMP_CMP_MASKED_EQ", 0o004, 0o004), "644");
    assert_eq!(refused("SCMP_CMP_MASKED_EQ", 0o200, 0), "400");
}

fn notify() {
    let b = Bundle::new("mkdir /tmp/d 2>&1 || echo refused");
    let path = b.path.join("listener");
    let listener = UnixListener::bind(&path).expect("bound");
    let mut b = b;
    profile(json!([{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]))(&mut b.config);
    b.config["linux"]["seccomp"]["listenerPath"] = json!(path);
    b.config["linux"]["seccomp"]["listenerMetadata"] = json!("meta");
    b.save();
    let child = b.command(&["run", &b.id]).stdout(std::process::Stdio::piped()).spawn().expect("spawned");
    let (state, fd) = receive(&listener);
    assert_eq!((state["metadata"].as_str(), state["fds"][0].as_str()), (Some("meta"), Some("seccompFd")));
    assert_eq!(state["state"]["id"], b.id.as_str());
    assert!(state["pid"].as_u64().is_some_and(|pid| pid > 1));
    let link = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd))).expect("link");
    assert!(link.to_string_lossy().contains("seccomp notify"), "{link:?}");
    // Nobody decides any more: the call does not exist (seccomp_unotify(2)).
    drop(fd);
    let output = child.wait_with_output().expect("ended");
    assert!(text(&output.stdout).contains("refused"), "{}", text(&output.stdout));
}

fn receive(listener: &UnixListener) -> (Value, OwnedFd) {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let (stream, _) = listener.accept().expect("connected");
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; 8192];
    let got = recvmsg(&stream, &mut [std::io::IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        .expect("received");
    let fds = ancillary
        .drain()
        .find_map(|m| if let RecvAncillaryMessage::ScmRights(mut fds) = m { fds.next() } else { None });
    (serde_json::from_slice(&bytes[..got.bytes]).expect("JSON"), fds.expect("a descriptor"))
}

fn refusals() {
    let wrong = |rules: Value, word: &str| Bundle::with("", profile(rules)).refused(word);
    wrong(json!([{"names": ["x"], "action": "SCMP_ACT_X"}]), "SCMP_ACT_X");
    wrong(json!([{"names": [], "action": "SCMP_ACT_ALLOW"}]), "names");
    wrong(json!([{"names": ["x"], "action": "SCMP_ACT_ALLOW", "errnoRet": 1}]), "errnoRet");
    wrong(
        json!([{"names": ["x"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 6, "op": "SCMP_CMP_EQ"}]}]),
        "index 6",
    );
    wrong(json!([{"names": ["x"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "op": "="}]}]), "operator");
    wrong(json!([{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]), "listenerPath");
    Bundle::with("", |c| c["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["ODD"]}))
        .refused("ODD");
    Bundle::with("", |c| c["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_NOTIFY"})).refused("defaultAction");
}
