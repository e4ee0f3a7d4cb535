//! Instructions of the kernel's virtual machine for packets (BPF; RFC 9669), with labels.

use std::collections::HashMap;

/// Registers: 0 is a call's result, 1 to 5 its arguments, 6 to 9 are kept over calls, 10 is the frame.
#[derive(Clone, Copy)]
pub struct Reg(pub u8);
pub const R0: Reg = Reg(0);
pub const R1: Reg = Reg(1);
pub const R2: Reg = Reg(2);
pub const R3: Reg = Reg(3);
pub const R4: Reg = Reg(4);
pub const R5: Reg = Reg(5);
pub const R6: Reg = Reg(6);
pub const R7: Reg = Reg(7);
pub const R8: Reg = Reg(8);
pub const R9: Reg = Reg(9);
pub const FRAME: Reg = Reg(10);

#[derive(Clone, Copy)]
pub enum Size {
    Byte = 0x10,
    Half = 0x08,
    Word = 0x00,
    Double = 0x18,
}

#[derive(Clone, Copy)]
pub enum Alu {
    Add = 0x00,
    Or = 0x40,
    And = 0x50,
    Shr = 0x70,
    Mov = 0xb0,
}

/// Unsigned comparisons of a register with what follows it.
#[derive(Clone, Copy)]
pub enum If {
    Equal = 0x10,
    Greater = 0x20,
    AnyBit = 0x40,
    Differs = 0x50,
    Less = 0xa0,
}

#[derive(Clone, Copy)]
pub enum Helper {
    MapLookup = 1,
    MapUpdate = 2,
    MapDelete = 3,
    StoreBytes = 9,
    ReplaceL3Checksum = 10,
    ReplaceL4Checksum = 11,
    RedirectPeer = 155,
    CoarseNow = 160,
}

const ALU64: u8 = 0x07;
const JUMP: u8 = 0x05;
const FROM_REGISTER: u8 = 0x08;
const LOAD: u8 = 0x61;
const STORE: u8 = 0x63;
const STORE_IMMEDIATE: u8 = 0x62;
const ATOMIC_ADD: u8 = 0xdb;
const LOAD_IMMEDIATE: u8 = 0x18;
const MAP_DESCRIPTOR: u8 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    pub fn bytes(self) -> [u8; 8] {
        let ([a, b], [c, d, e, f]) = (self.offset.to_ne_bytes(), self.immediate.to_ne_bytes());
        [self.code, self.registers, a, b, c, d, e, f]
    }
}

#[derive(Default)]
pub struct Assembler {
    code: Vec<Instruction>,
    labels: HashMap<&'static str, usize>,
    jumps: Vec<(usize, &'static str)>,
}

impl Assembler {
    fn put(&mut self, code: u8, to: Reg, from: Reg, offset: i16, immediate: i32) {
        self.code.push(Instruction { code, registers: to.0 | from.0 << 4, offset, immediate });
    }
    pub fn label(&mut self, name: &'static str) {
        self.labels.insert(name, self.code.len());
    }
    pub fn load(&mut self, size: Size, to: Reg, from: Reg, offset: i16) {
        self.put(LOAD | size as u8, to, from, offset, 0);
    }
    pub fn store(&mut self, size: Size, to: Reg, offset: i16, from: Reg) {
        self.put(STORE | size as u8, to, from, offset, 0);
    }
    pub fn store_value(&mut self, size: Size, to: Reg, offset: i16, value: i32) {
        self.put(STORE_IMMEDIATE | size as u8, to, R0, offset, value);
    }
    /// Adds to 64 bits in memory, which others may be adding to.
    pub fn count(&mut self, to: Reg, offset: i16, from: Reg) {
        self.put(ATOMIC_ADD, to, from, offset, 0);
    }
    pub fn set(&mut self, to: Reg, from: Reg) {
        self.put(ALU64 | FROM_REGISTER | Alu::Mov as u8, to, from, 0, 0);
    }
    pub fn alu(&mut self, operation: Alu, to: Reg, value: i32) {
        self.put(ALU64 | operation as u8, to, R0, 0, value);
    }
    pub fn alu_of(&mut self, operation: Alu, to: Reg, from: Reg) {
        self.put(ALU64 | FROM_REGISTER | operation as u8, to, from, 0, 0);
    }
    pub fn value(&mut self, to: Reg, value: i32) {
        self.alu(Alu::Mov, to, value);
    }
    /// `to` becomes the address `offset` behind `from`.
    pub fn address(&mut self, to: Reg, from: Reg, offset: i16) {
        self.set(to, from);
        self.alu(Alu::Add, to, offset.into());
    }
    pub fn jump_if(&mut self, register: Reg, condition: If, value: i32, label: &'static str) {
        self.jumps.push((self.code.len(), label));
        self.put(JUMP | condition as u8, register, R0, 0, value);
    }
    pub fn jump_if_register(&mut self, register: Reg, condition: If, other: Reg, label: &'static str) {
        self.jumps.push((self.code.len(), label));
        self.put(JUMP | FROM_REGISTER | condition as u8, register, other, 0, 0);
    }
    pub fn jump(&mut self, label: &'static str) {
        self.jumps.push((self.code.len(), label));
        self.put(JUMP, R0, R0, 0, 0);
    }
    pub fn call(&mut self, helper: Helper) {
        self.put(JUMP | 0x80, R0, R0, 0, helper as i32);
    }
    pub fn end(&mut self) {
        self.put(JUMP | 0x90, R0, R0, 0, 0);
    }
    /// A map, by its file descriptor.
    pub fn map(&mut self, to: Reg, descriptor: i32) {
        self.put(LOAD_IMMEDIATE, to, Reg(MAP_DESCRIPTOR), 0, descriptor);
        self.put(0, R0, R0, 0, 0);
    }

    /// `None`: a jump has no target, or one too far.
    pub fn finish(mut self) -> Option<Vec<Instruction>> {
        for (place, label) in self.jumps {
            let target = *self.labels.get(label)?;
            let distance = i16::try_from(target as i64 - place as i64 - 1).ok()?;
            self.code.get_mut(place)?.offset = distance;
        }
        Some(self.code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_as_the_specification_numbers_them() {
        let mut a = Assembler::default();
        a.label("start");
        a.load(Size::Half, R1, R7, 12);
        a.jump_if(R1, If::Differs, 8, "end");
        a.store(Size::Double, FRAME, -8, R2);
        a.jump("start");
        a.label("end");
        a.value(R0, -1);
        a.end();
        let code: Vec<[u8; 8]> = a.finish().unwrap().into_iter().map(Instruction::bytes).collect();
        let want = [
            [0x69, 0x71, 12, 0, 0, 0, 0, 0],
            [0x55, 0x01, 2, 0, 8, 0, 0, 0],
            [0x7b, 0x2a, 0xf8, 0xff, 0, 0, 0, 0],
            [0x05, 0, 0xfc, 0xff, 0, 0, 0, 0],
            [0xb7, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
            [0x95, 0, 0, 0, 0, 0, 0, 0],
        ];
        assert_eq!(code, want);
    }

    #[test]
    fn a_jump_to_nowhere_is_refused() {
        let mut a = Assembler::default();
        a.jump("nowhere");
        assert!(a.finish().is_none());
    }
}
