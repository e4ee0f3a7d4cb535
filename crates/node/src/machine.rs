//! Virtual machines: a pod of a machine boundary carries the KubeVirt instance spec in the annotation
//! `atoll.dev/machine`; here it becomes a [`MachineSpec`] with paths, sizes and texts.
//! <https://kubevirt.io/api-reference/main/definitions.html#_v1_virtualmachineinstancespec>

use crate::boundary::{CloudInit, Disk, GoOn, MachineSpec, Rootfs, SandboxNetwork};
use crate::layers;
use crate::ports::{ImageError, Images};
use crate::quantity;
use crate::snapshots::Origin;
use crate::sources::{SourceKind, SourceRef, Sources};
use base64::Engine;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

pub(crate) const ANNOTATION: &str = "atoll.dev/machine";
/// A machine keeps its address by this key.
const MIN_MEMORY: u64 = 16 << 20;
const MAX_VCPUS: u64 = 256;

#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    #[error("{field}: {message}")]
    Invalid { field: String, message: String },
    #[error("{0} \"{1}\" not found")]
    NoSource(&'static str, String),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("disk {path}")]
    Io {
        path: String,
        #[source]
        source: std::io::Error,
    },
}

fn invalid(field: impl Into<String>, message: impl Into<String>) -> MachineError {
    MachineError::Invalid { field: field.into(), message: message.into() }
}

/// The parts of a VirtualMachineInstance's spec that this node uses.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct InstanceSpec {
    domain: Domain,
    volumes: Vec<Volume>,
    hostname: String,
    access_credentials: Vec<AccessCredential>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Domain {
    cpu: Cpu,
    memory: Memory,
    resources: DomainResources,
    devices: Devices,
    firmware: Firmware,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Cpu {
    cores: u64,
    sockets: u64,
    threads: u64,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Memory {
    guest: Option<serde_json::Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct DomainResources {
    requests: BTreeMap<String, serde_json::Value>,
    limits: BTreeMap<String, serde_json::Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Devices {
    disks: Vec<DiskDevice>,
    interfaces: Vec<Interface>,
    autoattach_graphics_device: Option<bool>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DiskDevice {
    name: String,
    disk: Option<Target>,
    cdrom: Option<Target>,
    lun: Option<Target>,
    boot_order: Option<u32>,
    serial: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Target {
    bus: String,
    readonly: Option<bool>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Firmware {
    kernel_boot: Option<KernelBoot>,
    bootloader: Option<Bootloader>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Bootloader {
    bios: Option<Bios>,
    efi: Option<Efi>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Bios {
    use_serial: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Efi {
    secure_boot: Option<bool>,
    persistent: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Interface {
    mac_address: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct KernelBoot {
    kernel_args: String,
    container: Option<KernelContainer>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct KernelContainer {
    image: String,
    image_pull_policy: Option<String>,
    kernel_path: String,
    initrd_path: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Volume {
    name: String,
    container_disk: Option<ContainerDisk>,
    empty_disk: Option<EmptyDisk>,
    cloud_init_no_cloud: Option<CloudInitSource>,
    cloud_init_config_drive: Option<CloudInitSource>,
    #[serde(flatten)]
    other: BTreeMap<String, serde_json::Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ContainerDisk {
    image: String,
    image_pull_policy: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct EmptyDisk {
    capacity: Option<serde_json::Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct NameRef {
    name: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct CloudInitSource {
    user_data: String,
    user_data_base64: String,
    secret_ref: Option<NameRef>,
    network_data: String,
    network_data_base64: String,
    network_data_secret_ref: Option<NameRef>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct AccessCredential {
    ssh_public_key: Option<SshPublicKey>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct SshPublicKey {
    source: SshSource,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct SshSource {
    secret: Option<SecretName>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct SecretName {
    secret_name: String,
}

fn text(value: &serde_json::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

impl InstanceSpec {
    pub fn parse(annotation: &str) -> Result<Self, MachineError> {
        serde_json::from_str(annotation)
            .map_err(|e| invalid(format!("metadata.annotations[{ANNOTATION}]"), e.to_string()))
    }

    /// Images to be present before [`resolve`], with their pull policies.
    pub fn images(&self) -> Vec<(String, Option<String>)> {
        let disks = self.volumes.iter().filter_map(|v| v.container_disk.as_ref());
        let mut out: Vec<_> = disks.map(|d| (d.image.clone(), d.image_pull_policy.clone())).collect();
        if let Some(kernel) = self.domain.firmware.kernel_boot.as_ref().and_then(|k| k.container.as_ref()) {
            out.push((kernel.image.clone(), kernel.image_pull_policy.clone()));
        }
        out
    }

    /// Secrets that cloud-init and ssh keys come from.
    pub fn sources(&self) -> BTreeSet<SourceRef> {
        let mut out = BTreeSet::new();
        for init in self.volumes.iter().filter_map(Volume::cloud_init) {
            let refs = [&init.secret_ref, &init.network_data_secret_ref];
            out.extend(refs.into_iter().flatten().map(|r| (SourceKind::Secret, r.name.clone())));
        }
        out.extend(self.ssh_secrets().map(|name| (SourceKind::Secret, name.to_owned())));
        out
    }

    fn ssh_secrets(&self) -> impl Iterator<Item = &str> {
        let keys = self.access_credentials.iter().filter_map(|a| a.ssh_public_key.as_ref());
        keys.filter_map(|k| k.source.secret.as_ref()).map(|s| s.secret_name.as_str())
    }

    fn vcpus(&self) -> Result<u32, MachineError> {
        let cpu = &self.domain.cpu;
        let given = cpu.cores.max(1).saturating_mul(cpu.sockets.max(1)).saturating_mul(cpu.threads.max(1));
        let asked = [&self.domain.resources.limits, &self.domain.resources.requests];
        let of_resources = asked.iter().find_map(|m| m.get("cpu")).and_then(|q| quantity::value(&text(q)));
        let unset = cpu.cores == 0 && cpu.sockets == 0 && cpu.threads == 0;
        let count = if unset { of_resources.unwrap_or(1).max(1) } else { given };
        if count > MAX_VCPUS {
            return Err(invalid("spec.domain.cpu", format!("{count} vCPUs; at most {MAX_VCPUS} are possible")));
        }
        Ok(u32::try_from(count).unwrap_or(1))
    }

    /// Whether its firmware is EFI.
    fn efi(&self) -> Result<bool, MachineError> {
        let field = |name: &str| format!("spec.domain.firmware.bootloader.{name}");
        let firmware = &self.domain.firmware;
        let Some(bootloader) = firmware.bootloader.as_ref().filter(|_| firmware.kernel_boot.is_none()) else {
            return Ok(false);
        };
        if bootloader.bios.as_ref().is_some_and(|bios| bios.use_serial) {
            return Err(invalid(field("bios.useSerial"), "the BIOS has no serial console here; leave it out"));
        }
        let Some(efi) = &bootloader.efi else { return Ok(false) };
        // KubeVirt's default is true
        if efi.secure_boot != Some(false) {
            return Err(invalid(field("efi.secureBoot"), "is not there; set it to false to boot by EFI without it"));
        }
        if efi.persistent {
            return Err(invalid(field("efi.persistent"), "EFI variables do not last here; leave it out"));
        }
        Ok(true)
    }

    /// A machine's hardware address follows from its address in the network, which knows it by both.
    fn check_interfaces(&self, mac: &str) -> Result<(), MachineError> {
        for (index, interface) in self.domain.devices.interfaces.iter().enumerate() {
            let wanted = interface.mac_address.replace('-', ":").to_ascii_lowercase();
            if !wanted.is_empty() && wanted != mac {
                return Err(invalid(
                    format!("spec.domain.devices.interfaces[{index}].macAddress"),
                    format!(
                        "\"{wanted}\" cannot be had: it follows from the machine's address and is {mac}; leave it out"
                    ),
                ));
            }
        }
        Ok(())
    }

    fn memory(&self) -> Result<u64, MachineError> {
        let resources = &self.domain.resources;
        let found = self.domain.memory.guest.as_ref();
        let found = found.or_else(|| resources.requests.get("memory")).or_else(|| resources.limits.get("memory"));
        let Some(value) = found else {
            return Err(invalid("spec.domain.memory.guest", "is required (or resources.requests.memory)"));
        };
        let bytes = quantity::value(&text(value)).filter(|b| *b >= MIN_MEMORY);
        bytes.ok_or_else(|| {
            invalid("spec.domain.memory.guest", format!("{} is not an amount of at least 16Mi", text(value)))
        })
    }
}

impl Volume {
    fn cloud_init(&self) -> Option<&CloudInitSource> {
        self.cloud_init_no_cloud.as_ref().or(self.cloud_init_config_drive.as_ref())
    }
}

pub(crate) struct MachineInput<'a> {
    pub instance: &'a InstanceSpec,
    pub name: &'a str,
    pub namespace: &'a str,
    pub hostname: &'a str,
    pub pod_dir: &'a Path,
    pub network: &'a SandboxNetwork,
    pub sources: &'a Sources,
    /// The snapshot it begins as.
    pub origin: Option<&'a Origin>,
}

/// Everything the boundary needs. Disks of images are given by their backing file in the store (read-only there; the
/// boundary puts a copy-on-write overlay into the pod's directory), empty disks are sparse files in `disks/`.
pub(crate) async fn resolve(images: &dyn Images, input: &MachineInput<'_>) -> Result<MachineSpec, MachineError> {
    let instance = input.instance;
    let mut disks = Vec::new();
    let mut cloud_init = None;
    for (index, volume) in instance.volumes.iter().enumerate() {
        let field = format!("spec.volumes[{index}]");
        if !crate::config::is_plain_name(&volume.name) {
            return Err(invalid(format!("{field}.name"), format!("\"{}\" is not a name", volume.name)));
        }
        if let Some(source) = volume.cloud_init() {
            cloud_init = Some(seed(input, source, &field)?);
            continue;
        }
        let device = instance.domain.devices.disks.iter().find(|d| d.name == volume.name).ok_or_else(|| {
            invalid(format!("{field}.name"), format!("\"{}\" has no disk in spec.domain.devices.disks", volume.name))
        })?;
        let found = input.origin.and_then(|origin| origin.disk(&volume.name));
        let (path, format, begins) = match found {
            Some(found) => found,
            None if input.origin.is_some_and(|origin| origin.go_on) => {
                let why = "is not in the snapshot that the machine is to go on from";
                return Err(invalid(format!("{field}.name"), format!("\"{}\" {why}", volume.name)));
            }
            None => {
                let (path, format) = backing(images, input, volume, &field).await?;
                (path, format, None)
            }
        };
        let cdrom = device.cdrom.as_ref();
        let target = device.disk.as_ref().or(device.lun.as_ref()).or(cdrom).cloned().unwrap_or_default();
        disks.push(Disk {
            name: volume.name.clone(),
            path,
            format,
            read_only: target.readonly.unwrap_or(cdrom.is_some()),
            bus: if target.bus.is_empty() { "virtio".into() } else { target.bus },
            serial: device.serial.clone(),
            boot_order: device.boot_order,
            begins,
        });
    }
    let (kernel, initrd, kernel_args) = kernel(images, instance).await?;
    if kernel.is_none() && disks.is_empty() {
        return Err(invalid(
            "spec.volumes",
            "nothing to boot from: give a containerDisk or domain.firmware.kernelBoot",
        ));
    }
    let (vcpus, memory_bytes, efi) = (instance.vcpus()?, instance.memory()?, instance.efi()?);
    instance.check_interfaces(&input.network.mac)?;
    // as KubeVirt has it, but for machines that say nothing and boot a kernel, which has its console
    let display = instance.domain.devices.autoattach_graphics_device.unwrap_or(kernel.is_none());
    let go_on = input.origin.filter(|origin| origin.go_on).and_then(|origin| {
        let from = origin.saved.restore(&origin.dir)?;
        Some(GoOn { state: from.state, memory: from.memory, engine: from.engine })
    });
    Ok(MachineSpec { vcpus, memory_bytes, kernel, initrd, kernel_args, efi, disks, cloud_init, go_on, display })
}

impl Origin {
    /// Backing file, its format, and what was written over it.
    fn disk(&self, name: &str) -> Option<(PathBuf, String, Option<PathBuf>)> {
        let disk = self.saved.disks.iter().find(|disk| disk.name == name)?;
        let begins = disk.overlay.as_ref().map(|file| self.dir.join(&file.name));
        Some((self.dir.join(&disk.base.name), format_name(disk.format).to_owned(), begins))
    }
}

fn format_name(format: vmm::DiskFormat) -> &'static str {
    match format {
        vmm::DiskFormat::Raw => "raw",
        vmm::DiskFormat::Qcow2 => "qcow2",
    }
}

/// What a machine that does not run would begin with: its images, or what its snapshot holds of them. Empty disks are not
/// there yet.
pub(crate) async fn stopped_disks(
    images: &dyn Images,
    instance: &InstanceSpec,
    origin: Option<&Origin>,
) -> Result<Vec<vmm::saved::Source>, MachineError> {
    let mut disks = Vec::new();
    for volume in &instance.volumes {
        let found = match (origin.and_then(|origin| origin.disk(&volume.name)), &volume.container_disk) {
            (Some(found), _) => found,
            (None, Some(disk)) => {
                let image = images.disk(&disk.image).await?;
                (image.path, image.format, None)
            }
            (None, None) => continue,
        };
        let (base, format, overlay) = found;
        let format = if format == "qcow2" { vmm::DiskFormat::Qcow2 } else { vmm::DiskFormat::Raw };
        disks.push(vmm::saved::Source { name: volume.name.clone(), format, base, overlay });
    }
    Ok(disks)
}

async fn backing(
    images: &dyn Images,
    input: &MachineInput<'_>,
    volume: &Volume,
    field: &str,
) -> Result<(PathBuf, String), MachineError> {
    if let Some(disk) = &volume.container_disk {
        let found = images.disk(&disk.image).await?;
        return Ok((found.path, found.format));
    }
    if let Some(disk) = &volume.empty_disk {
        let capacity = disk.capacity.as_ref().map(text).unwrap_or_default();
        let size = quantity::value(&capacity)
            .filter(|s| *s >= 512)
            .ok_or_else(|| invalid(format!("{field}.emptyDisk.capacity"), format!("\"{capacity}\" is not a size")))?;
        let path = input.pod_dir.join("disks").join(format!("{}.img", volume.name));
        make_empty(&path, size.next_multiple_of(512))
            .map_err(|source| MachineError::Io { path: path.display().to_string(), source })?;
        return Ok((path, "raw".into()));
    }
    let kind = volume.other.keys().next().map_or("none", String::as_str);
    Err(invalid(
        field,
        format!("volume type {kind} is not supported; use containerDisk, emptyDisk or cloudInitNoCloud"),
    ))
}

fn make_empty(path: &Path, size: u64) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    // Kept if it is there: an interrupted set-up is done again.
    let file = std::fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    if file.metadata()?.len() != size {
        file.set_len(size)?;
    }
    Ok(())
}

async fn kernel(
    images: &dyn Images,
    instance: &InstanceSpec,
) -> Result<(Option<PathBuf>, Option<PathBuf>, String), MachineError> {
    let Some(boot) = &instance.domain.firmware.kernel_boot else { return Ok((None, None, String::new())) };
    let field = "spec.domain.firmware.kernelBoot.container";
    let Some(container) = &boot.container else { return Err(invalid(field, "is required")) };
    let image = images.find(&container.image).await?.ok_or_else(|| ImageError::Pull {
        reference: container.image.clone(),
        message: format!("image \"{}\" is not here", container.image),
    })?;
    let Rootfs::Layers { layers, .. } = &image.rootfs else {
        return Err(invalid(format!("{field}.image"), format!("\"{}\" is not a container image", container.image)));
    };
    let locate = |path: &str, name: &str| -> Result<Option<PathBuf>, MachineError> {
        if path.is_empty() {
            return Ok(None);
        }
        let relative = path.trim_start_matches('/');
        let found = layers::locate(layers, Path::new(relative));
        let missing = || invalid(format!("{field}.{name}"), format!("no file {path} in image \"{}\"", container.image));
        found.map(Some).ok_or_else(missing)
    };
    let kernel = locate(&container.kernel_path, "kernelPath")?;
    if kernel.is_none() {
        return Err(invalid(format!("{field}.kernelPath"), "is required"));
    }
    Ok((kernel, locate(&container.initrd_path, "initrdPath")?, boot.kernel_args.clone()))
}

fn seed(input: &MachineInput<'_>, source: &CloudInitSource, field: &str) -> Result<CloudInit, MachineError> {
    let decode = |name: &str, text: &str| -> Result<String, MachineError> {
        let compact: String = text.split_whitespace().collect();
        let bytes = base64::engine::general_purpose::STANDARD.decode(compact);
        let text = bytes.ok().and_then(|b| String::from_utf8(b).ok());
        text.ok_or_else(|| invalid(format!("{field}.{name}"), "is not base64 of a UTF-8 text"))
    };
    let secret = |name: &str, keys: [&str; 2]| -> Result<String, MachineError> {
        if input.sources.secret(name).is_none() {
            return Err(MachineError::NoSource("secret", name.to_owned()));
        }
        let found = keys.iter().find_map(|key| input.sources.bytes(SourceKind::Secret, name, key));
        let text = found.and_then(|b| String::from_utf8(b).ok());
        text.ok_or_else(|| invalid(field, format!("secret \"{name}\" has no text under key {}", keys.join(" or "))))
    };
    let user_data = if let Some(r) = &source.secret_ref {
        secret(&r.name, ["userdata", "userData"])?
    } else if !source.user_data_base64.is_empty() {
        decode("userDataBase64", &source.user_data_base64)?
    } else {
        source.user_data.clone()
    };
    let network_config = if let Some(r) = &source.network_data_secret_ref {
        secret(&r.name, ["networkdata", "networkData"])?
    } else if !source.network_data_base64.is_empty() {
        decode("networkDataBase64", &source.network_data_base64)?
    } else if !source.network_data.is_empty() {
        source.network_data.clone()
    } else {
        network_config(input.network)
    };
    Ok(CloudInit { meta_data: meta_data(input)?, user_data, network_config })
}

fn quoted(text: &str) -> String {
    // A JSON string is a YAML one.
    serde_json::Value::from(text).to_string()
}

fn meta_data(input: &MachineInput<'_>) -> Result<String, MachineError> {
    let hostname = match input.instance.hostname.as_str() {
        "" => input.hostname,
        name => name,
    };
    let id = format!("{}.{}", input.name, input.namespace);
    let mut out = format!("instance-id: {}\nlocal-hostname: {}\n", quoted(&id), quoted(hostname));
    let mut keys = Vec::new();
    for name in input.instance.ssh_secrets() {
        if input.sources.secret(name).is_none() {
            return Err(MachineError::NoSource("secret", name.to_owned()));
        }
        let values = input.sources.all(SourceKind::Secret, name).into_iter();
        keys.extend(values.filter_map(|(_, v)| String::from_utf8(v).ok()).map(|k| k.trim().to_owned()));
    }
    if !keys.is_empty() {
        out.push_str("public-keys:\n");
        for key in keys {
            out.push_str(&format!("  - {}\n", quoted(&key)));
        }
    }
    Ok(out)
}

/// cloud-init's network configuration, version 2: one address of each family, everything by the on-link gateway.
pub(crate) fn network_config(network: &SandboxNetwork) -> String {
    let mut out = String::from("version: 2\nethernets:\n  pod0:\n");
    out.push_str(&format!("    match:\n      macaddress: {}\n", quoted(&network.mac)));
    out.push_str("    dhcp4: false\n    dhcp6: false\n");
    if network.mtu > 0 {
        out.push_str(&format!("    mtu: {}\n", network.mtu));
    }
    if network.address6.is_some() {
        out.push_str("    accept-ra: false\n");
    }
    let addresses = network.address.map(|a| format!("{a}/32")).into_iter();
    let addresses: Vec<String> = addresses.chain(network.address6.map(|a| format!("{a}/128"))).collect();
    if !addresses.is_empty() {
        out.push_str("    addresses:\n");
        addresses.iter().for_each(|address| out.push_str(&format!("      - {}\n", quoted(address))));
    }
    let hop6 = network.address6.map(|_| network::GATEWAY6.to_string());
    let hops =
        network.gateway.map(|hop| ("0.0.0.0/0", hop.to_string())).into_iter().chain(hop6.map(|hop| ("::/0", hop)));
    for (at, (to, hop)) in hops.enumerate() {
        out.push_str(if at == 0 { "    routes:\n" } else { "" });
        out.push_str(&format!("      - to: {}\n        via: {}\n        on-link: true\n", quoted(to), quoted(&hop)));
    }
    if let Some(dns) = network.dns {
        out.push_str(&format!("    nameservers:\n      addresses: [{dns}]\n"));
        if !network.dns_search.is_empty() {
            let list: Vec<String> = network.dns_search.iter().map(|s| quoted(s)).collect();
            out.push_str(&format!("      search: [{}]\n", list.join(", ")));
        }
    }
    out
}

#[cfg(test)]
mod tests;
