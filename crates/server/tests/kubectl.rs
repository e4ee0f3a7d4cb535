//! The API as the real `kubectl` sees it.

mod common;

use common::{Kubectl, Running, eventually};
use std::process::Stdio;
use tokio::io::{AsyncBufReadExt, BufReader};

const SHOP: &str = "
apiVersion: v1
kind: ConfigMap
metadata: {name: settings, labels: {app: shop, tier: back}}
data: {colour: red}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: shop, tier: front}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        image: nginx:1
        ports: [{containerPort: 80}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: 80}]
";

async fn start() -> Option<(Running, Kubectl)> {
    let running = Running::start().await;
    let kubectl = running.kubectl()?;
    Some((running, kubectl))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn apply_and_look() {
    let Some((_running, k)) = start().await else { return };
    let out = k.ok_with(&["apply"], SHOP).await;
    assert!(out.contains("configmap/settings created") && out.contains("deployment.apps/web created"), "{out}");
    let out = k.ok_with(&["apply"], SHOP).await;
    assert_eq!(out.matches("unchanged").count(), 3, "{out}");
    assert_eq!(k.with(&["diff"], SHOP).await.out, "");
    let changed = SHOP.replace("replicas: 2", "replicas: 3").replace("nginx:1", "nginx:2");
    let diff = k.with(&["diff"], &changed).await;
    assert!(
        !diff.ok && diff.out.contains("+  replicas: 3") && diff.out.contains("+      - image: nginx:2"),
        "{}",
        diff.out
    );
    let out = k.ok_with(&["apply"], &changed).await;
    assert!(out.contains("deployment.apps/web configured") && out.contains("service/web unchanged"), "{out}");

    let wide = k.ok(&["get", "deploy,svc,cm", "-o", "wide"]).await;
    assert!(wide.contains("IMAGES") && wide.contains("nginx:2") && wide.contains("CLUSTER-IP"), "{wide}");
    assert_eq!(k.ok(&["get", "deploy", "-o", "name"]).await.trim(), "deployment.apps/web");
    assert_eq!(k.ok(&["get", "deploy", "web", "-o", "jsonpath={.spec.replicas}"]).await, "3");
    let yaml = k.ok(&["get", "cm", "settings", "-o", "yaml"]).await;
    assert!(yaml.contains("colour: red"), "{yaml}");
    let json: serde_json::Value = serde_json::from_str(&k.ok(&["get", "all", "-o", "json"]).await).unwrap();
    assert_eq!(json["kind"], "List");
    let columns = k.ok(&["get", "deploy", "-o", "custom-columns=N:.metadata.name,R:.spec.replicas"]).await;
    assert!(columns.contains("web   3"), "{columns}");
    assert_eq!(k.ok(&["get", "cm,deploy", "-l", "tier=front", "-o", "name"]).await.trim(), "deployment.apps/web");
    assert_eq!(
        k.ok(&["get", "cm,deploy", "-l", "tier in (back),app", "-o", "name"]).await.trim(),
        "configmap/settings"
    );
    let selected = k.ok(&["get", "svc", "--field-selector", "metadata.name=web", "-o", "name"]).await;
    assert_eq!(selected.trim(), "service/web");
    assert!(k.ok(&["get", "ns", "--show-labels"]).await.contains("kubernetes.io/metadata.name=default"));
    assert!(k.ok(&["get", "cm", "-A", "--sort-by=.metadata.name"]).await.contains("settings"));
    assert!(k.ok(&["get", "--raw", "/healthz"]).await.contains("ok"));

    let described = k.ok(&["describe", "deploy", "web"]).await;
    assert!(described.contains("Replicas:") && described.contains("nginx:2"), "{described}");
    for kind in ["ns/default", "svc/web", "cm/settings", "sa/default", "runtimeclass/wasm"] {
        k.ok(&["describe", kind]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn create_replace_patch_scale_delete() {
    let Some((_running, k)) = start().await else { return };
    k.ok(&["create", "namespace", "n"]).await;
    k.ok(&["create", "configmap", "c", "--from-literal=a=1", "-n", "n"]).await;
    k.ok(&["create", "secret", "generic", "s", "--from-literal=password=hunter2", "-n", "n"]).await;
    assert_eq!(k.ok(&["get", "secret", "s", "-n", "n", "-o", "jsonpath={.data.password}"]).await, "aHVudGVyMg==");
    k.ok(&["create", "serviceaccount", "robot", "-n", "n"]).await;
    let token = k.ok(&["create", "token", "robot", "-n", "n"]).await;
    assert_eq!(token.trim().split('.').count(), 3);
    k.ok(&["create", "deployment", "d", "--image=nginx", "--replicas=0", "--port=80", "-n", "n"]).await;
    assert_eq!(k.ok(&["get", "deploy", "d", "-n", "n", "-o", "jsonpath={.spec.replicas}"]).await, "0");
    k.ok(&["expose", "deployment", "d", "-n", "n"]).await;
    k.ok(&["run", "p", "--image=busybox", "-n", "n", "--restart=Never", "--", "sleep", "1"]).await;
    assert_eq!(k.ok(&["get", "pod", "p", "-n", "n", "-o", "jsonpath={.status.phase}"]).await, "Pending");
    assert!(k.fails(&["create", "configmap", "c", "-n", "n"]).await.contains("already exists"));

    let replaced = "{apiVersion: v1, kind: ConfigMap, metadata: {name: c, namespace: 'n'}, data: {b: '2'}}";
    k.ok_with(&["replace"], replaced).await;
    assert_eq!(k.ok(&["get", "cm", "c", "-n", "n", "-o", "jsonpath={.data}"]).await, "{\"b\":\"2\"}");
    k.ok_with(&["replace", "--force"], replaced).await;

    let container = r#"{"spec":{"template":{"spec":{"containers":[{"name":"nginx","image":"nginx:9"}]}}}}"#;
    k.ok(&["patch", "deploy", "d", "-n", "n", "-p", container]).await;
    let spec = k.ok(&["get", "deploy", "d", "-n", "n", "-o", "jsonpath={.spec.template.spec.containers[0]}"]).await;
    assert!(spec.contains("nginx:9") && spec.contains("containerPort"), "merged by name: {spec}");
    k.ok(&["patch", "cm", "c", "-n", "n", "--type=merge", "-p", r#"{"data":{"b":null,"d":"4"}}"#]).await;
    k.ok(&["patch", "cm", "c", "-n", "n", "--type=json", "-p", r#"[{"op":"add","path":"/data/e","value":"5"}]"#]).await;
    assert_eq!(k.ok(&["get", "cm", "c", "-n", "n", "-o", "jsonpath={.data}"]).await, r#"{"d":"4","e":"5"}"#);
    let test = r#"[{"op":"test","path":"/data/e","value":"6"}]"#;
    k.fails(&["patch", "cm", "c", "-n", "n", "--type=json", "-p", test]).await;

    k.ok(&["scale", "deploy", "d", "-n", "n", "--replicas=4"]).await;
    assert_eq!(
        k.ok(&["get", "deploy", "d", "-n", "n", "-o", "jsonpath={.spec.replicas} {.metadata.generation}"]).await,
        "4 3"
    );
    assert!(
        k.fails(&["scale", "deploy", "d", "-n", "n", "--replicas=1", "--current-replicas=2"])
            .await
            .contains("Expected")
    );
    k.ok(&["set", "image", "deploy/d", "nginx=nginx:10", "-n", "n"]).await;
    k.ok(&["set", "env", "deploy/d", "A=B", "-n", "n"]).await;
    k.ok(&["label", "deploy", "d", "colour=red", "-n", "n"]).await;
    k.ok(&["annotate", "deploy", "d", "note=hello", "-n", "n"]).await;
    assert!(k.fails(&["label", "deploy", "d", "colour=blue", "-n", "n"]).await.contains("--overwrite"));
    k.ok(&["label", "deploy", "d", "colour-", "-n", "n"]).await;

    for cascade in ["background", "foreground", "orphan"] {
        k.ok(&["create", "configmap", cascade, "-n", "n"]).await;
        k.ok(&["delete", "cm", cascade, "-n", "n", "--wait=false", &format!("--cascade={cascade}")]).await;
    }
    let marks =
        k.ok(&["get", "cm", "foreground", "orphan", "-n", "n", "-o", "jsonpath={.items[*].metadata.finalizers}"]).await;
    assert_eq!(marks, r#"["foregroundDeletion"] ["orphan"]"#);
    k.ok(&["delete", "deploy", "--all", "-n", "n"]).await;
    assert!(k.run(&["get", "deploy", "-n", "n"]).await.err.contains("No resources found in n namespace"));
    k.ok(&["delete", "pod", "p", "-n", "n", "--now"]).await;
    assert!(k.fails(&["delete", "cm", "none", "-n", "n"]).await.contains("\"none\" not found"));
    k.ok(&["delete", "cm", "none", "-n", "n", "--ignore-not-found"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_side_apply_and_ownership() {
    let Some((_running, k)) = start().await else { return };
    let map =
        |value: &str| format!("{{apiVersion: v1, kind: ConfigMap, metadata: {{name: c}}, data: {{a: '{value}'}}}}");
    k.ok_with(&["apply", "--server-side", "--field-manager=one"], &map("1")).await;
    let conflict = k.with(&["apply", "--server-side", "--field-manager=two"], &map("2")).await;
    assert!(!conflict.ok && conflict.err.contains("conflict") && conflict.err.contains(".data.a"), "{}", conflict.err);
    k.ok_with(&["apply", "--server-side", "--field-manager=two", "--force-conflicts"], &map("2")).await;
    let managers =
        k.ok(&["get", "cm", "c", "--show-managed-fields", "-o", "jsonpath={.metadata.managedFields[*].manager}"]).await;
    assert_eq!(managers, "two");
    // From client-side to server-side.
    k.ok_with(&["apply"], SHOP).await;
    k.ok_with(&["apply", "--server-side"], SHOP).await;
    k.ok_with(&["apply", "--server-side"], &SHOP.replace("replicas: 2", "replicas: 5")).await;
    assert_eq!(k.ok(&["get", "deploy", "web", "-o", "jsonpath={.spec.replicas}"]).await, "5");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_is_told() {
    let Some((_running, k)) = start().await else { return };
    let unknown = SHOP.replace("replicas: 2", "replica: 2");
    let output = k.with(&["apply"], &unknown).await;
    assert!(
        !output.ok && output.err.contains("strict decoding error: unknown field \"spec.replica\""),
        "{}",
        output.err
    );
    let output = k.with(&["apply", "--validate=warn"], &unknown).await;
    assert!(output.ok && output.err.contains("Warning: unknown field \"spec.replica\""), "{}", output.err);
    let output = k.with(&["create"], &SHOP.replace("replicas: 2", "replicas: two")).await;
    assert!(!output.ok && output.err.contains("spec.replicas"), "{}", output.err);
    let output = k.with(&["apply", "--server-side"], &unknown).await;
    assert!(!output.ok && output.err.contains(".spec.replica: field not declared in schema"), "{}", output.err);
    let wrong = SHOP.replace("matchLabels: {app: web}", "matchLabels: {app: other}");
    let output = k.with(&["create"], &wrong).await;
    assert!(!output.ok && output.err.contains("is invalid: spec.template.metadata.labels"), "{}", output.err);
    k.ok_with(&["apply", "--dry-run=server"], "{apiVersion: v1, kind: ConfigMap, metadata: {name: dry}}").await;
    assert!(k.fails(&["get", "cm", "dry"]).await.contains("NotFound"));
    k.ok_with(&["apply", "--dry-run=client"], "{apiVersion: v1, kind: ConfigMap, metadata: {name: dry}}").await;
    assert!(k.fails(&["get", "nothing"]).await.contains("doesn't have a resource type"));
    assert!(k.fails(&["delete", "ns", "default"]).await.contains("may not be deleted"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watch_and_wait() {
    let Some((_running, k)) = start().await else { return };
    let mut watch = k.command();
    watch.args(["get", "cm", "-w", "--output-watch-events", "--no-headers"]);
    let mut child = watch.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = async || {
        let line = tokio::time::timeout(std::time::Duration::from_secs(60), lines.next_line()).await;
        let line = line.expect("a line in time").unwrap().unwrap();
        line.split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>().join(" ")
    };
    k.ok(&["create", "cm", "a"]).await;
    assert_eq!(next().await, "ADDED a");
    k.ok(&["label", "cm", "a", "x=y"]).await;
    assert_eq!(next().await, "MODIFIED a");
    let waiting = k.clone();
    let wait = tokio::spawn(async move { waiting.ok(&["wait", "cm/a", "--for=delete", "--timeout=60s"]).await });
    let value = k.clone();
    let labelled =
        tokio::spawn(async move { value.ok(&["wait", "cm/a", "--for=jsonpath={.data.k}=v", "--timeout=60s"]).await });
    k.ok(&["patch", "cm", "a", "-p", r#"{"data":{"k":"v"}}"#]).await;
    assert_eq!(next().await, "MODIFIED a");
    labelled.await.unwrap();
    k.ok(&["delete", "cm", "a"]).await;
    assert_eq!(next().await, "DELETED a");
    wait.await.unwrap();
    child.kill().await.unwrap();
    assert!(k.fails(&["wait", "cm/a", "--for=condition=x", "--timeout=1s"]).await.contains("not found"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_served() {
    let Some((_running, k)) = start().await else { return };
    let resources = k.ok(&["api-resources", "-o", "wide"]).await;
    for line in ["deployments", "virtualmachines", "httproutes", "configmaps", "customresourcedefinitions"] {
        assert!(resources.contains(line), "{line}\n{resources}");
    }
    let versions = k.ok(&["api-versions"]).await;
    for version in
        ["v1\n", "apps/v1\n", "kubevirt.io/v1\n", "serving.knative.dev/v1\n", "gateway.networking.k8s.io/v1\n"]
    {
        assert!(versions.contains(version), "{versions}");
    }
    let explained = k.ok(&["explain", "deployment.spec.template.spec.containers.image"]).await;
    assert!(explained.contains("FIELD: image <string>"), "{explained}");
    let explained = k.ok(&["explain", "vm.spec", "--recursive"]).await;
    assert!(explained.contains("template"), "{explained}");
    assert!(k.ok(&["explain", "pod", "--output=plaintext-openapiv2"]).await.contains("KIND:"));
    assert!(k.ok(&["version"]).await.contains("v1.32"));
    assert!(k.ok(&["cluster-info"]).await.contains("is running at"));
    assert!(k.ok(&["auth", "whoami"]).await.contains("atoll-admin"));
    assert_eq!(k.ok(&["auth", "can-i", "create", "pods"]).await.trim(), "yes");
    assert!(k.ok(&["auth", "can-i", "--list"]).await.contains("*.*"));
    assert_eq!(k.run(&["auth", "can-i", "create", "pods", "--as=jane"]).await.out.trim(), "no");
    assert!(k.fails(&["get", "pods", "--as=jane"]).await.contains("User \"jane\" cannot list resource \"pods\""));
    let account = k.ok(&["auth", "whoami", "--as=system:serviceaccount:default:default"]).await;
    assert!(account.contains("system:serviceaccounts:default"), "{account}");
    assert!(k.ok(&["get", "runtimeclass"]).await.contains("microvm"));
    assert!(k.ok(&["get", "svc", "kubernetes"]).await.contains("10.43.0.1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_and_edits() {
    let Some((running, k)) = start().await else { return };
    let event = "
apiVersion: v1
kind: Event
metadata: {name: e1, namespace: default}
involvedObject: {apiVersion: v1, kind: ConfigMap, name: a, namespace: default}
reason: Happened
message: it happened
type: Normal
count: 1
firstTimestamp: '2024-01-01T00:00:00Z'
lastTimestamp: '2024-01-01T00:00:00Z'
source: {component: test}
";
    k.ok(&["create", "cm", "a"]).await;
    k.ok_with(&["create"], event).await;
    let events = k.ok(&["events", "--for", "configmap/a"]).await;
    assert!(events.contains("it happened"), "{events}");
    assert!(k.ok(&["get", "events", "--field-selector", "reason=Happened,type!=Warning"]).await.contains("Happened"));
    // What an editor does: the whole object comes back changed.
    let editor = running.dir.path().join("editor");
    std::fs::write(&editor, "#!/bin/sh\nprintf 'data:\\n  edited: \"yes\"\\n' >> \"$1\"\n").unwrap();
    let mut edit = k.command();
    edit.env("KUBE_EDITOR", format!("sh {}", editor.display()));
    let output = edit.args(["edit", "cm", "a"]).output().await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(k.ok(&["get", "cm", "a", "-o", "jsonpath={.data.edited}"]).await, "yes");
}

const DEFINITION: &str = "
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: boats.example.com}
spec:
  group: example.com
  scope: Namespaced
  names: {plural: boats, singular: boat, kind: Boat, shortNames: [bt], categories: [all]}
  versions:
  - name: v1
    served: true
    storage: true
    subresources:
      status: {}
      scale: {specReplicasPath: .spec.oars, statusReplicasPath: .status.oars}
    additionalPrinterColumns:
    - {name: Oars, type: integer, jsonPath: .spec.oars}
    schema:
      openAPIV3Schema:
        type: object
        description: A boat
        properties:
          spec:
            type: object
            required: [name]
            properties:
              name: {type: string, pattern: '^[a-z]+$', description: What it is called}
              oars: {type: integer, minimum: 0, maximum: 8, default: 2}
          status:
            type: object
            properties: {oars: {type: integer}}
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn custom_resources() {
    let Some((running, k)) = start().await else { return };
    k.ok_with(&["apply"], DEFINITION).await;
    k.ok(&["wait", "crd/boats.example.com", "--for=condition=established", "--timeout=60s"]).await;
    let boat = "{apiVersion: example.com/v1, kind: Boat, metadata: {name: b}, spec: {name: swift}}";
    k.ok_with(&["apply"], boat).await;
    assert!(k.ok(&["get", "bt"]).await.contains("OARS"));
    assert_eq!(k.ok(&["get", "boat", "b", "-o", "jsonpath={.spec.oars}"]).await, "2", "the default");
    k.ok(&["scale", "boat", "b", "--replicas=4"]).await;
    k.ok(&["patch", "boat", "b", "--type=merge", "-p", r#"{"spec":{"oars":5}}"#]).await;
    k.ok(&["patch", "boat", "b", "--type=merge", "--subresource=status", "-p", r#"{"status":{"oars":5}}"#]).await;
    assert_eq!(
        k.ok(&["get", "boat", "b", "-o", "jsonpath={.spec.oars} {.status.oars} {.metadata.generation}"]).await,
        "5 5 3"
    );
    k.ok_with(&["apply", "--server-side"], &boat.replace("swift", "swifter")).await;
    let bad = k.with(&["apply"], &boat.replace("swift", "'No 1'")).await;
    assert!(!bad.ok && bad.err.contains("spec.name"), "{}", bad.err);
    let bad = k.with(&["apply"], &boat.replace("name: swift", "name: swift, oars: 9")).await;
    assert!(!bad.ok && bad.err.contains("spec.oars"), "{}", bad.err);
    let bad = k.with(&["apply"], &boat.replace("name: swift", "name: swift, sails: 9")).await;
    assert!(!bad.ok && bad.err.contains("spec.sails"), "{}", bad.err);
    let bad = k.with(&["apply"], &boat.replace("{name: swift}", "{}")).await;
    assert!(!bad.ok && bad.err.contains("spec.name: Required value"), "{}", bad.err);
    assert!(k.ok(&["explain", "boat.spec.name"]).await.contains("What it is called"));
    assert!(k.ok(&["api-resources", "--api-group=example.com"]).await.contains("boats"));
    k.ok(&["describe", "boat", "b"]).await;

    // A column more, at once.
    let more = DEFINITION.replace(
        "    - {name: Oars, type: integer, jsonPath: .spec.oars}",
        "    - {name: Oars, type: integer, jsonPath: .spec.oars}\n    - {name: Called, type: string, jsonPath: .spec.name}",
    );
    k.ok_with(&["apply"], &more).await;
    assert!(k.ok(&["get", "boats"]).await.contains("CALLED"));
    // Names that are taken are not served.
    let twin = DEFINITION.replace("boats", "ships").replace("singular: boat", "singular: ship");
    k.ok_with(&["apply"], &twin).await;
    let condition = "jsonpath={.status.conditions[?(@.type=='NamesAccepted')].status}";
    assert_eq!(k.ok(&["get", "crd", "ships.example.com", "-o", condition]).await, "False");
    k.ok(&["delete", "crd", "ships.example.com"]).await;
    let broken = k.with(&["create"], &DEFINITION.replace("type: integer, minimum", "type: number-ish, minimum")).await;
    assert!(!broken.ok && broken.err.contains("openAPIV3Schema"), "{}", broken.err);

    k.ok(&["delete", "crd", "boats.example.com"]).await;
    eventually("the resource goes", async || running.get("/apis/example.com/v1/boats").await.code == 404).await;
    k.ok_with(&["apply"], DEFINITION).await;
    assert_eq!(
        running.get("/apis/example.com/v1/boats").await.json()["items"],
        serde_json::json!([]),
        "objects went too"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarts_keep_everything() {
    let dir = tempfile::tempdir().unwrap();
    // The engine of before is gone when its last task is.
    let open = async || {
        let mut engine = None;
        eventually("the store opens", async || {
            engine = store::redb::Engine::open(dir.path()).ok();
            engine.is_some()
        })
        .await;
        std::sync::Arc::new(engine.unwrap())
    };
    let mut running = Running::start_with(open().await).await;
    let Some(k) = running.kubectl() else { return };
    k.ok_with(&["apply"], SHOP).await;
    k.ok_with(&["apply"], DEFINITION).await;
    let version = k.ok(&["get", "svc", "web", "-o", "jsonpath={.metadata.resourceVersion} {.spec.clusterIP}"]).await;
    running.stop().await;
    drop(running);
    let running = Running::start_with(open().await).await;
    let k = running.kubectl().unwrap();
    assert_eq!(
        k.ok(&["get", "svc", "web", "-o", "jsonpath={.metadata.resourceVersion} {.spec.clusterIP}"]).await,
        version
    );
    assert!(k.run(&["get", "boats"]).await.err.contains("No resources found"));
}
