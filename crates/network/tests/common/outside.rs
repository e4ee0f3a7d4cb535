//! What lies behind a router: network namespaces of the test's own, which go with the values.

use super::run;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

pub struct Netns(PathBuf);

impl Netns {
    /// Its loopback is up.
    pub fn new(what: &str) -> Netns {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("atoll-t-{what}-{}-{number}", std::process::id());
        assert!(Command::new("ip").args(["netns", "add", &name]).status().unwrap().success());
        let netns = Netns(Path::new("/run/netns").join(name));
        ip(&netns, "link set lo up");
        netns
    }

    pub fn name(&self) -> &str {
        self.0.file_name().unwrap().to_str().unwrap()
    }
}

impl Deref for Netns {
    type Target = Path;
    fn deref(&self) -> &Path {
        &self.0
    }
}

impl AsRef<Path> for Netns {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", self.name()]).status();
    }
}

#[track_caller]
pub fn ip(netns: &Path, line: &str) {
    let (good, said) = run(netns, "ip", &line.split(' ').collect::<Vec<_>>());
    assert!(good, "ip {line}: {said}");
}

/// A host with a link, `wan`, to a world, whose end is `eth0`; both links are up and have these addresses (`ip address add`'s words)
/// and no others.
pub fn outside(of_host: &[String], of_world: &[String]) -> (Netns, Netns) {
    let (host, world) = (Netns::new("host"), Netns::new("world"));
    ip(&host, &format!("link add wan type veth peer name eth0 netns {}", world.name()));
    for (netns, link, addresses) in [(&host, "wan", of_host), (&world, "eth0", of_world)] {
        ip(netns, &format!("link set {link} addrgenmode none"));
        for address in addresses {
            ip(netns, &format!("address add {address} dev {link}"));
        }
        ip(netns, &format!("link set {link} up"));
    }
    (host, world)
}
