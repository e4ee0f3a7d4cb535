//! bpf(2): maps and programs.

use rustix::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::io;

const MAP_CREATE: libc::c_int = 0;
const MAP_LOOKUP: libc::c_int = 1;
const MAP_UPDATE: libc::c_int = 2;
const MAP_DELETE: libc::c_int = 3;
const PROGRAM_LOAD: libc::c_int = 5;
const PROGRAM_OF_FILTER: u32 = 3;
/// Elements are not made before they are needed.
const NO_PREALLOCATION: u32 = 1;
const VERIFIER_LOG: usize = 64 << 10;

#[derive(Clone, Copy)]
pub enum MapKind {
    Hash = 1,
    Array = 2,
    ArrayOfProcessor = 6,
    /// What was not used for longest goes first.
    RecentHash = 9,
}

/// A map with keys of `K` and values of `V` bytes.
pub struct Map<const K: usize, const V: usize>(OwnedFd);

#[repr(C)]
#[derive(Default)]
struct Create {
    kind: u32,
    key: u32,
    value: u32,
    entries: u32,
    flags: u32,
    rest: [u32; 7],
}

#[repr(C)]
#[derive(Default)]
struct Element {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel: u32,
    flags: u32,
    name: [u8; 16],
}

/// # Safety
/// Pointers in `attributes` are of what the command reads and writes there, and live as long as it.
unsafe fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: the pointer and length describe `attributes`; what it points to is the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as libc::c_int) }
}

impl<const K: usize, const V: usize> Map<K, V> {
    pub fn new(kind: MapKind, entries: u32) -> io::Result<Map<K, V>> {
        let flags = if matches!(kind, MapKind::Hash) { NO_PREALLOCATION } else { 0 };
        let mut create =
            Create { kind: kind as u32, key: K as u32, value: V as u32, entries, flags, ..Create::default() };
        // SAFETY: there are no pointers; the result is a new descriptor that nothing else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(bpf(MAP_CREATE, &mut create)?) };
        Ok(Map(fd))
    }
    pub fn descriptor(&self) -> i32 {
        self.0.as_raw_fd()
    }
    fn element(&self, key: &[u8; K], value: *const u8) -> Element {
        Element { map: self.0.as_raw_fd() as u32, key: key.as_ptr() as u64, value: value as u64, ..Element::default() }
    }
    pub fn set(&self, key: &[u8; K], value: &[u8; V]) -> io::Result<()> {
        let mut element = self.element(key, value.as_ptr());
        // SAFETY: the kernel reads K bytes of the key and V of the value, which both have and which outlive the call.
        unsafe { bpf(MAP_UPDATE, &mut element) }.map(drop)
    }
    /// `None`: there is no such element. Not for [`MapKind::ArrayOfProcessor`], which has a value for each processor.
    pub fn get(&self, key: &[u8; K]) -> io::Result<Option<[u8; V]>> {
        let mut value = [0; V];
        let mut element = self.element(key, value.as_mut_ptr());
        // SAFETY: the kernel reads K bytes of the key and writes V bytes to `value`, which have them and outlive the call.
        match unsafe { bpf(MAP_LOOKUP, &mut element) } {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }
    /// An element that is not there is no error.
    pub fn remove(&self, key: &[u8; K]) -> io::Result<()> {
        let mut element = self.element(key, std::ptr::null());
        // SAFETY: the kernel reads K bytes of the key, which has them and outlives the call.
        match unsafe { bpf(MAP_DELETE, &mut element) } {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
            _ => Ok(()),
        }
    }
}

/// Has the kernel check and take a program for traffic filters. An error carries the end of what the verifier said.
pub fn load_filter(name: &str, instructions: &[[u8; 8]]) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let mut load = Load {
        kind: PROGRAM_OF_FILTER,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        ..Load::default()
    };
    for (to, from) in load.name.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    // SAFETY: the kernel reads `count` instructions of eight bytes and a terminated string, which outlive the call.
    let first = unsafe { bpf(PROGRAM_LOAD, &mut load) };
    let refused = match first {
        // SAFETY: a new descriptor that nothing else owns.
        Ok(fd) => return Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        Err(error) => error,
    };
    let mut log = vec![0u8; VERIFIER_LOG];
    (load.log_level, load.log_size, load.log) = (1, log.len() as u32, log.as_mut_ptr() as u64);
    // SAFETY: as before; the kernel writes at most `log_size` bytes to `log`, which has them and outlives the call.
    if let Ok(fd) = unsafe { bpf(PROGRAM_LOAD, &mut load) } {
        // SAFETY: a new descriptor that nothing else owns.
        return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    let said = String::from_utf8_lossy(&log);
    let said = said.trim_end_matches(['\0', '\n']);
    let tail: Vec<&str> = said.lines().rev().take(6).collect();
    if tail.is_empty() {
        return Err(refused);
    }
    Err(io::Error::new(refused.kind(), format!("{refused}: {}", tail.into_iter().rev().collect::<Vec<_>>().join("; "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_keep_what_they_are_given() {
        if !rustix::process::geteuid().is_root() {
            return println!("SKIPPED: needs root");
        }
        let map = Map::<4, 8>::new(MapKind::Hash, 4).unwrap();
        assert_eq!(map.get(&[1; 4]).unwrap(), None);
        map.set(&[1; 4], &[2; 8]).unwrap();
        assert_eq!(map.get(&[1; 4]).unwrap(), Some([2; 8]));
        map.remove(&[1; 4]).unwrap();
        map.remove(&[1; 4]).unwrap();
        assert_eq!(map.get(&[1; 4]).unwrap(), None);
    }

    #[test]
    fn a_program_that_the_verifier_refuses_is_an_error_with_its_words() {
        if !rustix::process::geteuid().is_root() {
            return println!("SKIPPED: needs root");
        }
        // It ends without a result.
        let error = load_filter("bad", &[[0x95, 0, 0, 0, 0, 0, 0, 0]]).err().unwrap().to_string();
        assert!(error.contains("R0"), "{error}");
    }
}
