//! `atoll oci` under containerd and docker, each with state of its own in a network and a mount namespace of its own.

use crate::cluster::Cluster;
use crate::{Outcome, Test};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

pub const TESTS: &[Test] = &[("oci_containerd", containerd), ("oci_docker", docker)];

/// A daemon, and a client's command line that reaches it.
pub struct Engine {
    base: PathBuf,
    runtime: PathBuf,
    client: Vec<String>,
    daemon: Child,
}

pub fn missing(programs: &[&str]) -> Option<String> {
    let absent = |program: &&&str| Command::new(program).arg("--version").output().is_err();
    let program = programs.iter().find(absent)?;
    Some(format!("{program} is not installed (packages containerd, docker.io)"))
}

/// A root file system, and the runtime by the name that tells its role.
fn prepare(c: &Cluster, name: &str) -> Result<(PathBuf, PathBuf), String> {
    let base = c.scratch(name);
    let root = base.join("rootfs");
    std::fs::create_dir_all(root.join("bin")).unwrap();
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).map_err(|_| "no /bin/busybox".to_owned())?;
    for applet in ["sh", "sleep", "cat", "echo", "id", "test", "touch", "tty", "true"] {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    let runtime = base.join("atoll-oci");
    symlink(env!("CARGO_BIN_EXE_atoll"), &runtime).unwrap();
    Ok((base, runtime))
}

impl Engine {
    /// In a network namespace of its own.
    fn start(c: &Cluster, base: PathBuf, runtime: PathBuf, daemon: &[&str], client: &[&str]) -> Self {
        let mut command = Command::new("unshare");
        command.arg("--net");
        Self::start_by(c, command, (base, runtime), daemon, client)
    }

    /// `command` ends in `unshare`'s flags. What the daemon leaves in `/run` goes with it.
    fn start_by(
        c: &Cluster,
        mut command: Command,
        (base, runtime): (PathBuf, PathBuf),
        daemon: &[&str],
        client: &[&str],
    ) -> Self {
        let log = std::fs::File::create(base.join("daemon.log")).unwrap();
        command.args(["--mount", "--propagation", "private", "sh", "-c"]);
        command.args(["mount -t tmpfs tmpfs /run && exec \"$@\"", "sh"]).args(daemon);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let daemon = command.spawn().unwrap();
        let client = client.iter().map(|w| (*w).to_owned()).collect();
        let engine = Self { base, runtime, client, daemon };
        c.until("the daemon answers", || engine.call(&["version"]).status.success());
        engine
    }

    fn call(&self, args: &[&str]) -> Output {
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--net", "--target", &self.daemon.id().to_string()]).args(&self.client).args(args);
        command.stdin(Stdio::null()).output().unwrap()
    }

    /// Exit code, standard output, standard error.
    fn outcome(&self, args: &[&str]) -> (Option<i32>, String, String) {
        let output = self.call(args);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }

    #[track_caller]
    pub fn good(&self, args: &[&str]) -> String {
        let (code, said, error) = self.outcome(args);
        assert_eq!(code, Some(0), "{args:?}: {error}");
        said
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.daemon.id().to_string()).status();
        let _ = self.daemon.wait();
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn containerd(c: &Cluster) -> Outcome {
    if let Some(reason) = missing(&["containerd", "ctr"]) {
        return Outcome::Skipped(reason);
    }
    let (base, runtime) = match prepare(c, "containerd") {
        Ok(made) => made,
        Err(reason) => return Outcome::Skipped(reason),
    };
    let (config, socket) = (base.join("config.toml"), base.join("c.sock"));
    let toml = format!(
        "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {:?}\n",
        base.join("root"),
        base.join("state"),
        socket
    );
    std::fs::write(&config, toml).unwrap();
    let client = ["ctr", "--address", text(&socket)];
    let e = Engine::start(c, base, runtime, &["containerd", "--config", text(&config)], &client);
    let root = e.base.join("rootfs");
    let run = |flags: &[&str], id: &str, args: &[&str]| {
        let ours = ["run", "--runtime", "io.containerd.runc.v2", "--runc-binary", text(&e.runtime), "--rootfs"];
        e.outcome(&[&ours[..], flags, &[text(&root), id], args].concat())
    };
    assert_eq!(run(&["--rm"], "a", &["/bin/echo", "hello"]), (Some(0), "hello".into(), String::new()));
    assert_eq!(run(&["--rm"], "b", &["/bin/sh", "-c", "exit 5"]).0, Some(5));
    let (code, _, why) = run(&["--rm"], "c", &["no-such"]);
    assert!(code != Some(0) && why.contains("executable file not found"), "{code:?} {why}");
    let started = run(&["--detach", "--memory-limit", "67108864"], "d", &["/bin/sleep", "1000"]);
    assert_eq!(started.0, Some(0), "{}", started.2);
    let task =
        |status: &str| assert!(e.good(&["task", "ls"]).contains(status), "{status}: {}", e.good(&["task", "ls"]));
    task("RUNNING");
    let (code, said, why) = e.outcome(&["task", "exec", "--exec-id", "e", "d", "/bin/sh", "-c", "echo in; exit 4"]);
    assert_eq!((code, said.as_str()), (Some(4), "in"), "{why}");
    e.good(&["task", "pause", "d"]);
    task("PAUSED");
    e.good(&["task", "resume", "d"]);
    task("RUNNING");
    assert!(e.good(&["task", "metrics", "d"]).contains("METRIC"));
    assert!(e.good(&["task", "ps", "d"]).lines().count() >= 2);
    e.good(&["task", "kill", "--signal", "SIGKILL", "d"]);
    c.until("it has stopped", || e.good(&["task", "ls"]).contains("STOPPED"));
    let (code, _, said) = e.outcome(&["task", "rm", "d"]);
    assert!(code == Some(0) && said.contains("exit code 137"), "{code:?} {said}");
    e.good(&["containers", "rm", "d"]);
    assert_eq!(e.good(&["containers", "ls", "--quiet"]), "");
    Outcome::Passed
}

/// A docker daemon that reaches what the cluster's clients reach, the registry among them.
pub fn docker_beside(c: &Cluster) -> Result<Engine, String> {
    match missing(&["dockerd", "docker", "containerd"]) {
        Some(reason) => Err(reason),
        None => Ok(dockerd(c, c.inside("unshare"), prepare(c, "docker-beside")?)),
    }
}

/// It touches no network: no bridge, no firewall.
fn dockerd(c: &Cluster, command: Command, places: (PathBuf, PathBuf)) -> Engine {
    let at = |name: &str| places.0.join(name).to_string_lossy().into_owned();
    let (host, add) = (format!("unix://{}", at("d.sock")), format!("atoll={}", text(&places.1)));
    let (data, exec, pid) = (at("data"), at("exec"), at("pid"));
    #[rustfmt::skip]
    let daemon = [
        "dockerd", "--data-root", &data, "--exec-root", &exec, "--pidfile", &pid, "--host", &host, "--add-runtime", &add,
        "--default-runtime", "atoll", "--bridge=none", "--iptables=false", "--ip6tables=false", "--storage-driver=vfs",
        "--exec-opt=native.cgroupdriver=cgroupfs",
    ];
    Engine::start_by(c, command, places, &daemon, &["docker", "--host", &host])
}

fn docker(c: &Cluster) -> Outcome {
    if let Some(reason) = missing(&["dockerd", "docker", "containerd"]) {
        return Outcome::Skipped(reason);
    }
    let (base, runtime) = match prepare(c, "docker") {
        Ok(made) => made,
        Err(reason) => return Outcome::Skipped(reason),
    };
    let at = |name: &str| base.join(name).to_string_lossy().into_owned();
    let mut own = Command::new("unshare");
    own.arg("--net");
    let e = dockerd(c, own, (base.clone(), runtime));
    let (tar, root) = (at("image.tar"), at("rootfs"));
    assert!(Command::new("tar").args(["-C", &root, "-cf", &tar, "."]).status().unwrap().success());
    e.good(&["import", &tar, "test:1"]);
    let run = |args: &[&str]| e.outcome(&[&["run", "--rm", "--network=none"], args].concat());
    assert_eq!(run(&["test:1", "echo", "hello"]).1, "hello");
    assert_eq!(run(&["test:1", "sh", "-c", "exit 5"]).0, Some(5));
    assert_eq!(run(&["test:1", "no-such"]).0, Some(127));
    assert_eq!(run(&["--tty", "test:1", "tty"]).1, "/dev/pts/0");
    let user = run(&[
        "--user=7:8",
        "--read-only",
        "--cap-drop=all",
        "--tmpfs=/t",
        "test:1",
        "sh",
        "-c",
        "id; touch /t/x; touch /x",
    ]);
    assert!(user.1.contains("uid=7 gid=8") && user.2.contains("/x: Read-only") && !user.2.contains("/t/x"), "{user:?}");
    let script = "trap 'echo bye; exit 3' TERM; echo started; while true; do sleep 0.05; done";
    #[rustfmt::skip]
    e.good(&[
        "run", "--detach", "--name=aa", "--network=none", "--memory=64m", "--memory-swap=64m", "--cpus=0.5", "--pids-limit=50",
        "--health-cmd=test -e /ok", "--health-interval=1s", "test:1", "sh", "-c", script,
    ]);
    assert_eq!(e.outcome(&["exec", "aa", "sh", "-c", "exit 4"]).0, Some(4));
    let state = |what: &str| e.good(&["inspect", "--format", what, "aa"]);
    e.good(&["pause", "aa"]);
    assert_eq!(state("{{.State.Status}}"), "paused");
    e.good(&["unpause", "aa"]);
    e.good(&["exec", "aa", "touch", "/ok"]);
    c.until("it is healthy", || state("{{.State.Health.Status}}") == "healthy");
    let limit = || {
        let script = "cd /sys/fs/cgroup; cat memory/memory.limit_in_bytes 2>/dev/null || cat memory.max";
        e.good(&["exec", "aa", "sh", "-c", script])
    };
    assert_eq!(limit(), "67108864");
    e.good(&["update", "--memory=128m", "--memory-swap=128m", "aa"]);
    assert_eq!(limit(), "134217728");
    assert!(e.good(&["top", "aa"]).contains("sleep"));
    assert!(e.good(&["stats", "--no-stream", "aa"]).contains("128MiB"));
    e.good(&["stop", "--time=20", "aa"]);
    assert_eq!(state("{{.State.Status}} {{.State.ExitCode}}"), "exited 3");
    assert_eq!(e.good(&["logs", "aa"]), "started\nbye");
    e.good(&["rm", "aa"]);
    assert_eq!(e.good(&["ps", "--all", "--quiet"]), "");
    Outcome::Passed
}
