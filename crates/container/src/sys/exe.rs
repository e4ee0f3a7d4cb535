//! Moving the program that runs to another view of its own file, so that its `/proc/self/exe` is that view. What an
//! `execve(2)` of the view would do as well, for the price of another start.

use super::SingleThreaded;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// One mapping of the program's own file, from `/proc/self/maps`.
struct Segment {
    start: usize,
    end: usize,
    protection: i32,
    offset: i64,
}

/// `struct prctl_mm_map` (`linux/prctl.h`).
#[repr(C)]
#[derive(Default)]
struct MemoryMap {
    start_code: u64,
    end_code: u64,
    start_data: u64,
    end_data: u64,
    start_brk: u64,
    brk: u64,
    start_stack: u64,
    arg_start: u64,
    arg_end: u64,
    env_start: u64,
    env_end: u64,
    auxv: u64,
    auxv_size: u32,
    exe_fd: u32,
}

/// Maps this program from `view`, another descriptor of the very file that it was executed from, and makes that what
/// `/proc/self/exe` leads to. Needs `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN`; when it fails, the program goes on as
/// it was.
pub fn run_from(_: SingleThreaded, view: BorrowedFd<'_>) -> io::Result<()> {
    let (segments, mut map) = (segments()?, memory_map()?);
    let writable = writable_segments()?;
    map.exe_fd = view.as_raw_fd() as u32;
    for segment in &segments {
        let dirty = writable.iter().any(|(start, end)| segment.start >= *start && segment.end <= *end);
        if dirty { copy(segment)? } else { replace(segment, view)? }
    }
    const MAP: libc::c_int = libc::PR_SET_MM_MAP;
    // SAFETY: `map` lives across the call and its size is passed; its values are those in force, so that nothing changes
    // but the executable.
    let done = unsafe { libc::prctl(libc::PR_SET_MM, MAP, &raw const map, size_of::<MemoryMap>(), 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The same bytes of the same file at the same place.
fn replace(segment: &Segment, view: BorrowedFd<'_>) -> io::Result<()> {
    let (length, flags) = (segment.end - segment.start, libc::MAP_PRIVATE | libc::MAP_FIXED);
    // SAFETY: the range is one whole mapping of this file with this offset and protection, of a segment that is never
    // written to (its program header says so), so that what is there is the same before and after. The kernel swaps the
    // two at once, also under the instructions that run. On failure the old mapping stays, unless memory has run out.
    let at = unsafe {
        libc::mmap(
            segment.start as *mut libc::c_void,
            length,
            segment.protection,
            flags,
            view.as_raw_fd(),
            segment.offset,
        )
    };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The same bytes without a file: they have been written to, by the dynamic linker at least.
fn copy(segment: &Segment) -> io::Result<()> {
    let length = segment.end - segment.start;
    let read_write = libc::PROT_READ | libc::PROT_WRITE;
    // All pages at once: each fault costs more than the copy of its page.
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
    // SAFETY: the new mapping is this function's alone until it takes the place of `segment`, which is mapped and readable
    // (`segments` leaves others out) for `length` bytes. Between copy and move nothing writes there: there is one thread
    // (its proof is with the caller), and neither call allocates or writes to statics.
    unsafe {
        let new = libc::mmap(std::ptr::null_mut(), length, read_write, flags, -1, 0);
        if new == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        std::ptr::copy_nonoverlapping(segment.start as *const u8, new.cast::<u8>(), length);
        let moved = libc::mprotect(new, length, segment.protection) == 0
            && libc::mremap(
                new,
                length,
                length,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                segment.start as *mut libc::c_void,
            ) != libc::MAP_FAILED;
        if moved {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        libc::munmap(new, length);
        Err(error)
    }
}

fn malformed(file: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{file} is not understood"))
}

/// All mappings of the file that this very function is mapped from (proc_pid_maps(5)).
fn segments() -> io::Result<Vec<Segment>> {
    let text = fs::read_to_string("/proc/self/maps")?;
    parse_maps(&text, segments as fn() -> _ as usize).ok_or_else(|| malformed("/proc/self/maps"))
}

fn parse_maps(text: &str, inside: usize) -> Option<Vec<Segment>> {
    let mut all = Vec::new();
    let mut own = None;
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let (range, modes, offset) = (words.next()?, words.next()?, words.next()?);
        let file = (words.next()?, words.next()?);
        let (start, end) = range.split_once('-')?;
        let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
        let mut protection = 0;
        for (letter, bit) in [('r', libc::PROT_READ), ('w', libc::PROT_WRITE), ('x', libc::PROT_EXEC)] {
            if modes.contains(letter) {
                protection |= bit;
            }
        }
        if (start..end).contains(&inside) {
            own = Some(file);
        }
        let segment = Segment { start, end, protection, offset: i64::from_str_radix(offset, 16).ok()? };
        all.push((file, modes.ends_with('p') && modes.starts_with('r'), segment));
    }
    let own = own.filter(|(_, inode)| *inode != "0")?;
    all.retain(|(file, ..)| *file == own);
    all.iter().all(|(_, plain, _)| *plain).then(|| all.into_iter().map(|(.., segment)| segment).collect())
}

/// Ranges of the segments that the program may write to, now or before the linker made them read-only.
fn writable_segments() -> io::Result<Vec<(usize, usize)>> {
    // SAFETY: reads a value that the kernel has put there; any number is answered.
    let (headers, count) = unsafe { (libc::getauxval(libc::AT_PHDR), libc::getauxval(libc::AT_PHNUM)) };
    if headers == 0 || count == 0 || count > 64 {
        return Err(malformed("the program's header"));
    }
    // SAFETY: the kernel says that `count` program headers of this program are mapped there, and they stay for its life.
    let headers = unsafe { std::slice::from_raw_parts(headers as *const libc::Elf64_Phdr, count as usize) };
    let table = headers.iter().find(|h| h.p_type == libc::PT_PHDR).ok_or_else(|| malformed("the program's header"))?;
    let base = (headers.as_ptr() as usize).wrapping_sub(table.p_vaddr as usize);
    // SAFETY: asks for a number.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).map_err(io::Error::other)?;
    let ranges = headers.iter().filter(|h| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_W != 0).map(|h| {
        let start = base.wrapping_add(h.p_vaddr as usize);
        let end = start.wrapping_add(h.p_memsz as usize);
        (start & !(page - 1), end.next_multiple_of(page))
    });
    Ok(ranges.collect())
}

/// What is in force: proc_pid_stat(5), fields 26 to 28 and 45 to 51.
fn memory_map() -> io::Result<MemoryMap> {
    let text = fs::read_to_string("/proc/self/stat")?;
    // SAFETY: an address of zero is refused, and the answer is the current end.
    let brk = unsafe { libc::syscall(libc::SYS_brk, 0) } as u64;
    parse_stat(&text, brk).ok_or_else(|| malformed("/proc/self/stat"))
}

fn parse_stat(text: &str, brk: u64) -> Option<MemoryMap> {
    let (_, rest) = text.rsplit_once(')')?;
    // The first word after the name is field 3.
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok().filter(|v| *v != 0);
    Some(MemoryMap {
        start_code: field(26)?,
        end_code: field(27)?,
        start_data: field(45)?,
        end_data: field(46)?,
        start_brk: field(47)?,
        brk,
        start_stack: field(28)?,
        arg_start: field(48)?,
        arg_end: field(49)?,
        env_start: field(50)?,
        env_end: field(51)?,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_its_own_mappings() {
        let maps = "\
55d0-55e0 r--p 00000000 fe:00 12   /usr/bin/atoll
55e0-55f0 r-xp 00001000 fe:00 12   /usr/bin/atoll
55f0-5600 rw-p 00002000 fe:00 12   /usr/bin/atoll
5600-5700 rw-p 00000000 00:00 0    [heap]
7f00-7f10 r-xp 00000000 fe:00 13   /lib/libc.so.6
";
        let found = parse_maps(maps, 0x55e8).expect("found");
        let shown: Vec<_> = found.iter().map(|s| (s.start, s.end, s.protection, s.offset)).collect();
        assert_eq!(shown, [(0x55d0, 0x55e0, 1, 0), (0x55e0, 0x55f0, 5, 0x1000), (0x55f0, 0x5600, 3, 0x2000)]);
        // In no mapping, in one without a file, in a list that is cut off, in a mapping that others see.
        assert!(parse_maps(maps, 0x1).is_none() && parse_maps(maps, 0x5650).is_none());
        assert!(parse_maps("55d0-55e0 r--p", 0x55d8).is_none());
        assert!(parse_maps("55d0-55e0 r--s 00000000 fe:00 12 /x", 0x55d8).is_none());
    }

    #[test]
    fn reads_the_memory_map() {
        let mut fields: Vec<String> = (3..=52).map(|n| n.to_string()).collect();
        fields[0] = "S".into();
        let text = format!("77 (a) b) {}", fields.join(" "));
        let map = parse_stat(&text, 99).expect("parsed");
        assert_eq!((map.start_code, map.end_code, map.start_stack, map.start_data), (26, 27, 28, 45));
        assert_eq!((map.brk, map.start_brk, map.env_end), (99, 47, 51));
        assert!(parse_stat("77 (a) S 1 2", 99).is_none());
    }
}
