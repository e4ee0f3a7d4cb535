//! `COPY`, `ADD` and `WORKDIR`: which entries their layer has.

use super::chmod::Chmod;
use super::entries::{Content, Entry, of_stat};
use super::ignore::Ignore;
use super::layer::Item;
use super::pattern::Pattern;
use super::remote::Fetched;
use super::view::{Node, View};
use crate::jailed::Input;
use crate::store::Store;
use crate::tar::{Archive, EntryKind};
use crate::unpack::{Compression, guarded, sniff};
use rustix::fs::FileType;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{BufReader, BufWriter, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Entries of one copy.
const ENTRIES: usize = 2_000_000;
const DEPTH: usize = 512;

type Done<T = ()> = std::result::Result<T, String>;

/// One `COPY` or `ADD`, its variables replaced.
pub(crate) struct Copy<'a> {
    /// Where the sources are.
    pub from: &'a View,
    /// Left out, by path in `from`.
    pub ignore: &'a Ignore,
    /// Left out, by path below each source.
    pub exclude: &'a Ignore,
    pub sources: Vec<String>,
    /// Names and contents written in the Containerfile itself.
    pub inline: Vec<(String, String)>,
    pub destination: String,
    pub workdir: &'a str,
    /// `None`: as at the source.
    pub owner: Option<(u32, u32)>,
    pub mode: Option<Chmod>,
    /// Unpack archives (`ADD`).
    pub unpack: bool,
    /// Files that were fetched.
    pub fetched: Vec<Fetched>,
    /// Unpack those too.
    pub unpack_fetched: bool,
    /// Keep the directories that a source lies in, from `/./` on.
    pub parents: bool,
}

/// Collects entries above what the image has already.
pub(crate) struct Plan<'a> {
    target: &'a View,
    pub entries: Vec<Entry<'a>>,
    directories: BTreeSet<PathBuf>,
    /// Of directories that have to be made.
    owner: (u32, u32),
}

impl<'a> Plan<'a> {
    pub fn new(target: &'a View, owner: (u32, u32)) -> Plan<'a> {
        Plan { target, entries: Vec::new(), directories: BTreeSet::new(), owner }
    }

    fn push(&mut self, entry: Entry<'a>) -> Done {
        if self.entries.len() >= ENTRIES {
            return Err(format!("more than {ENTRIES} files"));
        }
        if entry.item.path.rsplit(|b| *b == b'/').next().is_some_and(|name| name.starts_with(b".wh.")) {
            let path = String::from_utf8_lossy(&entry.item.path).into_owned();
            return Err(format!("{path}: a name that begins with .wh. means a deletion in an image; rename it"));
        }
        self.entries.push(entry);
        Ok(())
    }

    /// Makes sure that a directory and those above it are there; what the image has keeps its attributes. Gives the path
    /// with symbolic links followed.
    pub fn directory(&mut self, path: &Path) -> Done<PathBuf> {
        let path = self.target.resolve(path)?;
        let mut prefix = PathBuf::new();
        for part in path.iter() {
            prefix.push(part);
            if self.directories.contains(&prefix) {
                continue;
            }
            let bytes = prefix.as_os_str().as_bytes();
            let entry = match self.target.node(&prefix) {
                Some(node) if node.is_dir() => {
                    let mut entry = of_stat(node.tree, &prefix, &node.stat)
                        .map_err(|e| format!("{}: {e}", prefix.display()))?
                        .ok_or("a directory that is none")?;
                    entry.item.path = bytes.to_vec();
                    entry
                }
                Some(_) => return Err(format!("/{} is in the image, and no directory", prefix.display())),
                None => Entry::directory(bytes, 0o755, self.owner),
            };
            self.push(entry)?;
            self.directories.insert(prefix.clone());
        }
        Ok(path)
    }

    fn is_directory(&self, path: &Path) -> bool {
        self.directories.contains(path) || self.target.node(path).is_some_and(|n| n.is_dir())
    }
}

/// `path` below the working directory, unless it is absolute.
pub(crate) fn absolute(workdir: &str, path: &str) -> PathBuf {
    Path::new("/").join(workdir).join(path)
}

impl Copy<'_> {
    pub fn plan<'a>(&'a self, target: &'a View, store: &Store) -> Done<Vec<Entry<'a>>> {
        let mut plan = Plan::new(target, self.owner.unwrap_or((0, 0)));
        let destination = absolute(self.workdir, &self.destination);
        let mut found = Vec::new();
        for source in &self.sources {
            let pivot = if self.parents { self.pivot(source)? } else { None };
            found.extend(self.find(source)?.into_iter().map(|path| (path, pivot.clone())));
        }
        let several = found.len() + self.inline.len() + self.fetched.len() > 1;
        let ends_as_directory = self.destination.ends_with('/')
            || matches!(destination.components().next_back(), Some(Component::CurDir | Component::ParentDir))
            || [".", ".."].contains(&self.destination.as_str())
            || self.destination.ends_with("/.");
        let resolved = target.resolve(&destination)?;
        let is_directory =
            self.parents || ends_as_directory || plan.is_directory(&resolved) || resolved.as_os_str().is_empty();
        if several && !is_directory {
            return Err(format!(
                "several sources need a directory as destination; write {:?}",
                format!("{}/", self.destination)
            ));
        }
        for (path, pivot) in &found {
            let node = self.from.node(path).ok_or_else(|| self.missing(path))?;
            if let Some(pivot) = pivot {
                self.with_parents(&mut plan, path, pivot, &node, &destination)?;
                continue;
            }
            if node.is_dir() {
                let into = plan.directory(&destination)?;
                self.tree(&mut plan, path, &into)?;
            } else {
                let into = place(&mut plan, &destination, is_directory, path.file_name().unwrap_or_default())?;
                if self.unpack && node.kind() == FileType::RegularFile {
                    let shown = path.display().to_string();
                    let file = node.tree.read(path).map_err(|e| format!("{shown}: {e}"))?;
                    if self.archive(&mut plan, store, &shown, file, &destination)? {
                        continue;
                    }
                }
                self.one(&mut plan, path, &node, &into)?;
            }
        }
        for (name, content) in &self.inline {
            let into = place(&mut plan, &destination, is_directory, OsStr::new(name))?;
            let owner = self.owner.unwrap_or((0, 0));
            let item = Item {
                path: into.as_os_str().as_bytes().to_vec(),
                kind: b'0',
                mode: self.mode_of(0o644, false),
                uid: owner.0,
                gid: owner.1,
                size: content.len() as u64,
                ..Item::default()
            };
            plan.push(Entry { item, content: Content::Bytes(content.clone().into_bytes()) })?;
        }
        for fetched in &self.fetched {
            self.fetched(&mut plan, store, fetched, &destination, is_directory)?;
        }
        Ok(plan.entries)
    }

    fn mode_of(&self, mode: u32, directory: bool) -> u32 {
        self.mode.as_ref().map_or(mode, |chmod| chmod.apply(mode, directory))
    }

    /// As BuildKit has it: readable by its owner alone, as old as the server said.
    fn fetched<'a>(
        &'a self,
        plan: &mut Plan<'a>,
        store: &Store,
        fetched: &Fetched,
        destination: &Path,
        is_directory: bool,
    ) -> Done {
        if self.unpack_fetched {
            let file = fetched.file.try_clone().map_err(|e| e.to_string())?;
            if self.archive(plan, store, &fetched.name, file, destination)? {
                return Ok(());
            }
        }
        if is_directory && fetched.name.is_empty() {
            return Err("the URL names no file; give the destination a file's name".into());
        }
        let into = place(plan, destination, is_directory, OsStr::new(&fetched.name))?;
        let owner = self.owner.unwrap_or((0, 0));
        let item = Item {
            path: into.as_os_str().as_bytes().to_vec(),
            kind: b'0',
            mode: self.mode_of(0o600, false),
            uid: owner.0,
            gid: owner.1,
            size: fetched.size,
            mtime: fetched.mtime,
            ..Item::default()
        };
        plan.push(Entry { item, content: Content::Piece(fetched.file.clone(), 0) })
    }

    /// Where a source's kept directories begin: at its `/./`, else at the root.
    fn pivot(&self, source: &str) -> Done<Option<PathBuf>> {
        let before = source.split_once("/./").map_or("", |(before, _)| before);
        self.from.resolve(Path::new(before)).map(Some)
    }

    /// A source with the directories it lies in.
    fn with_parents<'a>(
        &'a self,
        plan: &mut Plan<'a>,
        path: &Path,
        pivot: &Path,
        node: &Node<'a>,
        destination: &Path,
    ) -> Done {
        let Ok(below) = path.strip_prefix(pivot) else {
            return Err(format!("{}: a symbolic link leads out of {}/", path.display(), pivot.display()));
        };
        let mut into = plan.directory(destination)?;
        let mut from = pivot.to_path_buf();
        for part in below.parent().unwrap_or(Path::new("")).iter() {
            from.push(part);
            let parent = self.from.node(&from).ok_or_else(|| self.missing(&from))?;
            into = self.enter(plan, &from, &parent, &into.join(part))?;
        }
        let Some(name) = below.file_name() else { return self.tree(plan, path, &into) };
        let target = into.join(name);
        if node.is_dir() {
            let target = self.enter(plan, path, node, &target)?;
            return self.tree(plan, path, &target);
        }
        self.one(plan, path, node, &target)
    }

    fn missing(&self, path: &Path) -> String {
        format!("{}: no such file where it is copied from (or .dockerignore leaves it out)", path.display())
    }

    /// A source's paths, links followed: itself, or what its wildcards match.
    fn find(&self, source: &str) -> Done<Vec<PathBuf>> {
        let parts: Vec<&str> = source.split('/').filter(|p| !p.is_empty() && *p != ".").collect();
        let mut found = vec![PathBuf::new()];
        for part in &parts {
            if *part == "**" {
                found = self.directories(found)?;
                continue;
            }
            if !Pattern::has_wildcards(part) {
                found = found.into_iter().map(|p| self.from.resolve(&p.join(part))).collect::<Done<_>>()?;
                continue;
            }
            let pattern = Pattern::path(part)?;
            let mut next = Vec::new();
            for directory in found.iter().filter(|p| self.from.node(p).is_some_and(|n| n.is_dir())) {
                for name in self.from.names(directory)? {
                    if name.to_str().is_some_and(|n| pattern.matches(n)) {
                        next.push(self.from.resolve(&directory.join(name))?);
                    }
                }
            }
            found = next;
        }
        let ignored = |path: &Path| path.to_str().is_some_and(|p| !p.is_empty() && self.ignore.excludes(p));
        let keep = |path: &PathBuf| {
            self.from.node(path).is_some_and(|n| n.is_dir() && self.ignore.has_exceptions() || !ignored(path))
        };
        found.retain(keep);
        if found.is_empty() {
            return Err(self.missing(Path::new(source)));
        }
        Ok(found)
    }

    /// Directories and all that is in them.
    fn directories(&self, mut found: Vec<PathBuf>) -> Done<Vec<PathBuf>> {
        let mut at = 0;
        while let Some(directory) = found.get(at).cloned() {
            at += 1;
            if found.len() > ENTRIES || directory.iter().count() > DEPTH {
                return Err("** matches too many directories".into());
            }
            if self.from.node(&directory).is_some_and(|n| n.is_dir()) {
                let names = self.from.names(&directory)?.into_iter().map(|name| directory.join(name));
                found.extend(names.filter(|path| self.from.node(path).is_some_and(|n| n.is_dir())));
            }
        }
        Ok(found)
    }

    /// What is in a directory, to be in `into`.
    fn tree<'a>(&'a self, plan: &mut Plan<'a>, top: &Path, into: &Path) -> Done {
        let mut todo = vec![(top.to_path_buf(), into.to_path_buf(), 0)];
        while let Some((source, into, depth)) = todo.pop() {
            if depth > DEPTH {
                return Err(format!("{}: more than {DEPTH} directories deep", source.display()));
            }
            let mut deeper = Vec::new();
            for name in self.from.names(&source)? {
                let path = source.join(&name);
                let below = path.strip_prefix(top).unwrap_or(&path);
                let left_out = |ignore: &Ignore, path: &Path| path.to_str().is_some_and(|p| ignore.excludes(p));
                let ignored = left_out(self.ignore, &path) || left_out(self.exclude, below);
                let Some(node) = self.from.node(&path) else { continue };
                let mut target = into.join(&name);
                if node.is_dir() {
                    if ignored && !self.ignore.has_exceptions() && !self.exclude.has_exceptions() {
                        continue;
                    }
                    if !ignored {
                        target = self.enter(plan, &path, &node, &target)?;
                    }
                    deeper.push((path, target, depth + 1));
                } else if !ignored {
                    if let Some(parent) = target.parent() {
                        plan.directory(parent)?;
                    }
                    self.one(plan, &path, &node, &target)?;
                }
            }
            // In order: the layer's bytes are to be the same each time.
            todo.extend(deeper.into_iter().rev());
        }
        Ok(())
    }

    /// A directory of the source: one that the image has keeps its attributes, a link to one is followed.
    fn enter<'a>(&'a self, plan: &mut Plan<'a>, path: &Path, node: &Node<'a>, target: &Path) -> Done<PathBuf> {
        let resolved = plan.target.resolve(target)?;
        if plan.is_directory(&resolved) {
            return plan.directory(&resolved);
        }
        if let Some(parent) = target.parent() {
            plan.directory(parent)?;
        }
        self.one(plan, path, node, target)?;
        plan.directories.insert(target.to_path_buf());
        Ok(target.to_path_buf())
    }

    fn one<'a>(&'a self, plan: &mut Plan<'a>, path: &Path, node: &Node<'a>, target: &Path) -> Done {
        let entry = of_stat(node.tree, path, &node.stat).map_err(|e| format!("{}: {e}", path.display()))?;
        let Some(mut entry) = entry else { return Ok(()) };
        if node.kind() != FileType::Directory && plan.is_directory(target) {
            return Err(format!("/{} is a directory in the image; {} is none", target.display(), path.display()));
        }
        entry.item.path = target.as_os_str().as_bytes().to_vec();
        if let Some((uid, gid)) = self.owner {
            (entry.item.uid, entry.item.gid) = (uid, gid);
        }
        if entry.item.kind != b'2' {
            entry.item.mode = self.mode_of(entry.item.mode, entry.item.kind == b'5');
        }
        plan.push(entry)
    }

    /// Unpacks a tar, plain or compressed. Whether it was one.
    fn archive<'a>(
        &'a self,
        plan: &mut Plan<'a>,
        store: &Store,
        shown: &str,
        mut file: std::fs::File,
        destination: &Path,
    ) -> Done<bool> {
        let told = |e: &dyn std::fmt::Display| format!("{shown}: {e}");
        let plain = match sniff(&mut file).map_err(|e| told(&e))?.map_err(|why| told(&why))? {
            Compression::None => file,
            compression => {
                let (temporary, plain) = store.temporary_file().map_err(|e| e.chain())?;
                let _remove = crate::import::RemoveOnDrop(temporary);
                let reader =
                    guarded(Input::File(file), compression, store.limits(), store.roles()).map_err(|e| told(&e))?;
                let mut writer = BufWriter::with_capacity(1 << 20, plain);
                std::io::copy(&mut { reader }, &mut writer).map_err(|e| told(&e))?;
                writer.into_inner().map_err(|e| told(&e))?
            }
        };
        let mut head = [0u8; 512];
        let full = std::os::unix::fs::FileExt::read_exact_at(&plain, &mut head, 0).is_ok();
        if !full || !crate::tar::is_tar(&head) {
            return Ok(false);
        }
        let plain = Arc::new(plain);
        let mut reader = plain.try_clone().map_err(|e| told(&e))?;
        reader.seek(SeekFrom::Start(0)).map_err(|e| told(&e))?;
        let into = plan.directory(destination)?;
        let mut archive = Archive::new(BufReader::with_capacity(256 << 10, reader));
        while let Some(entry) = archive.next().map_err(|e| told(&e))? {
            if let Some(entry) = self.unpacked(plan, entry, &plain, &into).map_err(|e| told(&e))? {
                plan.push(entry)?;
            }
        }
        Ok(true)
    }

    fn unpacked<'a>(
        &self,
        plan: &mut Plan<'a>,
        entry: crate::tar::Entry,
        file: &Arc<std::fs::File>,
        into: &Path,
    ) -> Done<Option<Entry<'a>>> {
        let inside = |path: &[u8]| {
            let path = Path::new(OsStr::from_bytes(path));
            let mut clean = into.to_path_buf();
            for part in path.components() {
                match part {
                    Component::Normal(name) => clean.push(name),
                    Component::ParentDir => return Err(format!("entry {} climbs out with `..`", path.display())),
                    Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
                }
            }
            Ok(clean)
        };
        let path = inside(&entry.path)?;
        if path == into {
            return Ok(None);
        }
        let parent = plan.directory(path.parent().unwrap_or(Path::new("")))?;
        let path = parent.join(path.file_name().unwrap_or_default());
        let id = |id: u64| u32::try_from(id).map_err(|_| format!("entry {}: id {id}", path.display()));
        let mut item = Item {
            path: path.as_os_str().as_bytes().to_vec(),
            mode: self.mode_of(entry.mode, entry.kind == EntryKind::Directory),
            uid: id(entry.uid)?,
            gid: id(entry.gid)?,
            mtime: entry.mtime.0,
            xattrs: entry.xattrs,
            ..Item::default()
        };
        if let Some(owner) = self.owner.filter(|_| self.owner != Some((0, 0))) {
            (item.uid, item.gid) = owner;
        }
        let mut content = Content::None;
        match entry.kind {
            EntryKind::File => {
                (item.kind, item.size) = (b'0', entry.size);
                content = Content::Piece(file.clone(), entry.offset);
            }
            EntryKind::Directory => {
                item.kind = b'5';
                if !plan.directories.insert(path) {
                    return Ok(None);
                }
            }
            EntryKind::Symlink => (item.kind, item.link) = (b'2', entry.link),
            EntryKind::HardLink => {
                (item.kind, item.link) = (b'1', inside(&entry.link)?.as_os_str().as_bytes().to_vec());
            }
            EntryKind::Fifo => item.kind = b'6',
            EntryKind::CharDevice | EntryKind::BlockDevice => return Ok(None),
            EntryKind::Other(kind) => {
                return Err(format!("entry {} is of unknown type {:?}", path.display(), char::from(kind)));
            }
        }
        Ok(Some(Entry { item, content }))
    }
}

/// Where a file goes: into the destination, or to be it.
fn place(plan: &mut Plan, destination: &Path, is_directory: bool, name: &OsStr) -> Done<PathBuf> {
    if is_directory {
        return Ok(plan.directory(destination)?.join(name));
    }
    let resolved = plan.target.resolve(destination)?;
    let parent = plan.directory(resolved.parent().unwrap_or(Path::new("")))?;
    Ok(parent.join(resolved.file_name().unwrap_or_default()))
}
