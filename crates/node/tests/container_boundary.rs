//! The container boundary as the agent uses it, against a real kernel. Needs root and a static busybox.

use api::streams::{Exit, TerminalSize, Wanted};
use node::boundary::container::ContainerBoundary;
use node::boundary::*;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const LIMIT: Duration = Duration::from_secs(30);
const ID_BASE: u32 = 1_441_792;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|a| a == "shim") {
        std::process::exit(::container::shim::main(&args[2..]));
    }
    if args.iter().any(|a| a == "--list") {
        return;
    }
    if !rustix::process::geteuid().is_root() || !Path::new("/bin/busybox").exists() {
        println!("SKIPPED: needs root and /bin/busybox (package busybox-static)");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(300), whole_life()).await.expect("in time");
    });
    println!("test container_boundary ... ok");
}

fn image(base: &Path) -> Vec<PathBuf> {
    let layer = base.join("layer");
    for directory in ["bin", "etc", "tmp"] {
        std::fs::create_dir_all(layer.join(directory)).expect("made");
    }
    std::fs::copy("/bin/busybox", layer.join("bin/busybox")).expect("copied");
    for name in
        ["sh", "cat", "sleep", "echo", "id", "stty", "nc", "true", "stat", "hostname", "sort", "mount", "test", "ls"]
    {
        symlink("busybox", layer.join("bin").join(name)).expect("link");
    }
    vec![layer]
}

fn pod(base: &Path) -> SandboxSpec {
    let unique = std::process::id();
    SandboxSpec {
        uid: format!("test-{unique}"),
        namespace: "default".into(),
        name: "pod".into(),
        dir: base.join("pod"),
        run_dir: PathBuf::from(format!("/run/atoll-node-test-{unique}")),
        hostname: "pod".into(),
        network: SandboxNetwork::default(),
        id_base: ID_BASE,
        cgroup: format!("atoll-node-test-{unique}/pod"),
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

fn script(base: &Path, name: &str, script: &str) -> ContainerSpec {
    ContainerSpec {
        name: name.into(),
        attempt: 0,
        rootfs: Rootfs::Layers { image: "busybox".into(), layers: vec![base.join("layer")] },
        args: ["sh", "-c", script].map(String::from).to_vec(),
        env: vec![("PATH".into(), "/bin".into()), ("COLOUR".into(), "blue=green".into())],
        cwd: "/".into(),
        mounts: Vec::new(),
        resources: Resources { memory_limit: Some(64 << 20), pids_limit: Some(64), ..Default::default() },
        security: Security { no_new_privileges: true, ..Default::default() },
        tty: false,
        stdin: false,
        stdin_once: false,
        log_path: base.join(format!("logs/{name}.log")),
        log_max_bytes: 1 << 20,
    }
}

async fn ended(boundary: &ContainerBoundary, pod: &SandboxSpec, name: &str) -> ContainerState {
    let look = async {
        loop {
            let found = boundary.list(pod).await.expect("list").into_iter().find(|c| c.name == name).expect("there");
            if matches!(found.phase, Phase::Exited { .. }) {
                return found;
            }
            boundary.changed(pod).await.expect("changed");
        }
    };
    tokio::time::timeout(LIMIT, look).await.expect("it ends, and that is told")
}

async fn all(output: Option<api::streams::Output>) -> String {
    let mut text = String::new();
    output.expect("stream").read_to_string(&mut text).await.expect("read");
    text
}

fn wanted(tty: bool) -> Wanted {
    Wanted { stdin: true, stdout: true, stderr: true, tty, size: None }
}

fn command(args: &[&str], tty: bool) -> ExecRequest {
    ExecRequest { command: args.iter().map(|a| (*a).to_owned()).collect(), env: Vec::new(), wanted: wanted(tty) }
}

async fn whole_life() {
    let temporary = tempfile::Builder::new().prefix("atoll-node").tempdir_in("/var/tmp").expect("directory");
    let base = temporary.path();
    image(base);
    let pod = pod(base);
    let exe = std::env::current_exe().expect("own path");
    let boundary = ContainerBoundary::new(exe.clone(), base.to_owned(), None);
    assert!(matches!(boundary.list(&pod).await, Err(BoundaryError::NoSandbox(_))));
    assert!(matches!(boundary.changed(&pod).await, Err(BoundaryError::NoSandbox(_))));
    boundary.prepare(&pod).await.expect("prepared");
    boundary.prepare(&pod).await.expect("prepared again");
    assert_eq!(boundary.list(&pod).await.expect("list"), []);

    mounts_and_exits(&boundary, &pod, base).await;

    let running = boundary
        .start(&pod, &script(base, "main", "nc -ll -p 8080 -e echo hello & sleep 1000"))
        .await
        .expect("started");
    streams(&boundary, &pod).await;
    terminal(&boundary, &pod).await;
    attach(&boundary, &pod, base).await;

    let stats = boundary.stats(&pod, "main").await.expect("stats");
    assert!(stats.pids >= 2 && stats.memory_bytes > 0, "{stats:?}");
    boundary.pause(&pod).await.expect("paused");
    boundary.resume(&pod).await.expect("resumed");

    // Another agent, as after a restart, finds it as it was.
    drop(boundary);
    let boundary = ContainerBoundary::new(exe, base.to_owned(), None);
    boundary.prepare(&pod).await.expect("found");
    assert!(boundary.list(&pod).await.expect("list").contains(&running));
    let mut changed = Box::pin(boundary.changed(&pod));
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut changed).await.is_err(), "nothing has changed");
    boundary.signal(&pod, "main", 9).await.expect("signalled");
    tokio::time::timeout(LIMIT, changed).await.expect("told").expect("changed");
    assert!(matches!(ended(&boundary, &pod, "main").await.phase, Phase::Exited { code: 137, signal: Some(9), .. }));
    assert!(matches!(boundary.exec(&pod, "main", command(&["true"], false)).await, Err(BoundaryError::NotRunning(_))));

    boundary.destroy(&pod).await.expect("destroyed");
    boundary.destroy(&pod).await.expect("destroyed again");
    assert!(matches!(boundary.list(&pod).await, Err(BoundaryError::NoSandbox(_))));
    assert!(!pod.dir.join("boundary").exists());
    privileged(&boundary, &pod, base).await;
    let _ = std::fs::remove_dir(&pod.run_dir);
}

async fn privileged(boundary: &ContainerBoundary, pod: &SandboxSpec, base: &Path) {
    let mut pod = pod.clone();
    pod.id_base = 0;
    boundary.prepare(&pod).await.expect("prepared");
    let mut all = script(
        base,
        "all",
        "mount -t tmpfs x /tmp && echo mounted; test -w /proc/sys/kernel && echo writable; ls /dev",
    );
    all.security.privileged = true;
    boundary.start(&pod, &all).await.expect("started");
    ended(boundary, &pod, "all").await;
    let log = std::fs::read_to_string(&all.log_path).expect("log");
    assert!(log.contains("mounted") && log.contains("writable"), "{log}");
    for device in ["kvm", "fuse", "loop-control"].iter().filter(|d| Path::new("/dev").join(d).exists()) {
        assert!(log.contains(device), "{device}: {log}");
    }
    boundary.destroy(&pod).await.expect("destroyed");
}

async fn mounts_and_exits(boundary: &ContainerBoundary, pod: &SandboxSpec, base: &Path) {
    let volume = base.join("volume");
    std::fs::create_dir_all(&volume).expect("made");
    let mut first = script(base, "first", "echo $COLOUR > /data/colour; hostname; id -u; cat /etc/resolv.conf; exit 3");
    std::fs::write(base.join("resolv.conf"), "nameserver 10.43.0.10\n").expect("written");
    let mount = |source, target: &str, read_only| Mount {
        source: MountSource::Pod(source),
        target: target.into(),
        read_only,
        propagation: "None".into(),
        volume: None,
    };
    first.mounts =
        vec![mount(volume.clone(), "/data", false), mount(base.join("resolv.conf"), "/etc/resolv.conf", true)];
    boundary.start(pod, &first).await.expect("started");
    let state = ended(boundary, pod, "first").await;
    assert!(matches!(state.phase, Phase::Exited { code: 3, .. }), "{state:?}");
    let log = std::fs::read_to_string(&first.log_path).expect("log");
    let said: Vec<&str> = log.lines().filter_map(|l| l.split_once(" stdout F ")).map(|(_, text)| text).collect();
    assert_eq!(said, ["pod", "0", "nameserver 10.43.0.10"]);
    assert_eq!(std::fs::read_to_string(volume.join("colour")).expect("read"), "blue=green\n");
    assert_eq!(std::fs::metadata(volume.join("colour")).expect("stat").uid(), 0);
    boundary.remove(pod, "first").await.expect("removed");

    let mut missing = script(base, "missing", "");
    missing.args = vec!["foo".into()];
    let Err(BoundaryError::Refused { reason, message }) = boundary.start(pod, &missing).await else {
        panic!("refused")
    };
    assert_eq!(reason, "StartError");
    assert_eq!(message, r#"exec: "foo": executable file not found in $PATH"#);
    assert_eq!(boundary.list(pod).await.expect("list"), []);
}

async fn streams(boundary: &ContainerBoundary, pod: &SandboxSpec) {
    let args = ["sh", "-c", "echo err >&2; echo $COLOUR; sort; exit 4"];
    let mut session = boundary.exec(pod, "main", command(&args, false)).await.expect("executed");
    let mut stdin = session.stdin.take().expect("stdin");
    stdin.write_all(b"b\na\n").await.expect("written");
    drop(stdin);
    assert_eq!(all(session.stdout.take()).await, "blue=green\na\nb\n");
    assert_eq!(all(session.stderr.take()).await, "err\n");
    assert_eq!(session.exit.await.expect("told"), Exit::Code(4));
    for _ in 0..20 {
        let session = boundary.exec(pod, "main", command(&["true"], false)).await.expect("executed");
        assert_eq!(session.exit.await.expect("told"), Exit::Code(0));
    }
    let session = boundary.exec(pod, "main", command(&["foo"], false)).await.expect("a session that says why");
    let Exit::Failed(why) = session.exit.await.expect("told") else { panic!("failed") };
    assert!(why.contains("executable file not found"), "{why}");
    assert!(matches!(boundary.exec(pod, "nobody", command(&["true"], false)).await, Err(BoundaryError::NotRunning(_))));
    // A port in the pod; nothing listens at first.
    let forward = async {
        loop {
            if let Ok(stream) = forwarded(boundary, pod).await {
                return stream;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert_eq!(tokio::time::timeout(LIMIT, forward).await.expect("in time"), "hello\n");
}

/// The sandbox of this test has a namespace of its own making: its container's is the path to it.
async fn forwarded(boundary: &ContainerBoundary, pod: &SandboxSpec) -> Result<String> {
    let main = boundary.list(pod).await?.into_iter().find(|c| c.name == "main").and_then(|c| c.pid).expect("pid");
    let mut pod = pod.clone();
    pod.network.netns = Some(format!("/proc/{main}/ns/net").into());
    let mut stream = boundary.port_forward(&pod, 8080).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await.expect("read");
    Ok(text)
}

async fn terminal(boundary: &ContainerBoundary, pod: &SandboxSpec) {
    let args = ["sh", "-c", "until [ \"$(stty size)\" = \"50 132\" ]; do :; done; read x; echo got $x; exit 5"];
    let mut session = boundary.exec(pod, "main", command(&args, true)).await.expect("executed");
    assert!(session.stderr.is_none());
    let resize = session.resize.take().expect("resize");
    resize.send(TerminalSize { columns: 132, rows: 50 }).await.expect("sent");
    let mut stdin = session.stdin.take().expect("stdin");
    stdin.write_all(b"word\n").await.expect("written");
    let text = all(session.stdout.take()).await;
    assert!(text.contains("got word"), "{text}");
    assert_eq!(session.exit.await.expect("told"), Exit::Code(5));
}

async fn attach(boundary: &ContainerBoundary, pod: &SandboxSpec, base: &Path) {
    let mut reader = script(base, "reader", "read x; echo got $x; exit 6");
    (reader.stdin, reader.tty) = (true, true);
    boundary.start(pod, &reader).await.expect("started");
    let mut session = boundary.attach(pod, "reader", wanted(true)).await.expect("attached");
    let mut stdin = session.stdin.take().expect("stdin");
    stdin.write_all(b"word\n").await.expect("written");
    let text = all(session.stdout.take()).await;
    assert!(text.contains("got word"), "{text}");
    assert_eq!(session.exit.await.expect("told"), Exit::Code(6));
}
