//! `tmpcopyup`: a tmpfs that begins with what the image has in its place.

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid, chownat, fchmod, fchown, fstat, mkdirat, mknodat, openat,
    readlinkat, statat, symlinkat,
};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Images are foreign: their trees are followed so deep, and no further.
const MAX_DEPTH: usize = 128;

/// Both are directories; no link is followed in either.
pub fn copy(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let from = openat(from, ".", flags, Mode::empty())?;
    let stat = fstat(&from)?;
    fchown_like(to.as_fd(), &stat)?;
    let to = openat(to, ".", flags, Mode::empty())?;
    tree(from.as_fd(), to.as_fd(), 0)
}

fn fchown_like(fd: BorrowedFd<'_>, stat: &Stat) -> io::Result<()> {
    let to = openat(fd, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let _ = fchown(&to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)));
    Ok(())
}

fn tree(from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::other(format!("directories are nested deeper than {MAX_DEPTH}")));
    }
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        let owner = (Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)));
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                mkdirat(to, name, Mode::RWXU)?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let (source, copy) =
                    (openat(from, name, flags, Mode::empty())?, openat(to, name, flags, Mode::empty())?);
                tree(source.as_fd(), copy.as_fd(), depth + 1)?;
                let _ = fchown(&copy, owner.0, owner.1);
                fchmod(&copy, mode)?;
            }
            FileType::RegularFile => {
                let read = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let mut source = std::fs::File::from(openat(from, name, read, Mode::empty())?);
                let write = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut copy = std::fs::File::from(openat(to, name, write, Mode::RUSR | Mode::WUSR)?);
                io::copy(&mut source, &mut copy)?;
                let _ = fchown(&copy, owner.0, owner.1);
                fchmod(&copy, mode)?;
            }
            FileType::Symlink => {
                symlinkat(readlinkat(from, name, Vec::new())?.as_c_str(), to, name)?;
                let _ = chownat(to, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW);
            }
            kind => match mknodat(to, name, kind, mode, stat.st_rdev) {
                Ok(()) | Err(Errno::PERM) => {}
                Err(e) => return Err(e.into()),
            },
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn copies_and_follows_nothing() {
        let (from, to) = (tempfile::tempdir().expect("directory"), tempfile::tempdir().expect("directory"));
        fs::create_dir_all(from.path().join("a/b")).expect("made");
        fs::write(from.path().join("a/b/file"), "text").expect("written");
        std::os::unix::fs::symlink("/etc", from.path().join("link")).expect("link");
        let open = |path: &std::path::Path| {
            rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).expect("open")
        };
        copy(&open(from.path()), &open(to.path())).expect("copied");
        assert_eq!(fs::read_to_string(to.path().join("a/b/file")).expect("read"), "text");
        assert_eq!(fs::read_link(to.path().join("link")).expect("link"), std::path::Path::new("/etc"));
    }
}
