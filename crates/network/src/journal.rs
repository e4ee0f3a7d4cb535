//! Address allocations on disk: an append-only file of checked records, rewritten when most of it is history.
//!
//! ```text
//! atoll-network 1
//! <8 hex digits: FNV-1a of the rest> <JSON record>
//! ```
//!
//! A record that does not check (the tail of a crash) is passed over. Records of addresses that must survive a power
//! cut (those with a key) are synced before they are used; others only have to survive the process, since a reboot
//! takes their workloads with it.

use crate::config::{Cidr, Cidr6};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

const VERSION: u32 = 1;
const MAGIC: &str = "atoll-network ";
const MAX_SIZE: u64 = 256 << 20;
/// Lines of history that are tolerated before the file is rewritten.
const SLACK: usize = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Namespace,
    Tap,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Record {
    /// A workload has an address.
    Attach { uid: String, namespace: String, key: Option<String>, address: Ipv4Addr, kind: Kind },
    /// It has gone; an address with a key stays reserved.
    Detach { uid: String },
    /// A key's reservation, on its own.
    Reserve { key: String, address: Ipv4Addr },
    /// A key's reservation has ended.
    Forget { key: String },
    /// A subnet, before what has addresses of it.
    Subnet { name: String, cidr: Cidr, cidr6: Option<Cidr6> },
    /// It has gone.
    NoSubnet { name: String },
}

pub struct Journal {
    path: PathBuf,
    file: File,
    lines: usize,
}

impl Journal {
    /// Opens or makes the journal and hands its records, oldest first, to `each`.
    pub fn open(path: &Path, each: impl FnMut(Record)) -> Result<Journal> {
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(Error::file("open the address journal", path))?;
        let mut bytes = Vec::new();
        let read = (&mut file).take(MAX_SIZE + 1).read_to_end(&mut bytes);
        if read.map_err(Error::file("read the address journal", path))? as u64 > MAX_SIZE {
            let why = format!("larger than {MAX_SIZE} bytes; move it away, workloads then get new addresses");
            return Err(Error::Config { field: "address journal", value: path.display().to_string(), why });
        }
        let mut journal = Journal { path: path.to_owned(), file, lines: 0 };
        if bytes.is_empty() {
            journal.rewrite(&[])?;
        } else {
            journal.lines = replay(path, &bytes, each)?;
            if bytes.last() != Some(&b'\n') {
                journal.file.write_all(b"\n").map_err(Error::file("mend the address journal", path))?;
            }
        }
        Ok(journal)
    }

    /// Adds a record; with `sync` it is on the disk before this returns.
    pub fn append(&mut self, record: &Record, sync: bool) -> Result<()> {
        self.file.write_all(line(record).as_bytes()).map_err(Error::file("write the address journal", &self.path))?;
        self.lines += 1;
        if sync {
            self.file.sync_data().map_err(Error::file("sync the address journal", &self.path))?;
        }
        Ok(())
    }

    /// Whether a rewrite down to `live` records is worth it.
    pub fn is_long(&self, live: usize) -> bool {
        self.lines > 2 * live + SLACK
    }

    /// Replaces the file by one with these records only.
    pub fn rewrite(&mut self, records: &[Record]) -> Result<()> {
        let error = || Error::file("rewrite the address journal", &self.path);
        let new = self.path.with_extension("new");
        let mut text = format!("{MAGIC}{VERSION}\n");
        text.extend(records.iter().map(line));
        let mut file = File::create(&new).map_err(error())?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(error())?;
        fs::rename(&new, &self.path).map_err(error())?;
        if let Some(dir) = self.path.parent() {
            File::open(dir).and_then(|dir| dir.sync_all()).map_err(error())?;
        }
        self.file = OpenOptions::new().append(true).open(&self.path).map_err(error())?;
        self.lines = records.len();
        Ok(())
    }
}

fn line(record: &Record) -> String {
    // Records are plain enums of strings and addresses: they always serialise.
    let json = serde_json::to_string(record).unwrap_or_default();
    format!("{:08x} {json}\n", checksum(json.as_bytes()))
}

fn replay(path: &Path, bytes: &[u8], mut each: impl FnMut(Record)) -> Result<usize> {
    let mut lines = bytes.split(|b| *b == b'\n');
    let head = String::from_utf8_lossy(lines.next().unwrap_or_default()).into_owned();
    if head != format!("{MAGIC}{VERSION}") {
        let found = head.strip_prefix(MAGIC).unwrap_or("unknown").chars().take(20).collect();
        return Err(Error::JournalVersion { path: path.to_owned(), found, known: VERSION });
    }
    let mut count = 0;
    for line in lines.filter(|line| !line.is_empty()) {
        count += 1;
        match parse(line) {
            Some(record) => each(record),
            None => tracing::warn!(path = %path.display(), line = count, "passed over a damaged address record"),
        }
    }
    Ok(count)
}

fn parse(line: &[u8]) -> Option<Record> {
    let (sum, json) = (line.get(..8)?, line.get(9..)?);
    let sum = u32::from_str_radix(std::str::from_utf8(sum).ok()?, 16).ok()?;
    if checksum(json) != sum {
        return None;
    }
    serde_json::from_slice(json).ok()
}

/// FNV-1a: against torn writes, not against people.
fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reserve(n: u8) -> Record {
        Record::Reserve { key: format!("k{n}"), address: Ipv4Addr::new(10, 42, 0, n) }
    }
    fn read(path: &Path) -> Vec<Record> {
        let mut all = Vec::new();
        Journal::open(path, |record| all.push(record)).unwrap();
        all
    }

    #[test]
    fn the_format_is_pinned() {
        let record = Record::Attach {
            uid: "u".into(),
            namespace: "default".into(),
            key: None,
            address: Ipv4Addr::new(10, 42, 0, 2),
            kind: Kind::Tap,
        };
        let want = "bb0359b9 {\"attach\":{\"uid\":\"u\",\"namespace\":\"default\",\"key\":null,\
                    \"address\":\"10.42.0.2\",\"kind\":\"tap\"}}\n";
        assert_eq!(line(&record), want);
        assert_eq!(parse(want.trim().as_bytes()), Some(record));
        let (cidr, cidr6) = ("10.44.1.0/24".parse().unwrap(), "fd00:10:44:1::/64".parse().ok());
        let record = Record::Subnet { name: "shop/edge".into(), cidr, cidr6 };
        let want = "{\"subnet\":{\"name\":\"shop/edge\",\"cidr\":\"10.44.1.0/24\",\"cidr6\":\"fd00:10:44:1::/64\"}}\n";
        assert_eq!(line(&record).get(9..), Some(want));
        assert_eq!(parse(line(&record).trim().as_bytes()), Some(record));
    }

    #[test]
    fn records_come_back_and_a_torn_tail_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("addresses");
        let mut journal = Journal::open(&path, |_| {}).unwrap();
        journal.append(&reserve(1), true).unwrap();
        journal.append(&reserve(2), false).unwrap();
        drop(journal);
        let whole = fs::read(&path).unwrap();
        assert_eq!(read(&path), [reserve(1), reserve(2)]);
        fs::write(&path, &whole[..whole.len() - 5]).unwrap();
        assert_eq!(read(&path), [reserve(1)]);
        Journal::open(&path, |_| {}).unwrap().append(&reserve(3), false).unwrap();
        assert_eq!(read(&path), [reserve(1), reserve(3)]);
    }

    #[test]
    fn a_newer_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("addresses");
        fs::write(&path, "atoll-network 2\n").unwrap();
        let error = Journal::open(&path, |_| {}).err().unwrap().to_string();
        assert!(error.contains("version 2"), "{error}");
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut text = format!("{MAGIC}{VERSION}\n").into_bytes();
            text.extend(&bytes);
            let _ = replay(Path::new("x"), &text, |_| {});
            let _ = replay(Path::new("x"), &bytes, |_| {});
        }
    }
}
