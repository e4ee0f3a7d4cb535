//! A container with CAP_NET_RAW and root in a machine try what they can: `attacker.c` writes frames by hand, against the
//! real binary. What counts is what the victims see: they listen to every frame on their links. A pod that has user ids of its own,
//! as all have by default, gets no packet socket by that capability: attacker and victims run with `hostUsers`.

use crate::cluster::Cluster;
use crate::egress::{HOST, World, let_out};
use crate::{Outcome, Test, snapshots};
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::process::{Child, Command};

pub const TESTS: &[Test] = &[("attacks_from_a_container", container), ("attacks_from_a_machine", machine)];

const IMAGE: &str = "127.0.0.1:5000/test/attacker:1";
const ATTACKER_KERNEL: &str = "test/attacker-kernel:1";
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

/// The router's neighbours and routes, which a workload must not change, but for links of others, which come and go.
fn router(c: &Cluster, workloads: &[&str]) -> String {
    let number = |address: &&str| address.parse::<Ipv4Addr>().unwrap().to_bits();
    let links: Vec<String> = workloads.iter().map(number).map(|number| format!("{number:08x}")).collect();
    let pid = c.up_pid();
    let look = |what: &[&str]| {
        let run = Command::new("nsenter").arg(format!("--net=/proc/{pid}/ns/net")).arg("ip").args(what).output();
        String::from_utf8_lossy(&run.unwrap().stdout).into_owned()
    };
    let all = [look(&["neigh"]), look(&["-6", "route"]), look(&["-4", "route"])].concat();
    let is_known = |line: &&str| !line.contains("dev veth") || links.iter().any(|link| line.contains(link.as_str()));
    all.lines().filter(is_known).collect::<Vec<_>>().join("\n")
}

/// Frames that a victim heard, by their marks.
fn heard(c: &Cluster, namespace: &str, name: &str) -> BTreeMap<String, usize> {
    let mut marks = BTreeMap::new();
    for line in c.kubectl(&["logs", "-n", namespace, name]).good().lines().filter(|line| *line != "listening") {
        *marks.entry(line.to_owned()).or_default() += 1;
    }
    marks
}

/// What is attacked: pods that hear all that comes, in two namespaces, and a world where a metadata server waits. Workloads
/// of the first namespace may talk to each other and to the world.
struct Field<'a> {
    c: &'a Cluster,
    world: Option<World<'a>>,
    secrets: Child,
    ns: String,
    other: String,
}

const EARS: [&str; 3] = ["attacker", "victim", "bystander"];

impl Field<'_> {
    fn new<'a>(c: &'a Cluster, name: &str) -> Field<'a> {
        let world = World::new(c);
        assert!(world.command("ip").args(["address", "add", METADATA, "dev", "eth0"]).status().unwrap().success());
        let root = c.scratch("world");
        let mut secrets = world.command("/bin/busybox");
        let secrets = secrets.args(["httpd", "-f", "-p", "169.254.169.254:80", "-h"]).arg(&root).spawn().unwrap();
        c.stop(Signal::TERM);
        c.up_with(&["--egress", "user"], &[]);
        let (ns, other) = (c.namespace(name), c.namespace(&format!("{name}-other")));
        let field = Field { c, world: Some(world), secrets, ns, other };
        c.apply(&field.ears().map(|(namespace, name)| ear(namespace, name, true)).concat());
        c.apply(&let_out(&field.ns, "0.0.0.0/0"));
        c.apply(&format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: own, namespace: {}}}\nspec:\n  \
             podSelector: {{}}\n  policyTypes: [Egress]\n  egress: [{{to: [{{podSelector: {{}}}}]}}]\n",
            field.ns
        ));
        for (namespace, name) in field.ears() {
            c.wait_ready(namespace, &format!("pod/{name}"));
            c.until("it listens", || c.kubectl(&["logs", "-n", namespace, name]).out.contains("listening"));
        }
        field
    }

    fn ears(&self) -> [(&str, &str); 4] {
        let [a, b, d] = EARS.map(|name| (self.ns.as_str(), name));
        [a, b, d, (&self.other, "stranger")]
    }

    /// By their IPv4 addresses.
    fn links(&self) -> Vec<String> {
        self.ears().map(|(namespace, name)| addresses(self.c, namespace, name)[0].clone()).to_vec()
    }

    /// In the pod `attacker`.
    fn attack(&self, args: &[&str]) -> String {
        let line = [&["exec", "-n", &self.ns, "attacker", "--", "/attacker"], args].concat();
        self.c.kubectl(&line).good()
    }

    fn strike(&self, own: &[String; 2], victim: &[String; 2]) -> Vec<String> {
        let stranger = addresses(self.c, &self.other, "stranger");
        let all = [&own[0], &victim[0], &stranger[0], &own[1], &victim[1], &stranger[1]];
        [&["strike".to_owned()][..], &all.map(Clone::clone)].concat()
    }

    /// The victim was told what it may be told, and nobody anything else.
    fn only_the_last_arrives(&self, attack: &dyn Fn(&[&str]) -> String, own: &[String; 2]) {
        let strike = self.strike(own, &addresses(self.c, &self.ns, "victim"));
        let strike: Vec<&str> = strike.iter().map(String::as_str).collect();
        // The last frames are honest: what was sent before them has been dealt with when they arrive.
        self.c.until("the last frames arrive", || {
            attack(&strike);
            let heard = heard(self.c, &self.ns, "victim");
            heard.contains_key("LAST") && heard.contains_key("LAST-6")
        });
        for (namespace, name) in self.ears() {
            let marks = heard(self.c, namespace, name);
            let attacks: Vec<&String> = marks.keys().filter(|mark| !mark.starts_with("LAST")).collect();
            assert!(attacks.is_empty(), "{name} was reached by {attacks:?}");
            assert!(name == "victim" || marks.is_empty(), "{name} heard {marks:?}");
        }
    }

    /// The node, Atoll's own ports, where clouds keep their secrets, and the other namespace: nothing but names.
    fn nothing_is_open_but_names(&self, attack: &dyn Fn(&[&str]) -> String) {
        let stranger = addresses(self.c, &self.other, "stranger");
        // A busy machine may answer later than a scan waits: what is open is found in the end, and never anything else.
        let scan = |targets: &[&str], open: &[String]| {
            self.c.until("the scan finds what may be found", || {
                let found = attack(&[&["scan"], targets].concat());
                let found: Vec<&str> = found.lines().map(str::trim).filter(|line| *line != "done").collect();
                assert!(found.iter().all(|line| open.iter().any(|known| known == line)), "{found:?}");
                found.len() == open.len()
            });
        };
        scan(&["203.0.113.1"], &["open 203.0.113.1 80".to_owned()]);
        let [v4, v6] = ["10.43.0.10", "fd00:10:43::a"];
        let targets = [HOST, METADATA, "169.254.1.1", "169.254.1.3", "10.42.0.1", "fd00:10:42::1", v4, v6];
        let targets = [&targets[..], &[&stranger[0], &stranger[1]]].concat();
        scan(&targets, &[format!("open {v4} 53"), format!("open {v6} 53")]);
    }

    fn end(mut self) {
        let _ = self.secrets.kill();
        let _ = self.secrets.wait();
        self.c.kubectl(&["delete", "namespace", &self.ns, &self.other]).good();
        self.c.stop(Signal::TERM);
        self.c.up();
        drop(self.world.take());
    }
}

fn container(c: &Cluster) -> Outcome {
    if let Err(why) = image(c) {
        return Outcome::Skipped(why);
    }
    let field = Field::new(c, "t-attacks");
    c.apply(&ear(&field.ns, "mapped", false));
    c.until("it gets no packet socket", || {
        c.kubectl(&["logs", "-n", &field.ns, "mapped"]).out.contains("packet socket: Operation not permitted")
    });
    let links = field.links();
    let links: Vec<&str> = links.iter().map(String::as_str).collect();
    let before = router(c, &links);
    let attack = |args: &[&str]| field.attack(args);
    field.only_the_last_arrives(&attack, &addresses(c, &field.ns, "attacker"));
    assert_eq!(router(c, &links), before, "neighbours and routes of the router");
    field.nothing_is_open_but_names(&attack);
    field.end();
    Outcome::Passed
}

/// The same from root in a machine, whose frames come by a tap from an engine. It is also a bad listener: in promiscuous
/// mode it hears nothing of what others say to each other.
fn machine(c: &Cluster) -> Outcome {
    let cache = match image(c).and_then(|()| snapshots::inputs()) {
        Ok(cache) => cache,
        Err(why) => return Outcome::Skipped(why),
    };
    let attacker = c.scratch("attacker").join("attacker");
    snapshots::guest(c, &cache, ATTACKER_KERNEL, &[(&attacker, "bin/attacker")]);
    let field = Field::new(c, "t-attacks-vm");
    let ns = &field.ns;
    c.apply(&snapshots::machine(ns, "m", ATTACKER_KERNEL));
    snapshots::up(c, ns, "m");
    let own = addresses_of_machine(c, ns, "m");
    let within = |line: &str| snapshots::told(c, ns, "m", line);
    within(&format!("ip -6 addr add {}/128 dev eth0; ip link set eth0 promisc on", own[1]));
    within("(/bin/attacker ear > /run/heard 2>&1 &)");
    // A console answers within seconds, or not: what takes longer is left in a file.
    let attack = |args: &[&str]| {
        within(&format!("rm -f /run/said; (/bin/attacker {} > /run/said 2>&1 &)", args.join(" ")));
        let mut said = String::new();
        snapshots::until("the attacker is done", || {
            said = within("cat /run/said");
            said.lines().any(|line| line.trim() == "done")
        });
        said
    };
    let links = field.links();
    let links: Vec<&str> = links.iter().map(String::as_str).chain([own[0].as_str()]).collect();
    let before = routes_and_fixed_neighbours(c, &links);
    field.only_the_last_arrives(&attack, &own);
    assert_eq!(routes_and_fixed_neighbours(c, &links), before, "fixed neighbours and routes of the router");
    let mac = within("cat /sys/class/net/eth0/address");
    for line in router(c, &links).lines().filter(|line| line.contains(&mac)) {
        let address = line.split(' ').next().unwrap_or_default();
        assert!(
            own.iter().any(|own| own == address) || address.starts_with("fe80::858:"),
            "the router believes {line}"
        );
    }
    field.nothing_is_open_but_names(&attack);

    let pod = addresses(c, ns, "attacker");
    let strike = |victim: &[String; 2]| {
        let strike = field.strike(&pod, victim);
        field.attack(&strike.iter().map(String::as_str).collect::<Vec<_>>());
    };
    strike(&addresses(c, ns, "victim"));
    snapshots::until("the machine hears what is said to it", || {
        strike(&own);
        let heard = within("cat /run/heard");
        let marks: Vec<&str> = heard.lines().map(str::trim).filter(|line| *line != "listening").collect();
        assert!(marks.iter().all(|mark| mark.starts_with("LAST")), "{marks:?}");
        marks.contains(&"LAST") && marks.contains(&"LAST-6")
    });
    within("killall attacker; (/bin/attacker ear > /run/heard 2>&1 &)");
    snapshots::until("it listens again", || within("cat /run/heard") == "listening");
    let before = heard(c, ns, "victim")["LAST"];
    c.until("the victim hears more", || {
        strike(&addresses(c, ns, "victim"));
        heard(c, ns, "victim")["LAST"] > before
    });
    assert_eq!(within("cat /run/heard"), "listening", "what others say to each other");
    c.kubectl(&["delete", "vm", "m", "-n", ns]).good();
    field.end();
    Outcome::Passed
}

fn addresses_of_machine(c: &Cluster, namespace: &str, name: &str) -> [String; 2] {
    let path = "jsonpath={.status.interfaces[0].ipAddresses[*]}";
    let said = c.kubectl(&["get", "vmi", "-n", namespace, name, "-o", path]).good();
    let all: Vec<String> = said.split_whitespace().map(str::to_owned).collect();
    all.try_into().unwrap_or_else(|all| panic!("{name} has {all:?}"))
}

/// Without what the router learned about a machine's own addresses, which it asks it for.
fn routes_and_fixed_neighbours(c: &Cluster, workloads: &[&str]) -> String {
    let learned = |line: &&str| line.contains("lladdr") && !line.contains("PERMANENT") || line.contains("FAILED");
    router(c, workloads).lines().filter(|line| !learned(line)).collect::<Vec<_>>().join("\n")
}
