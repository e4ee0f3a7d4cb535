//! Kernel, initrd and command line into the guest's memory, and how its first processor enters them: the Linux boot
//! protocol's 64-bit entry (<https://docs.kernel.org/arch/x86/boot.html>) or PVH
//! (<https://xenbits.xen.org/docs/unstable/misc/pvh.html>). The files are foreign bytes.

use super::memory::{self, Memory};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use std::io::{Read, Seek, SeekFrom};
use vm_memory::{Bytes, GuestAddress, ReadVolatile};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("kernel: neither a bzImage nor a 64-bit ELF file: {0}")]
    NotAKernel(String),
    #[error("kernel: has no 64-bit entry; x86-64 Linux 3.8 or newer has one")]
    NoEntry,
    #[error("kernel: needs memory up to {needed:#x}, the machine's ends at {end:#x}; give it more")]
    KernelTooLarge { needed: u64, end: u64 },
    #[error(
        "initrd: {size} bytes do not fit between the kernel's end {kernel_end:#x} and {limit:#x}; give the machine more memory"
    )]
    InitrdTooLarge { size: u64, kernel_end: u64, limit: u64 },
    #[error("initrd: {0}")]
    Initrd(std::io::Error),
    #[error("kernel_args: {0} bytes, the kernel takes {1}")]
    CommandLine(usize, usize),
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// How the first processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit mode, identity mapped, `rsi` at the zero page.
    Long { address: u64 },
    /// 32-bit protected mode without paging, `ebx` at the start info.
    Pvh { address: u64 },
}

const PAGE: u64 = 4096;
/// Without a header that says otherwise.
const INITRD_LIMIT: u64 = 0x3800_0000;
const COMMAND_LINE_LIMIT: usize = 2047;
const HEADER_MAGIC: u32 = 0x5372_6448;
const CAN_ENTER_64: u16 = 1;
const ENTRY_64: u64 = 0x200;

struct Kernel {
    entry: Entry,
    /// First address it does not need at its start.
    end: u64,
    header: setup_header,
}

/// Anything that has to be loaded.
pub trait Source: Read + ReadVolatile + Seek {}
impl<T: Read + ReadVolatile + Seek> Source for T {}

pub fn load(
    memory: &Memory,
    kernel: &mut impl Source,
    initrd: Option<&mut impl Source>,
    command_line: &str,
) -> Result<Entry, Error> {
    let mut loaded = load_kernel(memory, kernel)?;
    let end = memory::low_end(memory);
    if loaded.end > end {
        return Err(Error::KernelTooLarge { needed: loaded.end, end });
    }
    let limit = match loaded.header.cmdline_size as usize {
        0 => COMMAND_LINE_LIMIT,
        n => n.min(COMMAND_LINE_LIMIT),
    };
    if command_line.len() > limit {
        return Err(Error::CommandLine(command_line.len(), limit));
    }
    memory.write_slice(&[command_line.as_bytes(), &[0]].concat(), GuestAddress(memory::COMMAND_LINE))?;
    let initrd = initrd.map(|file| load_initrd(memory, file, &loaded)).transpose()?;
    match loaded.entry {
        Entry::Long { .. } => zero_page(memory, &mut loaded.header, initrd)?,
        Entry::Pvh { .. } => start_info(memory, initrd)?,
    }
    Ok(loaded.entry)
}

fn load_kernel(memory: &Memory, file: &mut impl Source) -> Result<Kernel, Error> {
    let high = Some(GuestAddress(memory::HIGH_START));
    let mut magic = [0u8; 4];
    let is_elf = file.rewind().and_then(|()| file.read_exact(&mut magic)).is_ok() && magic == *b"\x7fELF";
    if is_elf {
        let loaded = Elf::load(memory, None, file, high).map_err(|e| Error::NotAKernel(e.to_string()))?;
        let entry = match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(address) => Entry::Pvh { address: address.0 },
            PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => {
                Entry::Long { address: loaded.kernel_load.0 }
            }
        };
        let header = setup_header { kernel_alignment: 0x100_0000, ..Default::default() };
        return Ok(Kernel { entry, end: loaded.kernel_end, header });
    }
    let start = Some(GuestAddress(memory::HIGH_START));
    let loaded = BzImage::load(memory, start, file, high).map_err(|e| Error::NotAKernel(e.to_string()))?;
    let header = loaded.setup_header.unwrap_or_default();
    if header.version < 0x20c || header.xloadflags & CAN_ENTER_64 == 0 {
        return Err(Error::NoEntry);
    }
    // it unpacks itself to the address it was linked for
    let end = header.pref_address.saturating_add(u64::from(header.init_size)).max(loaded.kernel_end);
    let entry = Entry::Long { address: loaded.kernel_load.0 + ENTRY_64 };
    Ok(Kernel { entry, end, header })
}

/// As high as it may lie, so that it is out of the kernel's way. Returns (address, size).
fn load_initrd(memory: &Memory, file: &mut impl Source, kernel: &Kernel) -> Result<(u64, u64), Error> {
    let size = file.seek(SeekFrom::End(0)).map_err(Error::Initrd)?;
    file.rewind().map_err(Error::Initrd)?;
    let allowed = match kernel.header.initrd_addr_max {
        0 => INITRD_LIMIT,
        last => u64::from(last) + 1,
    };
    let limit = memory::low_end(memory).min(allowed);
    let kernel_end = kernel.end;
    let at = limit.checked_sub(size).map(|at| at & !(PAGE - 1)).filter(|at| *at >= kernel_end);
    let at = at.ok_or(Error::InitrdTooLarge { size, kernel_end, limit })?;
    let length = usize::try_from(size).map_err(|_| Error::InitrdTooLarge { size, kernel_end, limit })?;
    memory.read_exact_volatile_from(GuestAddress(at), file, length)?;
    Ok((at, size))
}

fn zero_page(memory: &Memory, header: &mut setup_header, initrd: Option<(u64, u64)>) -> Result<(), Error> {
    header.boot_flag = 0xaa55;
    header.header = HEADER_MAGIC;
    header.type_of_loader = 0xff;
    header.cmd_line_ptr = memory::COMMAND_LINE as u32;
    if let Some((at, size)) = initrd {
        (header.ramdisk_image, header.ramdisk_size) = (at as u32, size as u32);
    }
    let mut page = boot_params { hdr: *header, acpi_rsdp_addr: memory::ACPI_TABLES, ..Default::default() };
    let map = memory::map(memory);
    for (slot, (addr, size, usable)) in page.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry { addr: *addr, size: *size, r#type: if *usable { 1 } else { 2 } };
    }
    page.e820_entries = map.len() as u8;
    Ok(memory.write_obj(page, GuestAddress(memory::ZERO_PAGE))?)
}

fn start_info(memory: &Memory, initrd: Option<(u64, u64)>) -> Result<(), Error> {
    let map = memory::map(memory);
    let modules = memory::START_INFO_TABLES;
    let table = modules + size_of::<hvm_modlist_entry>() as u64;
    let info = hvm_start_info {
        magic: 0x336e_c578,
        version: 1,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { modules } else { 0 },
        cmdline_paddr: memory::COMMAND_LINE,
        rsdp_paddr: memory::ACPI_TABLES,
        memmap_paddr: table,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    memory.write_obj(info, GuestAddress(memory::START_INFO))?;
    if let Some((paddr, size)) = initrd {
        memory.write_obj(hvm_modlist_entry { paddr, size, ..Default::default() }, GuestAddress(modules))?;
    }
    for (index, (addr, size, usable)) in map.iter().enumerate() {
        let type_ = if *usable { 1 } else { 2 };
        let entry = hvm_memmap_table_entry { addr: *addr, size: *size, type_, reserved: 0 };
        memory.write_obj(entry, GuestAddress(table + (index * size_of::<hvm_memmap_table_entry>()) as u64))?;
    }
    Ok(())
}

/// For fuzzing: any bytes are a kernel, and an initrd.
pub fn fuzz(data: &[u8]) {
    let Ok(memory) = memory::allocate(16 << 20) else { return };
    let (mut kernel, mut initrd) = (std::io::Cursor::new(data), std::io::Cursor::new(data));
    let _ = load(&memory, &mut kernel, Some(&mut initrd), "");
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn elf(entry: u64, paddr: u64, filesz: u64, memsz: u64) -> Vec<u8> {
        let mut file = vec![0u8; 120];
        file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        file[16..24].copy_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
        file[24..32].copy_from_slice(&entry.to_le_bytes());
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[52..58].copy_from_slice(&[64, 0, 56, 0, 1, 0]);
        file[64..72].copy_from_slice(&[1, 0, 0, 0, 5, 0, 0, 0]);
        file[72..80].copy_from_slice(&120u64.to_le_bytes());
        file[88..96].copy_from_slice(&paddr.to_le_bytes());
        file[96..104].copy_from_slice(&filesz.to_le_bytes());
        file[104..112].copy_from_slice(&memsz.to_le_bytes());
        file.extend([0xf4; 16]);
        file
    }

    fn go(kernel: Vec<u8>, initrd: Option<Vec<u8>>, args: &str) -> Result<Entry, Error> {
        let memory = memory::allocate(16 << 20).unwrap();
        load(&memory, &mut Cursor::new(kernel), initrd.map(Cursor::new).as_mut(), args)
    }

    #[test]
    fn an_elf_kernel_is_entered_where_it_says() {
        assert_eq!(go(elf(0x10_0000, 0x10_0000, 16, 16), None, "").unwrap(), Entry::Long { address: 0x10_0000 });
    }

    #[test]
    fn what_does_not_fit_or_is_no_kernel_is_named() {
        let small = || elf(0x10_0000, 0x10_0000, 16, 16);
        let cases = [
            (go(b"MZ".to_vec(), None, ""), "kernel: neither"),
            (go(Vec::new(), None, ""), "kernel: neither"),
            (go(elf(0x10_0000, 0x10_0000, 17, 17), None, ""), "kernel: neither"),
            (go(elf(0x10_0000, u64::MAX - 4, 16, 16), None, ""), "kernel: neither"),
            (go(elf(0x10_0000, 0x10_0000, 16, 1 << 40), None, ""), "kernel: needs memory"),
            (go(small(), Some(vec![0; 16 << 20]), ""), "initrd: 16777216 bytes"),
            (go(small(), None, &"x".repeat(3000)), "kernel_args: 3000"),
        ];
        for (result, expected) in cases {
            let text = result.unwrap_err().to_string();
            assert!(text.starts_with(expected), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_file_makes_the_loader_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..4096)) {
            let memory = memory::allocate(16 << 20).unwrap();
            let mut with_magic = elf(0x10_0000, 0x10_0000, 16, 16);
            for (at, byte) in bytes.iter().take(100).enumerate() {
                with_magic[16 + at] = *byte;
            }
            let none = None::<&mut Cursor<Vec<u8>>>;
            let _ = load(&memory, &mut Cursor::new(with_magic), none, "");
            let mut image = bytes;
            image.resize(4096, 0);
            image[0x202..0x206].copy_from_slice(b"HdrS");
            let none = None::<&mut Cursor<Vec<u8>>>;
            let _ = load(&memory, &mut Cursor::new(image), none, "");
        }
    }
}
