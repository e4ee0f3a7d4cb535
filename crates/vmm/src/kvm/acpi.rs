//! The ACPI tables a guest finds: RSDP, XSDT, FADT (hardware-reduced), MADT, DSDT with the power button, the serial port
//! and the virtio devices. <https://uefi.org/specs/ACPI/6.5/>

use super::memory::{self, Memory};
use super::{arch, generation, power, serial};
use acpi_tables::aml::{self, Device, EISAName, Interrupt, Memory32Fixed, Name, Path, ResourceTemplate};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml::IO};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

const OEM: [u8; 6] = *b"ATOLL ";
const TABLE: [u8; 8] = *b"ATOLLVMM";
/// IA-PC boot architecture flags: no VGA, no MSI, no PCIe ASPM, no CMOS clock.
const BOOT_FLAGS: u16 = 0b11_1100;
const SLEEP_TYPE_OFF: u8 = 5;

/// A virtio-mmio device as the guest is told of it.
#[derive(Clone, Copy)]
pub struct Place {
    pub base: u64,
    pub irq: u32,
}

/// Writes all tables; the RSDP is first, at [`memory::ACPI_TABLES`].
pub fn write(memory: &Memory, vcpus: u8, places: &[Place]) -> Result<(), GuestMemoryError> {
    let mut at = memory::ACPI_TABLES + 64;
    let mut put = |bytes: &[u8]| {
        let address = at;
        at = (at + bytes.len() as u64).next_multiple_of(16);
        if at > memory::GENERATION {
            return Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(at)));
        }
        memory.write_slice(bytes, GuestAddress(address)).map(|()| address)
    };
    let dsdt = put(&dsdt(places))?;
    let fadt = put(&bytes_of(&fadt(dsdt)))?;
    let madt = put(&bytes_of(&madt(vcpus)))?;
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&bytes_of(&xsdt))?;
    memory.write_slice(&bytes_of(&Rsdp::new(OEM, xsdt)), GuestAddress(memory::ACPI_TABLES))
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port))
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM, TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Wbinvd);
    fadt.iapc_boot_arch = BOOT_FLAGS.into();
    fadt.reset_reg = port(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS);
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let mut madt = MADT::new(OEM, TABLE, 1, LocalInterruptController::Address(arch::LAPIC));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, arch::IOAPIC, 0));
    madt
}

fn dsdt(places: &[Place]) -> Vec<u8> {
    let mut body = device("PWRB", &[("_HID", &EISAName::new("PNP0C0C")), ("_UID", &0u8)], &[]);
    body.extend(generation_device());
    body.extend(event_device());
    body.extend(serial_device());
    for (index, place) in places.iter().enumerate() {
        body.extend(virtio_device(index, place));
    }
    let scope = aml::Scope::raw(Path::new("_SB_"), body);
    let zero = 0u8;
    let off = aml::Package::new(vec![&SLEEP_TYPE_OFF, &zero, &zero, &zero]);
    let sleep = bytes_of(&Name::new(Path::new("_S5_"), &off));
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, 1);
    table.append_slice(&scope);
    table.append_slice(&sleep);
    table.update_checksum();
    table.as_slice().to_vec()
}

/// `Device (NAME) { Name (KEY, VALUE) ... }`, and its methods.
fn device(name: &str, values: &[(&str, &dyn Aml)], methods: &[&dyn Aml]) -> Vec<u8> {
    let names: Vec<Name> = values.iter().map(|(key, value)| Name::new(Path::new(key), *value)).collect();
    let mut children: Vec<&dyn Aml> = names.iter().map(|name| name as &dyn Aml).collect();
    children.extend(methods);
    bytes_of(&Device::new(Path::new(name), children))
}

/// Says that the machine was cloned, or went back to what it was: the guest's random numbers must not be those of another
/// (<https://go.microsoft.com/fwlink/?LinkId=260709>).
fn generation_device() -> Vec<u8> {
    let (low, high) = (memory::GENERATION as u32, (memory::GENERATION >> 32) as u32);
    let address = aml::Package::new(vec![&low, &high]);
    let counter = "VM_Gen_Counter";
    let values: [(&str, &dyn Aml); 4] =
        [("_HID", &"ATOLVGID"), ("_CID", &counter), ("_DDN", &counter), ("ADDR", &address)];
    device("VGEN", &values, &[])
}

/// The generic event device: its interrupts are the power button and a new generation.
fn event_device() -> Vec<u8> {
    let button = Interrupt::new(true, true, false, false, power::BUTTON_IRQ);
    let generation = Interrupt::new(true, true, false, false, generation::IRQ);
    let resources = ResourceTemplate::new(vec![&button, &generation]);
    let pressed = Path::new("\\_SB_.PWRB");
    let renewed = Path::new("\\_SB_.VGEN");
    let (press, renew) = (aml::Notify::new(&pressed, &0x80u8), aml::Notify::new(&renewed, &0x80u8));
    let (which, button, generation) = (aml::Arg(0), power::BUTTON_IRQ, generation::IRQ);
    let (is_button, is_generation) = (aml::Equal::new(&which, &button), aml::Equal::new(&which, &generation));
    let on_press = aml::If::new(&is_button, vec![&press]);
    let on_renewal = aml::If::new(&is_generation, vec![&renew]);
    let handler = aml::Method::new(Path::new("_EVT"), 1, true, vec![&on_press, &on_renewal]);
    device("GED_", &[("_HID", &"ACPI0013"), ("_UID", &0u8), ("_CRS", &resources)], &[&handler])
}

fn serial_device() -> Vec<u8> {
    let ports = IO::new(serial::PORT, serial::PORT, 1, serial::PORTS as u8);
    let interrupt = Interrupt::new(true, true, false, false, serial::IRQ);
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    device("COM1", &[("_HID", &EISAName::new("PNP0501")), ("_UID", &0u8), ("_CRS", &resources)], &[])
}

/// `LNRO0005`: Linux's id of a virtio-mmio device.
fn virtio_device(index: usize, place: &Place) -> Vec<u8> {
    let window = Memory32Fixed::new(true, place.base as u32, memory::MMIO_STRIDE as u32);
    let interrupt = Interrupt::new(true, true, false, true, place.irq);
    let resources = ResourceTemplate::new(vec![&window, &interrupt]);
    let values: [(&str, &dyn Aml); 4] = [("_HID", &"LNRO0005"), ("_UID", &index), ("_CCA", &1u8), ("_CRS", &resources)];
    device(&format!("V{index:03}"), &values, &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, b| sum.wrapping_add(*b))
    }

    #[test]
    fn tables_are_linked_and_add_up() {
        let memory = memory::allocate(16 << 20).unwrap();
        let places: Vec<Place> = (0..30)
            .map(|n| Place { base: memory::MMIO_BASE + n * memory::MMIO_STRIDE, irq: 5 + n as u32 % 10 })
            .collect();
        write(&memory, 32, &places).unwrap();
        let read = |at: u64, len: usize| {
            let mut bytes = vec![0u8; len];
            memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            bytes
        };
        let rsdp = read(memory::ACPI_TABLES, 36);
        assert_eq!((&rsdp[..8], sum(&rsdp)), (&b"RSD PTR "[..], 0));
        let table = |at: u64| {
            let len = u32::from_le_bytes(read(at + 4, 4).try_into().unwrap());
            let bytes = read(at, len as usize);
            assert_eq!(sum(&bytes), 0, "{:?}", &bytes[..4]);
            bytes
        };
        let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let xsdt = table(word(&rsdp, 24));
        let (fadt, madt) = (table(word(&xsdt, 36)), table(word(&xsdt, 44)));
        assert_eq!((&fadt[..4], &madt[..4]), (&b"FACP"[..], &b"APIC"[..]));
        assert_eq!(madt.len(), 44 + 32 * 8 + 12);
        let dsdt = table(word(&fadt, 140));
        assert_eq!(dsdt.windows(8).filter(|w| w == b"LNRO0005").count(), 30);
    }
}
