//! What comes over sockets: requests to the registry, DNS, SPDY, a machine's control channel; and the snapshot that an engine wrote.

use crate::halves;
use network::dns::{answers, codec};
use network::fuzz::{dhcp4, dhcp6};
use server::stream::spdy::frame::{Control, HEAD, Head};
use server::stream::spdy::headers::{Headers, Inflater};

pub fn registry_request(data: &[u8]) {
    let (size, rest) = data.split_at(data.len().min(8));
    let size = size.iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
    let (path, header) = halves(rest);
    registry::fuzz(&String::from_utf8_lossy(path), &String::from_utf8_lossy(header), size);
}

/// What a machine asks of the router, as DHCP and as DHCPv6.
pub fn dhcp(data: &[u8]) {
    let config = network::RouterConfig::new("", "");
    let facts = dhcp4::Facts { pods: [config.pod_cidr, config.subnet_cidr], dns: config.dns_address };
    if let Some((reply, to)) = dhcp4::answer(data, &facts) {
        assert!(reply.len() <= 576 && facts.pods.iter().any(|network| network.contains(to)));
    }
    let own = config.v6_of(config.router_address());
    if let Some(reply) = dhcp6::answer(data, own, config.dns_address6(), [2, 0, 0, 0, 0, 1]) {
        assert!(reply.len() <= 576 && reply.get(1..4) == data.get(1..4));
    }
}

/// What a workload sends out, as the egress relay reads it.
pub fn egress_packet(data: &[u8]) {
    network::fuzz::fuzz_packet(data);
}

/// What comes to a port of the host by SCTP.
pub fn sctp_packet(data: &[u8]) {
    network::fuzz::fuzz_sctp(data);
}

pub fn dns(data: &[u8]) {
    if let Ok(query) = codec::parse(data) {
        for udp in [true, false] {
            let reply = codec::Reply::of(codec::Code::NameError);
            let answer = codec::write(&query, &reply, udp);
            assert!(answer.len() <= if udp { 4096 } else { 65_535 });
        }
    }
    let _ = codec::addresses(data);
    let (name, packet) = halves(data);
    let _ = answers::resolved(packet, &String::from_utf8_lossy(name));
    let mut limited = packet.to_vec();
    answers::limit_ttls(&mut limited, 5);
    assert!(limited.len() == packet.len());
}

/// Frames one after the other, their header blocks inflated by one decompressor as on a connection.
pub fn spdy(data: &[u8]) {
    let mut inflater = Inflater::default();
    let mut rest = data;
    while let Some((head, body)) = rest.split_first_chunk::<HEAD>() {
        let Ok(head) = Head::parse(*head) else { break };
        let length = match head {
            Head::Data { length, .. } => length,
            Head::Control { length, .. } => length,
        };
        let (body, next) = body.split_at(body.len().min(length));
        if let Head::Control { kind, flags, .. } = head {
            match Control::parse(kind, flags, body) {
                Ok(Control::SynStream { headers, .. }) => drop(inflater.headers(headers)),
                Ok(_) => {}
                Err(_) => break,
            }
        }
        rest = next;
    }
    let _ = Headers::parse(data);
}

pub fn qmp(data: &[u8]) {
    vmm::qmp::fuzz(data);
}

/// Devices of our monitor, each with a driver and a host that are the input.
pub fn virtio_block(data: &[u8]) {
    vmm::kvm::virtio::fuzz::device("block", data);
}
pub fn virtio_net(data: &[u8]) {
    vmm::kvm::virtio::fuzz::device("net", data);
}
pub fn virtio_vsock(data: &[u8]) {
    vmm::kvm::virtio::fuzz::device("vsock", data);
}
pub fn virtio_rng(data: &[u8]) {
    vmm::kvm::virtio::fuzz::device("rng", data);
}
pub fn virtio_balloon(data: &[u8]) {
    vmm::kvm::virtio::fuzz::device("balloon", data);
}
pub fn virtio_console(data: &[u8]) {
    vmm::kvm::virtio::fuzz::device("console", data);
}
/// A queue anywhere in memory; and the registers that set one up.
pub fn virtio_queue(data: &[u8]) {
    vmm::kvm::virtio::queue::fuzz(data);
    vmm::kvm::virtio::mmio::fuzz(data);
}

pub fn qcow2(data: &[u8]) {
    vmm::disk::qcow2::fuzz(data);
}

pub fn guest_kernel(data: &[u8]) {
    vmm::kvm::boot::fuzz(data);
}

pub fn vm_snapshot(data: &[u8]) {
    vmm::kvm::snapshot::fuzz(data);
    vmm::saved::fuzz(data);
}

pub fn invoke_request(data: &[u8]) {
    invoke::fuzz::request(data);
}

/// What a pod's agent says, and what a host says to it: frames, greetings, requests and answers.
pub fn guest_frames(bytes: &[u8]) {
    use guest::frame::{Decoder, Hello, Kind};
    let mut decoder = Decoder::default();
    for piece in bytes.chunks(61) {
        decoder.push(piece);
        loop {
            match decoder.next_frame() {
                Ok(None) => break,
                Err(_) => {}
                Ok(Some(frame)) => {
                    let mut again = Vec::new();
                    frame.encode(&mut again);
                    let mut second = Decoder::default();
                    second.push(&again);
                    assert_eq!(second.next_frame(), Ok(Some(frame.clone())));
                    let _ = (Hello::parse(&frame), frame.stream(), frame.granted());
                    if matches!(frame.kind, Kind::Message) {
                        let _ = serde_json::from_slice::<guest::protocol::Answer>(&frame.payload);
                        let _ = serde_json::from_slice::<guest::protocol::Request>(&frame.payload);
                    }
                }
            }
        }
    }
}
