use super::*;
use proptest::prelude::*;

/// As VMware's and VirtualBox' exports are, with what a test changes.
fn envelope(disks: &str, system: &str) -> String {
    format!(
        r#"<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
 xmlns:vmw="http://www.vmware.com/schema/ovf" xmlns:vbox="http://www.virtualbox.org/ovf/machine">
<References>
  <File ovf:id="file1" ovf:href="db-disk1.vmdk" ovf:size="123"/>
  <File ovf:id="gz" ovf:href="x.vmdk.gz" ovf:compression="gzip"/>
  <File ovf:id="away" ovf:href="http://example.com/x.vmdk"/>
  <File ovf:id="pieces" ovf:href="x.vmdk" ovf:chunkSize="100"/>
</References>
<DiskSection><Info>disks</Info>
  <Disk ovf:diskId="vmdisk1" ovf:fileRef="file1" ovf:capacity="8" ovf:capacityAllocationUnits="byte * 2^30"/>
  <Disk ovf:diskId="empty" ovf:capacity="1073741824" ovf:fileRef=""/>{disks}
</DiskSection>
<VirtualSystem ovf:id="vm"><Info/><Name>db server</Name>{system}</VirtualSystem></Envelope>"#
    )
}

fn item(fields: &[(&str, &str)]) -> String {
    let inner: String = fields.iter().map(|(name, value)| format!("<rasd:{name}>{value}</rasd:{name}>")).collect();
    format!("<Item>{inner}</Item>")
}

fn disk(id: &str, address: &str, parent: &str) -> String {
    let host = format!("ovf:/disk/{id}");
    let fields = [("AddressOnParent", address), ("ElementName", "Hard disk"), ("HostResource", &host)];
    item(&[&fields[..], &[("InstanceID", "9"), ("Parent", parent), ("ResourceType", "17")]].concat())
}

fn hardware(more: &str) -> String {
    let cpu = item(&[("InstanceID", "1"), ("ResourceType", "3"), ("VirtualQuantity", "2")]);
    let memory = [("AllocationUnits", "byte * 2^20"), ("InstanceID", "2"), ("ResourceType", "4")];
    let memory = item(&[&memory[..], &[("VirtualQuantity", "4096")]].concat());
    let controllers = item(&[("InstanceID", "3"), ("ResourceSubType", "AHCI"), ("ResourceType", "20")])
        + &item(&[("InstanceID", "4"), ("ResourceSubType", "VirtioSCSI"), ("ResourceType", "6")]);
    format!("<VirtualHardwareSection><Info/>{cpu}{memory}{controllers}{more}</VirtualHardwareSection>")
}

fn whole() -> String {
    let network = item(&[("InstanceID", "5"), ("ResourceSubType", "E1000"), ("ResourceType", "10")]);
    let sound = item(&[("ElementName", "sound"), ("InstanceID", "6"), ("ResourceType", "35")]);
    let unused = r#"<Item ovf:bound="max"><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>64</rasd:VirtualQuantity></Item>
        <Item ovf:configuration="big"><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>32</rasd:VirtualQuantity></Item>
        <vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="efi"/>"#;
    let disks = disk("empty", "0", "3") + &disk("vmdisk1", "1", "3");
    envelope("", &hardware(&(network.repeat(2) + &sound + unused + &disks)))
}

#[test]
fn a_machine_is_understood() {
    let Description { machine, files } = parse(&whole()).unwrap();
    assert_eq!((machine.name.as_str(), machine.vcpus, machine.memory), ("db server", 2, 4 << 30));
    assert_eq!((machine.interfaces, machine.efi), (2, true));
    // What has something on it comes first: the machine boots from it.
    assert_eq!(files, [Some(File { name: "db-disk1.vmdk".into(), size: Some(123) }), None]);
    let capacities: Vec<_> = machine.disks.iter().map(|d| (d.capacity, d.virtio)).collect();
    assert_eq!(capacities, [(8 << 30, false), (1 << 30, false)]);
    let left = machine.left_out.join("; ");
    assert!(left.contains("sound") && left.contains("1 network interfaces but the first"), "{left}");

    let virtio = parse(&envelope("", &hardware(&disk("vmdisk1", "0", "4")))).unwrap().machine;
    assert!(virtio.disks[0].virtio && !virtio.efi && virtio.interfaces == 0);
    let firmware = r#"<vbox:Machine><Hardware><Firmware type="EFI"/></Hardware></vbox:Machine>"#;
    let efi = envelope("", &(hardware(&disk("vmdisk1", "0", "3")) + firmware));
    assert!(parse(&efi).unwrap().machine.efi);
}

#[test]
fn the_configuration_that_nobody_chose_is_deployed() {
    let cpus = |configuration: &str, count: &str| {
        item(&[("ResourceType", "3"), ("VirtualQuantity", count)])
            .replace("<Item>", &format!(r#"<Item ovf:configuration="{configuration}">"#))
    };
    let system = hardware(&(cpus("small", "1") + &cpus("large other", "16") + &disk("vmdisk1", "0", "3")));
    let options = |default: &str| {
        let section = format!(
            r#"<DeploymentOptionSection><Configuration ovf:id="small"/><Configuration ovf:id="large" {default}/>
               </DeploymentOptionSection><VirtualSystem"#
        );
        envelope("", &system).replacen("<VirtualSystem", &section, 1)
    };
    assert_eq!(parse(&options("")).unwrap().machine.vcpus, 1);
    assert_eq!(parse(&options(r#"ovf:default="true""#)).unwrap().machine.vcpus, 16);
}

#[test]
fn what_cannot_be_is_told() {
    let told = |text: &str| parse(text).err().unwrap_or_else(|| panic!("taken: {text}"));
    let with = |disk_line: &str| envelope(disk_line, &hardware(&disk("d", "0", "3")));
    for (disk_line, expected) in [
        ("", r#"disk "d" is not described"#),
        (r#"<Disk ovf:diskId="d" ovf:fileRef="file1"/>"#, "has no capacity"),
        (r#"<Disk ovf:diskId="d" ovf:capacity="9" ovf:fileRef="f"/>"#, r#"file "f" is not described"#),
        (r#"<Disk ovf:diskId="d" ovf:capacity="9" ovf:fileRef="gz"/>"#, "compressed (gzip)"),
        (r#"<Disk ovf:diskId="d" ovf:capacity="9" ovf:fileRef="away"/>"#, "not in the archive"),
        (r#"<Disk ovf:diskId="d" ovf:capacity="9" ovf:fileRef="pieces"/>"#, "several pieces"),
        (r#"<Disk ovf:diskId="d" ovf:capacity="9" ovf:parentRef="vmdisk1"/>"#, "has a parent"),
        (r#"<Disk ovf:diskId="d" ovf:capacity="9" ovf:capacityAllocationUnits="byte * 2^99"/>"#, "byte * 2^99"),
        (r#"<Disk ovf:diskId="d" ovf:capacity="99999999999" ovf:capacityAllocationUnits="TB"/>"#, "no capacity"),
    ] {
        let why = told(&with(disk_line));
        assert!(why.contains(expected), "{why}");
    }
    let memory = hardware(&disk("vmdisk1", "0", "3"));
    for (text, expected) in [
        ("<Envelope", ""),
        ("<a/>", "root is <a>"),
        ("<Envelope/>", "describes no machine"),
        ("<Envelope><VirtualSystemCollection/></Envelope>", "several machines"),
        (&envelope("", ""), "no VirtualHardwareSection"),
        (&envelope("", &hardware("")), "has no disk"),
        (&envelope("", &memory.replace(">4096<", ">much<")), r#"VirtualQuantity "much""#),
        (&envelope("", &memory.replace(">4096<", ">18446744073709551615<")), "more memory"),
        (&envelope("", "<VirtualHardwareSection/>"), "how much memory"),
        (&envelope("", &hardware(&disk("vmdisk1", "0", "3").repeat(33))), "33 disks"),
    ] {
        let why = told(text);
        assert!(why.contains(expected), "{why}");
    }
}

#[test]
fn entities_depth_and_number_do_no_harm() {
    let bomb = r#"<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>"#;
    let text = whole().replacen("?>", &format!("?>{bomb}"), 1).replace("db server", "&b;");
    assert!(parse(&text).err().unwrap().contains("document type"));
    let outside = r#"<!DOCTYPE x SYSTEM "file:///etc/passwd">"#;
    assert!(parse(&whole().replacen("?>", &format!("?>{outside}"), 1)).err().unwrap().contains("document type"));
    assert!(
        parse(&format!("{}{}", "<a>".repeat(90_000), "</a>".repeat(90_000))).err().unwrap().contains("root is <a>")
    );
    assert!(parse(&format!("<Envelope>{}</Envelope>", "<a/>".repeat(200_000))).is_err());
    // Parents that are each other's.
    let round = hardware(&disk("vmdisk1", "0", "9"));
    assert!(!parse(&envelope("", &round)).unwrap().machine.disks[0].virtio);
}

#[test]
fn units_are_programmatic_or_words() {
    for (text, bytes) in [("byte", 1), ("byte * 2^20", 1 << 20), ("byte*1024 * 1024", 1 << 20), ("MegaBytes", 1 << 20)]
    {
        assert_eq!(unit(text), Ok(bytes), "{text}");
    }
    for text in ["", "bit", "byte *", "byte * 2^", "byte * 2^64", "hertz * 10^6"] {
        assert!(unit(text).is_err(), "{text}");
    }
}

proptest! {
    /// Pieces of a description that is fine, cut out, repeated and exchanged.
    #[test]
    fn what_is_broken_is_an_error_or_a_machine(cuts in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<bool>()), 1..6)) {
        let mut text = whole().into_bytes();
        for (from, to, again) in cuts {
            let (from, to) = (from.index(text.len()), to.index(text.len()));
            let piece = text[from.min(to)..from.max(to).min(from.min(to) + 400)].to_vec();
            let at = from.min(to);
            match again {
                true => drop(text.splice(at..at, piece)),
                false => drop(text.drain(at..at + piece.len())),
            }
        }
        crate::ova::fuzz(&text);
    }
}
