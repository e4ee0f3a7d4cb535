//! Every kubectl verb of the first issue, with the real kubectl.

use crate::cluster::{Cluster, json, lines, sleeper};
use crate::{Outcome, Test};
use std::process::Stdio;

pub const TESTS: &[Test] = &[
    ("kubectl_create_get_delete", create_get_delete),
    ("kubectl_get_outputs_and_selectors", get_outputs_and_selectors),
    ("kubectl_get_watch", get_watch),
    ("kubectl_apply_client_side", apply_client_side),
    ("kubectl_apply_server_side_and_conflicts", apply_server_side),
    ("kubectl_replace_and_conflict", replace_and_conflict),
    ("kubectl_edit", edit),
    ("kubectl_patch_three_ways", patch_three_ways),
    ("kubectl_describe_and_events", describe_and_events),
    ("kubectl_logs", logs),
    ("kubectl_exec", exec),
    ("kubectl_exec_terminal", exec_terminal),
    ("kubectl_attach", attach),
    ("kubectl_cp", cp),
    ("kubectl_port_forward", port_forward),
    ("kubectl_streams_over_spdy", streams_over_spdy),
    ("kubectl_scale_and_rollout", scale_and_rollout),
    ("kubectl_delete_cascades", delete_cascades),
    ("kubectl_wait", wait),
    ("kubectl_diff_and_dry_run", diff_and_dry_run),
    ("kubectl_explain", explain),
    ("kubectl_api_resources", api_resources),
    ("kubectl_custom_resources", custom_resources),
    ("kubectl_finalizers", finalizers),
    ("kubectl_generate_name_and_limit", generate_name_and_limit),
    ("kubectl_delete_namespace", delete_namespace),
    ("kubectl_auth", auth),
];

fn create_get_delete(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-create");
    c.kubectl(&["create", "-n", &ns, "configmap", "one", "--from-literal=a=1"]).good();
    assert!(c.kubectl(&["create", "-n", &ns, "configmap", "one"]).bad().contains("already exists"));
    let got = c.kubectl(&["get", "-n", &ns, "cm", "one"]).good();
    assert_eq!(lines(&got)[0].split_whitespace().collect::<Vec<_>>(), ["NAME", "DATA", "AGE"]);
    c.kubectl(&["create", "-n", &ns, "secret", "generic", "s", "--from-literal=k=v"]).good();
    assert_eq!(c.kubectl(&["get", "-n", &ns, "secret", "s", "-o", "jsonpath={.data.k}"]).good(), "dg==");
    c.kubectl(&["delete", "-n", &ns, "cm", "one"]).good();
    assert!(c.kubectl(&["get", "-n", &ns, "cm", "one"]).bad().contains("NotFound"));
    Outcome::Passed
}

fn get_outputs_and_selectors(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-outputs");
    for (name, tier) in [("a", "front"), ("b", "back"), ("c", "back")] {
        c.kubectl(&["create", "-n", &ns, "configmap", name]).good();
        c.kubectl(&["label", "-n", &ns, "configmap", name, &format!("tier={tier}")]).good();
    }
    let get = |args: &[&str]| c.kubectl(&[&["get", "-n", &ns, "cm"], args].concat()).good();
    assert_eq!(lines(&get(&["-l", "tier=back", "-o", "name"])), ["configmap/b", "configmap/c"]);
    assert_eq!(lines(&get(&["-l", "tier in (front),tier!=back", "-o", "name"])), ["configmap/a"]);
    assert_eq!(lines(&get(&["--field-selector", "metadata.name=b", "-o", "name"])), ["configmap/b"]);
    assert_eq!(json(&get(&["-l", "tier=back", "-o", "json"]))["items"].as_array().unwrap().len(), 2);
    assert!(get(&["a", "-o", "yaml"]).contains("apiVersion: v1\n"));
    assert!(get(&["-o", "wide"]).contains("NAME"));
    assert!(get(&["-L", "tier"]).contains("TIER"));
    assert_eq!(get(&["-l", "tier=back", "-o", "jsonpath={.items[*].metadata.name}"]), "b c");
    assert!(c.kubectl(&["get", "pods", "-A", "-o", "custom-columns=N:.metadata.name"]).ok);
    Outcome::Passed
}

fn get_watch(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-watch");
    let out = c.scratch("watch.out");
    let mut command = c.inside("kubectl");
    command.args(["get", "-n", &ns, "cm", "-w", "-o", "name"]).stdout(std::fs::File::create(&out).unwrap());
    let mut watch = command.spawn().unwrap();
    for name in ["w1", "w2"] {
        c.kubectl(&["create", "-n", &ns, "configmap", name]).good();
    }
    c.until("the watch shows both", || {
        let text = std::fs::read_to_string(&out).unwrap();
        text.contains("configmap/w1") && text.contains("configmap/w2")
    });
    watch.kill().unwrap();
    watch.wait().unwrap();
    Outcome::Passed
}

fn deployment(name: &str, ns: &str, replicas: u32, extra: &str) -> String {
    format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: {name}, namespace: {ns}}}\nspec:\n  replicas: {replicas}\n  \
         selector: {{matchLabels: {{app: {name}}}}}\n  template:\n    metadata: {{labels: {{app: {name}}}}}\n    spec:\n      \
         terminationGracePeriodSeconds: 0\n      containers:\n      - name: main\n        \
         image: 127.0.0.1:5000/test/busybox:1\n        {extra}\n"
    )
}

fn apply_client_side(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-apply");
    let with =
        |data: &str| format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: m, namespace: {ns}}}\ndata: {data}\n");
    assert!(c.kubectl_with(&["apply", "-f", "-"], &with("{a: '1', b: '2'}")).good().contains("created"));
    assert!(c.kubectl_with(&["apply", "-f", "-"], &with("{a: '1', b: '2'}")).good().contains("unchanged"));
    assert!(c.kubectl_with(&["apply", "-f", "-"], &with("{a: '3'}")).good().contains("configured"));
    assert_eq!(c.kubectl(&["get", "-n", &ns, "cm", "m", "-o", "jsonpath={.data}"]).good(), r#"{"a":"3"}"#);
    Outcome::Passed
}

fn apply_server_side(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-ssa");
    let with =
        |data: &str| format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: m, namespace: {ns}}}\ndata: {data}\n");
    let apply = |manager: &str, data: &str, more: &[&str]| {
        let manager = format!("--field-manager={manager}");
        let args = [&["apply", "--server-side", &manager, "-f", "-"], more].concat();
        c.kubectl_with(&args, &with(data))
    };
    apply("one", "{a: '1', b: '2'}", &[]).good();
    apply("two", "{c: '3'}", &[]).good();
    let complaint = apply("two", "{a: '9', c: '3'}", &[]).bad();
    assert!(complaint.contains("conflict with \"one\"") && complaint.contains(".data.a"), "{complaint}");
    apply("two", "{a: '9', c: '3'}", &["--force-conflicts"]).good();
    apply("one", "{b: '2'}", &[]).good();
    let data = c.kubectl(&["get", "-n", &ns, "cm", "m", "-o", "jsonpath={.data}"]).good();
    assert_eq!(json(&data), serde_json::json!({"a": "9", "b": "2", "c": "3"}));
    let fields = c.kubectl(&["get", "-n", &ns, "cm", "m", "-o", "yaml", "--show-managed-fields"]).good();
    assert!(fields.contains("manager: one") && fields.contains("manager: two") && fields.contains("f:data"));
    Outcome::Passed
}

fn replace_and_conflict(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-replace");
    c.kubectl(&["create", "-n", &ns, "configmap", "m", "--from-literal=a=1"]).good();
    let old = c.kubectl(&["get", "-n", &ns, "cm", "m", "-o", "json"]).good();
    let new = old.replace("\"a\": \"1\"", "\"a\": \"2\"");
    c.kubectl_with(&["replace", "-f", "-"], &new).good();
    assert!(c.kubectl_with(&["replace", "-f", "-"], &old).bad().contains("the object has been modified"));
    assert_eq!(c.kubectl(&["get", "-n", &ns, "cm", "m", "-o", "jsonpath={.data.a}"]).good(), "2");
    Outcome::Passed
}

fn edit(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-edit");
    c.kubectl(&["create", "-n", &ns, "configmap", "m", "--from-literal=a=before"]).good();
    let said =
        c.inside("kubectl").env("KUBE_EDITOR", "sed -i s/before/after/").args(["edit", "-n", &ns, "cm", "m"]).output();
    assert!(said.unwrap().status.success());
    assert_eq!(c.kubectl(&["get", "-n", &ns, "cm", "m", "-o", "jsonpath={.data.a}"]).good(), "after");
    Outcome::Passed
}

fn patch_three_ways(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-patch");
    c.apply(&deployment("d", &ns, 0, "env: [{name: A, value: '1'}]"));
    let patch = |kind: &str, text: &str| c.kubectl(&["patch", "-n", &ns, "deploy", "d", "--type", kind, "-p", text]);
    patch(
        "strategic",
        r#"{"spec":{"template":{"spec":{"containers":[{"name":"main","env":[{"name":"B","value":"2"}]}]}}}}"#,
    )
    .good();
    let env = c
        .kubectl(&["get", "-n", &ns, "deploy", "d", "-o", "jsonpath={.spec.template.spec.containers[0].env[*].name}"])
        .good();
    assert_eq!(env.split_whitespace().count(), 2, "{env}");
    patch("merge", r#"{"metadata":{"labels":{"x":"y"}}}"#).good();
    patch("json", r#"[{"op":"test","path":"/metadata/labels/x","value":"y"},{"op":"replace","path":"/metadata/labels/x","value":"z"}]"#).good();
    assert_eq!(c.kubectl(&["get", "-n", &ns, "deploy", "d", "-o", "jsonpath={.metadata.labels.x}"]).good(), "z");
    assert!(!patch("json", r#"[{"op":"test","path":"/metadata/labels/x","value":"no"}]"#).ok);
    Outcome::Passed
}

fn describe_and_events(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-describe");
    c.apply(&sleeper("p", &ns));
    c.wait_ready(&ns, "pod/p");
    let text = c.kubectl(&["describe", "-n", &ns, "pod", "p"]).good();
    for part in ["Status:           Running", "Image:", "Ready:          True", "Scheduled", "Started"] {
        assert!(text.contains(part), "no {part:?} in:\n{text}");
    }
    c.kubectl(&["describe", "node"]).good();
    let events = c.kubectl(&["events", "-n", &ns, "--for", "pod/p"]).good();
    assert!(events.contains("Started") && events.contains("Scheduled"), "{events}");
    assert!(c.kubectl(&["get", "events", "-n", &ns]).good().contains("Pulled"));
    Outcome::Passed
}

fn logs(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-logs");
    c.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: {ns}}}\nspec:\n  terminationGracePeriodSeconds: 0\n  containers:\n  \
         - {{name: main, image: '127.0.0.1:5000/test/busybox:1', command: [sh, -c, 'for i in 1 2 3 4 5; do echo line $i; sleep 0.2; done; sleep 1000']}}\n"
    ));
    c.wait_ready(&ns, "pod/p");
    let mut follow = c.inside("kubectl");
    let mut follow = follow.args(["logs", "-n", &ns, "-f", "p"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut reader = std::io::BufReader::new(follow.stdout.take().unwrap());
    let mut line = String::new();
    while line.trim() != "line 5" {
        line.clear();
        assert!(std::io::BufRead::read_line(&mut reader, &mut line).unwrap() > 0, "the log ended early");
    }
    follow.kill().unwrap();
    follow.wait().unwrap();
    assert_eq!(lines(&c.kubectl(&["logs", "-n", &ns, "p", "--tail=2"]).good()), ["line 4", "line 5"]);
    assert!(c.kubectl(&["logs", "-n", &ns, "p", "--timestamps", "--tail=1"]).good().starts_with("20"));
    assert!(c.kubectl(&["logs", "-n", &ns, "p", "-c", "nope"]).bad().contains("nope"));
    Outcome::Passed
}

fn exec(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-exec");
    c.apply(&sleeper("p", &ns));
    c.wait_ready(&ns, "pod/p");
    assert_eq!(c.kubectl(&["exec", "-n", &ns, "p", "--", "echo", "hello"]).good(), "hello\n");
    let said = c.kubectl(&["exec", "-n", &ns, "p", "--", "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert!(said.out == "out\n" && said.err.contains("err") && said.err.contains("exit code 7"), "{}", said.err);
    let said = c.kubectl_with(&["exec", "-i", "-n", &ns, "p", "--", "cat"], "through stdin");
    assert_eq!(said.good(), "through stdin");
    assert!(!c.kubectl(&["exec", "-n", &ns, "p", "--", "no-such-program"]).ok);
    Outcome::Passed
}

/// `script` gives kubectl a terminal.
fn exec_terminal(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-tty");
    c.apply(&sleeper("p", &ns));
    c.wait_ready(&ns, "pod/p");
    let line = format!(
        "stty rows 33 cols 77; kubectl exec -it -n {ns} p -- sh -c 'tty; for i in 1 2 3 4 5 6 7 8 9; do stty size 2>/dev/null | grep 33 && break; sleep 0.2; done'"
    );
    let output = c.inside("script").args(["-qec", &line, "/dev/null"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("/dev/pts/") && text.contains("33 77"), "{text}");
    Outcome::Passed
}

fn attach(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-attach");
    c.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: {ns}}}\nspec:\n  terminationGracePeriodSeconds: 0\n  containers:\n  \
         - {{name: main, image: '127.0.0.1:5000/test/busybox:1', stdin: true, stdinOnce: true, command: [sh, -c, 'while read l; do echo got $l; done']}}\n"
    ));
    c.wait_ready(&ns, "pod/p");
    let said = c.kubectl_with(&["attach", "-i", "-n", &ns, "p"], "a line\n");
    assert!(said.out.contains("got a line"), "{}{}", said.out, said.err);
    Outcome::Passed
}

fn cp(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-cp");
    c.apply(&sleeper("p", &ns));
    c.wait_ready(&ns, "pod/p");
    let (file, back) = (c.scratch("cp.bin"), c.scratch("cp.back"));
    let bytes: Vec<u8> = (0..5_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    std::fs::write(&file, &bytes).unwrap();
    c.kubectl(&["cp", &file.to_string_lossy(), &format!("{ns}/p:/tmp/there")]).good();
    c.kubectl(&["cp", &format!("{ns}/p:/tmp/there"), &back.to_string_lossy()]).good();
    assert!(std::fs::read(&back).unwrap() == bytes, "what came back differs");
    Outcome::Passed
}

const WEB: &str = "mkdir -p /tmp/w; dd if=/dev/zero of=/tmp/w/big bs=1M count=8 2>/dev/null; echo hi > /tmp/w/index.html; exec httpd -f -p 8000 -h /tmp/w";

fn web(ns: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: web, namespace: {ns}, labels: {{app: web}}}}\nspec:\n  terminationGracePeriodSeconds: 0\n  \
         containers:\n  - name: main\n    image: 127.0.0.1:5000/test/busybox:1\n    command: [sh, -c, '{WEB}']\n    \
         ports: [{{containerPort: 8000}}]\n    readinessProbe: {{httpGet: {{path: /, port: 8000}}, periodSeconds: 1}}\n"
    )
}

fn port_forward(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-forward");
    c.apply(&web(&ns));
    c.wait_ready(&ns, "pod/web");
    forward_once(c, &ns, "18000", &[]);
    Outcome::Passed
}

fn forward_once(c: &Cluster, ns: &str, port: &str, env: &[(&str, &str)]) {
    let mut command = c.inside("kubectl");
    command.args(["port-forward", "-n", ns, "pod/web", &format!("{port}:8000")]).envs(env.iter().copied());
    let mut forward = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let get = |path: &str| {
        c.inside("curl").args(["-fsS", "-m", "20", &format!("http://127.0.0.1:{port}/{path}")]).output().unwrap()
    };
    c.until("the forwarded port answers", || get("").stdout == b"hi\n");
    assert_eq!(get("big").stdout.len(), 8 << 20);
    forward.kill().unwrap();
    forward.wait().unwrap();
}

fn streams_over_spdy(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-spdy");
    c.apply(&web(&ns));
    c.wait_ready(&ns, "pod/web");
    let mut command = c.inside("kubectl");
    command.env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", "false");
    let said = command.args(["exec", "-n", &ns, "web", "--", "sh", "-c", "echo spdy; exit 3"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&said.stdout), "spdy\n");
    assert_eq!(said.status.code(), Some(3));
    forward_once(c, &ns, "18001", &[("KUBECTL_PORT_FORWARD_WEBSOCKETS", "false")]);
    Outcome::Passed
}

fn scale_and_rollout(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-rollout");
    c.apply(&deployment("d", &ns, 2, "env: [{name: V, value: one}]"));
    let k = |args: &[&str]| c.kubectl(&[args, &["-n", &ns]].concat());
    k(&["rollout", "status", "deploy/d", "--timeout=60s"]).good();
    k(&["scale", "deploy/d", "--replicas=3"]).good();
    k(&["rollout", "status", "deploy/d", "--timeout=60s"]).good();
    assert_eq!(k(&["get", "deploy", "d", "-o", "jsonpath={.status.readyReplicas}"]).good(), "3");
    k(&["set", "env", "deploy/d", "V=two"]).good();
    k(&["rollout", "status", "deploy/d", "--timeout=60s"]).good();
    let history = k(&["rollout", "history", "deploy/d"]).good();
    assert!(history.contains("1 ") && history.contains("2 "), "{history}");
    k(&["rollout", "undo", "deploy/d"]).good();
    k(&["rollout", "status", "deploy/d", "--timeout=60s"]).good();
    assert_eq!(
        k(&["get", "deploy", "d", "-o", "jsonpath={.spec.template.spec.containers[0].env[0].value}"]).good(),
        "one"
    );
    k(&["rollout", "restart", "deploy/d"]).good();
    k(&["rollout", "status", "deploy/d", "--timeout=60s"]).good();
    assert!(k(&["get", "rs", "-o", "name"]).good().lines().count() >= 3);
    Outcome::Passed
}

fn delete_cascades(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-cascade");
    let k = |args: &[&str]| c.kubectl(&[args, &["-n", &ns]].concat());
    let count = |what: &str| k(&["get", what, "-o", "name"]).good().lines().count();
    for (name, how, left) in [("bg", "background", 0), ("fg", "foreground", 0), ("or", "orphan", 1)] {
        c.apply(&deployment(name, &ns, 1, ""));
        k(&["rollout", "status", &format!("deploy/{name}"), "--timeout=60s"]).good();
        k(&["delete", "deploy", name, &format!("--cascade={how}"), "--timeout=60s"]).good();
        c.until("dependents follow", || count("rs") == left && (left > 0 || count("pods") == 0));
    }
    Outcome::Passed
}

fn wait(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-wait");
    c.apply(&sleeper("p", &ns));
    c.kubectl(&["wait", "-n", &ns, "pod/p", "--for=condition=Ready", "--timeout=60s"]).good();
    c.kubectl(&["wait", "-n", &ns, "pod/p", "--for=jsonpath={.status.phase}=Running", "--timeout=10s"]).good();
    c.kubectl(&["delete", "-n", &ns, "pod/p", "--wait=false"]).good();
    c.kubectl(&["wait", "-n", &ns, "pod/p", "--for=delete", "--timeout=60s"]).good();
    Outcome::Passed
}

fn diff_and_dry_run(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-diff");
    let with = |v: &str| {
        format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: m, namespace: {ns}}}\ndata: {{a: '{v}'}}\n")
    };
    c.apply(&with("1"));
    let said = c.kubectl_with(&["diff", "-f", "-"], &with("2"));
    assert!(
        !said.ok && said.out.contains("-  a: \"1\"") && said.out.contains("+  a: \"2\""),
        "{}{}",
        said.out,
        said.err
    );
    assert!(c.kubectl_with(&["diff", "-f", "-"], &with("1")).ok);
    c.kubectl_with(&["apply", "--dry-run=server", "-f", "-"], &with("3")).good();
    assert_eq!(c.kubectl(&["get", "-n", &ns, "cm", "m", "-o", "jsonpath={.data.a}"]).good(), "1");
    Outcome::Passed
}

fn explain(c: &Cluster) -> Outcome {
    let text = c.kubectl(&["explain", "pod.spec.containers.image"]).good();
    assert!(text.contains("FIELD: image <string>"), "{text}");
    assert!(c.kubectl(&["explain", "deployment", "--recursive"]).good().contains("maxSurge"));
    for kind in ["vm.spec.template.spec", "ksvc.spec", "httproute.spec.rules", "crd.spec"] {
        c.kubectl(&["explain", kind]).good();
    }
    assert!(!c.kubectl(&["explain", "pod.spec.nonsense"]).ok);
    Outcome::Passed
}

fn api_resources(c: &Cluster) -> Outcome {
    let text = c.kubectl(&["api-resources"]).good();
    for line in
        ["configmaps", "deployments", "virtualmachines", "httproutes", "leases", "runtimeclasses", "endpointslices"]
    {
        assert!(text.contains(line), "no {line} in:\n{text}");
    }
    assert!(text.contains("serving.knative.dev/v1") && text.contains("kubevirt.io/v1"));
    assert!(c.kubectl(&["api-versions"]).good().contains("apps/v1"));
    c.kubectl(&["version"]).good();
    c.kubectl(&["cluster-info"]).good();
    Outcome::Passed
}

const CRD: &str = "apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: boats.reef.example}
spec:
  group: reef.example
  scope: Namespaced
  names: {plural: boats, singular: boat, kind: Boat, shortNames: [bo]}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}, scale: {specReplicasPath: .spec.crew, statusReplicasPath: .status.crew}}
    additionalPrinterColumns: [{name: Crew, type: integer, jsonPath: .spec.crew}]
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            required: [crew]
            properties: {crew: {type: integer, minimum: 1}, colour: {type: string, default: blue, enum: [blue, red]}}
          status: {type: object, properties: {crew: {type: integer}}}
";

fn custom_resources(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-crd");
    c.apply(CRD);
    c.kubectl(&["wait", "crd/boats.reef.example", "--for=condition=Established", "--timeout=30s"]).good();
    let boat = |spec: &str| {
        format!("apiVersion: reef.example/v1\nkind: Boat\nmetadata: {{name: b, namespace: {ns}}}\nspec: {spec}\n")
    };
    c.until("the new kind is served", || c.kubectl_with(&["apply", "-f", "-"], &boat("{crew: 3}")).ok);
    assert_eq!(c.kubectl(&["get", "-n", &ns, "bo", "b", "-o", "jsonpath={.spec.colour}"]).good(), "blue");
    assert!(c.kubectl(&["get", "-n", &ns, "boats"]).good().contains("CREW"));
    let wrong = c.kubectl_with(&["apply", "-f", "-"], &boat("{crew: 0}")).bad();
    assert!(wrong.contains("spec.crew") && wrong.contains("greater than or equal to 1"), "{wrong}");
    assert!(
        c.kubectl_with(&["apply", "-f", "-"], &boat("{crew: 1, sail: big}"))
            .bad()
            .contains("unknown field \"spec.sail\"")
    );
    c.kubectl(&["scale", "-n", &ns, "boat/b", "--replicas=5"]).good();
    assert_eq!(c.kubectl(&["get", "-n", &ns, "bo", "b", "-o", "jsonpath={.spec.crew}"]).good(), "5");
    c.kubectl(&["delete", "crd", "boats.reef.example", "--timeout=30s"]).good();
    assert!(!c.kubectl(&["get", "-n", &ns, "boats"]).ok);
    Outcome::Passed
}

fn finalizers(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-final");
    c.apply(&format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: m, namespace: {ns}, finalizers: [reef.example/hold]}}\n"
    ));
    c.kubectl(&["delete", "-n", &ns, "cm", "m", "--wait=false"]).good();
    let held = c.kubectl(&["get", "-n", &ns, "cm", "m", "-o", "jsonpath={.metadata.deletionTimestamp}"]).good();
    assert!(held.starts_with("20"), "{held}");
    c.kubectl(&["patch", "-n", &ns, "cm", "m", "--type=merge", "-p", r#"{"metadata":{"finalizers":null}}"#]).good();
    assert!(c.kubectl(&["get", "-n", &ns, "cm", "m"]).bad().contains("NotFound"));
    Outcome::Passed
}

fn generate_name_and_limit(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-limit");
    for _ in 0..7 {
        let made = c.kubectl_with(
            &["create", "-f", "-", "-o", "name"],
            &format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{generateName: g-, namespace: {ns}}}\n"),
        );
        assert!(made.good().starts_with("configmap/g-"));
    }
    let listed = c.kubectl(&["get", "-n", &ns, "cm", "--chunk-size=2", "-o", "name"]).good();
    assert_eq!(listed.lines().filter(|l| l.contains("/g-")).count(), 7);
    let raw = c.kubectl(&["get", "--raw", &format!("/api/v1/namespaces/{ns}/configmaps?limit=2")]).good();
    let page = json(&raw);
    assert_eq!(page["items"].as_array().unwrap().len(), 2);
    assert!(page["metadata"]["continue"].as_str().is_some_and(|t| !t.is_empty()));
    assert!(page["metadata"]["remainingItemCount"].as_i64().is_some_and(|n| n >= 5));
    Outcome::Passed
}

fn delete_namespace(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-gone");
    c.kubectl(&["create", "-n", &ns, "configmap", "m"]).good();
    c.apply(&sleeper("p", &ns));
    c.wait_ready(&ns, "pod/p");
    c.kubectl(&["delete", "namespace", &ns, "--timeout=60s"]).good();
    assert!(c.kubectl(&["get", "namespace", &ns]).bad().contains("NotFound"));
    assert_eq!(c.kubectl(&["get", "-n", &ns, "pods", "-o", "name"]).good(), "");
    Outcome::Passed
}

fn auth(c: &Cluster) -> Outcome {
    assert_eq!(c.kubectl(&["auth", "can-i", "create", "pods"]).good().trim(), "yes");
    assert!(c.kubectl(&["auth", "whoami"]).good().contains("system:masters"));
    let anonymous = c.inside("curl").args(["-sk", "https://127.0.0.1:7443/api/v1/namespaces"]).output().unwrap();
    assert_eq!(json(&String::from_utf8_lossy(&anonymous.stdout))["code"], 401);
    Outcome::Passed
}
