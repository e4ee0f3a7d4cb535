//! Mounts and ownership below a pod's directory.

use super::{VolumeError, io};
use rustix::fs::{AtFlags, Gid, Mode, Uid};
use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::CString;
use std::path::{Path, PathBuf};

/// A tmpfs at `dir`; `size` bytes.
pub(crate) fn mount_tmpfs(dir: &Path, size: Option<u64>, mode: u32) -> std::io::Result<()> {
    let mut options = format!("mode={mode:o}");
    if let Some(size) = size {
        // The kernel takes 0 as "no limit" and rounds up to pages.
        options.push_str(&format!(",size={}", size.max(4096)));
    }
    let options = CString::new(options)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    Ok(rustix::mount::mount("tmpfs", dir, "tmpfs", flags, Some(options.as_c_str()))?)
}

/// Whether `dir` is the root of a mount.
pub(crate) fn is_mounted(dir: &Path) -> bool {
    let Some(parent) = dir.parent() else { return true };
    match (rustix::fs::lstat(dir), rustix::fs::lstat(parent)) {
        (Ok(a), Ok(b)) if a.st_dev != b.st_dev => true,
        // A bind mount within one file system does not show in the device number.
        (Ok(_), Ok(_)) => mounts_below(dir).iter().any(|m| m == dir),
        _ => false,
    }
}

/// Mount points at or below `dir`, outermost first.
fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let Ok(table) = std::fs::read("/proc/self/mountinfo") else { return Vec::new() };
    let table = String::from_utf8_lossy(&table);
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(|p| PathBuf::from(unescape(p)));
    let mut found: Vec<PathBuf> = points.filter(|p| p.starts_with(dir)).collect();
    found.sort();
    found
}

/// `\040` and the like (`proc(5)`, mountinfo).
fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        if b != b'\\' {
            out.push(b);
            continue;
        }
        let code = bytes.by_ref().take(3).fold(0u32, |sum, d| sum * 8 + u32::from(d.wrapping_sub(b'0') & 7));
        out.push(u8::try_from(code).unwrap_or(b'?'));
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Unmounts all that is mounted at or below `dir`, innermost first. What is busy is detached.
pub(crate) fn unmount_below(dir: &Path) {
    // The table shows real paths.
    let real = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
    for point in mounts_below(&real).into_iter().rev() {
        if let Err(error) = rustix::mount::unmount(&point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            tracing::warn!(path = %point.display(), "unmount: {error}");
        }
    }
}

/// Removes a directory tree after unmounting what is in it; refuses to cross into what could not be unmounted.
pub(crate) fn remove(dir: &Path) -> std::io::Result<()> {
    unmount_below(dir);
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Owner root, group `fs_group`, and the mode as given whatever the umask.
pub(crate) fn own(path: &Path, fs_group: Option<u32>, mode: u32) -> Result<(), VolumeError> {
    let group = Gid::from_raw(fs_group.unwrap_or(0));
    let owner = Some(Uid::from_raw(0));
    rustix::fs::chownat(rustix::fs::CWD, path, owner, Some(group), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|e| io("set the owner of", path)(e.into()))?;
    rustix::fs::chmod(path, Mode::from_raw_mode(mode)).map_err(|e| io("set the mode of", path)(e.into()))
}
