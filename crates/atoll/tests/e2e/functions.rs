//! Functions from the command line, their ledger, and revisions that sleep and wake.

use crate::cluster::{Cluster, Said, json};
use crate::{Outcome, Test};
use std::path::PathBuf;
use std::process::{Child, Stdio};

pub const TESTS: &[Test] = &[
    ("function_deploy_invoke_logs_rm", life),
    ("function_bad_input", bad_input),
    ("function_limits_of_its_service", limits),
    ("function_outbound", outbound),
    ("function_container_sleeps_and_wakes_under_a_herd", herd),
    ("function_sleeps_and_wakes_without_a_loss", sleeper),
    ("function_wakes_for_its_own_namespace", inside),
    ("function_ledger_adds_up", ledger),
    ("function_projects", projects),
];

pub const ANSWER: &str = "(call $answer (local.get $out))";
/// Prints `hello!` and answers.
pub const GREET: &str =
    "(i64.store (i32.const 1024) (i64.const 0x000a216f6c6c6568)) (local.set $request (call $stdout))
    (call $write (local.get $request) (i32.const 1024) (i32.const 7) (i32.const 96)) (call $answer (local.get $out))";

pub fn component(c: &Cluster, name: &str, body: &str) -> PathBuf {
    let text = include_str!("../../../function/tests/handler.wat").replace("@HANDLER@", body);
    let path = c.scratch(name);
    std::fs::write(&path, wat::parse_str(text).unwrap()).unwrap();
    path
}

pub fn function(c: &Cluster, ns: &str, args: &[&str]) -> Said {
    let data = c.data().to_string_lossy().into_owned();
    let (command, rest) = args.split_first().unwrap();
    c.atoll(&[&["function", command, "--data-dir", &data, "-n", ns], rest].concat())
}

fn status(c: &Cluster, host: &str, path: &str) -> String {
    let url = format!("http://127.0.0.1:8080{path}");
    let args = ["-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", &format!("Host: {host}"), &url];
    Said::of(c.inside("curl").args(args).output().unwrap()).good()
}

fn life(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-function");
    c.kubectl(&["create", "secret", "generic", "-n", &ns, "keys", "--from-literal=a=1"]).good();
    let file = component(c, "greet.wasm", GREET);
    let file = file.to_str().unwrap();
    let more = ["--route", "greet.localhost/hi", "--env", "A=1", "--secret", "keys", "--secret", "B=keys/a"];
    let deploy = function(c, &ns, &[&["deploy", "greet", file], more.as_slice()].concat()).good();
    assert!(deploy.contains("127.0.0.1:5000/functions/t-function/greet:"), "{deploy}");
    assert!(deploy.contains("http://greet.t-function."), "{deploy}");
    let list = function(c, &ns, &["ls"]).good();
    assert!(list.lines().nth(1).unwrap().starts_with("t-function   greet   wasm       True    greet-00001"), "{list}");
    function(c, &ns, &["invoke", "greet", "--data", "x"]).good();
    c.until("the route leads to it", || status(c, "greet.localhost", "/hi/there") == "200");
    assert_eq!(status(c, "greet.localhost", "/"), "404", "only its path");
    c.until("its log says so", || function(c, &ns, &["logs", "greet"]).good().contains("hello!"));

    // What it wrote outlives its instances.
    c.kubectl(&["delete", "pods", "-n", &ns, "--all", "--timeout=60s"]).good();
    for args in [&["logs", "greet"] as &[&str], &["logs", "greet", "--previous", "--since", "10m"]] {
        let log = function(c, &ns, args).good();
        assert_eq!(log.matches("hello!").count(), 2, "{log}");
    }
    let dated = function(c, &ns, &["logs", "greet", "--timestamps", "--tail", "1"]).good();
    assert!(dated.starts_with("20") && dated.contains('T'), "{dated}");
    assert!(function(c, &ns, &["logs", "greet", "--since", "soon"]).bad().contains("such as 10m"));

    // The same again changes nothing; other content is another revision; a route not asked for any more goes.
    function(c, &ns, &[&["deploy", "greet", file], more.as_slice()].concat()).good();
    assert!(function(c, &ns, &["ls"]).good().contains("greet-00001"));
    let other = component(c, "other.wasm", ANSWER);
    function(c, &ns, &["deploy", "greet", other.to_str().unwrap()]).good();
    assert!(function(c, &ns, &["ls"]).good().contains("greet-00002"));
    c.until("the route is gone", || status(c, "greet.localhost", "/hi") == "404");

    // By its image's name, too; what the log follows is what comes.
    let image = deploy.split_whitespace().next().unwrap();
    function(c, &ns, &["deploy", "again", image]).good();
    let out = c.scratch("follow.log");
    let mut following = follow(c, &ns, "again", &out);
    function(c, &ns, &["invoke", "again"]).good();
    c.until("the log is followed", || std::fs::read_to_string(&out).unwrap().contains("hello!"));
    following.kill().unwrap();
    following.wait().unwrap();

    function(c, &ns, &["rm", "greet", "again"]).good();
    assert!(function(c, &ns, &["invoke", "greet"]).bad().contains("\"greet\" not found"));
    c.until("nothing is left", || {
        c.kubectl(&["get", "-n", &ns, "pods,httproutes,services", "-o", "name"]).good().trim().is_empty()
    });
    Outcome::Passed
}

fn follow(c: &Cluster, ns: &str, name: &str, out: &PathBuf) -> Child {
    let mut command = c.inside(env!("CARGO_BIN_EXE_atoll"));
    command.args(["function", "logs", "-f", "-n", ns, name]).stdout(std::fs::File::create(out).unwrap());
    command.stderr(Stdio::null()).spawn().unwrap()
}

fn bad_input(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-function-bad");
    let refused = |args: &[&str]| function(c, &ns, args).bad();
    let core = c.scratch("core.wasm");
    std::fs::write(&core, b"\0asm\x01\0\0\0").unwrap();
    let core = core.to_str().unwrap();
    assert!(refused(&["deploy", "f", core]).contains("a core module, not a component"));
    assert!(refused(&["deploy", "f", "./missing.wasm"]).contains("no such file"));
    assert!(refused(&["deploy", "f", "/proc"]).contains("run its build.sh first"));
    let good = component(c, "fine.wasm", ANSWER);
    let good = good.to_str().unwrap();
    assert!(refused(&["deploy", "Not_A_Name", good]).contains("Not_A_Name"));
    assert!(refused(&["deploy", "f", good, "--env", "novalue"]).contains("--env novalue: NAME=VALUE"));
    assert!(refused(&["deploy", "f", good, "--secret", "V=s"]).contains("VARIABLE=SECRET/KEY"));
    assert!(refused(&["deploy", "f", good, "--route", "/x"]).contains("HOST/PATH"));
    let told = function(c, "no-such-namespace", &["deploy", "f", good]).bad();
    assert!(told.contains("kubectl create namespace no-such-namespace"), "{told}");
    assert!(refused(&["rm", "nobody"]).contains("not found"));
    assert!(refused(&["invoke", "nobody"]).contains("not found"));
    assert!(refused(&["logs", "nobody"]).contains("not found"));

    // What a component asks for and there is not, the message names.
    let text = r#"(component (import "shop:db/query@1.0.0" (instance (export "run" (func)))))"#;
    let asking = c.scratch("asking.wasm");
    std::fs::write(&asking, wat::parse_str(text).unwrap()).unwrap();
    let told = refused(&["deploy", "asking", asking.to_str().unwrap()]);
    assert!(told.contains("shop:db/query"), "{told}");
    Outcome::Passed
}

fn limits(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-function-limits");
    let file = component(c, "endless.wasm", "(loop (br 0))");
    function(c, &ns, &["deploy", "endless", file.to_str().unwrap(), "--timeout", "1", "--concurrency", "2"]).good();
    let pods = json(&c.kubectl(&["get", "pods", "-n", &ns, "-o", "json"]).good());
    let annotations = &pods["items"][0]["metadata"]["annotations"];
    assert_eq!(annotations["functions.atoll.dev/timeout-seconds"], "1");
    assert_eq!(annotations["functions.atoll.dev/concurrency"], "2");
    let told = function(c, &ns, &["invoke", "endless"]).bad();
    assert!(told.contains("504"), "{told}");
    function(c, &ns, &["rm", "endless"]).good();
    Outcome::Passed
}

fn web(ns: &str, name: &str, window: &str) -> String {
    format!(
        "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {{name: {name}, namespace: {ns}}}\nspec:\n  template:\n    \
         metadata:\n      annotations: {{autoscaling.knative.dev/min-scale: '0', autoscaling.knative.dev/window: {window}}}\n    \
         spec:\n      timeoutSeconds: 10\n      containers:\n      - image: 127.0.0.1:5000/test/busybox:1\n        \
         command: [sh, -c, 'echo up > /tmp/index.html; exec httpd -f -p 8080 -h /tmp']\n"
    )
}

fn replicas(c: &Cluster, ns: &str, name: &str) -> String {
    let deployment = format!("deployment/{name}-00001-deployment");
    c.kubectl(&["get", "-n", ns, &deployment, "-o", "jsonpath={.spec.replicas}"]).good()
}

fn sleeps(c: &Cluster, ns: &str, name: &str) {
    c.until("it sleeps", || {
        let pods = c.kubectl(&["get", "pods", "-n", ns, "-o", "name"]).good();
        replicas(c, ns, name) == "0" && pods.trim().is_empty()
    });
}

/// Answers of so many requests at once, by status.
fn at_once(c: &Cluster, host: &str, count: usize) -> Vec<String> {
    let url = format!("http://127.0.0.1:8080/?[1-{count}]");
    let parallel = count.to_string();
    let args =
        ["-s", "-Z", "--parallel-immediate", "--parallel-max", &parallel, "-o", "/dev/null", "-w", "%{http_code}\n"];
    let said = Said::of(c.inside("curl").args(args).args(["-H", &format!("Host: {host}"), &url]).output().unwrap());
    said.out.lines().map(str::to_owned).collect()
}

fn herd(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-herd");
    c.apply(&web(&ns, "web", "6s"));
    c.wait_ready(&ns, "ksvc/web");
    sleeps(c, &ns, "web");
    let active = "jsonpath={.status.conditions[?(@.type==\"Active\")].reason}";
    c.until("its revision says so", || {
        c.kubectl(&["get", "-n", &ns, "revision/web-00001", "-o", active]).good() == "NoTraffic"
    });
    c.wait_ready(&ns, "ksvc/web");

    let answers = at_once(c, "web.t-herd.atoll.local", 150);
    assert_eq!(answers.len(), 150);
    assert!(answers.iter().all(|status| status == "200"), "{answers:?}");
    assert_ne!(replicas(c, &ns, "web"), "0");
    c.kubectl(&["delete", "ksvc", "web", "-n", &ns]).good();
    Outcome::Passed
}

/// Around the moment of falling asleep no request is lost, again and again.
fn sleeper(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-sleeper");
    let file = component(c, "short.wasm", ANSWER);
    function(c, &ns, &["deploy", "short", file.to_str().unwrap(), "--min-scale", "0"]).good();
    let patch = r#"{"spec":{"template":{"metadata":{"annotations":{"autoscaling.knative.dev/window":"6s"}}}}}"#;
    c.kubectl(&["patch", "ksvc", "short", "-n", &ns, "--type=merge", "-p", patch]).good();
    let newest = ["get", "ksvc", "short", "-n", &ns, "-o", "jsonpath={.status.latestReadyRevisionName}"];
    c.until("the patch is served", || c.kubectl(&newest).good() == "short-00002");
    let zero = ["get", "-n", &ns, "deployment/short-00002-deployment", "-o", "jsonpath={.spec.replicas}"];
    for _ in 0..3 {
        // The first moment at which it is to have no pods: some of them may still be going.
        c.until("it is told to sleep", || c.kubectl(&zero).good() == "0");
        for _ in 0..5 {
            assert_eq!(status(c, "short.t-sleeper.atoll.local", "/"), "200");
        }
    }
    function(c, &ns, &["rm", "short"]).good();
    Outcome::Passed
}

/// A pod of the namespace wakes a Service by its name inside, as whom the server knows it and policies judge it.
fn inside(c: &Cluster) -> Outcome {
    let (ns, other) = (c.namespace("t-woken"), c.namespace("t-woken-other"));
    let pages = "mkdir -p /tmp/cgi-bin; echo IyEvYmluL3NoCmVjaG8K | base64 -d > /tmp/cgi-bin/who; cp /tmp/cgi-bin/who /tmp/cgi-bin/slow; \
                 echo echo from \\$REMOTE_ADDR >> /tmp/cgi-bin/who; echo sleep 9 >> /tmp/cgi-bin/slow; \
                 echo echo slept >> /tmp/cgi-bin/slow; chmod +x /tmp/cgi-bin/*; exec httpd";
    c.apply(&web(&ns, "web", "6s").replace("exec httpd", pages));
    for (namespace, name) in [(&ns, "friend"), (&other, "stranger")] {
        c.apply(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\nspec:\n  \
             containers:\n  - {{name: c, image: '127.0.0.1:5000/test/busybox:1', command: [sleep, '1000000']}}\n"
        ));
        c.wait_ready(namespace, &format!("pod/{name}"));
    }
    let asleep = || {
        c.until("it sleeps", || {
            let pods =
                c.kubectl(&["get", "pods", "-n", &ns, "-l", "serving.knative.dev/service=web", "-o", "name"]).good();
            replicas(c, &ns, "web") == "0" && pods.trim().is_empty()
        });
    };
    c.wait_ready(&ns, "ksvc/web");
    asleep();
    let ask = |namespace: &str, pod: &str, host: &str, path: &str| {
        // Debian's static busybox has a wget that crashes.
        let line = format!("printf 'GET {path} HTTP/1.0\\r\\n\\r\\n' | nc -w 60 {host} 80");
        c.kubectl(&["exec", "-n", namespace, pod, "--", "sh", "-c", &line])
    };
    let get = |what: &str, path: &str| c.kubectl(&["get", "-n", &ns, what, "-o", &format!("jsonpath={path}")]).good();
    let address = get("pod/friend", "{.status.podIP}");
    // One of another namespace neither reaches nor wakes it.
    let service = get("service/web", "{.spec.clusterIP}");
    let refused = ask(&other, "stranger", &service, "/").bad();
    assert!(refused.contains("refused"), "{refused}");
    assert_eq!(replicas(c, &ns, "web"), "0");

    // Line ends differ between pages and programs.
    let says = |path: &str, last: &str| ask(&ns, "friend", "web", path).out.ends_with(&format!("\n{last}\n"));
    assert!(says("/", "up"));
    let who = format!("from [::ffff:{address}]");
    let told = ask(&ns, "friend", "web.t-woken.svc.cluster.local", "/cgi-bin/who").good();
    assert!(told.ends_with(&format!("{who}\n")), "{told}");
    // One request that lasts longer than the window is not cut off.
    assert!(says("/cgi-bin/slow", "slept"));
    asleep();

    // What the friend may not reach it may not reach this way, awake or not.
    c.apply(&format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: shut, namespace: {ns}}}\nspec:\n  \
         podSelector: {{matchLabels: {{serving.knative.dev/service: web}}}}\n  policyTypes: [Ingress]\n"
    ));
    assert_eq!(ask(&ns, "friend", "web", "/").out, "");
    assert_eq!(status(c, "web.t-woken.atoll.local", "/"), "200", "the gateway does");
    assert_eq!(ask(&ns, "friend", "web", "/").out, "");
    c.kubectl(&["delete", "networkpolicy", "shut", "-n", &ns]).good();
    c.until("it may again", || says("/", "up"));

    // A revision that may not sleep is reached without a detour.
    let patch = r#"{"spec":{"template":{"metadata":{"annotations":{"autoscaling.knative.dev/min-scale":"1"}}}}}"#;
    c.kubectl(&["patch", "ksvc", "web", "-n", &ns, "--type=merge", "-p", patch]).good();
    c.until("the Service says so", || {
        get("service/web", "{.metadata.annotations.serving\\.atoll\\.dev/backends}").is_empty()
    });
    c.until("it answers", || says("/cgi-bin/who", &who));
    c.kubectl(&["delete", "ksvc", "web", "-n", &ns]).good();
    Outcome::Passed
}

/// The ledger says what was sent, over a restart of the agent and after the function is gone.
fn ledger(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-ledger");
    let file = component(c, "ledger.wasm", ANSWER);
    function(c, &ns, &["deploy", "paid", file.to_str().unwrap()]).good();
    let booked = |requests: u64| {
        let usage = json(&function(c, &ns, &["usage", "-o", "json"]).good());
        usage["t-ledger"]["paid"]["requests"] == requests
    };
    let send = |count: usize| {
        let answers = at_once(c, "paid.t-ledger.atoll.local", count);
        assert!(answers.len() == count && answers.iter().all(|status| status == "200"), "{answers:?}");
    };
    send(30);
    c.until("the first load is booked", || booked(30));
    c.stop(rustix::process::Signal::KILL);
    c.up();
    c.until("it serves again", || status(c, "paid.t-ledger.atoll.local", "/") == "200");
    send(20);
    // The last ones are booked when the function goes.
    function(c, &ns, &["rm", "paid"]).good();
    c.until("all is booked", || {
        let usage = json(&function(c, &ns, &["usage", "-o", "json"]).good());
        usage["t-ledger"]["paid"]["requests"].as_u64().is_some_and(|requests| requests >= 51)
    });
    let usage = json(&function(c, &ns, &["usage", "-o", "json"]).good());
    let paid = &usage["t-ledger"]["paid"];
    assert_eq!((&paid["requests"], &paid["failures"]), (&serde_json::json!(51), &serde_json::json!(0)));
    assert_eq!(paid["memoryKibMicros"], paid["runMicros"].as_u64().unwrap() * 64, "one page each");
    assert!(function(c, &ns, &["usage"]).good().contains("paid"));
    Outcome::Passed
}

fn projects(c: &Cluster) -> Outcome {
    for lang in ["js", "python", "rust", "c"] {
        let dir = c.scratch(&format!("project-{lang}"));
        let dir = dir.to_str().unwrap();
        c.atoll(&["function", "new", dir, "--lang", lang]).good();
        assert!(c.atoll(&["function", "new", dir, "--lang", lang]).bad().contains("not empty"));
        assert!(c.atoll(&["function", "deploy", "x", dir]).bad().contains("build.sh"));
    }
    Outcome::Passed
}

/// A function asks a Service of its namespace, and nobody else; the pod's policies hold for what it asks.
fn outbound(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-outbound");
    c.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: web, namespace: {ns}, labels: {{app: web}}}}\nspec:\n  containers:\n  - name: web\n    \
         image: 127.0.0.1:5000/test/busybox:1\n    command: [sh, -c, 'echo from the web > /tmp/index.html; exec httpd -f -p 8000 -h /tmp']\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: {ns}}}\nspec: {{selector: {{app: web}}, ports: [{{port: 8000}}]}}\n"
    ));
    c.wait_ready(&ns, "pod/web");
    let file = c.scratch("asks.wasm");
    std::fs::write(&file, wat::parse_str(include_str!("../../../function/tests/outbound.wat")).unwrap()).unwrap();
    let file = file.to_str().unwrap();
    let told = function(c, &ns, &["deploy", "asks", file, "--allow-outbound", "https://web"]).bad();
    assert!(told.contains("--allow-outbound \"https://web\": port"), "{told}");
    let allowed = ["--allow-outbound", "web:8000", "--allow-outbound", "*.example.com"];
    function(c, &ns, &[&["deploy", "asks", file], allowed.as_slice()].concat()).good();
    let annotation = "jsonpath={.spec.template.metadata.annotations.functions\\.atoll\\.dev/allow-outbound}";
    assert_eq!(c.kubectl(&["get", "ksvc", "asks", "-n", &ns, "-o", annotation]).good(), "web:8000,*.example.com");
    let ask = |path: &str| {
        let url = format!("http://127.0.0.1:8080{path}");
        let args = ["-s", "-w", " %{http_code}", "-H", "Host: asks.t-outbound.atoll.local", &url];
        Said::of(c.inside("curl").args(args).output().unwrap()).good()
    };
    assert_eq!(ask("/h/web:8000/"), "from the web\n 200");
    let refused = ask("/h/web.t-outbound:8000/");
    assert!(refused.contains("web.t-outbound:8000 is not on the list") && refused.ends_with(" 502"), "{refused}");
    c.until("its log says so", || function(c, &ns, &["logs", "asks"]).good().contains("web.t-outbound:8000 is not on"));

    // Over a restart of the agent, without it, and where a policy is in the way.
    c.stop(rustix::process::Signal::KILL);
    c.up();
    c.until("it serves again", || ask("/h/web:8000/") == "from the web\n 200");
    c.apply(&format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: closed, namespace: {ns}}}\n\
         spec: {{podSelector: {{matchLabels: {{app: web}}}}, policyTypes: [Ingress]}}\n"
    ));
    c.until("the policy holds", || ask("/h/web:8000/").ends_with(" 502"));
    c.until("it is booked", || {
        let usage = json(&function(c, &ns, &["usage", "-o", "json"]).good());
        let asks = &usage["t-outbound"]["asks"];
        asks["outboundRequests"].as_u64() >= Some(3) && asks["outboundReceivedBytes"].as_u64() >= Some(26)
    });
    function(c, &ns, &["rm", "asks"]).good();
    Outcome::Passed
}
