//! Kernels for pods with a machine of their own: `DATA/kernels/NAME/vmlinuz` and, in `modules/`, what such a machine
//! needs of it, in the order in which it is loaded. `DATA/kernels/default` is a symbolic link to one of them.
//!
//! A Debian package comes from an administrator, but is no more believed for that: it is decompressed in a role without
//! any rights, entries are taken by their names' last part, sizes are bounded.

mod deb;
mod module;

use crate::error::{Error, Result, io};
use crate::jailed::Roles;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// What a pod's machine needs, where the kernel does not have it built in: buses, disks, network, the host's line, the
/// file systems.
const NEEDED: [&str; 9] = [
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "erofs",
    "overlay",
];
const VMLINUZ: &str = "vmlinuz";
const MODULES: &str = "modules";
const DEFAULT: &str = "default";
const MAX_KERNEL: u64 = 256 << 20;
const MAX_MODULE: u64 = 64 << 20;
const MAX_NAME: usize = 64;

/// A directory of kernels.
pub struct Kernels {
    dir: PathBuf,
    roles: Option<Roles>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    pub name: String,
    pub default: bool,
    pub dir: PathBuf,
    /// Of all its files.
    pub bytes: u64,
    /// In the order in which they are loaded, without `NNN-` and `.ko`.
    pub modules: Vec<String>,
}

impl Kernel {
    pub fn vmlinuz(&self) -> PathBuf {
        self.dir.join(VMLINUZ)
    }

    /// Name and bytes of each module, in the order in which they are loaded.
    pub fn module_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let read = |path: PathBuf| {
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            let bytes = fs::read(&path).map_err(io("read", &path))?;
            Ok((name.split_once('-').map(|(_, n)| n.to_owned()).unwrap_or(name), bytes))
        };
        listing(&self.dir.join(MODULES))?.into_iter().map(read).collect()
    }
}

fn listing(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(io("read", dir))? {
        paths.push(entry.map_err(io("read", dir))?.path());
    }
    paths.sort();
    Ok(paths)
}

/// What the names in `depends=` have in common with those of files.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn check_name(name: &str) -> Result<()> {
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+~".contains(&b));
    if name.is_empty() || name.len() > MAX_NAME || name.starts_with('.') || name == DEFAULT || !plain {
        let why = "a kernel's name is up to 64 letters, digits, - _ . + and ~, does not begin with a dot and is not \"default\"";
        return Err(Error::invalid(format!("kernel name {name:?}"), why));
    }
    Ok(())
}

impl Kernels {
    /// `roles` decompress what is foreign.
    pub fn new(data_dir: &Path, roles: Option<Roles>) -> Kernels {
        Kernels { dir: data_dir.join("kernels"), roles }
    }

    pub fn list(&self) -> Result<Vec<Kernel>> {
        let default = fs::read_link(self.dir.join(DEFAULT)).ok();
        let mut all = Vec::new();
        let Ok(entries) = fs::read_dir(&self.dir) else { return Ok(all) };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !entry.file_type().is_ok_and(|t| t.is_dir()) || check_name(&name).is_err() {
                continue;
            }
            let dir = entry.path();
            let mut bytes = fs::metadata(dir.join(VMLINUZ)).map_err(io("stat", &dir))?.len();
            let mut modules = Vec::new();
            for path in listing(&dir.join(MODULES))? {
                bytes += fs::metadata(&path).map_or(0, |m| m.len());
                let stem = path.file_stem().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
                modules.push(stem.split_once('-').map(|(_, n)| n.to_owned()).unwrap_or(stem));
            }
            let is_default = default.as_deref() == Some(Path::new(&name));
            all.push(Kernel { name, default: is_default, dir, bytes, modules });
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// The one that pods' machines boot.
    pub fn default_one(&self) -> Result<Option<Kernel>> {
        Ok(self.list()?.into_iter().find(|kernel| kernel.default))
    }

    fn find(&self, name: &str) -> Result<Kernel> {
        check_name(name)?;
        self.list()?.into_iter().find(|kernel| kernel.name == name).ok_or_else(|| {
            Error::invalid(format!("kernel {name:?}"), "no such kernel here; atoll kernel ls shows what there is")
        })
    }

    pub fn set_default(&self, name: &str) -> Result<()> {
        let kernel = self.find(name)?;
        let (new, link) = (self.dir.join(".default-new"), self.dir.join(DEFAULT));
        let _ = fs::remove_file(&new);
        symlink(&kernel.name, &new).map_err(io("link", &new))?;
        fs::rename(&new, &link).map_err(io("rename into place", &link))
    }

    /// Machines that run have what they need of it. Without a default afterwards, pods wait for one.
    pub fn remove(&self, name: &str) -> Result<()> {
        let kernel = self.find(name)?;
        if kernel.default {
            let link = self.dir.join(DEFAULT);
            fs::remove_file(&link).map_err(io("remove", &link))?;
        }
        fs::remove_dir_all(&kernel.dir).map_err(io("remove", &kernel.dir))
    }

    /// A kernel and its modules as files: the one that is no `.ko`, `.ko.xz`, `.ko.zst` or `.ko.gz` is the kernel.
    pub fn add_files(&self, name: Option<&str>, files: &[PathBuf]) -> Result<Kernel> {
        let (modules, kernels): (Vec<&PathBuf>, Vec<&PathBuf>) =
            files.iter().partition(|path| module::stem(&file_name(path)).is_some());
        let [vmlinuz] = kernels.as_slice() else {
            let why = format!("{} of the files are no modules (.ko); give one kernel", kernels.len());
            return Err(Error::invalid("kernel", why));
        };
        let own = file_name(vmlinuz);
        let name = name.unwrap_or_else(|| own.strip_prefix("vmlinuz-").unwrap_or(&own)).to_owned();
        self.assemble(&name, |work| {
            copy(vmlinuz, &work.join(VMLINUZ), MAX_KERNEL)?;
            for path in modules {
                copy(path, &work.join("all").join(file_name(path)), MAX_MODULE)?;
            }
            Ok(name.clone())
        })
    }

    /// A Debian package of a kernel (`linux-image-*`); its version is the name.
    pub fn add_deb(&self, name: Option<&str>, package: &Path) -> Result<Kernel> {
        self.assemble("", |work| {
            let found = deb::unpack(package, work, self.roles.as_ref())?;
            Ok(name.map_or(found, str::to_owned))
        })
    }

    /// There as a whole or not at all. `fill` makes `vmlinuz` and `all/`, and says the name.
    fn assemble(&self, hint: &str, fill: impl FnOnce(&Path) -> Result<String>) -> Result<Kernel> {
        if !hint.is_empty() {
            check_name(hint)?;
        }
        let work = self.dir.join(format!(".new-{}", std::process::id()));
        let _ = fs::remove_dir_all(&work);
        fs::create_dir_all(work.join("all")).map_err(io("create", &work))?;
        let made = fill(&work).and_then(|name| {
            check_name(&name)?;
            check_bootable(&work.join(VMLINUZ))?;
            self.choose_modules(&work)?;
            let place = self.dir.join(&name);
            if place.exists() {
                let why = format!("is there already; atoll kernel rm {name} first");
                return Err(Error::invalid(format!("kernel {name:?}"), why));
            }
            fs::rename(&work, &place).map_err(io("rename into place", &place))?;
            crate::store::sync_dir(&self.dir)?;
            Ok(name)
        });
        let name = match made {
            Ok(name) => name,
            Err(error) => {
                let _ = fs::remove_dir_all(&work);
                return Err(error);
            }
        };
        if self.default_one()?.is_none() {
            self.set_default(&name)?;
        }
        self.find(&name)
    }

    /// From `all/` to `modules/`: what is needed, each after what it depends on. What is missing may be built in.
    fn choose_modules(&self, work: &Path) -> Result<()> {
        let all = work.join("all");
        let mut there = BTreeMap::new();
        for path in listing(&all)? {
            if let Some(stem) = module::stem(&file_name(&path)) {
                there.insert(canonical(stem), path);
            }
        }
        let mut order: Vec<(String, Vec<u8>)> = Vec::new();
        let mut seen = BTreeSet::new();
        for name in NEEDED {
            self.visit(name, &there, &mut seen, &mut order, 0)?;
        }
        let modules = work.join(MODULES);
        fs::create_dir(&modules).map_err(io("create", &modules))?;
        for (at, (name, bytes)) in order.iter().enumerate() {
            let path = modules.join(format!("{at:03}-{name}.ko"));
            fs::write(&path, bytes).map_err(io("write", &path))?;
        }
        fs::remove_dir_all(&all).map_err(io("remove", &all))
    }

    fn visit(
        &self,
        name: &str,
        there: &BTreeMap<String, PathBuf>,
        seen: &mut BTreeSet<String>,
        order: &mut Vec<(String, Vec<u8>)>,
        depth: usize,
    ) -> Result<()> {
        const DEPTH: usize = 16;
        let Some(path) = there.get(name) else { return Ok(()) };
        if depth > DEPTH || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let bytes = module::read(path, self.roles.as_ref(), MAX_MODULE)?;
        for dependency in module::depends(&bytes) {
            self.visit(&canonical(&dependency), there, seen, order, depth + 1)?;
        }
        order.push((name.to_owned(), bytes));
        Ok(())
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

fn copy(from: &Path, to: &Path, most: u64) -> Result<()> {
    let size = fs::metadata(from).map_err(io("read", from))?.len();
    if size > most {
        return Err(Error::TooLarge { what: from.display().to_string(), limit: most });
    }
    fs::copy(from, to).map(drop).map_err(io("copy", from))
}

/// A bzImage (Linux boot protocol, "HdrS" at 0x202) or an ELF file.
fn check_bootable(path: &Path) -> Result<()> {
    let mut head = Vec::new();
    let file = fs::File::open(path).map_err(io("open", path))?;
    std::io::Read::read_to_end(&mut std::io::Read::take(file, 0x206), &mut head).map_err(io("read", path))?;
    if head.get(0x202..0x206) == Some(b"HdrS") || head.starts_with(b"\x7fELF") {
        return Ok(());
    }
    Err(Error::invalid("vmlinuz", "is no Linux kernel for x86-64: neither a bzImage nor ELF"))
}

#[cfg(test)]
mod tests;
