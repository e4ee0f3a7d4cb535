//! `atoll oci` under podman: the binary, by the name `atoll-oci`, as its runtime.

use crate::cluster::Cluster;
use crate::{Outcome, Test};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

pub const TESTS: &[Test] = &[
    ("oci_podman_run", run),
    ("oci_podman_life", life),
    ("oci_podman_limits_and_health", limits),
    ("oci_podman_terminal", terminal),
    ("oci_podman_killed", killed),
];

/// Storage and state of a test's own.
struct Podman {
    base: PathBuf,
    runtime: PathBuf,
}

impl Podman {
    fn new(c: &Cluster, name: &str) -> Result<Self, String> {
        for tool in ["podman", "conmon"] {
            if Command::new(tool).arg("--version").output().is_err() {
                return Err(format!("{tool} is not installed"));
            }
        }
        let base = c.scratch(&format!("podman-{name}"));
        std::fs::create_dir_all(&base).unwrap();
        let runtime = base.join("atoll-oci");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_atoll"), &runtime).unwrap();
        let podman = Self { base, runtime };
        let root = podman.base.join("image");
        std::fs::create_dir_all(root.join("bin")).unwrap();
        std::fs::copy("/bin/busybox", root.join("bin/busybox")).map_err(|_| "no /bin/busybox".to_owned())?;
        for applet in ["sh", "sleep", "cat", "test", "touch", "tty", "stty", "id", "true", "echo", "kill"] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        let tar = podman.base.join("image.tar");
        let packed = Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&tar).arg(".").status().unwrap();
        assert!(packed.success());
        podman.good(&["import", &tar.to_string_lossy(), "test:1"]);
        Ok(podman)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("podman");
        for (flag, directory) in [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
            command.arg(flag).arg(self.base.join(directory));
        }
        command.args([
            "--storage-driver",
            "vfs",
            "--cgroup-manager",
            "cgroupfs",
            "--events-backend",
            "file",
            "--runtime",
        ]);
        command.arg(&self.runtime).args(args).stdin(Stdio::null());
        command
    }

    fn call(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    #[track_caller]
    fn good(&self, args: &[&str]) -> String {
        let output = self.call(args);
        assert!(output.status.success(), "podman {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Exit code, standard output, standard error.
    fn outcome(&self, args: &[&str]) -> (Option<i32>, String, String) {
        let output = self.call(args);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }

    fn status(&self, name: &str) -> String {
        self.good(&["inspect", name, "--format", "{{.State.Status}} {{.State.ExitCode}}"])
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        self.call(&["rm", "--force", "--all", "--time", "0"]);
    }
}

macro_rules! podman {
    ($c:expr, $name:literal) => {
        match Podman::new($c, $name) {
            Ok(podman) => podman,
            Err(reason) => return Outcome::Skipped(reason),
        }
    };
}

fn run(c: &Cluster) -> Outcome {
    let p = podman!(c, "run");
    let run = |args: &[&str]| p.outcome(&[&["run", "--rm", "--network=none", "test:1"], args].concat());
    assert_eq!(run(&["echo", "hello"]).1, "hello");
    assert_eq!(run(&["sh", "-c", "exit 5"]).0, Some(5));
    assert_eq!(run(&["no-such"]).0, Some(127));
    assert_eq!(run(&["/bin"]).0, Some(126));
    let host =
        p.outcome(&["run", "--rm", "--network=host", "--user=7:8", "--read-only", "--cap-drop=all", "test:1", "id"]);
    assert!(host.1.contains("uid=7") && host.1.contains("gid=8"), "{} {}", host.1, host.2);
    let mounted = p.outcome(&[
        "run",
        "--rm",
        "--network=none",
        "--tmpfs=/t:size=1m",
        "--device=/dev/fuse:/dev/fuse:r",
        "--ulimit=nofile=64:64",
        "--sysctl=net.core.somaxconn=99",
        "test:1",
        "sh",
        "-c",
        "ulimit -n; cat /proc/sys/net/core/somaxconn; test -c /dev/fuse && echo fuse",
    ]);
    assert_eq!(mounted.1, "64\n99\nfuse", "{}", mounted.2);
    Outcome::Passed
}

fn life(c: &Cluster) -> Outcome {
    let p = podman!(c, "life");
    let script = "echo started; trap 'echo bye; exit 3' TERM; while true; do sleep 0.05; done";
    p.good(&["run", "--detach", "--name=a", "--network=none", "test:1", "sh", "-c", script]);
    assert_eq!(p.status("a"), "running 0");
    let (code, said, _) = p.outcome(&["exec", "--env=X=y", "a", "sh", "-c", "echo $X; exit 4"]);
    assert_eq!((code, said.as_str()), (Some(4), "y"));
    assert_eq!(p.outcome(&["exec", "a", "no-such"]).0, Some(127));
    p.good(&["pause", "a"]);
    assert_eq!(p.status("a"), "paused 0");
    p.good(&["unpause", "a"]);
    assert_eq!(p.status("a"), "running 0");
    assert!(p.good(&["top", "a"]).contains("sleep"));
    p.good(&["stop", "--time=20", "a"]);
    assert_eq!(p.status("a"), "exited 3");
    assert_eq!(p.good(&["logs", "a"]), "started\nbye");
    p.good(&["start", "a"]);
    p.good(&["kill", "--signal=KILL", "a"]);
    p.good(&["wait", "a"]);
    assert_eq!(p.status("a"), "exited 137");
    p.good(&["rm", "a"]);
    assert_eq!(p.good(&["ps", "--all", "--quiet"]), "");
    Outcome::Passed
}

fn limits(c: &Cluster) -> Outcome {
    let p = podman!(c, "limits");
    p.good(&[
        "run",
        "--detach",
        "--name=a",
        "--network=none",
        "--memory=64m",
        "--cpus=0.5",
        "--pids-limit=50",
        "--health-cmd=test -e /ok",
        "--health-interval=disable",
        "test:1",
        "sleep",
        "1000",
    ]);
    let show = "cat memory/memory.limit_in_bytes cpu/cpu.cfs_quota_us pids/pids.max 2>/dev/null || cat memory.max cpu.max pids.max";
    let said = p.good(&["exec", "a", "sh", "-c", &format!("cd /sys/fs/cgroup; {show}")]);
    assert!(said.contains("67108864") && said.contains("50000") && said.ends_with("50"), "{said}");
    assert_eq!(p.outcome(&["healthcheck", "run", "a"]).0, Some(1));
    p.good(&["exec", "a", "touch", "/ok"]);
    assert_eq!(p.outcome(&["healthcheck", "run", "a"]).0, Some(0));
    p.good(&["update", "--memory=128m", "a"]);
    let said = p.good(&["exec", "a", "sh", "-c", &format!("cd /sys/fs/cgroup; {show}")]);
    assert!(said.contains("134217728"), "{said}");
    assert!(p.good(&["stats", "--no-stream", "a"]).contains("MB"));
    Outcome::Passed
}

fn terminal(c: &Cluster) -> Outcome {
    let p = podman!(c, "terminal");
    if Command::new("script").arg("--version").output().is_err() {
        return Outcome::Skipped("script is not installed (package bsdutils)".into());
    }
    // script(1) gives podman a terminal to pass through.
    let with_terminal = |args: &[&str]| {
        let command = p.command(args);
        let words: Vec<String> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|w| format!("'{}'", w.to_string_lossy()))
            .collect();
        let mut script = Command::new("script");
        script.args(["-qec", &words.join(" "), "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = script.spawn().unwrap();
        // at the end of its input script(1) ends podman's too, which then may leave before the output, whatever the runtime
        let input = child.stdin.take();
        let output = child.wait_with_output().unwrap();
        drop(input);
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (code, said) = with_terminal(&["run", "--rm", "-it", "--network=none", "test:1", "sh", "-c", "tty; exit 9"]);
    assert!(code == Some(9) && said.contains("/dev/pts/0"), "{code:?} {said}");
    p.good(&["run", "--detach", "--name=a", "--network=none", "test:1", "sleep", "1000"]);
    let (code, said) = with_terminal(&["exec", "-it", "a", "sh", "-c", "tty; exit 6"]);
    assert!(code == Some(6) && said.contains("/dev/pts/0"), "{code:?} {said}");
    Outcome::Passed
}

/// The container and its monitor are killed under podman's hands; what is left can be seen and removed.
fn killed(c: &Cluster) -> Outcome {
    let p = podman!(c, "killed");
    for what in ["{{.State.Pid}}", "{{.State.ConmonPid}}"] {
        p.good(&["run", "--detach", "--name=a", "--network=none", "test:1", "sleep", "1000"]);
        let pid = p.good(&["inspect", "a", "--format", what]);
        assert!(Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
        if what.contains("State.Pid") {
            assert_eq!(p.good(&["wait", "a"]), "137");
        }
        p.good(&["rm", "--force", "--time=0", "a"]);
    }
    // Without its monitor podman does not have the runtime forget the container; it is stopped and can be deleted.
    let runtime = |args: &[&str]| Command::new(&p.runtime).args(args).output().unwrap();
    let listed = runtime(&["list", "--format", "json"]);
    let list: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    let ours = |c: &&serde_json::Value| c["bundle"].as_str().is_some_and(|b| b.starts_with(&*p.base.to_string_lossy()));
    let left: Vec<&serde_json::Value> = list.as_array().unwrap().iter().filter(ours).collect();
    assert!(left.len() <= 1, "{left:?}");
    for container in left {
        assert_eq!(container["status"], "stopped");
        assert!(runtime(&["delete", container["id"].as_str().unwrap()]).status.success());
    }
    Outcome::Passed
}
