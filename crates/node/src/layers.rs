//! Reads single files out of unpacked image layers, as the overlay of them would show, without mounting and without
//! following links out: the bytes are a tenant's.

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

enum Found {
    File(OwnedFd),
    /// A whiteout, or something that is no file and hides what is below.
    Hidden,
    Absent,
}

/// The file at `path` (relative) in `layers` (lowest first), if there is a regular one. Links inside the layer are
/// followed only if they stay inside it.
pub(crate) fn open(layers: &[PathBuf], path: &Path) -> Option<File> {
    layers.iter().rev().find_map(|layer| match look(layer, path) {
        Found::File(fd) => Some(Some(File::from(fd))),
        Found::Hidden => Some(None),
        Found::Absent => None,
    })?
}

/// Path of the file that [`open`] would open. Layers are read-only and owned by the store, so it stays true.
pub(crate) fn locate(layers: &[PathBuf], path: &Path) -> Option<PathBuf> {
    let file = open(layers, path)?;
    use std::os::fd::AsRawFd;
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()
}

/// Up to `limit` bytes of a text file.
pub(crate) fn read_text(layers: &[PathBuf], path: &Path, limit: u64) -> Option<String> {
    let mut bytes = Vec::new();
    open(layers, path)?.take(limit).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn look(layer: &Path, path: &Path) -> Found {
    let Ok(root) = rustix::fs::open(layer, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) else {
        return Found::Absent;
    };
    // A whiteout or an opaque directory on the way hides the layers below.
    let mut hidden_below = false;
    let mut at = PathBuf::new();
    for part in path.components() {
        at.push(part);
        let Ok(stat) = rustix::fs::statat(&root, &at, rustix::fs::AtFlags::SYMLINK_NOFOLLOW) else { break };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::CharacterDevice if stat.st_rdev == 0 => return Found::Hidden,
            FileType::Directory => hidden_below |= is_opaque(&layer.join(&at)),
            _ => break,
        }
    }
    let flags = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let open = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    match rustix::fs::openat2(&root, path, open, Mode::empty(), flags) {
        Ok(fd) => match rustix::fs::fstat(&fd) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => Found::File(fd),
            _ => Found::Hidden,
        },
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) if !hidden_below => Found::Absent,
        Err(_) => Found::Hidden,
    }
}

fn is_opaque(dir: &Path) -> bool {
    ["trusted.overlay.opaque", "user.overlay.opaque"].iter().any(|name| {
        let mut value = [0u8; 8];
        matches!(rustix::fs::lgetxattr(dir, *name, &mut value), Ok(n) if value.get(..n) == Some(b"y"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upper_layers_win_and_links_cannot_climb_out() {
        let dir = tempfile::tempdir().unwrap();
        let (low, high) = (dir.path().join("low"), dir.path().join("high"));
        for layer in [&low, &high] {
            std::fs::create_dir_all(layer.join("etc")).unwrap();
        }
        std::fs::write(dir.path().join("outside"), "outside").unwrap();
        std::fs::write(low.join("etc/passwd"), "low").unwrap();
        std::fs::write(low.join("etc/group"), "low").unwrap();
        std::fs::write(high.join("etc/passwd"), "high").unwrap();
        std::os::unix::fs::symlink("../../outside", high.join("etc/group")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("outside"), high.join("etc/abs")).unwrap();
        std::os::unix::fs::symlink("passwd", high.join("etc/inside")).unwrap();
        let layers = [low.clone(), high];
        let read = |p: &str| read_text(&layers, Path::new(p), 100);
        assert_eq!(read("etc/passwd").as_deref(), Some("high"));
        assert_eq!(read("etc/inside").as_deref(), Some("high"));
        // Resolved inside the layer, where there is nothing: the layer below is seen.
        assert_ne!(read("etc/group").as_deref(), Some("outside"));
        assert_eq!(read("etc/abs"), None);
        assert_eq!(read("../outside"), None);
        assert_eq!(read("etc"), None);
    }

    #[test]
    fn whiteouts_hide() {
        let dir = tempfile::tempdir().unwrap();
        let (low, high) = (dir.path().join("low"), dir.path().join("high"));
        for layer in [&low, &high] {
            std::fs::create_dir_all(layer.join("etc")).unwrap();
        }
        std::fs::write(low.join("etc/passwd"), "low").unwrap();
        let layers = [low, high.clone()];
        let read = || read_text(&layers, Path::new("etc/passwd"), 100);
        assert_eq!(read().as_deref(), Some("low"));
        let made = rustix::fs::mknodat(
            rustix::fs::CWD,
            high.join("etc/passwd"),
            FileType::CharacterDevice,
            Mode::empty(),
            rustix::fs::makedev(0, 0),
        );
        if let Err(error) = made {
            println!("SKIPPED: no right to make a whiteout: {error}");
            return;
        }
        assert_eq!(read(), None);
        std::fs::remove_file(high.join("etc/passwd")).unwrap();
        let flags = rustix::fs::XattrFlags::empty();
        match rustix::fs::setxattr(high.join("etc"), "trusted.overlay.opaque", b"y", flags) {
            Ok(()) => assert_eq!(read(), None),
            Err(error) => println!("SKIPPED: no right to make a directory opaque: {error}"),
        }
    }
}
