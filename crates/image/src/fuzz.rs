//! What `fuzz/` gives foreign bytes to: the parsers of this crate, and no more of it than they need. Not an interface.

use crate::build::fuzz as build;
use crate::jailed::Input;
use crate::spec::{Document, ImageConfig, Platform};
use crate::store::{Limits, make_dir, open_dir};
use crate::tar::Archive;
use crate::unpack::tree::Tree;
use crate::unpack::{Compression, guarded};
use crate::{Digest, Reference, Repository, Selector};
use std::path::Path;

/// Manifests, indexes, configurations, as JSON.
pub fn documents(bytes: &[u8]) {
    for said in [None, Some(crate::media::OCI_MANIFEST), Some(crate::media::OCI_INDEX), Some(crate::media::DOCKER_LIST)]
    {
        if let Ok((document, kind)) = Document::parse(said, bytes) {
            let _ = document.subject();
            if let Document::Index(index) = &document {
                let _ = crate::lookup::choose("x", &index.manifests, &Platform::host());
            }
            assert!(Document::parse(Some(&kind), bytes).is_ok(), "what was read once is read again");
        }
    }
    if let Ok(config) = serde_json::from_slice::<ImageConfig>(bytes) {
        let _ = config.platform().satisfies(&Platform::host());
    }
}

/// References, digests, selectors, platforms, repository names.
pub fn names(text: &str) {
    if let Ok(reference) = Reference::parse(text, &["127.0.0.1:5000".to_owned()]) {
        let again = Reference::parse(&reference.to_string(), &["127.0.0.1:5000".to_owned()]);
        assert!(again.is_ok_and(|again| again.selector() == reference.selector()));
        assert!(reference.repository.path.split('/').all(|p| !matches!(p, "" | "." | "..") && !p.starts_with('_')));
    }
    let _ = (Selector::parse(text), Repository::local(text), Platform::parse(text));
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
    }
}

/// A layer, compressed or not, unpacked into a fresh directory beneath `scratch`.
pub fn layer(bytes: &[u8], scratch: &Path) {
    let limits = Limits { layer_bytes: 4 << 20, layer_entries: 200, ratio_floor: 1 << 20, ..Limits::default() };
    let Ok(compression) = Compression::detect(bytes.get(..6).unwrap_or(bytes)) else { return };
    let source = Input::Stream(Box::new(std::io::Cursor::new(bytes.to_vec())));
    let Ok(guard) = guarded(source, compression, &limits, None) else { return };
    let root = scratch.join("fs");
    let _ = std::fs::remove_dir_all(&root);
    let Ok(directory) = make_dir(&root, 0o755).and_then(|()| open_dir(&root)) else { return };
    let mut archive = Archive::new(guard);
    if let Ok(opaque) = Tree::new(directory, "x").fill(&mut archive, limits.layer_entries) {
        assert!(opaque.iter().all(|path| !path.starts_with(b"/") && path.split(|b| *b == b'/').all(|p| p != b"..")));
    }
}

/// One file system of layers, the lowest first.
pub fn erofs(layers: &[std::path::PathBuf], to: &Path, limits: &Limits) -> crate::Result<()> {
    crate::erofs::for_tests(layers, to, limits)
}

/// A disk as another hypervisor keeps it.
pub fn foreign(bytes: &[u8], scratch: &Path) {
    crate::foreign::fuzz(bytes, scratch);
}

/// The description and the checksums of an OVA.
pub fn ova(bytes: &[u8]) {
    crate::ova::fuzz(bytes);
}

/// A disk's header, a component's header.
pub fn heads(bytes: &[u8], scratch: &Path) {
    let path = scratch.join("head");
    let _ = crate::disk::check_qcow2(bytes.get(..104).unwrap_or(bytes));
    if std::fs::write(&path, bytes).is_err() {
        return;
    }
    if let Ok(disk) = crate::disk::DiskImage::probe(&path) {
        assert!(disk.virtual_size.is_multiple_of(512));
    }
    if let Ok(file) = std::fs::File::open(&path) {
        let _ = crate::resolve::check_component(&file, &path);
    }
}

/// A Containerfile and its words, a .dockerignore.
pub fn containerfile(text: &str) {
    build::containerfile(text);
}

/// Archives as Lambda's packages are.
pub fn zip(bytes: &[u8]) {
    let Ok(zip) = crate::zip::Zip::read(bytes) else { return };
    for entry in &zip.entries {
        assert!(!entry.name.split('/').any(|part| matches!(part, "" | "." | "..")), "it stays where it is unpacked");
        let mut content = Vec::new();
        let _ = zip.copy(entry, &mut content);
    }
}
