//! Bringing files in: what `docker save` wrote, OCI layouts, root file systems, components, disks.
//!
//! What a file is is told by its content. Nothing has a name until all of it is here and verified.

pub(crate) mod archive;
mod layout;

use crate::digest::Digest;
use crate::disk::{self, DiskImage};
use crate::error::{Error, Result, io};
use crate::jailed::Input;
use crate::manifest::{Demand, now};
use crate::reference::{Reference, Selector};
use crate::spec::{Descriptor, ImageConfig, Manifest, Platform, RootFs, RunConfig, media};
use crate::store::{Progress, ProgressFn, Store};
use crate::unpack::{Compression, guarded, sniff};
use archive::TarSource;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// How a file is imported. All optional; `cmd` to `workdir` are for root file systems, which do not say themselves.
#[derive(Clone, Debug, Default)]
pub struct ImportOptions {
    /// Name to give it; without one, what the file says, or the file's own name.
    pub tag: Option<String>,
    pub cmd: Vec<String>,
    pub entrypoint: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// `user[:group]`, names or numbers.
    pub user: Option<String>,
    pub workdir: Option<String>,
    /// What a root file system is for, or which of several to require.
    pub platform: Option<Platform>,
    /// Take only what describes a machine: an OVA.
    pub machine: bool,
}

#[derive(Clone, Debug, serde::Serialize)]
pub struct Imported {
    pub names: Vec<String>,
    pub digest: Digest,
    pub kind: crate::resolve::KindName,
    /// What an OVA says of the machine that it was made from. Its disks have `names`, in their order, if there is anything on them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<Box<crate::ova::Machine>>,
}

impl ImportOptions {
    pub(crate) fn wanted(&self) -> Platform {
        self.platform.clone().unwrap_or_else(Platform::host)
    }

    fn has_run_options(&self) -> bool {
        !self.cmd.is_empty()
            || !self.entrypoint.is_empty()
            || !self.env.is_empty()
            || self.user.is_some()
            || self.workdir.is_some()
    }

    fn run_config(&self) -> Result<RunConfig> {
        for variable in &self.env {
            if variable.split_once('=').is_none_or(|(name, _)| name.is_empty()) || variable.contains('\0') {
                return Err(Error::invalid(format!("env {variable:?}"), "write it as NAME=value"));
            }
        }
        let workdir = self.workdir.clone().unwrap_or_default();
        if !workdir.is_empty() && !workdir.starts_with('/') {
            return Err(Error::invalid(format!("workdir {workdir:?}"), "it must be an absolute path"));
        }
        let mut env = self.env.clone();
        if !env.iter().any(|v| v.starts_with("PATH=")) {
            env.insert(0, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
        }
        Ok(RunConfig {
            user: self.user.clone().unwrap_or_default(),
            env,
            entrypoint: self.entrypoint.clone(),
            cmd: self.cmd.clone(),
            working_dir: workdir,
            ..RunConfig::default()
        })
    }
}

impl Store {
    /// Imports a file or a directory. Container images are unpacked right away, so that a bad layer is told now.
    pub fn import(&self, path: &Path, options: &ImportOptions, progress: ProgressFn) -> Result<Imported> {
        if let Some(tag) = &options.tag {
            let reference = Reference::parse(tag, self.local_hosts())?;
            if reference.digest.is_some() {
                return Err(Error::invalid(format!("tag {tag:?}"), "a name to give may not contain a digest"));
            }
        }
        let imported = self.import_any(path, options, progress)?;
        progress(Progress::Step("done".into()));
        Ok(imported)
    }

    fn import_any(&self, path: &Path, options: &ImportOptions, progress: ProgressFn) -> Result<Imported> {
        let metadata = std::fs::metadata(path).map_err(io("open", path))?;
        if metadata.is_dir() {
            self.refuse_run_options(path, options, "an OCI layout")?;
            return self.import_layout(layout::DirSource::open(path)?, path, options, progress);
        }
        let mut file = File::open(path).map_err(io("open", path))?;
        let mut head = vec![0u8; disk::HEAD];
        let n = read_head(&file, &mut head).map_err(io("read", path))?;
        head.truncate(n);
        let unrecognised = |why: String| Error::Unrecognised { path: path.to_path_buf(), why };
        if head.starts_with(b"\0asm") {
            self.refuse_run_options(path, options, "a component")?;
            return self.import_component(path, &file, options, progress);
        }
        if let Some(format) = crate::foreign::detect(&file, &head) {
            self.refuse_run_options(path, options, "a disk")?;
            return self.import_foreign(path, &file, format, options, progress);
        }
        match sniff(&mut file).map_err(io("read", path))?.map_err(|why| unrecognised(why.into()))? {
            Compression::None if crate::tar::is_tar(&head) => {
                self.import_tar(file, path, Compression::None, options, progress)
            }
            Compression::None if disk::looks_like_disk(&head) || is_disk_name(path) => {
                self.refuse_run_options(path, options, "a disk")?;
                self.import_disk(path, file, options, progress)
            }
            Compression::None => Err(unrecognised(
                "it is not a tar archive, an OCI layout, a WebAssembly component or a disk (a raw disk without \
                 partition table or file system is taken if its name ends in .img or .raw)"
                    .into(),
            )),
            compression => {
                // The archive is read twice and not in order: unpack it to a temporary file first.
                progress(Progress::Step("decompressing".into()));
                let (temporary, plain) = self.temporary_file()?;
                let _remove = RemoveOnDrop(temporary.clone());
                let reader =
                    guarded(Input::File(file), compression, self.limits(), self.roles()).map_err(io("read", path))?;
                let mut writer = BufWriter::with_capacity(1 << 20, plain);
                std::io::copy(&mut { reader }, &mut writer).map_err(io("decompress", path))?;
                let mut plain = writer.into_inner().map_err(|e| io("write", &temporary)(e.into_error()))?;
                plain.seek(SeekFrom::Start(0)).map_err(io("seek", &temporary))?;
                let mut head = vec![0u8; 512];
                let n = read_head(&plain, &mut head).map_err(io("read", &temporary))?;
                if !crate::tar::is_tar(head.get(..n).unwrap_or_default()) {
                    return Err(unrecognised("what is compressed in it is not a tar archive; unpack it first".into()));
                }
                self.import_tar(plain, path, compression, options, progress)
            }
        }
    }

    /// A tar is `docker save`'s, an OCI layout, or else a root file system.
    fn import_tar(
        &self,
        plain: File,
        path: &Path,
        was: Compression,
        options: &ImportOptions,
        progress: ProgressFn,
    ) -> Result<Imported> {
        progress(Progress::Step("reading the archive".into()));
        let what = path.display().to_string();
        // An OVA begins with its description (DSP0243, 5.3).
        let mut name = [0; 100];
        let length = read_head(&plain, &mut name).map_err(io("read", path))?;
        let name = name.get(..length).unwrap_or_default().split(|byte| *byte == 0).next().unwrap_or_default();
        let ova = name.ends_with(b".ovf");
        let source = TarSource::index(plain, &what, self.limits())?;
        if ova {
            let others = ImportOptions { machine: false, ..options.clone() };
            self.refuse_run_options(path, &others, "an OVA")?;
            return self.import_ova(&source, path, options, progress);
        }
        if source.has("oci-layout") && source.has("index.json") {
            self.refuse_run_options(path, options, "an OCI layout")?;
            return self.import_layout(source, path, options, progress);
        }
        if source.has("manifest.json") {
            self.refuse_run_options(path, options, "a docker archive")?;
            return self.import_docker(&source, path, options, progress);
        }
        if !source.marked_end {
            return Err(Error::Archive {
                layer: what,
                why: "it ends without the mark of its end; it was truncated".into(),
            });
        }
        tracing::debug!(path = what, compression = ?was, "importing a root file system");
        self.import_rootfs(source.into_file(), path, options, progress)
    }

    fn refuse_run_options(&self, path: &Path, options: &ImportOptions, what: &str) -> Result<()> {
        refuse_machine(path, options, what)?;
        if options.has_run_options() {
            return Err(Error::Unrecognised {
                path: path.to_path_buf(),
                why: format!(
                    "it is {what}, which says itself how it is run; cmd, entrypoint, env, user and workdir are for root file systems"
                ),
            });
        }
        Ok(())
    }

    fn import_rootfs(
        &self,
        file: impl Read,
        path: &Path,
        options: &ImportOptions,
        progress: ProgressFn,
    ) -> Result<Imported> {
        refuse_machine(path, options, "a root file system")?;
        let config = options.run_config()?;
        let layer = self.compress_layer("root file system", file, progress)?;
        progress(Progress::Step("unpacking".into()));
        let diff_id = self.unpack_blob(&layer.digest, None)?;
        let platform = options.wanted();
        let image = ImageConfig {
            architecture: platform.architecture,
            os: platform.os,
            variant: platform.variant,
            created: Some(clock::rfc3339(now().cast_signed())),
            config,
            rootfs: RootFs { kind: "layers".into(), diff_ids: vec![diff_id] },
            ..ImageConfig::default()
        };
        let config = to_json(&image)?;
        let names = self.names_for(options, path, Vec::new())?;
        self.store_manifest(&names, media::OCI_CONFIG, None, &config, vec![layer])
    }

    /// Stores a plain tar as a gzip blob; reads it once. Not zstd, which would be faster: docker's own manifest format has
    /// no media type for it, so tools that convert to it refuse such images.
    pub(crate) fn compress_layer(&self, what: &str, mut reader: impl Read, progress: ProgressFn) -> Result<Descriptor> {
        let mut encoder = flate2::write::GzEncoder::new(self.blob_writer()?, flate2::Compression::fast());
        let mut buffer = vec![0u8; 1 << 20];
        let mut done = 0u64;
        loop {
            let n = reader.read(&mut buffer).map_err(io("read", what))?;
            if n == 0 {
                break;
            }
            encoder.write_all(buffer.get(..n).unwrap_or_default()).map_err(io("compress", what))?;
            done += n as u64;
            if done > self.limits().layer_bytes {
                return Err(Error::TooLarge { what: what.to_owned(), limit: self.limits().layer_bytes });
            }
            progress(Progress::Bytes { what: what.to_owned(), done, total: None });
        }
        let writer = encoder.finish().map_err(io("compress", what))?;
        let (digest, size) = writer.commit(None)?;
        Ok(Descriptor::new(media::OCI_LAYER_GZIP, digest, size))
    }

    /// CNCF TAG Runtime, "Wasm OCI artifact layout".
    fn import_component(
        &self,
        path: &Path,
        file: &File,
        options: &ImportOptions,
        progress: ProgressFn,
    ) -> Result<Imported> {
        crate::resolve::check_component(file, path)?;
        let what = path.display().to_string();
        let (digest, size) = self.blob_copy(&what, file, None, |done| {
            progress(Progress::Bytes { what: "component".into(), done, total: None });
        })?;
        let config = serde_json::json!({
            "created": clock::rfc3339(now().cast_signed()),
            "architecture": "wasm",
            "os": "wasip2",
            "layerDigests": [digest],
            "component": {"exports": [], "imports": []},
        });
        let layer = Descriptor::new(media::WASM_LAYER, digest, size);
        let names = self.names_for(options, path, Vec::new())?;
        self.store_manifest(&names, media::WASM_CONFIG, None, &to_json(&config)?, vec![layer])
    }

    /// Another hypervisor's disk becomes a qcow2 image first.
    fn import_foreign(
        &self,
        path: &Path,
        file: &File,
        format: crate::foreign::Format,
        options: &ImportOptions,
        progress: ProgressFn,
    ) -> Result<Imported> {
        let names = self.names_for(options, path, Vec::new())?;
        self.converted(path, file, format, progress)?.named(self, &names, options)
    }

    pub(crate) fn converted(
        &self,
        path: &Path,
        file: &File,
        format: crate::foreign::Format,
        progress: ProgressFn,
    ) -> Result<StoredDisk> {
        let (temporary, to) = self.temporary_file()?;
        let _remove = RemoveOnDrop(temporary.clone());
        crate::foreign::convert(file, format, path, to, progress)?;
        let converted = File::open(&temporary).map_err(io("open", &temporary))?;
        self.stored(&temporary, converted, progress)
    }

    fn import_disk(&self, path: &Path, file: File, options: &ImportOptions, progress: ProgressFn) -> Result<Imported> {
        let names = self.names_for(options, path, Vec::new())?;
        self.stored(path, file, progress)?.named(self, &names, options)
    }

    pub(crate) fn stored(&self, path: &Path, file: File, progress: ProgressFn) -> Result<StoredDisk> {
        let disk = DiskImage::probe(path)?;
        let total = file.metadata().map_err(io("stat", path))?.len();
        let what = path.display().to_string();
        let (digest, size) = self.blob_copy(&what, file, None, |done| {
            progress(Progress::Bytes { what: "disk".into(), done, total: Some(total) });
        })?;
        Ok(StoredDisk { disk, digest, size })
    }

    /// Stores configuration and manifest under all names.
    pub(crate) fn store_manifest(
        &self,
        names: &[Reference],
        config_type: &str,
        artifact_type: Option<&str>,
        config: &[u8],
        layers: Vec<Descriptor>,
    ) -> Result<Imported> {
        self.blob_put(config)?;
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media::OCI_MANIFEST.into()),
            artifact_type: artifact_type.map(str::to_owned),
            config: Descriptor::of(config_type, config),
            layers,
            subject: None,
            annotations: BTreeMap::new(),
        };
        let kind = crate::resolve::KindName::of(&manifest);
        let bytes = to_json(&manifest)?;
        self.put_names(names, media::OCI_MANIFEST, &bytes)?;
        let names = names.iter().map(Reference::to_string).collect();
        Ok(Imported { names, digest: Digest::of(&bytes), kind, machine: None })
    }

    pub(crate) fn put_names(&self, names: &[Reference], media_type: &str, bytes: &[u8]) -> Result<()> {
        for name in names {
            let selector = Selector::Tag(name.tag.clone().unwrap_or_else(|| "latest".into()));
            self.manifest_put_demanding(
                &name.repository,
                &selector,
                Some(media_type),
                bytes,
                Demand::ChildrenOptional,
            )?;
        }
        Ok(())
    }

    /// The tag asked for, else what the file says, else the file's own name.
    pub(crate) fn names_for(
        &self,
        options: &ImportOptions,
        path: &Path,
        said: Vec<Reference>,
    ) -> Result<Vec<Reference>> {
        if let Some(tag) = &options.tag {
            return Ok(vec![Reference::parse(tag, self.local_hosts())?]);
        }
        if !said.is_empty() {
            return Ok(said);
        }
        let file_name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        let stem = [
            ".tar.gz", ".tar.zst", ".tgz", ".tar", ".wasm", ".qcow2", ".vmdk", ".vhd", ".vhdx", ".ova", ".img", ".raw",
            ".oci", ".gz", ".zst",
        ]
        .iter()
        .find_map(|end| file_name.strip_suffix(end))
        .unwrap_or(&file_name);
        let cleaned: String = stem.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let cleaned = cleaned.trim_matches('-');
        Reference::parse(cleaned, self.local_hosts()).map(|r| vec![r]).map_err(|_| Error::Unrecognised {
            path: path.to_path_buf(),
            why: "it has no name in it; give one with --tag".into(),
        })
    }
}

fn refuse_machine(path: &Path, options: &ImportOptions, what: &str) -> Result<()> {
    match options.machine {
        true => Err(Error::Unrecognised {
            path: path.to_path_buf(),
            why: format!("it is {what}, which describes no machine; OVA archives do (--manifest)"),
        }),
        false => Ok(()),
    }
}

/// A disk that is a blob and not an image yet.
pub(crate) struct StoredDisk {
    disk: DiskImage,
    digest: Digest,
    size: u64,
}

impl StoredDisk {
    pub fn named(self, store: &Store, names: &[Reference], options: &ImportOptions) -> Result<Imported> {
        let platform = options.wanted();
        let config = serde_json::json!({
            "created": clock::rfc3339(now().cast_signed()),
            "architecture": platform.architecture,
            "os": platform.os,
            "format": self.disk.format,
            "virtualSize": self.disk.virtual_size,
        });
        let kind = if self.disk.format == "qcow2" { media::DISK_QCOW2 } else { media::DISK_RAW };
        let layer = Descriptor::new(kind, self.digest, self.size);
        store.store_manifest(names, media::DISK_CONFIG, Some(media::DISK_ARTIFACT), &to_json(&config)?, vec![layer])
    }
}

pub(crate) struct RemoveOnDrop(pub PathBuf);

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

pub(crate) fn to_json(value: &impl serde::Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| Error::invalid("document", e))
}

pub(crate) fn read_head(file: &File, head: &mut [u8]) -> std::io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = head.get_mut(done..).filter(|r| !r.is_empty()) {
        match file.read_at(rest, done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    Ok(done)
}

fn is_disk_name(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "img" || e == "raw")
}
