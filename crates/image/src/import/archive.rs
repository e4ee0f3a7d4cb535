//! A tar archive as a set of named files, and `docker save`'s use of it.

use super::{ImportOptions, Imported};
use crate::error::{Error, Result, io};
use crate::reference::Reference;
use crate::spec::{ImageConfig, media};
use crate::store::{Limits, Progress, ProgressFn, Store};
use crate::tar::{Archive, EntryKind};
use crate::unpack::Compression;
use serde::Deserialize;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self as stdio, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// Names that lead to a file in the archive, at most.
const LINKS: usize = 8;

/// Files by name in something that came from a stranger.
pub(crate) trait Source {
    /// A reader and its length; `None` if there is no such file.
    fn open(&self, name: &str) -> Result<Option<(Box<dyn Read + '_>, u64)>>;

    fn read(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        match self.open(name)? {
            Some((reader, _)) => crate::blob::read_limited(reader, limit, name).map(Some),
            None => Ok(None),
        }
    }
}

enum Place {
    File {
        offset: u64,
        size: u64,
    },
    /// `docker save` of old wrote repeated layers as symbolic links.
    Link(String),
}

/// An uncompressed tar whose entries were listed once.
pub(crate) struct TarSource {
    file: Arc<File>,
    places: HashMap<String, Place>,
    pub marked_end: bool,
}

impl TarSource {
    /// Lists the archive. Entries beyond those that an image archive could have are not remembered: a root file system
    /// may have a million.
    pub fn index(file: File, what: &str, limits: &Limits) -> Result<TarSource> {
        let failed = |why: String| Error::Archive { layer: what.to_owned(), why };
        let file = Arc::new(file);
        let length = file.metadata().map_err(io("stat", what))?.len();
        let reader = Piece { file: file.clone(), position: 0, end: length };
        let mut archive = Archive::new(BufReader::with_capacity(256 * 1024, reader));
        let mut places = HashMap::new();
        let mut count = 0u64;
        while let Some(entry) = archive.next().map_err(|e| failed(e.to_string()))? {
            count += 1;
            if count > limits.layer_entries {
                return Err(failed(format!("it has more than {} entries", limits.layer_entries)));
            }
            let Ok(name) = String::from_utf8(entry.path) else { continue };
            let name = name.trim_start_matches("./").to_owned();
            if name.len() > 300 || places.len() >= 20_000 {
                continue;
            }
            match entry.kind {
                EntryKind::File => places.insert(name, Place::File { offset: entry.offset, size: entry.size }),
                EntryKind::Symlink | EntryKind::HardLink => {
                    let Ok(link) = String::from_utf8(entry.link) else { continue };
                    let base = if entry.kind == EntryKind::Symlink { name.as_str() } else { "" };
                    let Some(target) = beside(base, &link) else { continue };
                    places.insert(name, Place::Link(target))
                }
                _ => None,
            };
        }
        Ok(TarSource { marked_end: archive.marked_end, file, places })
    }

    pub fn has(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// The first name, by the alphabet, of a file in the topmost directory that ends so.
    pub fn first(&self, end: &str) -> Option<&str> {
        self.places.keys().filter(|name| name.ends_with(end) && !name.contains('/')).map(String::as_str).min()
    }

    /// The whole archive again, from its beginning.
    pub fn into_file(self) -> impl Read {
        let end = self.file.metadata().map(|m| m.len()).unwrap_or(0);
        Piece { file: self.file, position: 0, end }
    }
}

impl Source for TarSource {
    fn open(&self, name: &str) -> Result<Option<(Box<dyn Read + '_>, u64)>> {
        let mut name = name;
        for _ in 0..LINKS {
            match self.places.get(name) {
                None => return Ok(None),
                Some(Place::Link(target)) => name = target,
                Some(Place::File { offset, size }) => {
                    let piece = Piece { file: self.file.clone(), position: *offset, end: offset + size };
                    return Ok(Some((Box::new(piece), *size)));
                }
            }
        }
        Ok(None)
    }
}

/// Resolves a link's target within the archive, by words alone.
fn beside(base: &str, link: &str) -> Option<String> {
    let mut parts: Vec<&str> = base.split('/').collect();
    parts.pop();
    for part in link.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// Part of a file, read by position so that several can be read at once.
struct Piece {
    file: Arc<File>,
    position: u64,
    end: u64,
}

impl Read for Piece {
    fn read(&mut self, buffer: &mut [u8]) -> stdio::Result<usize> {
        let want = (self.end.saturating_sub(self.position)).min(buffer.len() as u64) as usize;
        if want == 0 {
            return Ok(0);
        }
        let n = self.file.read_at(buffer.get_mut(..want).unwrap_or_default(), self.position)?;
        if n == 0 {
            return Err(stdio::Error::new(stdio::ErrorKind::UnexpectedEof, "the archive became shorter"));
        }
        self.position += n as u64;
        Ok(n)
    }
}

/// `manifest.json` of `docker save`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

impl Store {
    pub(crate) fn import_docker(
        &self,
        source: &TarSource,
        path: &Path,
        options: &ImportOptions,
        progress: ProgressFn,
    ) -> Result<Imported> {
        let what = path.display().to_string();
        let bad = |why: String| Error::invalid(what.clone(), why);
        let bytes = source.read("manifest.json", 4 << 20)?.ok_or_else(|| bad("it has no manifest.json".into()))?;
        let images: Vec<DockerImage> =
            serde_json::from_slice(&bytes).map_err(|e| bad(format!("its manifest.json: {e}")))?;
        if images.len() > 1 && options.tag.is_some() {
            return Err(bad(format!(
                "it has {} images; one --tag cannot name them all, import it without",
                images.len()
            )));
        }
        let mut last = None;
        for image in &images {
            let imported = self.import_docker_image(source, path, image, options, progress)?;
            let merged = match last.take() {
                Some(Imported { mut names, .. }) => {
                    names.extend(imported.names);
                    Imported { names, ..imported }
                }
                None => imported,
            };
            last = Some(merged);
        }
        last.ok_or_else(|| bad("its manifest.json lists no image".into()))
    }

    fn import_docker_image(
        &self,
        source: &TarSource,
        path: &Path,
        image: &DockerImage,
        options: &ImportOptions,
        progress: ProgressFn,
    ) -> Result<Imported> {
        let what = path.display().to_string();
        let missing = |name: &str| {
            Error::invalid(what.clone(), format!("{name:?} is named in it but is not there; it was truncated"))
        };
        let bytes = source.read(&image.config, self.limits().config_bytes)?.ok_or_else(|| missing(&image.config))?;
        let config: ImageConfig =
            serde_json::from_slice(&bytes).map_err(|e| Error::invalid(format!("{what}: {}", image.config), e))?;
        let wanted = options.wanted();
        if !config.platform().satisfies(&wanted) {
            return Err(Error::Platform {
                reference: image.repo_tags.iter().flatten().next().cloned().unwrap_or(what),
                wanted: wanted.to_string(),
                available: config.platform().to_string(),
            });
        }
        let diff_ids = &config.rootfs.diff_ids;
        if diff_ids.len() != image.layers.len() || diff_ids.len() > self.limits().layers {
            return Err(Error::invalid(what, format!("{} layers for {} diff ids", image.layers.len(), diff_ids.len())));
        }
        let mut layers = Vec::new();
        for (number, (name, diff_id)) in image.layers.iter().zip(diff_ids).enumerate() {
            let label = format!("layer {} of {}", number + 1, image.layers.len());
            let (mut reader, size) = source.open(name)?.ok_or_else(|| missing(name))?;
            let mut head = [0u8; 6];
            let n = fill(&mut reader, &mut head).map_err(io("read", &label))?;
            let head = head.get(..n).unwrap_or_default();
            let compression = Compression::detect(head).map_err(|why| Error::invalid(label.clone(), why))?;
            let whole = head.chain(reader);
            let layer = match compression {
                Compression::None => self.compress_layer(&label, whole, progress)?,
                other => {
                    let (digest, size) = self.blob_copy(&label, whole, None, |done| {
                        progress(Progress::Bytes { what: label.clone(), done, total: Some(size) });
                    })?;
                    let kind = if other == Compression::Gzip { media::OCI_LAYER_GZIP } else { media::OCI_LAYER_ZSTD };
                    crate::spec::Descriptor::new(kind, digest, size)
                }
            };
            progress(Progress::Step(format!("unpacking {label}")));
            self.ensure_layer(diff_id, &layer.digest)?;
            layers.push(layer);
        }
        let mut said = Vec::new();
        for tag in image.repo_tags.iter().flatten() {
            said.push(Reference::parse(tag, self.local_hosts())?);
        }
        let names = self.names_for(options, path, said)?;
        self.store_manifest(&names, media::OCI_CONFIG, None, &bytes, layers)
    }
}

fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> stdio::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|r| !r.is_empty()) {
        match reader.read(rest)? {
            0 => break,
            n => done += n,
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::beside;

    #[test]
    fn links_stay_in_the_archive() {
        assert_eq!(beside("abc/layer.tar", "../def/layer.tar").as_deref(), Some("def/layer.tar"));
        assert_eq!(beside("a", "../../etc/passwd"), None);
    }
}
