//! Into pods through the API: logs and the proxy, with a node that only pretends.

mod common;

use api::status::StatusResult;
use api::streams::{Duplex, LogOptions, PodStreams, Session, Target, Wanted};
use async_trait::async_trait;
use bytes::Bytes;
use common::{As, Running};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[derive(Default)]
struct Pretend {
    asked: Mutex<Vec<(Target, LogOptions)>>,
}

#[async_trait]
impl PodStreams for Pretend {
    /// Says what it was asked to run, then what it is told, and ends with 3.
    async fn exec(&self, target: &Target, command: Vec<String>, wanted: Wanted) -> StatusResult<Session> {
        let (stdout, mut output) = tokio::io::duplex(1024);
        let (mut input, stdin) = tokio::io::duplex(1024);
        let (exit, ended) = tokio::sync::oneshot::channel();
        let line = format!("{}: {}\n", target.container, command.join(" "));
        let reads = wanted.stdin;
        tokio::spawn(async move {
            let _ = output.write_all(line.as_bytes()).await;
            if reads {
                let _ = tokio::io::copy(&mut input, &mut output).await;
            }
            drop(output);
            let _ = exit.send(api::streams::Exit::Code(3));
        });
        Ok(Session {
            stdin: wanted.stdin.then(|| Box::pin(stdin) as _),
            stdout: Some(Box::pin(stdout)),
            stderr: None,
            resize: None,
            exit: ended,
        })
    }
    async fn attach(&self, _: &Target, _: Wanted) -> StatusResult<Session> {
        Err(api::Status::bad_request("nothing to attach to"))
    }
    /// A workload that answers with the request it got.
    async fn port_forward(&self, target: &Target, port: u16) -> StatusResult<Box<dyn Duplex>> {
        let (ours, mut theirs) = tokio::io::duplex(64 << 10);
        let pod = target.pod.clone();
        tokio::spawn(async move {
            let mut request = Vec::new();
            while !request.windows(4).any(|w| w == b"\r\n\r\n") {
                let mut buffer = [0; 4096];
                match theirs.read(&mut buffer).await {
                    Ok(n) if n > 0 => request.extend_from_slice(&buffer[..n]),
                    _ => return,
                }
            }
            let body = format!("{pod} {port}\n{}", String::from_utf8_lossy(&request));
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nx-from: pod\r\n\r\n", body.len());
            let _ = theirs.write_all(format!("{head}{body}").as_bytes()).await;
        });
        Ok(Box::new(ours))
    }
    async fn logs(
        &self,
        target: &Target,
        options: LogOptions,
    ) -> StatusResult<BoxStream<'static, std::io::Result<Bytes>>> {
        self.asked.lock().unwrap().push((target.clone(), options.clone()));
        let lines = futures_util::stream::iter([Ok(Bytes::from("one\n")), Ok(Bytes::from("two\n"))]);
        if options.follow {
            return Ok(lines.chain(futures_util::stream::pending()).boxed());
        }
        Ok(lines.boxed())
    }
}

const PODS: &str = "/api/v1/namespaces/default/pods";

async fn start() -> (Running, Arc<Pretend>) {
    let running = Running::start().await;
    let pretend = Arc::new(Pretend::default());
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"nodeName": "n", "containers": [
        {"name": "a", "image": "i", "ports": [{"containerPort": 8080, "name": "http"}]}, {"name": "b", "image": "i"}]}});
    assert_eq!(running.post(PODS, &pod).await.code, 201);
    assert!(running.get(&format!("{PODS}/p/log?container=a")).await.refusal(503).contains("no node"));
    running.server.set_streams(pretend.clone());
    (running, pretend)
}

async fn set_status(running: &Running, status: Value) {
    let patch = json!({"status": status}).to_string();
    let kind = [("content-type", "application/merge-patch+json")];
    let answer = running.send(&As::Admin, "PATCH", &format!("{PODS}/p/status"), &kind, patch).await;
    assert_eq!(answer.code, 200, "{}", answer.json());
}

#[tokio::test]
async fn logs() {
    let (mut running, pretend) = start().await;
    let unclear = running.get(&format!("{PODS}/p/log")).await.refusal(400);
    assert_eq!(unclear, "a container name must be specified for pod p, choose one of: [a b]");
    assert!(running.get(&format!("{PODS}/p/log?container=x")).await.refusal(400).contains("container x is not valid"));
    running.get(&format!("{PODS}/none/log")).await.refusal(404);
    let answer = running.get(&format!("{PODS}/p/log?container=a&tailLines=5&timestamps=true")).await;
    assert_eq!((answer.code, &answer.body[..]), (200, &b"one\ntwo\n"[..]));
    assert!(answer.header("content-type").starts_with("text/plain"));
    {
        let asked = pretend.asked.lock().unwrap();
        let (target, options) = asked.last().unwrap();
        assert_eq!((target.container.as_str(), options.tail_lines, options.timestamps), ("a", Some(5), true));
    }
    set_status(
        &running,
        json!({"containerStatuses": [{"name": "a", "image": "i", "imageID": "", "ready": false,
        "restartCount": 0, "state": {"waiting": {"reason": "ImagePullBackOff"}}}]}),
    )
    .await;
    let waiting = running.get(&format!("{PODS}/p/log?container=a")).await.refusal(400);
    assert!(waiting.contains("waiting to start: trying and failing to pull image"), "{waiting}");
    let before = running.get(&format!("{PODS}/p/log?container=b&previous=true")).await.refusal(400);
    assert_eq!(before, "previous terminated container \"b\" in pod \"p\" not found");
    running.send(&As::Admin, "POST", &format!("{PODS}/p/log?container=a"), &[], "").await.refusal(405);

    // A log that is followed ends with the server.
    let mut follow = running.open(&As::Admin, "GET", &format!("{PODS}/p/log?container=b&follow=true"), &[], "").await;
    use http_body_util::BodyExt;
    assert_eq!(&follow.body_mut().frame().await.unwrap().unwrap().into_data().unwrap()[..], b"one\n");
    running.stop().await;
}

#[tokio::test]
async fn proxied_requests() {
    let (running, _) = start().await;
    let answer = running.get(&format!("{PODS}/p:http/proxy/a%20b/c?x=1")).await;
    assert_eq!((answer.code, answer.header("x-from")), (200, "pod"));
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(text.starts_with("p 8080\nGET /a%20b/c?x=1 HTTP/1.1"), "{text}");
    assert!(text.contains("host: p:8080") && !text.to_lowercase().contains("authorization"), "{text}");
    assert_eq!(running.get(&format!("{PODS}/p/proxy/")).await.code, 200);
    running.get(&format!("{PODS}/p:none/proxy/")).await.refusal(400);
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"},
                         "spec": {"ports": [{"port": 80, "name": "http", "targetPort": "http"}]}});
    running.post("/api/v1/namespaces/default/services", &service).await;
    let path = "/api/v1/namespaces/default/services/s:80/proxy/x";
    assert!(running.get(path).await.refusal(503).contains("no endpoints available for service \"s\""));
    let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "s-1", "labels": {"kubernetes.io/service-name": "s"}},
        "endpoints": [{"addresses": ["10.42.0.9"], "conditions": {"ready": true}, "targetRef": {"kind": "Pod", "name": "p"}}],
        "ports": [{"name": "http", "port": 8081, "protocol": "TCP"}]});
    let made = running.post("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", &slice).await;
    assert_eq!(made.code, 201, "{}", made.json());
    let text = String::from_utf8_lossy(&running.get(path).await.body).into_owned();
    assert!(text.starts_with("p 8081\nGET /x HTTP/1.1"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exec_and_logs_with_kubectl() {
    let (running, _) = start().await;
    let Some(k) = running.kubectl() else { return };
    let ended = k.run(&["exec", "p", "-c", "a", "--", "echo", "hi there"]).await;
    assert_eq!(ended.out, "a: echo hi there\n");
    assert!(!ended.ok && ended.err.contains("exit code 3"), "{}", ended.err);
    let mut piped = k.command();
    piped.args(["exec", "-i", "p", "-c", "b", "--", "cat"]).stdin(std::process::Stdio::piped());
    let mut child = piped.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"from here\n").await.unwrap();
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "b: cat\nfrom here\n");
    assert_eq!(k.ok(&["logs", "p", "-c", "a", "--tail=2"]).await, "one\ntwo\n");
    assert!(k.fails(&["exec", "none", "--", "true"]).await.contains("pods \"none\" not found"));
    assert!(k.fails(&["exec", "p", "-c", "x", "--", "true"]).await.contains("container x"));
    assert!(k.ok(&["get", "--raw", "/api/v1/namespaces/default/pods/p/proxy/"]).await.starts_with("p 8080"));
}
