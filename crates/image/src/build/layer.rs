//! Writing a layer: entries in, a gzip blob with its digest and diff id out. The same entries make the same bytes.

use super::view::Xattrs;
use crate::blob::BlobWriter;
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result, io};
use crate::spec::{Descriptor, media};
use crate::store::{Limits, Store};
use flate2::write::GzEncoder;
use std::io::{Read, Write};

const BLOCK: usize = 512;
/// The largest id that a tar header has room for.
const HEADER_ID: u32 = 0o7_777_777;
const HEADER_SIZE: u64 = 1 << 33;

/// One entry of a layer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Item {
    /// Relative, no slash at its end.
    pub path: Vec<u8>,
    /// A tar type flag: `0` file, `1` hard link, `2` symbolic link, `5` directory, `6` fifo.
    pub kind: u8,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Unix seconds: fractions would differ between machines that copy files.
    pub mtime: i64,
    pub size: u64,
    pub link: Vec<u8>,
    pub xattrs: Xattrs,
}

pub(crate) struct LayerWriter<'a> {
    encoder: GzEncoder<BlobWriter<'a>>,
    diff: Hasher,
    limits: Limits,
    entries: u64,
    /// Times after this become this.
    latest: Option<i64>,
}

impl Store {
    pub(crate) fn layer_writer(&self, latest: Option<i64>) -> Result<LayerWriter<'_>> {
        Ok(LayerWriter {
            encoder: GzEncoder::new(self.blob_writer()?, flate2::Compression::fast()),
            diff: Hasher::default(),
            limits: self.limits().clone(),
            entries: 0,
            latest,
        })
    }
}

impl LayerWriter<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.diff.update(bytes);
        if self.diff.length() > self.limits.layer_bytes {
            return Err(Error::TooLarge { what: "layer".into(), limit: self.limits.layer_bytes });
        }
        self.encoder.write_all(bytes).map_err(io("write", "layer"))
    }

    fn pad(&mut self, length: u64) -> Result<()> {
        let padding = (length.next_multiple_of(BLOCK as u64) - length) as usize;
        self.put([0u8; BLOCK].get(..padding).unwrap_or_default())
    }

    pub fn add(&mut self, item: &Item, mut content: impl Read) -> Result<()> {
        self.entries += 1;
        if self.entries > self.limits.layer_entries {
            return Err(Error::invalid("layer", format!("more than {} entries", self.limits.layer_entries)));
        }
        let mtime = self.latest.map_or(item.mtime, |latest| item.mtime.min(latest)).max(0);
        let extended = extended(item);
        if !extended.is_empty() {
            let size = extended.len() as u64;
            self.put(&header(b"pax", b'x', 0o644, (0, 0), mtime, size, b""))?;
            self.put(&extended)?;
            self.pad(size)?;
        }
        let mut path = item.path.clone();
        if item.kind == b'5' {
            path.push(b'/');
        }
        self.put(&header(&path, item.kind, item.mode, (item.uid, item.gid), mtime, item.size, &item.link))?;
        let mut left = item.size;
        let mut buffer = vec![0u8; 128 << 10];
        while left > 0 {
            let want = left.min(buffer.len() as u64) as usize;
            let name = || String::from_utf8_lossy(&item.path).into_owned();
            let n = content.read(buffer.get_mut(..want).unwrap_or_default()).map_err(io("read", name()))?;
            if n == 0 {
                return Err(Error::invalid(name(), "it became shorter while it was copied"));
            }
            self.put(buffer.get(..n).unwrap_or_default())?;
            left -= n as u64;
        }
        self.pad(item.size)
    }

    /// Descriptor of the blob and the layer's diff id.
    pub fn finish(mut self) -> Result<(Descriptor, Digest)> {
        self.put(&[0u8; 2 * BLOCK])?;
        let writer = self.encoder.finish().map_err(io("write", "layer"))?;
        let (digest, size) = writer.commit(None)?;
        Ok((Descriptor::new(media::OCI_LAYER_GZIP, digest, size), self.diff.finish()))
    }
}

/// What does not fit the header, as pax records.
fn extended(item: &Item) -> Vec<u8> {
    let mut records = Vec::new();
    let mut record = |key: &[u8], value: &[u8]| {
        let base = key.len() + value.len() + 3;
        let mut length = base + 1;
        while base + length.to_string().len() != length {
            length = base + length.to_string().len();
        }
        records.extend([length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat());
    };
    if item.path.len() + usize::from(item.kind == b'5') > 100 {
        let slash: &[u8] = if item.kind == b'5' { b"/" } else { b"" };
        record(b"path", &[&item.path, slash].concat());
    }
    if item.link.len() > 100 {
        record(b"linkpath", &item.link);
    }
    if item.size >= HEADER_SIZE {
        record(b"size", item.size.to_string().as_bytes());
    }
    for (key, id) in [(&b"uid"[..], item.uid), (b"gid", item.gid)] {
        if id > HEADER_ID {
            record(key, id.to_string().as_bytes());
        }
    }
    for (name, value) in &item.xattrs {
        record(&[b"SCHILY.xattr.", name.as_slice()].concat(), value);
    }
    records
}

fn header(path: &[u8], kind: u8, mode: u32, ids: (u32, u32), mtime: i64, size: u64, link: &[u8]) -> [u8; BLOCK] {
    let mut block = [0u8; BLOCK];
    let mut put = |at: usize, bytes: &[u8], room: usize| {
        let bytes = bytes.get(..room.min(bytes.len())).unwrap_or_default();
        if let Some(place) = block.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(0, path, 100);
    put(100, format!("{:07o}", mode & 0o7777).as_bytes(), 8);
    put(108, format!("{:07o}", ids.0.min(HEADER_ID)).as_bytes(), 8);
    put(116, format!("{:07o}", ids.1.min(HEADER_ID)).as_bytes(), 8);
    put(124, format!("{:011o}", size.min(HEADER_SIZE - 1)).as_bytes(), 12);
    put(136, format!("{:011o}", mtime.min(HEADER_SIZE as i64 - 1)).as_bytes(), 12);
    put(148, b"        ", 8);
    put(156, &[kind], 1);
    put(157, link, 100);
    put(257, b"ustar\x0000", 8);
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    if let Some(place) = block.get_mut(148..156) {
        place.copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tar::Archive;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_reader_reads_what_was_written(
            path in "[a-z]{1,30}(/[a-zé]{1,60}){0,5}",
            link in "[a-z/]{1,150}",
            ids in any::<(u32, u32)>(),
            mode in 0u32..0o10000,
            content in proptest::collection::vec(any::<u8>(), 0..2000),
            value in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(dir.path()).unwrap();
            let mut writer = store.layer_writer(Some(5)).unwrap();
            let common = Item { path: path.clone().into_bytes(), mode, uid: ids.0, gid: ids.1, mtime: 9, ..Item::default() };
            let file = Item { kind: b'0', size: content.len() as u64, xattrs: vec![(b"user.x".to_vec(), value.clone())], ..common.clone() };
            let symlink = Item { kind: b'2', link: link.clone().into_bytes(), ..common.clone() };
            writer.add(&file, &content[..]).unwrap();
            writer.add(&symlink, &[][..]).unwrap();
            writer.add(&Item { kind: b'5', ..common }, &[][..]).unwrap();
            let (layer, diff_id) = writer.finish().unwrap();
            let mut bytes = Vec::new();
            let blob = store.blob_open(&layer.digest).unwrap().unwrap();
            flate2::read::GzDecoder::new(blob.file).read_to_end(&mut bytes).unwrap();
            prop_assert_eq!(Digest::of(&bytes), diff_id);
            let mut archive = Archive::new(&bytes[..]);
            let read = archive.next().unwrap().unwrap();
            prop_assert_eq!((&read.path, read.uid, read.gid, read.mode), (&file.path, u64::from(ids.0), u64::from(ids.1), mode));
            prop_assert_eq!((read.mtime, &read.xattrs), ((5, 0), &file.xattrs));
            let mut found = Vec::new();
            archive.read_to_end(&mut found).unwrap();
            prop_assert_eq!(found, content);
            prop_assert_eq!(archive.next().unwrap().unwrap().link, symlink.link);
            prop_assert_eq!(archive.next().unwrap().unwrap().path, path.into_bytes());
            prop_assert!(archive.next().unwrap().is_none() && archive.marked_end);
        }
    }
}
