//! The description in an OVA: XML that says what machine its disks are of (DMTF DSP0243, "Open Virtualization Format", 1 and 2;
//! numbers of devices: CIM's `ResourceType`). XML with a document type, where entities would be, is refused.

use super::{Disk, Machine};
use roxmltree::{Node, ParsingOptions};

pub(crate) const LARGEST: u64 = 4 << 20;
const MOST_NODES: u32 = 100_000;
const MOST_DISKS: usize = 32;
/// Controllers a disk may hang on, one above the other.
const DEPTH: usize = 4;

/// What a description says, and in which of the archive's files its disks are.
pub(crate) struct Description {
    pub machine: Machine,
    /// For each disk its file.
    pub files: Vec<Option<File>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct File {
    pub name: String,
    pub size: Option<u64>,
}

struct Item<'a> {
    kind: u32,
    node: Node<'a, 'a>,
}

/// Why it cannot be read is a text for people.
pub(crate) fn parse(text: &str) -> Result<Description, String> {
    let options = ParsingOptions { nodes_limit: MOST_NODES, ..ParsingOptions::default() };
    let document = roxmltree::Document::parse_with_options(text, options).map_err(|e| match e {
        roxmltree::Error::DtdDetected => "it has a document type, which descriptions of machines need not have".into(),
        other => other.to_string(),
    })?;
    let envelope = document.root_element();
    if envelope.tag_name().name() != "Envelope" {
        return Err(format!("its root is <{}>, not <Envelope>", short(envelope.tag_name().name())));
    }
    let system = match (child(envelope, "VirtualSystem"), child(envelope, "VirtualSystemCollection")) {
        (Some(system), _) => system,
        (None, Some(_)) => return Err("it describes several machines; export them one by one".into()),
        (None, None) => return Err("it describes no machine (no VirtualSystem)".into()),
    };
    let hardware = child(system, "VirtualHardwareSection").ok_or("its machine has no VirtualHardwareSection")?;
    let items = items(hardware, default_configuration(envelope));
    let mut machine = Machine {
        name: child_text(system, "Name").or_else(|| attribute(system, "id")).unwrap_or_default().to_owned(),
        vcpus: 1,
        interfaces: items.iter().filter(|item| item.kind == 10).count(),
        efi: is_efi(system, hardware),
        ..Machine::default()
    };
    for item in &items {
        match item.kind {
            3 => machine.vcpus = u32::try_from(number(item.node, "VirtualQuantity")?).unwrap_or(u32::MAX),
            4 => {
                let unit = unit(child_text(item.node, "AllocationUnits").unwrap_or("byte * 2^20"))?;
                let bytes = number(item.node, "VirtualQuantity")?.checked_mul(unit);
                machine.memory = bytes.ok_or("more memory than there are numbers")?;
            }
            1 | 2 | 5..=10 | 13..=20 | 23 | 24 => {}
            kind => machine.left_out.push(format!("{} (resource type {kind})", label(item.node))),
        }
    }
    if machine.memory == 0 {
        return Err("it does not say how much memory its machine has (no Item of ResourceType 4)".into());
    }
    if machine.interfaces > 1 {
        machine.left_out.push(format!("{} network interfaces but the first", machine.interfaces - 1));
    }
    let files = disks(envelope, &items, &mut machine)?;
    if machine.disks.is_empty() {
        return Err("its machine has no disk".into());
    }
    Ok(Description { machine, files })
}

/// Devices of the configuration that is deployed when nobody chooses, not those that only bound it.
fn items<'a>(hardware: Node<'a, 'a>, configuration: Option<&str>) -> Vec<Item<'a>> {
    let named = ["Item", "StorageItem", "EthernetPortItem"];
    let here = hardware.children().filter(|n| named.contains(&n.tag_name().name()));
    here.filter(|n| attribute(*n, "bound").is_none())
        .filter(|n| {
            attribute(*n, "configuration").is_none_or(|all| all.split_whitespace().any(|c| Some(c) == configuration))
        })
        .filter_map(|node| Some(Item { kind: child_text(node, "ResourceType")?.parse().ok()?, node }))
        .collect()
}

fn default_configuration<'a>(envelope: Node<'a, 'a>) -> Option<&'a str> {
    let section = child(envelope, "DeploymentOptionSection")?;
    let mut all = section.children().filter(|n| n.tag_name().name() == "Configuration");
    let first = all.next()?;
    let chosen = std::iter::once(first).chain(all).find(|n| matches!(attribute(*n, "default"), Some("true" | "1")));
    attribute(chosen.unwrap_or(first), "id")
}

/// VMware says it in a `Config` of the hardware, VirtualBox in a section of its own.
fn is_efi(system: Node, hardware: Node) -> bool {
    let vmware = hardware.children().any(|n| {
        n.tag_name().name() == "Config"
            && attribute(n, "key") == Some("firmware")
            && attribute(n, "value") == Some("efi")
    });
    let firmware = system.descendants().find(|n| n.tag_name().name() == "Firmware");
    vmware || firmware.and_then(|n| attribute(n, "type")).is_some_and(|kind| kind.starts_with("EFI"))
}

fn disks(envelope: Node, items: &[Item], machine: &mut Machine) -> Result<Vec<Option<File>>, String> {
    let described = |id: &str| {
        let all = envelope.children().filter(|n| n.tag_name().name() == "DiskSection").flat_map(|n| n.children());
        all.filter(|n| n.tag_name().name() == "Disk").find(|n| attribute(*n, "diskId") == Some(id))
    };
    let mut found = Vec::new();
    for item in items.iter().filter(|item| matches!(item.kind, 14..=17)) {
        let host = child_text(item.node, "HostResource").unwrap_or_default();
        if item.kind != 17 {
            if !host.is_empty() {
                machine.left_out.push(format!("{} with {}", label(item.node), short(host)));
            }
            continue;
        }
        let host = host.strip_prefix("ovf:").unwrap_or(host);
        let Some(id) = host.strip_prefix("/disk/") else {
            return Err(format!("{} is of {:?}, not of a disk it describes", label(item.node), short(host)));
        };
        let disk = described(id).ok_or_else(|| format!("its disk {:?} is not described", short(id)))?;
        if attribute(disk, "parentRef").is_some() {
            return Err(format!("its disk {:?} has a parent; merge its snapshots before the export", short(id)));
        }
        let capacity = attribute(disk, "capacity").and_then(|c| c.parse::<u64>().ok());
        let unit = unit(attribute(disk, "capacityAllocationUnits").unwrap_or("byte"))?;
        let capacity = capacity.and_then(|c| c.checked_mul(unit)).filter(|c| *c > 0);
        let capacity = capacity.ok_or_else(|| format!("its disk {:?} has no capacity", short(id)))?;
        let file = attribute(disk, "fileRef").filter(|f| !f.is_empty()).map(|id| file(envelope, id)).transpose()?;
        let (virtio, controller) = controller(items, item);
        found.push((
            controller,
            number(item.node, "AddressOnParent").unwrap_or(0),
            Disk { capacity, virtio, image: None },
            file,
        ));
    }
    if found.len() > MOST_DISKS {
        return Err(format!("a machine of {} disks; at most {MOST_DISKS} are possible", found.len()));
    }
    // As firmware looks at them; what it begins with must have something on it.
    found.sort_by_key(|(controller, address, ..)| (*controller, *address));
    if found.first().is_some_and(|(.., file)| file.is_none()) {
        found.sort_by_key(|(.., file)| file.is_none());
    }
    Ok(found.into_iter().map(|(.., disk, file)| (machine.disks.push(disk), file).1).collect())
}

/// Whether a disk hangs on a virtio controller, and where that comes in the list.
fn controller(items: &[Item], disk: &Item) -> (bool, usize) {
    let mut parent = child_text(disk.node, "Parent");
    for _ in 0..DEPTH {
        let Some(id) = parent else { break };
        let Some(place) = items.iter().position(|i| child_text(i.node, "InstanceID") == Some(id)) else { break };
        let Some(found) = items.get(place) else { break };
        if matches!(found.kind, 5 | 6 | 20) {
            let kind = child_text(found.node, "ResourceSubType").unwrap_or_default();
            return (kind.to_ascii_lowercase().contains("virtio"), place);
        }
        parent = child_text(found.node, "Parent");
    }
    (false, usize::MAX)
}

fn file(envelope: Node, id: &str) -> Result<File, String> {
    let references = child(envelope, "References").ok_or("it has no References")?;
    let file = references.children().find(|n| n.tag_name().name() == "File" && attribute(*n, "id") == Some(id));
    let file = file.ok_or_else(|| format!("its file {:?} is not described", short(id)))?;
    let name = attribute(file, "href").unwrap_or_default();
    if name.is_empty() || name.contains("://") {
        return Err(format!("its file {:?} is {:?}, not in the archive", short(id), short(name)));
    }
    if let Some(kind) = attribute(file, "compression").filter(|c| !matches!(*c, "" | "identity")) {
        return Err(format!("its file {:?} is compressed ({}); export it without", short(name), short(kind)));
    }
    if attribute(file, "chunkSize").is_some() {
        return Err(format!("its file {:?} is in several pieces; export it as one", short(name)));
    }
    let size = attribute(file, "size").and_then(|s| s.parse().ok());
    Ok(File { name: name.to_owned(), size })
}

/// `byte * 2^20`, `byte * 10^6`, `byte * 1024` (DSP0004, programmatic units), and what was written before.
fn unit(text: &str) -> Result<u64, String> {
    let unknown = || format!("units of {:?}", short(text));
    match text.trim().to_ascii_lowercase().as_str() {
        "byte" | "bytes" => return Ok(1),
        "kilobytes" | "kb" => return Ok(1 << 10),
        "megabytes" | "mb" => return Ok(1 << 20),
        "gigabytes" | "gb" => return Ok(1 << 30),
        "terabytes" | "tb" => return Ok(1 << 40),
        _ => {}
    }
    let mut factors = text.split('*').map(str::trim);
    if !matches!(factors.next(), Some("byte" | "bytes")) {
        return Err(unknown());
    }
    factors.try_fold(1u64, |product, factor| {
        let number = match factor.split_once('^') {
            Some((base, exponent)) => {
                let (base, exponent) = (base.trim().parse::<u64>().ok(), exponent.trim().parse().ok());
                base.zip(exponent).and_then(|(base, exponent)| base.checked_pow(exponent))
            }
            None => factor.parse().ok(),
        };
        number.and_then(|n| product.checked_mul(n)).ok_or_else(unknown)
    })
}

fn child<'a>(node: Node<'a, 'a>, name: &str) -> Option<Node<'a, 'a>> {
    node.children().find(|n| n.tag_name().name() == name)
}

fn child_text<'a>(node: Node<'a, 'a>, name: &str) -> Option<&'a str> {
    child(node, name)?.text().map(str::trim).filter(|text| !text.is_empty())
}

fn attribute<'a>(node: Node<'a, 'a>, name: &str) -> Option<&'a str> {
    node.attributes().find(|a| a.name() == name).map(|a| a.value())
}

fn number(node: Node, name: &str) -> Result<u64, String> {
    let text = child_text(node, name).unwrap_or_default();
    text.parse().map_err(|_| format!("{} has {name} {:?}, which is not a number", label(node), short(text)))
}

/// What to call a device.
fn label(node: Node) -> String {
    let name = child_text(node, "ElementName").or_else(|| child_text(node, "Description"));
    format!("device {:?}", short(name.unwrap_or("without a name")))
}

fn short(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests;
