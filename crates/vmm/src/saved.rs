//! A whole machine in a directory: its disks, and where it ran its memory and devices, of one moment.
//!
//! ```text
//! snapshot      magic "ATOLLVMS", version u32, length of the body u32, CRC-32 of the body u32, body: JSON ([`Saved`])
//! disk0.base    what the disk's overlay lies over: a hard link to the image, which nobody writes
//! disk0.qcow2   the overlay; absent where the disk was never written to
//! state, memory of a machine that ran ([`crate::kvm::snapshot`])
//! ```
//!
//! Numbers are little-endian. The directory is made under another name and renamed when it is complete and on disk. The
//! files are root's; what is in overlays, state and memory was written by engines that a guest may have taken over, and is
//! read by such only.

mod copy;

use crate::client::Client;
use crate::engine::SnapshotFiles;
use crate::machine::{DiskFormat, Error, Machine, Restore, Result};
pub use copy::{allocated, clone_file};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const MAGIC: [u8; 8] = *b"ATOLLVMS";
pub const VERSION: u32 = 1;
const HEAD: usize = 20;
const LONGEST: usize = 1 << 20;
const HEADER_FILE: &str = "snapshot";
/// Incomplete ones begin so.
const STAGING: &str = ".new-";

/// What is in a snapshot's directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Saved {
    /// Who may use it: compared, not understood.
    pub owner: String,
    /// Unix nanoseconds.
    pub taken: i64,
    /// How long the machine was kept from running, nanoseconds.
    pub held: u64,
    pub disks: Vec<SavedDisk>,
    /// Of a machine that ran and was not saved for its disks alone.
    pub running: Option<SavedRun>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SavedDisk {
    pub name: String,
    pub format: DiskFormat,
    pub base: SavedFile,
    pub overlay: Option<SavedFile>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SavedRun {
    pub engine: String,
    pub vcpus: u32,
    pub memory_bytes: u64,
    pub state: SavedFile,
    pub memory: SavedFile,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedFile {
    pub name: String,
    pub bytes: u64,
    /// CRC-32; none of images, which are known by their digests.
    pub sum: Option<u32>,
}

/// A disk to save.
#[derive(Clone, Debug)]
pub struct Source {
    pub name: String,
    pub format: DiskFormat,
    pub base: PathBuf,
    pub overlay: Option<PathBuf>,
}

/// What to save.
pub struct Order<'a> {
    pub owner: &'a str,
    /// Of a machine that runs, whose disks these are.
    pub run_dir: Option<&'a Path>,
    pub memory: bool,
    pub disks: Vec<Source>,
    /// Bytes it may need.
    pub room: u64,
}

/// The machine that runs from `run_dir` as it was started, and its disks.
pub fn running(run_dir: &Path) -> Result<(Machine, Vec<Source>)> {
    let path = run_dir.join("machine.json");
    let text = fs::read(&path).map_err(Error::io("read", &path))?;
    let machine: Machine =
        serde_json::from_slice(&text).map_err(|e| Error::Monitor(format!("{}: {e}", path.display())))?;
    let overlay = |index: usize| machine.state_dir.join(format!("disk{index}.qcow2"));
    let source = |(index, disk): (usize, &crate::Disk)| Source {
        name: disk.name.clone(),
        format: disk.format,
        base: disk.path.clone(),
        overlay: Some(overlay(index)).filter(|_| disk.overlay && !disk.read_only),
    };
    let disks = machine.disks.iter().enumerate().map(source).collect();
    Ok((machine, disks))
}

/// Saves into the directory `to`, which is not there before this has succeeded. The machine goes on, whatever happens here.
pub fn take(order: &Order<'_>, to: &Path) -> Result<Saved> {
    let (parent, name) = match (to.parent(), to.file_name()) {
        (Some(parent), Some(name)) => (parent, name.to_string_lossy()),
        _ => return Err(Error::Monitor(format!("{}: is no place for a snapshot", to.display()))),
    };
    let staging = parent.join(format!("{STAGING}{name}"));
    let mut private = fs::DirBuilder::new();
    private.mode(0o700);
    private.recursive(true).create(parent).map_err(Error::io("create", parent))?;
    remove(&staging)?;
    private.recursive(false).create(&staging).map_err(Error::io("create", &staging))?;
    let done = fill(order, &staging).and_then(|saved| {
        fs::rename(&staging, to).map_err(Error::io("rename", &staging))?;
        sync_dir(parent)?;
        Ok(saved)
    });
    if done.is_err() {
        let _ = remove(&staging);
    }
    done
}

/// A snapshot's directory, or what was to become one; none is fine.
pub fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", dir)(e)),
        _ => Ok(()),
    }
}

/// What was begun in `root` and never completed.
pub fn sweep(root: &Path) -> Result<()> {
    let entries = match fs::read_dir(root) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(Error::io("read", root))?,
    };
    let begun = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with(STAGING);
    entries.flatten().filter(begun).try_for_each(|entry| remove(&entry.path()))
}

/// Bytes on disk that would be free without what is in `root`.
pub fn usage(root: &Path) -> u64 {
    let files = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten();
    let all = files(root.to_owned()).flat_map(|entry| files(entry.path()));
    let own = all.filter_map(|entry| entry.metadata().ok()).filter(|file| file.is_file() && file.nlink() == 1);
    own.map(|file| file.blocks() * 512).sum()
}

fn create(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600).open(path).map_err(Error::io("create", path))
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io("sync", dir))
}

fn fill(order: &Order<'_>, dir: &Path) -> Result<Saved> {
    for (index, disk) in order.disks.iter().enumerate() {
        copy::link(&disk.base, &dir.join(format!("disk{index}.base")))?;
    }
    let overlays = |dir: &Path| -> Result<()> {
        for (index, disk) in order.disks.iter().enumerate() {
            if let Some(from) = disk.overlay.as_ref().filter(|path| path.exists()) {
                clone_file(from, &dir.join(format!("disk{index}.qcow2")))?;
            }
        }
        Ok(())
    };
    let memory = order.run_dir.filter(|_| order.memory).map(running).transpose()?.map(|(machine, _)| machine);
    let written = order.disks.iter().filter_map(|disk| disk.overlay.as_deref()).map(allocated).sum::<u64>();
    let needed = written.saturating_add(memory.as_ref().map_or(0, |machine| machine.memory_bytes));
    if needed > order.room {
        let message = format!(
            "needs up to {} MiB and {} MiB are left for snapshots; delete others, or raise atoll up --snapshot-space",
            needed.div_ceil(1 << 20),
            order.room >> 20
        );
        return Err(Error::Invalid { field: "snapshot", value: "space".into(), message });
    }
    let (mut engine, mut held) = (String::new(), Duration::ZERO);
    match order.run_dir {
        None => overlays(dir)?,
        Some(run_dir) => {
            let files = match &memory {
                Some(_) => {
                    let (state, memory) = (create(&dir.join("state"))?, create(&dir.join("memory"))?);
                    Some(SnapshotFiles { state, memory, base: None })
                }
                None => None,
            };
            let begun = Instant::now();
            let mut holding = Client::connect(run_dir)?.hold()?;
            if let Some(files) = &files {
                engine = holding.snapshot(files)?.engine;
            }
            overlays(dir)?;
            holding.release()?;
            held = begun.elapsed();
        }
    }
    let disk = |(index, disk): (usize, &Source)| {
        let (base, overlay) = (format!("disk{index}.base"), format!("disk{index}.qcow2"));
        let overlay = dir.join(&overlay).exists().then(|| summed(dir, &overlay)).transpose()?;
        let bytes = fs::metadata(dir.join(&base)).map_err(Error::io("stat", dir))?.len();
        let base = SavedFile { name: base, bytes, sum: None };
        Ok(SavedDisk { name: disk.name.clone(), format: disk.format, base, overlay })
    };
    let running = |machine: Machine| -> Result<SavedRun> {
        let (vcpus, memory_bytes) = (machine.vcpus, machine.memory_bytes);
        Ok(SavedRun { engine, vcpus, memory_bytes, state: summed(dir, "state")?, memory: summed(dir, "memory")? })
    };
    let saved = Saved {
        owner: order.owner.to_owned(),
        taken: clock::now_nanos(),
        held: u64::try_from(held.as_nanos()).unwrap_or(u64::MAX),
        disks: order.disks.iter().enumerate().map(disk).collect::<Result<_>>()?,
        running: memory.map(running).transpose()?,
    };
    let path = dir.join(HEADER_FILE);
    let mut file = create(&path)?;
    file.write_all(&encode(&saved)?).and_then(|()| file.sync_all()).map_err(Error::io("write", &path))?;
    sync_dir(dir)?;
    Ok(saved)
}

fn summed(dir: &Path, name: &str) -> Result<SavedFile> {
    let path = dir.join(name);
    let file = File::open(&path).map_err(Error::io("open", &path))?;
    file.sync_all().map_err(Error::io("sync", &path))?;
    let (bytes, sum) = sum(file).map_err(Error::io("read", &path))?;
    Ok(SavedFile { name: name.to_owned(), bytes, sum: Some(sum) })
}

fn sum(mut file: File) -> std::io::Result<(u64, u32)> {
    let mut crc = flate2::Crc::new();
    let mut buffer = vec![0u8; 256 << 10];
    let mut bytes = 0;
    loop {
        let n = file.read(&mut buffer)?;
        let Some(part) = buffer.get(..n).filter(|part| !part.is_empty()) else { return Ok((bytes, crc.sum())) };
        crc.update(part);
        bytes += part.len() as u64;
    }
}

fn encode(saved: &Saved) -> Result<Vec<u8>> {
    let body = serde_json::to_vec(saved).map_err(|e| Error::Monitor(e.to_string()))?;
    let length = u32::try_from(body.len()).ok().filter(|n| *n as usize <= LONGEST);
    let length = length.ok_or_else(|| Error::Monitor("the snapshot's description is too long".into()))?;
    let mut crc = flate2::Crc::new();
    crc.update(&body);
    Ok([&MAGIC[..], &VERSION.to_le_bytes(), &length.to_le_bytes(), &crc.sum().to_le_bytes(), &body].concat())
}

/// Reads a header; the reason if it is none that can be used.
pub fn decode(bytes: &[u8]) -> std::result::Result<Saved, String> {
    let (head, body) = bytes.split_first_chunk::<HEAD>().ok_or("is no snapshot of a machine: too short")?;
    let number = |at: usize| head.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
    if !head.starts_with(&MAGIC) {
        return Err("is no snapshot of a machine (its first bytes are not \"ATOLLVMS\")".into());
    }
    if number(8) != VERSION {
        let found = number(8);
        return Err(format!("version {found}, this program reads {VERSION}; use the program that wrote it"));
    }
    let mut crc = flate2::Crc::new();
    crc.update(body);
    if body.len() != number(12) as usize || body.len() > LONGEST || crc.sum() != number(16) {
        return Err("cut short, or changed since it was written".into());
    }
    let saved: Saved = serde_json::from_slice(body).map_err(|e| e.to_string())?;
    let plain = |file: &SavedFile| {
        let fine = |b: u8| b.is_ascii_alphanumeric() || b == b'.';
        let name = file.name.as_bytes();
        !name.is_empty() && name.first() != Some(&b'.') && name.iter().all(|b| fine(*b))
    };
    if !files(&saved).all(plain) {
        return Err("names a file outside itself".into());
    }
    Ok(saved)
}

/// For fuzzing: any bytes as a header; and, so that what is behind the checksum is reached, as the body of a good one.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let _ = decode(data);
    let mut crc = flate2::Crc::new();
    crc.update(data);
    let head = [&MAGIC[..], &VERSION.to_le_bytes(), &(data.len() as u32).to_le_bytes(), &crc.sum().to_le_bytes()];
    let _ = decode(&[&head.concat()[..], data].concat());
}

/// The snapshot in `dir`, if it is `owner`'s and all its files are there, as long as they were.
pub fn open(dir: &Path, owner: &str) -> Result<Saved> {
    let wrong = |message: String| Error::DiskImage { path: dir.display().to_string(), message };
    let path = dir.join(HEADER_FILE);
    let length = fs::metadata(&path).map_err(Error::io("open snapshot", &path))?.len();
    if length > (LONGEST + HEAD) as u64 {
        return Err(wrong("its description is longer than there can be".into()));
    }
    let saved = decode(&fs::read(&path).map_err(Error::io("read", &path))?).map_err(wrong)?;
    if saved.owner != owner {
        return Err(wrong(format!("belongs to {}, not to {owner}", saved.owner)));
    }
    for file in files(&saved) {
        let path = dir.join(&file.name);
        let bytes = fs::metadata(&path).map_err(Error::io("open", &path))?.len();
        if bytes != file.bytes {
            return Err(wrong(format!("{}: {bytes} bytes long, {} when it was taken", file.name, file.bytes)));
        }
    }
    Ok(saved)
}

fn files(saved: &Saved) -> impl Iterator<Item = &SavedFile> {
    let disks = saved.disks.iter().flat_map(|disk| std::iter::once(&disk.base).chain(&disk.overlay));
    disks.chain(saved.running.iter().flat_map(|run| [&run.state, &run.memory]))
}

impl Saved {
    /// Compares all checksums: reads everything but the images. `memory`: of state and memory, too.
    pub fn verify(&self, dir: &Path, memory: bool) -> Result<()> {
        let run = self.running.iter().flat_map(|run| [&run.state, &run.memory]).filter(|_| memory);
        for file in self.disks.iter().filter_map(|disk| disk.overlay.as_ref()).chain(run) {
            let path = dir.join(&file.name);
            let (_, found) = File::open(&path).and_then(sum).map_err(Error::io("read", &path))?;
            if file.sum != Some(found) {
                let message = "changed since the snapshot was taken (its checksum differs)".into();
                return Err(Error::DiskImage { path: path.display().to_string(), message });
            }
        }
        Ok(())
    }

    /// For a machine that goes on from here; `None` if only disks were saved.
    pub fn restore(&self, dir: &Path) -> Option<Restore> {
        let run = self.running.as_ref()?;
        Some(Restore {
            state: dir.join(&run.state.name),
            memory: dir.join(&run.memory.name),
            difference: None,
            verify: false,
            engine: run.engine.clone(),
        })
    }
}

#[cfg(test)]
mod tests;
