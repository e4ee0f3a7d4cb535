//! A bundle for a test, and the command line that runs it.

use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(30);

pub fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root".into());
    }
    (!Path::new("/bin/busybox").exists()).then(|| "no /bin/busybox (package busybox-static)".into())
}

static BASE: OnceLock<PathBuf> = OnceLock::new();

pub fn base() -> &'static Path {
    BASE.get_or_init(|| {
        let base = PathBuf::from(format!("/var/tmp/atoll-oci-test-{}", std::process::id()));
        fs::create_dir_all(&base).expect("made");
        base
    })
}

pub fn clean() {
    let _ = fs::remove_dir_all(base());
    // Empty unless another run of these tests is under way.
    for tree in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        let _ = fs::remove_dir(tree.path().join("atoll-oci-test"));
    }
    let _ = fs::remove_dir("/sys/fs/cgroup/atoll-oci-test");
}

/// This test itself; `ATOLL_EXE` names the real binary instead.
pub fn executable() -> PathBuf {
    std::env::var_os("ATOLL_EXE").map_or_else(|| std::env::current_exe().expect("own path"), PathBuf::from)
}

pub struct Bundle {
    pub path: PathBuf,
    pub id: String,
    pub config: Value,
}

static NEXT: AtomicU32 = AtomicU32::new(0);

pub fn number() -> u32 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Bundle {
    pub fn new(script: &str) -> Self {
        let id = format!("t{}-{}", std::process::id(), number());
        let path = base().join(&id);
        let root = path.join("rootfs");
        for directory in ["bin", "etc", "tmp", "data", "proc", "sys", "dev"] {
            fs::create_dir_all(root.join(directory)).expect("made");
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox");
        let applets = Command::new("/bin/busybox").arg("--list").output().expect("busybox --list").stdout;
        for applet in String::from_utf8_lossy(&applets).lines().filter(|a| *a != "busybox") {
            symlink("busybox", root.join("bin").join(applet)).expect("applet");
        }
        let spec = Command::new(executable()).args(["oci", "spec", "--bundle"]).arg(&path).status().expect("spec");
        assert!(spec.success());
        let text = fs::read_to_string(path.join("config.json")).expect("config.json");
        let mut config: Value = serde_json::from_str(&text).expect("parses");
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(["sh", "-c", script]);
        config["root"]["readonly"] = json!(false);
        config["linux"]["cgroupsPath"] = json!(format!("/atoll-oci-test/{id}"));
        Self { path, id, config }
    }

    pub fn with(script: &str, change: impl FnOnce(&mut Value)) -> Self {
        let mut bundle = Self::new(script);
        change(&mut bundle.config);
        bundle
    }

    pub fn root(&self) -> PathBuf {
        self.path.join("rootfs")
    }

    pub fn all_capabilities(mut self) -> Self {
        let all = container::process::all_capabilities();
        self.config["process"]["capabilities"] = json!({"bounding": all, "effective": all, "permitted": all});
        self
    }

    pub fn save(&self) {
        fs::write(self.path.join("config.json"), self.config.to_string()).expect("written");
    }

    /// `atoll oci ARGS`, with state of the tests' own.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(executable());
        command.arg("oci").arg("--root").arg(base().join("state")).args(args).current_dir(&self.path);
        command.stdin(Stdio::null());
        command
    }

    pub fn call(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("executed")
    }

    #[track_caller]
    pub fn good(&self, args: &[&str]) -> String {
        let output = self.call(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    #[track_caller]
    pub fn bad(&self, args: &[&str]) -> String {
        let output = self.call(args);
        assert!(!output.status.success(), "{args:?} succeeded: {}", text(&output.stdout));
        text(&output.stderr)
    }

    /// Runs it in front: exit code, standard output, standard error.
    pub fn run(&self) -> (i32, String, String) {
        self.save();
        let output = self.call(&["run", &self.id]);
        (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
    }

    #[track_caller]
    pub fn says(&self, expected: &str) {
        let (code, out, err) = self.run();
        assert_eq!((out.as_str(), code), (expected, 0), "{err}");
    }

    /// Refused before anything is made; the reason names `word`.
    #[track_caller]
    pub fn refused(&self, word: &str) {
        let (code, out, err) = self.run();
        assert!(code == 1 && err.contains(word), "{code} {out} {err}");
        assert!(self.bad(&["state", &self.id]).contains("does not exist"));
    }

    pub fn detached(&self) {
        self.save();
        let mut command = self.command(&["run", "--detach", &self.id]);
        let status = command.stdout(Stdio::null()).stderr(Stdio::inherit()).status().expect("executed");
        assert!(status.success());
    }

    pub fn state(&self) -> Value {
        serde_json::from_str(&self.good(&["state", &self.id])).expect("JSON")
    }

    pub fn pid(&self) -> u32 {
        self.state()["pid"].as_u64().expect("pid") as u32
    }

    #[track_caller]
    pub fn wait_status(&self, status: &str) {
        eventually(status, || (self.state()["status"] == status).then_some(()));
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = self.call(&["delete", "--force", &self.id]);
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Polls until there is something.
#[track_caller]
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn words(text: &str) -> Vec<&str> {
    text.split_ascii_whitespace().collect()
}
