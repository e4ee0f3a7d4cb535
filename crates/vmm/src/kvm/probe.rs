//! What kind of KVM this computer has, measured. A `/dev/kvm` that only emulates kernel-mode code is worse than QEMU's
//! translator, so finding the device is not enough: a short kernel-mode loop is timed, beside the same loop in this process.
//!
//! Two lengths of the loop tell its pace without what entering and leaving a guest takes; the shortest of several runs of
//! each, what it takes where nobody interferes. Guest and host are measured in turn, so that what slows both is in both.

use crate::sys::{self, GuestPage};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

/// Loop turns of the measuring guest. Emulated, the long one takes tens of milliseconds.
const SHORT: u32 = 1_000;
const LONG: u32 = 20_000;
/// Where the long one is over sooner than this, there is time for one that is longer and so tells more.
const SOON: Duration = Duration::from_millis(4);
const LONGER: u32 = 400_000;
const TRIES: usize = 5;
/// A guest whose turns take so many times as long as the host's is not running natively. Native: about 1, in a translated
/// machine up to 5; emulated: hundreds.
const EMULATED: f64 = 20.0;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Support {
    Absent {
        why: String,
    },
    /// The device works, but guest kernel code is emulated at about this many instructions a second.
    Emulated {
        instructions_per_second: f64,
    },
    Hardware {
        instructions_per_second: f64,
    },
}

/// Takes a few milliseconds with hardware, up to about 200 ms emulated.
pub fn probe() -> Support {
    match measure() {
        Ok(pace) if pace.guest < pace.host * EMULATED => Support::Hardware { instructions_per_second: pace.speed() },
        Ok(pace) => Support::Emulated { instructions_per_second: pace.speed() },
        Err(why) => Support::Absent { why },
    }
}

/// What a measurement holds for.
#[derive(PartialEq, Serialize, Deserialize)]
struct Computer {
    version: u32,
    boot: String,
    kernel: String,
    /// Which processors there are.
    processor: String,
    /// The device as it was made when its module was loaded: number, inode, change time.
    device: (u64, u64, i64, i64),
}

impl Computer {
    fn here() -> Option<Computer> {
        let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).ok();
        let device = fs::metadata("/dev/kvm").ok()?;
        let processor = read("/proc/cpuinfo")?;
        let processor = processor.lines().find(|line| line.starts_with("model name")).unwrap_or_default().to_owned();
        Some(Computer {
            version: 1,
            boot: read("/proc/sys/kernel/random/boot_id")?,
            kernel: read("/proc/sys/kernel/osrelease")?,
            processor,
            device: (device.rdev(), device.ino(), device.ctime(), device.ctime_nsec()),
        })
    }
}

/// As [`probe`], measured once for each boot and device: what was found is kept in the file `cache`, which root alone writes.
/// That there is no KVM is not kept; it is quick to see.
pub fn probe_once(cache: &Path) -> Support {
    let Some(here) = Computer::here() else { return probe() };
    let kept = fs::metadata(cache).ok().filter(|file| file.uid() == 0 && file.len() < 4096);
    let kept = kept.and_then(|_| serde_json::from_slice::<(Computer, Support)>(&fs::read(cache).ok()?).ok());
    if let Some((_, support)) = kept.filter(|(computer, _)| *computer == here)
        // who may use it may have changed since
        && Kvm::new().is_ok()
    {
        return support;
    }
    let support = probe();
    if !matches!(support, Support::Absent { .. }) {
        let _ = keep(cache, &(here, &support));
    }
    support
}

fn keep(cache: &Path, what: &impl Serialize) -> std::io::Result<()> {
    let new = cache.with_extension(format!("new-{}", std::process::id()));
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(&new)?;
    let written = file.write_all(&serde_json::to_vec(what)?).and_then(|()| fs::rename(&new, cache));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}

/// Seconds that a turn takes.
struct Pace {
    guest: f64,
    host: f64,
}

impl Pace {
    /// Two instructions a turn. Whole ones: those are the same after a way through JSON.
    fn speed(&self) -> f64 {
        (2.0 / self.guest.max(1e-12)).round()
    }
}

fn measure() -> Result<Pace, String> {
    let say = |what: &'static str| move |e: kvm_ioctls::Error| format!("{what}: {e}");
    let kvm = Kvm::new().map_err(say("/dev/kvm"))?;
    let vm = kvm.create_vm().map_err(say("create a VM"))?;
    let page = GuestPage::new().map_err(|e| format!("map guest memory: {e}"))?;
    page.write(&looping());
    let region = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: 0x1000,
        memory_size: page.len() as u64,
        userspace_addr: page.address(),
        flags: 0,
    };
    page.give_to(&vm, region).map_err(say("give memory to the VM"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(say("create a vCPU"))?;
    let mut sregs = vcpu.get_sregs().map_err(say("read registers"))?;
    sregs.cr0 |= 1;
    for (segment, kind) in [(&mut sregs.cs, 11), (&mut sregs.ds, 3), (&mut sregs.es, 3), (&mut sregs.ss, 3)] {
        (segment.base, segment.limit, segment.type_) = (0, 0xffff_ffff, kind);
        (segment.selector, segment.present, segment.s, segment.db, segment.g) = (8, 1, 1, 1, 1);
        segment.dpl = 0;
    }
    vcpu.set_sregs(&sregs).map_err(say("set registers"))?;
    // the first entry takes long by itself
    time(&mut vcpu, SHORT)?;
    let first = time(&mut vcpu, LONG)?;
    let long = if first < SOON { LONGER } else { LONG };
    let mut best = [Duration::MAX; 4];
    for _ in 0..TRIES {
        let runs = [time(&mut vcpu, SHORT)?, time(&mut vcpu, long)?, host(SHORT), host(long)];
        for (best, run) in best.iter_mut().zip(runs) {
            *best = (*best).min(run);
        }
    }
    let [guest_short, guest_long, host_short, host_long] = best;
    let turn = |short: Duration, long_run: Duration| {
        long_run.saturating_sub(short).as_secs_f64().max(1e-9) / f64::from(long - SHORT)
    };
    Ok(Pace { guest: turn(guest_short, guest_long), host: turn(host_short, host_long) })
}

/// again: dec ecx; jnz again; hlt   (32-bit flat protected mode, CPL 0)
fn looping() -> Vec<u8> {
    vec![0x49, 0x75, 0xfd, 0xf4]
}

fn host(turns: u32) -> Duration {
    let begun = Instant::now();
    sys::count_down(turns);
    begun.elapsed()
}

fn time(vcpu: &mut VcpuFd, turns: u32) -> Result<Duration, String> {
    let say = |what: &'static str| move |e: kvm_ioctls::Error| format!("{what}: {e}");
    let mut regs = vcpu.get_regs().map_err(say("read registers"))?;
    (regs.rip, regs.rflags, regs.rcx) = (0x1000, 2, u64::from(turns));
    vcpu.set_regs(&regs).map_err(say("set registers"))?;
    let begun = Instant::now();
    match vcpu.run().map_err(say("run"))? {
        VcpuExit::Hlt => Ok(begun.elapsed()),
        other => Err(format!("the measuring guest stopped with {other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(support: &Support) -> u8 {
        match support {
            Support::Absent { .. } => 0,
            Support::Emulated { .. } => 1,
            Support::Hardware { .. } => 2,
        }
    }

    #[test]
    fn the_answer_is_the_same_under_load() {
        let idle = probe();
        println!("{idle:?}");
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let load: Vec<_> = (0..2 * cores)
            .map(|_| {
                let stop = stop.clone();
                std::thread::spawn(move || while !stop.load(std::sync::atomic::Ordering::Relaxed) {})
            })
            .collect();
        let busy: Vec<Support> = (0..5).map(|_| probe()).collect();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        load.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(busy.iter().all(|each| kind(each) == kind(&idle)), "{idle:?} idle, {busy:?} busy");
    }

    #[test]
    fn what_was_measured_is_kept_for_this_boot_and_device() {
        if !rustix::process::getuid().is_root() {
            println!("SKIPPED: needs root, which alone is believed");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("kvm");
        let first = probe_once(&cache);
        if matches!(first, Support::Absent { .. }) {
            assert!(!cache.exists());
            println!("SKIPPED: no KVM: {first:?}");
            return;
        }
        assert_eq!(probe_once(&cache), first, "to the last digit: not measured again");
        let fake = Support::Hardware { instructions_per_second: 1.0 };
        let mut other = Computer::here().unwrap();
        keep(&cache, &(Computer::here().unwrap(), &fake)).unwrap();
        assert_eq!(probe_once(&cache), fake);
        other.boot = "another".into();
        keep(&cache, &(other, &fake)).unwrap();
        assert_ne!(probe_once(&cache), fake);
        std::os::unix::fs::chown(&cache, Some(1), None).unwrap();
        assert_ne!(probe_once(&cache), fake);
        fs::write(&cache, b"{").unwrap();
        assert_eq!(kind(&probe_once(&cache)), kind(&first));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
    }
}
