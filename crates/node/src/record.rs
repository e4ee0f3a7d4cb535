//! What the agent keeps on disk of each pod: `DATA/pods/<uid>/sandbox.json` (written before the sandbox is made, so a
//! restarted agent, or `atoll down` without any API, knows what there is) and `status.json` (the last status, so that
//! restart counts and exit codes survive a crash between an exit and its report).

use crate::boundary::SandboxSpec;
use crate::config::Config;
use api::k8s::api::core::v1::PodStatus;
use api::sleep::Sleep;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

const MAGIC: &str = "atoll-sandbox";
const VERSION: u32 = 1;
/// A machine's cloud-init texts are in here.
const LIMIT: u64 = 8 << 20;

/// `sandbox.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    magic: String,
    version: u32,
    /// Name of the boundary.
    pub boundary: String,
    /// Termination grace of the pod, seconds; for stopping without the API.
    pub grace_seconds: u64,
    /// Signal that asks a container to stop, where it is not 15.
    #[serde(default)]
    pub stop_signals: BTreeMap<String, i32>,
    /// It sleeps, or is about to.
    #[serde(default)]
    pub asleep: Option<Sleep>,
    /// The sandbox was destroyed for good; only logs and the last status are left.
    #[serde(default)]
    pub ended: bool,
    #[serde(flatten)]
    pub sandbox: SandboxSpec,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("{operation} {path}")]
    Io {
        operation: &'static str,
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{path}: not a sandbox record: {why}")]
    Damaged { path: String, why: String },
    #[error("{path}: written by a newer Atoll (format {found}, this one knows {VERSION})")]
    Newer { path: String, found: u32 },
}

impl Record {
    pub fn new(boundary: &str, grace_seconds: u64, sandbox: SandboxSpec) -> Self {
        Record {
            magic: MAGIC.into(),
            version: VERSION,
            boundary: boundary.into(),
            grace_seconds,
            stop_signals: BTreeMap::new(),
            asleep: None,
            ended: false,
            sandbox,
        }
    }

    /// Whole or not at all, and not synced: what it tells of does not outlive the machine's boot either, and what a loss
    /// of power leaves of it is set up anew. Blocks.
    pub fn write(&self, pod_dir: &Path) -> Result<(), RecordError> {
        let bytes = serde_json::to_vec_pretty(self)
            .map_err(|e| RecordError::Damaged { path: pod_dir.display().to_string(), why: e.to_string() })?;
        replace(&pod_dir.join("sandbox.json"), &bytes)
    }

    /// `None` if there is none.
    pub fn read(pod_dir: &Path) -> Result<Option<Record>, RecordError> {
        let path = pod_dir.join("sandbox.json");
        let Some(bytes) = read_limited(&path)? else { return Ok(None) };
        let damaged = |why: String| RecordError::Damaged { path: path.display().to_string(), why };
        #[derive(Deserialize)]
        struct Head {
            magic: String,
            version: u32,
        }
        let head: Head = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        if head.magic != MAGIC {
            return Err(damaged(format!("magic is \"{}\"", head.magic)));
        }
        if head.version > VERSION {
            return Err(RecordError::Newer { path: path.display().to_string(), found: head.version });
        }
        serde_json::from_slice(&bytes).map(Some).map_err(|e| damaged(e.to_string()))
    }
}

/// Survives a crash of the agent (not of the machine: then nothing runs any more anyway). Blocks.
pub(crate) fn write_status(pod_dir: &Path, status: &PodStatus) -> Result<(), RecordError> {
    let bytes = serde_json::to_vec(status).unwrap_or_default();
    replace(&pod_dir.join("status.json"), &bytes)
}

pub(crate) fn read_status(pod_dir: &Path) -> Option<PodStatus> {
    let bytes = read_limited(&pod_dir.join("status.json")).ok()??;
    serde_json::from_slice(&bytes).ok()
}

fn read_limited(path: &Path) -> Result<Option<Vec<u8>>, RecordError> {
    let io = |source| RecordError::Io { operation: "read", path: path.display().to_string(), source };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io(e)),
    };
    let mut bytes = Vec::new();
    file.take(LIMIT + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > LIMIT {
        return Err(RecordError::Damaged { path: path.display().to_string(), why: format!("over {LIMIT} bytes") });
    }
    Ok(Some(bytes))
}

fn replace(path: &Path, bytes: &[u8]) -> Result<(), RecordError> {
    let io = |operation| move |source| RecordError::Io { operation, path: path.display().to_string(), source };
    let next = path.with_extension("tmp");
    let mut file = std::fs::File::create(&next).map_err(io("make"))?;
    file.write_all(bytes).map_err(io("write"))?;
    std::fs::rename(&next, path).map_err(io("replace"))
}

/// What lies in `DATA/pods`.
#[derive(Default)]
pub(crate) struct Scan {
    pub records: Vec<Record>,
    /// Directories without a (readable) record: set-up was interrupted, or they are damaged.
    pub bare: Vec<String>,
}

/// Reads every pod directory. Blocks.
pub(crate) fn scan(config: &Config) -> std::io::Result<Scan> {
    let mut found = Scan::default();
    let entries = match std::fs::read_dir(config.pods_dir()) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        Err(e) => return Err(e),
    };
    for entry in entries {
        let entry = entry?;
        let Ok(uid) = entry.file_name().into_string() else { continue };
        if !entry.file_type()?.is_dir() || !crate::config::is_plain_name(&uid) {
            continue;
        }
        match Record::read(&entry.path()) {
            Ok(Some(record)) if record.sandbox.uid == uid => found.records.push(record),
            Ok(Some(_)) | Ok(None) => found.bare.push(uid),
            Err(error) => {
                tracing::warn!("{}", crate::volumes::chain(&error));
                found.bare.push(uid);
            }
        }
    }
    Ok(found)
}

/// Ranges of 65,536 user ids, from 1,048,576 on. Taken in turn, so that a range just given back is not the next one
/// handed out.
pub(crate) struct IdRanges {
    state: Mutex<Ranges>,
}

struct Ranges {
    used: BTreeSet<u32>,
    next: u32,
}

const RANGE: u32 = 65_536;
const FIRST: u32 = 1_048_576;
const SLOTS: u32 = (u32::MAX - FIRST) / RANGE - 1;

impl IdRanges {
    pub fn new() -> Self {
        IdRanges { state: Mutex::new(Ranges { used: BTreeSet::new(), next: 0 }) }
    }
    pub fn reserve(&self, base: u32) {
        if base >= FIRST {
            self.lock().used.insert((base - FIRST) / RANGE);
        }
    }
    /// `None` when all 65,000 are taken.
    pub fn take(&self) -> Option<u32> {
        let mut state = self.lock();
        let start = state.next;
        let slot = (0..SLOTS).map(|n| (start + n) % SLOTS).find(|slot| !state.used.contains(slot))?;
        state.used.insert(slot);
        state.next = (slot + 1) % SLOTS;
        Some(FIRST + slot * RANGE)
    }
    pub fn release(&self, base: u32) {
        if base >= FIRST {
            self.lock().used.remove(&((base - FIRST) / RANGE));
        }
    }
    fn lock(&self) -> std::sync::MutexGuard<'_, Ranges> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_do_not_overlap_and_are_not_reused_at_once() {
        let ranges = IdRanges::new();
        ranges.reserve(FIRST);
        let a = ranges.take().unwrap();
        assert_eq!(a, FIRST + RANGE);
        ranges.release(a);
        let b = ranges.take().unwrap();
        assert_eq!(b, FIRST + 2 * RANGE);
        assert!(u64::from(FIRST) + u64::from(SLOTS) * u64::from(RANGE) <= u64::from(u32::MAX));
    }

    #[test]
    fn damaged_and_newer_records_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let write = |text: &str| std::fs::write(dir.path().join("sandbox.json"), text).unwrap();
        assert!(matches!(Record::read(dir.path()), Ok(None)));
        for text in ["", "{}", "[1]", r#"{"magic":"x","version":1}"#, r#"{"magic":"atoll-sandbox","version":1}"#] {
            write(text);
            assert!(matches!(Record::read(dir.path()), Err(RecordError::Damaged { .. })), "{text}");
        }
        write(r#"{"magic":"atoll-sandbox","version":2}"#);
        assert!(matches!(Record::read(dir.path()), Err(RecordError::Newer { found: 2, .. })));
    }
}
