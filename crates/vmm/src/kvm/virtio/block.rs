//! Disks (Virtio 1.2, 5.2).

use super::Device;
use super::queue::{self, Chain, Segment};
use super::rate::Limiter;
use super::worker::Io;
use crate::disk::Disk;
use crate::kvm::Fault;
use std::time::{Duration, Instant};

const SEG_MAX: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

const QUEUE_SIZE: u16 = 256;
const SECTOR: u64 = 512;
/// Ranges in one discard or write-zeroes request.
const MOST_RANGES: u32 = 32;
/// Sectors in one range: 1 GiB.
const MOST_SECTORS: u32 = 2 << 20;

/// What a request takes beside its data.
const HEADER_AND_STATUS: u64 = 17;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

pub struct Block {
    pub disk: Box<dyn Disk>,
    pub read_only: bool,
    /// At most 20 bytes.
    pub serial: String,
    pub limiter: Limiter,
}

/// What a request asks for, by its header.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
    Id,
    Discard,
    WriteZeroes,
    Unknown,
}

fn kind(number: u32) -> Kind {
    match number {
        0 => Kind::Read,
        1 => Kind::Write,
        4 => Kind::Flush,
        8 => Kind::Id,
        11 => Kind::Discard,
        13 => Kind::WriteZeroes,
        _ => Kind::Unknown,
    }
}

impl Block {
    /// Carries a request out: its status, and how many bytes before the status were written.
    fn serve(&mut self, chain: &Chain, io: &Io) -> Result<(u8, u64), Fault> {
        let mut header = [0u8; 16];
        if queue::gather(&io.memory, &chain.readable, &mut header)? < header.len() {
            return Err(Fault(format!("chain {}: a request of less than 16 bytes", chain.head)));
        }
        let [a, b, c, d, ..] = header;
        let sector = header.last_chunk::<8>().map_or(0, |b| u64::from_le_bytes(*b));
        let data = queue::part(&chain.readable, 16, u64::MAX);
        let room = queue::part(&chain.writable, 0, queue::length(&chain.writable).saturating_sub(1));
        match kind(u32::from_le_bytes([a, b, c, d])) {
            Kind::Read => Ok(self.transfer(io, &room, sector, false)),
            Kind::Write if self.read_only => Ok((IO_ERROR, 0)),
            Kind::Write => Ok((self.transfer(io, &data, sector, true).0, 0)),
            Kind::Flush => Ok((status(self.disk.flush()), 0)),
            Kind::Id => {
                let mut id = [0u8; 20];
                for (to, byte) in id.iter_mut().zip(self.serial.bytes()) {
                    *to = byte;
                }
                Ok((OK, queue::scatter(&io.memory, &room, &id)? as u64))
            }
            Kind::Discard | Kind::WriteZeroes if self.read_only => Ok((IO_ERROR, 0)),
            Kind::Discard => self.ranges(io, &data, false).map(|s| (s, 0)),
            Kind::WriteZeroes => self.ranges(io, &data, true).map(|s| (s, 0)),
            Kind::Unknown => Ok((UNSUPPORTED, 0)),
        }
    }

    /// The byte offset of `sectors` at `sector`, if they are on the disk.
    fn place(&self, sector: u64, length: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(length)?;
        (length.is_multiple_of(SECTOR) && end <= self.disk.capacity() / SECTOR * SECTOR).then_some(offset)
    }

    fn transfer(&mut self, io: &Io, segments: &[Segment], sector: u64, write: bool) -> (u8, u64) {
        let length = queue::length(segments);
        let Some(offset) = self.place(sector, length) else { return (IO_ERROR, 0) };
        let done = if write {
            self.disk.write(&io.memory, segments, offset)
        } else {
            self.disk.read(&io.memory, segments, offset)
        };
        (status(done), length)
    }

    fn ranges(&mut self, io: &Io, data: &[Segment], zero: bool) -> Result<u8, Fault> {
        let length = queue::length(data);
        if length == 0 || !length.is_multiple_of(16) || length > u64::from(MOST_RANGES) * 16 {
            return Ok(IO_ERROR);
        }
        let mut bytes = vec![0u8; length as usize];
        queue::gather(&io.memory, data, &mut bytes)?;
        for [sector, rest] in bytes.as_chunks::<8>().0.as_chunks::<2>().0 {
            let (sector, rest) = (u64::from_le_bytes(*sector), u64::from_le_bytes(*rest));
            let (sectors, flags) = (rest & 0xffff_ffff, (rest >> 32) as u32);
            // only write-zeroes has a flag, and only one: the range may be unmapped
            if flags & !1 != 0 || (!zero && flags != 0) {
                return Ok(UNSUPPORTED);
            }
            let length = sectors * SECTOR;
            let Some(offset) = self.place(sector, length).filter(|_| sectors <= u64::from(MOST_SECTORS)) else {
                return Ok(IO_ERROR);
            };
            let done =
                if zero { self.disk.zero(offset, length, flags == 1) } else { self.disk.discard(offset, length) };
            if done.is_err() {
                return Ok(IO_ERROR);
            }
        }
        Ok(OK)
    }
}

/// The guest is told that it failed; the host's reason is its own.
fn status(result: std::io::Result<()>) -> u8 {
    if result.is_ok() { OK } else { IO_ERROR }
}

impl Device for Block {
    fn name(&self) -> &'static str {
        "block"
    }
    fn id(&self) -> u32 {
        2
    }
    fn features(&self) -> u64 {
        SEG_MAX | FLUSH | if self.read_only { READ_ONLY } else { DISCARD | WRITE_ZEROES }
    }
    fn queues(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }
    fn config(&self) -> (Vec<u8>, usize) {
        let mut config = vec![0u8; 60];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(to) = config.get_mut(at..at + bytes.len()) {
                to.copy_from_slice(bytes);
            }
        };
        put(0, &(self.disk.capacity() / SECTOR).to_le_bytes());
        put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
        put(36, &MOST_SECTORS.to_le_bytes());
        put(40, &MOST_RANGES.to_le_bytes());
        put(44, &8u32.to_le_bytes());
        put(48, &MOST_SECTORS.to_le_bytes());
        put(52, &MOST_RANGES.to_le_bytes());
        put(56, &[1]);
        (config, 0)
    }
    fn size(&self) -> u64 {
        self.disk.capacity()
    }
    fn kicked(&mut self, index: usize, io: &mut Io) -> Result<(), Fault> {
        while self.held().is_none() {
            let Some(chain) = io.take(index)? else { break };
            let room = queue::length(&chain.writable);
            if room == 0 {
                return Err(Fault(format!("chain {}: a request without room for its status", chain.head)));
            }
            let (status, written) = self.serve(&chain, io)?;
            let bytes = (queue::length(&chain.readable) + room).saturating_sub(HEADER_AND_STATUS);
            self.limiter.spend(bytes, Instant::now);
            queue::scatter(&io.memory, &queue::part(&chain.writable, room - 1, 1), &[status])?;
            io.finish(index, chain.head, u32::try_from(written + 1).unwrap_or(u32::MAX))?;
        }
        io.notify(index)
    }
    fn held(&self) -> Option<Duration> {
        self.limiter.wait(Instant::now)
    }
}
