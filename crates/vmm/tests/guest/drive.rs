//! Drives every device there is, as a good driver would.

use crate::virtio::{Device, NEXT, WRITE};
use crate::{copy, fill, is, is_all, read8, read16, read32, report, write8, write16, write32};

pub fn all(line: u64) {
    let has = |word: &[u8]| (0..64).any(|at| is(line + at, word));
    disks();
    entropy();
    balloon();
    console();
    processors();
    if has(b"net") {
        network();
    }
    if has(b"vsock") {
        vsock();
    }
}

/// A request of the block device: its status.
fn request(disk: &mut Device, kind: u32, sector: u64, length: u32, device_writes: bool) -> Option<u8> {
    let (header, data, status) = (disk.buffer(0), disk.buffer(0) + 0x1000, disk.buffer(0) + 0x800);
    write32(header, kind);
    write32(header + 4, 0);
    crate::write64(header + 8, sector);
    write8(status, 0xee);
    disk.descriptor(0, 0, header, 16, NEXT, if length == 0 { 2 } else { 1 });
    disk.descriptor(0, 1, data, length, NEXT | if device_writes { WRITE } else { 0 }, 2);
    disk.descriptor(0, 2, status, 1, WRITE, 0);
    disk.offer(0, 0);
    disk.wait(0)?;
    Some(read8(status))
}

/// Where the sector's bytes are, if it can be read.
pub fn sector(disk: &mut Device, kind: u32, sector: u64) -> Option<u64> {
    fill(disk.buffer(0) + 0x1000, 0x55, 512);
    (request(disk, kind, sector, 512, true) == Some(0)).then(|| disk.buffer(0) + 0x1000)
}

pub fn store(disk: &mut Device, sector: u64, bytes: &[u8]) -> bool {
    let data = disk.buffer(0) + 0x1000;
    fill(data, 0, 512);
    copy(data, bytes);
    request(disk, 1, sector, 512, false) == Some(0)
}

fn range(disk: &mut Device, kind: u32, sector: u64, sectors: u32, flags: u32) -> Option<u8> {
    let data = disk.buffer(0) + 0x1000;
    crate::write64(data, sector);
    write32(data + 8, sectors);
    write32(data + 12, flags);
    request(disk, kind, 0, 16, false)
}

fn disks() {
    let Some(mut disk) = Device::find(2, 0) else { return report("disk found", false) };
    report("disk begins", disk.begin(0));
    let first = sector(&mut disk, 0, 0);
    report("disk read", first.is_some_and(|at| is(at, b"atoll test disk")));
    report("disk write", store(&mut disk, 5, b"written by the guest"));
    report("disk flush", request(&mut disk, 4, 0, 0, false) == Some(0));
    report("disk read back", sector(&mut disk, 0, 5).is_some_and(|at| is(at, b"written by the guest")));
    report("disk write zeroes", range(&mut disk, 13, 6, 2, 0) == Some(0));
    report("disk zeroed", sector(&mut disk, 0, 7).is_some_and(|at| is_all(at, 0, 512)));
    report("disk discard", range(&mut disk, 11, 8, 8, 0) == Some(0));
    let capacity = u64::from(read32(disk.base + 0x100));
    report("disk end refused", request(&mut disk, 0, capacity, 512, true) == Some(1));
    report("disk wrap refused", request(&mut disk, 0, u64::MAX / 512, 512, true) == Some(1));
    report("disk odd length refused", request(&mut disk, 0, 0, 100, true) == Some(1));
    report("disk unknown request", request(&mut disk, 99, 0, 0, false) == Some(2));
    report("disk discard past end refused", range(&mut disk, 11, capacity - 1, 2, 0) == Some(1));
    report("disk serial", request(&mut disk, 8, 0, 20, true) == Some(0) && is(disk.buffer(0) + 0x1000, b"data"));
    if let Some(mut fixed) = Device::find(2, 1) {
        fixed.begin(1 << 5);
        report("read-only disk read", sector(&mut fixed, 0, 0).is_some_and(|at| is(at, b"read only")));
        report("read-only disk write refused", !store(&mut fixed, 0, b"x"));
    }
}

fn entropy() {
    let Some(mut rng) = Device::find(4, 0) else { return report("rng found", false) };
    rng.begin(0);
    let buffer = rng.buffer(0);
    fill(buffer, 0, 64);
    rng.descriptor(0, 0, buffer, 64, WRITE, 0);
    rng.offer(0, 0);
    let got = rng.wait(0).is_some_and(|(_, written)| written == 64);
    report("rng", got && !is_all(buffer, 0, 64));
}

fn balloon() {
    let Some(mut balloon) = Device::find(5, 0) else { return report("balloon found", false) };
    balloon.begin(0);
    const PAGE: u64 = 0x200_0000;
    fill(PAGE, 0xaa, 4096);
    let list = balloon.buffer(0);
    write32(list, (PAGE >> 12) as u32);
    balloon.descriptor(0, 0, list, 4, 0, 0);
    balloon.offer(0, 0);
    let taken = balloon.wait(0).is_some();
    report("balloon", taken && is_all(PAGE, 0, 4096));
    balloon.register(0x104, 1);
    report("balloon counts", read32(balloon.base + 0x104) == 1);
}

fn console() {
    let Some(mut console) = Device::find(3, 0) else { return report("console found", false) };
    console.begin(0);
    let buffer = console.buffer(1);
    copy(buffer, b"through the virtio console\n");
    console.descriptor(1, 0, buffer, 27, 0, 0);
    console.offer(1, 0);
    report("console", console.wait(1).is_some());
}

/// Starts the second processor; it counts itself in real mode.
fn processors() {
    const CODE: u64 = 0x1_0000;
    const COUNT: u64 = 0x1f00;
    const COMMAND: u64 = 0xfee0_0300;
    write16(COUNT, 0);
    // lock inc word [0x1f00]; hlt; jmp to the hlt, with ds = 0 as after a reset
    copy(CODE, &[0xf0, 0xff, 0x06, 0x00, 0x1f, 0xf4, 0xeb, 0xfd]);
    write32(COMMAND + 0x10, 1 << 24);
    write32(COMMAND, 0x4500);
    write32(COMMAND + 0x10, 1 << 24);
    write32(COMMAND, 0x4600 | (CODE >> 12) as u32);
    for _ in 0..1_000_000u32 {
        if read16(COUNT) == 1 {
            break;
        }
    }
    report("second processor", read16(COUNT) == 1);
}

/// An ARP request for the host, first in another's name, then in its own.
fn network() {
    let Some(mut net) = Device::find(1, 0) else { return report("net found", false) };
    // VIRTIO_NET_F_MAC
    net.begin(1 << 5);
    for index in 0..4 {
        net.descriptor(0, index, net.buffer(0) + index * 0x800, 0x800, WRITE, 0);
        net.offer(0, index as u16);
    }
    let frame = net.buffer(1);
    let arp = |mac_last: u8, ip_last: u8| {
        fill(frame, 0, 12);
        fill(frame + 12, 0xff, 6);
        let mac = [0x52, 0x54, 0, 0, 0, mac_last];
        copy(frame + 18, &mac);
        copy(frame + 24, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        copy(frame + 34, &mac);
        copy(frame + 40, &[10, 9, 0, ip_last]);
        fill(frame + 44, 0, 6);
        copy(frame + 50, &[10, 9, 0, 1]);
        fill(frame + 54, 0, 18);
    };
    for (mac, ip) in [(9, 2), (1, 9), (1, 2)] {
        arp(mac, ip);
        net.descriptor(1, 0, frame, 72, 0, 0);
        net.offer(1, 0);
        report("net sent", net.wait(1).is_some());
    }
    // other traffic of the host's side may come first
    for _ in 0..20 {
        let Some((head, _)) = net.wait(0) else { break };
        let got = net.buffer(0) + u64::from(head) * 0x800 + 12;
        if is(got + 12, &[8, 6]) && is(got + 20, &[0, 2]) {
            return report("net answered in its own name only", is(got + 38, &[10, 9, 0, 2]));
        }
        net.offer(0, head as u16);
    }
    report("net answered", false);
}

const CREDIT: u32 = 0x1_0000;

/// Sends one packet on the connection that `from` opened.
fn packet(vsock: &mut Device, from: u64, op: u16, data: &[u8]) {
    let at = vsock.buffer(1);
    fill(at, 0, 44);
    write32(at, 3);
    write32(at + 8, 2);
    write32(at + 16, read32(from + 20));
    write32(at + 20, read32(from + 16));
    write32(at + 24, data.len() as u32);
    write16(at + 28, 1);
    write16(at + 30, op);
    write32(at + 36, CREDIT);
    copy(at + 44, data);
    vsock.descriptor(1, 0, at, 44 + data.len() as u32, 0, 0);
    vsock.offer(1, 0);
    vsock.wait(1);
}

/// Waits for a client of port 7, echoes what it says once.
fn vsock() {
    let Some(mut vsock) = Device::find(19, 0) else { return report("vsock found", false) };
    vsock.begin(0);
    let cid = read32(vsock.base + 0x100);
    report("vsock cid", cid == 3);
    for index in 0..4 {
        vsock.descriptor(0, index, vsock.buffer(0) + index * 0x1000, 0x1000, WRITE, 0);
        vsock.offer(0, index as u16);
    }
    crate::say("vsock ready\n");
    loop {
        let Some((head, _)) = vsock.poll(0) else { continue };
        let at = vsock.buffer(0) + u64::from(head) * 0x1000;
        let (op, length) = (read16(at + 30), read32(at + 24));
        match op {
            1 => packet(&mut vsock, at, 2, &[]),
            5 => {
                let mut data = [0u8; 16];
                let n = (length as usize).min(16);
                for (offset, to) in data.iter_mut().enumerate().take(n) {
                    *to = read8(at + 44 + offset as u64);
                }
                packet(&mut vsock, at, 5, &data[..n]);
            }
            4 => {
                packet(&mut vsock, at, 3, &[]);
                return report("vsock", true);
            }
            _ => {}
        }
        vsock.offer(0, head as u16);
    }
}
