//! A pod made of processes of this machine, and as much of an API server as `kubectl exec`, `attach`, `cp` and
//! `port-forward` ask for.

use api::status::{Reason, Status, StatusResult};
use api::streams::{Duplex, Exit, LogOptions, PodStreams, Session, Target, Wanted};
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use server::stream;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};

pub struct Processes;

/// A terminal program: says what size it is given, then echoes lines until it reads `exit`.
fn terminal(_wanted: Wanted) -> Session {
    let (stdin, mut typed) = tokio::io::duplex(1024);
    let (mut screen, stdout) = tokio::io::duplex(1024);
    let (resize, mut sizes) = mpsc::channel(4);
    let (ended, exit) = oneshot::channel();
    tokio::spawn(async move {
        if let Some(api::streams::TerminalSize { columns, rows }) = sizes.recv().await {
            let _ = screen.write_all(format!("size {columns}x{rows}\r\n").as_bytes()).await;
        }
        let mut text = Vec::new();
        while !text.windows(4).any(|window| window == b"exit") {
            let mut buffer = [0; 64];
            let size = typed.read(&mut buffer).await.unwrap_or(0);
            if size == 0 {
                break;
            }
            text.extend_from_slice(&buffer[..size]);
            let _ = screen.write_all(&buffer[..size]).await;
        }
        let _ = ended.send(Exit::Code(3));
    });
    Session { stdin: Some(Box::pin(stdin)), stdout: Some(Box::pin(stdout)), stderr: None, resize: Some(resize), exit }
}

fn process(command: &[String], wanted: Wanted) -> std::io::Result<Session> {
    let piped = |wanted: bool| if wanted { Stdio::piped() } else { Stdio::null() };
    let mut child = tokio::process::Command::new(&command[0])
        .args(&command[1..])
        .stdin(piped(wanted.stdin))
        .stdout(piped(wanted.stdout))
        .stderr(piped(wanted.stderr))
        .kill_on_drop(true)
        .spawn()?;
    let (ended, exit) = oneshot::channel();
    let session = Session {
        stdin: child.stdin.take().map(|stdin| Box::pin(stdin) as _),
        stdout: child.stdout.take().map(|stdout| Box::pin(stdout) as _),
        stderr: child.stderr.take().map(|stderr| Box::pin(stderr) as _),
        resize: None,
        exit,
    };
    tokio::spawn(async move {
        let mut ended = ended;
        tokio::select! {
            // Detached: the process goes too.
            () = ended.closed() => {}
            status = child.wait() => {
                let code = status.ok().and_then(|status| status.code()).unwrap_or(137);
                let _ = ended.send(Exit::Code(code));
            }
        }
    });
    Ok(session)
}

#[async_trait]
impl PodStreams for Processes {
    async fn exec(&self, _target: &Target, command: Vec<String>, wanted: Wanted) -> StatusResult<Session> {
        match command[0].as_str() {
            "refused" => Err(Status::new(Reason::NotFound, "container app is not running")),
            "fails" => {
                let (ended, exit) = oneshot::channel();
                let _ = ended.send(Exit::Failed("no such file: fails".into()));
                Ok(Session { stdin: None, stdout: None, stderr: None, resize: None, exit })
            }
            "terminal" => Ok(terminal(wanted)),
            _ => process(&command, wanted).map_err(Status::internal),
        }
    }

    async fn attach(&self, _target: &Target, wanted: Wanted) -> StatusResult<Session> {
        let script = "echo attached; echo warned >&2; if read line; then echo got $line; fi; exit 5";
        process(&["sh".into(), "-c".into(), script.into()], wanted).map_err(Status::internal)
    }

    async fn port_forward(&self, _target: &Target, port: u16) -> StatusResult<Box<dyn Duplex>> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.map_err(Status::internal)?;
        Ok(Box::new(stream))
    }

    async fn logs(&self, _: &Target, _: LogOptions) -> StatusResult<BoxStream<'static, std::io::Result<Bytes>>> {
        Err(Status::bad_request("no logs here"))
    }
}

fn pod() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "web", "namespace": "default", "uid": "u", "resourceVersion": "1"},
        "spec": {"containers": [{"name": "app", "image": "x", "stdin": true}], "nodeName": "here"},
        "status": {"phase": "Running", "containerStatuses": [{"name": "app", "ready": true, "state": {"running": {}}}]}
    })
}

fn answer(value: &Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(value.to_string())));
    response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
    response
}

fn wanted(query: &[(String, String)]) -> Wanted {
    let on = |name: &str| query.iter().any(|(key, value)| key == name && value == "true");
    Wanted { stdin: on("stdin"), stdout: on("stdout"), stderr: on("stderr"), tty: on("tty"), size: None }
}

async fn serve(request: Request<Incoming>, upgrades: &Upgrades) -> Response<Full<Bytes>> {
    if let Some(upgrade) = request.headers().get("upgrade") {
        upgrades.lock().expect("no panic").insert(upgrade.to_str().unwrap_or_default().to_owned());
    }
    let decode =
        |text: &str| percent_encoding::percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned();
    let query: Vec<(String, String)> = request
        .uri()
        .query()
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (decode(key), decode(value)))
        .collect();
    let target =
        Target { namespace: "default".into(), pod: "web".into(), pod_uid: "u".into(), container: "app".into() };
    let streams: Arc<dyn PodStreams> = Arc::new(Processes);
    let path = request.uri().path().to_owned();
    match path.as_str() {
        "/api" => answer(&json!({"kind": "APIVersions", "versions": ["v1"]})),
        "/apis" => answer(&json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": []})),
        "/api/v1" => {
            answer(&json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "v1", "resources": [
                {"name": "pods", "singularName": "pod", "namespaced": true, "kind": "Pod", "verbs": ["get", "list"]}
            ]}))
        }
        "/api/v1/namespaces/default/pods/web" => answer(&pod()),
        "/api/v1/namespaces/default/pods/web/exec" => {
            let command = query.iter().filter(|(key, _)| key == "command").map(|(_, value)| value.clone()).collect();
            stream::exec(request, streams, target, command, wanted(&query)).await
        }
        "/api/v1/namespaces/default/pods/web/attach" => stream::attach(request, streams, target, wanted(&query)).await,
        "/api/v1/namespaces/default/pods/web/portforward" => stream::port_forward(request, streams, target).await,
        _ => {
            let status = Status::not_found("", "things", &path);
            let mut response = answer(&status.to_json());
            *response.status_mut() = http::StatusCode::NOT_FOUND;
            response
        }
    }
}

type Upgrades = Arc<Mutex<BTreeSet<String>>>;

pub struct Fake {
    pub address: SocketAddr,
    upgrades: Upgrades,
}

impl Fake {
    /// Starts the server; it ends with the runtime.
    pub async fn start() -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let upgrades = Upgrades::default();
        let seen = Arc::clone(&upgrades);
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                let seen = Arc::clone(&seen);
                tokio::spawn(async move {
                    let service = service_fn(|request| {
                        let seen = Arc::clone(&seen);
                        async move { Ok::<_, std::convert::Infallible>(serve(request, &seen).await) }
                    });
                    let _ = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new())
                        .serve_connection_with_upgrades(TokioIo::new(connection), service)
                        .await;
                });
            }
        });
        Fake { address, upgrades }
    }

    /// What clients upgraded to since the last call.
    pub fn upgrades(&self) -> Vec<String> {
        std::mem::take(&mut *self.upgrades.lock().expect("no panic")).into_iter().collect()
    }
}
