//! What is kept of a container: a directory `ROOT/ID` with `state.json`, the configuration it was made from, and a FIFO
//! as long as it waits for its start.

use crate::cgroup::{Cgroup, Hierarchies};
use crate::error::{During, Error, Result};
use crate::hooks::{OCI_VERSION, State};
use crate::spec::Spec;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, mkdir, open};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

const FORMAT: &str = "atoll-oci";
const VERSION: u32 = 1;
/// Configurations are foreign: larger ones are refused.
pub const MAX_CONFIG: u64 = 16 << 20;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    format: String,
    version: u32,
    pub id: String,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    pub pid: u32,
    /// Clock ticks after boot: tells this process from a later one of the same number.
    pub start_time: u64,
    pub created: String,
    pub owner: String,
    /// Relative to the hierarchies' mounts; none: not in a group of its own.
    pub cgroup: Option<PathBuf>,
    /// Where the hierarchies were, with what controllers.
    hierarchies: Hierarchies,
    /// The unit of systemd's that the group is.
    #[serde(default)]
    pub scope: Option<String>,
    #[serde(default)]
    pub annotations: std::collections::BTreeMap<String, String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

impl Status {
    pub fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

pub fn default_root() -> PathBuf {
    let uid = rustix::process::geteuid();
    if uid.is_root() {
        return "/run/atoll-oci".into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(directory) => Path::new(&directory).join("atoll-oci"),
        None => format!("/run/user/{}/atoll-oci", uid.as_raw()).into(),
    }
}

pub fn check_id(id: &str) -> Result<()> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_+-.".contains(&b);
    if id.is_empty() || id.len() > 255 || !id.bytes().all(plain) || id == "." || id == ".." {
        return Err(Error::Refused(format!("container id {id:?}: letters, digits and `_+-.`, at most 255")));
    }
    Ok(())
}

/// A container's directory.
pub struct Home {
    pub path: PathBuf,
    pub id: String,
}

impl Home {
    pub fn at(root: &Path, id: &str) -> Result<Self> {
        check_id(id)?;
        Ok(Self { path: root.join(id), id: id.to_owned() })
    }

    /// A new one: who makes the directory owns the name.
    pub fn make(root: &Path, id: &str) -> Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let home = Self::at(root, id)?;
        let made = mkdir(&home.path, Mode::RWXU);
        match made {
            Err(rustix::io::Errno::NOENT) => {
                let what = || format!("making {}", root.display());
                fs::DirBuilder::new().recursive(true).mode(0o711).create(root).during(what)?;
                mkdir(&home.path, Mode::RWXU).during(|| format!("making {}", home.path.display()))?;
            }
            Err(rustix::io::Errno::EXIST) => {
                return Err(Error::Refused(format!("container with given ID already exists: {id}")));
            }
            other => other.during(|| format!("making {}", home.path.display()))?,
        }
        Ok(home)
    }

    /// Until the descriptor is dropped no other command changes the container.
    pub fn lock(&self) -> Result<OwnedFd> {
        let fd = match open(&self.path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
            Err(rustix::io::Errno::NOENT) => return Err(self.missing()),
            other => other.during(|| format!("{}", self.path.display()))?,
        };
        flock(&fd, FlockOperation::LockExclusive).during(|| format!("locking {}", self.path.display()))?;
        Ok(fd)
    }

    fn missing(&self) -> Error {
        Error::Refused(format!("container does not exist: {}", self.id))
    }

    pub fn fifo(&self) -> PathBuf {
        self.path.join("start")
    }

    pub fn config(&self) -> PathBuf {
        self.path.join("config.json")
    }

    pub fn save(&self, record: &Record) -> Result<()> {
        let path = self.path.join("state.json");
        let text = serde_json::to_vec(record).map_err(|e| Error::Refused(format!("state of {}: {e}", self.id)))?;
        replace(&path, &text).during(|| format!("writing {}", path.display()))
    }

    pub fn load(&self) -> Result<Record> {
        let path = self.path.join("state.json");
        let text = match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(self.missing()),
            other => other.during(|| format!("reading {}", path.display()))?,
        };
        let record: Record =
            serde_json::from_slice(&text).map_err(|e| Error::Refused(format!("{}: {e}", path.display())))?;
        if record.format != FORMAT || record.version != VERSION {
            let why =
                format!("{}: format {} {}, not {FORMAT} {VERSION}", path.display(), record.format, record.version);
            return Err(Error::Refused(why));
        }
        Ok(record)
    }

    pub fn spec(&self) -> Result<Spec> {
        Ok(read_config(&self.config())?.0)
    }

    pub fn status(&self, record: &Record) -> Status {
        if record.pid == 0 || !is_alive(record.pid, record.start_time) {
            return Status::Stopped;
        }
        if self.fifo().exists() {
            return Status::Created;
        }
        match record.cgroup() {
            Ok(Some(cgroup)) if cgroup.is_frozen() => Status::Paused,
            _ => Status::Running,
        }
    }

    pub fn remove(&self) -> Result<()> {
        match fs::remove_dir_all(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(Error::step(format!("removing {}", self.path.display()), e))
            }
            _ => Ok(()),
        }
    }
}

/// A file and what it was parsed from. Limits come first: the file is foreign.
pub fn read_config(path: &Path) -> Result<(Spec, Vec<u8>)> {
    let text = read_limited(path, MAX_CONFIG)?;
    let spec = serde_json::from_slice(&text).map_err(|e| Error::Refused(format!("{}: {e}", path.display())))?;
    Ok((spec, text))
}

pub fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let what = || format!("reading {}", path.display());
    let mut text = Vec::new();
    fs::File::open(path).during(what)?.take(limit + 1).read_to_end(&mut text).during(what)?;
    if text.len() as u64 > limit {
        return Err(Error::Refused(format!("{}: larger than {limit} bytes", path.display())));
    }
    Ok(text)
}

/// Whole or not at all. Nothing here outlives a boot, so nothing waits for a disk.
pub fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let temporary = PathBuf::from(name);
    fs::File::create(&temporary)?.write_all(text)?;
    fs::rename(&temporary, path)
}

impl Record {
    pub fn new(id: &str, bundle: &Path, rootfs: &Path, spec: &Spec, cgroup: Option<&Cgroup>) -> Self {
        let uid = rustix::process::getuid().as_raw();
        Self {
            format: FORMAT.into(),
            version: VERSION,
            id: id.into(),
            bundle: bundle.into(),
            rootfs: rootfs.into(),
            pid: 0,
            start_time: 0,
            created: super::notices::rfc3339(std::time::SystemTime::now()),
            owner: if uid == 0 { "root".into() } else { uid.to_string() },
            cgroup: cgroup.map(|c| c.path().to_owned()),
            hierarchies: cgroup.map(|c| c.hierarchies().clone()).unwrap_or_default(),
            scope: None,
            annotations: spec.annotations.clone(),
        }
    }

    pub fn cgroup(&self) -> Result<Option<Cgroup>> {
        self.cgroup.as_ref().map(|path| Cgroup::new(self.hierarchies.clone(), path)).transpose()
    }

    pub fn state(&self, status: Status) -> State {
        State {
            oci_version: OCI_VERSION,
            id: self.id.clone(),
            status: status.name().into(),
            pid: Some(if status == Status::Stopped { 0 } else { self.pid }),
            bundle: self.bundle.clone(),
            annotations: self.annotations.clone(),
        }
    }
}

/// State letter and start time of proc_pid_stat(5), fields 3 and 22.
fn stat(pid: u32) -> Option<(char, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
    let letter = fields.next()?.chars().next()?;
    Some((letter, fields.nth(18)?.parse().ok()?))
}

pub fn start_time(pid: u32) -> u64 {
    stat(pid).map_or(0, |(_, time)| time)
}

fn is_alive(pid: u32, start_time: u64) -> bool {
    stat(pid).is_some_and(|(letter, time)| time == start_time && !matches!(letter, 'Z' | 'X'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_plain_names() {
        for good in ["a", "3f2a", "web_1.x+y-z"] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "\u{e9}", &"x".repeat(256)] {
            assert!(check_id(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_name_is_taken_once_and_a_record_comes_back() {
        let root = tempfile::tempdir().expect("directory");
        let root = root.path().join("deep/er");
        let home = Home::make(&root, "c1").expect("made");
        let again = Home::make(&root, "c1").err().expect("refused");
        assert!(again.to_string().contains("already exists"), "{again}");
        assert!(home.load().expect_err("none yet").to_string().contains("does not exist"));
        let mut record = Record::new("c1", Path::new("/b"), Path::new("/b/rootfs"), &Spec::default(), None);
        (record.pid, record.start_time) = (std::process::id(), start_time(std::process::id()));
        home.save(&record).expect("saved");
        let found = home.load().expect("loaded");
        assert_eq!(home.status(&found), Status::Running);
        fs::write(home.fifo(), "").expect("written");
        assert_eq!(home.status(&found), Status::Created);
        let other = Record { start_time: found.start_time + 1, ..found };
        assert_eq!(home.status(&other), Status::Stopped);
        fs::write(home.path.join("state.json"), r#"{"format":"x"}"#).expect("written");
        assert!(home.load().is_err());
        home.remove().expect("removed");
        home.remove().expect("nothing to do");
    }
}
