//! A Debian binary package (deb(5)): an `ar` archive whose member `data.tar`, compressed one way or another, has the
//! files.

use super::{MAX_KERNEL, MAX_MODULE, VMLINUZ, module};
use crate::error::{Error, Result, io};
use crate::jailed::Roles;
use crate::tar::{Archive, EntryKind};
use crate::unpack::Compression;
use std::fs::File;
use std::io::{self as stdio, Read, Seek, SeekFrom, Write};
use std::path::Path;

const MAGIC: &[u8] = b"!<arch>\n";
const HEADER: usize = 60;
const MOST_MEMBERS: usize = 16;
/// Of a package, decompressed: the largest kernels with all their modules are about 1 GiB.
const MAX_FILES: u64 = 4 << 30;
const MAX_ENTRIES: usize = 100_000;

/// Kernel and modules of a package into `work`; answers the kernel's version.
pub fn unpack(package: &Path, work: &Path, roles: Option<&Roles>) -> Result<String> {
    let refuse = |why: String| Error::invalid(package.display().to_string(), why);
    let mut file = File::open(package).map_err(io("open", package))?;
    let (compression, size) = data(&mut file).map_err(io("read", package))?.map_err(|why| refuse(why.into()))?;
    let member = work.join("data");
    let mut to =
        File::options().create_new(true).read(true).write(true).open(&member).map_err(io("create", &member))?;
    stdio::copy(&mut file.take(size), &mut to).map_err(io("copy", package))?;
    to.seek(SeekFrom::Start(0)).map_err(io("seek", &member))?;
    let plain = module::plain(to, compression, roles).map_err(io("decompress", package))?;
    std::fs::remove_file(&member).map_err(io("remove", &member))?;
    let version = files(plain.take(MAX_FILES), work).map_err(refuse)?;
    version.ok_or_else(|| refuse("has no boot/vmlinuz-*: is it a linux-image package, and not a meta-package?".into()))
}

/// Stands the file at the content of `data.tar*`; how that is compressed, and its size.
fn data(file: &mut File) -> stdio::Result<std::result::Result<(Compression, u64), &'static str>> {
    const NONE: &str = "is no Debian package: it has no data.tar";
    let mut magic = [0; 8];
    if file.read_exact(&mut magic).is_err() || magic != MAGIC {
        return Ok(Err("is no Debian package: it does not begin with !<arch>"));
    }
    for _ in 0..MOST_MEMBERS {
        let mut header = [0; HEADER];
        if file.read_exact(&mut header).is_err() {
            return Ok(Err(NONE));
        }
        let field = |from: usize, to: usize| {
            let bytes = header.get(from..to).unwrap_or_default();
            std::str::from_utf8(bytes).unwrap_or_default().trim_end().trim_end_matches('/')
        };
        let Ok(size) = field(48, 58).parse::<u64>() else { return Ok(Err("is damaged: a member without a size")) };
        match field(0, 16) {
            "data.tar" => return Ok(Ok((Compression::None, size))),
            "data.tar.xz" => return Ok(Ok((Compression::Xz, size))),
            "data.tar.zst" => return Ok(Ok((Compression::Zstd, size))),
            "data.tar.gz" => return Ok(Ok((Compression::Gzip, size))),
            _ => {}
        }
        let Ok(skip) = i64::try_from(size.saturating_add(size % 2)) else { return Ok(Err(NONE)) };
        file.seek(SeekFrom::Current(skip))?;
    }
    Ok(Err(NONE))
}

/// Takes what is needed by the last part of its name alone, so that no entry leads anywhere.
fn files(plain: impl Read, work: &Path) -> std::result::Result<Option<String>, String> {
    let mut archive = Archive::new(plain);
    let mut version = None;
    for _ in 0..MAX_ENTRIES {
        let Some(entry) = archive.next().map_err(|e| crate::unpack::chain(&e))? else { return Ok(version) };
        if entry.kind != EntryKind::File {
            continue;
        }
        let path = String::from_utf8_lossy(&entry.path).into_owned();
        let Some(name) = path.rsplit('/').next() else { continue };
        let kernel = name.strip_prefix("vmlinuz-").filter(|_| path.contains("boot/"));
        let (target, most) = match (kernel, module::stem(name)) {
            (Some(_), _) => (work.join(VMLINUZ), MAX_KERNEL),
            (None, Some(_)) => (work.join("all").join(name), MAX_MODULE),
            _ => continue,
        };
        if entry.size > most {
            return Err(format!("{path} is larger than the limit of {most} bytes"));
        }
        let mut file = File::create(&target).map_err(|e| format!("{}: {e}", target.display()))?;
        stdio::copy(&mut archive, &mut file).map_err(|e| format!("{path}: {e}"))?;
        file.flush().map_err(|e| format!("{path}: {e}"))?;
        version = kernel.map(str::to_owned).or(version);
    }
    Err(format!("has more than {MAX_ENTRIES} files"))
}
