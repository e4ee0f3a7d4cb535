//! What the network is measured beside: a plain veth pair, loopback, and a Linux bridge with the iptables rules that Docker
//! and kube-proxy set.

use crate::ways::{PORT, Way};
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Namespaces that go with this.
pub struct Namespaces(Vec<String>);

impl Namespaces {
    pub fn none() -> Namespaces {
        Namespaces(Vec::new())
    }
    fn add(&mut self, end: &str) -> String {
        let name = format!("netbench-{}-{end}", std::process::id());
        ip(&format!("netns add {name}"));
        ip(&format!("-n {name} link set lo up"));
        self.0.push(name.clone());
        name
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.0 {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

fn ip(args: &str) {
    assert!(Command::new("ip").args(args.split(' ')).status().unwrap().success(), "ip {args}");
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(format!("/run/netns/{name}"))
}

fn at(address: [u8; 4]) -> SocketAddr {
    (Ipv4Addr::from(address), PORT).into()
}

/// Two namespaces joined by nothing but a veth pair; and one of them alone.
pub fn plain(own: &mut Namespaces) -> [Way; 2] {
    let names = [own.add("a"), own.add("b")];
    ip(&format!("link add nb0 netns {} type veth peer name nb1 netns {}", names[0], names[1]));
    for (index, name) in names.iter().enumerate() {
        ip(&format!("-n {name} addr add 192.0.2.{}/24 dev nb{index}", index + 1));
        ip(&format!("-n {name} link set nb{index} up"));
    }
    let [a, b] = names.map(|name| path(&name));
    [
        Way { name: "veth", from: a, to: b.clone(), at: at([192, 0, 2, 2]) },
        Way { name: "loopback", from: b.clone(), to: b, at: at([127, 0, 0, 1]) },
    ]
}

/// Pod to pod over a bridge, directly and through the last of `services` Services; `Err` says why there is none.
pub fn bridge(own: &mut Namespaces, services: u32) -> Result<[Way; 2], String> {
    let host = own.add("host");
    let pods = [own.add("c"), own.add("d")];
    ip(&format!("-n {host} link add br0 type bridge"));
    ip(&format!("-n {host} addr add 198.18.0.1/16 dev br0"));
    ip(&format!("-n {host} link set br0 up"));
    for (index, pod) in pods.iter().enumerate() {
        ip(&format!("-n {host} link add port{index} type veth peer name eth0 netns {pod}"));
        ip(&format!("-n {host} link set port{index} master br0 up"));
        ip(&format!("-n {pod} addr add 198.18.0.{}/16 dev eth0", index + 2));
        ip(&format!("-n {pod} link set eth0 up"));
        ip(&format!("-n {pod} route add default via 198.18.0.1"));
    }
    let sysctls = "sysctl -qw net.ipv4.ip_forward=1 net.bridge.bridge-nf-call-iptables=1";
    let set = inside(&host).args(sysctls.split(' ')).status();
    if !set.is_ok_and(|status| status.success()) {
        return Err("bridge-nf-call-iptables cannot be set".into());
    }
    let mut restore = inside(&host);
    let restore = restore.args(["iptables-legacy-restore"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut restore = restore.map_err(|error| format!("iptables-legacy-restore: {error}"))?;
    restore.stdin.take().unwrap().write_all(rules(services).as_bytes()).unwrap();
    let done = restore.wait_with_output().unwrap();
    if !done.status.success() {
        return Err(format!("iptables-legacy-restore: {}", String::from_utf8_lossy(&done.stderr)));
    }
    let [from, to] = pods.map(|pod| path(&pod));
    let service = (service_address(services - 1), PORT).into();
    Ok([
        Way { name: "bridge", from: from.clone(), to: to.clone(), at: at([198, 18, 0, 3]) },
        Way { name: "bridge_service", from, to, at: service },
    ])
}

fn inside(name: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{name}"));
    command
}

fn service_address(n: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x0a60_0001 + n)
}

/// The chains of Docker's bridge and of kube-proxy's iptables mode, with one endpoint for each Service.
fn rules(services: u32) -> String {
    let mut text = String::from(
        "*filter\n:INPUT ACCEPT\n:FORWARD DROP\n:OUTPUT ACCEPT\n:DOCKER-USER -\n:KUBE-FORWARD -\n:DOCKER-ISOLATION-STAGE-1 -\n:KUBE-SERVICES -\n",
    );
    text += "-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES\n-A FORWARD -j KUBE-FORWARD\n-A FORWARD -j DOCKER-USER\n-A FORWARD -j DOCKER-ISOLATION-STAGE-1\n";
    text += "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n";
    text += "-A DOCKER-ISOLATION-STAGE-1 -j RETURN\n-A DOCKER-USER -j RETURN\n";
    text += "-A FORWARD -o br0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n-A FORWARD -i br0 ! -o br0 -j ACCEPT\n-A FORWARD -i br0 -o br0 -j ACCEPT\nCOMMIT\n";
    text += "*nat\n:PREROUTING ACCEPT\n:INPUT ACCEPT\n:OUTPUT ACCEPT\n:POSTROUTING ACCEPT\n:KUBE-SERVICES -\n:KUBE-MARK-MASQ -\n:KUBE-POSTROUTING -\n";
    for n in 0..services {
        writeln!(text, ":KUBE-SVC-{n} -\n:KUBE-SEP-{n} -").unwrap();
    }
    text += "-A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\n-A POSTROUTING -j KUBE-POSTROUTING\n";
    text += "-A POSTROUTING -s 198.18.0.0/16 ! -o br0 -j MASQUERADE\n-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n";
    text += "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n-A KUBE-POSTROUTING -j MASQUERADE --random-fully\n";
    for n in 0..services {
        let address = service_address(n);
        writeln!(
            text,
            "-A KUBE-SERVICES -d {address}/32 -p tcp -m comment --comment \"default/s{n} cluster IP\" -m tcp --dport {PORT} -j KUBE-SVC-{n}\n\
             -A KUBE-SVC-{n} ! -s 198.18.0.0/16 -d {address}/32 -p tcp -m tcp --dport {PORT} -j KUBE-MARK-MASQ\n\
             -A KUBE-SVC-{n} -j KUBE-SEP-{n}\n\
             -A KUBE-SEP-{n} -s 198.18.0.3/32 -j KUBE-MARK-MASQ\n\
             -A KUBE-SEP-{n} -p tcp -m tcp -j DNAT --to-destination 198.18.0.3:{PORT}"
        )
        .unwrap();
    }
    text + "COMMIT\n"
}
