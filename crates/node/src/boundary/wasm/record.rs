//! What was started in a sandbox and how it ended, one small file per container in the pod's directory: an agent that was
//! restarted, or whose host is gone, answers from here.

use super::super::{ContainerState, Phase};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

const LIMIT: u64 = 64 << 10;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub name: String,
    pub attempt: u32,
    /// The function's name in its host.
    pub id: String,
    pub port: u16,
    pub log_path: PathBuf,
    pub log_max_bytes: u64,
    pub phase: Phase,
}

impl Record {
    pub fn state(&self) -> ContainerState {
        ContainerState { name: self.name.clone(), attempt: self.attempt, phase: self.phase.clone(), pid: None }
    }

    pub fn prepare(sandbox: &Path) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir(sandbox))
    }

    pub fn destroy(sandbox: &Path) -> io::Result<()> {
        absent_is_fine(fs::remove_dir_all(dir(sandbox)))
    }

    pub fn read(sandbox: &Path, container: &str) -> Option<Record> {
        read(&file(sandbox, container)?).ok()
    }

    /// All of a sandbox; `None` if it was never prepared.
    pub fn all(sandbox: &Path) -> io::Result<Option<Vec<Record>>> {
        let entries = match fs::read_dir(dir(sandbox)) {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let mut records = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "json") {
                records.push(read(&path)?);
            }
        }
        records.sort_by(|a: &Record, b| a.name.cmp(&b.name));
        Ok(Some(records))
    }

    pub fn write(&self, sandbox: &Path) -> io::Result<()> {
        let path = file(sandbox, &self.name).ok_or(ErrorKind::InvalidInput)?;
        Record::prepare(sandbox)?;
        let temporary = path.with_extension("tmp");
        let mut out = File::create(&temporary)?;
        out.write_all(&serde_json::to_vec(self)?)?;
        out.sync_all()?;
        fs::rename(&temporary, &path)?;
        File::open(dir(sandbox))?.sync_all()
    }

    pub fn delete(sandbox: &Path, container: &str) -> io::Result<()> {
        absent_is_fine(fs::remove_file(file(sandbox, container).ok_or(ErrorKind::InvalidInput)?))
    }
}

fn dir(sandbox: &Path) -> PathBuf {
    sandbox.join("boundary")
}

/// A container's name is a DNS label; anything else names no file.
fn file(sandbox: &Path, container: &str) -> Option<PathBuf> {
    let fine = !container.is_empty() && container.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    fine.then(|| dir(sandbox).join(format!("{container}.json")))
}

fn read(path: &Path) -> io::Result<Record> {
    let file = File::open(path)?;
    if file.metadata()?.len() > LIMIT {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("{} is too large for a record", path.display())));
    }
    Ok(serde_json::from_reader(io::BufReader::new(file))?)
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Unix nanoseconds.
pub(super) fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_and_names_stay_names() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Record::all(dir.path()).unwrap().is_none());
        Record::prepare(dir.path()).unwrap();
        assert!(Record::all(dir.path()).unwrap().unwrap().is_empty());
        let record = Record {
            name: "price".into(),
            attempt: 2,
            id: "u/price/2".into(),
            port: 8080,
            log_path: "/l".into(),
            log_max_bytes: 1,
            phase: Phase::Running { started: 5 },
        };
        record.write(dir.path()).unwrap();
        assert_eq!(Record::read(dir.path(), "price"), Some(record.clone()));
        assert_eq!(Record::all(dir.path()).unwrap(), Some(vec![record]));
        assert_eq!(Record::read(dir.path(), "../../etc/passwd"), None);
        Record::delete(dir.path(), "price").unwrap();
        Record::delete(dir.path(), "price").unwrap();
        Record::destroy(dir.path()).unwrap();
        Record::destroy(dir.path()).unwrap();
    }
}
