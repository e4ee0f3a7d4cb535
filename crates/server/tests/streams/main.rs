//! Exec, attach, cp and port-forward with the real `kubectl`, over WebSocket and over SPDY.

mod fake;
mod real;

use fake::Fake;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

/// Both settings of kubectl's two switches.
const TRANSPORTS: [&str; 2] = ["true", "false"];

/// That kubectl used the transport it was told to, and did not fall back to another.
fn assert_used(server: &Fake, transport: &str) {
    let expected = if transport == "true" { "websocket" } else { "SPDY/3.1" };
    assert_eq!(server.upgrades(), [expected]);
}

struct Kubectl {
    home: tempfile::TempDir,
    websockets: &'static str,
}

impl Kubectl {
    fn new(server: &Fake, websockets: &'static str) -> Self {
        let config = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: x\nclusters: [{{name: x, cluster: {{server: \"http://{}\"}}}}]\n\
             contexts: [{{name: x, context: {{cluster: x, user: x}}}}]\nusers: [{{name: x, user: {{}}}}]\n",
            server.address
        );
        Kubectl::with_config(&config, websockets)
    }

    fn with_config(config: &str, websockets: &'static str) -> Self {
        let home = tempfile::tempdir().expect("a directory");
        std::fs::write(home.path().join("config"), config).expect("written");
        Kubectl { home, websockets }
    }

    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(args)
            .env("HOME", self.home.path())
            .env("KUBECONFIG", self.home.path().join("config"))
            .env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", self.websockets)
            .env("KUBECTL_PORT_FORWARD_WEBSOCKETS", self.websockets)
            .current_dir(self.home.path())
            .kill_on_drop(true);
        command
    }

    async fn run(&self, args: &[&str], input: &[u8]) -> Output {
        let mut child = self
            .command("kubectl", args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kubectl starts");
        let mut stdin = child.stdin.take().expect("piped");
        let input = input.to_vec();
        let writing = tokio::spawn(async move {
            let _ = stdin.write_all(&input).await;
        });
        let output = child.wait_with_output().await.expect("kubectl ends");
        writing.await.expect("no panic");
        output
    }
}

fn no_kubectl() -> bool {
    let missing = std::process::Command::new("kubectl").args(["version", "--client"]).output().is_err();
    if missing {
        println!("SKIPPED: kubectl is not installed");
    }
    missing
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Bytes that do not repeat soon.
fn noise(size: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exec_carries_output_and_exit_codes() {
    if no_kubectl() {
        return;
    }
    let server = Fake::start().await;
    for transport in TRANSPORTS {
        let kubectl = Kubectl::new(&server, transport);
        let output = kubectl.run(&["exec", "web", "--", "sh", "-c", "echo out; echo err >&2; exit 7"], b"").await;
        assert_eq!(text(&output.stdout), "out\n", "websockets={transport} {output:?}");
        assert_eq!(text(&output.stderr), "err\ncommand terminated with exit code 7\n");
        assert_eq!(output.status.code(), Some(7));
        let output = kubectl.run(&["exec", "web", "--", "true"], b"").await;
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
        let output = kubectl.run(&["exec", "web", "--", "fails"], b"").await;
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains("no such file: fails"), "{output:?}");
        assert_used(&server, transport);
        let output = kubectl.run(&["exec", "web", "--", "refused"], b"").await;
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains("container app is not running"), "{output:?}");
        server.upgrades();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exec_passes_megabytes_both_ways() {
    if no_kubectl() {
        return;
    }
    let server = Fake::start().await;
    let sent = noise(20 << 20);
    for transport in TRANSPORTS {
        let kubectl = Kubectl::new(&server, transport);
        let output = kubectl.run(&["exec", "-i", "web", "--", "cat"], &sent).await;
        assert!(output.status.success(), "websockets={transport} {}", text(&output.stderr));
        assert_eq!(output.stdout.len(), sent.len());
        assert!(output.stdout == sent, "bytes were changed on the way");
        // A process that does not read what it is sent.
        let output = kubectl.run(&["exec", "-i", "web", "--", "sh", "-c", "echo done; exit 4"], &sent).await;
        assert_eq!(
            (output.status.code(), text(&output.stdout)),
            (Some(4), "done\n".into()),
            "{}",
            text(&output.stderr)
        );
        assert_used(&server, transport);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exec_with_a_terminal() {
    if no_kubectl() {
        return;
    }
    if std::process::Command::new("script").arg("--version").output().is_err() {
        println!("SKIPPED: script, which makes a terminal, is not installed");
        return;
    }
    let server = Fake::start().await;
    for transport in TRANSPORTS {
        let kubectl = Kubectl::new(&server, transport);
        let inner = "stty cols 101 rows 41; exec kubectl exec -it web -- terminal";
        let mut child = kubectl
            .command("script", &["-qec", inner, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("script starts");
        let mut stdin = child.stdin.take().expect("piped");
        let mut screen = BufReader::new(child.stdout.take().expect("piped"));
        let mut seen = String::new();
        while !seen.contains("size") {
            seen.clear();
            assert_ne!(screen.read_line(&mut seen).await.expect("text"), 0, "ended early");
        }
        assert_eq!(seen.trim(), "size 101x41", "websockets={transport}");
        stdin.write_all(b"hello\rexit\r").await.expect("typed");
        let mut rest = String::new();
        screen.read_to_string(&mut rest).await.expect("text");
        assert!(rest.contains("hello"), "{rest:?}");
        assert!(rest.contains("exit code 3"), "{rest:?}");
        assert_eq!(child.wait().await.expect("ends").code(), Some(3));
        assert_used(&server, transport);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attach_sees_output_and_gives_input() {
    if no_kubectl() {
        return;
    }
    let server = Fake::start().await;
    for transport in TRANSPORTS {
        let kubectl = Kubectl::new(&server, transport);
        let output = kubectl.run(&["attach", "-i", "web"], b"hello\n").await;
        assert!(output.status.success(), "websockets={transport} {output:?}");
        assert_eq!(text(&output.stdout), "attached\ngot hello\n");
        assert!(text(&output.stderr).contains("warned\n"), "{output:?}");
        assert_used(&server, transport);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cp_copies_files_both_ways() {
    if no_kubectl() {
        return;
    }
    let server = Fake::start().await;
    let content = noise(50 << 20);
    for transport in TRANSPORTS {
        let kubectl = Kubectl::new(&server, transport);
        let there = tempfile::tempdir().expect("a directory");
        std::fs::write(kubectl.home.path().join("here"), &content).expect("written");
        let remote = format!("web:{}/there", there.path().display());
        let output = kubectl.run(&["cp", "here", &remote], b"").await;
        assert!(output.status.success(), "websockets={transport} {output:?}");
        assert!(std::fs::read(there.path().join("there")).expect("copied") == content);
        let output = kubectl.run(&["cp", &remote, "back"], b"").await;
        assert!(output.status.success(), "websockets={transport} {output:?}");
        assert!(std::fs::read(kubectl.home.path().join("back")).expect("copied") == content);
        assert_used(&server, transport);
    }
}

/// Answers each connection with what it was sent, until its end.
async fn echo_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = connection.into_split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    port
}

async fn forwarding(kubectl: &Kubectl, port: u16) -> (Child, u16) {
    let mut child = kubectl
        .command("kubectl", &["port-forward", "pod/web", &format!(":{port}")])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("kubectl starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let line = lines.next_line().await.expect("text").expect("a line");
    // Forwarding from 127.0.0.1:40001 -> 8080
    let local = line.split(':').nth(1).and_then(|rest| rest.split(' ').next()).and_then(|port| port.parse().ok());
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    (child, local.unwrap_or_else(|| panic!("no port in {line:?}")))
}

async fn echoed(port: u16, data: &[u8]) -> Vec<u8> {
    let connection = TcpStream::connect(("127.0.0.1", port)).await.expect("connects");
    let (mut read, mut write) = connection.into_split();
    let data = data.to_vec();
    let size = data.len();
    // The writing half stays open: kubectl takes its end for the end of both.
    let writing = tokio::spawn(async move {
        write.write_all(&data).await.expect("written");
        write
    });
    let mut back = vec![0; size];
    read.read_exact(&mut back).await.expect("read");
    drop(writing.await.expect("no panic"));
    back
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn port_forward_carries_many_connections() {
    if no_kubectl() {
        return;
    }
    let server = Fake::start().await;
    let target = echo_server().await;
    for transport in TRANSPORTS {
        let kubectl = Kubectl::new(&server, transport);
        let (mut child, port) = forwarding(&kubectl, target).await;
        let large = noise(64 << 20);
        assert!(echoed(port, &large).await == large, "websockets={transport}: bytes were changed on the way");
        let data = noise(1 << 20);
        let mut connections = tokio::task::JoinSet::new();
        for n in 0..60 {
            let data = data.get(n * 1000..).expect("long enough").to_vec();
            connections.spawn(async move { echoed(port, &data).await == data });
        }
        while let Some(same) = connections.join_next().await {
            assert!(same.expect("no panic"), "websockets={transport}");
        }
        // One after the other: nothing is left behind by those that ended.
        for _ in 0..200 {
            assert_eq!(echoed(port, b"ping").await, b"ping");
        }
        child.kill().await.expect("killed");
        assert_used(&server, transport);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn port_forward_reports_a_closed_port() {
    if no_kubectl() {
        return;
    }
    let server = Fake::start().await;
    // Bound and not listened on by anyone after this.
    let closed = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("an address").port();
    for transport in TRANSPORTS {
        let kubectl = Kubectl::new(&server, transport);
        let (mut child, port) = forwarding(&kubectl, closed).await;
        let mut stderr = child.stderr.take().expect("piped");
        let mut connection = TcpStream::connect(("127.0.0.1", port)).await.expect("connects");
        let mut nothing = Vec::new();
        let _ = connection.read_to_end(&mut nothing).await;
        assert!(nothing.is_empty());
        let mut said = String::new();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !said.contains("error forwarding port") {
            let mut buffer = [0; 1024];
            let left = deadline.saturating_duration_since(Instant::now());
            let read = tokio::time::timeout(left, stderr.read(&mut buffer)).await.expect("kubectl says why");
            let size = read.expect("read");
            assert_ne!(size, 0, "kubectl ended: {said}");
            said.push_str(&text(&buffer[..size]));
        }
        assert!(said.contains("refused"), "{said}");
        assert_used(&server, transport);
        let _ = child.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_ends_its_process() {
    if no_kubectl() {
        return;
    }
    let server = Fake::start().await;
    let directory = tempfile::tempdir().expect("a directory");
    for transport in TRANSPORTS {
        let kubectl = Kubectl::new(&server, transport);
        let pid_file = directory.path().join(transport);
        let script = format!("echo $$ > {}; echo started; exec sleep 1000", pid_file.display());
        let mut child = kubectl
            .command("kubectl", &["exec", "web", "--", "sh", "-c", &script])
            .stdout(Stdio::piped())
            .spawn()
            .expect("kubectl starts");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        assert_eq!(lines.next_line().await.expect("text").as_deref(), Some("started"));
        let pid = std::fs::read_to_string(&pid_file).expect("written").trim().to_owned();
        child.kill().await.expect("killed");
        let deadline = Instant::now() + Duration::from_secs(60);
        while Path::new("/proc").join(&pid).exists() {
            assert!(Instant::now() < deadline, "websockets={transport}: process {pid} is still there");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_client_streams_too() {
    let has_client = std::process::Command::new("python3").args(["-c", "import kubernetes.stream"]).output();
    if !has_client.is_ok_and(|output| output.status.success()) {
        println!("SKIPPED: the Python client (pip install kubernetes) is not installed");
        return;
    }
    let server = Fake::start().await;
    let target = echo_server().await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/streams/client.py");
    let output = Command::new("python3")
        .arg(script)
        .arg(format!("http://{}", server.address))
        .arg(target.to_string())
        .kill_on_drop(true)
        .output()
        .await
        .expect("python starts");
    assert_eq!(text(&output.stdout), "ok\n", "{}", text(&output.stderr));
    assert_used(&server, "true");
}
