//! Where everything comes to lie, decided before a byte is written.

use super::format::{BLOCK, FLAT_INLINE, FLAT_PLAIN, INODE, META, SLOT, directory_block};
use super::merge::{Directory, Kind, Tree};
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// Of one node.
#[derive(Clone, Copy, Default)]
pub(super) struct Place {
    /// Byte at which its inode begins; zero until it has one.
    pub offset: u64,
    /// Bytes of its content.
    pub size: u64,
    /// First of its blocks; counted from the first of any content until all inodes have their places.
    pub start: u64,
    /// How many blocks; what is beyond them follows the inode.
    pub blocks: u64,
}

impl Place {
    pub fn layout(&self) -> u16 {
        if self.blocks * BLOCK < self.size { FLAT_INLINE } else { FLAT_PLAIN }
    }
}

pub(super) struct Layout {
    /// Of each of the tree's nodes.
    pub places: Vec<Place>,
    /// Of the whole file system.
    pub blocks: u64,
}

impl Layout {
    pub fn of(what: &str, tree: &Tree, most: u64) -> Result<Layout> {
        let mut space = Space { free: BTreeMap::new(), end: BLOCK };
        space.give(META, BLOCK - META);
        let mut places = vec![Place::default(); tree.nodes.len()];
        let mut next = 0;
        // The root first: its number has but 16 bits. Then the entries of each directory side by side.
        let entries = tree.directories.iter().flat_map(|d| d.entries.iter().map(|(_, node)| *node));
        for index in std::iter::once(0).chain(entries) {
            let (Some(node), Some(place)) = (tree.nodes.get(index), places.get_mut(index)) else { continue };
            if place.offset != 0 {
                continue;
            }
            let size = match &node.kind {
                Kind::Directory(index) => tree.directories.get(*index).map_or(0, size),
                Kind::File { size, .. } => *size,
                Kind::Symlink(target) => target.len() as u64,
                Kind::Special(_) => 0,
            };
            let tail = size % BLOCK;
            let head = INODE + node.xattrs.len() as u64;
            let inline = head + tail <= BLOCK;
            let blocks = if inline { size / BLOCK } else { size.div_ceil(BLOCK) };
            *place = Place { offset: space.take(if inline { head + tail } else { head }), size, start: next, blocks };
            next = next.saturating_add(blocks);
        }
        let first = space.end / BLOCK;
        let blocks = first.saturating_add(next);
        // Block numbers have 32 bits, and the last of them means none.
        if blocks > most / BLOCK || blocks >= u64::from(u32::MAX) {
            let limit = most.min(u64::from(u32::MAX) * BLOCK);
            return Err(Error::TooLarge { what: format!("file system of image {what:?}"), limit });
        }
        places.iter_mut().for_each(|place| place.start += first);
        Ok(Layout { places, blocks })
    }
}

fn size(directory: &Directory) -> u64 {
    let (mut rest, mut size) = (directory.entries.as_slice(), 0);
    loop {
        let (count, bytes) = directory_block(rest.iter().map(|(name, _)| &**name));
        match rest.get(count..) {
            Some(more) if !more.is_empty() && count > 0 => (rest, size) = (more, size + BLOCK),
            _ => return size + bytes as u64,
        }
    }
}

/// Blocks of inodes, and what is free in them.
struct Space {
    /// By how many bytes are free, at what offsets.
    free: BTreeMap<u64, Vec<u64>>,
    end: u64,
}

impl Space {
    /// Bytes that are in one block if they fit in one, wherever the least is wasted.
    fn take(&mut self, bytes: u64) -> u64 {
        let bytes = bytes.next_multiple_of(SLOT);
        if let Some((&free, offsets)) = self.free.range_mut(bytes..).next()
            && let Some(offset) = offsets.pop()
        {
            if offsets.is_empty() {
                self.free.remove(&free);
            }
            self.give(offset + bytes, free - bytes);
            return offset;
        }
        let offset = self.end;
        self.end += bytes.next_multiple_of(BLOCK);
        self.give(offset + bytes, self.end - offset - bytes);
        offset
    }

    fn give(&mut self, offset: u64, bytes: u64) {
        if bytes >= INODE {
            self.free.entry(bytes).or_default().push(offset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_taken_overlaps_nothing_and_crosses_no_block(sizes in prop::collection::vec(1u64..9000, 0..200)) {
            let mut space = Space { free: BTreeMap::new(), end: BLOCK };
            space.give(META, BLOCK - META);
            let mut taken: Vec<(u64, u64)> = sizes.iter().map(|s| (space.take(*s), *s)).collect();
            for (offset, size) in &taken {
                prop_assert!(offset % SLOT == 0 && offset + size <= space.end && *offset >= META);
                prop_assert!(*size > BLOCK || offset / BLOCK == (offset + size - 1) / BLOCK);
            }
            taken.sort_unstable();
            prop_assert!(taken.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
        }
    }
}
