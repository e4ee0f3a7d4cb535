//! What a `RUN` changed: overlayfs's upper directory as entries of a layer.

use super::entries::{Content, Entry, of_stat};
use super::layer::Item;
use super::view::{Tree, View};
use rustix::fs::{FileType, Stat};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Ids of a build's range.
const RANGE: u32 = 65_536;
const NOBODY: u32 = 65_534;
const DEPTH: usize = 512;
const ENTRIES: usize = 2_000_000;

type Done<T = ()> = std::result::Result<T, String>;

pub(crate) struct Diff<'a> {
    upper: &'a Tree,
    lower: &'a View,
    /// The host's id of the sandbox's root.
    id_base: u32,
    /// Paths that were mounted on and stubs made for that: no part of the image.
    stubs: Vec<PathBuf>,
    links: HashMap<u64, Vec<u8>>,
    count: usize,
}

impl<'a> Diff<'a> {
    /// `mounted`: where something was mounted.
    pub fn new(upper: &'a Tree, lower: &'a View, id_base: u32, mounted: &[PathBuf]) -> Diff<'a> {
        let mut stubs = Vec::new();
        for path in mounted {
            let Ok(path) = lower.resolve(path) else { continue };
            let missing = path.ancestors().filter(|a| !a.as_os_str().is_empty() && lower.node(a).is_none());
            stubs.extend(missing.map(Path::to_path_buf));
        }
        Diff { upper, lower, id_base, stubs, links: HashMap::new(), count: 0 }
    }

    /// Entries, parents before what is in them.
    pub fn entries(mut self) -> Done<Vec<Entry<'a>>> {
        self.directory(Path::new(""), 0)
    }

    fn directory(&mut self, path: &Path, depth: usize) -> Done<Vec<Entry<'a>>> {
        let told = |path: &Path, e: rustix::io::Errno| format!("/{}: {e}", path.display());
        if depth > DEPTH {
            return Err(format!("/{}: more than {DEPTH} directories deep", path.display()));
        }
        let mut entries = Vec::new();
        for name in self.upper.names(path).map_err(|e| told(path, e))? {
            let at = path.join(&name);
            self.count += 1;
            if self.count > ENTRIES {
                return Err(format!("it changed more than {ENTRIES} files"));
            }
            let stat = self.upper.stat(&at).map_err(|e| told(&at, e))?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::CharacterDevice if stat.st_rdev == 0 => entries.push(whiteout(path, &name)),
                FileType::Directory => entries.extend(self.subdirectory(&at, &stat, depth)?),
                _ => entries.extend(self.file(&at, &stat)?),
            }
        }
        Ok(entries)
    }

    fn subdirectory(&mut self, at: &Path, stat: &Stat, depth: usize) -> Done<Vec<Entry<'a>>> {
        let inside = self.directory(at, depth + 1)?;
        let raw = self.upper.xattrs(at).map_err(|e| format!("/{}: {e}", at.display()))?;
        if raw.iter().any(|(name, _)| name == b"trusted.overlay.redirect") {
            return Err(format!(
                "/{}: the kernel keeps renamed directories as redirects; turn overlayfs's redirect_dir off",
                at.display()
            ));
        }
        let Some(mut entry) = self.entry(at, stat)? else { return Ok(inside) };
        let opaque = self.upper.is_opaque(at);
        let before = self.lower.node(at).filter(|n| n.is_dir());
        let same = before.as_ref().is_some_and(|node| {
            let old = of_stat(node.tree, at, &node.stat).ok().flatten();
            old.is_some_and(|old| {
                let key = |i: &Item| (i.mode, i.uid, i.gid, i.xattrs.clone());
                key(&old.item) == key(&entry.item)
            })
        });
        if inside.is_empty() && (same && !opaque || before.is_none() && self.is_stub(at)) {
            return Ok(inside);
        }
        entry.item.path = at.as_os_str().as_bytes().to_vec();
        let mut entries = vec![entry];
        // Without a lower directory there is nothing to hide.
        if opaque && before.is_some() {
            entries.push(empty(&at.join(".wh..wh..opq")));
        }
        entries.extend(inside);
        Ok(entries)
    }

    fn file(&mut self, at: &Path, stat: &Stat) -> Done<Option<Entry<'a>>> {
        let Some(mut entry) = self.entry(at, stat)? else { return Ok(None) };
        if entry.item.size == 0 && entry.item.kind == b'0' && self.is_stub(at) {
            return Ok(None);
        }
        let name = at.file_name().unwrap_or_default().as_bytes();
        if name.starts_with(b".wh.") {
            return Err(format!("/{}: a name that begins with .wh. means a deletion in an image", at.display()));
        }
        entry.item.path = at.as_os_str().as_bytes().to_vec();
        if stat.st_nlink > 1 && entry.item.kind == b'0' {
            if let Some(first) = self.links.get(&stat.st_ino) {
                (entry.item.kind, entry.item.size, entry.item.link) = (b'1', 0, first.clone());
                entry.content = Content::None;
            } else {
                self.links.insert(stat.st_ino, entry.item.path.clone());
            }
        }
        Ok(Some(entry))
    }

    fn is_stub(&self, path: &Path) -> bool {
        self.stubs.iter().any(|s| s == path)
    }

    fn entry(&self, at: &Path, stat: &Stat) -> Done<Option<Entry<'a>>> {
        let mut entry = of_stat(self.upper, at, stat).map_err(|e| format!("/{}: {e}", at.display()))?;
        if let Some(entry) = &mut entry {
            let shift = |id: u32| id.checked_sub(self.id_base).filter(|id| *id < RANGE).unwrap_or(NOBODY);
            (entry.item.uid, entry.item.gid) = (shift(stat.st_uid), shift(stat.st_gid));
        }
        Ok(entry)
    }
}

fn whiteout(parent: &Path, name: &OsStr) -> Entry<'static> {
    let mut hidden = b".wh.".to_vec();
    hidden.extend(name.as_bytes());
    empty(&parent.join(OsStr::from_bytes(&hidden)))
}

fn empty(path: &Path) -> Entry<'static> {
    let item = Item { path: path.as_os_str().as_bytes().to_vec(), kind: b'0', mode: 0o600, ..Item::default() };
    Entry { item, content: Content::None }
}
