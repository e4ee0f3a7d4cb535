//! The whole way: kubectl, TLS, authentication, the API server, a pod (of processes of this machine).

use super::fake::Processes;
use super::{Kubectl, TRANSPORTS, echo_server, echoed, forwarding, no_kubectl, noise, text};
use api::kind::Resource;
use serde_json::json;
use server::{Config, Server};
use std::sync::Arc;

struct Running {
    server: Arc<Server>,
    _directory: tempfile::TempDir,
    config: String,
}

async fn start() -> Running {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let advertise = listener.local_addr().expect("an address");
    let store = store::redb::Engine::open(&directory.path().join("store")).expect("a store");
    let config = Config {
        listener,
        data_dir: directory.path().to_owned(),
        advertise,
        store: Arc::new(store),
        cluster_domain: "cluster.local".into(),
        service_cidr: "10.43.0.0/16".into(),
    };
    let server = Server::new(config).await.expect("starts");
    server.set_streams(Arc::new(Processes));
    let kubeconfig = directory.path().join("kubeconfig");
    server.write_kubeconfig(&kubeconfig).expect("written");
    let serving = Arc::clone(&server);
    tokio::spawn(async move { serving.serve(std::future::pending()).await });
    let config = std::fs::read_to_string(&kubeconfig).expect("readable");
    Running { server, _directory: directory, config }
}

async fn make_pod(running: &Running) {
    let client = running.server.client();
    let pods = Resource::new("", "v1", "pods");
    let spec = json!({"nodeName": "here", "containers": [{"name": "app", "image": "x", "stdin": true}]});
    let pod =
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "default"}, "spec": spec});
    let made = client.create(&pods, "default", pod).await.expect("created");
    let mut made = (*made).clone();
    made["status"] = json!({
        "phase": "Running",
        "containerStatuses": [{"name": "app", "ready": true, "restartCount": 0, "image": "x", "imageID": "x",
                               "state": {"running": {"startedAt": "2024-01-01T00:00:00Z"}}}]
    });
    client.update_status(&pods, "default", made).await.expect("running");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_through_the_real_server() {
    if no_kubectl() {
        return;
    }
    let running = start().await;
    make_pod(&running).await;
    let target = echo_server().await;
    let content = noise(5 << 20);
    for transport in TRANSPORTS {
        let kubectl = Kubectl::with_config(&running.config, transport);
        let output = kubectl.run(&["exec", "-i", "web", "--", "cat"], &content).await;
        assert!(output.status.success() && output.stdout == content, "{transport}: {}", text(&output.stderr));
        let output = kubectl.run(&["exec", "web", "--", "sh", "-c", "exit 7"], b"").await;
        assert_eq!(output.status.code(), Some(7), "{output:?}");
        let output = kubectl.run(&["exec", "web", "-c", "other", "--", "true"], b"").await;
        assert!(
            text(&output.stderr).contains("container other is not valid for pod web")
                || text(&output.stderr).contains("container not found"),
            "{output:?}"
        );
        let output = kubectl.run(&["attach", "-i", "web"], b"hello\n").await;
        assert_eq!(text(&output.stdout), "attached\ngot hello\n", "{output:?}");
        let there = tempfile::tempdir().expect("a directory");
        std::fs::write(kubectl.home.path().join("here"), &content).expect("written");
        let remote = format!("web:{}/there", there.path().display());
        let output = kubectl.run(&["cp", "here", &remote], b"").await;
        assert!(output.status.success(), "{output:?}");
        let output = kubectl.run(&["cp", &remote, "back"], b"").await;
        assert!(output.status.success(), "{output:?}");
        assert!(std::fs::read(kubectl.home.path().join("back")).expect("copied") == content);
        let (mut child, port) = forwarding(&kubectl, target).await;
        assert!(echoed(port, &content).await == content);
        let mut connections = tokio::task::JoinSet::new();
        for _ in 0..20 {
            connections.spawn(echoed(port, b"ping"));
        }
        while let Some(got) = connections.join_next().await {
            assert_eq!(got.expect("no panic"), b"ping");
        }
        child.kill().await.expect("killed");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn field_ownership_through_the_real_server() {
    if no_kubectl() {
        return;
    }
    let running = start().await;
    let kubectl = Kubectl::with_config(&running.config, "true");
    let manifest = |replicas: u32| {
        format!(
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: web, labels: {{app: web}}}}\nspec:\n  replicas: {replicas}\n  \
             selector: {{matchLabels: {{app: web}}}}\n  template:\n    metadata: {{labels: {{app: web}}}}\n    spec:\n      \
             containers: [{{name: app, image: x, ports: [{{containerPort: 80}}]}}]\n"
        )
    };
    let version = async || {
        let output =
            kubectl.run(&["get", "deployments.apps", "web", "-o", "jsonpath={.metadata.resourceVersion}"], b"").await;
        text(&output.stdout)
    };
    let apply = async |replicas: u32, more: &[&str]| {
        let args = [&["apply", "-f", "-"], more].concat();
        kubectl.run(&args, manifest(replicas).as_bytes()).await
    };
    // Client-side first, then taken over.
    assert!(apply(1, &[]).await.status.success());
    let output = apply(2, &["--server-side"]).await;
    assert!(output.status.success(), "{output:?}");
    let before = version().await;
    assert!(apply(2, &["--server-side"]).await.status.success());
    assert_eq!(version().await, before, "an apply that changes nothing writes nothing");
    let output = apply(3, &["--server-side", "--field-manager=other"]).await;
    assert!(
        text(&output.stderr).contains("Apply failed with 1 conflict: conflict with \"kubectl\": .spec.replicas"),
        "{output:?}"
    );
    assert!(apply(3, &["--server-side", "--field-manager=other", "--force-conflicts"]).await.status.success());
    for (kind, patch) in [
        ("strategic", r#"{"spec":{"template":{"spec":{"containers":[{"name":"side","image":"s"}]}}}}"#),
        ("merge", r#"{"metadata":{"labels":{"x":"y"}}}"#),
        (
            "json",
            r#"[{"op":"test","path":"/metadata/labels/x","value":"y"},{"op":"replace","path":"/spec/replicas","value":5}]"#,
        ),
    ] {
        let output = kubectl.run(&["patch", "deployments.apps", "web", "--type", kind, "-p", patch], b"").await;
        assert!(output.status.success(), "{kind}: {output:?}");
    }
    let shown = "jsonpath={.spec.replicas} {.spec.template.spec.containers[*].name} {.metadata.labels.x}";
    let output = kubectl.run(&["get", "deployments.apps", "web", "-o", shown], b"").await;
    assert_eq!(text(&output.stdout), "5 side app y");
    let wrong = r#"[{"op":"test","path":"/spec/replicas","value":4}]"#;
    let output = kubectl.run(&["patch", "deployments.apps", "web", "--type", "json", "-p", wrong], b"").await;
    assert!(text(&output.stderr).contains("it is 5, not 4"), "{output:?}");
}
