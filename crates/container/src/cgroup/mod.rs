//! Control groups, whichever way the host has them: version 2 alone, version 1 alone, or both side by side (each
//! version 1 controller on a mount of its own and a version 2 tree, often without controllers). A group here is one
//! path below every one of those mounts. A controller that is missing is skipped; setting a limit for it says so.

mod devices;
mod limits;
mod stats;

pub use devices::{DefaultDevices, always_allowed, default_rules};
pub use stats::Stats;

use crate::error::{During, Error, Result};
use crate::spec::Resources;
use crate::sys::SingleThreaded;
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

/// What is used of version 1; the other controllers keep their tasks where they are.
const V1_CONTROLLERS: &[&str] = &["cpu", "cpuacct", "memory", "pids", "devices", "freezer"];
const V2_CONTROLLERS: &[&str] = &["cpu", "memory", "pids"];
/// What a bundle's configuration may ask for besides; the names are those of version 1.
const MORE_CONTROLLERS: &[&str] = &["cpuset", "blkio", "hugetlb", "net_cls", "net_prio", "rdma"];

/// The mounted trees of this host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hierarchies {
    pub v1: Vec<V1>,
    pub v2: Option<V2>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct V1 {
    pub controllers: Vec<String>,
    pub mount: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct V2 {
    pub controllers: Vec<String>,
    pub mount: PathBuf,
}

impl Hierarchies {
    pub fn discover() -> Result<Self> {
        Self::discover_with(&[])
    }

    /// What a bundle's configuration needs.
    pub fn discover_for(resources: &Resources) -> Result<Self> {
        let cpu = resources.cpu.as_ref();
        let asked = |controller: &str| match controller {
            "cpuset" => {
                cpu.is_some_and(|c| [&c.cpus, &c.mems].iter().any(|l| l.as_ref().is_some_and(|l| !l.is_empty())))
            }
            "blkio" => resources.block_io.is_some(),
            "hugetlb" => !resources.hugepage_limits.is_empty(),
            "net_cls" => resources.network.as_ref().is_some_and(|n| n.class_id.is_some()),
            "net_prio" => resources.network.as_ref().is_some_and(|n| !n.priorities.is_empty()),
            _ => !resources.rdma.is_empty(),
        };
        let more: Vec<&str> = MORE_CONTROLLERS.iter().copied().filter(|c| asked(c)).collect();
        Self::discover_with(&more)
    }

    fn discover_with(more: &[&str]) -> Result<Self> {
        const ROOT: &str = "/sys/fs/cgroup";
        const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;
        // Where version 2 is all there is, the list of mounts need not be made for us, which takes the kernel a while.
        if rustix::fs::statfs(ROOT).is_ok_and(|fs| fs.f_type as u64 == CGROUP2_SUPER_MAGIC) {
            let mut found = Self { v1: Vec::new(), v2: Some(V2 { controllers: Vec::new(), mount: ROOT.into() }) };
            found.read_controllers(more);
            return Ok(found);
        }
        let text = fs::read_to_string("/proc/self/mountinfo").during(|| "reading /proc/self/mountinfo".into())?;
        // Mounts may be covered by others: what counts is what is found at the path.
        let mut found = Self::parse(&text, more, &|mount, file| mount.join(file).exists());
        found.read_controllers(more);
        Ok(found)
    }

    fn read_controllers(&mut self, more: &[&str]) {
        if let Some(v2) = &mut self.v2 {
            let text = fs::read_to_string(v2.mount.join("cgroup.controllers")).unwrap_or_default();
            let known =
                |c: &&str| V2_CONTROLLERS.contains(c) || more.contains(c) || (*c == "io" && more.contains(&"blkio"));
            v2.controllers = words(&text).filter(known).map(str::to_owned).collect();
        }
    }

    /// proc_pid_mountinfo(5): id, parent, device, root, mount point, options, optional fields, `-`, type, source,
    /// super options.
    fn parse(mountinfo: &str, more: &[&str], is_there: &dyn Fn(&Path, &str) -> bool) -> Self {
        let mut found = Self::default();
        for line in mountinfo.lines() {
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let (mut left, mut right) = (left.split(' ').skip(3), right.split(' '));
            let (Some(root), Some(point)) = (left.next(), left.next()) else { continue };
            let (Some(kind), Some(options)) = (right.next(), right.nth(1)) else { continue };
            if root != "/" {
                continue;
            }
            match kind {
                "cgroup2" if found.v2.is_none() && is_there(Path::new(point), "cgroup.controllers") => {
                    found.v2 = Some(V2 { controllers: Vec::new(), mount: point.into() });
                }
                "cgroup" if is_there(Path::new(point), "cgroup.procs") => {
                    let controllers: Vec<String> = options
                        .split(',')
                        .filter(|o| V1_CONTROLLERS.contains(o) || more.contains(o))
                        .map(str::to_owned)
                        .collect();
                    let known = |c: &String| found.v1.iter().any(|h| h.controllers.contains(c));
                    if !controllers.is_empty() && !controllers.iter().any(known) {
                        found.v1.push(V1 { controllers, mount: point.into() });
                    }
                }
                _ => {}
            }
        }
        found
    }

    /// With the tree in which systemd keeps account where version 2 is not used: a scope lives as long as it has processes there.
    pub fn with_systemd(mut self) -> Result<Self> {
        if self.v1.is_empty() {
            return Ok(self);
        }
        const NAME: &str = "name=systemd";
        let found = Self::discover_with(&[NAME])?;
        self.v1.extend(found.v1.into_iter().filter(|h| h.controllers.iter().any(|c| c == NAME)));
        Ok(self)
    }

    pub fn is_empty(&self) -> bool {
        self.v1.is_empty() && self.v2.is_none()
    }

    fn v1(&self, controller: &str) -> Option<&Path> {
        self.v1.iter().find(|h| h.controllers.iter().any(|c| c == controller)).map(|h| h.mount.as_path())
    }

    fn v2(&self, controller: &str) -> Option<&Path> {
        let controller = if controller == "blkio" { "io" } else { controller };
        self.v2.as_ref().filter(|v| v.controllers.iter().any(|c| c == controller)).map(|v| v.mount.as_path())
    }

    fn mounts(&self) -> impl Iterator<Item = &Path> {
        self.v1.iter().map(|h| h.mount.as_path()).chain(self.v2.iter().map(|v| v.mount.as_path()))
    }
}

/// A control group: one relative path in all hierarchies.
#[derive(Clone, Debug)]
pub struct Cgroup {
    hierarchies: Hierarchies,
    path: PathBuf,
}

impl Cgroup {
    /// Names a group; it need not exist.
    pub fn new(hierarchies: Hierarchies, path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let plain = path.components().all(|c| matches!(c, Component::Normal(_)));
        if !plain || path.as_os_str().is_empty() {
            return Err(Error::Refused(format!("cgroup {path:?}: must be a relative path without `.` and `..`")));
        }
        Ok(Self { hierarchies, path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn hierarchies(&self) -> &Hierarchies {
        &self.hierarchies
    }

    pub fn child(&self, name: &str) -> Result<Self> {
        Self::new(self.hierarchies.clone(), self.path.join(name))
    }

    /// The group beside this one.
    pub fn sibling(&self, name: &str) -> Result<Self> {
        Self::new(self.hierarchies.clone(), self.path.with_file_name(name))
    }

    /// Whether a process joins this group by moves, one for each hierarchy of version 1, and is not just born in it.
    pub fn has_v1(&self) -> bool {
        !self.hierarchies.v1.is_empty()
    }

    /// Makes what is missing in the hierarchies of version 1 of a group that systemd has made.
    pub fn create_in_version_1(&self) -> Result<()> {
        for hierarchy in &self.hierarchies.v1 {
            make(&hierarchy.mount.join(&self.path))?;
            if hierarchy.controllers.iter().any(|c| c == "cpuset") {
                self.inherit_cpuset(&hierarchy.mount);
            }
        }
        Ok(())
    }

    /// Makes the directories; on version 2 lets the controllers through on the way down.
    pub fn create(&self) -> Result<()> {
        self.create_in_version_1()?;
        let Some(v2) = &self.hierarchies.v2 else { return Ok(()) };
        let wanted: Vec<String> = v2.controllers.iter().map(|c| format!("+{c}")).collect();
        let mut directory = v2.mount.clone();
        for part in &self.path {
            if !wanted.is_empty() {
                // Refused where processes sit in the parent; then the limits say what is missing.
                let _ = fs::write(directory.join("cgroup.subtree_control"), wanted.join(" "));
            }
            directory.push(part);
            make(&directory)?;
        }
        Ok(())
    }

    /// A new version 1 cpuset is empty, and takes no process before it is not.
    fn inherit_cpuset(&self, mount: &Path) {
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let mut directory = mount.to_owned();
            let mut above = fs::read_to_string(directory.join(file)).unwrap_or_default();
            for part in &self.path {
                directory.push(part);
                let own = fs::read_to_string(directory.join(file)).unwrap_or_default();
                if own.trim().is_empty() {
                    let _ = fs::write(directory.join(file), above.trim());
                } else {
                    above = own;
                }
            }
        }
    }

    /// Moves the calling process here, in every version 1 hierarchy; in version 2 too if `with_v2`.
    ///
    /// Its one thread moves by itself (`tasks`), for which the kernel does not stop all forks; through `cgroup.procs`
    /// each move may wait 20 ms for that. Version 2 has no such file.
    pub fn join(&self, _alone: SingleThreaded, with_v2: bool) -> Result<()> {
        let v1 = self.hierarchies.v1.iter().map(|h| (h.mount.as_path(), "tasks"));
        let v2 = self.hierarchies.v2.iter().filter(|_| with_v2).map(|v| (v.mount.as_path(), "cgroup.procs"));
        for (mount, file) in v1.chain(v2) {
            let file = mount.join(&self.path).join(file);
            fs::write(&file, "0").during(|| format!("joining cgroup {}", file.display()))?;
        }
        Ok(())
    }

    /// Moves another process here.
    pub fn admit(&self, pid: i32) -> Result<()> {
        for mount in self.hierarchies.mounts() {
            let file = mount.join(&self.path).join("cgroup.procs");
            fs::write(&file, pid.to_string()).during(|| format!("joining cgroup {}", file.display()))?;
        }
        Ok(())
    }

    /// The version 2 directory, for `CLONE_INTO_CGROUP`.
    pub fn v2_directory(&self) -> Option<OwnedFd> {
        use rustix::fs::{Mode, OFlags, open};
        let directory = self.hierarchies.v2.as_ref()?.mount.join(&self.path);
        open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()
    }

    /// The same, for what needs it opened to be read.
    fn v2_directory_to_use(&self) -> Option<OwnedFd> {
        use rustix::fs::{Mode, OFlags, open};
        let directory = self.hierarchies.v2.as_ref()?.mount.join(&self.path);
        open(directory, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()
    }

    /// Pids in this group and those below it.
    pub fn pids(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        for mount in self.hierarchies.mounts() {
            collect(&mount.join(&self.path), &mut pids, 0);
        }
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// Kills all that is in here and below, and waits until it is gone. False if something is still there at the
    /// deadline.
    pub fn kill(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        self.thaw();
        loop {
            if let Some(v2) = &self.hierarchies.v2 {
                let _ = fs::write(v2.mount.join(&self.path).join("cgroup.kill"), "1");
            }
            let pids = self.pids();
            if pids.is_empty() {
                return true;
            }
            for pid in pids.into_iter().filter(|p| *p > 1).filter_map(Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Asks for all to be killed and does not wait.
    pub fn kill_now(&self) {
        self.kill(Duration::ZERO);
    }

    pub fn freeze(&self) -> Result<()> {
        self.set_frozen(true)
    }

    pub fn thaw(&self) {
        let _ = self.set_frozen(false);
    }

    pub fn is_frozen(&self) -> bool {
        if let Some(v2) = &self.hierarchies.v2
            && let Ok(text) = fs::read_to_string(v2.mount.join(&self.path).join("cgroup.freeze"))
        {
            return text.trim() == "1";
        }
        self.hierarchies
            .v1("freezer")
            .and_then(|mount| fs::read_to_string(mount.join(&self.path).join("freezer.state")).ok())
            .is_some_and(|text| text.trim() != "THAWED")
    }

    /// Freezes and waits until every process stands still.
    pub fn freeze_whole(&self, patience: Duration) -> Result<()> {
        self.freeze()?;
        let deadline = Instant::now() + patience;
        while !self.stands_still() {
            if Instant::now() >= deadline {
                self.thaw();
                return Err(Error::Refused(format!("not all processes stopped within {patience:?}; none is now")));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn stands_still(&self) -> bool {
        if let Some(v2) = &self.hierarchies.v2
            && let Ok(text) = fs::read_to_string(v2.mount.join(&self.path).join("cgroup.events"))
            && text.contains("frozen ")
        {
            return text.lines().any(|l| l == "frozen 1");
        }
        let state = |mount: &Path| fs::read_to_string(mount.join(&self.path).join("freezer.state"));
        self.hierarchies.v1("freezer").is_some_and(|mount| state(mount).is_ok_and(|t| t.trim() == "FROZEN"))
    }

    fn set_frozen(&self, frozen: bool) -> Result<()> {
        if let Some(v2) = &self.hierarchies.v2 {
            let file = v2.mount.join(&self.path).join("cgroup.freeze");
            if file.exists() {
                return fs::write(&file, if frozen { "1" } else { "0" })
                    .during(|| format!("writing {}", file.display()));
            }
        }
        let Some(mount) = self.hierarchies.v1("freezer") else {
            return Err(Error::Refused("this host has no freezer among its control groups".into()));
        };
        let file = mount.join(&self.path).join("freezer.state");
        fs::write(&file, if frozen { "FROZEN" } else { "THAWED" }).during(|| format!("writing {}", file.display()))
    }

    /// Removes the group if nothing is in it; false if something is.
    pub fn remove_empty(&self) -> bool {
        let gone = |mount: &Path| match fs::remove_dir(mount.join(&self.path)) {
            Err(e) => e.kind() == io::ErrorKind::NotFound,
            Ok(()) => true,
        };
        self.hierarchies.mounts().all(gone)
    }

    /// Removes the directories, deepest first, waiting for the kernel to let go of those just emptied.
    pub fn remove(&self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        for mount in self.hierarchies.mounts() {
            let directory = mount.join(&self.path);
            loop {
                match remove_tree(&directory, 0) {
                    Ok(()) => break,
                    Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    Err(e) => return Err(Error::step(format!("removing cgroup {}", directory.display()), e)),
                }
            }
        }
        Ok(())
    }

    /// Removes the directories above that this one was the last in, up to the first level.
    pub fn remove_empty_parents(&self) {
        for mount in self.hierarchies.mounts() {
            for parent in self.path.ancestors().skip(1).filter(|p| !p.as_os_str().is_empty()) {
                if fs::remove_dir(mount.join(parent)).is_err() {
                    break;
                }
            }
        }
    }
}

fn make(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).during(|| format!("making cgroup {}", directory.display()))
}

/// Groups are nested by containers at most, and only where the version 2 tree is delegated to them.
const MAX_DEPTH: usize = 32;

fn collect(directory: &Path, pids: &mut Vec<i32>, depth: usize) {
    if let Ok(text) = fs::read_to_string(directory.join("cgroup.procs")) {
        pids.extend(text.lines().filter_map(|l| l.trim().parse::<i32>().ok()));
    }
    if depth < MAX_DEPTH {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                collect(&entry.path(), pids, depth + 1);
            }
        }
    }
}

fn remove_tree(directory: &Path, depth: usize) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    for entry in entries.flatten() {
        if depth < MAX_DEPTH && entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_tree(&entry.path(), depth + 1)?;
        }
    }
    match fs::remove_dir(directory) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split_ascii_whitespace()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_each_layout() {
        let hybrid = "\
26 25 0:23 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
27 26 0:24 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
28 26 0:25 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
29 26 0:26 / /sys/fs/cgroup/systemd rw,relatime - cgroup systemd rw,name=systemd
30 26 0:27 /sub /mnt/pids rw,relatime - cgroup cgroup rw,pids
31 26 0:28 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
        let found = Hierarchies::parse(hybrid, &[], &|_, _| true);
        assert_eq!(found.v1.len(), 2);
        assert_eq!(found.v1("cpuacct"), Some(Path::new("/sys/fs/cgroup/cpu,cpuacct")));
        assert_eq!(found.v1("pids"), None);
        assert_eq!(found.v2.as_ref().map(|v| v.mount.as_path()), Some(Path::new("/sys/fs/cgroup/unified")));
        let covered = Hierarchies::parse(hybrid, &[], &|mount, _| mount == Path::new("/sys/fs/cgroup/unified"));
        assert!(covered.v1.is_empty() && covered.v2.is_some());
        let pure =
            Hierarchies::parse("35 25 0:30 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n", &[], &|_, _| true);
        assert!(pure.v1.is_empty() && pure.v2.is_some());
    }

    #[test]
    fn paths_stay_below_the_mounts() {
        for bad in ["", "/a", "../a", "a/../../b"] {
            assert!(Cgroup::new(Hierarchies::default(), bad).is_err(), "{bad}");
        }
    }
}
