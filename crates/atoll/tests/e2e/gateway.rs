//! The gateway as its users meet it: certificates by kubectl, requests by curl, statuses that say what is wrong.

use crate::cluster::{Cluster, json};
use crate::{Outcome, Test};
use std::io::{BufRead, BufReader};
use std::sync::atomic::{AtomicBool, Ordering};

pub const TESTS: &[Test] = &[
    ("gateway_serves_https_routes_and_ingresses", https),
    ("gateway_says_what_is_wrong", wrong),
    ("gateway_spreads_requests_as_policies_say", spread),
    ("gateway_passes_events_on_as_they_come", events),
    ("gateway_changes_routes_and_certificates_under_load", changes),
];

/// A pod that serves its name over HTTP, and its Service.
fn web(ns: &str, name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {ns}, labels: {{app: {name}}}}}\n\
         spec:\n  terminationGracePeriodSeconds: 0\n  containers:\n  - name: main\n    image: 127.0.0.1:5000/test/busybox:1\n    \
         command: [sh, -c, 'mkdir /tmp/w && echo {name} > /tmp/w/index.html && exec httpd -f -p 8080 -h /tmp/w']\n\
         ---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {ns}}}\n\
         spec: {{selector: {{app: {name}}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n---\n"
    )
}

/// A self-signed certificate for a name, as a Secret; its file for clients.
fn certificate(c: &Cluster, ns: &str, secret: &str, name: &str) -> String {
    let (crt, key) = (c.scratch(&format!("{ns}-{secret}.crt")), c.scratch(&format!("{ns}-{secret}.key")));
    let made = std::process::Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
        .args(["-subj", &format!("/CN={name}"), "-addext", &format!("subjectAltName=DNS:{name}")])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&crt)
        .output()
        .expect("openssl runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let (crt_arg, key_arg) = (format!("--cert={}", crt.display()), format!("--key={}", key.display()));
    let yaml =
        c.kubectl(&["create", "secret", "tls", secret, "-n", ns, &crt_arg, &key_arg, "--dry-run=client", "-o", "yaml"]);
    c.apply(&yaml.good());
    crt.to_string_lossy().into_owned()
}

fn curl(c: &Cluster, args: &[&str]) -> String {
    let output = c.inside("curl").args(["-sS", "-m", "20"]).args(args).output().expect("curl runs");
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

fn https(c: &Cluster) -> Outcome {
    if c.inside("openssl").arg("version").output().is_err() {
        return Outcome::Skipped("openssl is not installed".into());
    }
    let ns = c.namespace("t-https");
    let ca = certificate(c, &ns, "cert", "a.test");
    c.apply(&(web(&ns, "one") + &web(&ns, "two")));
    c.apply(&format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: secure, namespace: {ns}}}\nspec:\n  \
         gatewayClassName: atoll\n  listeners:\n  - {{name: https, port: 8443, protocol: HTTPS, hostname: a.test, \
         tls: {{certificateRefs: [{{name: cert}}]}}}}\n---\n\
         apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r, namespace: {ns}}}\nspec:\n  \
         parentRefs: [{{name: secure}}]\n  rules:\n  - backendRefs: [{{name: one, port: 80}}]\n---\n\
         apiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {{name: i, namespace: {ns}}}\nspec:\n  \
         rules: [{{host: i.test, http: {{paths: [{{path: /, pathType: Prefix, \
         backend: {{service: {{name: two, port: {{name: http}}}}}}}}]}}}}]\n"
    ));
    c.wait_ready(&ns, "pod/one");
    c.wait_ready(&ns, "pod/two");
    c.kubectl(&["wait", "-n", &ns, "gateway/secure", "--for=condition=Programmed", "--timeout=60s"]).good();
    let secure = |ca: &str, more: &[&str]| {
        let args = [&["--cacert", ca, "--resolve", "a.test:8443:127.0.0.1"], more, &["https://a.test:8443/"]].concat();
        curl(c, &args)
    };
    c.until("the route is served over TLS", || secure(&ca, &[]) == "one\n");
    assert!(secure(&ca, &["-w", "%{http_version}"]).ends_with('2'));
    assert!(curl(c, &["-i", "-H", "Host: a.test", "http://127.0.0.1:8080/"]).starts_with("HTTP/1.1 404"));
    c.until("the ingress is served", || curl(c, &["-H", "Host: i.test", "http://127.0.0.1:8080/"]) == "two\n");
    let status = c.kubectl(&["get", "ingress", "-n", &ns, "i", "-o", "jsonpath={.status.loadBalancer.ingress[0].ip}"]);
    assert_eq!(status.good(), "127.0.0.1");
    // A new certificate is used without a restart.
    let newer = certificate(c, &ns, "cert", "a.test");
    c.until("the new certificate is used", || secure(&newer, &[]) == "one\n");
    let text = curl(c, &["-k", "--resolve", "b.test:8443:127.0.0.1", "https://b.test:8443/"]);
    assert!(text.contains("curl:"), "{text}");
    Outcome::Passed
}

fn route(ns: &str, host: &str, backend: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {backend}, namespace: {ns}}}\nspec:\n  \
         parentRefs: [{{name: atoll, namespace: default}}]\n  hostnames: [{host}]\n  rules:\n  \
         - backendRefs: [{{name: {backend}, port: 80}}]\n---\n"
    )
}

fn spread(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-spread");
    for name in ["one", "two"] {
        c.apply(&web(&ns, name).replace("labels: {app:", "labels: {tier: pool, app:"));
    }
    let policy = |name: &str, balancing: &str| {
        format!(
            "apiVersion: gateway.atoll.dev/v1alpha1\nkind: BackendPolicy\nmetadata: {{name: {name}, namespace: {ns}}}\n\
             spec:\n  targetRefs: [{{kind: Service, name: pool}}]\n  balancing: {{{balancing}}}\n"
        )
    };
    let service = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: pool, namespace: {ns}}}\n\
         spec: {{selector: {{tier: pool}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n---\n"
    );
    c.apply(&(service + &route(&ns, "pool.test", "pool") + &policy("p", "algorithm: RoundRobin")));
    c.wait_ready(&ns, "pod/one");
    c.wait_ready(&ns, "pod/two");
    c.kubectl(&["wait", "-n", &ns, "backendpolicy/p", "--for=condition=Accepted", "--timeout=60s"]).good();
    let ask = |header: &str| curl(c, &["-H", "Host: pool.test", "-H", header, "http://127.0.0.1:8080/"]);
    let ten = |header: &str| (0..10).map(|_| ask(header)).collect::<Vec<_>>();
    c.until("both take turns", || {
        let said = ten("X: y");
        said.iter().filter(|text| *text == "one\n").count() == 5
            && said.iter().filter(|text| *text == "two\n").count() == 5
    });
    c.apply(&policy("p", "algorithm: Hash, hash: {by: Header, name: x-user}"));
    let homes = || -> Vec<Vec<String>> { (0..12).map(|user| ten(&format!("x-user: {user}"))).collect() };
    let steady = |homes: &Vec<Vec<String>>| homes.iter().all(|said| said.iter().all(|text| *text == said[0]));
    c.until("a user stays where it is, and not all at one", || {
        let homes = homes();
        steady(&homes) && homes.iter().any(|said| said[0] == "one\n") && homes.iter().any(|said| said[0] == "two\n")
    });
    // Of two policies the older one counts, and the younger says so.
    c.apply(&policy("q", "algorithm: LeastRequest"));
    c.until("the younger policy says that it does not count", || {
        let path = "jsonpath={.status.conditions[0].reason}";
        c.kubectl(&["get", "backendpolicy", "-n", &ns, "q", "-o", path]).out == "Conflicted"
    });
    let said = c.kubectl_with(&["apply", "-f", "-"], &policy("r", "algorithm: Hash")).bad();
    assert!(said.contains("spec.balancing.hash"), "{said}");
    let said = c.kubectl_with(&["apply", "-f", "-"], &policy("r", "algorithm: Best")).bad();
    assert!(said.contains("spec.balancing.algorithm") && said.contains("RoundRobin"), "{said}");
    Outcome::Passed
}

/// Server-sent events: what was said is there before more is said.
fn events(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-events");
    let script = "while read -r line && [ ${#line} -gt 1 ]; do :; done; \
                  printf 'HTTP/1.1 200 OK\\r\\ncontent-type: text/event-stream\\r\\n\\r\\ndata: first\\n\\n'; \
                  while [ ! -e /tmp/go ]; do sleep 0.1; done; printf 'data: last\\n\\n'";
    let pod = web(&ns, "feed");
    let serve = "mkdir /tmp/w && echo feed > /tmp/w/index.html && exec httpd -f -p 8080 -h /tmp/w";
    assert!(pod.contains(serve));
    let script_file = "printf %s \"$SCRIPT\" > /tmp/feed.sh && exec nc -ll -p 8080 -e sh /tmp/feed.sh";
    let pod = pod.replace(serve, script_file);
    let env = format!("    env: [{{name: SCRIPT, value: {}}}]\n---\n", serde_json::Value::from(script));
    c.apply(&(pod.replacen("---\n", &env, 1) + &route(&ns, "feed.test", "feed")));
    c.wait_ready(&ns, "pod/feed");
    let mut reading = c
        .inside("curl")
        .args(["-sSN", "--retry", "30", "--retry-all-errors", "--retry-delay", "1", "-f"])
        .args(["-H", "Host: feed.test", "http://127.0.0.1:8080/"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("curl runs");
    let mut lines = BufReader::new(reading.stdout.take().expect("piped")).lines().map_while(Result::ok);
    assert_eq!(lines.next().as_deref(), Some("data: first"), "the event comes while the answer goes on");
    assert!(reading.try_wait().expect("wait").is_none());
    c.kubectl(&["exec", "-n", &ns, "feed", "--", "touch", "/tmp/go"]).good();
    assert!(lines.any(|line| line == "data: last"));
    assert!(reading.wait().expect("wait").success());
    Outcome::Passed
}

/// Neither a change of routes nor one of certificates is noticed by who asks meanwhile.
fn changes(c: &Cluster) -> Outcome {
    for (tool, arg) in [("h2load", "--version"), ("openssl", "version")] {
        if !c.inside(tool).arg(arg).output().is_ok_and(|said| said.status.success()) {
            return Outcome::Skipped(format!("{tool} is not installed"));
        }
    }
    let ns = c.namespace("t-changes");
    certificate(c, &ns, "cert", "a.test");
    c.apply(&(web(&ns, "one") + &web(&ns, "two") + &route(&ns, "load.test", "one")));
    c.apply(&format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: secure, namespace: {ns}}}\nspec:\n  \
         gatewayClassName: atoll\n  listeners:\n  - {{name: https, port: 8443, protocol: HTTPS, hostname: load.test, \
         tls: {{certificateRefs: [{{name: cert}}]}}}}\n---\n{}",
        route(&ns, "load.test", "two").replace("atoll, namespace: default", "secure")
    ));
    c.wait_ready(&ns, "pod/one");
    c.wait_ready(&ns, "pod/two");
    let secure = ["-k", "--resolve", "load.test:8443:127.0.0.1", "https://load.test:8443/"];
    c.until("plain is served", || curl(c, &["-H", "Host: load.test", "http://127.0.0.1:8080/"]) == "one\n");
    c.until("TLS is served", || curl(c, &secure) == "two\n");
    let load = |more: &[&str]| {
        let mut command = c.inside("h2load");
        command.args(["-n", "3000", "-c", "8", "-H", ":authority: load.test"]).args(more).arg("http://127.0.0.1:8080/");
        command.stdout(std::process::Stdio::piped()).spawn().expect("h2load runs")
    };
    let asking = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let handshakes = scope.spawn(|| {
            let mut all = Vec::new();
            while asking.load(Ordering::Relaxed) {
                all.push(curl(c, &secure));
            }
            all
        });
        for flags in [&["--h1"][..], &["-m", "8"]] {
            let mut running = load(flags);
            for turn in 0.. {
                certificate(c, &ns, "cert", "load.test");
                let service = ["one", "two"][turn % 2];
                c.apply(&route(&ns, "load.test", "one").replace("name: one, port", &format!("name: {service}, port")));
                if turn > 2 && running.try_wait().expect("wait").is_some() {
                    break;
                }
            }
            let said = running.wait_with_output().expect("h2load ends").stdout;
            let said = String::from_utf8_lossy(&said);
            assert!(said.contains("3000 succeeded, 0 failed, 0 errored"), "{said}");
            assert!(said.contains("3000 2xx, 0 3xx, 0 4xx, 0 5xx"), "{said}");
        }
        asking.store(false, Ordering::Relaxed);
        let all = handshakes.join().expect("asked");
        assert!(!all.is_empty() && all.iter().all(|text| text == "two\n"), "{all:?}");
    });
    Outcome::Passed
}

fn wrong(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-gwbad");
    let route = |name: &str, backend: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}, namespace: {ns}}}\nspec:\n  \
             parentRefs: [{{name: atoll, namespace: default}}]\n  hostnames: [bad.test]\n  rules:\n  \
             - backendRefs: [{backend}]\n"
        )
    };
    c.apply(&route("a", "{name: gone, port: 80}"));
    let condition = |name: &str, kind: &str| {
        let said = c.kubectl(&["get", "httproute", "-n", &ns, name, "-o", "json"]).good();
        let route = json(&said);
        let conditions = route["status"]["parents"][0]["conditions"].as_array().cloned().unwrap_or_default();
        let found = conditions.into_iter().find(|condition| condition["type"] == kind);
        found.map(|found| {
            format!("{} {}", found["reason"].as_str().unwrap_or(""), found["message"].as_str().unwrap_or(""))
        })
    };
    c.until("the route says that its service is not there", || {
        condition("a", "ResolvedRefs").is_some_and(|text| text.contains("BackendNotFound") && text.contains("gone"))
    });
    let ask = || curl(c, &["-i", "-H", "Host: bad.test", "http://127.0.0.1:8080/"]);
    c.until("500 for a service that is not there", || ask().starts_with("HTTP/1.1 500"));
    c.apply(&format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: gone, namespace: {ns}}}\nspec: {{ports: [{{port: 80}}]}}\n"
    ));
    c.until("503 for one without endpoints", || {
        ask().contains("no ready endpoint") && ask().starts_with("HTTP/1.1 503")
    });
    c.apply(&route("b", "{name: gone, port: 80}"));
    c.until("the younger route says who has its requests", || {
        condition("b", "atoll.dev/Conflicted").is_some_and(|text| text.contains("OlderRouteWins"))
    });
    c.apply(&route("c", "{name: web, namespace: other, port: 80}").replace("bad.test", "worse.test"));
    c.until("no grant, no reference", || {
        condition("c", "ResolvedRefs").is_some_and(|text| text.contains("RefNotPermitted"))
    });
    let bad =
        route("d", "{name: gone, port: 80}").replace("rules:\n  -", "rules:\n  - matches: [{path: {value: no}}]\n   ");
    let said = c.kubectl_with(&["apply", "-f", "-"], &bad).bad();
    assert!(said.contains("spec.rules[0].matches[0].path.value"), "{said}");
    c.apply(&format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: g, namespace: {ns}}}\nspec:\n  \
         gatewayClassName: atoll\n  listeners:\n  - {{name: https, port: 8443, protocol: HTTPS, \
         tls: {{certificateRefs: [{{name: missing}}]}}}}\n"
    ));
    c.until("the listener says that its secret is not there", || {
        let said = c.kubectl(&["get", "gateway", "-n", &ns, "g", "-o", "jsonpath={.status.listeners[0].conditions}"]);
        said.out.contains("InvalidCertificateRef") && said.out.contains("missing")
    });
    Outcome::Passed
}
