//! The cloud-init NoCloud seed: a small ISO 9660 image labelled `cidata` with `meta-data`, `user-data` and
//! `network-config` (<https://cloudinit.readthedocs.io/en/latest/reference/datasources/nocloud.html>). Long names are
//! carried by a Joliet tree (ECMA-119 plus the Joliet specification, UCS-2 level 3).

const SECTOR: usize = 2048;
/// cloud-init refuses user data beyond this.
pub const MAX_FILE: usize = 16 << 20;

/// An image with these files in its root. Names: at most 64 characters, ASCII without `/`.
pub fn iso9660(label: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
    // 0-15 system area, 16 primary descriptor, 17 Joliet descriptor, 18 terminator, 19-22 path tables, 23 root directory,
    // 24 Joliet root directory, 25.. file contents.
    let mut next = 25u32;
    let placed: Vec<(String, &str, u32, &[u8])> = files
        .iter()
        .enumerate()
        .map(|(index, (name, bytes))| {
            let at = next;
            next += (bytes.len().div_ceil(SECTOR) as u32).max(1);
            (format!("FILE{index}.;1"), *name, at, *bytes)
        })
        .collect();
    let mut image = vec![0u8; next as usize * SECTOR];
    let mut put = |sector: u32, bytes: &[u8]| {
        let at = sector as usize * SECTOR;
        image[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(16, &descriptor(1, label, 23, 19, next, false));
    put(17, &descriptor(2, label, 24, 21, next, true));
    put(18, &[&[255u8][..], b"CD001\x01"].concat());
    put(19, &path_table(23, false));
    put(20, &path_table(23, true));
    put(21, &path_table(24, false));
    put(22, &path_table(24, true));
    let plain: Vec<_> =
        placed.iter().map(|(short, _, at, data)| (short.clone().into_bytes(), *at, data.len())).collect();
    put(23, &directory(23, &plain));
    let joliet: Vec<_> = placed.iter().map(|(_, name, at, data)| (ucs2(name), *at, data.len())).collect();
    put(24, &directory(24, &joliet));
    for (_, _, at, bytes) in &placed {
        put(*at, bytes);
    }
    image
}

fn ucs2(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_be_bytes).collect()
}

/// A number in both byte orders, as ECMA-119 7.3.3 wants it.
fn both32(value: u32) -> [u8; 8] {
    let mut out = [0; 8];
    out[..4].copy_from_slice(&value.to_le_bytes());
    out[4..].copy_from_slice(&value.to_be_bytes());
    out
}

fn both16(value: u16) -> [u8; 4] {
    let mut out = [0; 4];
    out[..2].copy_from_slice(&value.to_le_bytes());
    out[2..].copy_from_slice(&value.to_be_bytes());
    out
}

fn descriptor(kind: u8, label: &str, root: u32, table: u32, sectors: u32, joliet: bool) -> Vec<u8> {
    let mut d = vec![0u8; SECTOR];
    d[0] = kind;
    d[1..7].copy_from_slice(b"CD001\x01");
    let text = |d: &mut [u8], at: usize, len: usize, value: &str| {
        let bytes = if joliet { ucs2(value) } else { value.as_bytes().to_vec() };
        let pad: &[u8] = if joliet { &[0, b' '] } else { b" " };
        let filled: Vec<u8> = bytes.iter().copied().chain(pad.iter().copied().cycle()).take(len).collect();
        d[at..at + len].copy_from_slice(&filled);
    };
    text(&mut d, 8, 32, "");
    text(&mut d, 40, 32, label);
    d[80..88].copy_from_slice(&both32(sectors));
    if joliet {
        d[88..91].copy_from_slice(b"%/E");
    }
    d[120..124].copy_from_slice(&both16(1));
    d[124..128].copy_from_slice(&both16(1));
    d[128..132].copy_from_slice(&both16(SECTOR as u16));
    d[132..140].copy_from_slice(&both32(10));
    d[140..144].copy_from_slice(&table.to_le_bytes());
    d[148..152].copy_from_slice(&(table + 1).to_be_bytes());
    d[156..190].copy_from_slice(&record(&[0], root, SECTOR, true));
    for at in [190, 318, 446, 574] {
        text(&mut d, at, 128, "");
    }
    for at in [702, 739, 776] {
        text(&mut d, at, 37, "");
    }
    for at in [813, 830, 847, 864] {
        d[at..at + 16].copy_from_slice(b"0000000000000000");
    }
    d[881] = 1;
    d
}

fn path_table(root: u32, big_endian: bool) -> Vec<u8> {
    let (at, parent) =
        if big_endian { (root.to_be_bytes(), 1u16.to_be_bytes()) } else { (root.to_le_bytes(), 1u16.to_le_bytes()) };
    [&[1u8, 0][..], &at, &parent, &[0, 0]].concat()
}

fn directory(own: u32, entries: &[(Vec<u8>, u32, usize)]) -> Vec<u8> {
    let mut sorted: Vec<_> = entries.iter().collect();
    sorted.sort();
    let mut out = record(&[0], own, SECTOR, true);
    out.extend(record(&[1], own, SECTOR, true));
    for (name, at, len) in sorted {
        out.extend(record(name, *at, *len, false));
    }
    out
}

fn record(name: &[u8], at: u32, len: usize, directory: bool) -> Vec<u8> {
    let pad = usize::from(name.len().is_multiple_of(2));
    let mut r = vec![0u8; 33 + name.len() + pad];
    r[0] = r.len() as u8;
    r[2..10].copy_from_slice(&both32(at));
    r[10..18].copy_from_slice(&both32(len as u32));
    r[18..25].copy_from_slice(&[126, 1, 1, 0, 0, 0, 0]); // 2026-01-01, fixed: same input, same image
    r[25] = if directory { 2 } else { 0 };
    r[28..32].copy_from_slice(&both16(1));
    r[32] = name.len() as u8;
    r[33..33 + name.len()].copy_from_slice(name);
    r
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_mounts_it_and_reads_the_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed.iso");
        let big = vec![b'x'; 5000];
        let image =
            iso9660("cidata", &[("meta-data", b"instance-id: a\n"), ("user-data", &big), ("network-config", b"")]);
        std::fs::write(&path, image).unwrap();
        let target = dir.path().join("m");
        std::fs::create_dir(&target).unwrap();
        let mounted = std::process::Command::new("mount").args(["-o", "loop,ro"]).arg(&path).arg(&target).output();
        if !mounted.as_ref().is_ok_and(|o| o.status.success()) {
            println!("SKIPPED: cannot mount a loop device here: {mounted:?}");
            return;
        }
        let read = |name: &str| std::fs::read(target.join(name));
        let (meta, user, network) = (read("meta-data"), read("user-data"), read("network-config"));
        let label =
            std::process::Command::new("blkid").args(["-o", "value", "-s", "LABEL"]).arg(&path).output().unwrap();
        assert!(std::process::Command::new("umount").arg(&target).status().unwrap().success());
        assert_eq!(meta.unwrap(), b"instance-id: a\n");
        assert_eq!(user.unwrap(), big);
        assert_eq!(network.unwrap(), b"");
        assert_eq!(String::from_utf8_lossy(&label.stdout).trim(), "cidata");
    }
}
