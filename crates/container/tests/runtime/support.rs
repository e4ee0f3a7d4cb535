//! A pod for a test, and what it wants to know of it.

use container::client::{self, Client, Live};
use container::process::Confinement;
use container::shim::protocol::{Network, Phase, Sandbox, Start, State, Streams};
use container::spec::{self, Capabilities, IdMapping, Mount, Process, Resources, Root, Spec, User};
use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub const ID_BASE: u32 = 1_310_720;
pub const LIMIT: Duration = Duration::from_secs(30);

/// This test itself; `ATOLL_EXE` names the real binary instead.
pub fn shim_executable() -> PathBuf {
    std::env::var_os("ATOLL_EXE").map_or_else(|| std::env::current_exe().expect("own path"), PathBuf::from)
}

/// Why the tests cannot run here.
pub fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root".into());
    }
    if !Path::new("/bin/busybox").exists() {
        return Some("no /bin/busybox (package busybox-static)".into());
    }
    None
}

struct Image {
    base: PathBuf,
    layers: Vec<PathBuf>,
    probe: bool,
}

static IMAGE: OnceLock<Image> = OnceLock::new();

/// Two layers: busybox with its names, and a file over a file of the first one.
fn image() -> &'static Image {
    IMAGE.get_or_init(|| {
        let base = PathBuf::from(format!("/var/tmp/atoll-container-test-{}", std::process::id()));
        let lower = base.join("layer0");
        for directory in ["bin", "etc", "tmp", "home/user", "data"] {
            fs::create_dir_all(lower.join(directory)).expect("image directory");
        }
        fs::copy("/bin/busybox", lower.join("bin/busybox")).expect("busybox");
        let applets = Command::new("/bin/busybox").arg("--list").output().expect("busybox --list").stdout;
        for applet in String::from_utf8_lossy(&applets).lines().filter(|a| *a != "busybox") {
            symlink("busybox", lower.join("bin").join(applet)).expect("applet");
        }
        fs::write(lower.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n")
            .expect("x");
        fs::write(lower.join("etc/version"), "lower\n").expect("x");
        std::os::unix::fs::chown(lower.join("home/user"), Some(1000), Some(1000)).expect("chown");
        fs::write(lower.join("bin/noexec"), "x").expect("x");
        let upper = base.join("layer1");
        fs::create_dir_all(upper.join("etc")).expect("image directory");
        fs::write(upper.join("etc/version"), "upper\n").expect("x");
        let source = base.join("probe.c");
        fs::write(&source, PROBE).expect("x");
        let built = Command::new("cc").args(["-static", "-o"]).arg(lower.join("bin/probe")).arg(&source).status();
        Image { layers: vec![lower, upper], probe: built.is_ok_and(|s| s.success()), base }
    })
}

/// Makes system calls that busybox has no name for; prints each with its errno.
const PROBE: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>
#define TRY(name, call) do { errno = 0; long r = (call); printf("%s %s\n", name, r < 0 ? strerrorname_np(errno) : "ok"); } while (0)
static long abstract(const char *name) {
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    strncpy(a.sun_path + 1, name, sizeof a.sun_path - 2);
    return connect(s, (struct sockaddr *)&a, sizeof(sa_family_t) + 1 + strlen(name));
}
int main(int argc, char **argv) {
    if (argc > 2) {
        struct sockaddr_un a = { .sun_family = AF_UNIX };
        int s = socket(AF_UNIX, SOCK_STREAM, 0);
        strncpy(a.sun_path + 1, argv[2], sizeof a.sun_path - 2);
        TRY("listen", bind(s, (struct sockaddr *)&a, sizeof(sa_family_t) + 1 + strlen(argv[2])) || listen(s, 8));
        fflush(stdout);
        for (;;) pause();
    }
    if (argc > 1) {
        TRY("abstract", abstract(argv[1]));
        return 0;
    }
    TRY("unshare", syscall(SYS_unshare, 0x10000000));
    TRY("mount", mount("none", "/tmp", "tmpfs", 0, 0));
    TRY("keyctl", syscall(SYS_keyctl, 0, -3, 0));
    TRY("bpf", syscall(SYS_bpf, 0, 0, 0));
    TRY("clone3", syscall(SYS_clone3, 0, 0));
    TRY("io_uring", syscall(SYS_io_uring_setup, 1, 0));
    TRY("vsock", socket(40, SOCK_STREAM, 0));
    TRY("inet", socket(AF_INET, SOCK_STREAM, 0));
    TRY("icmp", socket(AF_INET, SOCK_DGRAM, 1));
    TRY("new", syscall(600));
    return 0;
}
"#;

pub fn has_probe() -> bool {
    image().probe
}

pub fn layers() -> Vec<PathBuf> {
    image().layers.clone()
}

pub fn clean() {
    if let Some(image) = IMAGE.get() {
        let _ = fs::remove_dir_all(&image.base);
    }
}

pub struct Pod {
    pub sandbox: Sandbox,
    pub base: PathBuf,
}

static NEXT: AtomicU32 = AtomicU32::new(0);

impl Pod {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut Sandbox)) -> Self {
        let pod = Self::unlaunched(change);
        client::launch(&shim_executable(), &pod.sandbox).expect("shim");
        pod
    }

    /// Nothing runs yet.
    pub fn unlaunched(change: impl FnOnce(&mut Sandbox)) -> Self {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let base = image().base.join(format!("pod{n}"));
        let mut sandbox = Sandbox {
            title: format!("test/pod{n}"),
            dir: base.join("boundary"),
            run_dir: PathBuf::from(format!("/run/atoll-test-{}/{n}", std::process::id())),
            hostname: "island".into(),
            id_map: Some(IdMapping { container_id: 0, host_id: ID_BASE, size: 65_536 }),
            network: Network::New,
            host_network: false,
            cgroup: format!("atoll-test-{}/pod{n}", std::process::id()).into(),
            resources: Resources::default(),
            sysctl: Default::default(),
            share_pid: false,
            scoped: true,
        };
        change(&mut sandbox);
        Self { sandbox, base }
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.sandbox.run_dir).expect("connected")
    }

    /// A start request for a shell script.
    pub fn script(&self, name: &str, script: &str) -> Start {
        self.command(name, &["sh", "-c", script])
    }

    pub fn command(&self, name: &str, args: &[&str]) -> Start {
        let capabilities: Vec<String> = Vec::new();
        let spec = Spec {
            root: Some(Root::default()),
            process: process(args, capabilities),
            mounts: spec::default_mounts(),
            linux: spec::Linux {
                resources: Resources { devices: container::cgroup::default_rules(), ..Default::default() },
                masked_paths: spec::MASKED_PATHS.iter().map(PathBuf::from).collect(),
                readonly_paths: spec::READONLY_PATHS.iter().map(PathBuf::from).collect(),
                ..Default::default()
            },
            ..Default::default()
        };
        Start {
            name: name.into(),
            attempt: 0,
            spec,
            layers: layers(),
            confinement: Confinement::default(),
            stdin: false,
            stdin_once: false,
            log_path: self.base.join(format!("logs/{name}/0.log")),
            log_max_bytes: 10 << 20,
        }
    }

    pub fn mount(&self, start: &mut Start, target: &str, source: &Path, options: &[&str]) {
        start.spec.mounts.push(Mount::new(target, "bind", source.to_str().expect("text"), options));
    }

    /// Starts, waits for the end, returns how it ended and what it said on standard output.
    pub fn run(&self, start: Start) -> (State, String) {
        let name = start.name.clone();
        let log = start.log_path.clone();
        self.client().start(start).expect("started");
        let state = self.ended(&name);
        (state, output(&log, "stdout"))
    }

    pub fn output_of(&self, script: &str) -> String {
        static N: AtomicU32 = AtomicU32::new(0);
        let name = format!("c{}", N.fetch_add(1, Ordering::Relaxed));
        let start = self.script(&name, script);
        let log = start.log_path.clone();
        let (state, text) = self.run(start);
        assert_eq!(code(&state), 0, "{script}: {text} {}", output(&log, "stderr"));
        text
    }

    pub fn state(&self, name: &str) -> Option<State> {
        self.client().list().expect("list").1.into_iter().find(|s| s.name == name)
    }

    pub fn ended(&self, name: &str) -> State {
        eventually(&format!("{name} has ended"), || {
            self.state(name).filter(|s| matches!(s.phase, Phase::Exited { .. }))
        })
    }

    pub fn exec(&self, name: &str, args: &[&str], streams: Streams) -> Live {
        self.client().exec(name, command(args), streams).expect("executed")
    }

    /// Exit code and standard output.
    pub fn exec_output(&self, name: &str, args: &[&str]) -> (i32, String) {
        let mut live = self.exec(name, args, Streams { stdin: false, stdout: true, stderr: false });
        let text = drain(live.stdout.take().expect("stdout"));
        (exit(&mut live), text)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let s = &self.sandbox;
        client::destroy(&s.cgroup, &s.dir, &s.run_dir).expect("destroyed");
        let _ = fs::remove_dir_all(&s.run_dir);
        if let Some(parent) = s.run_dir.parent() {
            let _ = fs::remove_dir(parent);
        }
    }
}

pub fn command(args: &[&str]) -> container::shim::protocol::Command {
    let args = args.iter().map(|a| (*a).to_owned()).collect();
    container::shim::protocol::Command { args, ..Default::default() }
}

pub fn process(args: &[&str], capabilities: Vec<String>) -> Process {
    Process {
        user: User::default(),
        args: args.iter().map(|a| (*a).to_owned()).collect(),
        env: vec!["PATH=/bin".into()],
        cwd: "/".into(),
        capabilities: Some(Capabilities {
            bounding: capabilities.clone(),
            effective: capabilities.clone(),
            permitted: capabilities,
            ..Default::default()
        }),
        no_new_privileges: true,
        ..Default::default()
    }
}

pub fn code(state: &State) -> i32 {
    match &state.phase {
        Phase::Exited { code, .. } => *code,
        Phase::Running { .. } => panic!("still running"),
    }
}

/// Polls until there is something, at most [`LIMIT`].
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What a log has of one stream.
pub fn output(log: &Path, stream: &str) -> String {
    let text = fs::read_to_string(log).expect("log");
    let mut out = String::new();
    for line in text.lines() {
        let mut parts = line.splitn(4, ' ');
        let (_, of, tag) = (parts.next(), parts.next(), parts.next());
        if of == Some(stream) {
            out.push_str(parts.next().unwrap_or_default());
            if tag == Some("F") {
                out.push('\n');
            }
        }
    }
    out
}

pub fn wait_readable(fd: impl std::os::fd::AsFd) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let limit = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
    assert!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit)).expect("poll") > 0, "nothing came");
}

pub fn drain(fd: OwnedFd) -> String {
    let mut file = fs::File::from(fd);
    let mut bytes = Vec::new();
    loop {
        wait_readable(&file);
        let mut chunk = [0; 4096];
        match file.read(&mut chunk) {
            Ok(0) => break,
            Ok(n) => bytes.extend_from_slice(&chunk[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            // The end of a terminal.
            Err(_) => break,
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Reads until `wanted` has come.
pub fn read_until(fd: &OwnedFd, wanted: &str) -> String {
    let mut text = String::new();
    while !text.contains(wanted) {
        wait_readable(fd);
        let mut chunk = [0; 4096];
        match rustix::io::read(fd, &mut chunk) {
            Ok(0) => panic!("ended before {wanted:?}: {text:?}"),
            Ok(n) => text.push_str(&String::from_utf8_lossy(&chunk[..n])),
            Err(rustix::io::Errno::AGAIN) => {}
            Err(e) => panic!("{e}: {text:?}"),
        }
    }
    text
}

pub fn exit(live: &mut Live) -> i32 {
    loop {
        // What came with the answer before has been read already.
        match live.ending.exit_code(&live.connection) {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => wait_readable(&live.connection),
            other => return other.expect("exit code"),
        }
    }
}
