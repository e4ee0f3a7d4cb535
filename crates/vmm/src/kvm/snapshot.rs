//! A machine's state outside its memory, as a file; its memory is another ([`memory`]).
//!
//! ```text
//! state    magic "ATOLLSNP", version u32, length of the body u32, CRC-32 of the body u32, body: JSON
//! memory   the guest's memory from its first byte to its last, holes where it is zero; then a page with
//!          magic "ATOLLMEM", version u32, bytes before it u64, id
//! ```
//!
//! Numbers are little-endian. A difference is the memory file of another snapshot with only some pages in it; the state
//! says which, and the id of the file they go over. What is read here was written by an engine that a guest may have taken
//! over: it is read in the jail, and nothing in it is believed that could reach beyond the machine.

pub mod memory;

use super::arch;
use super::serial;
use super::virtio::mmio;
use kvm_bindings::kvm_cpuid_entry2;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::unix::fs::FileExt;

const MAGIC: [u8; 8] = *b"ATOLLSNP";
pub const VERSION: u32 = 1;
const HEAD: usize = 20;
/// A difference of a million runs of pages, the states of 32 processors.
const LONGEST: usize = 64 << 20;

/// Of a memory file; random.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Id(pub [u8; 16]);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("snapshot: {0}")]
    Read(std::io::Error),
    #[error("snapshot: is no snapshot of a machine (its first bytes are not \"ATOLLSNP\")")]
    NotASnapshot,
    #[error("snapshot: version {0}, this program reads version {VERSION}; restore it with the program that wrote it")]
    Version(u32),
    #[error("snapshot: {0} bytes of state, more than there can be")]
    TooLarge(u32),
    #[error("snapshot: cut short, or changed since it was written")]
    Damaged,
    #[error("snapshot: {0}")]
    Content(String),
    #[error("snapshot: {what} {then} when it was taken, {now} now; restore it with the description it was taken with")]
    Another { what: &'static str, then: String, now: String },
    #[error("snapshot: {0}; restore it on a computer like the one it was taken on")]
    Processor(String),
}

/// What a description and a snapshot must agree on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outline {
    pub vcpus: u8,
    pub memory_bytes: u64,
    /// Virtio's number of each device and, of disks, their size.
    pub devices: Vec<(u32, u64)>,
}

impl Outline {
    pub fn fits(&self, now: &Outline) -> Result<(), Error> {
        let another = |what, then: String, now: String| Err(Error::Another { what, then, now });
        if self.vcpus != now.vcpus {
            return another("processors:", self.vcpus.to_string(), now.vcpus.to_string());
        }
        if self.memory_bytes != now.memory_bytes {
            return another("bytes of memory:", self.memory_bytes.to_string(), now.memory_bytes.to_string());
        }
        if self.devices != now.devices {
            let list = |outline: &Outline| format!("{:?}", outline.devices);
            return another("devices (kind, size):", list(self), list(now));
        }
        Ok(())
    }
}

#[derive(Serialize, Deserialize)]
pub struct State {
    /// Of the memory file that belongs to this.
    pub id: Id,
    /// What this is a difference to, and the pages it has: (first, how many).
    pub base: Option<(Id, Vec<(u64, u64)>)>,
    /// Of the memory file's pages that are not zero, in their order.
    pub memory_sum: u64,
    pub outline: Outline,
    /// All that KVM offered, before anything was hidden from the guest.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    pub vcpus: Vec<arch::state::Vcpu>,
    pub chips: arch::state::Chips,
    pub devices: Vec<mmio::Saved>,
    pub serial: serial::Saved,
}

impl State {
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        seal(self)
    }

    pub fn decode(bytes: &[u8]) -> Result<State, Error> {
        open(bytes)
    }

    pub fn read(file: &File) -> Result<State, Error> {
        read(file)
    }

    /// Whether this can go on in a machine so described, on a computer whose guests are shown `here`, the one it was taken on
    /// having shown `there`.
    pub fn fits(&self, now: &Outline, there: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Result<(), Error> {
        self.outline.fits(now)?;
        if self.vcpus.len() != usize::from(now.vcpus) || self.devices.len() != now.devices.len() {
            return Err(Error::Content("has not all processors and devices that it says it has".into()));
        }
        arch::state::misses(there, here).map_or(Ok(()), |why| Err(Error::Processor(why)))
    }
}

/// What is wanted on disk, with a head that tells what it is and whether it is whole.
pub fn seal(what: &impl Serialize) -> Result<Vec<u8>, Error> {
    let body = serde_json::to_vec(what).map_err(|e| Error::Content(e.to_string()))?;
    let length = u32::try_from(body.len()).ok().filter(|n| *n as usize <= LONGEST);
    let length = length.ok_or(Error::TooLarge(u32::MAX))?;
    let sum = sum(&body);
    Ok([&MAGIC[..], &VERSION.to_le_bytes(), &length.to_le_bytes(), &sum.to_le_bytes(), &body].concat())
}

fn open<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    let (head, body) = bytes.split_first_chunk::<HEAD>().ok_or(Error::NotASnapshot)?;
    let length = check_head(head)?;
    let body = body.get(..length).filter(|_| body.len() == length).ok_or(Error::Damaged)?;
    if sum(body) != number(head, 16) {
        return Err(Error::Damaged);
    }
    serde_json::from_slice(body).map_err(|e| Error::Content(e.to_string()))
}

pub fn read<T: DeserializeOwned>(file: &File) -> Result<T, Error> {
    let length = file.metadata().map_err(Error::Read)?.len();
    let mut head = [0u8; HEAD];
    file.read_exact_at(&mut head, 0).map_err(|_| Error::NotASnapshot)?;
    let body = check_head(&head)?;
    if length != (HEAD + body) as u64 {
        return Err(Error::Damaged);
    }
    let mut bytes = vec![0u8; HEAD + body];
    file.read_exact_at(&mut bytes, 0).map_err(Error::Read)?;
    open(&bytes)
}

fn number(head: &[u8; HEAD], at: usize) -> u32 {
    head.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// Length of the body.
fn check_head(head: &[u8; HEAD]) -> Result<usize, Error> {
    if !head.starts_with(&MAGIC) {
        return Err(Error::NotASnapshot);
    }
    match (number(head, 8), number(head, 12)) {
        (VERSION, length) if length as usize <= LONGEST => Ok(length as usize),
        (VERSION, length) => Err(Error::TooLarge(length)),
        (other, _) => Err(Error::Version(other)),
    }
}

fn sum(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// For fuzzing: any bytes as a state file; and, so that what is behind the checksum is reached, as the body of a good one.
pub fn fuzz(data: &[u8]) {
    let _ = State::decode(data);
    let head = [&MAGIC[..], &VERSION.to_le_bytes(), &(data.len() as u32).to_le_bytes(), &sum(data).to_le_bytes()];
    if let Ok(state) = State::decode(&[&head.concat()[..], data].concat()) {
        let _ = state.fits(&state.outline, &state.cpuid, &[]);
        if let Some((_, runs)) = &state.base {
            let _ = memory::check_runs(runs, state.outline.memory_bytes);
        }
        for device in &state.devices {
            device.fuzz();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        let body = format!(
            r#"{{"id":{id},"base":null,"memory_sum":0,"outline":{{"vcpus":0,"memory_bytes":4096,"devices":[[4,0]]}},
            "cpuid":[],"vcpus":[],"chips":{{"controllers":[],"pit":[],"clock":[]}},"devices":[],
            "serial":{{"registers":[0,0,0,0,0,0,0,0,0],"input":[]}}}}"#,
            id = serde_json::to_string(&[7u8; 16]).unwrap()
        );
        serde_json::from_str(&body).unwrap()
    }

    #[test]
    fn what_is_not_whole_or_not_ours_is_refused_with_the_reason() {
        let good = state().encode().unwrap();
        assert_eq!(State::decode(&good).unwrap().id, Id([7; 16]));
        let said = |bytes: &[u8]| State::decode(bytes).err().unwrap().to_string();
        for cut in 0..good.len() {
            let why = said(&good[..cut]);
            assert!(why.contains("no snapshot") || why.contains("cut short"), "{cut}: {why}");
        }
        for at in 0..good.len() {
            let mut flipped = good.clone();
            flipped[at] ^= 1 << (at % 8);
            assert!(State::decode(&flipped).is_err(), "byte {at}");
        }
        let mut newer = good.clone();
        newer[8] = 2;
        assert!(said(&newer).contains("version 2, this program reads version 1"));
        let mut longer = good.clone();
        longer.push(0);
        assert!(said(&longer).contains("cut short"));
        let mut huge = good;
        huge[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(said(&huge).contains("more than there can be"));
    }

    #[test]
    fn another_machine_is_refused_by_name() {
        let state = state();
        let now = state.outline.clone();
        assert!(state.fits(&now, &[], &[]).unwrap_err().to_string().contains("devices"), "it has no state of one");
        let other = Outline { memory_bytes: 8192, ..now.clone() };
        assert!(
            state
                .fits(&other, &[], &[])
                .unwrap_err()
                .to_string()
                .contains("bytes of memory: 4096 when it was taken, 8192")
        );
        let other = Outline { vcpus: 2, ..now };
        assert!(state.fits(&other, &[], &[]).unwrap_err().to_string().contains("processors: 0"));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            fuzz(&bytes);
        }
    }
}
