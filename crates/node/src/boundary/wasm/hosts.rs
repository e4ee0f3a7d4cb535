//! The function hosts, one per namespace: starting them, talking to them, hearing from them.

use function::{Client, Error, Listing, Result, launch};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::watch;

/// Greater than any number of a change: the host is gone.
const GONE: u64 = u64::MAX;

pub(super) struct Hosts {
    exe: PathBuf,
    dir: PathBuf,
    namespaces: Mutex<HashMap<String, Arc<Namespace>>>,
}

#[derive(Default)]
struct Namespace {
    /// Held while a host is started or let go.
    starting: Mutex<()>,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    /// Number of the last change each sandbox was listed at.
    listed: HashMap<String, u64>,
    /// Fed by a thread that waits for the host.
    watcher: Option<watch::Receiver<u64>>,
}

/// Nothing behind these locks is left half done by a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Hosts {
    pub fn new(exe: PathBuf, dir: PathBuf) -> Hosts {
        Hosts { exe, dir, namespaces: Mutex::default() }
    }

    fn namespace(&self, name: &str) -> Arc<Namespace> {
        lock(&self.namespaces).entry(name.to_owned()).or_default().clone()
    }

    fn run_dir(&self, namespace: &str) -> PathBuf {
        // Socket paths have 107 bytes: a namespace's name of 63 would not fit everywhere.
        self.dir.join(digest(namespace).chars().take(32).collect::<String>())
    }

    pub fn connect(&self, namespace: &str) -> Result<Client> {
        Client::connect(&self.run_dir(namespace))
    }

    /// The namespace's host, started if it is not there.
    pub fn ensure(&self, namespace: &str) -> Result<Client> {
        let entry = self.namespace(namespace);
        let _one = lock(&entry.starting);
        match self.connect(namespace) {
            Err(Error::NotRunning) => {
                let client = launch(&self.exe, &self.run_dir(namespace), uid(namespace))?;
                let mut seen = lock(&entry.seen);
                seen.listed.clear();
                seen.watcher = None;
                Ok(client)
            }
            other => other,
        }
    }

    /// What the host has, remembered as seen by a sandbox.
    pub fn list(&self, namespace: &str, sandbox: &str) -> Result<Listing> {
        let listing = self.connect(namespace)?.list();
        let entry = self.namespace(namespace);
        let mut seen = lock(&entry.seen);
        match &listing {
            Ok(listing) => seen.listed.insert(sandbox.to_owned(), listing.sequence),
            Err(_) => seen.listed.remove(sandbox),
        };
        listing
    }

    /// The numbers of the host's changes as they come, and the last one the sandbox was listed at. `None` without a host.
    pub fn watch(&self, namespace: &str, sandbox: &str) -> Option<(watch::Receiver<u64>, u64)> {
        let entry = self.namespace(namespace);
        let mut seen = lock(&entry.seen);
        let last = seen.listed.get(sandbox).copied();
        let alive = seen.watcher.as_ref().is_some_and(|w| *w.borrow() != GONE);
        if !alive {
            let client = self.connect(namespace).ok()?;
            let (sender, receiver) = watch::channel(0);
            let watching = move || {
                let mut since = 0;
                while let Ok(sequence) = client.changed(since) {
                    // A host that is about to end answers without a change.
                    if sequence <= since || sender.send(sequence).is_err() {
                        break;
                    }
                    since = sequence;
                }
                let _ = sender.send(GONE);
            };
            std::thread::Builder::new().name("function-watch".into()).stack_size(256 << 10).spawn(watching).ok()?;
            seen.watcher = Some(receiver);
        }
        // A sandbox that was never listed has not seen even the first change.
        Some((seen.watcher.clone()?, last.unwrap_or(0)))
    }

    /// Ends whatever the host still has of a sandbox: also what was added just before an agent was killed.
    pub fn forget_all(&self, namespace: &str, sandbox: &str) -> Result<()> {
        let host = match self.connect(namespace) {
            Err(Error::NotRunning) => return Ok(()),
            other => other?,
        };
        for function in host.list()?.functions {
            if function.id.split('/').next() == Some(sandbox) {
                host.forget(&function.id)?;
            }
        }
        Ok(())
    }

    /// A sandbox goes; a host without functions does, too.
    pub fn leave(&self, namespace: &str, sandbox: &str) -> Result<()> {
        let entry = self.namespace(namespace);
        let _one = lock(&entry.starting);
        lock(&entry.seen).listed.remove(sandbox);
        match self.connect(namespace) {
            Ok(client) => {
                if client.retire()? {
                    let _ = std::fs::remove_dir_all(self.run_dir(namespace));
                }
                Ok(())
            }
            Err(Error::NotRunning) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn digest(namespace: &str) -> String {
    image::Digest::of(namespace.as_bytes()).hex()
}

/// A user id of the namespace's own. Two namespaces that share one are still apart: by PID, mount and network namespaces.
fn uid(namespace: &str) -> u32 {
    let digits: String = digest(namespace).chars().take(8).collect();
    super::FIRST_UID + u32::from_str_radix(&digits, 16).unwrap_or(0) % 100_000_000
}
