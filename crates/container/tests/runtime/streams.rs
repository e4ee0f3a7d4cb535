//! Exec, attach, terminals.

use crate::support::*;
use container::Error;
use container::shim::protocol::Streams;
use container::spec::ConsoleSize;
use rustix::termios::{Winsize, tcsetwinsize};

pub const TESTS: &[(&str, fn())] = &[
    ("streams::exec", exec),
    ("streams::exec_stdin", exec_stdin),
    ("streams::exec_terminal", exec_terminal),
    ("streams::exec_is_confined", exec_is_confined),
    ("streams::exec_abandoned", exec_abandoned),
    ("streams::attach", attach),
    ("streams::attach_terminal", attach_terminal),
    ("streams::stdin_once", stdin_once),
];

const ALL: Streams = Streams { stdin: true, stdout: true, stderr: true };

fn exec() {
    let pod = Pod::new();
    let mut start = pod.script("a", "sleep 1000");
    start.spec.process.env.extend(["ONE=1".into(), "TWO=2".into()]);
    pod.client().start(start).expect("started");
    let mut live = pod.exec("a", &["sh", "-c", "echo out; echo err >&2; hostname; exit 9"], ALL);
    assert_eq!(drain(live.stdout.take().expect("stdout")), "out\nisland\n");
    assert_eq!(drain(live.stderr.take().expect("stderr")), "err\n");
    assert_eq!(exit(&mut live), 9);
    let mut again = command(&["sh", "-c", "echo $ONE $TWO"]);
    again.env = vec!["TWO=3".into()];
    let mut live = pod.client().exec("a", again, ALL).expect("executed");
    assert_eq!(drain(live.stdout.take().expect("stdout")), "1 3\n");
    let missing = pod.client().exec("a", command(&["foo"]), ALL).map(|_| ()).expect_err("missing");
    assert_eq!(missing.to_string(), r#"exec: "foo": executable file not found in $PATH"#);
    assert!(matches!(missing, Error::Exec { code: 127, .. }));
    let mut killed = pod.exec("a", &["sleep", "1000"], Streams::default());
    pod.client().signal("a", 9).expect("signalled");
    assert_eq!(exit(&mut killed), 137);
    pod.ended("a");
    assert!(matches!(pod.client().exec("a", command(&["true"]), ALL).map(|_| ()), Err(Error::NotRunning(_))));
}

fn exec_stdin() {
    let pod = Pod::new();
    pod.client().start(pod.script("a", "sleep 1000")).expect("started");
    let mut live = pod.exec("a", &["sort"], ALL);
    let stdin = live.stdin.take().expect("stdin");
    rustix::io::write(&stdin, b"b\na\n").expect("written");
    drop(stdin);
    assert_eq!(drain(live.stdout.take().expect("stdout")), "a\nb\n");
    assert_eq!(exit(&mut live), 0);
}

fn exec_terminal() {
    let pod = Pod::new();
    pod.client().start(pod.script("a", "sleep 1000")).expect("started");
    let mut command = command(&["sh", "-c", "tty; stty size; read x; stty size; echo got $x; exit 3"]);
    command.terminal = true;
    command.console_size = Some(ConsoleSize { height: 24, width: 80 });
    let mut live = pod.client().exec("a", command, ALL).expect("executed");
    let terminal = live.terminal.take().expect("terminal");
    let text = read_until(&terminal, "24 80");
    assert!(text.contains("/dev/pts/0"), "{text}");
    tcsetwinsize(&terminal, Winsize { ws_row: 50, ws_col: 132, ws_xpixel: 0, ws_ypixel: 0 }).expect("resized");
    rustix::io::write(&terminal, b"word\n").expect("written");
    let text = drain(terminal);
    assert!(text.contains("50 132") && text.contains("got word"), "{text}");
    assert_eq!(exit(&mut live), 3);
}

fn exec_is_confined() {
    let pod = Pod::new();
    pod.client().start(pod.script("a", "sleep 1000")).expect("started");
    let (_, text) = pod.exec_output("a", &["grep", "-E", "CapBnd|NoNewPrivs|Seccomp:", "/proc/self/status"]);
    assert_eq!(
        text.split_whitespace().collect::<Vec<_>>(),
        ["CapBnd:", "0000000000000000", "NoNewPrivs:", "1", "Seccomp:", "2"]
    );
    let state = pod.state("a").expect("there");
    let pid = state.pid.expect("pid");
    let mut live = pod.exec(
        "a",
        &["sh", "-c", "cat /proc/self/cgroup; sleep 1000"],
        Streams { stdout: true, ..Default::default() },
    );
    let text = read_until(live.stdout.as_ref().expect("stdout"), "0::");
    // In the same groups as the container, which it sees as the root.
    assert!(text.lines().filter(|l| l.contains("memory")).all(|l| l.ends_with(":/")), "{text}");
    let stats = container::client::stats(&state.cgroup).expect("stats");
    assert!(stats.pids >= 2, "{stats:?} of {pid}");
    drop(live.stdout.take());
}

fn exec_abandoned() {
    let pod = Pod::new();
    let state = pod.client().start(pod.script("a", "sleep 1000")).expect("started");
    let live = pod.exec("a", &["sleep", "1001"], Streams::default());
    let pids = || container::client::stats(&state.cgroup).expect("stats").pids;
    eventually("it runs", || (pids() == 2).then_some(()));
    drop(live);
    eventually("it is gone with its connection", || (pids() == 1).then_some(()));
}

fn attach() {
    let pod = Pod::new();
    let mut start = pod.script("a", "while read x; do echo got $x; echo err $x >&2; done; echo end");
    start.stdin = true;
    let log = start.log_path.clone();
    pod.client().start(start).expect("started");
    for round in 0..2 {
        let live = pod.client().attach("a", ALL).expect("attached");
        let stdin = live.stdin.as_ref().expect("stdin");
        rustix::io::write(stdin, format!("{round}\n").as_bytes()).expect("written");
        assert!(read_until(live.stdout.as_ref().expect("stdout"), "\n").contains(&format!("got {round}")));
        assert!(read_until(live.stderr.as_ref().expect("stderr"), "\n").contains(&format!("err {round}")));
    }
    assert_eq!(output(&log, "stdout"), "got 0\ngot 1\n");
    let mut live = pod.client().attach("a", ALL).expect("attached");
    pod.client().signal("a", 9).expect("signalled");
    assert_eq!(exit(&mut live), 137);
    assert_eq!(drain(live.stdout.take().expect("stdout")), "");
}

fn attach_terminal() {
    let pod = Pod::new();
    let mut start = pod.script("a", "tty; ls -l /dev/console | cut -c1; read x; stty size; echo got $x");
    start.spec.process.terminal = true;
    start.stdin = true;
    let log = start.log_path.clone();
    pod.client().start(start).expect("started");
    let mut live = pod.client().attach("a", ALL).expect("attached");
    let terminal = live.terminal.take().expect("terminal");
    assert!(live.stderr.is_none() && live.stdin.is_none());
    // What is written is echoed into whatever the program says meanwhile.
    eventually("the program reads", || output(&log, "stdout").contains("\nc\n").then_some(()));
    tcsetwinsize(&terminal, Winsize { ws_row: 40, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 }).expect("resized");
    rustix::io::write(&terminal, b"word\n").expect("written");
    let text = drain(live.stdout.take().expect("stdout"));
    assert!(text.contains("40 100") && text.contains("got word"), "{text}");
    assert_eq!(exit(&mut live), 0);
    let text = output(&log, "stdout");
    assert!(["/dev/pts/0\n", "\nc\n", "got word\n"].iter().all(|t| text.contains(t)), "{text:?}");
}

fn stdin_once() {
    let pod = Pod::new();
    let mut start = pod.script("a", "sort; echo sorted");
    (start.stdin, start.stdin_once) = (true, true);
    pod.client().start(start).expect("started");
    let mut live = pod.client().attach("a", ALL).expect("attached");
    let stdin = live.stdin.take().expect("stdin");
    rustix::io::write(&stdin, b"2\n1\n").expect("written");
    drop(stdin);
    assert_eq!(drain(live.stdout.take().expect("stdout")), "1\n2\nsorted\n");
    assert_eq!(exit(&mut live), 0);
}
