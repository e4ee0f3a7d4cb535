//! A pod's volumes: what each is (pure), then made on disk below `DATA/pods/<uid>/volumes/<name>`.
//!
//! Files are owned by ids as the container sees them (0 to 65535); the boundary shifts them. Content of Secrets lies in
//! a tmpfs, never on disk. Volumes made of files are replaced as a whole by one atomic rename of `..data`, as kubelet
//! does it, and shown read-only.

pub(crate) mod payload;
pub(crate) mod subpath;
pub(crate) mod tree;

use crate::boundary::{Mount, MountSource, PodVolume};
use crate::env::{self, Facts};
use crate::quantity;
use crate::sources::{SourceKind, Sources};
use api::k8s::api::core::v1::{
    Container, DownwardAPIVolumeFile, KeyToPath, Pod, ServiceAccountTokenProjection, Volume, VolumeProjection,
};
use payload::FileEntry;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    #[error("{word} \"{name}\" not found")]
    NoSource { word: &'static str, name: String },
    #[error("{word} \"{name}\" references non-existent config key: {key}")]
    NoKey { word: &'static str, name: String, key: String },
    #[error("{0}")]
    Invalid(String),
    #[error(
        "volume type {0} is not supported on this node; use configMap, secret, emptyDir, hostPath, projected or downwardAPI"
    )]
    Unsupported(&'static str),
    #[error("hostPath type check failed: {path} is not {what}")]
    HostType { path: String, what: &'static str },
    #[error("no token for service account \"{account}\": {status}")]
    Token { account: String, status: api::Status },
    #[error("{operation} {path}")]
    Io {
        operation: &'static str,
        path: String,
        #[source]
        source: std::io::Error,
    },
}

pub(crate) fn io<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> VolumeError + 'a {
    move |source| VolumeError::Io { operation, path: path.display().to_string(), source }
}

/// An error with its causes, for events.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut at = error.source();
    while let Some(cause) = at {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        at = cause.source();
    }
    text
}

#[derive(Clone, Debug)]
pub(crate) enum VolumeKind {
    Files {
        files: Vec<FileEntry>,
        /// Kept in memory only.
        secret: bool,
    },
    EmptyDir {
        memory: bool,
        size: Option<u64>,
    },
    Host {
        path: PathBuf,
        kind: String,
    },
}

#[derive(Clone, Debug)]
pub(crate) struct VolumePlan {
    pub name: String,
    pub kind: VolumeKind,
}

/// Tokens by `token_key`.
pub(crate) type Tokens = BTreeMap<String, String>;

pub(crate) fn token_key(projection: &ServiceAccountTokenProjection) -> String {
    format!("{}\0{}", projection.audience.as_deref().unwrap_or(""), projection.expiration_seconds.unwrap_or(3600))
}

/// All service account token projections of a pod, with the volume that wants them.
pub(crate) fn token_projections(pod: &Pod) -> Vec<(String, ServiceAccountTokenProjection)> {
    let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    let sources = volumes.flat_map(|v| {
        let sources = v.projected.iter().flat_map(|p| p.sources.iter().flatten());
        sources.map(|source| (v.name.clone(), source.service_account_token.clone()))
    });
    sources.filter_map(|(volume, token)| Some((volume, token?))).collect()
}

pub(crate) struct PlanInput<'a> {
    pub pod: &'a Pod,
    pub sources: &'a Sources,
    pub facts: &'a Facts,
    pub tokens: &'a Tokens,
}

/// What every volume of the pod is; the name of the volume comes with the error.
pub(crate) fn plan(input: &PlanInput<'_>) -> Result<Vec<VolumePlan>, (String, VolumeError)> {
    let volumes = input.pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    volumes
        .map(|volume| {
            let kind = plan_one(input, volume).map_err(|e| (volume.name.clone(), e))?;
            Ok(VolumePlan { name: volume.name.clone(), kind })
        })
        .collect()
}

fn mode(value: Option<i32>, default: Option<i32>) -> u32 {
    u32::try_from(value.or(default).unwrap_or(0o644)).unwrap_or(0o644) & 0o777
}

fn plan_one(input: &PlanInput<'_>, volume: &Volume) -> Result<VolumeKind, VolumeError> {
    if !crate::config::is_plain_name(&volume.name) {
        return Err(VolumeError::Invalid(format!("volume name \"{}\" is not a DNS label", volume.name)));
    }
    if let Some(v) = &volume.config_map {
        let items = v.items.as_deref();
        let files = keys(input, SourceKind::ConfigMap, &v.name, items, v.default_mode, v.optional)?;
        return Ok(VolumeKind::Files { files, secret: false });
    }
    if let Some(v) = &volume.secret {
        let name = v.secret_name.as_deref().unwrap_or_default();
        let files = keys(input, SourceKind::Secret, name, v.items.as_deref(), v.default_mode, v.optional)?;
        return Ok(VolumeKind::Files { files, secret: true });
    }
    if let Some(v) = &volume.downward_api {
        let items = v.items.iter().flatten();
        let files = items.map(|i| downward(input, i, v.default_mode)).collect::<Result<_, _>>()?;
        return Ok(VolumeKind::Files { files, secret: false });
    }
    if let Some(v) = &volume.projected {
        let mut files = Vec::new();
        let mut secret = false;
        for source in v.sources.iter().flatten() {
            secret |= source.secret.is_some() || source.service_account_token.is_some();
            files.extend(projection(input, source, v.default_mode)?);
        }
        return Ok(VolumeKind::Files { files, secret });
    }
    if let Some(v) = &volume.empty_dir {
        let memory = v.medium.as_deref() == Some("Memory");
        let size = v.size_limit.as_ref().and_then(|q| quantity::value(&q.0)).filter(|s| *s > 0);
        // What is in memory counts against the pod's limit anyway.
        let limit = || input.pod.spec.as_ref().and_then(|s| crate::resources::of_pod(s, None).memory_limit);
        return Ok(VolumeKind::EmptyDir { memory, size: size.or_else(|| limit().filter(|_| memory)) });
    }
    if let Some(v) = &volume.host_path {
        let path = PathBuf::from(&v.path);
        if !path.is_absolute() || path.components().any(|c| c == std::path::Component::ParentDir) {
            return Err(VolumeError::Invalid(format!("hostPath.path \"{}\" must be absolute and without ..", v.path)));
        }
        return Ok(VolumeKind::Host { path, kind: v.type_.clone().unwrap_or_default() });
    }
    if unsupported(volume).is_none() && volume.image.is_none() {
        // No source at all means emptyDir.
        return Ok(VolumeKind::EmptyDir { memory: false, size: None });
    }
    Err(VolumeError::Unsupported(unsupported(volume).unwrap_or("image")))
}

fn unsupported(v: &Volume) -> Option<&'static str> {
    let table = [
        (v.persistent_volume_claim.is_some(), "persistentVolumeClaim"),
        (v.csi.is_some(), "csi"),
        (v.nfs.is_some(), "nfs"),
        (v.ephemeral.is_some(), "ephemeral"),
        (v.iscsi.is_some(), "iscsi"),
        (v.fc.is_some(), "fc"),
        (v.rbd.is_some(), "rbd"),
        (v.cephfs.is_some(), "cephfs"),
        (v.cinder.is_some(), "cinder"),
        (v.glusterfs.is_some(), "glusterfs"),
        (v.git_repo.is_some(), "gitRepo"),
        (v.flex_volume.is_some(), "flexVolume"),
        (v.aws_elastic_block_store.is_some(), "awsElasticBlockStore"),
        (v.azure_disk.is_some(), "azureDisk"),
        (v.azure_file.is_some(), "azureFile"),
        (v.gce_persistent_disk.is_some(), "gcePersistentDisk"),
        (v.portworx_volume.is_some(), "portworxVolume"),
        (v.vsphere_volume.is_some(), "vsphereVolume"),
    ];
    table.into_iter().find(|(is, _)| *is).map(|(_, name)| name)
}

fn keys(
    input: &PlanInput<'_>,
    kind: SourceKind,
    name: &str,
    items: Option<&[KeyToPath]>,
    default_mode: Option<i32>,
    optional: Option<bool>,
) -> Result<Vec<FileEntry>, VolumeError> {
    let optional = optional.unwrap_or(false);
    if !input.sources.exists(kind, name) {
        if optional {
            return Ok(Vec::new());
        }
        return Err(VolumeError::NoSource { word: kind.word(), name: name.to_owned() });
    }
    let Some(items) = items.filter(|i| !i.is_empty()) else {
        let all = input.sources.all(kind, name).into_iter();
        return all.map(|(key, bytes)| FileEntry::new(&key, bytes, mode(None, default_mode))).collect();
    };
    let mut files = Vec::new();
    for item in items {
        match input.sources.bytes(kind, name, &item.key) {
            Some(bytes) => files.push(FileEntry::new(&item.path, bytes, mode(item.mode, default_mode))?),
            None if optional => {}
            None => {
                let (word, name, key) = (kind.word(), name.to_owned(), item.key.clone());
                return Err(VolumeError::NoKey { word, name, key });
            }
        }
    }
    Ok(files)
}

fn downward(
    input: &PlanInput<'_>,
    item: &DownwardAPIVolumeFile,
    default_mode: Option<i32>,
) -> Result<FileEntry, VolumeError> {
    let text = if let Some(field) = &item.field_ref {
        env::pod_field(input.pod, field, input.facts)
    } else if let Some(resource) = &item.resource_field_ref {
        env::container_resource(input.pod, None, resource, input.facts)
    } else {
        Err(format!("downwardAPI item \"{}\" names no field", item.path))
    };
    FileEntry::new(&item.path, text.map_err(VolumeError::Invalid)?.into_bytes(), mode(item.mode, default_mode))
}

fn projection(
    input: &PlanInput<'_>,
    source: &VolumeProjection,
    default_mode: Option<i32>,
) -> Result<Vec<FileEntry>, VolumeError> {
    if let Some(v) = &source.config_map {
        return keys(input, SourceKind::ConfigMap, &v.name, v.items.as_deref(), default_mode, v.optional);
    }
    if let Some(v) = &source.secret {
        return keys(input, SourceKind::Secret, &v.name, v.items.as_deref(), default_mode, v.optional);
    }
    if let Some(v) = &source.downward_api {
        return v.items.iter().flatten().map(|i| downward(input, i, default_mode)).collect();
    }
    if let Some(v) = &source.service_account_token {
        let token = input.tokens.get(&token_key(v)).cloned().unwrap_or_default();
        return Ok(vec![FileEntry::new(&v.path, token.into_bytes(), mode(None, default_mode))?]);
    }
    Err(VolumeError::Unsupported("projected.clusterTrustBundle"))
}

pub(crate) fn dir(pod_dir: &Path, volume: &str) -> PathBuf {
    pod_dir.join("volumes").join(volume)
}

/// Makes one volume, or brings its files up to date. Idempotent. Blocks.
pub(crate) fn set_up(pod_dir: &Path, volume: &VolumePlan, fs_group: Option<u32>) -> Result<(), VolumeError> {
    let dir = dir(pod_dir, &volume.name);
    match &volume.kind {
        VolumeKind::Files { files, secret } => {
            std::fs::create_dir_all(&dir).map_err(io("make", &dir))?;
            if *secret && !tree::is_mounted(&dir) {
                // Without the right to mount it still is a directory that only root and the pod reach.
                if let Err(error) = tree::mount_tmpfs(&dir, Some(16 << 20), 0o755) {
                    tracing::warn!(dir = %dir.display(), "no tmpfs for a secret, it is kept on disk: {error}");
                }
            }
            payload::write(&dir, files, fs_group)
        }
        VolumeKind::EmptyDir { memory, size } => {
            let fresh = !dir.exists();
            std::fs::create_dir_all(&dir).map_err(io("make", &dir))?;
            let mounted = tree::is_mounted(&dir);
            if *memory && !mounted {
                tree::mount_tmpfs(&dir, *size, 0o777).map_err(io("mount a tmpfs at", &dir))?;
            }
            if fresh || (*memory && !mounted) {
                tree::own(&dir, fs_group, if fs_group.is_some() { 0o2777 } else { 0o777 })?;
            }
            Ok(())
        }
        VolumeKind::Host { path, kind } => host_path(path, kind),
    }
}

fn host_path(path: &Path, kind: &str) -> Result<(), VolumeError> {
    use std::os::unix::fs::FileTypeExt;
    let found = std::fs::metadata(path).ok().map(|m| m.file_type());
    let check = |ok: bool, what: &'static str| {
        if ok { Ok(()) } else { Err(VolumeError::HostType { path: path.display().to_string(), what }) }
    };
    match (kind, found) {
        ("" | "DirectoryOrCreate", None) => std::fs::create_dir_all(path).map_err(io("make", path)),
        ("", Some(_)) => Ok(()),
        ("FileOrCreate", None) => {
            std::fs::OpenOptions::new().create(true).append(true).open(path).map(drop).map_err(io("make", path))
        }
        ("DirectoryOrCreate" | "Directory", found) => check(found.is_some_and(|f| f.is_dir()), "a directory"),
        ("FileOrCreate" | "File", found) => check(found.is_some_and(|f| f.is_file()), "a file"),
        ("Socket", found) => check(found.is_some_and(|f| f.is_socket()), "a socket"),
        ("CharDevice", found) => check(found.is_some_and(|f| f.is_char_device()), "a character device"),
        ("BlockDevice", found) => check(found.is_some_and(|f| f.is_block_device()), "a block device"),
        (other, _) => Err(VolumeError::Invalid(format!("hostPath.type \"{other}\" is not known"))),
    }
}

/// The mounts of one container, `subPath`s resolved (and pinned by bind mounts). Blocks. `expand` expands
/// `subPathExpr`.
pub(crate) fn container_mounts(
    pod_dir: &Path,
    pod: &Pod,
    container: &Container,
    expand: &dyn Fn(&str) -> String,
    fs_group: Option<u32>,
) -> Result<Vec<Mount>, VolumeError> {
    let volumes: Vec<&Volume> = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten()).collect();
    let mut out = Vec::new();
    for (index, mount) in container.volume_mounts.iter().flatten().enumerate() {
        let volume = volumes.iter().find(|v| v.name == mount.name).ok_or_else(|| {
            let name = &mount.name;
            VolumeError::Invalid(format!("volumeMounts[{index}].name: \"{name}\" is not a volume of this pod"))
        })?;
        let target = PathBuf::from("/").join(&mount.mount_path);
        if target.components().any(|c| c == std::path::Component::ParentDir) {
            let path = &mount.mount_path;
            return Err(VolumeError::Invalid(format!(
                "volumeMounts[{index}].mountPath: \"{path}\" must not contain .."
            )));
        }
        let (root, host) = match &volume.host_path {
            Some(host) => (PathBuf::from(&host.path), true),
            None => (dir(pod_dir, &volume.name), false),
        };
        let ours = volume.config_map.is_some()
            || volume.secret.is_some()
            || volume.projected.is_some()
            || volume.downward_api.is_some();
        let sub = match (&mount.sub_path_expr, &mount.sub_path) {
            (Some(expr), _) if !expr.is_empty() => expand(expr),
            (_, Some(path)) => path.clone(),
            (_, None) => String::new(),
        };
        let of_pod = PodVolume { name: volume.name.clone(), sub_path: sub.clone(), files: ours };
        let path = if sub.is_empty() {
            root
        } else {
            let pin = pod_dir.join("subpaths").join(&container.name).join(index.to_string());
            subpath::pin(&root, Path::new(&sub), &pin, fs_group)?
        };
        out.push(Mount {
            source: if host { MountSource::Host(path) } else { MountSource::Pod(path) },
            target,
            read_only: ours || mount.read_only == Some(true),
            propagation: mount.mount_propagation.clone().unwrap_or_else(|| "None".into()),
            volume: (!host).then_some(of_pod),
        });
    }
    Ok(out)
}

#[cfg(test)]
mod tests;
