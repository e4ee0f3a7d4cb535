//! Packets of virtio-vsock as they lie in a queue.

use super::{GUEST, HOST};
use crate::kvm::Fault;
use crate::kvm::memory::Memory;
use crate::kvm::virtio::queue::{self, Chain};

pub const SIZE: usize = 44;
/// What a connection may hold of the guest's bytes; told to the guest as its credit.
pub const CREDIT: u32 = 256 << 10;
const STREAM: u16 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
    Unknown,
}

const OPS: [Op; 8] =
    [Op::Unknown, Op::Request, Op::Response, Op::Reset, Op::Shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest];

#[derive(Clone, Debug)]
pub struct Header {
    pub source_cid: u64,
    pub target_cid: u64,
    pub source_port: u32,
    pub target_port: u32,
    pub length: u32,
    pub is_stream: bool,
    pub op: Op,
    pub flags: u32,
    pub credit: u32,
    pub forwarded: u32,
}

impl Header {
    /// From the host's port to the guest's.
    pub fn to_guest(source_port: u32, target_port: u32, op: Op) -> Self {
        let (source_cid, target_cid, is_stream) = (HOST, GUEST, true);
        Header {
            source_cid,
            target_cid,
            source_port,
            target_port,
            length: 0,
            is_stream,
            op,
            flags: 0,
            credit: CREDIT,
            forwarded: 0,
        }
    }

    /// What says that there is no such connection.
    pub fn refused(&self) -> Self {
        Header::to_guest(self.target_port, self.source_port, Op::Reset)
    }

    pub fn encode(&self) -> [u8; SIZE] {
        let op = OPS.iter().position(|op| *op == self.op).unwrap_or(0) as u16;
        let parts: [&[u8]; 10] = [
            &self.source_cid.to_le_bytes(),
            &self.target_cid.to_le_bytes(),
            &self.source_port.to_le_bytes(),
            &self.target_port.to_le_bytes(),
            &self.length.to_le_bytes(),
            &STREAM.to_le_bytes(),
            &op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.credit.to_le_bytes(),
            &self.forwarded.to_le_bytes(),
        ];
        let mut bytes = [0; SIZE];
        for (to, from) in bytes.iter_mut().zip(parts.concat()) {
            *to = from;
        }
        bytes
    }

    pub fn parse(bytes: &[u8; SIZE]) -> Self {
        let number = |at: usize, len: usize| {
            bytes.iter().skip(at).take(len).rev().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte))
        };
        let half = |at| number(at, 4) as u32;
        Header {
            source_cid: number(0, 8),
            target_cid: number(8, 8),
            source_port: half(16),
            target_port: half(20),
            length: half(24),
            is_stream: number(28, 2) == u64::from(STREAM),
            op: OPS.get(number(30, 2) as usize).copied().unwrap_or(Op::Unknown),
            flags: half(32),
            credit: half(36),
            forwarded: half(40),
        }
    }
}

/// A packet the guest sent, with its data.
pub fn decode(memory: &Memory, chain: &Chain) -> Result<(Header, Vec<u8>), Fault> {
    let mut head = [0u8; SIZE];
    if queue::gather(memory, &chain.readable, &mut head)? < SIZE {
        return Err(Fault(format!("chain {}: a packet shorter than its header", chain.head)));
    }
    let header = Header::parse(&head);
    let there = queue::length(&chain.readable) - SIZE as u64;
    if u64::from(header.length) > there.min(u64::from(CREDIT)) {
        return Err(Fault(format!("chain {}: a packet says {} bytes and has {there}", chain.head, header.length)));
    }
    let mut data = vec![0u8; header.length as usize];
    queue::gather(memory, &queue::part(&chain.readable, SIZE as u64, u64::MAX), &mut data)?;
    Ok((header, data))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back_as_they_were() {
        let header = Header { length: 77, flags: 3, forwarded: 9, ..Header::to_guest(1, 2, Op::Shutdown) };
        let again = Header::parse(&header.encode());
        assert_eq!(again.encode(), header.encode());
        assert_eq!((again.op, again.length, again.credit), (Op::Shutdown, 77, CREDIT));
        assert_eq!(Header::parse(&[0xff; SIZE]).op, Op::Unknown);
    }
}
