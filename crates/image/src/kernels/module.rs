//! Kernel modules as files: their names, what they depend on.

use crate::error::{Error, Result, io};
use crate::jailed::{Input, Plain, Roles};
use crate::unpack::Compression;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The module's name in a file's; `None` if it is no module's.
pub fn stem(file: &str) -> Option<&str> {
    ["", ".xz", ".zst", ".gz"].into_iter().find_map(|ending| file.strip_suffix(ending)?.strip_suffix(".ko"))
}

/// Its bytes, decompressed.
pub fn read(path: &Path, roles: Option<&Roles>, most: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(io("open", path))?;
    let compression = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => Compression::Xz,
        Some("zst") => Compression::Zstd,
        Some("gz") => Compression::Gzip,
        _ => Compression::None,
    };
    let plain = plain(file, compression, roles).map_err(io("decompress", path))?;
    let mut bytes = Vec::new();
    plain.take(most + 1).read_to_end(&mut bytes).map_err(io("decompress", path))?;
    if bytes.len() as u64 > most {
        return Err(Error::TooLarge { what: path.display().to_string(), limit: most });
    }
    if !bytes.starts_with(b"\x7fELF") {
        return Err(Error::invalid(path.display().to_string(), "is no kernel module: not ELF"));
    }
    Ok(bytes)
}

/// Decompressed by the role where there is one.
pub fn plain(file: File, compression: Compression, roles: Option<&Roles>) -> std::io::Result<Box<dyn Read>> {
    Ok(match (compression, roles) {
        (Compression::None, _) => Box::new(file),
        (_, Some(roles)) => Box::new(Plain::start(roles, compression, Input::File(file))?),
        (_, None) => compression.decoder(std::io::BufReader::new(file))?,
    })
}

/// What `depends=` in the section `.modinfo` lists. The section's strings are looked for, not the section: what else says
/// `depends=` after a zero byte can only add modules that are there anyway.
pub fn depends(bytes: &[u8]) -> Vec<String> {
    const MARK: &[u8] = b"\0depends=";
    let at = bytes.windows(MARK.len()).position(|window| window == MARK);
    let Some(rest) = at.and_then(|at| bytes.get(at + MARK.len()..)) else { return Vec::new() };
    let text = rest.split(|b| *b == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(text.get(..text.len().min(4096)).unwrap_or_default());
    text.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}
