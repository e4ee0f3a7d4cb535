//! The way out where a file system knows no id-mapped mounts: a pod's own files are given to its range of ids.

use super::prepare::IdMap;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Stat, Uid, chownat, fstat, openat};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// A volume of files that Atoll wrote is small; a larger one is on a file system of its own choosing.
const MAX_FILES: usize = 100_000;
const MAX_DEPTH: usize = 64;

/// Shifts the owner of everything at and below `path` that the range does not own yet. Links are changed and not
/// followed: a container may be writing here at the same time.
pub fn give(path: &Path, map: IdMap<'_>) -> io::Result<()> {
    let top = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let stat = fstat(&top)?;
    let mut left = MAX_FILES;
    shift(&top, c"", &stat, AtFlags::EMPTY_PATH, map)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        walk(openat(&top, c".", flags, Mode::empty())?, map, &mut left, 0)?;
    }
    Ok(())
}

fn walk(directory: OwnedFd, map: IdMap<'_>, left: &mut usize, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::other(format!("more than {MAX_DEPTH} directories deep")));
    }
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        *left = left.checked_sub(1).ok_or_else(|| io::Error::other(format!("more than {MAX_FILES} files")))?;
        let stat = rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        shift(&directory, name, &stat, AtFlags::SYMLINK_NOFOLLOW, map)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            walk(openat(&directory, name, flags, Mode::empty())?, map, left, depth + 1)?;
        }
    }
    Ok(())
}

fn shift(at: impl AsFd, name: &CStr, stat: &Stat, flags: AtFlags, map: IdMap<'_>) -> io::Result<()> {
    let uid = (stat.st_uid < map.size).then(|| Uid::from_raw(map.uid_base + stat.st_uid));
    let gid = (stat.st_gid < map.size).then(|| Gid::from_raw(map.gid_base + stat.st_gid));
    if uid.is_some() || gid.is_some() {
        chownat(at, name, uid, gid, flags)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn gives_files_and_no_targets_of_links() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: not root");
            return;
        }
        let base = tempfile::tempdir().expect("directory");
        let outside = tempfile::NamedTempFile::new().expect("file");
        std::fs::create_dir_all(base.path().join("a/b")).expect("made");
        std::fs::write(base.path().join("a/b/file"), "x").expect("written");
        std::os::unix::fs::symlink(outside.path(), base.path().join("link")).expect("link");
        let null = std::fs::File::open("/dev/null").expect("null");
        let map = IdMap { namespace: null.as_fd(), uid_base: 200_000, gid_base: 300_000, size: 65_536 };
        give(base.path(), map).expect("given");
        give(base.path(), map).expect("nothing to do");
        let owner = |path: &Path| std::fs::symlink_metadata(path).map(|m| (m.uid(), m.gid())).expect("stat");
        for name in ["", "a", "a/b/file", "link"] {
            assert_eq!(owner(&base.path().join(name)), (200_000, 300_000), "{name}");
        }
        assert_eq!(owner(outside.path()), (0, 0));
    }
}
