//! What a shim leaves on disk of each container, so that an exit code is never lost: `containers/<name>.<attempt>/`
//! below its directory, with `state.json`, and `upper` and `work` of the root file system.

use super::protocol::State;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

const MAGIC: &str = "atoll-container";
const VERSION: u32 = 1;
const MAX_SIZE: u64 = 64 * 1024;

#[derive(Serialize, Deserialize)]
struct Record {
    magic: String,
    version: u32,
    state: State,
}

pub fn directory(base: &Path, name: &str, attempt: u32) -> PathBuf {
    base.join("containers").join(format!("{name}.{attempt}"))
}

/// Whole or not at all, and with `durable` on the disk before this returns.
pub fn save(base: &Path, state: &State, durable: bool) -> io::Result<()> {
    let directory = directory(base, &state.name, state.attempt);
    let record = Record { magic: MAGIC.into(), version: VERSION, state: state.clone() };
    let temporary = directory.join("state.json.tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(&serde_json::to_vec(&record)?)?;
    if durable {
        file.sync_data()?;
    }
    fs::rename(&temporary, directory.join("state.json"))?;
    if durable { File::open(&directory)?.sync_all() } else { Ok(()) }
}

/// All that were saved; files that cannot be read are left out and named in the second list.
pub fn load(base: &Path) -> (Vec<State>, Vec<String>) {
    let (mut states, mut bad) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(base.join("containers")).into_iter().flatten().flatten() {
        let path = entry.path().join("state.json");
        match read(&path) {
            Ok(state) => states.push(state),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => bad.push(format!("{}: {e}", path.display())),
        }
    }
    (states, bad)
}

fn read(path: &Path) -> io::Result<State> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_SIZE).read_to_end(&mut text)?;
    let record: Record = serde_json::from_slice(&text)?;
    if record.magic != MAGIC || record.version > VERSION {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a container state of this version"));
    }
    Ok(record.state)
}

#[cfg(test)]
mod tests {
    use super::super::protocol::Phase;
    use super::*;

    #[test]
    fn the_format_is_pinned() {
        let base = tempfile::tempdir().expect("directory");
        let phase = Phase::Exited {
            started: 1,
            finished: 2,
            code: 137,
            signal: Some(9),
            oom_killed: true,
            message: String::new(),
        };
        let state = State { name: "web".into(), attempt: 3, pid: None, cgroup: "atoll/x/pod1/c0".into(), phase };
        fs::create_dir_all(directory(base.path(), "web", 3)).expect("made");
        save(base.path(), &state, true).expect("saved");
        let text = fs::read_to_string(directory(base.path(), "web", 3).join("state.json")).expect("read");
        assert_eq!(
            text,
            r#"{"magic":"atoll-container","version":1,"state":{"name":"web","attempt":3,"pid":null,"cgroup":"atoll/x/pod1/c0","phase":{"Exited":{"started":1,"finished":2,"code":137,"signal":9,"oom_killed":true,"message":""}}}}"#
        );
        assert_eq!(load(base.path()), (vec![state], vec![]));
        fs::write(directory(base.path(), "web", 3).join("state.json"), "{}").expect("written");
        assert_eq!(load(base.path()).1.len(), 1);
    }
}
