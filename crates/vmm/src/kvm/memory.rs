//! The guest's physical memory and where things lie in it.

use crate::machine::{Error, Result};
use vm_memory::{GuestAddress, GuestMemoryBackend};

pub type Memory = vm_memory::GuestMemoryMmap<()>;

/// Memory stops here and goes on at 4 GiB; between are devices, the interrupt controllers and KVM's own pages.
pub const GAP_START: u64 = 0xd000_0000;
pub const GAP_END: u64 = 1 << 32;
/// The virtio-mmio devices: a page each from here.
pub const MMIO_BASE: u64 = GAP_START;
pub const MMIO_STRIDE: u64 = 0x1000;

pub const GDT: u64 = 0x500;
pub const START_INFO: u64 = 0x6000;
pub const START_INFO_TABLES: u64 = 0x6100;
pub const ZERO_PAGE: u64 = 0x7000;
pub const BOOT_STACK: u64 = 0x8ff0;
/// PML4, one PDPT, four page directories: the first 4 GiB.
pub const PAGE_TABLES: u64 = 0x9000;
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Where a PC's extended BIOS data would begin.
pub const LOW_END: u64 = 0x9_fc00;
pub const ACPI_TABLES: u64 = 0xe_0000;
pub const ACPI_END: u64 = 0x10_0000;
/// The generation id's 16 bytes, after all tables.
pub const GENERATION: u64 = ACPI_END - 16;
pub const HIGH_START: u64 = 0x10_0000;

/// The ranges that `bytes` of memory take.
pub fn ranges(bytes: u64) -> Vec<(GuestAddress, usize)> {
    let size = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    let low = bytes.min(GAP_START);
    let mut ranges = vec![(GuestAddress(0), size(low))];
    if bytes > low {
        ranges.push((GuestAddress(GAP_END), size(bytes - low)));
    }
    ranges
}

/// Fresh memory, taken from the host as the guest touches it.
pub fn allocate(bytes: u64) -> Result<Memory> {
    let bytes = bytes.next_multiple_of(4096);
    Memory::from_ranges(&ranges(bytes)).map_err(|e| Error::Invalid {
        field: "memory_bytes",
        value: bytes.to_string(),
        message: format!("this host cannot map that much: {e}"),
    })
}

/// First address above the memory below the gap.
pub fn low_end(memory: &Memory) -> u64 {
    use vm_memory::GuestMemoryRegion;
    memory.iter().next().map_or(0, |region| region.len())
}

/// (start, length, is memory) as firmware would tell it.
pub fn map(memory: &Memory) -> Vec<(u64, u64, bool)> {
    use vm_memory::GuestMemoryRegion;
    let mut map = vec![(0, LOW_END, true), (ACPI_TABLES, ACPI_END - ACPI_TABLES, false)];
    map.push((HIGH_START, low_end(memory).saturating_sub(HIGH_START), true));
    for region in memory.iter().skip(1) {
        map.push((region.start_addr().0, region.len(), true));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_around_the_gap() {
        assert_eq!(ranges(1 << 30), [(GuestAddress(0), 1 << 30)]);
        assert_eq!(
            ranges(4 << 30),
            [(GuestAddress(0), GAP_START as usize), (GuestAddress(GAP_END), (4 << 30) - GAP_START as usize)]
        );
        let memory = allocate(16 << 20).unwrap();
        assert_eq!(low_end(&memory), 16 << 20);
        assert_eq!(map(&memory).last(), Some(&(HIGH_START, 15 << 20, true)));
    }

    #[test]
    fn more_than_the_host_can_map_is_refused() {
        assert!(allocate(1 << 60).unwrap_err().to_string().starts_with("machine.memory_bytes"));
    }
}
