//! Small files written so that a crash leaves the old one or the new one, never half of either, readable by their
//! owner only.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// No key, certificate or kubeconfig of ours comes near this.
const LIMIT: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
#[error("{operation} {path}")]
pub struct FileError {
    pub operation: &'static str,
    pub path: PathBuf,
    #[source]
    pub source: std::io::Error,
}

fn at<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> FileError + 'a {
    move |source| FileError { operation, path: path.to_owned(), source }
}

/// Makes `dir` (0700) if it is not there.
pub fn private_dir(dir: &Path) -> Result<(), FileError> {
    std::fs::create_dir_all(dir).map_err(at("create directory", dir))?;
    std::fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(at("set mode of", dir))
}

/// Writes `bytes` to `path` (0600): temporary name, fsync, rename, fsync of the directory.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let temporary = dir.join(format!(".{name}.{}.tmp", std::process::id()));
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(at("create", &temporary))?;
        file.set_permissions(Permissions::from_mode(0o600)).map_err(at("set mode of", &temporary))?;
        file.write_all(bytes).map_err(at("write", &temporary))?;
        file.sync_all().map_err(at("sync", &temporary))?;
        std::fs::rename(&temporary, path).map_err(at("rename into place", path))
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
        return written;
    }
    File::open(dir).and_then(|d| d.sync_all()).map_err(at("sync directory", dir))
}

/// The file's text, `None` if it is not there.
pub fn read_text(path: &Path) -> Result<Option<String>, FileError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(at("open", path)(error)),
    };
    let mut text = String::new();
    file.take(LIMIT).read_to_string(&mut text).map_err(at("read", path))?;
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_private_and_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        write_private(&path, b"one").unwrap();
        write_private(&path, b"two").unwrap();
        assert_eq!(read_text(&path).unwrap().as_deref(), Some("two"));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
        assert_eq!(read_text(&dir.path().join("none")).unwrap(), None);
    }
}
