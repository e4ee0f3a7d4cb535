//! A container's mounts as they are in the guest: what has to be sent there first, and where it is then.

use super::*;
use guest::protocol::{Request, VOLUMES};
use guest::tree;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Below [`VOLUMES`], where no volume's name can be: files of the pod that are mounted one by one.
const POD: &str = ".pod";

/// Where a file of the pod's directory is in the guest.
pub fn place(pod: &Path, path: &Path) -> PathBuf {
    Path::new(VOLUMES).join(POD).join(path.strip_prefix(pod).unwrap_or(path))
}

fn refused(message: String) -> BoundaryError {
    BoundaryError::Refused { reason: "CreateContainerError".into(), message }
}

fn failed(path: &Path) -> impl Fn(std::io::Error) -> BoundaryError {
    move |e| refused(format!("{}: {e}", path.display()))
}

/// Files of a volume, or one file.
fn files(source: &Path, target: &Path) -> Result<Request> {
    tree::read(source, target).map(Request::Files).map_err(failed(source))
}

/// What to ask of the guest before the container starts, and its mounts there. Blocks.
pub fn of_container(sandbox: &SandboxSpec, container: &ContainerSpec) -> Result<(Vec<Request>, Vec<Mount>)> {
    let mut requests = Vec::new();
    let mut mounts = Vec::new();
    for mount in &container.mounts {
        let mut mount = mount.clone();
        match (&mount.source, &mount.volume) {
            (MountSource::Host(path), _) => {
                return Err(refused(format!(
                    "container {}: volumeMounts: {}: hostPath {} is on the host, which a machine of its own does not \
                     reach; use configMap, secret, projected, downwardAPI or emptyDir, or another runtimeClassName",
                    container.name,
                    mount.target.display(),
                    path.display()
                )));
            }
            (MountSource::Tmpfs { .. }, _) => {}
            (MountSource::Pod(path), Some(volume)) if !volume.files => {
                let root = Path::new(VOLUMES).join(&volume.name);
                let meta = std::fs::metadata(sandbox.dir.join("volumes").join(&volume.name)).map_err(failed(path))?;
                requests.push(Request::Directory {
                    path: root.to_string_lossy().into_owned(),
                    sub: volume.sub_path.clone(),
                    mode: meta.mode() & 0o7777,
                    group: meta.gid(),
                });
                mount.source = MountSource::Pod(root.join(&volume.sub_path));
            }
            (MountSource::Pod(path), Some(volume)) if volume.sub_path.is_empty() => {
                let target = Path::new(VOLUMES).join(&volume.name);
                requests.push(files(path, &target)?);
                mount.source = MountSource::Pod(target);
            }
            (MountSource::Pod(path), _) => {
                let target = place(&sandbox.dir, path);
                requests.push(files(path, &target)?);
                mount.source = MountSource::Pod(target);
            }
        }
        mounts.push(mount);
    }
    Ok((requests, mounts))
}

/// The volumes made of files, as they are now. Blocks.
pub fn changed(sandbox: &SandboxSpec) -> Result<Vec<Request>> {
    let dir = sandbox.dir.join("volumes");
    let mut requests = Vec::new();
    for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
        if std::fs::symlink_metadata(entry.path().join("..data")).is_ok() {
            requests.push(files(&entry.path(), &Path::new(VOLUMES).join(entry.file_name()))?);
        }
    }
    Ok(requests)
}

#[cfg(test)]
mod tests {
    use super::super::container::spec::tests::{container, pod};
    use super::*;

    #[test]
    fn mounts_lead_to_the_guests_own_files() {
        let dir = tempfile::tempdir().expect("directory");
        let mut sandbox = pod();
        sandbox.dir = dir.path().to_owned();
        for (path, text) in [("volumes/conf/key", "v"), ("etc/hosts", "127.0.0.1 localhost"), ("volumes/tmp/x", "")] {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().expect("parent")).expect("made");
            std::fs::write(path, text).expect("written");
        }
        let mount = |source: &str, target: &str, volume: Option<(&str, &str, bool)>| Mount {
            source: MountSource::Pod(dir.path().join(source)),
            target: target.into(),
            read_only: false,
            propagation: String::new(),
            volume: volume.map(|(name, sub_path, files)| PodVolume {
                name: name.into(),
                sub_path: sub_path.into(),
                files,
            }),
        };
        let one = container(|c| {
            c.mounts = vec![
                mount("volumes/conf", "/conf", Some(("conf", "", true))),
                mount("subpaths/c/0", "/tmp", Some(("tmp", "a/b", false))),
                mount("etc/hosts", "/etc/hosts", None),
            ];
        });
        let (requests, mounts) = of_container(&sandbox, &one).expect("mapped");
        let sources: Vec<PathBuf> = mounts
            .iter()
            .map(|m| match &m.source {
                MountSource::Pod(path) => path.clone(),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(sources, ["/volumes/conf", "/volumes/tmp/a/b", "/volumes/.pod/etc/hosts"].map(PathBuf::from));
        assert!(matches!(&requests[0], Request::Files(tree) if tree.entries.len() == 2));
        assert!(matches!(&requests[1], Request::Directory { path, sub, .. } if path == "/volumes/tmp" && sub == "a/b"));
        let host = container(|c| {
            c.mounts = vec![Mount { source: MountSource::Host("/etc".into()), ..mount("x", "/host", None) }];
        });
        let why = of_container(&sandbox, &host).expect_err("refused").to_string();
        assert!(why.contains("hostPath /etc"), "{why}");
    }
}
