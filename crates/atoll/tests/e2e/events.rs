//! CloudEvents to functions and Services, through brokers and triggers.

use crate::cluster::{Cluster, Said};
use crate::{Outcome, Test};
use rustix::process::Signal;

pub const TESTS: &[Test] = &[("events_brokers_and_triggers", brokers)];

const ADDRESS: &str = "127.0.0.1:9010";
/// Writes down what comes, and accepts it.
const SINK: &str = "n=0; while IFS= read -r l; do l=$(echo \"$l\" | tr -d '\\r'); [ -z \"$l\" ] && break; \
     case $l in [Cc]ontent-[Ll]ength:*) n=${l#*: };; esac; echo \"got $l\" >> /tmp/log; done; \
     echo \"body $(dd bs=1 count=$n 2>/dev/null)\" >> /tmp/log; \
     printf 'HTTP/1.1 202 Accepted\\r\\ncontent-length: 0\\r\\nconnection: close\\r\\n\\r\\n'";

fn sink(c: &Cluster, ns: &str, name: &str) {
    let command = format!(
        "cat > /tmp/sink.sh <<'END'\n{SINK}\nEND\ntouch /tmp/log; nc -ll -p 8080 -e sh /tmp/sink.sh & exec tail -f /tmp/log"
    );
    let pod = serde_json::json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": ns, "labels": {"app": name}},
        "spec": {"containers": [{"name": "sink", "image": "127.0.0.1:5000/test/busybox:1", "command": ["sh", "-c", command],
                                 "ports": [{"containerPort": 8080}]}]},
    });
    c.apply(&pod.to_string());
}

fn service(c: &Cluster, ns: &str, name: &str) {
    c.apply(&format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {ns}}}\n\
         spec: {{selector: {{app: {name}}}, ports: [{{port: 80, targetPort: 8080}}]}}\n"
    ));
}

fn trigger(c: &Cluster, ns: &str, name: &str, wanted: &str, (api, to): (&str, &str), delivery: &str) {
    c.apply(&format!(
        "apiVersion: eventing.knative.dev/v1\nkind: Trigger\nmetadata: {{name: {name}, namespace: {ns}}}\nspec:\n  broker: shop\n  \
         filter: {{attributes: {{type: {wanted}}}}}\n  subscriber: {{ref: {{apiVersion: {api}, kind: Service, name: {to}}}}}\n{delivery}"
    ));
}

/// Status and text of what is posted to a broker.
fn post(c: &Cluster, path: &str, args: &[&str]) -> String {
    let url = format!("http://{ADDRESS}/{path}");
    Said::of(c.inside("curl").args(["-s", "-w", " %{http_code}", &url]).args(args).output().unwrap()).good()
}

const BINARY: [&str; 10] = [
    "-H",
    "ce-specversion: 1.0",
    "-H",
    "ce-id: b1",
    "-H",
    "ce-source: /shop",
    "-H",
    "ce-type: order.placed",
    "-d",
    "three teapots",
];

fn brokers(c: &Cluster) -> Outcome {
    c.stop(Signal::TERM);
    c.up_with(&["--events-addr", ADDRESS], &[]);
    let ns = c.namespace("t-cloudevents");
    c.apply(&format!("apiVersion: eventing.knative.dev/v1\nkind: Broker\nmetadata: {{name: shop, namespace: {ns}}}\n"));
    service(c, &ns, "sink");
    sink(c, &ns, "sink");
    c.wait_ready(&ns, "pod/sink");
    trigger(c, &ns, "orders", "order.placed", ("v1", "sink"), "");
    c.wait_ready(&ns, "broker/shop");
    c.wait_ready(&ns, "trigger/orders");
    let url = c.kubectl(&["get", "broker", "shop", "-n", &ns, "-o", "jsonpath={.status.address.url}"]).good();
    assert_eq!(url, format!("http://{ADDRESS}/t-cloudevents/shop"));
    let log = || c.kubectl(&["logs", "-n", &ns, "sink"]).good();

    assert_eq!(post(c, "t-cloudevents/shop", &BINARY), " 202");
    c.until("it is delivered", || log().contains("body three teapots"));
    let told = log();
    for header in ["got ce-id: b1", "got ce-type: order.placed", "got ce-source: /shop", "got ce-specversion: 1.0"] {
        assert!(told.contains(header), "{header}:\n{told}");
    }
    let structured = r#"{"specversion":"1.0","id":"s1","source":"/shop","type":"order.placed","data":{"sku":"pan"}}"#;
    let json = ["-H", "content-type: application/cloudevents+json", "-d", structured];
    assert_eq!(post(c, "t-cloudevents/shop", &json), " 202");
    c.until("it is delivered", || log().contains("body {\"sku\":\"pan\"}"));
    let other = structured.replace("order.placed", "order.lost").replace("pan", "lost");
    assert_eq!(post(c, "t-cloudevents/shop", &["-H", json[1], "-d", &other]), " 202");
    python(c);
    bad(c, &ns);
    conversation(c, &ns, &log);
    failures(c, &ns, &log);
    survival(c, &ns);
    pushes(c, &ns, &log);
    tokens(c);
    assert!(!log().contains("lost"), "only what the trigger wants");
    c.kubectl(&["delete", "broker,trigger,pod,ksvc", "--all", "-n", &ns, "--wait=false"]).good();
    c.stop(Signal::TERM);
    c.up();
    Outcome::Passed
}

/// A public client, where there is one.
fn python(c: &Cluster) {
    let script = "import sys, urllib.request\nfrom cloudevents.http import CloudEvent\n\
        from cloudevents.conversion import to_binary, to_structured\n\
        for make in (to_binary, to_structured):\n    \
        headers, body = make(CloudEvent({'type': 'order.python', 'source': '/py', 'subject': 'size'}, {'a': 1}))\n    \
        request = urllib.request.Request(sys.argv[1], data=body, headers=headers)\n    \
        assert urllib.request.urlopen(request).status == 202\n";
    if !c.host("python3", &["-c", "import cloudevents"]).ok {
        println!("SKIPPED in part: no Python package cloudevents");
        return;
    }
    let url = format!("http://{ADDRESS}/t-cloudevents/shop");
    Said::of(c.inside("python3").args(["-c", script, &url]).output().unwrap()).good();
}

fn bad(c: &Cluster, ns: &str) {
    let refused = |path: &str, args: &[&str], wanted: &[&str]| {
        let said = post(c, path, args);
        assert!(wanted.iter().all(|text| said.contains(text)), "{args:?}: {said}");
    };
    let without: Vec<&str> = BINARY.iter().copied().filter(|text| !text.starts_with("ce-id")).collect();
    let without = [&without[..2], &without[3..]].concat();
    refused("t-cloudevents/shop", &without, &["attribute id: it is missing", " 400"]);
    refused("t-cloudevents/shop", &["-d", "x"], &["not a CloudEvent", " 400"]);
    refused("t-cloudevents/shop", &["-H", "content-type: application/cloudevents+avro", "-d", "x"], &[" 415"]);
    refused("t-cloudevents/nobody", &BINARY, &["no such broker", " 404"]);
    refused("t-cloudevents/shop", &[], &[" 405"]);
    let large = c.scratch("large.event");
    std::fs::write(&large, vec![b'x'; 300_000]).unwrap();
    let from = format!("@{}", large.display());
    refused("t-cloudevents/shop", &[&BINARY[..8], &["--data-binary", &from]].concat(), &["262144", " 413"]);
    let wrong = format!(
        "apiVersion: eventing.knative.dev/v1\nkind: Trigger\nmetadata: {{name: wrong, namespace: {ns}}}\n\
         spec: {{broker: shop, filter: {{attributes: {{Type: x}}}}, subscriber: {{uri: 'http://example.com'}}}}\n"
    );
    let file = c.scratch("wrong.yaml");
    std::fs::write(&file, wrong).unwrap();
    let told = c.kubectl(&["apply", "-f", file.to_str().unwrap()]).bad();
    assert!(told.contains("spec.filter.attributes[Type]") && told.contains("spec.subscriber.uri"), "{told}");
}

/// A subscriber whose answer is an event itself; triggers that choose by filters and lead to a URL.
fn conversation(c: &Cluster, ns: &str, log: &dyn Fn() -> String) {
    let script = "while IFS= read -r l; do [ ${#l} -le 1 ] && break; done; printf 'HTTP/1.1 200 OK\\r\\n\
        ce-specversion: 1.0\\r\\nce-id: a1\\r\\nce-source: /clerk\\r\\nce-type: answer.given\\r\\n\
        content-length: 8\\r\\nconnection: close\\r\\n\\r\\ngladly!\\n'";
    let command = format!("cat > /tmp/clerk.sh <<'END'\n{script}\nEND\nexec nc -ll -p 8080 -e sh /tmp/clerk.sh");
    let pod = serde_json::json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "clerk", "namespace": ns, "labels": {"app": "clerk"}},
        "spec": {"containers": [{"name": "clerk", "image": "127.0.0.1:5000/test/busybox:1", "command": ["sh", "-c", command],
                                 "ports": [{"containerPort": 8080}]}]},
    });
    c.apply(&pod.to_string());
    service(c, ns, "clerk");
    c.wait_ready(ns, "pod/clerk");
    let uri = |name: &str| format!("http://{name}.{ns}.svc.cluster.local/in");
    for (name, to, filters) in [
        ("questions", "clerk", "[{prefix: {type: question.}}, {not: {exact: {source: /elsewhere}}}]"),
        ("answers", "sink", "[{any: [{exact: {type: nothing}}, {suffix: {type: .given}}]}]"),
    ] {
        c.apply(&format!(
            "apiVersion: eventing.knative.dev/v1\nkind: Trigger\nmetadata: {{name: {name}, namespace: {ns}}}\nspec:\n  \
             broker: shop\n  filters: {filters}\n  subscriber: {{uri: '{}'}}\n",
            uri(to)
        ));
        c.wait_ready(ns, &format!("trigger/{name}"));
    }
    let mut event = BINARY;
    (event[3], event[5], event[7]) = ("ce-id: q1", "ce-source: /elsewhere", "ce-type: question.asked");
    assert_eq!(post(c, "t-cloudevents/shop", &event), " 202");
    c.until("nobody wants it", || c.kubectl(&["get", "messages", "-n", ns, "-o", "name"]).good().trim().is_empty());
    assert!(!log().contains("ce-source: /clerk"), "{}", log());
    event[5] = "ce-source: /shop";
    assert_eq!(post(c, "t-cloudevents/shop", &event), " 202");
    c.until("the answer is delivered", || log().contains("body gladly!"));
    assert!(log().contains("got ce-source: /clerk"), "{}", log());
}

/// Who does not know the token sends nothing.
fn tokens(c: &Cluster) {
    let file = c.scratch("events.token");
    std::fs::write(&file, "0123456789abcdef\n").unwrap();
    c.stop(Signal::TERM);
    c.up_with(&["--events-addr", ADDRESS, "--events-token", file.to_str().unwrap()], &[]);
    for (token, status) in [("0123456789abcdef", " 202"), ("0123456789abcdeg", " 401"), ("", " 401")] {
        let header = format!("authorization: Bearer {token}");
        let said = post(c, "t-cloudevents/shop", &[&BINARY[..], &["-H", &header]].concat());
        assert!(said.ends_with(status), "{token}: {said}");
    }
    let said = post(c, "t-cloudevents/shop", &BINARY);
    assert!(said.contains("--events-token") && said.ends_with(" 401"), "{said}");
}

/// A function that always fails: its events come to the dead letter sink.
fn failures(c: &Cluster, ns: &str, log: &dyn Fn() -> String) {
    let file = c.scratch("fails.wasm");
    let text = include_str!("../../../function/tests/handler.wat").replace("@HANDLER@", "unreachable");
    std::fs::write(&file, wat::parse_str(text).unwrap()).unwrap();
    let data = c.data().to_string_lossy().into_owned();
    c.atoll(&["function", "deploy", "fails", file.to_str().unwrap(), "--data-dir", &data, "-n", ns]).good();
    let delivery = "  delivery:\n    retry: 1\n    backoffDelay: PT1S\n    \
        deadLetterSink: {ref: {apiVersion: v1, kind: Service, name: sink}}\n";
    trigger(c, ns, "fails", "order.failing", ("serving.knative.dev/v1", "fails"), delivery);
    c.wait_ready(ns, "trigger/fails");
    let mut event = BINARY;
    (event[3], event[7], event[9]) = ("ce-id: f1", "ce-type: order.failing", "never");
    assert_eq!(post(c, "t-cloudevents/shop", &event), " 202");
    c.until("it came to the dead letter sink", || log().contains("body never"));
    let told = log();
    assert!(
        told.contains("got ce-knativeerrorcode: 500") && told.contains("got ce-knativeerrordest: http://fails."),
        "{told}"
    );
}

/// What was accepted is delivered, though nobody could take it and `atoll up` was killed.
fn survival(c: &Cluster, ns: &str) {
    service(c, ns, "late");
    trigger(
        c,
        ns,
        "late",
        "order.late",
        ("v1", "late"),
        "  delivery: {backoffPolicy: linear, backoffDelay: PT1S, retry: 90}\n",
    );
    c.wait_ready(ns, "trigger/late");
    let mut event = BINARY;
    (event[3], event[7], event[9]) = ("ce-id: l1", "ce-type: order.late", "patience");
    assert_eq!(post(c, "t-cloudevents/shop", &event), " 202");
    c.stop(Signal::KILL);
    c.up_with(&["--events-addr", ADDRESS], &[]);
    sink(c, ns, "late");
    c.until("it is delivered", || c.kubectl(&["logs", "-n", ns, "late"]).out.contains("body patience"));
    c.until("no message is left", || c.kubectl(&["get", "messages", "-n", ns, "-o", "name"]).good().trim().is_empty());
}

fn pushes(c: &Cluster, ns: &str, log: &dyn Fn() -> String) {
    if !c.host("skopeo", &["--version"]).ok {
        println!("SKIPPED in part: no skopeo");
        return;
    }
    trigger(c, ns, "pushes", "dev.atoll.registry.push", ("v1", "sink"), "");
    c.wait_ready(ns, "trigger/pushes");
    c.kubectl(&["annotate", "broker", "shop", "-n", ns, "eventing.atoll.dev/registry-push=events/"]).good();
    let (from, to) = ("docker://127.0.0.1:5000/test/busybox:1", "docker://127.0.0.1:5000/events/app:7");
    let copy = ["--insecure-policy", "copy", "--src-tls-verify=false", "--dest-tls-verify=false", from, to];
    // The annotation is followed, not awaited.
    c.until("the push is an event", || {
        Said::of(c.inside("skopeo").args(copy).output().unwrap()).good();
        log().contains("got ce-subject: 7")
    });
    assert!(log().contains("got ce-source: /registry/events/app"), "{}", log());
}
