//! Workloads with addresses of subnets, in namespaces that the test makes.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use network::{AttachRequest, Attachment, Error, Misfit, Place, Protocol, Subnet, in_netns};
use rustix::fd::AsFd;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

fn subnet(name: &str, cidr: &str, cidr6: Option<&str>) -> Subnet {
    Subnet { name: name.into(), cidr: cidr.parse().unwrap(), cidr6: cidr6.map(|text| text.parse().unwrap()) }
}

fn from(uid: &str, name: &str) -> AttachRequest {
    AttachRequest { place: Place { subnet: Some(name.into()), moves: true }, ..request(uid) }
}

fn greet6(attachment: &Attachment, port: u16) {
    let listener = in_netns(&netns(attachment), || TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap()).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let peer = stream.peer_addr().unwrap().ip();
            let _ = stream.write_all(peer.to_string().as_bytes());
        }
    });
}

fn call6(from: &Attachment, to: Ipv6Addr, port: u16) -> std::io::Result<String> {
    let call = || {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::from((to, port)), Duration::from_secs(5))?;
        let mut text = String::new();
        stream.read_to_string(&mut text).map(|_| text)
    };
    in_netns(&netns(from), call).unwrap()
}

#[test]
fn workloads_of_different_subnets_reach_each_other_as_policies_say() {
    let Some(lab) = lab() else { return };
    lab.router().add_subnet(None, &subnet("default/edge", "10.44.1.0/28", None)).unwrap();
    lab.router().add_subnet(None, &subnet("default/six", "10.44.2.0/24", Some("fd00:10:44:7::/64"))).unwrap();
    let pods = [lab.pod("a"), lab.attach(&from("b", "default/edge")), lab.attach(&from("c", "default/six"))];
    let [a, b, c] = &pods;
    assert_eq!((b.address, c.address), (Ipv4Addr::new(10, 44, 1, 2), Ipv4Addr::new(10, 44, 2, 2)));
    assert_eq!(a.address.octets()[..2], [10, 42]);
    let sixes = pods.each_ref().map(|pod| pod.address6.unwrap());
    assert_eq!((sixes[1].to_string(), sixes[2].to_string()), ("fd00:10:44::102".into(), "fd00:10:44:7::2".into()));
    for pod in &pods {
        greet(pod, 80, "v4");
        greet6(pod, 81);
    }
    for (number, client) in pods.iter().enumerate() {
        for (server, six) in pods.iter().zip(sixes) {
            let said = call_from(client, server.address, 80).unwrap();
            assert_eq!(said, format!("v4 {}", client.address));
            assert_eq!(call6(client, six, 81).unwrap(), sixes[number].to_string());
        }
    }
    let ip = Ipv4Addr::new(10, 43, 0, 9);
    lab.router().sync_services(&[service(ip, Protocol::Tcp, 80, &[(b.address, 80)])]).unwrap();
    assert_eq!(call_from(a, ip, 80).unwrap(), format!("v4 {}", a.address));
    // A subnet is no way around the namespace, whoever's it is.
    let stranger = lab.attach(&AttachRequest { namespace: "other".into(), ..from("d", "default/edge") });
    assert!(call_from(&stranger, b.address, 80).is_err() && call_from(b, stranger.address, 80).is_err());
    assert!(call6(&stranger, sixes[2], 81).is_err());
    // Nobody's addresses, of subnets and beside them, are refused at once.
    for nobody in [Ipv4Addr::new(10, 44, 1, 9), Ipv4Addr::new(10, 44, 200, 1)] {
        let error = call_from(a, nobody, 80).unwrap_err();
        assert!(error.kind() != std::io::ErrorKind::TimedOut, "{nobody}: {error}");
    }
}

#[test]
fn addresses_are_kept_over_restarts_and_a_subnet_in_use_stays() {
    let Some(mut lab) = lab() else { return };
    let edge = subnet("default/edge", "10.44.1.0/28", Some("fd00:10:44:1::/64"));
    lab.router().add_subnet(None, &edge).unwrap();
    let (pod, plain) = (lab.attach(&from("a", "default/edge")), lab.pod("b"));
    let kept = AttachRequest { address_key: Some("default/vm".into()), ..from("k", "default/edge") };
    let keeps = lab.attach(&kept);
    greet(&pod, 80, "still");
    greet6(&pod, 81);
    lab.router().detach("k").unwrap();
    lab.reopen();
    lab.defaults(network::Isolation::Private);
    assert_eq!(lab.router().attach(&from("a", "default/edge")).unwrap(), pod);
    assert_eq!(call_from(&plain, pod.address, 80).unwrap(), format!("still {}", plain.address));
    assert_eq!(call6(&plain, pod.address6.unwrap(), 81).unwrap(), plain.address6.unwrap().to_string());
    let uses = lab.router().subnets();
    assert_eq!((uses.len(), uses[0].used, uses[0].free), (1, 2, 11));
    assert_eq!(
        (uses[0].workloads.clone(), uses[0].kept.clone()),
        (vec!["a".to_owned()], vec!["default/vm".to_owned()])
    );
    assert!(!lab.router().remove_subnet("default/edge").unwrap());
    lab.router().detach("a").unwrap();
    assert!(!lab.router().remove_subnet("default/edge").unwrap(), "an address is kept");
    // Whose address it is gets it again, wherever others of its namespace are now; one that says where it wants to be moves.
    let anywhere = AttachRequest { place: Place::default(), uid: "k2".into(), ..kept.clone() };
    assert_eq!(lab.router().attach(&anywhere).unwrap().address, keeps.address);
    lab.router().detach("k2").unwrap();
    let moved = AttachRequest { place: Place { subnet: None, moves: true }, uid: "k3".into(), ..kept };
    let moved = lab.router().attach(&moved).unwrap();
    assert_eq!(moved.address.octets()[..2], [10, 42]);
    assert!(lab.router().remove_subnet("default/edge").unwrap());
    assert!(matches!(lab.router().attach(&from("c", "default/edge")), Err(Error::NoSubnet(_))));
    lab.reopen();
    assert!(lab.router().subnets().is_empty());
}

#[test]
fn a_full_subnet_refuses_and_nothing_else_stops() {
    let Some(lab) = lab() else { return };
    lab.router().add_subnet(None, &subnet("default/edge", "10.44.1.0/28", None)).unwrap();
    for n in 0..13 {
        lab.router().attach(&from(&format!("p{n}"), "default/edge")).unwrap();
    }
    let told = lab.router().attach(&from("more", "default/edge")).unwrap_err().to_string();
    assert_eq!(
        told,
        "no free address in Network default/edge, 10.44.1.0/28: 13 are in use; remove workloads or choose a larger Network"
    );
    assert_eq!(lab.router().subnets()[0].free, 0);
    lab.pod("other");
    lab.router().detach("p4").unwrap();
    lab.router().attach(&from("more", "default/edge")).unwrap();
}

#[test]
fn a_namespace_has_its_share_and_no_more() {
    let Some(lab) = lab() else { return };
    let add =
        |name: &str, cidr: &str, cidr6: Option<&str>| match lab.router().add_subnet(None, &subnet(name, cidr, cidr6)) {
            Ok(()) => None,
            Err(Error::Subnet { why: Misfit::Share(why), .. }) => Some(why),
            Err(other) => panic!("{name} {cidr} {cidr6:?}: {other}"),
        };
    let whole = "with it the Networks of namespace a would have 16384 addresses; its share of 10.44.0.0/16 is 8192 \
                 (atoll up --subnet-share)";
    assert_eq!(add("a/all", "10.44.64.0/18", None).as_deref(), Some(whole));
    assert_eq!(add("a/one", "10.44.32.0/20", Some("fd00:10:44:1::/64")), None);
    assert_eq!(add("a/two", "10.44.48.0/20", None), None);
    let told = add("a/more", "10.44.1.0/28", None).unwrap();
    assert!(told.contains("would have 8208 addresses"), "{told}");
    // Others have theirs, and IPv6 is shared alike.
    assert_eq!(add("b/one", "10.44.64.0/20", Some("fd00:10:44:8000::/51")), None);
    let told = add("b/two", "10.44.1.0/28", Some("fd00:10:44:2::/64")).unwrap();
    assert!(told.contains("its share of fd00:10:44::/48 is 151115727451828646838272"), "{told}");
    assert_eq!(add("b/two", "10.44.1.0/28", None), None);
    // What goes makes room.
    assert!(lab.router().remove_subnet("a/two").unwrap());
    assert_eq!(add("a/more", "10.44.2.0/28", None), None);
}

struct Host(PathBuf);

impl Drop for Host {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del"]).arg(self.0.file_name().unwrap()).status();
    }
}

#[test]
fn what_overlaps_is_named() {
    let Some(lab) = lab() else { return };
    let name = format!("atoll-t-subnets-{}", std::process::id());
    assert!(Command::new("ip").args(["netns", "add", &name]).status().unwrap().success());
    let host = Host(Path::new("/run/netns").join(name));
    for line in [
        "link add lan type veth peer name lan2",
        "link set lan2 up",
        "address add 10.44.64.1/18 dev lan",
        "link set lan up",
        "address add fd00:10:44:9::1/64 dev lan nodad",
        "route add 10.44.8.0/24 via 10.44.64.9",
    ] {
        let (good, said) = run(&host.0, "ip", &line.split(' ').collect::<Vec<_>>());
        assert!(good, "ip {line}: {said}");
    }
    let file = File::open(&host.0).unwrap();
    let add = |cidr: &str, cidr6: Option<&str>| match lab
        .router()
        .add_subnet(Some(file.as_fd()), &subnet("a/new", cidr, cidr6))
    {
        Err(Error::Subnet { why, .. }) => why,
        other => panic!("{cidr} {cidr6:?}: {other:?}"),
    };
    lab.router().add_subnet(Some(file.as_fd()), &subnet("a/old", "10.44.1.0/24", Some("fd00:10:44:1::/64"))).unwrap();
    for (cidr, cidr6, wanted) in [
        ("10.42.7.0/24", None, "overlaps workloads' network, 10.42.0.0/16"),
        ("10.43.0.0/20", None, "overlaps Services' network, 10.43.0.0/16"),
        ("127.0.0.0/24", None, "overlaps loopback, 127.0.0.0/8"),
        ("169.254.1.0/24", None, "overlaps link-local addresses, 169.254.0.0/16"),
        ("224.0.0.0/24", None, "overlaps multicast and reserved addresses, 224.0.0.0/3"),
        ("10.44.1.128/28", None, "overlaps Network a/old, 10.44.1.0/24 and fd00:10:44:1::/64"),
        ("10.44.2.0/24", Some("fd00:10:44:1::/64"), "overlaps Network a/old, 10.44.1.0/24 and fd00:10:44:1::/64"),
        ("10.44.2.0/24", Some("fd00:10:43::/64"), "overlaps Services' network, fd00:10:43::/112"),
        (
            "10.44.2.0/24",
            Some("fd00:10:44::/64"),
            "overlaps the IPv6 addresses of Networks that name none, fd00:10:44:: to fd00:10:44::ffff",
        ),
        ("10.44.80.0/24", None, "overlaps the host's 10.44.64.0/18 by lan"),
        ("10.44.8.0/24", None, "overlaps the host's 10.44.8.0/24 by lan"),
        ("10.44.2.0/24", Some("fd00:10:44:9::/64"), "overlaps the host's fd00:10:44:9::/64 by lan"),
    ] {
        assert_eq!(add(cidr, cidr6), Misfit::Overlaps(wanted.into()));
    }
    for (cidr, cidr6, wanted) in [
        (
            "10.50.0.0/24",
            None,
            "10.50.0.0/24 is not inside 10.44.0.0/16, where Networks may be here (atoll up --subnet-cidr)",
        ),
        ("10.44.2.0/24", Some("2001:db8::/64"), "2001:db8::/64 is not inside fd00:10:44::/48, where"),
        ("10.44.2.0/24", Some("fd00:10:44:1::/121"), "fd00:10:44:1::/121 is smaller than 10.44.2.0/24"),
    ] {
        let told = add(cidr, cidr6);
        assert!(matches!(&told, Misfit::Invalid(why) if why.starts_with(wanted)), "{told:?}");
    }
    // The same again is fine; another network under the same name too, as long as nobody uses it.
    lab.router().add_subnet(None, &subnet("a/old", "10.44.1.0/24", Some("fd00:10:44:1::/64"))).unwrap();
    lab.router().add_subnet(None, &subnet("a/old", "10.44.3.0/24", None)).unwrap();
    lab.attach(&from("p", "a/old"));
    let told = lab.router().add_subnet(None, &subnet("a/old", "10.44.4.0/24", None)).unwrap_err().to_string();
    assert_eq!(told, "Network a/old: an earlier Network of this name still has addresses in use");
}
