//! What a machine is, complete: nothing in here has to be looked up again. Written to `<run_dir>/machine.json` for the
//! role `atoll vmm` to read.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("machine.{field}: {value}: {message}")]
    Invalid { field: &'static str, value: String, message: String },
    #[error("no engine here can run a machine: {0}")]
    NoEngine(String),
    #[error("{operation} {path}")]
    Io {
        operation: &'static str,
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{path}: {message}")]
    DiskImage { path: String, message: String },
    #[error("monitor: {0}")]
    Monitor(String),
    #[error("the machine is not running")]
    NotRunning,
}

impl Error {
    pub fn io(operation: &'static str, path: impl AsRef<std::path::Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().display().to_string();
        move |source| Error::Io { operation, path, source }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    /// Unique here; only for names in process lists.
    pub id: String,
    /// 1 to 32.
    pub vcpus: u32,
    /// Bytes; at least 16 MiB.
    pub memory_bytes: u64,
    /// Direct boot: bzImage or ELF. Without it the firmware boots the first disk.
    pub kernel: Option<PathBuf>,
    pub initrd: Option<PathBuf>,
    pub kernel_args: String,
    /// The firmware is UEFI, without secure boot and without variables that last; otherwise a PC's BIOS.
    #[serde(default)]
    pub efi: bool,
    pub disks: Vec<Disk>,
    /// A read-only disk added last (the cloud-init seed).
    pub seed: Option<PathBuf>,
    pub link: Option<Link>,
    /// User and group id of this machine alone; its process runs as these.
    pub uid: u32,
    /// Sockets and the jail's root; short path.
    pub run_dir: PathBuf,
    /// Private files of the machine that must survive a reboot of the host.
    pub state_dir: PathBuf,
    pub console: Console,
    #[serde(default)]
    pub engine: Choice,
    /// It goes on from here instead of booting.
    #[serde(default)]
    pub restore: Option<Restore>,
    /// The file that keeps what KVM was measured to be, so that it is measured once a boot.
    #[serde(default)]
    pub kvm_cache: Option<PathBuf>,
    /// A screen, as far as the engine has any ([`crate::Client::display`]).
    #[serde(default)]
    pub display: bool,
    /// A byte stream to the program in the guest that holds the virtio-serial port of this name, or listens on the vsock
    /// port of [`crate::client::channel`].
    #[serde(default)]
    pub channel: Option<String>,
}

/// A snapshot to go on from, with the description it was taken with; its link alone may be another. [`Machine::engine`]
/// has to be the one that took it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Restore {
    pub state: PathBuf,
    /// Shared with every machine that goes on from it: nothing may change it as long as one runs.
    pub memory: PathBuf,
    /// Of a differential snapshot: its own memory; `memory` is its base's.
    #[serde(default)]
    pub difference: Option<PathBuf>,
    /// Read all of it and compare checksums first.
    #[serde(default)]
    pub verify: bool,
    /// The engine that took it ([`crate::client::State::engine`]); no other can read it.
    #[serde(default)]
    pub engine: String,
}

/// Which engine runs a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// What this computer is best at.
    #[default]
    Best,
    /// Ours, whatever KVM there is: for tests and measurements.
    Kvm,
    Qemu,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    Raw,
    Qcow2,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Disk {
    pub name: String,
    pub path: PathBuf,
    pub format: DiskFormat,
    pub read_only: bool,
    /// `virtio`, `sata` or `scsi`.
    pub bus: String,
    pub serial: String,
    pub boot_order: Option<u32>,
    /// The file at `path` must not change: writes go to an overlay in `state_dir`.
    pub overlay: bool,
    /// A copy of this is what the overlay begins as.
    #[serde(default)]
    pub begins: Option<PathBuf>,
    #[serde(default)]
    pub rate: Rate,
}

/// How much a disk may do in a second; 0: as much as it can. A disk that rested may do the tenth of it at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    pub bytes: u64,
    pub operations: u64,
}

/// The tap that is this machine's only way out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Link {
    pub tap: String,
    /// Namespace the tap lives in; `None` = the caller's.
    pub netns: Option<PathBuf>,
    pub mac: String,
    pub mtu: u32,
    /// Frames from other addresses do not leave the machine. Empty: any may.
    #[serde(default)]
    pub addresses: Vec<std::net::IpAddr>,
}

/// Where the serial console's lines go: CRI log format, rotated to `.1`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Console {
    pub log_path: PathBuf,
    pub log_max_bytes: u64,
}

pub const MAX_VCPUS: u32 = 32;
pub const MIN_MEMORY: u64 = 16 << 20;
pub const MAX_DISKS: usize = 24;

impl Machine {
    /// Refuses what no engine could run, naming the field.
    pub fn validate(&self) -> Result<()> {
        let bad = |field, value: String, message: &str| Err(Error::Invalid { field, value, message: message.into() });
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return bad("vcpus", self.vcpus.to_string(), "must be 1 to 32");
        }
        if self.memory_bytes < MIN_MEMORY {
            return bad("memory_bytes", self.memory_bytes.to_string(), "must be at least 16 MiB");
        }
        if self.kernel.is_none() && self.disks.is_empty() {
            return bad("disks", "none".into(), "a machine needs a kernel or a disk to boot from");
        }
        if self.kernel.is_none() && self.initrd.is_some() {
            return bad("initrd", "set".into(), "an initrd needs a kernel");
        }
        if self.kernel.is_some() && self.efi {
            return bad("efi", "true".into(), "a machine with a kernel of its own has no firmware");
        }
        if self.disks.len() > MAX_DISKS {
            return bad("disks", self.disks.len().to_string(), "at most 24 disks");
        }
        if self.kernel_args.len() > 2047 || self.kernel_args.contains(['\0', '\n']) {
            return bad("kernel_args", self.kernel_args.clone(), "one line of at most 2047 bytes");
        }
        if self.uid == 0 {
            return bad("uid", "0".into(), "a machine never runs as root");
        }
        if let Some(name) = self.channel.as_ref().filter(|name| !name.split('.').all(|part| plain(part, 63))) {
            return bad("channel", name.clone(), "letters, digits, -, _ and . only");
        }
        for disk in &self.disks {
            if !matches!(disk.bus.as_str(), "virtio" | "sata" | "scsi") {
                return bad("disks.bus", disk.bus.clone(), "must be virtio, sata or scsi");
            }
            if !plain(&disk.serial, 36) || !plain(&disk.name, 63) {
                return bad("disks.serial", disk.serial.clone(), "letters, digits, - and _ only");
            }
        }
        if let Some(link) = &self.link
            && !is_mac(&link.mac)
        {
            return bad("link.mac", link.mac.clone(), "must be six pairs of hex digits, aa:bb:cc:dd:ee:ff");
        }
        Ok(())
    }
}

/// Values that stand in an engine's comma-separated option syntax must not be able to leave it.
fn plain(text: &str, most: usize) -> bool {
    text.len() <= most && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

fn is_mac(text: &str) -> bool {
    let parts: Vec<&str> = text.split(':').collect();
    parts.len() == 6 && parts.iter().all(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[cfg(test)]
pub(crate) fn sample() -> Machine {
    Machine {
        id: "vm1".into(),
        vcpus: 2,
        memory_bytes: 512 << 20,
        kernel: Some("/k".into()),
        initrd: Some("/i".into()),
        kernel_args: "root=/dev/vda console=ttyS0".into(),
        efi: false,
        disks: vec![Disk {
            name: "root".into(),
            path: "/d".into(),
            format: DiskFormat::Raw,
            read_only: false,
            bus: "virtio".into(),
            serial: String::new(),
            boot_order: None,
            overlay: true,
            begins: None,
            rate: Rate::default(),
        }],
        seed: None,
        link: Some(Link {
            tap: "t0".into(),
            netns: None,
            mac: "52:54:00:00:00:01".into(),
            mtu: 1500,
            addresses: Vec::new(),
        }),
        uid: 100_000,
        run_dir: "/run/x".into(),
        state_dir: "/var/x".into(),
        console: Console { log_path: "/var/log/x".into(), log_max_bytes: 1 << 20 },
        engine: Choice::Best,
        restore: None,
        kvm_cache: None,
        display: false,
        channel: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_cannot_run_and_names_the_field() {
        assert!(sample().validate().is_ok());
        type Spoil = fn(&mut Machine);
        let cases: [(Spoil, &str); 9] = [
            (|m| m.vcpus = 0, "machine.vcpus"),
            (|m| m.memory_bytes = 1, "machine.memory_bytes"),
            (|m| m.efi = true, "machine.efi"),
            (|m| m.uid = 0, "machine.uid"),
            (|m| m.disks[0].bus = "virtio,readonly=off".into(), "machine.disks.bus"),
            (|m| m.disks[0].serial = "a,b=c".into(), "machine.disks.serial"),
            (|m| m.link.as_mut().unwrap().mac = "52:54".into(), "machine.link.mac"),
            (|m| m.kernel_args = "a\nb".into(), "machine.kernel_args"),
            (|m| m.channel = Some("a,b".into()), "machine.channel"),
        ];
        for (spoil, field) in cases {
            let mut machine = sample();
            spoil(&mut machine);
            let message = machine.validate().unwrap_err().to_string();
            assert!(message.starts_with(field), "{message}");
        }
    }
}
