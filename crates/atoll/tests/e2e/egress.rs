//! The way out: `atoll up --egress`, with a world beside the host. Each test stops the instance and starts it again with
//! what it needs.

use crate::cluster::{Cluster, sleeper};
use crate::life::{compare, host_state};
use crate::{Outcome, Test};
use rustix::process::Signal;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command};

pub const TESTS: &[Test] = &[("egress_nat_and_routed", egress), ("egress_user", egress_user)];

pub const HOST: &str = "203.0.113.2";
pub const WORLD: &str = "203.0.113.1";
const HOST6: &str = "2001:db8::2";
const WORLD6: &str = "2001:db8::1";

/// A network namespace behind the host's link `wan`, with a web server that tells clients their address.
pub struct World<'a> {
    c: &'a Cluster,
    pub netns: String,
    server: Option<Child>,
    server6: Option<Child>,
}

impl World<'_> {
    pub fn new(c: &Cluster) -> World<'_> {
        let netns = format!("atoll-e2e-world-{}", std::process::id());
        assert!(Command::new("ip").args(["netns", "add", &netns]).status().unwrap().success());
        let mut world = World { c, netns, server: None, server6: None };
        let host = |line: &str| c.host("ip", &line.split(' ').collect::<Vec<_>>()).good();
        host(&format!("link add wan type veth peer name eth0 netns {}", world.netns));
        c.host("sysctl", &["-qw", "net.ipv6.conf.wan.disable_ipv6=1"]).good();
        host(&format!("address add {HOST}/24 dev wan"));
        host("link set wan up");
        for line in ["link set lo up", "address add 203.0.113.1/24 dev eth0", "link set eth0 up"] {
            assert!(world.command("ip").args(line.split(' ')).status().unwrap().success(), "{line}");
        }
        host(&format!("route add default via {WORLD}"));
        let route = format!("route add 10.42.0.0/16 via {HOST}");
        assert!(world.command("ip").args(route.split(' ')).status().unwrap().success());
        let root = c.scratch("world");
        fs::create_dir_all(root.join("cgi-bin")).unwrap();
        fs::write(root.join("cgi-bin/who"), "#!/bin/sh\necho\necho $REMOTE_ADDR\n").unwrap();
        fs::set_permissions(root.join("cgi-bin/who"), fs::Permissions::from_mode(0o755)).unwrap();
        let server =
            world.command("/bin/busybox").args(["httpd", "-f", "-p", "203.0.113.1:80", "-h"]).arg(&root).spawn();
        world.server = Some(server.unwrap());
        world
    }

    /// IPv6 on both ends, and a server there too.
    fn with_ipv6(&mut self) {
        let host = |line: &str| self.c.host("ip", &line.split(' ').collect::<Vec<_>>()).good();
        host("link set wan addrgenmode none");
        self.c.host("sysctl", &["-qw", "net.ipv6.conf.wan.disable_ipv6=0"]).good();
        for address in ["fe80::a", HOST6] {
            host(&format!("-6 address add {address}/64 dev wan nodad"));
        }
        host(&format!("-6 route add default via {WORLD6}"));
        for line in [
            "-6 address add fe80::b/64 dev eth0 nodad",
            &format!("-6 address add {WORLD6}/64 dev eth0 nodad"),
            &format!("-6 route add fd00:10:42::/64 via {HOST6}"),
        ] {
            assert!(self.command("ip").args(line.split(' ')).status().unwrap().success(), "{line}");
        }
        let root = self.c.scratch("world");
        let server =
            self.command("/bin/busybox").args(["httpd", "-f", "-p", "[2001:db8::1]:80", "-h"]).arg(&root).spawn();
        self.server6 = Some(server.unwrap());
    }

    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.netns)).arg("--").arg(program);
        command
    }
}

impl Drop for World<'_> {
    fn drop(&mut self) {
        for mut server in self.server.take().into_iter().chain(self.server6.take()) {
            let _ = server.kill();
            let _ = server.wait();
        }
        // Both ends go, and the host's routes with them. With the namespace alone they would go some time later.
        self.c.host("ip", &["link", "del", "wan"]);
        let _ = Command::new("ip").args(["netns", "del", &self.netns]).status();
    }
}

/// Who the world says that the pod is; empty where there is no way.
pub fn who(c: &Cluster, namespace: &str) -> String {
    asked(c, namespace, WORLD)
}

fn asked(c: &Cluster, namespace: &str, server: &str) -> String {
    let line = format!("printf 'GET /cgi-bin/who HTTP/1.0\\r\\n\\r\\n' | nc -w 3 {server} 80 | tail -n 1");
    let said = c.kubectl(&["exec", "-n", namespace, "pod", "--", "sh", "-c", &line]).out;
    said.trim().trim_matches(['[', ']']).to_owned()
}

/// Whether the kernel lets IPv6 pass and the host stay a host; if not, that is said.
fn forwards6(c: &Cluster) -> bool {
    let there = c.host("sysctl", &["-n", "net.ipv6.conf.all.force_forwarding"]).ok;
    if !there {
        println!("    IPv6 by routed not tried: this kernel has no force_forwarding (Linux 6.17)");
    }
    there
}

/// `block`: what is in `ipBlock` after `cidr`, in YAML.
pub fn let_out(namespace: &str, block: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: out, namespace: {namespace}}}\nspec:\n  \
         podSelector: {{}}\n  policyTypes: [Egress]\n  egress: [{{to: [{{ipBlock: {{cidr: {block}}}}}]}}]\n"
    )
}

fn egress(c: &Cluster) -> Outcome {
    let mut world = World::new(c);
    world.with_ipv6();
    let down = || c.atoll(&["down", "--data-dir", &c.data().to_string_lossy()]).good();
    c.clear();
    c.stop(Signal::TERM);
    down();
    let before = host_state(c);
    c.up_with(&["--egress", "nat"], &[]);
    let ns = c.namespace("t-egress");
    c.apply(&sleeper("pod", &ns));
    c.wait_ready(&ns, "pod/pod");
    let pod = c.kubectl(&["get", "pod", "-n", &ns, "pod", "-o", "jsonpath={.status.podIP}"]).good();
    let explain = || {
        c.atoll(&[
            "network",
            "explain",
            "--data-dir",
            &c.data().to_string_lossy(),
            &format!("{ns}/pod"),
            WORLD,
            "--port",
            "80",
        ])
    };
    assert_eq!(who(c, &ns), "", "no policy lets it out");
    assert!(explain().out.contains("is refused"), "{}", explain().out);
    c.apply(&let_out(&ns, "0.0.0.0/0"));
    c.until("the policy lets it out", || who(c, &ns) == HOST);
    assert!(explain().good().contains("passes"));
    // The host's own addresses are not outside.
    let own = c.kubectl(&["exec", "-n", &ns, "pod", "--", "nc", "-w", "3", "-z", HOST, "7443"]);
    assert!(!own.ok, "{}", own.out);
    // Another address of the host for this namespace.
    let bad = c.kubectl(&["annotate", "namespace", &ns, "atoll.dev/egress-address=nowhere"]).bad();
    assert!(bad.contains("metadata.annotations[atoll.dev/egress-address]") && bad.contains("\"nowhere\""), "{bad}");
    c.host("ip", &["address", "add", "203.0.113.7/24", "dev", "wan"]).good();
    c.kubectl(&["annotate", "namespace", &ns, "atoll.dev/egress-address=203.0.113.7"]).good();
    c.until("the namespace has its address outside", || who(c, &ns) == "203.0.113.7");
    assert_eq!(asked(c, &ns, WORLD6), "", "the policy is about IPv4");
    c.apply(&let_out(&ns, "'::/0'"));
    c.until("the policy lets it out in IPv6", || asked(c, &ns, WORLD6) == HOST6);
    let deprecated = ["2001:db8::7/64", "dev", "wan", "nodad", "preferred_lft", "0"];
    c.host("ip", &[&["-6", "address", "add"][..], &deprecated].concat()).good();
    let both = "atoll.dev/egress-address=203.0.113.7,2001:db8::7";
    c.kubectl(&["annotate", "--overwrite", "namespace", &ns, both]).good();
    c.until("the namespace has its IPv6 address outside", || asked(c, &ns, WORLD6) == "2001:db8::7");
    c.apply(&let_out(&ns, "0.0.0.0/0"));
    c.until("and its IPv4 address", || who(c, &ns) == "203.0.113.7");
    c.kubectl(&["annotate", "namespace", &ns, "atoll.dev/egress-address-"]).good();
    c.host("ip", &["address", "del", "203.0.113.7/24", "dev", "wan"]).good();
    c.host("ip", &["-6", "address", "del", "2001:db8::7/64", "dev", "wan"]).good();
    // Killed: what is open goes on without it, and the next one finds everything.
    c.stop(Signal::KILL);
    c.up_with(&["--egress", "nat"], &[]);
    c.until("out again", || who(c, &ns) == HOST);
    c.apply(&let_out(&ns, "192.0.2.0/24"));
    c.until("the policy names other addresses", || who(c, &ns).is_empty());
    c.apply(&let_out(&ns, "203.0.113.0/24"));
    c.stop(Signal::TERM);
    c.up_with(&["--egress", "routed"], &[]);
    c.until("routed keeps the pod's address", || who(c, &ns) == pod);
    if forwards6(c) {
        c.apply(&let_out(&ns, "'2001:db8::/64'"));
        let six = "jsonpath={.status.podIPs[1].ip}";
        let six = c.kubectl(&["get", "pod", "-n", &ns, "pod", "-o", six]).good();
        c.until("in IPv6 too", || asked(c, &ns, WORLD6) == six);
    }
    c.stop(Signal::TERM);
    down();
    compare(&before, &host_state(c), "after atoll down");
    c.up();
    c.wait_ready(&ns, "pod/pod");
    assert_eq!(who(c, &ns), "", "without --egress nothing gets out");
    compare(&before, &host_state(c), "without --egress");
    drop(world);
    Outcome::Passed
}

/// The process of the relay that this instance started.
fn relay(c: &Cluster) -> Option<u32> {
    let inode = c.host("stat", &["-Lc", "%i", "/proc/self/ns/net"]).good();
    let host = format!("\"host\":{},", inode.trim());
    fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let line = String::from_utf8_lossy(&fs::read(entry.path().join("cmdline")).ok()?).into_owned();
        let pid = entry.file_name().to_str()?.parse().ok()?;
        (line.contains("egress-relay") && line.contains(&host)).then_some(pid)
    })
}

/// The same by a process of Atoll's: the host stays as it is, to the letter.
fn egress_user(c: &Cluster) -> Outcome {
    let world = World::new(c);
    let down = || c.atoll(&["down", "--data-dir", &c.data().to_string_lossy()]).good();
    c.clear();
    c.stop(Signal::TERM);
    down();
    let before = host_state(c);
    c.up_with(&["--egress", "user"], &[]);
    let ns = c.namespace("t-egress-user");
    c.apply(&sleeper("pod", &ns));
    c.wait_ready(&ns, "pod/pod");
    assert_eq!(who(c, &ns), "", "no policy lets it out");
    c.apply(&let_out(&ns, "0.0.0.0/0"));
    c.until("the policy lets it out", || who(c, &ns) == HOST);
    compare(&before, &host_state(c), "with --egress user");
    // Neither the host's own ports, Atoll's among them, nor where clouds keep their secrets.
    for (address, port) in [(HOST, "7443"), (HOST, "5000"), ("169.254.169.254", "80"), ("169.254.1.1", "15001")] {
        let tried = c.kubectl(&["exec", "-n", &ns, "pod", "--", "nc", "-w", "3", address, port]);
        assert!(!tried.ok, "{address}:{port}: {}", tried.out);
    }
    let pid = relay(c).expect("the relay runs");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert!(field("Uid:").split(' ').chain(field("Gid:").split(' ')).all(|id| id.starts_with("2098")));
    assert_eq!(["CapEff:", "CapPrm:", "CapInh:", "CapAmb:"].map(field), ["0000000000000000"; 4].map(str::to_owned));
    assert_eq!(["NoNewPrivs:", "Seccomp:", "Threads:"].map(field), ["1", "2", "1"].map(str::to_owned));
    assert_eq!(fs::read_dir(format!("/proc/{pid}/root")).unwrap().count(), 0, "its root is empty");
    c.host("ip", &["address", "add", "203.0.113.7/24", "dev", "wan"]).good();
    c.kubectl(&["annotate", "namespace", &ns, "atoll.dev/egress-address=203.0.113.7"]).good();
    c.until("the namespace has its address outside", || who(c, &ns) == "203.0.113.7");
    c.kubectl(&["annotate", "namespace", &ns, "atoll.dev/egress-address-"]).good();
    c.host("ip", &["address", "del", "203.0.113.7/24", "dev", "wan"]).good();
    // The daemon killed: the relay goes on, and is found again. The relay killed: another comes.
    c.stop(Signal::KILL);
    c.up_with(&["--egress", "user"], &[]);
    c.until("out again", || who(c, &ns) == HOST);
    assert_eq!(relay(c), Some(pid));
    let process = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(process, Signal::KILL).unwrap();
    c.until("another relay", || relay(c).is_some_and(|new| new != pid));
    c.until("out again", || who(c, &ns) == HOST);
    c.apply(&let_out(&ns, "192.0.2.0/24"));
    c.until("the policy names other addresses", || who(c, &ns).is_empty());
    c.stop(Signal::TERM);
    down();
    assert!(relay(c).is_none(), "the relay has ended");
    compare(&before, &host_state(c), "after atoll down");
    c.up();
    drop(world);
    Outcome::Passed
}
