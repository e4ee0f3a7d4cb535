//! The gateway as its users meet it: certificates by kubectl, requests by curl, statuses that say what is wrong.

use crate::cluster::{Cluster, json};
use crate::{Outcome, Test};

pub const TESTS: &[Test] =
    &[("gateway_serves_https_routes_and_ingresses", https), ("gateway_says_what_is_wrong", wrong)];

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
