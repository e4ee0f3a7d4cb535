//! `atoll up` killed at any moment of 500 changes, with allowed traffic flowing: afterwards the kernel holds what is wanted,
//! and the traffic never stopped.

use crate::cluster::{Cluster, Said, json};
use crate::{Outcome, Test};
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

pub const TESTS: &[Test] = &[("killed_in_the_middle_of_500_changes", killed)];

const ROUNDS: usize = 25;
const CHANGES: usize = 20;

fn killed(c: &Cluster) -> Outcome {
    if !c.inside("sh").args(["-c", "command -v nft >/dev/null"]).status().is_ok_and(|status| status.success()) {
        return Outcome::Skipped("nft is not installed".into());
    }
    let ns = c.namespace("t-crash");
    c.apply(&pod(&ns, "web", "mkdir /tmp/w; echo here > /tmp/w/index.html; exec httpd -f -p 8000 -h /tmp/w"));
    c.apply(&service(&ns, "web", "web"));
    c.wait_ready(&ns, "pod/web");
    let field = |what: &str, path: &str| c.kubectl(&["get", "-n", &ns, what, "-o", path]).good();
    let (web, address) =
        (field("pod/web", "jsonpath={.status.podIP}"), field("service/web", "jsonpath={.spec.clusterIP}"));
    let call =
        |host: &str, port: u16| format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 10 {host} {port} | grep -q here");
    // The policy that lets it through stays; all others come and go around it.
    c.apply(&policy(&ns, "caller", "web", "caller", 8000));
    let (direct, through) = (call(&web, 8000), call(&address, 80));
    let calls = format!(
        "until {direct} && {through}; do sleep 1; done; echo begun; while true; do {direct} || echo STOPPED direct; \
         {through} || echo STOPPED service; echo called; done"
    );
    c.apply(&pod(&ns, "caller", &calls));
    let logs = || c.kubectl(&["logs", "-n", &ns, "caller"]).out;
    c.until("traffic flows", || logs().contains("begun"));
    for round in 0..ROUNDS {
        let mut change = c.inside("kubectl");
        let change = change.args(["apply", "-f", "-"]).stdin(Stdio::piped());
        let mut change = change.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("kubectl runs");
        let text = changes(&ns, round);
        std::io::Write::write_all(&mut change.stdin.take().expect("stdin"), text.as_bytes()).expect("kubectl reads");
        // The moment is meant to be any.
        std::thread::sleep(Duration::from_millis(40 + (round as u64 * 97) % 500));
        c.stop(Signal::KILL);
        let _ = change.wait();
        c.up();
    }
    // The state that all runs end with.
    c.apply(&(0..ROUNDS).map(|round| changes(&ns, round)).collect::<String>());
    c.apply(&(service(&ns, "last", "web") + &policy(&ns, "last", "web", "last", 8001)));
    settled(c, &ns, &web);
    let told = logs();
    let stopped: Vec<&str> = told.lines().filter(|line| !["begun", "called"].contains(line)).collect();
    assert!(stopped.is_empty(), "allowed traffic stopped, in {} calls: {stopped:?}", told.matches("called").count());
    println!("{} calls during {} changes and {ROUNDS} kills", told.matches("called").count(), ROUNDS * CHANGES);
    let survived = kernel(c);
    // Nothing of it is kept: the same is written anew.
    c.stop(Signal::KILL);
    for family in ["ip", "ip6", "arp"] {
        nft(c, &["delete", "table", family, "atoll"]);
    }
    c.up();
    settled(c, &ns, &web);
    let mut fresh = kernel(c);
    if survived != fresh {
        let only = |these: &[String], those: &[String]| -> Vec<String> {
            these.iter().filter(|one| !those.contains(one)).map(|one| one.chars().take(600).collect()).collect()
        };
        println!("only before: {:#?}\nonly anew: {:#?}", only(&survived, &fresh), only(&fresh, &survived));
        c.until("the kernel holds what is wanted, with nothing left over", || {
            fresh = kernel(c);
            survived == fresh || {
                std::thread::sleep(Duration::from_secs(1));
                false
            }
        });
    }
    c.kubectl(&["delete", "namespace", &ns, "--wait=false"]).good();
    Outcome::Passed
}

fn pod(ns: &str, name: &str, command: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {ns}, labels: {{app: {name}}}}}\nspec:\n  \
         terminationGracePeriodSeconds: 0\n  containers:\n  - name: main\n    image: 127.0.0.1:5000/test/busybox:1\n    \
         command:\n    - sh\n    - -c\n    - |\n      {command}\n"
    )
}

fn service(ns: &str, name: &str, app: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {ns}}}\n\
         spec: {{selector: {{app: {app}}}, ports: [{{port: 80, targetPort: 8000}}]}}\n"
    )
}

fn policy(ns: &str, name: &str, to: &str, from: &str, port: usize) -> String {
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: {ns}}}\nspec:\n  \
         podSelector: {{matchLabels: {{app: {to}}}}}\n  ingress: [{{from: [{{podSelector: {{matchLabels: {{app: {from}}}}}}}], \
         ports: [{{port: {port}}}]}}]\n"
    )
}

/// Services, endpoints and policies, which later rounds change again; one pod in each.
fn changes(ns: &str, round: usize) -> String {
    let mut text = pod(ns, &format!("extra-{}", round % 5), "exec sleep 1000000");
    for n in 0..6 {
        let name = format!("s-{}", (round + n) % 15);
        text.push_str(&service(ns, &name, if round.is_multiple_of(2) { "web" } else { "nobody" }));
        text.push_str(&policy(ns, &format!("p-{}", (round * 6 + n) % 40), "web", &format!("client-{n}"), 9000 + round));
        text.push_str(&format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nmetadata: {{name: {name}-own, \
             namespace: {ns}, labels: {{kubernetes.io/service-name: {name}}}}}\nports: [{{name: '', port: {}, protocol: TCP}}]\n\
             endpoints: [{{addresses: [10.42.200.{}], conditions: {{ready: true}}}}]\n",
            8000 + round,
            n + 1
        ));
    }
    // The policy around which the others change is written again too.
    text + &policy(ns, "caller", "web", "caller", 8000)
}

/// Waits until the last of the changes is in the kernel.
fn settled(c: &Cluster, ns: &str, web: &str) {
    let last = c.kubectl(&["get", "service", "-n", ns, "last", "-o", "jsonpath={.spec.clusterIP}"]).good();
    let wanted = json(&c.kubectl(&["get", "pods", "-n", ns, "-o", "json"]).good());
    let pods = wanted["items"].as_array().expect("pods").len();
    c.until("all pods run", || {
        let args = ["get", "pods", "-n", ns, "--field-selector=status.phase=Running", "--no-headers"];
        c.kubectl(&args).out.lines().count() == pods
    });
    c.until("the last changes are in the kernel", || {
        let state = nft(c, &["list", "table", "ip", "atoll"]);
        state.contains(&format!("svc/{last}/"))
            && state.contains(&format!("NetworkPolicy {ns}/last"))
            && state.contains(web)
    });
}

fn nft(c: &Cluster, args: &[&str]) -> String {
    let pods = std::fs::read_dir("/run/atoll").expect("instances").flatten();
    let data = std::fs::canonicalize(c.data()).expect("data");
    let sum = std::process::Command::new("sh")
        .args(["-c", "printf %s \"$1\" | sha256sum | cut -c1-8", "sh"])
        .arg(&data)
        .output()
        .expect("sha256sum");
    let instance = String::from_utf8_lossy(&sum.stdout).trim().to_owned();
    let run = pods.map(|entry| entry.path()).find(|path| path.ends_with(&instance)).expect("the instance's directory");
    let router = format!("--net={}", run.join("netns/router").display());
    let mut command = std::process::Command::new("nsenter");
    Said::of(command.arg(router).arg("nft").args(args).output().expect("nft runs")).good()
}

/// The ruleset by what it means: names of ours that are numbers are replaced by what they name.
fn kernel(c: &Cluster) -> Vec<String> {
    let whole = json(&nft(c, &["-j", "-s", "list", "ruleset"]));
    let mut objects: Vec<Value> = whole["nftables"].as_array().expect("objects").clone();
    objects.iter_mut().for_each(tidy);
    let text = |value: &Value| value.to_string();
    let mut names: BTreeMap<String, String> = BTreeMap::new();
    for set in objects.iter().filter_map(|object| object.get("set")) {
        if let Some(name) = set["name"].as_str().filter(|name| name.starts_with("peers/")) {
            names.insert(format!("\"@{name}\""), format!("\"{}\"", text(&set["elem"]).replace('"', "'")));
        }
    }
    let replaced = |text: String, names: &BTreeMap<String, String>| {
        names.iter().fold(text, |text, (name, meaning)| text.replace(name.as_str(), meaning))
    };
    let mut chains: BTreeMap<String, String> = BTreeMap::new();
    for rule in objects.iter().filter_map(|object| object.get("rule")) {
        if let Some(chain) = rule["chain"].as_str().filter(|chain| chain.starts_with("policy/")) {
            let meaning = replaced(text(&rule["expr"]) + &text(&rule["comment"]), &names);
            chains.entry(format!("\"{chain}\"")).or_default().push_str(&meaning.replace('"', "'"));
        }
    }
    let is_ours = |name: &Value| name.as_str().is_some_and(|n| n.starts_with("peers/") || n.starts_with("policy/"));
    let mut all: Vec<String> = Vec::new();
    for object in &objects {
        let (kind, inner) = object.as_object().and_then(|fields| fields.iter().next()).expect("an object");
        if is_ours(&inner["name"]) || is_ours(&inner["chain"]) {
            all.push(format!("{kind} of {}", inner["family"]));
        } else {
            all.push(replaced(replaced(text(object), &names), &chains));
        }
    }
    all.sort();
    all
}

fn tidy(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.remove("handle");
            // A namespace's number and a port.
            if fields.get("comment") == Some(&Value::from("to the activator")) {
                fields.remove("expr");
            }
            // What is counted at the moment.
            if fields.get("name").and_then(Value::as_str).is_some_and(|name| name.ends_with("_of")) {
                fields.remove("elem");
            }
            // Numbers of namespaces: the values of one map and half of the keys of a set.
            let numbered = ["namespaces", "members"].iter().any(|name| fields.get("name") == Some(&Value::from(*name)));
            if let Some(Value::Array(elements)) = fields.get_mut("elem") {
                elements.sort_by_key(Value::to_string);
                if numbered {
                    *elements = vec![elements.len().into()];
                }
            }
            fields.values_mut().for_each(tidy);
        }
        Value::Array(items) => items.iter_mut().for_each(tidy),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}
