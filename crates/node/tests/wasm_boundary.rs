//! The wasm boundary as the agent uses it: real host, real network namespace. Needs root and `ip`.

use node::boundary::wasm::WasmBoundary;
use node::boundary::*;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const LIMIT: Duration = Duration::from_secs(60);
const ANSWER: &str = "(call $answer (local.get $out))";

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some("function-host") => std::process::exit(function::host::main(&args[2..])),
        Some("function-connect") => std::process::exit(function::connect::main(&args[2..])),
        Some("function-compile") => std::process::exit(function::compile::main(&args[2..])),
        Some("--list") => return,
        _ => {}
    }
    if !rustix::process::geteuid().is_root() || Command::new("ip").arg("-V").output().is_err() {
        println!("SKIPPED: needs root and ip (package iproute2)");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let bench = Bench::new();
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(300), whole_life(&bench)).await.expect("in time");
    });
    println!("test wasm_boundary ... ok");
}

struct Bench {
    dir: tempfile::TempDir,
    netns: String,
}

impl Bench {
    fn new() -> Bench {
        let netns = format!("atoll-wasm-test-{}", std::process::id());
        for arguments in [vec!["netns", "add", &netns], vec!["-n", &netns, "link", "set", "lo", "up"]] {
            assert!(Command::new("ip").args(arguments).status().expect("ip").success());
        }
        Bench { dir: tempfile::tempdir().expect("made"), netns }
    }

    /// As after a restart of the agent.
    fn boundary(&self) -> WasmBoundary {
        let exe = std::env::current_exe().expect("path");
        WasmBoundary::new(exe, self.dir.path().join("data"), self.dir.path().join("run"))
    }

    fn sandbox(&self) -> SandboxSpec {
        SandboxSpec {
            uid: "11111111-2222".into(),
            namespace: "shop".into(),
            name: "pricing".into(),
            dir: self.dir.path().join("pod"),
            run_dir: self.dir.path().join("run/pod"),
            hostname: "pricing".into(),
            network: SandboxNetwork {
                netns: Some(Path::new("/run/netns").join(&self.netns)),
                ..SandboxNetwork::default()
            },
            id_base: 1_441_792,
            cgroup: "unused".into(),
            limits: Resources::default(),
            sysctls: Default::default(),
            share_pid: false,
            labels: Default::default(),
            annotations: Default::default(),
            machine: None,
            images: Vec::new(),
            log_max_bytes: 0,
        }
    }

    fn container(&self, name: &str, attempt: u32, body: &str) -> ContainerSpec {
        let wat = include_str!("../../function/tests/handler.wat").replace("@HANDLER@", body);
        let bytes = wat::parse_str(wat).expect("a component");
        let digest = image::Digest::of(&bytes);
        let path = self.dir.path().join(digest.hex());
        fs::write(&path, bytes).expect("written");
        ContainerSpec {
            name: name.into(),
            attempt,
            rootfs: Rootfs::Component { image: "pricing".into(), path, digest: digest.to_string() },
            args: Vec::new(),
            env: Vec::new(),
            cwd: "/".into(),
            mounts: Vec::new(),
            resources: Resources::default(),
            security: Security::default(),
            tty: false,
            stdin: false,
            stdin_once: false,
            log_path: self.dir.path().join(format!("logs/{name}/{attempt}.log")),
            log_max_bytes: 64 << 10,
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for (pid, _) in hosts(self.dir.path()) {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
        let _ = Command::new("ip").args(["netns", "del", &self.netns]).status();
    }
}

/// Host processes whose command line names a path.
fn hosts(below: &Path) -> Vec<(u32, String)> {
    let below = below.to_str().expect("text");
    fs::read_dir("/proc")
        .expect("proc")
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok())
        .filter_map(|pid| {
            let line = String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/cmdline")).ok()?).into_owned();
            (line.contains("--serve") && line.contains(below)).then_some((pid, line))
        })
        .collect()
}

async fn get(boundary: &WasmBoundary, sandbox: &SandboxSpec, port: u16) -> String {
    let mut stream = boundary.port_forward(sandbox, port).await.expect("forwarded");
    stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.expect("sent");
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text).await;
    text.split(' ').nth(1).unwrap_or_default().to_owned()
}

/// Waits, woken by `changed`, until the only container is as wanted.
async fn until(boundary: &WasmBoundary, sandbox: &SandboxSpec, wanted: impl Fn(&Phase) -> bool) -> Phase {
    let waiting = async {
        loop {
            let states = boundary.list(sandbox).await.expect("listed");
            if wanted(&states[0].phase) {
                return states[0].phase.clone();
            }
            boundary.changed(sandbox).await.expect("woken");
        }
    };
    tokio::time::timeout(LIMIT, waiting).await.expect("in time")
}

fn exited(phase: &Phase) -> bool {
    matches!(phase, Phase::Exited { .. })
}

async fn whole_life(bench: &Bench) {
    let boundary = bench.boundary();
    let sandbox = bench.sandbox();
    assert!(matches!(boundary.list(&sandbox).await, Err(BoundaryError::NoSandbox(_))));
    boundary.prepare(&sandbox).await.expect("prepared");
    boundary.prepare(&sandbox).await.expect("prepared again");
    assert!(boundary.list(&sandbox).await.expect("listed").is_empty());

    let first = bench.container("price", 0, ANSWER);
    let state = boundary.start(&sandbox, &first).await.expect("started");
    assert_eq!(boundary.start(&sandbox, &first).await.expect("started again"), state);
    assert_eq!(get(&boundary, &sandbox, 8080).await, "200");
    assert!(boundary.stats(&sandbox, "price").await.expect("stats").cpu_nanos > 0);
    refusals(bench, &boundary, &sandbox).await;

    // The agent is restarted; the function never notices.
    drop(boundary);
    let boundary = bench.boundary();
    assert_eq!(boundary.list(&sandbox).await.expect("listed"), [state]);
    assert_eq!(get(&boundary, &sandbox, 8080).await, "200");

    boundary.signal(&sandbox, "price", 15).await.expect("signalled");
    let phase = until(&boundary, &sandbox, exited).await;
    assert!(matches!(phase, Phase::Exited { code: 0, signal: None, .. }), "{phase:?}");
    assert_eq!(bench.boundary().list(&sandbox).await.expect("listed")[0].phase, phase, "an ending is written down");
    boundary.remove(&sandbox, "price").await.expect("removed");
    assert!(boundary.list(&sandbox).await.expect("listed").is_empty());

    crash(bench, &boundary, &sandbox).await;
    rotation(bench, &boundary, &sandbox).await;

    boundary.destroy(&sandbox).await.expect("destroyed");
    boundary.destroy(&sandbox).await.expect("destroyed again");
    assert!(matches!(boundary.list(&sandbox).await, Err(BoundaryError::NoSandbox(_))));
    let deadline = Instant::now() + LIMIT;
    while !hosts(bench.dir.path()).is_empty() {
        assert!(Instant::now() < deadline, "an unused host stays");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn refusals(bench: &Bench, boundary: &WasmBoundary, sandbox: &SandboxSpec) {
    let refused = |error: BoundaryError| match error {
        BoundaryError::Refused { reason, message } => format!("{reason}: {message}"),
        other => panic!("{other:?}"),
    };
    let second = bench.container("second", 0, ANSWER);
    let taken = refused(boundary.start(sandbox, &second).await.expect_err("the port is taken"));
    assert!(taken.contains("port 8080 is taken"), "{taken}");
    let odd = ContainerSpec { env: vec![("PORT".into(), "http".into())], ..second.clone() };
    assert!(refused(boundary.start(sandbox, &odd).await.expect_err("no port")).contains("PORT=\"http\""));
    let layers = Rootfs::Layers { image: "x".into(), layers: Vec::new() };
    let container = ContainerSpec { rootfs: layers, ..second.clone() };
    assert!(
        refused(boundary.start(sandbox, &container).await.expect_err("no component")).contains("not a WebAssembly")
    );
    let request = ExecRequest { command: vec!["sh".into()], env: Vec::new(), wanted: Default::default() };
    assert!(matches!(boundary.exec(sandbox, "price", request).await, Err(BoundaryError::Unsupported { .. })));
    // A second one on a port of its own is fine.
    let other = ContainerSpec { env: vec![("PORT".into(), "9090".into())], ..second };
    boundary.start(sandbox, &other).await.expect("started");
    assert_eq!(get(boundary, sandbox, 9090).await, "200");
    boundary.remove(sandbox, "second").await.expect("removed while it ran");
}

/// The host is killed: its functions count as ended, and the next start brings a new one.
async fn crash(bench: &Bench, boundary: &WasmBoundary, sandbox: &SandboxSpec) {
    boundary.start(sandbox, &bench.container("price", 1, ANSWER)).await.expect("started");
    let host = hosts(bench.dir.path());
    assert_eq!(host.len(), 1);
    assert!(Command::new("kill").args(["-9", &host[0].0.to_string()]).status().expect("kill").success());
    let phase = until(boundary, sandbox, exited).await;
    assert!(
        matches!(&phase, Phase::Exited { code: 255, message, .. } if message.contains("unexpectedly")),
        "{phase:?}"
    );
    boundary.start(sandbox, &bench.container("price", 2, ANSWER)).await.expect("started on a new host");
    assert_eq!(get(boundary, sandbox, 8080).await, "200");
    boundary.signal(sandbox, "price", 9).await.expect("killed");
    let phase = until(boundary, sandbox, exited).await;
    assert!(matches!(phase, Phase::Exited { code: 137, signal: Some(9), .. }), "{phase:?}");
}

async fn rotation(bench: &Bench, boundary: &WasmBoundary, sandbox: &SandboxSpec) {
    let container = bench.container("price", 3, "unreachable");
    boundary.start(sandbox, &container).await.expect("started");
    let old = PathBuf::from(format!("{}.1", container.log_path.display()));
    let deadline = Instant::now() + LIMIT;
    while !old.exists() || fs::metadata(&container.log_path).map_or(0, |m| m.len()) == 0 {
        assert_eq!(get(boundary, sandbox, 8080).await, "500");
        assert!(Instant::now() < deadline, "the log was not rotated");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert!(fs::read_to_string(&old).expect("read").contains(" stderr F atoll: GET /: the function failed"));
}
