//! From what a user wrote to a manifest: by name, by digest, by the beginning of an id.

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::reference::{Reference, Repository, Selector};
use crate::refs::Record;
use crate::spec::{Descriptor, Document, Platform};
use crate::store::Store;
use std::collections::BTreeMap;

/// Shortest beginning of an id that is looked for.
const ID_PREFIX: usize = 4;

/// A name that was found.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub repository: Repository,
    /// The tag it was found by.
    pub tag: Option<String>,
    pub record: Record,
}

impl Found {
    pub fn name(&self) -> String {
        match &self.tag {
            Some(tag) => format!("{}:{tag}", self.repository),
            None => format!("{}@{}", self.repository, self.record.digest),
        }
    }
}

impl Store {
    /// Finds the manifest or index that a user's words mean.
    pub(crate) fn find(&self, text: &str) -> Result<Found> {
        let parsed = Reference::parse(text, self.local_hosts());
        if let Ok(reference) = &parsed {
            for candidate in candidates(reference) {
                if let Some(found) = self.find_reference(&candidate)? {
                    return Ok(found);
                }
            }
        }
        if let Some(found) = self.find_id(text)? {
            return Ok(found);
        }
        // What cannot be a name is told so, unless it could have been an id.
        match parsed {
            Err(error) if id_prefix(text).is_none() => Err(error),
            _ => Err(Error::NotFound(text.chars().take(300).collect())),
        }
    }

    fn find_reference(&self, reference: &Reference) -> Result<Option<Found>> {
        let selector = reference.selector();
        let Some(record) = self.record_get(&reference.repository, &selector)? else { return Ok(None) };
        let tag = match selector {
            Selector::Tag(tag) => Some(tag),
            Selector::Digest(_) => None,
        };
        Ok(Some(Found { repository: reference.repository.clone(), tag, record }))
    }

    /// By the digest of manifest or configuration, or its first digits.
    fn find_id(&self, text: &str) -> Result<Option<Found>> {
        let Some(prefix) = id_prefix(text) else { return Ok(None) };
        let mut matches: BTreeMap<Digest, Found> = BTreeMap::new();
        for repository in self.all_repositories()? {
            let tags = self.tag_records(&repository)?;
            for record in self.manifest_records(&repository)? {
                let mut ids = vec![record.digest];
                if let Ok((Document::Manifest(manifest), _)) = self.document(&record.digest, Some(&record.media_type)) {
                    ids.push(manifest.config.digest);
                }
                if ids.iter().any(|id| id.hex().starts_with(prefix)) {
                    let tag = tags.iter().find(|(_, r)| r.digest == record.digest).map(|(t, _)| t.clone());
                    let found = Found { repository: repository.clone(), tag, record };
                    matches.entry(found.record.digest).or_insert(found);
                }
            }
        }
        if matches.len() > 1 {
            let shown: Vec<String> = matches.keys().take(5).map(|d| d.hex().chars().take(16).collect()).collect();
            return Err(Error::Ambiguous { prefix: prefix.to_owned(), matches: shown.join(", ") });
        }
        Ok(matches.into_values().next())
    }

    /// The manifest for a platform: itself, or an index's child that is here.
    pub(crate) fn manifest_for(&self, found: &Found, wanted: &Platform) -> Result<(Digest, crate::spec::Manifest)> {
        match self.document(&found.record.digest, Some(&found.record.media_type))?.0 {
            Document::Manifest(manifest) => Ok((found.record.digest, manifest)),
            Document::Index(index) => {
                let child = choose(&found.name(), &index.manifests, wanted)?;
                match self.document(&child.digest, Some(&child.media_type)) {
                    Ok((Document::Manifest(manifest), _)) => Ok((child.digest, manifest)),
                    Ok((Document::Index(_), _)) => Err(Error::invalid(found.name(), "an index within an index")),
                    Err(Error::BlobUnknown(_)) => Err(Error::Platform {
                        reference: found.name(),
                        wanted: wanted.to_string(),
                        available: self.present(&index.manifests),
                    }),
                    Err(e) => Err(e),
                }
            }
        }
    }

    fn present(&self, children: &[Descriptor]) -> String {
        let here = children.iter().filter(|c| self.blob_path(&c.digest).exists());
        platforms(here.collect::<Vec<_>>().into_iter())
    }
}

/// Chooses the child of an index for a platform. WebAssembly runs on any machine.
pub(crate) fn choose<'a>(reference: &str, children: &'a [Descriptor], wanted: &Platform) -> Result<&'a Descriptor> {
    let real = || children.iter().filter(|c| !c.is_attestation());
    let exact = real().find(|c| c.platform.as_ref().is_some_and(|p| p.satisfies(wanted)));
    let wasm = || real().find(|c| c.platform.as_ref().is_some_and(|p| p.architecture == "wasm"));
    let only = || if children.len() == 1 { children.first().filter(|c| c.platform.is_none()) } else { None };
    exact.or_else(wasm).or_else(only).ok_or_else(|| Error::Platform {
        reference: reference.to_owned(),
        wanted: wanted.to_string(),
        available: platforms(real()),
    })
}

fn platforms<'a>(children: impl Iterator<Item = &'a Descriptor>) -> String {
    let mut names: Vec<String> = children.filter_map(|c| c.platform.as_ref()).map(Platform::to_string).collect();
    names.sort();
    names.dedup();
    if names.is_empty() { "no platform it names".to_owned() } else { names.join(", ") }
}

/// A name without a host may be this store's own or, if pulled so, Docker Hub's. One with a host that is not known may
/// be a repository of this store whose name only looks like it.
fn candidates(reference: &Reference) -> Vec<Reference> {
    let mut all = vec![reference.clone()];
    match &reference.repository.host {
        None => all.push(reference.on_docker_hub()),
        Some(host) => {
            let path = format!("{host}/{}", reference.repository.path);
            if let Ok(repository) = Repository::local(&path) {
                all.push(Reference { repository, ..reference.clone() });
            }
        }
    }
    all
}

fn id_prefix(text: &str) -> Option<&str> {
    let digits = text.strip_prefix("sha256:").unwrap_or(text);
    let hex = digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    (hex && (ID_PREFIX..=64).contains(&digits.len())).then_some(digits)
}
