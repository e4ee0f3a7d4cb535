//! One running Atoll in a network namespace of its own, and the clients' side of it.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What has not happened by then hangs, also on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(180);

pub struct Cluster {
    netns: String,
    dir: tempfile::TempDir,
    up: Mutex<Option<Child>>,
}

/// What a command printed, and whether it succeeded.
pub struct Said {
    pub ok: bool,
    pub out: String,
    pub err: String,
}

impl Said {
    pub fn of(output: Output) -> Said {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Said { ok: output.status.success(), out: text(output.stdout), err: text(output.stderr) }
    }
    /// The output of a command that must succeed.
    #[track_caller]
    pub fn good(self) -> String {
        assert!(self.ok, "failed:\n{}{}", self.out, self.err);
        self.out
    }
    /// The complaint of a command that must fail.
    #[track_caller]
    pub fn bad(self) -> String {
        assert!(!self.ok, "should have failed:\n{}{}", self.out, self.err);
        self.err
    }
}

impl Cluster {
    pub fn start() -> Result<Cluster, String> {
        if !rustix::process::getuid().is_root() {
            return Err("needs root".into());
        }
        for tool in ["kubectl", "ip", "nsenter", "curl"] {
            if Command::new("sh")
                .args(["-c", &format!("command -v {tool}")])
                .output()
                .is_ok_and(|o| !o.status.success())
            {
                return Err(format!("{tool} is not installed"));
            }
        }
        let netns = format!("atoll-e2e-{}", std::process::id());
        run("ip", &["netns", "add", &netns])?;
        run("nsenter", &[&format!("--net=/run/netns/{netns}"), "ip", "link", "set", "lo", "up"])?;
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        let cluster = Cluster { netns, dir, up: Mutex::new(None) };
        cluster.import_busybox();
        cluster.up();
        Ok(cluster)
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    pub fn log(&self) -> String {
        fs::read_to_string(self.scratch("up.log")).unwrap_or_default()
    }

    /// A command inside the network namespace.
    pub fn inside(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.netns)).arg("--").arg(program);
        command.env("KUBECONFIG", self.data().join("kubeconfig")).env("HOME", self.dir.path());
        command.stdin(Stdio::null());
        command
    }

    /// A socket that listens on the namespace's loopback.
    pub fn listen(&self) -> std::net::TcpListener {
        let path = format!("/run/netns/{}", self.netns);
        let inside = move || {
            let namespace = File::open(path).expect("the namespace");
            rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), None).expect("setns");
            std::net::TcpListener::bind("127.0.0.1:0").expect("listen")
        };
        std::thread::spawn(inside).join().expect("the thread")
    }

    pub fn atoll(&self, args: &[&str]) -> Said {
        let mut command = self.inside(env!("CARGO_BIN_EXE_atoll"));
        Said::of(command.args(args).output().expect("atoll runs"))
    }

    /// A program of the host that Atoll runs on.
    pub fn host(&self, program: &str, args: &[&str]) -> Said {
        Said::of(self.inside(program).args(args).output().expect("the program runs"))
    }

    pub fn kubectl(&self, args: &[&str]) -> Said {
        Said::of(self.inside("kubectl").args(args).output().expect("kubectl runs"))
    }

    /// `kubectl` with text on its standard input (`-f -`).
    pub fn kubectl_with(&self, args: &[&str], input: &str) -> Said {
        let mut command = self.inside("kubectl");
        let mut child = command
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kubectl runs");
        std::io::Write::write_all(&mut child.stdin.take().expect("stdin"), input.as_bytes()).expect("kubectl reads");
        Said::of(child.wait_with_output().expect("kubectl ends"))
    }

    pub fn apply(&self, yaml: &str) {
        self.kubectl_with(&["apply", "-f", "-"], yaml).good();
    }

    /// A fresh Kubernetes namespace.
    pub fn namespace(&self, name: &str) -> String {
        self.kubectl(&["create", "namespace", name]).good();
        name.to_owned()
    }

    /// What earlier tests left ends now: its grace, up to five minutes for a Knative pod, is not this test's.
    pub fn clear(&self) {
        let left = ["delete", "deployments,ksvc,vm,pods", "-A", "--all", "--grace-period=0", "--timeout=60s"];
        self.kubectl(&left).good();
    }

    /// Also after a test that failed while it held this.
    fn running(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.up.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Starts `atoll up` and waits for its `ready` line.
    pub fn up(&self) {
        self.up_with(&[], &[]);
    }

    pub fn up_with(&self, args: &[&str], env: &[(&str, &std::ffi::OsStr)]) {
        let log = File::options().create(true).append(true).open(self.scratch("up.log")).expect("log");
        let out = File::create(self.scratch("up.out")).expect("log");
        let child = self
            .inside(env!("CARGO_BIN_EXE_atoll"))
            .args(["up", "--data-dir"])
            .arg(self.data())
            .args(args)
            .envs(env.iter().copied())
            .stdout(out)
            .stderr(log)
            .spawn()
            .expect("atoll runs");
        *self.running() = Some(child);
        self.until("atoll up is ready", || {
            let mut up = self.running();
            if let Some(status) = up.as_mut().and_then(|c| c.try_wait().expect("wait")) {
                panic!("atoll up ended with {status}:\n{}", self.log());
            }
            fs::read_to_string(self.scratch("up.out")).unwrap_or_default().contains("ready")
        });
    }

    /// Ends `atoll up` with a signal and waits for it.
    pub fn stop(&self, signal: rustix::process::Signal) {
        if let Some(mut child) = self.signal(signal) {
            child.wait().expect("wait");
        }
    }

    /// Sends `atoll up` a signal that ends it; whoever asked waits for it.
    pub fn signal(&self, signal: rustix::process::Signal) -> Option<Child> {
        let child = self.running().take()?;
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), signal).expect("signal");
        Some(child)
    }

    pub fn up_pid(&self) -> u32 {
        self.running().as_ref().map_or(0, Child::id)
    }

    #[track_caller]
    pub fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done() {
            assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    #[track_caller]
    pub fn wait_ready(&self, namespace: &str, what: &str) {
        let timeout = format!("--timeout={}s", PATIENCE.as_secs());
        self.kubectl(&["wait", "-n", namespace, what, "--for=condition=Ready", &timeout]).good();
    }

    pub fn tell_state(&self) {
        println!("-- pods\n{}", self.kubectl(&["get", "pods", "-A", "-o", "wide"]).out);
        println!("-- events\n{}", self.kubectl(&["get", "events", "-A"]).out);
        let log = self.log();
        let tail: Vec<&str> = log.lines().rev().take(60).collect();
        println!("-- atoll up\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
    }

    /// `test/busybox:1`: a root file system with one static program.
    fn import_busybox(&self) {
        let root = self.scratch("busybox");
        for dir in ["bin", "etc", "tmp", "proc", "sys", "dev", "root"] {
            fs::create_dir_all(root.join(dir)).expect("rootfs");
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
        let list = Command::new("/bin/busybox").arg("--list").output().expect("busybox runs");
        for applet in String::from_utf8_lossy(&list.stdout).lines().filter(|a| *a != "busybox") {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).expect("link");
        }
        fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nweb:x:1000:1000::/:/bin/sh\n").expect("passwd");
        let tar = self.scratch("busybox.tar");
        let made = Command::new("tar")
            .arg("-C")
            .arg(&root)
            .arg("-cf")
            .arg(&tar)
            .args(["--owner=0", "--group=0", "."])
            .status();
        assert!(made.expect("tar runs").success());
        self.atoll(&[
            "image",
            "import",
            "--data-dir",
            &self.data().to_string_lossy(),
            &tar.to_string_lossy(),
            "--tag",
            "127.0.0.1:5000/test/busybox:1",
            "--cmd",
            "sleep",
            "--cmd",
            "1000000",
        ])
        .good();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let said = self.atoll(&["down", "--data-dir", &self.data().to_string_lossy()]);
        if !said.ok {
            println!("atoll down failed: {}{}", said.out, said.err);
        }
        self.stop(rustix::process::Signal::KILL);
        let _ = run("ip", &["netns", "del", &self.netns]);
    }
}

fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let said = Said::of(Command::new(program).args(args).output().map_err(|e| format!("{program}: {e}"))?);
    if said.ok { Ok(said.out) } else { Err(format!("{program} {}: {}", args.join(" "), said.err)) }
}

/// A pod that sleeps, as YAML.
pub fn sleeper(name: &str, namespace: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\n\
         spec:\n  terminationGracePeriodSeconds: 0\n  containers:\n  - name: main\n    image: 127.0.0.1:5000/test/busybox:1\n    \
         command: [sh, -c, 'echo started; echo oops >&2; exec sleep 1000000']\n"
    )
}

pub fn lines(text: &str) -> Vec<&str> {
    text.lines().map(str::trim).filter(|l| !l.is_empty()).collect()
}

pub fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).expect("JSON")
}
