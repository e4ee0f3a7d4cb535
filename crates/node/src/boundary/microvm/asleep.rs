//! A pod's machine as files: `asleep/` in the pod's directory holds what the machine was while none runs. It appears as a
//! whole, and goes when the machine has gone on: while one runs, nothing is begun from files.

use super::machines::{self, blocking};
use crate::boundary::*;
use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use vmm::client::Request;
use vmm::engine::SnapshotFiles;
use vmm::{Client, Error, machine};

const DIR: &str = "asleep";
const STAGING: &str = "asleep.new";
const DESCRIPTION: &str = "machine.json";
const STATE: &str = "state";
const MEMORY: &str = "memory";
/// Kept free on the disk.
const SPARE: u64 = 1 << 30;

#[derive(Serialize, Deserialize)]
struct Asleep {
    engine: String,
    machine: vmm::Machine,
}

fn gone(sandbox: &SandboxSpec) -> BoundaryError {
    BoundaryError::NoSandbox(sandbox.uid.clone())
}

/// Writes the machine down and ends it. One that cannot be written goes on.
pub async fn save(sandbox: &SandboxSpec) -> Result<()> {
    if !machines::runs(sandbox).await {
        return if sandbox.dir.join(DIR).join(DESCRIPTION).exists() { Ok(()) } else { Err(gone(sandbox)) };
    }
    let pod = sandbox.clone();
    blocking(move || {
        let staging = pod.dir.join(STAGING);
        let done = write(&pod, &staging);
        if done.is_err() {
            let _ = remove(&staging);
        }
        done
    })
    .await
}

fn write(sandbox: &SandboxSpec, staging: &Path) -> vmm::Result<()> {
    let to = sandbox.dir.join(DIR);
    remove(staging)?;
    remove(&to)?;
    let described = sandbox.run_dir.join(DESCRIPTION);
    let text = std::fs::read(&described).map_err(Error::io("read", &described))?;
    let machine: vmm::Machine = serde_json::from_slice(&text).map_err(|e| Error::Monitor(e.to_string()))?;
    room(sandbox, machine.memory_bytes)?;
    DirBuilder::new().mode(0o700).create(staging).map_err(Error::io("create", staging))?;
    let files =
        SnapshotFiles { state: create(&staging.join(STATE))?, memory: create(&staging.join(MEMORY))?, base: None };
    let mut held = Client::connect(&sandbox.run_dir)?.hold()?;
    let engine = held.snapshot(&files)?.engine;
    let text = serde_json::to_vec(&Asleep { engine, machine }).map_err(|e| Error::Monitor(e.to_string()))?;
    let path = staging.join(DESCRIPTION);
    std::fs::write(&path, text).map_err(Error::io("write", &path))?;
    std::fs::rename(staging, &to).map_err(Error::io("rename", staging))?;
    Client::connect(&sandbox.run_dir)?.request(Request::Kill)?;
    Client::connect(&sandbox.run_dir).map_or(Ok(()), Client::wait)
}

fn room(sandbox: &SandboxSpec, bytes: u64) -> vmm::Result<()> {
    let found = rustix::fs::statvfs(&sandbox.dir).map_err(|e| Error::io("look at", &sandbox.dir)(e.into()))?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if free < bytes.saturating_add(SPARE) {
        let (needs, free) = (bytes >> 20, free.saturating_sub(SPARE) >> 20);
        return Err(Error::Monitor(format!(
            "its memory may need {needs} MiB on the disk, and {free} MiB are left for it"
        )));
    }
    Ok(())
}

fn create(path: &Path) -> vmm::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600).open(path).map_err(Error::io("create", path))
}

fn remove(dir: &Path) -> vmm::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", dir)(e)),
        _ => Ok(()),
    }
}

/// Goes on, from its files if nothing runs.
pub async fn wake(exe: &Path, sandbox: &SandboxSpec) -> Result<()> {
    if machines::runs(sandbox).await {
        forget(sandbox).await?;
        return machines::request(sandbox, Request::Resume).await.map(drop);
    }
    let dir = sandbox.dir.join(DIR);
    let Ok(text) = std::fs::read(dir.join(DESCRIPTION)) else { return Err(gone(sandbox)) };
    let (exe, pod) = (exe.to_owned(), sandbox.clone());
    blocking(move || {
        let Asleep { engine, mut machine } =
            serde_json::from_slice(&text).map_err(|e| Error::Monitor(e.to_string()))?;
        let (state, memory) = (dir.join(STATE), dir.join(MEMORY));
        machine.restore = Some(machine::Restore { state, memory, difference: None, verify: false, engine });
        let group = machines::confine(&pod, machine.memory_bytes).map_err(Error::Monitor)?;
        vmm::launch(&exe, &machine, |pid| group.admit(pid).map_err(|e| e.to_string()))?;
        // what is mapped stays
        remove(&dir)
    })
    .await
}

/// What was written down.
pub async fn forget(sandbox: &SandboxSpec) -> Result<()> {
    let places = [DIR, STAGING].map(|name| sandbox.dir.join(name));
    blocking(move || places.iter().try_for_each(|place| remove(place))).await
}
