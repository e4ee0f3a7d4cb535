//! From a queue in the guest's memory to checked segments. Everything read here is hostile.

use crate::kvm::Fault;
use crate::kvm::memory::Memory;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// A piece of the guest's memory; it was there when it was taken from the queue, and memory never goes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub address: GuestAddress,
    pub len: u32,
}

/// A request: what the device may read, then what it may write.
#[derive(Debug, Default)]
pub struct Chain {
    pub head: u16,
    pub readable: Vec<Segment>,
    pub writable: Vec<Segment>,
}

/// The next request of a queue, if there is one.
pub fn take(queue: &mut Queue, memory: &Memory) -> Result<Option<Chain>, Fault> {
    let mut iter = queue.iter(memory).map_err(|e| Fault(format!("available ring: {e}")))?;
    let Some(descriptors) = iter.next() else { return Ok(None) };
    let head = descriptors.head_index();
    let mut chain = Chain { head, ..Chain::default() };
    let mut open = true;
    for descriptor in descriptors {
        open = descriptor.has_next();
        let (address, len) = (descriptor.addr(), descriptor.len());
        if len == 0 {
            continue;
        }
        if !memory.check_range(address, len as usize) {
            return Err(Fault(format!("descriptor of chain {head}: {len} bytes at {:#x} are not memory", address.0)));
        }
        let segment = Segment { address, len };
        if descriptor.is_write_only() {
            chain.writable.push(segment);
        } else if chain.writable.is_empty() {
            chain.readable.push(segment);
        } else {
            return Err(Fault(format!("chain {head}: a readable descriptor after a writable one")));
        }
    }
    if open {
        return Err(Fault(format!("chain {head}: loops, is too long or leaves its table")));
    }
    Ok(Some(chain))
}

pub fn length(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| u64::from(s.len)).sum()
}

/// The part of `segments` from byte `skip` on, `length` bytes at most.
pub fn part(segments: &[Segment], mut skip: u64, mut length: u64) -> Vec<Segment> {
    let mut out = Vec::with_capacity(segments.len());
    for segment in segments {
        let len = u64::from(segment.len);
        if skip >= len {
            skip -= len;
            continue;
        }
        let take = (len - skip).min(length);
        if take == 0 {
            break;
        }
        // both fit: no more than this segment's own length
        out.push(Segment { address: GuestAddress(segment.address.0 + skip), len: take as u32 });
        (skip, length) = (0, length - take);
    }
    out
}

fn gone(e: vm_memory::GuestMemoryError) -> Fault {
    Fault(format!("guest memory: {e}"))
}

/// Copies out of the guest; returns how much there was.
pub fn gather(memory: &Memory, segments: &[Segment], buffer: &mut [u8]) -> Result<usize, Fault> {
    let mut done = 0;
    for segment in segments {
        let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) else { break };
        let n = rest.len().min(segment.len as usize);
        memory.read_slice(rest.get_mut(..n).unwrap_or_default(), segment.address).map_err(gone)?;
        done += n;
    }
    Ok(done)
}

/// Copies into the guest; returns how much found room.
pub fn scatter(memory: &Memory, segments: &[Segment], bytes: &[u8]) -> Result<usize, Fault> {
    let mut done = 0;
    for segment in segments {
        let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) else { break };
        let n = rest.len().min(segment.len as usize);
        memory.write_slice(rest.get(..n).unwrap_or_default(), segment.address).map_err(gone)?;
        done += n;
    }
    Ok(done)
}

/// Reads everything that a queue laid out by `bytes` offers. `bytes` become the guest's first memory, and the
/// queue's addresses and size come from their end.
pub fn walk(bytes: &[u8]) -> Result<usize, Fault> {
    let memory = crate::kvm::memory::allocate(1 << 16).map_err(|e| Fault(e.to_string()))?;
    let image = bytes.get(..bytes.len().min(1 << 16)).unwrap_or_default();
    memory.write_slice(image, GuestAddress(0)).map_err(gone)?;
    let word = |at: usize| -> u64 {
        let from = bytes.len().saturating_sub(at);
        let raw = bytes.get(from..from + 2).and_then(|b| b.try_into().ok()).unwrap_or([0; 2]);
        u64::from(u16::from_le_bytes(raw))
    };
    let mut queue = Queue::new(256).map_err(|e| Fault(e.to_string()))?;
    queue.set_size(1 << (word(2) % 9));
    queue.set_desc_table_address(Some((word(4) & !15) as u32), None);
    queue.set_avail_ring_address(Some((word(6) & !1) as u32), None);
    queue.set_used_ring_address(Some((word(8) & !3) as u32), None);
    queue.set_ready(true);
    if !queue.is_valid(&memory) {
        return Err(Fault("queue lies outside memory".into()));
    }
    let mut seen = 0;
    while let Some(chain) = take(&mut queue, &memory)? {
        seen += 1;
        let mut buffer = vec![0u8; length(&chain.readable).min(1 << 16) as usize];
        gather(&memory, &chain.readable, &mut buffer)?;
        scatter(&memory, &chain.writable, &buffer)?;
        queue.add_used(&memory, chain.head, 0).map_err(|e| Fault(e.to_string()))?;
        if seen > 1 << 16 {
            break;
        }
    }
    Ok(seen)
}

/// For fuzzing: any bytes are a queue.
pub fn fuzz(data: &[u8]) {
    let _ = walk(data);
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    type Descriptor = (u64, u32, u16, u16);

    /// Table at 0, available ring at 0x1000 with `heads`, used ring at 0x2000; 64 KiB of memory.
    fn first(table: &[Descriptor], heads: &[u16], index: u16) -> Result<Option<Chain>, Fault> {
        let memory = crate::kvm::memory::allocate(1 << 16).unwrap();
        for (at, (address, len, flags, next)) in table.iter().enumerate() {
            let at = at as u64 * 16;
            memory.write_obj(*address, GuestAddress(at)).unwrap();
            memory.write_obj(*len, GuestAddress(at + 8)).unwrap();
            memory.write_obj(*flags, GuestAddress(at + 12)).unwrap();
            memory.write_obj(*next, GuestAddress(at + 14)).unwrap();
        }
        memory.write_obj(index, GuestAddress(0x1002)).unwrap();
        for (at, head) in heads.iter().enumerate() {
            memory.write_obj(*head, GuestAddress(0x1004 + 2 * at as u64)).unwrap();
        }
        let mut queue = Queue::new(16).unwrap();
        queue.set_desc_table_address(Some(0), None);
        queue.set_avail_ring_address(Some(0x1000), None);
        queue.set_used_ring_address(Some(0x2000), None);
        queue.set_ready(true);
        assert!(queue.is_valid(&memory));
        take(&mut queue, &memory)
    }

    #[test]
    fn a_good_chain_is_taken() {
        let chain = first(&[(0x4000, 16, NEXT, 1), (0x5000, 512, WRITE, 0)], &[0], 1).unwrap().unwrap();
        assert_eq!((length(&chain.readable), length(&chain.writable)), (16, 512));
        assert!(first(&[], &[], 0).unwrap().is_none());
    }

    #[test]
    fn what_breaks_the_protocol_is_a_fault_with_its_reason() {
        let cases: [(&[Descriptor], &[u16], u16, &str); 8] = [
            (&[(0x4000, 16, NEXT, 0)], &[0], 1, "loops"),
            (&[(0x4000, 16, NEXT, 99)], &[0], 1, "leaves its table"),
            (&[(0x4000, 16, 0, 0)], &[99], 1, "leaves its table"),
            (&[(0x4000, 16, 0, 0)], &[0], 17, "available ring"),
            (&[(0xffff, 2, 0, 0)], &[0], 1, "are not memory"),
            (&[(u64::MAX - 1, 16, 0, 0)], &[0], 1, "are not memory"),
            (&[(0x4000, 8, WRITE | NEXT, 1), (0x4000, 8, 0, 0)], &[0], 1, "after a writable"),
            (&[(0x100, 16, INDIRECT, 0), (0, 0, 0, 0)], &[0], 1, ""),
        ];
        for (table, heads, index, expected) in cases {
            match first(table, heads, index) {
                Err(Fault(text)) => assert!(text.contains(expected), "{text}"),
                Ok(chain) => assert!(expected.is_empty(), "{chain:?}"),
            }
        }
    }

    #[test]
    fn parts_of_segments() {
        let segments = [Segment { address: GuestAddress(0), len: 10 }, Segment { address: GuestAddress(100), len: 10 }];
        let parts = part(&segments, 8, 4);
        assert_eq!(parts.iter().map(|s| (s.address.0, s.len)).collect::<Vec<_>>(), [(8, 2), (100, 2)]);
        assert!(part(&segments, 20, 4).is_empty());
    }

    proptest::proptest! {
        #[test]
        fn no_memory_makes_the_walk_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..2048)) {
            let _ = walk(&bytes);
        }
    }
}
