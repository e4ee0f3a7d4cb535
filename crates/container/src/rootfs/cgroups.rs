//! What a container sees at `/sys/fs/cgroup`.

use super::attach::{make, place, plain_target, target};
use super::prepare::PreparedMount;
use crate::cgroup::Hierarchies;
use crate::error::{During, Result};
use crate::sys::{MountAttr, mount_setattr};
use libc::MOUNT_ATTR_RDONLY;
use rustix::fs::{CWD, symlinkat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag, fsmount, fsopen,
    open_tree,
};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// The container's own view of its control groups: version 2 alone, or a directory for each version 1 controller.
/// Programs size themselves by it. Where it cannot be had, the directory stays empty. `shown`: the group to show of the
/// host's tree, because there is no cgroup namespace.
pub fn mount(root: BorrowedFd<'_>, mount: &PreparedMount, found: &Hierarchies, shown: Option<&Path>) -> Result<()> {
    let set = mount.options.set_at_top();
    let new = |kind: &str, flags: &[&str], on_host: &Path| -> rustix::io::Result<OwnedFd> {
        if let Some(path) = shown {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let tree = open_tree(CWD, on_host.join(path), flags)?;
            let attr = MountAttr { set, propagation: libc::MS_PRIVATE, ..Default::default() };
            mount_setattr(tree.as_fd(), false, &attr).map_err(|_| rustix::io::Errno::PERM)?;
            return Ok(tree);
        }
        let fs = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        for flag in flags {
            fsconfig_set_flag(&fs, *flag)?;
        }
        fsconfig_create(&fs)?;
        fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::from_bits_retain(set as u32))
    };
    if found.v1.is_empty() {
        let on_host = found.v2.as_ref().map(|v| v.mount.as_path()).unwrap_or(Path::new("/sys/fs/cgroup"));
        if let Ok(tree) = new("cgroup2", &[], on_host) {
            place(&tree, &plain_target(root, &mount.destination)?).during(|| "attaching".into())?;
        }
        return Ok(());
    }
    let mut holder = PreparedMount {
        destination: mount.destination.clone(),
        kind: "tmpfs".into(),
        options: mount.options.clone(),
        from: Default::default(),
        source: None,
    };
    holder.options.set &= !MOUNT_ATTR_RDONLY;
    holder.options.data = vec![("mode".into(), Some("755".into())), ("size".into(), Some("64k".into()))];
    let tree = make("tmpfs", &holder, false)?;
    place(&tree, &plain_target(root, &mount.destination)?).during(|| "attaching".into())?;
    for hierarchy in &found.v1 {
        let controllers: Vec<&str> = hierarchy.controllers.iter().map(String::as_str).collect();
        let Ok(view) = new("cgroup", &controllers, &hierarchy.mount) else { continue };
        let name = controllers.join(",");
        place(&view, &target(root, &mount.destination.join(&name), true)?).during(|| format!("attaching {name}"))?;
        for alias in controllers.iter().filter(|_| controllers.len() > 1) {
            let _ = symlinkat(&name, &tree, *alias);
        }
    }
    mount_setattr(tree.as_fd(), false, &MountAttr { set: MOUNT_ATTR_RDONLY, ..Default::default() })
        .during(|| "making it read-only".into())
}
