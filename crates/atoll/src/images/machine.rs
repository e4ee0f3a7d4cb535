//! What an OVA says of its machine, as the VirtualMachine that it is here.

use crate::cli::Failure;
use crate::output::{self, Format};
use image::{Disk, Machine};
use serde_json::{Value, json};
use std::path::Path;

const MOST_VCPUS: u32 = 32;
const LEAST_MEMORY: u64 = 16 << 20;

/// Writes the manifest to a file, or to standard output for `-`.
pub fn write(machine: &Machine, to: &Path) -> Result<(), Failure> {
    let text = output::text(Format::Yaml, &manifest(machine));
    if to.as_os_str() == "-" {
        print!("{text}");
        return Ok(());
    }
    std::fs::write(to, text).map_err(|e| Failure(format!("cannot write the manifest to {}: {e}", to.display())))
}

/// What differs from the description, for people.
pub fn remarks(machine: &Machine) -> Vec<String> {
    let mut all: Vec<String> = machine.left_out.iter().map(|what| format!("left out: {what}")).collect();
    if !(1..=MOST_VCPUS).contains(&machine.vcpus) {
        all.push(format!("of its {} processors there are {}", machine.vcpus, machine.vcpus.clamp(1, MOST_VCPUS)));
    }
    if machine.memory < LEAST_MEMORY {
        all.push(format!("it has 16Mi of memory, not {} bytes; less is not possible", machine.memory));
    }
    if machine.efi {
        all.push("it boots through UEFI, which machines have not here; its disk may not boot through BIOS".into());
    }
    if machine.disks.iter().any(|disk| !disk.virtio) {
        all.push("its disks are on SATA; `bus: virtio` is faster, if its system has the drivers".into());
    }
    if machine.interfaces > 0 {
        all.push("its network interface is virtio, for which its system has to have the driver".into());
    }
    all
}

fn manifest(machine: &Machine) -> Value {
    let name = label(&machine.name);
    let disk_name = |number: usize| format!("disk{}", number + 1);
    let disks = machine.disks.iter().enumerate().map(|(number, disk)| {
        let bus = if disk.virtio { "virtio" } else { "sata" };
        json!({"name": disk_name(number), "disk": {"bus": bus}, "bootOrder": number + 1})
    });
    let volumes = machine.disks.iter().enumerate().map(|(number, disk)| volume(disk_name(number), disk));
    let mut domain = json!({
        "cpu": {"cores": machine.vcpus.clamp(1, MOST_VCPUS)},
        "memory": {"guest": quantity(machine.memory.max(LEAST_MEMORY))},
        "devices": {"disks": disks.collect::<Vec<_>>()},
    });
    let mut spec = json!({"volumes": volumes.collect::<Vec<_>>()});
    if machine.interfaces > 0 {
        domain["devices"]["interfaces"] = json!([{"name": "default", "masquerade": {}, "model": "virtio"}]);
        spec["networks"] = json!([{"name": "default", "pod": {}}]);
    }
    if machine.efi {
        domain["firmware"] = json!({"bootloader": {"efi": {"secureBoot": false}}});
    }
    spec["domain"] = domain;
    json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachine",
        "metadata": {"name": name},
        "spec": {"runStrategy": "Halted", "template": {"metadata": {"labels": {"app": name}}, "spec": spec}},
    })
}

fn volume(name: String, disk: &Disk) -> Value {
    match &disk.image {
        Some(image) => json!({"name": name, "containerDisk": {"image": image, "imagePullPolicy": "IfNotPresent"}}),
        None => json!({"name": name, "emptyDisk": {"capacity": quantity(disk.capacity)}}),
    }
}

fn quantity(bytes: u64) -> String {
    let units = [(1u64 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki")];
    let unit = units.iter().find(|(size, _)| bytes.is_multiple_of(*size));
    unit.map_or_else(|| bytes.to_string(), |(size, name)| format!("{}{name}", bytes / size))
}

/// A DNS label of a name that may be anything.
fn label(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let text: String = name.trim().chars().map(plain).take(63).collect();
    match text.trim_matches('-') {
        "" => "machine".to_owned(),
        text => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        let disk = |virtio, image: Option<&str>| Disk { capacity: 3 << 29, virtio, image: image.map(str::to_owned) };
        let disks = vec![disk(false, Some("db:latest")), disk(true, None)];
        Machine {
            name: "_DB server!".into(),
            vcpus: 2,
            memory: 4 << 30,
            efi: true,
            interfaces: 1,
            disks,
            ..Default::default()
        }
    }

    #[test]
    fn the_manifest_is_one_that_the_api_takes() {
        let manifest = manifest(&machine());
        assert_eq!(manifest["metadata"]["name"], "db-server");
        let spec = &manifest["spec"]["template"]["spec"];
        assert_eq!(spec["volumes"][0]["containerDisk"]["image"], "db:latest");
        assert_eq!(spec["volumes"][1]["emptyDisk"]["capacity"], "1536Mi");
        assert_eq!(spec["domain"]["memory"]["guest"], "4Gi");
        assert_eq!(
            spec["domain"]["devices"]["disks"][1],
            json!({"name": "disk2", "disk": {"bus": "virtio"}, "bootOrder": 2})
        );
        assert!(remarks(&machine()).iter().any(|r| r.contains("UEFI")));
    }

    #[test]
    fn what_no_machine_here_can_be_is_made_possible_and_told() {
        let strange = Machine { vcpus: 33, memory: 1 << 20, ..machine() };
        let domain = &manifest(&strange)["spec"]["template"]["spec"]["domain"];
        assert_eq!((&domain["cpu"]["cores"], &domain["memory"]["guest"]), (&json!(32), &json!("16Mi")));
        let said = remarks(&strange).join("; ");
        assert!(said.contains("of its 33 processors there are 32") && said.contains("not 1048576 bytes"), "{said}");
        assert_eq!((label("--"), label("a.b"), label(&"x".repeat(80)).len()), ("machine".into(), "a-b".into(), 63));
    }
}
