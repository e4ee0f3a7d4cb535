//! The QEMU engine: a machine as a `qemu-system-x86_64` command line. Disks, tap and channels are inherited open
//! descriptors; QEMU opens no path that a tenant had a say in, and its own seccomp sandbox is on.

use crate::engine::{Control, Engine, Plan, Program, Work};
use crate::kvm::snapshot::{self, Outline};
use crate::machine::{Disk, DiskFormat, Error, Machine, Rate, Restore, Result};
use crate::qmp::Qmp;
use crate::{client, disk, qcow2, sys};
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

const PROGRAM: &str = "/usr/bin/qemu-system-x86_64";
/// Debian's package ovmf; in one file, so that it can be read as a BIOS.
const EFI: &str = "/usr/share/ovmf/OVMF.fd";
const FIRST_DESCRIPTOR: i32 = 10;

pub struct Qemu {
    kvm: bool,
}

impl Qemu {
    pub fn find(kvm: bool) -> Option<Self> {
        Path::new(PROGRAM).exists().then_some(Qemu { kvm })
    }
}

/// Descriptors and arguments as they grow.
struct Builder {
    args: Vec<OsString>,
    descriptors: Vec<(i32, OwnedFd)>,
    sets: u32,
}

impl Builder {
    fn arg(&mut self, text: impl Into<OsString>) -> &mut Self {
        self.args.push(text.into());
        self
    }
    fn descriptor(&mut self, fd: OwnedFd) -> i32 {
        let number = FIRST_DESCRIPTOR + self.descriptors.len() as i32;
        self.descriptors.push((number, fd));
        number
    }
    /// An open file as a path that QEMU understands, `/dev/fdset/N`.
    fn file(&mut self, file: File) -> String {
        let number = self.descriptor(file.into());
        self.sets += 1;
        let set = self.sets;
        self.arg("-add-fd").arg(format!("fd={number},set={set}"));
        format!("/dev/fdset/{set}")
    }
    /// A block node for an open file.
    fn node(&mut self, name: &str, file: File, format: DiskFormat, read_only: bool, backing: Option<&str>) {
        let path = self.file(file);
        let on = if read_only { "on" } else { "off" };
        self.arg("-blockdev").arg(format!(
            "driver=file,node-name={name}-file,filename={path},locking=off,read-only={on},discard=unmap,auto-read-only=off"
        ));
        let node = match (format, backing) {
            (DiskFormat::Raw, _) => {
                format!("driver=raw,node-name={name},file={name}-file,read-only={on},discard=unmap")
            }
            (DiskFormat::Qcow2, Some(backing)) => {
                format!("driver=qcow2,node-name={name},file={name}-file,read-only={on},discard=unmap,backing={backing}")
            }
            // a JSON null is the only way to say "no backing file"
            (DiskFormat::Qcow2, None) => format!(
                r#"{{"driver":"qcow2","node-name":"{name}","file":"{name}-file","read-only":{read_only},"discard":"unmap","backing":null}}"#
            ),
        };
        self.arg("-blockdev").arg(node);
    }
}

impl Engine for Qemu {
    fn name(&self) -> &'static str {
        if self.kvm { "qemu-kvm" } else { "qemu-tcg" }
    }

    fn plan(&self, machine: &Machine) -> Result<Plan> {
        machine.validate()?;
        let mut b = Builder { args: Vec::new(), descriptors: Vec::new(), sets: 0 };
        self.basics(&mut b, machine);
        let files = boot_files(&mut b, machine)?;
        for (index, disk) in machine.disks.iter().enumerate() {
            add_disk(&mut b, machine, index, disk)?;
        }
        if let Some(seed) = &machine.seed {
            let file = File::open(seed).map_err(Error::io("open seed", seed))?;
            b.node("seed", file, DiskFormat::Raw, true, None);
            b.arg("-device").arg("virtio-blk-pci,drive=seed,serial=cidata");
        }
        if let Some(link) = &machine.link {
            let number = b.descriptor(sys::open_tap(link)?);
            b.arg("-netdev").arg(format!("tap,id=net0,fd={number},vhost=off"));
            b.arg("-device").arg(format!("virtio-net-pci,netdev=net0,mac={},romfile=,host_mtu={}", link.mac, link.mtu));
        }
        if let Some(restore) = &machine.restore {
            incoming(&mut b, machine, restore)?;
        }
        if let Some(name) = &machine.channel {
            // it listens on what it is handed; nobody but root reaches the socket's name
            let number = b.descriptor(client::listen(&machine.run_dir.join(client::CHANNEL))?.into());
            b.arg("-chardev").arg(format!("socket,id=channel,fd={number},server=on,wait=off"));
            b.arg("-device").arg("virtio-serial-pci,max_ports=2");
            b.arg("-device").arg(format!("virtserialport,chardev=channel,name={name}"));
        }
        let console = channel(&mut b, "console")?;
        b.arg("-serial").arg("chardev:console");
        let control = channel(&mut b, "qmp")?;
        b.arg("-mon").arg("chardev=qmp,mode=control");
        let (args, descriptors, needs_kvm) = (b.args, b.descriptors, self.kvm);
        let work = Work::Execute(Program { path: PROGRAM.into(), args, descriptors, files, needs_kvm });
        Ok(Plan { work, console, control })
    }

    fn control(&self, machine: &Machine, channel: UnixStream) -> Result<Box<dyn Control>> {
        let mut qmp = Qmp::greet(channel)?;
        qmp.describe(outline(machine), machine.display);
        if machine.restore.is_some() {
            qmp.arrive()?;
        }
        Ok(Box::new(qmp))
    }
}

impl Qemu {
    fn basics(&self, b: &mut Builder, machine: &Machine) {
        let accel = if self.kvm { "kvm" } else { "tcg,thread=multi,tb-size=256" };
        let cpu = if self.kvm { "host,migratable=off" } else { "max" };
        b.arg("-name").arg(machine.id.replace(',', "-"));
        for flag in ["-nodefaults", "-no-user-config"] {
            b.arg(flag);
        }
        if machine.display {
            // clients come as open sockets; it listens nowhere
            b.arg("-vnc").arg("none,share=allow-exclusive");
            b.arg("-device").arg("VGA,vgamem_mb=16");
        } else {
            b.arg("-nographic");
        }
        let graphics = if machine.display { "on" } else { "off" };
        b.arg("-machine").arg(format!("q35,usb=off,vmport=off,smm=off,graphics={graphics}")).arg("-accel").arg(accel);
        b.arg("-cpu").arg(cpu);
        b.arg("-smp").arg(machine.vcpus.to_string());
        b.arg("-m").arg(format!("{}M", machine.memory_bytes.div_ceil(1 << 20)));
        b.arg("-sandbox").arg("on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
        b.arg("-device").arg("virtio-rng-pci");
        b.arg("-device").arg("vmgenid,guid=auto");
    }
}

/// What a snapshot's machine and the one that goes on from it must agree on; QEMU checks the rest.
fn outline(machine: &Machine) -> Outline {
    const DISK: u32 = 2;
    let vcpus = u8::try_from(machine.vcpus).unwrap_or(u8::MAX);
    Outline { vcpus, memory_bytes: machine.memory_bytes, devices: vec![(DISK, 0); machine.disks.len()] }
}

fn incoming(b: &mut Builder, machine: &Machine, restore: &Restore) -> Result<()> {
    let open = |path: &Path| File::open(path).map_err(Error::io("open snapshot", path));
    if restore.difference.is_some() {
        return Err(Error::Monitor("machines in QEMU have no differential snapshots".into()));
    }
    let then: std::result::Result<Outline, _> = snapshot::read(&open(&restore.state)?);
    then.and_then(|then| then.fits(&outline(machine))).map_err(|e| Error::Monitor(e.to_string()))?;
    let number = b.descriptor(open(&restore.memory)?.into());
    b.arg("-incoming").arg(format!("fd:{number}"));
    Ok(())
}

fn channel(b: &mut Builder, id: &str) -> Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair().map_err(Error::io("make channel", id))?;
    let number = b.descriptor(theirs.into());
    b.arg("-chardev").arg(format!("socket,id={id},fd={number},server=off"));
    Ok(ours)
}

/// Firmware, kernel and initrd are copied beside the machine's state, for its user alone to read; QEMU cannot take them as
/// descriptors.
fn boot_files(b: &mut Builder, machine: &Machine) -> Result<Vec<(PathBuf, PathBuf)>> {
    let mut files = Vec::new();
    let efi = machine.efi.then(|| Path::new(EFI));
    if efi.is_some_and(|path| !path.exists()) {
        return Err(Error::NoEngine(format!("{EFI} is not here, and the machine boots by EFI; apt-get install ovmf")));
    }
    for (flag, inside, source) in [
        ("-bios", "/boot/firmware", efi),
        ("-kernel", "/boot/kernel", machine.kernel.as_deref()),
        ("-initrd", "/boot/initrd", machine.initrd.as_deref()),
    ] {
        let Some(source) = source else { continue };
        let copy = machine.state_dir.join(inside.trim_start_matches("/boot/"));
        fs::copy(source, &copy).map_err(Error::io("copy boot file", source))?;
        fs::set_permissions(&copy, std::os::unix::fs::PermissionsExt::from_mode(0o400))
            .map_err(Error::io("set mode", &copy))?;
        std::os::unix::fs::chown(&copy, Some(machine.uid), Some(machine.uid)).map_err(Error::io("chown", &copy))?;
        b.arg(flag).arg(inside);
        files.push((PathBuf::from(inside), copy));
    }
    if machine.kernel.is_some() {
        b.arg("-append").arg(&machine.kernel_args);
    }
    Ok(files)
}

fn add_disk(b: &mut Builder, machine: &Machine, index: usize, one: &Disk) -> Result<()> {
    let node = format!("disk{index}");
    // refuses images that point outside themselves
    qcow2::virtual_size(&one.path, one.format == DiskFormat::Qcow2)?;
    if one.overlay && !one.read_only {
        let overlay = disk::overlay(machine, index)?;
        b.node(&format!("{node}-base"), disk::open(&one.path, false)?, one.format, true, None);
        b.node(&node, disk::open(&overlay, true)?, DiskFormat::Qcow2, false, Some(&format!("{node}-base")));
    } else {
        b.node(&node, disk::open(&one.path, !one.read_only)?, one.format, one.read_only, None);
    }
    let drive = limited(b, &node, one.rate);
    let device = match one.bus.as_str() {
        "sata" => "ide-hd".to_owned(),
        "scsi" => {
            b.arg("-device").arg(format!("virtio-scsi-pci,id=scsi{index}"));
            format!("scsi-hd,bus=scsi{index}.0")
        }
        _ => "virtio-blk-pci".to_owned(),
    };
    let mut text = format!("{device},drive={drive}");
    if !one.serial.is_empty() {
        text.push_str(&format!(",serial={}", one.serial));
    }
    if machine.kernel.is_none() {
        text.push_str(&format!(",bootindex={}", one.boot_order.unwrap_or(100 + index as u32)));
    }
    b.arg("-device").arg(text);
    Ok(())
}

/// The node that the guest's disk is on: one with limits before it, where there are any.
fn limited(b: &mut Builder, node: &str, rate: Rate) -> String {
    if rate == Rate::default() {
        return node.to_owned();
    }
    let Rate { bytes, operations } = rate;
    let group = format!("{node}-rate");
    b.arg("-object").arg(format!(
        r#"{{"qom-type":"throttle-group","id":"{group}","limits":{{"bps-total":{bytes},"iops-total":{operations}}}}}"#
    ));
    let limited = format!("{node}-limited");
    b.arg("-blockdev").arg(format!("driver=throttle,node-name={limited},throttle-group={group},file={node}"));
    limited
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::sample;

    fn plan(change: impl FnOnce(&mut Machine)) -> (Result<Plan>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let mut machine = sample();
        machine.uid = rustix::process::getuid().as_raw().max(1);
        machine.link = None;
        machine.state_dir = dir.path().into();
        for (name, size) in [("k", 10), ("i", 10), ("d", 1 << 20)] {
            fs::write(dir.path().join(name), vec![0; size]).unwrap();
        }
        machine.kernel = Some(dir.path().join("k"));
        machine.initrd = Some(dir.path().join("i"));
        machine.disks[0].path = dir.path().join("d");
        change(&mut machine);
        (Qemu { kvm: false }.plan(&machine), dir)
    }

    #[test]
    fn disks_are_descriptors_and_bases_are_read_only() {
        if rustix::process::getuid().as_raw() != 0 {
            println!("SKIPPED: needs root to give files to the machine's user");
            return;
        }
        let (plan, _dir) = plan(|m| m.disks[0].rate = Rate { bytes: 1000, operations: 7 });
        let Work::Execute(plan) = plan.unwrap().work else { panic!("QEMU is a program") };
        let text = plan.args.iter().map(|a| a.to_string_lossy()).collect::<Vec<_>>().join(" ");
        assert!(text.contains("node-name=disk0-base-file,filename=/dev/fdset/1,locking=off,read-only=on"), "{text}");
        assert!(
            text.contains(
                "driver=qcow2,node-name=disk0,file=disk0-file,read-only=off,discard=unmap,backing=disk0-base"
            )
        );
        assert!(
            text.contains("driver=throttle,node-name=disk0-limited,throttle-group=disk0-rate,file=disk0"),
            "{text}"
        );
        assert!(text.contains(r#""limits":{"bps-total":1000,"iops-total":7}"#) && text.contains("drive=disk0-limited"));
        assert!(text.contains("-sandbox on") && text.contains("-nodefaults"));
        assert!(plan.descriptors.iter().all(|(number, _)| *number >= FIRST_DESCRIPTOR));
    }
}
