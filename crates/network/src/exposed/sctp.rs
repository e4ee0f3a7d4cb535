//! SCTP: packets go between two raw sockets as they are, with other ports and so with another checksum (RFC 9260, section
//! 6.8). Associations begin and end at the client and the endpoint; here they are what a client's datagrams are.
//!
//! A kernel that speaks SCTP itself answers what raw sockets hear too, and refuses it, so no port is opened there.

use crate::sys;
use rustix::fd::BorrowedFd;
use std::io;
use std::net::IpAddr;

/// Source port, destination port, tag, checksum.
const HEADER: usize = 12;
const CHECKSUM: std::ops::Range<usize> = 8..12;

/// Whom an endpoint takes a packet to be from (the node: nobody), by its port, and the endpoint: two ports of the host must
/// not lead one client's port to the same one.
pub type Association = (Option<IpAddr>, u16, (IpAddr, u16));

pub fn kernel_has_its_own() -> bool {
    let protocols = std::fs::read_to_string("/proc/net/protocols").unwrap_or_default();
    protocols.lines().any(|line| line.split_whitespace().next() == Some("SCTP"))
}

/// The packet in what a raw socket hears: of IPv4 with the header before it.
pub fn packet(heard: &mut [u8], v6: bool) -> Option<&mut [u8]> {
    let header = if v6 { 0 } else { usize::from(heard.first()? & 15) * 4 };
    heard.get_mut(header..).filter(|packet| packet.len() > HEADER)
}

/// From which to which.
pub fn ports(packet: &[u8]) -> Option<(u16, u16)> {
    let [s0, s1, d0, d1] = *packet.first_chunk()?;
    Some((u16::from_be_bytes([s0, s1]), u16::from_be_bytes([d0, d1])))
}

/// Gives a packet other ports. Its checksum is made anew whatever it was: between namespaces the kernel leaves it out.
pub fn readdress(packet: &mut [u8], from: u16, to: u16) {
    let Some(header) = packet.first_chunk_mut::<HEADER>() else { return };
    let ([s0, s1], [d0, d1]) = (from.to_be_bytes(), to.to_be_bytes());
    let [_, _, _, _, t0, t1, t2, t3, ..] = *header;
    *header = [s0, s1, d0, d1, t0, t1, t2, t3, 0, 0, 0, 0];
    let sum = crc32c(packet).to_le_bytes();
    if let Some(field) = packet.get_mut(CHECKSUM) {
        field.copy_from_slice(&sum);
    }
}

/// Lets the kernel drop what is not for this port, or not from that one either; what it lets through is looked at again.
pub fn hear_only(socket: BorrowedFd<'_>, v6: bool, from: Option<u16>, to: u16) -> io::Result<()> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let load = match v6 {
        true => vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)],
        false => vec![
            statement(libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH, 0),
            statement(libc::BPF_LD | libc::BPF_W | libc::BPF_IND, 0),
        ],
    };
    let mask = if from.is_some() { u32::MAX } else { 0xffff };
    let wanted = u32::from(from.unwrap_or_default()) << 16 | u32::from(to);
    let mut equal = statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, wanted);
    equal.jf = 1;
    let judge = [
        statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, mask),
        equal,
        statement(libc::BPF_RET | libc::BPF_K, u32::MAX),
        statement(libc::BPF_RET | libc::BPF_K, 0),
    ];
    sys::datagram::filter(socket, &[load, judge.to_vec()].concat())
}

const TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut sum, mut bit) = (byte as u32, 0);
        while bit < 8 {
            sum = (sum >> 1) ^ (0x82f6_3b78 & (sum & 1).wrapping_neg());
            bit += 1;
        }
        table[byte] = sum;
        byte += 1;
    }
    table
}

/// RFC 9260, appendix A.
fn crc32c(data: &[u8]) -> u32 {
    let step = |sum: u32, byte: &u8| (sum >> 8) ^ TABLE[usize::from(*byte ^ sum.to_le_bytes()[0])];
    !data.iter().fold(!0, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        // RFC 3720, section B.4.
        assert_eq!((crc32c(&[0; 32]), crc32c(&[0xff; 32])), (0x8a91_36aa, 0x62a8_ab43));
    }

    #[test]
    fn other_ports_and_nothing_else() {
        let mut heard = vec![0x46, 0, 0, 0];
        heard.resize(24, 7);
        heard.extend([0x13, 0x88, 0x75, 0x30, 1, 2, 3, 4, 0xde, 0xad, 0xbe, 0xef, 1, 0, 0, 4]);
        let own = packet(&mut heard, false).unwrap();
        assert_eq!(ports(own), Some((5000, 30_000)));
        readdress(own, 5000, 3868);
        assert_eq!(own[..8], [0x13, 0x88, 0x0f, 0x1c, 1, 2, 3, 4]);
        assert_eq!(own[12..], [1, 0, 0, 4]);
        let mut bare = own.to_vec();
        bare[CHECKSUM].fill(0);
        assert_eq!(own[CHECKSUM], crc32c(&bare).to_le_bytes());
    }

    #[test]
    fn what_is_too_short_is_none() {
        for length in 0..=HEADER {
            assert!(packet(&mut vec![0; length], true).is_none());
        }
        assert!(packet(&mut [], false).is_none());
        assert!(packet(&mut [0x4f; 30], false).is_none(), "a header longer than all there is");
        readdress(&mut [1, 2, 3], 1, 2);
    }
}
