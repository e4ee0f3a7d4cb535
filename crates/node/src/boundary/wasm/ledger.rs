//! What functions used, by namespace and account (the Knative Service, else the pod): requests, memory by time, bytes sent, requests of
//! their own.
//!
//! Hosts count for each function since it was added, and go on counting when no agent is there. The ledger remembers how
//! far it has booked each function, in the same file as the sums: whatever moment an agent is killed at, nothing is booked
//! twice.

use function::FunctionStats;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

const MAGIC: &str = "atoll-function-ledger";
const VERSION: u32 = 1;
const LIMIT: u64 = 64 << 20;

/// Since the ledger began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Usage {
    pub requests: u64,
    pub failures: u64,
    pub cpu_nanos: u64,
    pub run_micros: u64,
    /// KiB by microseconds.
    pub memory_kib_micros: u64,
    pub sent_bytes: u64,
    /// Requests of the functions' own, and bytes of their connections.
    #[serde(default)]
    pub outbound_requests: u64,
    #[serde(default)]
    pub outbound_sent_bytes: u64,
    #[serde(default)]
    pub outbound_received_bytes: u64,
    #[serde(default)]
    pub received_bytes: u64,
    #[serde(default)]
    pub cold_starts: u64,
    #[serde(default)]
    pub queue_micros: u64,
    /// Requests by how long they took ([`function::BOUNDS`]), and all their time.
    #[serde(default)]
    pub durations: Durations,
    #[serde(default)]
    pub duration_micros: u64,
}

type Durations = [u64; function::BOUNDS.len() + 1];

impl Usage {
    fn of(stats: &FunctionStats) -> Usage {
        Usage {
            requests: stats.requests,
            failures: stats.failures,
            cpu_nanos: stats.cpu_nanos,
            run_micros: stats.run_micros,
            memory_kib_micros: stats.memory_kib_micros,
            sent_bytes: stats.sent_bytes,
            outbound_requests: stats.outbound_requests,
            outbound_sent_bytes: stats.outbound_sent_bytes,
            outbound_received_bytes: stats.outbound_received_bytes,
            received_bytes: stats.received_bytes,
            cold_starts: stats.cold_starts,
            queue_micros: stats.queue_micros,
            durations: stats.durations,
            duration_micros: stats.duration_micros,
        }
    }

    fn each(self, other: Usage, work: impl Fn(u64, u64) -> u64) -> Usage {
        let mut durations = self.durations;
        for (one, other) in durations.iter_mut().zip(other.durations) {
            *one = work(*one, other);
        }
        Usage {
            requests: work(self.requests, other.requests),
            failures: work(self.failures, other.failures),
            cpu_nanos: work(self.cpu_nanos, other.cpu_nanos),
            run_micros: work(self.run_micros, other.run_micros),
            memory_kib_micros: work(self.memory_kib_micros, other.memory_kib_micros),
            sent_bytes: work(self.sent_bytes, other.sent_bytes),
            outbound_requests: work(self.outbound_requests, other.outbound_requests),
            outbound_sent_bytes: work(self.outbound_sent_bytes, other.outbound_sent_bytes),
            outbound_received_bytes: work(self.outbound_received_bytes, other.outbound_received_bytes),
            received_bytes: work(self.received_bytes, other.received_bytes),
            cold_starts: work(self.cold_starts, other.cold_starts),
            queue_micros: work(self.queue_micros, other.queue_micros),
            durations,
            duration_micros: work(self.duration_micros, other.duration_micros),
        }
    }

    /// GiB by seconds.
    pub fn gib_seconds(&self) -> f64 {
        self.memory_kib_micros as f64 / f64::from(1 << 20) / 1e6
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Book {
    magic: String,
    version: u32,
    accounts: BTreeMap<String, Usage>,
    /// By function: what of it is in the sums.
    booked: BTreeMap<String, Usage>,
}

pub(super) struct Ledger {
    dir: PathBuf,
    books: Mutex<BTreeMap<String, Book>>,
}

impl Ledger {
    pub fn new(data_dir: &Path) -> Ledger {
        Ledger { dir: dir(data_dir), books: Mutex::default() }
    }

    /// Books what functions (account, id, what their host counted) used since the last time.
    pub fn book(&self, namespace: &str, functions: &[(String, String, FunctionStats)]) -> io::Result<()> {
        self.change(namespace, |book| {
            let mut changed = false;
            for (account, id, stats) in functions {
                let now = Usage::of(stats);
                let before = book.booked.get(id).copied().unwrap_or_default();
                // A host that was started anew counts from zero again.
                let new = if now.requests < before.requests { now } else { now.each(before, u64::saturating_sub) };
                if new == Usage::default() {
                    continue;
                }
                let sum = book.accounts.entry(account.clone()).or_default();
                *sum = sum.each(new, u64::saturating_add);
                book.booked.insert(id.clone(), now);
                changed = true;
            }
            changed
        })
    }

    /// Of all accounts of a namespace that was booked.
    pub fn sums(&self, namespace: &str) -> BTreeMap<String, Usage> {
        let books = self.books.lock().unwrap_or_else(|e| e.into_inner());
        books.get(namespace).map(|book| book.accounts.clone()).unwrap_or_default()
    }

    /// A function is gone; its sums stay.
    pub fn close(&self, namespace: &str, id: &str) -> io::Result<()> {
        self.change(namespace, |book| book.booked.remove(id).is_some())
    }

    fn change(&self, namespace: &str, work: impl FnOnce(&mut Book) -> bool) -> io::Result<()> {
        let mut books = self.books.lock().unwrap_or_else(|e| e.into_inner());
        if !books.contains_key(namespace) {
            books.insert(namespace.to_owned(), read(&self.dir, namespace)?);
        }
        let Some(book) = books.get_mut(namespace) else { return Ok(()) };
        if work(book) { write(&self.dir, namespace, book) } else { Ok(()) }
    }
}

/// All namespaces' accounts, as last written.
pub fn usage(data_dir: &Path) -> io::Result<BTreeMap<String, BTreeMap<String, Usage>>> {
    let dir = dir(data_dir);
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(e) => return Err(e),
    };
    let mut all = BTreeMap::new();
    for entry in entries {
        let name = entry?.file_name();
        if let Some(namespace) = name.to_str().and_then(|name| name.strip_suffix(".json")) {
            all.insert(namespace.to_owned(), read(&dir, namespace)?.accounts);
        }
    }
    Ok(all)
}

fn dir(data_dir: &Path) -> PathBuf {
    data_dir.join("functions").join("ledger")
}

/// Namespaces are DNS labels: no path hides in one.
fn file(dir: &Path, namespace: &str) -> PathBuf {
    dir.join(format!("{namespace}.json"))
}

fn read(dir: &Path, namespace: &str) -> io::Result<Book> {
    let path = file(dir, namespace);
    let bad = |why: &str| io::Error::new(ErrorKind::InvalidData, format!("{}: {why}", path.display()));
    let opened = match File::open(&path) {
        Ok(opened) => opened,
        Err(e) if e.kind() == ErrorKind::NotFound => {
            return Ok(Book { magic: MAGIC.into(), version: VERSION, ..Book::default() });
        }
        Err(e) => return Err(e),
    };
    if opened.metadata()?.len() > LIMIT {
        return Err(bad("too large for a ledger"));
    }
    let book: Book = serde_json::from_reader(io::BufReader::new(opened)).map_err(|e| bad(&e.to_string()))?;
    match (book.magic.as_str(), book.version) {
        (MAGIC, VERSION) => Ok(book),
        _ => Err(bad("not a ledger of this version")),
    }
}

fn write(dir: &Path, namespace: &str, book: &Book) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let path = file(dir, namespace);
    let temporary = path.with_extension("tmp");
    let mut out = File::create(&temporary)?;
    out.write_all(&serde_json::to_vec(book)?)?;
    out.sync_all()?;
    fs::rename(&temporary, &path)?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stats(requests: u64) -> FunctionStats {
        FunctionStats {
            requests,
            sent_bytes: requests * 10,
            memory_kib_micros: requests * 7,
            ..FunctionStats::default()
        }
    }

    fn sum(dir: &Path) -> Usage {
        usage(dir).unwrap().get("n").and_then(|accounts| accounts.get("a")).copied().unwrap_or_default()
    }

    #[test]
    fn what_is_gone_stays_in_the_sums() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::new(dir.path());
        ledger.book("n", &[("a".into(), "1".into(), stats(5)), ("a".into(), "2".into(), stats(3))]).unwrap();
        ledger.close("n", "1").unwrap();
        ledger.book("n", &[("a".into(), "2".into(), stats(4))]).unwrap();
        assert_eq!((sum(dir.path()).requests, sum(dir.path()).sent_bytes), (9, 90));
        fs::write(file(&super::dir(dir.path()), "n"), b"{}").unwrap();
        assert!(usage(dir.path()).is_err(), "a damaged ledger is not an empty one");
    }

    proptest! {
        // Every step is synced to the disk.
        #![proptest_config(ProptestConfig::with_cases(16))]
        /// Agents come and go, hosts too: every request is booked once.
        #[test]
        fn nothing_is_booked_twice(steps in proptest::collection::vec((0u64..5, 0u8..4), 1..40)) {
            let dir = tempfile::tempdir().unwrap();
            let mut ledger = Ledger::new(dir.path());
            let (mut counted, mut total) = (0, 0);
            for (more, event) in steps {
                counted += more;
                total += more;
                ledger.book("n", &[("a".into(), "1".into(), stats(counted))]).unwrap();
                match event {
                    0 => ledger = Ledger::new(dir.path()),
                    1 => counted = 0,
                    _ => {}
                }
                if event == 1 {
                    // What a new host counted is seen before it passes what the old one had.
                    ledger.close("n", "1").unwrap();
                }
            }
            prop_assert_eq!(sum(dir.path()), Usage { requests: total, sent_bytes: total * 10, memory_kib_micros: total * 7, ..Usage::default() });
        }
    }
}
