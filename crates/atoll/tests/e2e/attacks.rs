//! A container with CAP_NET_RAW tries what it can: `attacker.c` writes frames by hand, in a pod, against the real binary.
//! What counts is what the victims see: they listen to every frame on their links. A pod that has user ids of its own,
//! as all have by default, gets no packet socket by that capability: attacker and victims run with `hostUsers`.

use crate::cluster::Cluster;
use crate::egress::{HOST, World, let_out};
use crate::{Outcome, Test};
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

pub const TESTS: &[Test] = &[("attacks_from_a_container", container)];

const IMAGE: &str = "127.0.0.1:5000/test/attacker:1";
const METADATA: &str = "169.254.169.254";

/// Compiles the attacker and makes an image of it; what is missing, otherwise.
fn image(c: &Cluster) -> Result<(), String> {
    let root = c.scratch("attacker");
    fs::create_dir_all(&root).unwrap();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/attacker.c");
    let built = Command::new("cc").args(["-static", "-O1", "-o"]).arg(root.join("attacker")).arg(source).output();
    match built {
        Err(error) => return Err(format!("cc: {error}")),
        Ok(output) if !output.status.success() => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(format!("cc makes no static program here: {}", said.lines().last().unwrap_or_default()));
        }
        Ok(_) => {}
    }
    let tar = c.scratch("attacker.tar");
    let mut pack = Command::new("tar");
    pack.arg("-C").arg(&root).arg("-cf").arg(&tar).args(["--owner=0", "--group=0", "."]);
    assert!(pack.status().unwrap().success());
    let (data, tar) = (c.data(), tar.to_string_lossy().into_owned());
    let data = data.to_string_lossy();
    c.atoll(&["image", "import", "--data-dir", &data, &tar, "--tag", IMAGE, "--cmd", "/attacker", "--cmd", "ear"])
        .good();
    Ok(())
}

/// A pod that hears all that comes by its link.
fn ear(namespace: &str, name: &str, host_users: bool) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  hostUsers: {host_users}\n  \
         restartPolicy: Never\n  terminationGracePeriodSeconds: 0\n  containers:\n  - name: main\n    image: {IMAGE}\n    \
         securityContext: {{capabilities: {{add: [NET_RAW]}}}}\n---\n"
    )
}

/// Both addresses of a pod.
fn addresses(c: &Cluster, namespace: &str, name: &str) -> [String; 2] {
    let path = "jsonpath={.status.podIPs[*].ip}";
    let said = c.kubectl(&["get", "pod", "-n", namespace, name, "-o", path]).good();
    let all: Vec<String> = said.split_whitespace().map(str::to_owned).collect();
    all.try_into().unwrap_or_else(|all| panic!("{name} has {all:?}"))
}

/// The router's neighbours and IPv6 routes, which a workload must not change.
fn router(c: &Cluster) -> String {
    let pid = c.up_pid();
    let look = |what: &[&str]| {
        let run = Command::new("nsenter").arg(format!("--net=/proc/{pid}/ns/net")).arg("ip").args(what).output();
        String::from_utf8_lossy(&run.unwrap().stdout).into_owned()
    };
    [look(&["neigh"]), look(&["-6", "route"]), look(&["-4", "route"])].concat()
}

/// Frames that a victim heard, by their marks.
fn heard(c: &Cluster, namespace: &str, name: &str) -> BTreeMap<String, usize> {
    let mut marks = BTreeMap::new();
    for line in c.kubectl(&["logs", "-n", namespace, name]).good().lines().filter(|line| *line != "listening") {
        *marks.entry(line.to_owned()).or_default() += 1;
    }
    marks
}

fn container(c: &Cluster) -> Outcome {
    if let Err(why) = image(c) {
        return Outcome::Skipped(why);
    }
    let world = World::new(c);
    assert!(world.command("ip").args(["address", "add", METADATA, "dev", "eth0"]).status().unwrap().success());
    let root = c.scratch("world");
    let mut secrets = world.command("/bin/busybox");
    let mut secrets = secrets.args(["httpd", "-f", "-p", "169.254.169.254:80", "-h"]).arg(&root).spawn().unwrap();
    c.stop(Signal::TERM);
    c.up_with(&["--egress", "user"], &[]);
    let (ns, other) = (c.namespace("t-attacks"), c.namespace("t-attacks-other"));
    let all = [(&ns, "attacker"), (&ns, "victim"), (&ns, "bystander"), (&other, "stranger")];
    c.apply(&all.map(|(namespace, name)| ear(namespace, name, true)).concat());
    c.apply(&ear(&ns, "mapped", false));
    c.apply(&let_out(&ns, "0.0.0.0/0"));
    let own = format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: own, namespace: {ns}}}\nspec:\n  \
         podSelector: {{}}\n  policyTypes: [Egress]\n  egress: [{{to: [{{podSelector: {{}}}}]}}]\n"
    );
    c.apply(&own);
    c.until("it gets no packet socket", || {
        c.kubectl(&["logs", "-n", &ns, "mapped"]).out.contains("packet socket: Operation not permitted")
    });
    for (namespace, name) in all {
        c.wait_ready(namespace, &format!("pod/{name}"));
        c.until("it listens", || c.kubectl(&["logs", "-n", namespace, name]).out.contains("listening"));
    }
    let [attacker, victim, stranger] = [(&ns, "attacker"), (&ns, "victim"), (&other, "stranger")]
        .map(|(namespace, name)| addresses(c, namespace, name));
    let attack = |args: &[&str]| {
        let line = [&["exec", "-n", &ns, "attacker", "--", "/attacker"], args].concat();
        c.kubectl(&line).good()
    };
    let before = router(c);
    let strike = ["strike", &attacker[0], &victim[0], &stranger[0], &attacker[1], &victim[1], &stranger[1]];
    // The last frames are honest: what was sent before them has been dealt with when they arrive.
    c.until("the last frames arrive", || {
        attack(&strike);
        let heard = heard(c, &ns, "victim");
        heard.contains_key("LAST") && heard.contains_key("LAST-6")
    });
    for (namespace, name) in all {
        let marks = heard(c, namespace, name);
        let attacks: Vec<&String> = marks.keys().filter(|mark| !mark.starts_with("LAST")).collect();
        assert!(attacks.is_empty(), "{name} was reached by {attacks:?}");
        assert!(name == "victim" || marks.is_empty(), "{name} heard {marks:?}");
    }
    assert_eq!(router(c), before, "neighbours and routes of the router");
    // The node, Atoll's own ports, where clouds keep their secrets, and the other namespace: nothing but names.
    // A busy machine may answer later than a scan waits: what is open is found in the end, and never anything else.
    let scan = |targets: &[&str], open: &[String]| {
        c.until("the scan finds what may be found", || {
            let found = attack(&[&["scan"], targets].concat());
            let found: Vec<&str> = found.lines().filter(|line| *line != "done").collect();
            assert!(found.iter().all(|line| open.iter().any(|known| known == line)), "{found:?}");
            found.len() == open.len()
        });
    };
    scan(&["203.0.113.1"], &["open 203.0.113.1 80".to_owned()]);
    let [v4, v6] = ["10.43.0.10", "fd00:10:43::a"];
    let targets = [HOST, METADATA, "169.254.1.1", "169.254.1.3", "10.42.0.1", "fd00:10:42::1", v4, v6];
    let targets = [&targets[..], &[&stranger[0], &stranger[1]]].concat();
    scan(&targets, &[format!("open {v4} 53"), format!("open {v6} 53")]);
    let _ = secrets.kill();
    let _ = secrets.wait();
    c.kubectl(&["delete", "namespace", &ns, &other]).good();
    c.stop(Signal::TERM);
    c.up();
    drop(world);
    Outcome::Passed
}
