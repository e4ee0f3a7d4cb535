//! From the kernel's hand to a system that containers can be started on.

use crate::protocol::{IMAGES, LOGS, PORT_NAME, RUN, STATE, VOLUMES};
use rustix::mount::{MountFlags, mount, mount_move};
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Argument of the agent once it has a root of its own.
pub const SECOND: &str = "second";
const NEW_ROOT: &str = "/root";
/// How long a device may take to appear.
const DEVICES: Duration = Duration::from_secs(10);

fn at<E: Into<io::Error>>(what: &str) -> impl FnOnce(E) -> io::Error {
    move |e| {
        let e: io::Error = e.into();
        io::Error::new(e.kind(), format!("{what}: {e}"))
    }
}

fn fresh(kind: &str, target: &str, flags: MountFlags, data: &str) -> io::Result<()> {
    fs::create_dir_all(target).map_err(at(target))?;
    let data = CString::new(data).map_err(at(target))?;
    mount(kind, target, kind, flags, data.as_c_str()).map_err(at(target))
}

/// In the kernel's first root, which cannot be pivoted from: loads the modules and moves into a tmpfs.
pub fn first() -> io::Result<()> {
    let quiet = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    fresh("proc", "/proc", quiet, "")?;
    fresh("sysfs", "/sys", quiet, "")?;
    // the kernel may have mounted it already
    let _ = fresh("devtmpfs", "/dev", MountFlags::NOSUID | MountFlags::NOEXEC, "mode=0755");
    load_modules(Path::new("/modules"));
    fresh("tmpfs", NEW_ROOT, MountFlags::NODEV, "mode=0755,size=90%")?;
    let root = Path::new(NEW_ROOT);
    fs::copy("/init", root.join("init")).map_err(at("/init"))?;
    for directory in ["proc", "sys", "dev", "tmp", "run", "etc"] {
        fs::create_dir_all(root.join(directory)).map_err(at(directory))?;
    }
    for directory in ["proc", "sys", "dev"] {
        mount_move(format!("/{directory}"), root.join(directory)).map_err(at(directory))?;
    }
    // its memory is the guest's
    let _ = fs::remove_dir_all("/modules");
    let _ = fs::remove_file("/init");
    rustix::process::chdir(root).map_err(at(NEW_ROOT))?;
    mount_move(".", "/").map_err(at("moving the root"))?;
    rustix::process::chroot(".").map_err(at("chroot"))?;
    rustix::process::chdir("/").map_err(at("/"))?;
    Err(Command::new("/init").arg(SECOND).env_clear().exec())
}

/// In the order of their names. One that the kernel has built in, or whose device is not there, is no matter here: what
/// is missed is noticed where it is used.
fn load_modules(directory: &Path) {
    let mut paths: Vec<PathBuf> = fs::read_dir(directory).into_iter().flatten().flatten().map(|e| e.path()).collect();
    paths.sort();
    for path in paths {
        let loaded = fs::File::open(&path).and_then(|file| Ok(rustix::system::finit_module(&file, c"", 0)?));
        if let Err(error) = loaded
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            eprintln!("atoll-guest: {}: {error}", path.display());
        }
    }
}

/// In the root of our own.
pub fn second() -> io::Result<()> {
    let quiet = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    fresh("tmpfs", "/tmp", MountFlags::NOSUID | MountFlags::NODEV, "mode=1777")?;
    fresh("devpts", "/dev/pts", MountFlags::NOSUID | MountFlags::NOEXEC, "ptmxmode=0666,mode=0620,gid=5")?;
    fresh("tmpfs", "/dev/shm", quiet, "mode=1777")?;
    fresh("mqueue", "/dev/mqueue", quiet, "")?;
    fresh("cgroup2", "/sys/fs/cgroup", quiet, "")?;
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        let _ = std::os::unix::fs::symlink(target, Path::new("/dev").join(link));
    }
    for directory in [IMAGES, VOLUMES, LOGS, STATE, RUN] {
        fs::create_dir_all(directory).map_err(at(directory))?;
    }
    // as in a namespace of the node's router: any port, ping for all, and only the addresses that are given
    for (name, value) in [
        ("net/ipv4/ip_unprivileged_port_start", "0"),
        ("net/ipv4/ping_group_range", "0 2147483647"),
        ("net/ipv6/conf/all/accept_ra", "0"),
        ("net/ipv6/conf/default/accept_ra", "0"),
        ("net/ipv6/conf/default/addr_gen_mode", "1"),
        ("kernel/panic_on_oops", "1"),
    ] {
        let _ = fs::write(Path::new("/proc/sys").join(name), value);
    }
    Ok(())
}

/// Waits for something to appear.
pub fn wait_for<T>(look: impl Fn() -> Option<T>) -> Option<T> {
    let until = Instant::now() + DEVICES;
    loop {
        match look() {
            None if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
            found => return found,
        }
    }
}

/// The device of the host's line; `None` if the machine has none.
pub fn serial_port() -> Option<PathBuf> {
    let look = || {
        fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten().find_map(|entry| {
            let name = fs::read_to_string(entry.path().join("name")).ok()?;
            (name.trim_end() == PORT_NAME).then(|| Path::new("/dev").join(entry.file_name()))
        })
    };
    // ports are announced one by one after the device, so that none yet says nothing
    if has_vsock() {
        return None;
    }
    wait_for(|| look().filter(|path| path.exists()))
}

/// Virtio 1.2, 5: device 19.
fn has_vsock() -> bool {
    fs::read_dir("/sys/bus/virtio/devices")
        .into_iter()
        .flatten()
        .flatten()
        .any(|entry| fs::read_to_string(entry.path().join("device")).is_ok_and(|kind| kind.trim_end() == "0x0013"))
}

/// The block device with a serial number.
pub fn disk(serial: &str) -> Option<PathBuf> {
    wait_for(|| {
        fs::read_dir("/sys/block").into_iter().flatten().flatten().find_map(|entry| {
            let text = fs::read_to_string(entry.path().join("serial")).ok()?;
            let device = Path::new("/dev").join(entry.file_name());
            (text.trim_end() == serial && device.exists()).then_some(device)
        })
    })
}

/// Ends the machine; does nothing where this is not process 1.
pub fn power_off() {
    if std::process::id() == 1 {
        rustix::fs::sync();
        let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    }
}
