//! A machine whose image brings no configuration: a Linux network stack of its own behind a tap, which asks for its
//! addresses as any does.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;
use common::*;
use network::{AttachRequest, Attachment, GuestServer, Isolation, LinkKind, Place, Subnet, in_netns};
use rustix::fd::OwnedFd;
use std::net::{SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Another router serves as the maker of the guest's namespace and its tap device: frames are carried between the two.
struct Guest {
    lab: Lab,
    /// Where the guest's stack is; its interface is `eth0`.
    netns: PathBuf,
    machine: Attachment,
    stop: Arc<AtomicBool>,
    pump: Option<std::thread::JoinHandle<()>>,
    _server: GuestServer,
}

fn guest() -> Option<Guest> {
    guest_in(None)
}

/// A machine of this subnet.
fn guest_in(subnet: Option<&Subnet>) -> Option<Guest> {
    let (lab, lab2) = (lab()?, lab()?);
    if let Some(subnet) = subnet {
        lab.router().add_subnet(None, subnet).unwrap();
    }
    let place = Place { subnet: subnet.map(|subnet| subnet.name.clone()), moves: false };
    let machine = match lab.router().attach(&AttachRequest { kind: LinkKind::Tap, place, ..request("vm") }) {
        Err(error) if format!("{error:?}").contains("/dev/net/tun") => {
            println!("SKIPPED: no /dev/net/tun here");
            return None;
        }
        other => other.unwrap(),
    };
    lab.defaults(Isolation::Private);
    let server = GuestServer::start(lab.router()).unwrap();
    let netns = lab.dir.path().join("guest");
    std::fs::write(&netns, "").unwrap();
    let made = std::process::Command::new("unshare").args([&format!("--net={}", netns.display()), "true"]).status();
    assert!(made.unwrap().success());
    let near = lab.router().open_tap(machine.tap.as_ref().unwrap()).unwrap();
    let maker = lab2.router().attach(&AttachRequest { kind: LinkKind::Tap, ..request("far") }).unwrap();
    let device = maker.tap.unwrap();
    let far = lab2.router().open_tap(&device).unwrap();
    let there = netns.display().to_string();
    let (ok, text) = run(&lab2.router().netns_path(), "ip", &["link", "set", &device, "netns", &there, "name", "eth0"]);
    assert!(ok, "{text}");
    for command in [
        &["link", "set", "lo", "up"][..],
        &["link", "set", "eth0", "address", &machine.mac],
        &["link", "set", "eth0", "up"],
    ] {
        let (ok, text) = run(&netns, "ip", command);
        assert!(ok, "{text}");
    }
    let stop = Arc::new(AtomicBool::new(false));
    let its = stop.clone();
    let pump = std::thread::spawn(move || carry(&near, &far, &its));
    Some(Guest { lab, netns, machine, stop, pump: Some(pump), _server: server })
}

/// Frames from one tap to the other, and back.
fn carry(near: &OwnedFd, far: &OwnedFd, stop: &AtomicBool) {
    let mut buffer = vec![0; 65_600];
    while !stop.load(Ordering::Relaxed) {
        let mut idle = true;
        for (from, to) in [(near, far), (far, near)] {
            if let Ok(length) = rustix::io::read(from, &mut buffer) {
                idle = false;
                let _ = rustix::io::write(to, &buffer[..length]);
            }
        }
        if idle {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.pump.take().map(std::thread::JoinHandle::join);
        let _ = rustix::mount::unmount(&self.netns, rustix::mount::UnmountFlags::DETACH);
    }
}

/// A DHCP question from the guest's stack, and the answer to it. Asked again until it comes, as clients do.
fn ask(guest: &Guest, question: &[u8], from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    in_netns(&guest.netns, || {
        let mut answer = vec![0; 1500];
        let mut length = 0;
        eventually("an answer", || {
            let Ok(socket) = UdpSocket::bind(from) else { return false };
            socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            if socket.send_to(question, to).is_err() {
                return false;
            }
            socket.recv_from(&mut answer).map(|(got, _)| length = got).is_ok()
        });
        answer.truncate(length);
        answer
    })
    .unwrap()
}

#[test]
fn the_next_hop_is_announced_and_found() {
    let Some(guest) = guest() else { return };
    // The stack's own work: link-local address, solicitation, default route, neighbour discovery.
    eventually("a default route by router advertisement", || {
        run(&guest.netns, "ip", &["-6", "route", "show", "default"]).1.contains("default via fe80::1 dev eth0 proto ra")
    });
    let (_, addresses) = run(&guest.netns, "ip", &["-6", "-o", "addr", "show", "dev", "eth0", "scope", "global"]);
    assert_eq!(addresses, "", "addresses are told, not made up");
    gets_the_address6(&guest);
    let (ok, text) = run(&guest.netns, "ping", &["-6", "-c1", "-W3", "fd00:10:42::1"]);
    assert!(ok || text.contains("No such file"), "{text}");
}

fn gets_the_address6(guest: &Guest) {
    let (_, link) = run(&guest.netns, "ip", &["-o", "link", "show", "eth0"]);
    let index: u32 = link.split(':').next().unwrap().trim().parse().unwrap();
    // DHCPv6: who am I, for association 9.
    let question = [&[1, 7, 7, 7][..], &[0, 1, 0, 4, 0, 3, 0, 1], &[0, 3, 0, 12, 0, 0, 0, 9], &[0; 8]].concat();
    let to = SocketAddrV6::new("ff02::1:2".parse().unwrap(), 547, 0, index);
    let answer = ask(guest, &question, "[::]:546".parse().unwrap(), to.into());
    let address = guest.machine.address6.unwrap();
    assert_eq!(answer[..4], [2, 7, 7, 7]);
    assert!(answer.windows(16).any(|part| part == address.octets()), "{answer:?}");
    // With it the guest reaches the router, and the router the guest.
    let (ok, text) = run(&guest.netns, "ip", &["addr", "add", &format!("{address}/128"), "dev", "eth0", "nodad"]);
    assert!(ok, "{text}");
    let listener = in_netns(&guest.netns, || TcpListener::bind((address, 80)).unwrap()).unwrap();
    let stream = guest.lab.router().run(|| TcpStream::connect((address, 80))).unwrap().unwrap();
    assert_eq!(listener.accept().unwrap().1, stream.local_addr().unwrap());
}

#[test]
fn a_dhcp_client_gets_the_address() {
    let Some(guest) = guest() else { return };
    gets_the_address(&guest);
}

#[test]
fn a_dhcp_client_gets_an_address_of_its_subnet() {
    let six = Some("fd00:10:44:7::/64".parse().unwrap());
    let edge = Subnet { name: "default/edge".into(), cidr: "10.44.7.0/24".parse().unwrap(), cidr6: six };
    let Some(guest) = guest_in(Some(&edge)) else { return };
    assert_eq!(guest.machine.address.octets()[..3], [10, 44, 7]);
    gets_the_address(&guest);
    gets_the_address6(&guest);
}

fn gets_the_address(guest: &Guest) {
    if !std::process::Command::new("busybox").args(["udhcpc", "--help"]).output().is_ok_and(|o| o.status.success()) {
        println!("SKIPPED: no busybox udhcpc here");
        return;
    }
    let script = guest.lab.dir.path().join("script");
    let told = guest.lab.dir.path().join("told");
    let text = format!("#!/bin/sh\n[ \"$1\" = bound ] && env > {}\nexit 0\n", told.display());
    std::fs::write(&script, text).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(&script, mode).unwrap();
    let script = script.display().to_string();
    let client =
        ["udhcpc", "-i", "eth0", "-f", "-q", "-n", "-t", "20", "-T", "1", "-O", "mtu", "-O", "121", "-s", &script];
    let (ok, text) = run(&guest.netns, "busybox", &client);
    assert!(ok, "{text}");
    let told = std::fs::read_to_string(&told).unwrap();
    let address = guest.machine.address;
    for line in [
        format!("ip={address}"),
        "mask=32".into(),
        "router=169.254.1.1".into(),
        "dns=10.43.0.10".into(),
        "serverid=169.254.1.1".into(),
        "mtu=1500".into(),
    ] {
        assert!(told.lines().any(|found| found == line), "{line}: {told}");
    }
    assert!(told.contains("169.254.1.1/32 0.0.0.0 0.0.0.0/0 169.254.1.1"), "{told}");
    // What it was told works: the guest reaches a neighbour.
    for command in [
        &["addr", "add", &format!("{address}/32"), "dev", "eth0"][..],
        &["route", "add", "default", "via", "169.254.1.1", "dev", "eth0", "onlink"],
    ] {
        let (ok, text) = run(&guest.netns, "ip", command);
        assert!(ok, "{text}");
    }
    let pod = guest.lab.pod("pod");
    greet(&pod, 80, "pod");
    let answer = in_netns(&guest.netns, || call(pod.address, 80)).unwrap().unwrap();
    assert_eq!(answer, format!("pod {address}"));
    // A container is told nothing.
    let socket = in_netns(&netns(&pod), || UdpSocket::bind((pod.address, 68)).unwrap()).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let refused = socket.send_to(&[1; 300], (pod.gateway, 67)).and_then(|_| socket.recv_from(&mut [0; 999]));
    assert!(refused.is_err(), "{refused:?}");
}
