//! Links that are prepared before they are asked for, and the first packets on any link.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use network::{Attachment, Router, in_netns};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

/// Keeps links prepared while `work` runs.
fn with_pool<T>(router: &Router, count: usize, work: impl FnOnce() -> T) -> T {
    struct Stop<'a>(&'a Router);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.stop_preparing();
        }
    }
    std::thread::scope(|scope| {
        scope.spawn(|| router.keep_prepared(count));
        let _stop = Stop(router);
        work()
    })
}

/// One datagram each way; nothing is sent again.
fn first_datagrams(from: &Attachment, to: &Attachment) -> bool {
    let bind = |pod: &Attachment| {
        let socket = in_netns(&netns(pod), || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 99)).unwrap()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket
    };
    let (near, far) = (bind(from), bind(to));
    near.send_to(b"first", (to.address, 99)).unwrap();
    let Ok((_, client)) = far.recv_from(&mut [0; 9]) else { return false };
    far.send_to(b"answer", client).unwrap();
    near.recv_from(&mut [0; 9]).is_ok()
}

fn inode(pod: &Attachment) -> u64 {
    std::fs::metadata(netns(pod)).unwrap().ino()
}

#[test]
fn the_first_datagram_arrives() {
    let Some(lab) = lab() else { return };
    for n in 0..20 {
        let pair = ["a", "b"].map(|end| lab.pod(&format!("{end}{n}")));
        assert!(first_datagrams(&pair[0], &pair[1]), "pair {n}");
    }
}

#[test]
fn prepared_links_are_taken_and_made_again() {
    let Some(lab) = lab() else { return };
    let router = lab.router();
    with_pool(router, 3, || {
        let mut seen = Vec::new();
        for n in 0..6 {
            eventually("links are prepared", || router.prepared() == 3);
            let pair = ["a", "b"].map(|end| lab.pod(&format!("{end}{n}")));
            assert!(first_datagrams(&pair[0], &pair[1]), "pair {n}");
            let again = router.attach(&request(&format!("a{n}"))).unwrap();
            assert_eq!((again.address, inode(&again)), (pair[0].address, inode(&pair[0])));
            for pod in &pair {
                assert!(!seen.contains(&pod.address));
                seen.push(pod.address);
            }
            router.detach(&format!("a{n}")).unwrap();
        }
        // What has an address of its own does not take another.
        let keyed = network::AttachRequest { address_key: Some("default/vm".into()), ..request("keyed") };
        let first = lab.attach(&keyed);
        router.detach("keyed").unwrap();
        assert_eq!(lab.attach(&keyed).address, first.address);
        assert_eq!(router.link_counters().unwrap().len(), 7, "prepared links are nobody's yet");
    });
    assert_eq!(router.prepared(), 0);
    let known = router.leases().len();
    eventually("the links of what was prepared are gone", || {
        let (fine, links) = run(&router.netns_path(), "ip", &["-o", "link"]);
        fine && links.matches("veth").count() == known
    });
}

#[test]
fn with_few_addresses_none_is_set_aside() {
    if lab().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let small = network::RouterConfig { pod_cidr: "10.42.0.0/28".parse().unwrap(), ..config(dir.path()) };
    let router = Router::open(small).unwrap();
    with_pool(&router, 8, || {
        for n in 0..13 {
            router.attach(&request(&format!("pod-{n}"))).unwrap();
        }
        assert!(router.attach(&request("more")).is_err());
        assert_eq!(router.prepared(), 0);
    });
    router.teardown().unwrap();
}

#[test]
fn what_a_process_prepared_goes_with_it() {
    let Some(mut lab) = lab() else { return };
    let before = {
        let router = lab.router();
        with_pool(router, 4, || {
            eventually("links are prepared", || router.prepared() == 4);
            lab.pod("a")
        })
    };
    lab.reopen();
    // All addresses are free again but one, whose namespace is still there.
    let again = lab.pod("a");
    assert_eq!((again.address, inode(&again)), (before.address, inode(&before)));
    for n in 0..6 {
        let other = lab.pod(&format!("b{n}"));
        assert!(first_datagrams(&again, &other));
    }
}
