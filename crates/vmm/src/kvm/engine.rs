//! The KVM engine as the monitor sees it: it opens what the machine needs and speaks to the jailed process.

use super::run::{self, Answer, Command, DiskPart, LinkPart, Parts, RestoreParts};
use super::virtio::net::Filter;
use crate::disk::{self, Kind};
use crate::engine::{Control, Engine, Plan, SNAPSHOT_DEADLINE, SnapshotFiles, Work};
use crate::machine::{Disk, DiskFormat, Error, Link, Machine, Rate, Restore, Result};
use crate::{channel, client, sys};
use kvm_ioctls::Kvm;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub struct KvmEngine;

impl KvmEngine {
    /// Whether this engine has all that the machine asks for; the reason if not.
    pub fn fits(machine: &Machine) -> std::result::Result<(), &'static str> {
        if machine.kernel.is_none() {
            return Err("it boots through firmware");
        }
        if machine.display {
            return Err("it has a screen");
        }
        if machine.disks.iter().any(|d| d.bus != "virtio") {
            return Err("it has a disk that is not on virtio");
        }
        Ok(())
    }
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn plan(&self, machine: &Machine) -> Result<Plan> {
        machine.validate()?;
        let open = |path: &Path, what: &'static str| File::open(path).map_err(Error::io(what, path));
        let kernel = machine.kernel.as_ref().ok_or_else(|| Error::NoEngine("the KVM engine needs a kernel".into()))?;
        let kvm = Kvm::new().map_err(|e| Error::NoEngine(format!("/dev/kvm: {e}")))?;
        let mut disks = Vec::new();
        for (index, one) in machine.disks.iter().enumerate() {
            disks.push(disk_part(machine, index, one)?);
        }
        if let Some(seed) = &machine.seed {
            let file = disk::open(seed, false)?;
            disks.push(DiskPart {
                file,
                kind: Kind::Raw,
                read_only: true,
                serial: "cidata".into(),
                rate: Rate::default(),
            });
        }
        let (console, their_console) = UnixStream::pair().map_err(Error::io("make channel", "console"))?;
        let (control, their_control) = UnixStream::pair().map_err(Error::io("make channel", "control"))?;
        let parts = Parts {
            kvm,
            kernel: open(kernel, "open kernel")?,
            initrd: machine.initrd.as_ref().map(|path| open(path, "open initrd")).transpose()?,
            command_line: machine.kernel_args.clone(),
            vcpus: machine.vcpus as u8,
            memory_bytes: machine.memory_bytes,
            disks,
            link: machine.link.as_ref().map(link).transpose()?,
            vsock: client::listen(&machine.run_dir.join(client::VSOCK))?,
            console: their_console,
            control: their_control,
            restore: machine.restore.as_ref().map(restore).transpose()?,
        };
        let keep = parts.descriptors();
        let work = Work::Inside { keep, main: Box::new(move |pagemap| run::main(parts, pagemap)) };
        Ok(Plan { work, console, control })
    }

    fn control(&self, _: &Machine, channel: UnixStream) -> Result<Box<dyn Control>> {
        Ok(Box::new(Channel::greet(channel)?))
    }
}

fn disk_part(machine: &Machine, index: usize, one: &Disk) -> Result<DiskPart> {
    // refuses images that point outside themselves
    crate::qcow2::virtual_size(&one.path, one.format == DiskFormat::Qcow2)?;
    let (serial, read_only, rate) = (one.serial.clone(), one.read_only, one.rate);
    if one.overlay && !read_only {
        let base = Some((disk::open(&one.path, false)?, one.format));
        let file = disk::open(&disk::overlay(machine, index)?, true)?;
        return Ok(DiskPart { file, kind: Kind::Qcow2 { base }, read_only, serial, rate });
    }
    let kind = match one.format {
        DiskFormat::Raw => Kind::Raw,
        DiskFormat::Qcow2 => Kind::Qcow2 { base: None },
    };
    Ok(DiskPart { file: disk::open(&one.path, !read_only)?, kind, read_only, serial, rate })
}

fn link(link: &Link) -> Result<LinkPart> {
    let mut mac = [0u8; 6];
    for (to, from) in mac.iter_mut().zip(link.mac.split(':')) {
        *to = u8::from_str_radix(from, 16).unwrap_or(0);
    }
    let filter = Filter { mac, addresses: link.addresses.clone() };
    Ok(LinkPart { tap: sys::open_tap(link)?, filter, mtu: u16::try_from(link.mtu).unwrap_or(u16::MAX) })
}

fn restore(restore: &Restore) -> Result<RestoreParts> {
    let open = |path: &Path| File::open(path).map_err(Error::io("open snapshot", path));
    let difference = restore.difference.as_deref().map(open).transpose()?;
    Ok(RestoreParts {
        state: open(&restore.state)?,
        memory: open(&restore.memory)?,
        difference,
        verify: restore.verify,
    })
}

/// The inherited channel. The other end may be taken over: lines are bounded and only success or a text is believed.
struct Channel {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

const LONGEST_ANSWER: u64 = 4096;
const DEADLINE: Duration = Duration::from_secs(30);

impl Channel {
    fn greet(stream: UnixStream) -> Result<Self> {
        let fail = |e: std::io::Error| Error::Monitor(format!("control channel: {e}"));
        stream.set_read_timeout(Some(DEADLINE)).map_err(fail)?;
        stream.set_write_timeout(Some(Duration::from_secs(5))).map_err(fail)?;
        let writer = stream.try_clone().map_err(fail)?;
        let mut channel = Channel { reader: BufReader::new(stream), writer };
        channel.answer()?;
        Ok(channel)
    }

    fn answer(&mut self) -> Result<()> {
        let mut line = Vec::new();
        match (&mut self.reader).take(LONGEST_ANSWER).read_until(b'\n', &mut line) {
            Ok(0) => Err(Error::NotRunning),
            Ok(_) => {
                let answer: Answer =
                    serde_json::from_slice(&line).map_err(|e| Error::Monitor(format!("control channel: {e}")))?;
                answer.map_err(Error::Monitor)
            }
            Err(e) => Err(Error::Monitor(format!("control channel: {e}"))),
        }
    }

    fn ask(&mut self, command: Command) -> Result<()> {
        self.ask_with(command, &[])
    }

    fn ask_with(&mut self, command: Command, files: &[BorrowedFd<'_>]) -> Result<()> {
        let mut text = serde_json::to_vec(&command).map_err(|e| Error::Monitor(e.to_string()))?;
        text.push(b'\n');
        channel::send(&self.writer, &text, files).map_err(|_| Error::NotRunning)?;
        self.answer()
    }
}

impl Control for Channel {
    fn power_button(&mut self) -> Result<()> {
        self.ask(Command::PowerButton)
    }
    fn reset(&mut self) -> Result<()> {
        self.ask(Command::Reset)
    }
    fn pause(&mut self) -> Result<()> {
        self.ask(Command::Pause)
    }
    fn resume(&mut self) -> Result<()> {
        self.ask(Command::Resume)
    }
    fn balloon(&mut self, pages: u32) -> Result<()> {
        self.ask(Command::Balloon(pages))
    }
    fn soft_reboot(&mut self) -> Result<()> {
        self.ask(Command::SoftReboot)
    }
    fn rebooting(&mut self) -> Result<bool> {
        // the engine sees to it
        Ok(false)
    }
    fn display(&mut self, _: std::os::fd::OwnedFd) -> Result<()> {
        Err(Error::Monitor(
            "has no screen: Atoll's own monitor has none; machines that boot through firmware have".into(),
        ))
    }
    fn snapshot(&mut self, files: &SnapshotFiles) -> Result<()> {
        let fail = |e: std::io::Error| Error::Monitor(format!("control channel: {e}"));
        self.writer.set_read_timeout(Some(SNAPSHOT_DEADLINE)).map_err(fail)?;
        let base = files.base.as_ref().map(AsFd::as_fd);
        let all: Vec<BorrowedFd<'_>> = [files.state.as_fd(), files.memory.as_fd()].into_iter().chain(base).collect();
        let done = self.ask_with(Command::Snapshot, &all);
        self.writer.set_read_timeout(Some(DEADLINE)).map_err(fail)?;
        done
    }
}
