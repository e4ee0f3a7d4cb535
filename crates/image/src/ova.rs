//! OVA: a tar of a machine's description, checksums and disks (DMTF DSP0243). The disks become images; the description is
//! told to whoever asked, who knows what machines are described by here.

mod description;

use crate::error::{Error, Result, io};
use crate::import::archive::{Source, TarSource};
use crate::import::{ImportOptions, Imported, RemoveOnDrop, StoredDisk};
use crate::reference::Reference;
use crate::resolve::KindName;
use crate::store::{Progress, ProgressFn, Store};
use description::Description;
use sha1::Digest as _;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

const CHECKSUMS_LARGEST: u64 = 1 << 20;

/// A machine as an OVA describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Machine {
    pub name: String,
    pub vcpus: u32,
    /// Bytes.
    pub memory: u64,
    /// It boots through UEFI, not BIOS.
    pub efi: bool,
    /// The one it boots from first.
    pub disks: Vec<Disk>,
    /// How many it has.
    pub interfaces: usize,
    /// What is in the description and not here, for people.
    pub left_out: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Disk {
    /// Bytes.
    pub capacity: u64,
    /// On a virtio controller: the guest has a driver for it.
    pub virtio: bool,
    /// The image of what is on it; none if it is empty.
    pub image: Option<String>,
}

impl Store {
    pub(crate) fn import_ova(
        &self,
        source: &TarSource,
        path: &Path,
        options: &ImportOptions,
        progress: ProgressFn,
    ) -> Result<Imported> {
        let bad = |why: String| Error::Unrecognised { path: path.to_path_buf(), why };
        let name = source.first(".ovf").ok_or_else(|| bad("it has no description (.ovf)".into()))?.to_owned();
        let bytes = source.read(&name, description::LARGEST)?.unwrap_or_default();
        let text = std::str::from_utf8(&bytes).map_err(|_| bad(format!("{name} is not UTF-8")))?;
        let Description { mut machine, files } =
            description::parse(text).map_err(|why| bad(format!("{name}: {why}")))?;
        let sums = match source.first(".mf") {
            Some(list) => {
                let bytes = source.read(list, CHECKSUMS_LARGEST)?.unwrap_or_default();
                Some(checksums(&bytes).map_err(|why| bad(format!("{list}: {why}")))?)
            }
            None => {
                machine.left_out.push("checksums: it has none (no .mf), what is damaged is taken as it is".into());
                None
            }
        };
        if let Some(sums) = &sums {
            verify(sums, &name, &mut bytes.as_slice(), &mut std::io::sink()).map_err(bad)?;
        }
        let first = self.names_for(options, path, Vec::new())?.into_iter().next();
        let first = first.ok_or_else(|| bad("it has no name; give one with --tag".into()))?;
        let mut stored = Vec::new();
        for file in &files {
            stored.push(match file {
                Some(file) => Some(self.ova_disk(source, file, sums.as_ref(), path, progress)?),
                None => None,
            });
        }
        self.name_ova(machine, stored, &first, options)
    }

    /// All disks are here; now they get names, all of them or, but for a crash, none.
    fn name_ova(
        &self,
        mut machine: Machine,
        stored: Vec<Option<StoredDisk>>,
        first: &Reference,
        options: &ImportOptions,
    ) -> Result<Imported> {
        let mut whole: Option<Imported> = None;
        for (number, (stored, disk)) in stored.into_iter().zip(&mut machine.disks).enumerate() {
            let Some(stored) = stored else { continue };
            let mut name = first.clone();
            if number > 0 {
                name.repository.path.push_str(&format!("-disk{}", number + 1));
            }
            let imported = stored.named(self, &[name], options)?;
            disk.image = imported.names.first().cloned();
            match &mut whole {
                Some(whole) => whole.names.extend(imported.names),
                None => whole = Some(imported),
            }
        }
        let imported = whole.ok_or_else(|| Error::invalid("the OVA", "all its disks are empty"))?;
        Ok(Imported { kind: KindName::Disk, machine: Some(Box::new(machine)), ..imported })
    }

    /// Takes one disk out of the archive, checks it, and makes it a blob.
    fn ova_disk(
        &self,
        source: &TarSource,
        file: &description::File,
        sums: Option<&BTreeMap<String, Sum>>,
        path: &Path,
        progress: ProgressFn,
    ) -> Result<StoredDisk> {
        let bad = |why: String| Error::Unrecognised { path: path.to_path_buf(), why };
        let name = &file.name;
        let (mut content, size) = source
            .open(name)?
            .ok_or_else(|| bad(format!("{name:?} is described but is not in it; it was truncated")))?;
        if file.size.is_some_and(|said| said != size) {
            return Err(bad(format!("{name:?} is of {size} bytes, not of {} as described", file.size.unwrap_or(0))));
        }
        if size > self.limits().blob_bytes {
            return Err(Error::TooLarge { what: name.clone(), limit: self.limits().blob_bytes });
        }
        progress(Progress::Step(format!("taking out {name}")));
        let (temporary, mut to) = self.temporary_file()?;
        let _remove = RemoveOnDrop(temporary.clone());
        match sums {
            Some(sums) => verify(sums, name, &mut content, &mut to).map_err(bad)?,
            None => drop(std::io::copy(&mut content, &mut to).map_err(io("write", &temporary))?),
        }
        let mut head = vec![0u8; crate::disk::HEAD];
        let n = crate::import::read_head(&to, &mut head).map_err(io("read", &temporary))?;
        head.truncate(n);
        // What is wrong with it is said of its own name, not of the temporary one.
        let shown = PathBuf::from(format!("{}: {name}", path.display()));
        let renamed = |e: Error| match e {
            Error::Unrecognised { why, .. } => Error::Unrecognised { path: shown.clone(), why },
            other => other,
        };
        match crate::foreign::detect(&to, &head) {
            Some(format) => self.converted(&shown, &to, format, progress),
            None if crate::disk::looks_like_disk(&head) => {
                let again = File::open(&temporary).map_err(io("open", &temporary))?;
                self.stored(&temporary, again, progress)
            }
            None => Err(bad(format!("{name:?} is not a disk that is known here"))),
        }
        .map_err(renamed)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Sum {
    Sha1(Vec<u8>),
    Sha256(Vec<u8>),
    Sha512(Vec<u8>),
}

/// `SHA256(name)= hexadecimal digits`, a line for each file.
fn checksums(bytes: &[u8]) -> std::result::Result<BTreeMap<String, Sum>, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not UTF-8")?;
    let mut all = BTreeMap::new();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty()) {
        let shown: String = line.chars().take(80).collect();
        let unclear = || format!("{shown:?} is no line of a list of checksums");
        let (algorithm, rest) = line.split_once('(').ok_or_else(unclear)?;
        let (name, digits) = rest.rsplit_once(')').ok_or_else(unclear)?;
        let digits = digits.trim_start().strip_prefix('=').ok_or_else(unclear)?.trim();
        let sum = unhex(digits).ok_or_else(unclear)?;
        let sum = match (algorithm.trim().to_ascii_uppercase().as_str(), sum.len()) {
            ("SHA1", 20) => Sum::Sha1(sum),
            ("SHA256", 32) => Sum::Sha256(sum),
            ("SHA512", 64) => Sum::Sha512(sum),
            _ => return Err(unclear()),
        };
        if all.insert(name.to_owned(), sum).is_some() {
            return Err(format!("{name:?} is in it twice"));
        }
    }
    Ok(all)
}

fn unhex(digits: &str) -> Option<Vec<u8>> {
    if !digits.is_ascii() || !digits.len().is_multiple_of(2) {
        return None;
    }
    let pairs = digits.as_bytes().chunks(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

/// Copies a file of the archive, which must be what the list of checksums says.
fn verify(
    sums: &BTreeMap<String, Sum>,
    name: &str,
    from: &mut dyn Read,
    to: &mut dyn Write,
) -> std::result::Result<(), String> {
    let sum = sums.get(name).ok_or_else(|| format!("{name:?} is not in its list of checksums (.mf)"))?;
    let mut copied = |each: &mut dyn FnMut(&[u8])| -> std::io::Result<()> {
        let mut buffer = vec![0u8; 1 << 20];
        loop {
            let n = from.read(&mut buffer)?;
            let bytes = buffer.get(..n).unwrap_or_default();
            if bytes.is_empty() {
                return Ok(());
            }
            each(bytes);
            to.write_all(bytes)?;
        }
    };
    let failed = |e: std::io::Error| format!("{name:?}: {e}");
    let (expected, actual) = match sum {
        Sum::Sha1(expected) => {
            let mut hash = sha1::Sha1::new();
            copied(&mut |bytes| hash.update(bytes)).map_err(failed)?;
            (expected, hash.finalize().to_vec())
        }
        Sum::Sha256(expected) => {
            let mut hash = crate::digest::Hasher::default();
            copied(&mut |bytes| hash.update(bytes)).map_err(failed)?;
            (expected, unhex(&hash.finish().hex()).unwrap_or_default())
        }
        Sum::Sha512(expected) => {
            use sha2::Digest as _;
            let mut hash = sha2::Sha512::new();
            copied(&mut |bytes| sha2::Digest::update(&mut hash, bytes)).map_err(failed)?;
            (expected, hash.finalize().to_vec())
        }
    };
    if *expected != actual {
        return Err(format!("{name:?} is not what its checksum says; it is damaged or was tampered with"));
    }
    Ok(())
}

/// For fuzzing: any bytes as a description, and as a list of checksums.
pub(crate) fn fuzz(bytes: &[u8]) {
    if let Ok(Description { machine, files }) =
        std::str::from_utf8(bytes).map_err(drop).and_then(|text| description::parse(text).map_err(drop))
    {
        assert!(machine.memory > 0 && !files.is_empty() && files.len() == machine.disks.len());
        assert!(machine.disks.iter().all(|disk| disk.capacity > 0));
    }
    if let Ok(sums) = checksums(bytes) {
        let _ = sums.keys().next().map(|name| verify(&sums, name, &mut &bytes[..], &mut std::io::sink()));
    }
}
