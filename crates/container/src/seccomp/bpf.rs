//! An assembler for the one shape of program that is needed: a search tree over system call numbers with an action at
//! each leaf.

use crate::sys::Instruction;

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_GREATER_OR_EQUAL: u16 = 0x35;
const JUMP_GREATER: u16 = 0x25;
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const JUMP_ANY_BIT: u16 = 0x45; // BPF_JSET
const RETURN: u16 = 0x06;

const RET_KILL_PROCESS: u32 = 0x8000_0000;
const RET_ERRNO: u32 = 0x0005_0000;
const RET_ALLOW: u32 = 0x7fff_0000;

const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCH: u32 = 4;

#[cfg(target_arch = "x86_64")]
pub const ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
pub const ARCH: u32 = 0xc000_00b7;

/// What happens to a system call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Allow,
    Errno(u16),
    /// Allowed if the low word of argument `arg` passes.
    Check {
        arg: u8,
        test: Test,
    },
    /// Instructions that end in a return.
    Code(Vec<Instruction>),
}

/// Looks at the low 32 bits of one argument: all calls that are checked take an int or flags below bit 32.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Test {
    NoneOf(u32),
    OneOfValues(Vec<u32>),
    NotValues(Vec<u32>),
}

/// What one architecture's system calls get.
pub struct Table {
    pub arch: u32,
    /// Sorted by number, one each.
    pub rules: Vec<(u32, Action)>,
    /// The last number that is known.
    pub last: u32,
    /// For what lies past that.
    pub past: Action,
}

/// What the rules leave out gets `default`, what lies past `last` ENOSYS, other architectures are killed.
pub fn assemble(rules: &[(u32, Action)], last: u32, default: &Action) -> Vec<Instruction> {
    let past = Action::Errno(libc::ENOSYS as u16);
    assemble_all(&[Table { arch: ARCH, rules: rules.to_vec(), last, past }], default)
}

/// The same for several architectures.
pub fn assemble_all(tables: &[Table], default: &Action) -> Vec<Instruction> {
    let mut program = vec![op(LOAD, OFFSET_ARCH)];
    for table in tables {
        let mut body = vec![op(LOAD, OFFSET_NUMBER)];
        tree(&ranges(table, default), &mut body);
        program.push(branch(JUMP_EQUAL, table.arch, 1, 0));
        program.push(op(JUMP, body.len() as u32));
        program.append(&mut body);
    }
    program.push(op(RETURN, RET_KILL_PROCESS));
    program
}

fn ranges(table: &Table, default: &Action) -> Vec<(u32, Action)> {
    let mut ranges: Vec<(u32, Action)> = Vec::new();
    let push = |start: u32, action: &Action, ranges: &mut Vec<(u32, Action)>| match ranges.last() {
        Some((_, before)) if before == action => {}
        _ => ranges.push((start, action.clone())),
    };
    let mut next = 0;
    for (number, action) in &table.rules {
        if *number > next {
            push(next, default, &mut ranges);
        }
        push(*number, action, &mut ranges);
        next = number + 1;
    }
    if next <= table.last {
        push(next, default, &mut ranges);
    }
    push(table.last.max(next.saturating_sub(1)) + 1, &table.past, &mut ranges);
    ranges
}

pub fn ret(value: u32) -> Instruction {
    op(RETURN, value)
}

/// Where a comparison goes on.
#[derive(Clone, Copy)]
enum Goto {
    Next,
    /// This condition holds.
    Holds,
    /// It does not, and neither does the rule.
    Fails,
}

/// Returns `action` if all conditions (argument, `SCMP_CMP_*`, value, second value) hold, and goes on behind if not.
pub fn when<'a>(conditions: impl Iterator<Item = (u32, &'a str, u64, u64)>, action: u32) -> Vec<Instruction> {
    let parts: Vec<Vec<(Instruction, Goto, Goto)>> = conditions.map(|(i, op, a, b)| compare(i, op, a, b)).collect();
    let total: usize = parts.iter().map(Vec::len).sum::<usize>() + 1;
    let mut code = Vec::with_capacity(total);
    let mut end = 0;
    for part in parts {
        end += part.len();
        for (instruction, yes, no) in part {
            let after = code.len() + 1;
            // At most 6 conditions of 6 instructions: a byte is enough.
            let distance = |to: Goto| match to {
                Goto::Next => 0,
                Goto::Holds => (end - after) as u8,
                Goto::Fails => (total - after) as u8,
            };
            code.push(Instruction { jt: distance(yes), jf: distance(no), ..instruction });
        }
    }
    code.push(ret(action));
    code
}

/// struct seccomp_data has 64-bit arguments from byte 16 on, little-endian here; the machine compares 32 bits.
fn compare(index: u32, operator: &str, value: u64, second: u64) -> Vec<(Instruction, Goto, Goto)> {
    use Goto::{Fails, Holds, Next};
    let low = (op(LOAD, 16 + index * 8), Next, Next);
    let high = (op(LOAD, 20 + index * 8), Next, Next);
    let (value_high, value_low) = ((value >> 32) as u32, value as u32);
    let test = |code, k, yes, no| (op(code, k), yes, no);
    let ordered = |above: Goto, below: Goto, last: u16, yes: Goto, no: Goto| {
        vec![
            high,
            test(JUMP_GREATER, value_high, above, Next),
            test(JUMP_EQUAL, value_high, Next, below),
            low,
            test(last, value_low, yes, no),
        ]
    };
    match operator {
        "SCMP_CMP_EQ" => {
            vec![high, test(JUMP_EQUAL, value_high, Next, Fails), low, test(JUMP_EQUAL, value_low, Holds, Fails)]
        }
        "SCMP_CMP_NE" => {
            vec![high, test(JUMP_EQUAL, value_high, Next, Holds), low, test(JUMP_EQUAL, value_low, Fails, Holds)]
        }
        "SCMP_CMP_GT" => ordered(Holds, Fails, JUMP_GREATER, Holds, Fails),
        "SCMP_CMP_GE" => ordered(Holds, Fails, JUMP_GREATER_OR_EQUAL, Holds, Fails),
        "SCMP_CMP_LT" => ordered(Fails, Holds, JUMP_GREATER_OR_EQUAL, Fails, Holds),
        "SCMP_CMP_LE" => ordered(Fails, Holds, JUMP_GREATER, Fails, Holds),
        // Masked; operators are checked by who calls.
        _ => vec![
            high,
            (op(AND, value_high), Next, Next),
            test(JUMP_EQUAL, (second >> 32) as u32, Next, Fails),
            low,
            (op(AND, value_low), Next, Next),
            test(JUMP_EQUAL, second as u32, Holds, Fails),
        ],
    }
}

fn op(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

fn branch(code: u16, k: u32, jt: u8, jf: u8) -> Instruction {
    Instruction { code, jt, jf, k }
}

/// Each range reaches to the start of the next one.
fn tree(ranges: &[(u32, Action)], program: &mut Vec<Instruction>) {
    match ranges {
        [] => {}
        [(_, action)] => leaf(action, program),
        _ => {
            let (low, high) = ranges.split_at(ranges.len() / 2);
            let pivot = high.first().map_or(0, |(start, _)| *start);
            let mut left = Vec::new();
            tree(low, &mut left);
            match u8::try_from(left.len()) {
                Ok(distance) => program.push(branch(JUMP_GREATER_OR_EQUAL, pivot, distance, 0)),
                Err(_) => {
                    program.push(branch(JUMP_GREATER_OR_EQUAL, pivot, 0, 1));
                    program.push(op(JUMP, left.len() as u32));
                }
            }
            program.append(&mut left);
            tree(high, program);
        }
    }
}

fn leaf(action: &Action, program: &mut Vec<Instruction>) {
    match action {
        Action::Code(code) => program.extend_from_slice(code),
        Action::Allow => program.push(op(RETURN, RET_ALLOW)),
        Action::Errno(errno) => program.push(op(RETURN, RET_ERRNO | u32::from(*errno))),
        Action::Check { arg, test } => {
            let refuse = op(RETURN, RET_ERRNO | libc::EPERM as u32);
            // struct seccomp_data: nr, arch, instruction pointer, then six 64-bit arguments (little-endian here).
            program.push(op(LOAD, 16 + u32::from(*arg) * 8));
            match test {
                Test::NoneOf(mask) => {
                    program.push(branch(JUMP_ANY_BIT, *mask, 0, 1));
                    program.push(refuse);
                    program.push(op(RETURN, RET_ALLOW));
                }
                Test::OneOfValues(values) => {
                    for value in values {
                        program.push(branch(JUMP_EQUAL, *value, 0, 1));
                        program.push(op(RETURN, RET_ALLOW));
                    }
                    program.push(refuse);
                }
                Test::NotValues(values) => {
                    for value in values {
                        program.push(branch(JUMP_EQUAL, *value, 0, 1));
                        program.push(refuse);
                    }
                    program.push(op(RETURN, RET_ALLOW));
                }
            }
        }
    }
}

/// Runs a program as the kernel would, for tests.
#[cfg(test)]
pub fn run(program: &[Instruction], arch: u32, number: u32, args: [u64; 6]) -> u32 {
    let mut at = 0;
    let mut accumulator = 0;
    loop {
        let i = program[at];
        at += 1;
        let jump = |condition: bool| if condition { i.jt as usize } else { i.jf as usize };
        match i.code {
            LOAD => {
                accumulator = match i.k {
                    OFFSET_NUMBER => number,
                    OFFSET_ARCH => arch,
                    offset if offset % 8 == 4 => (args[(offset as usize - 16) / 8] >> 32) as u32,
                    offset => args[(offset as usize - 16) / 8] as u32,
                }
            }
            JUMP => at += i.k as usize,
            JUMP_EQUAL => at += jump(accumulator == i.k),
            AND => accumulator &= i.k,
            JUMP_GREATER => at += jump(accumulator > i.k),
            JUMP_GREATER_OR_EQUAL => at += jump(accumulator >= i.k),
            JUMP_ANY_BIT => at += jump(accumulator & i.k != 0),
            RETURN => return i.k,
            other => panic!("code {other:#x}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const DENY: Action = Action::Errno(libc::EPERM as u16);

    proptest! {
        #[test]
        fn every_number_gets_its_action(
            rules in proptest::collection::btree_map(0u32..500, prop_oneof![Just(Action::Allow), Just(DENY),
                Just(Action::Errno(38))], 0..400)
        ) {
            let rules: BTreeMap<u32, Action> = rules;
            let list: Vec<_> = rules.iter().map(|(n, a)| (*n, a.clone())).collect();
            let program = assemble(&list, 500, &DENY);
            prop_assert!(program.len() < 4096);
            for number in 0..520 {
                let expected = if number > 500 { Action::Errno(38) } else { rules.get(&number).cloned().unwrap_or(DENY) };
                let expected = match expected { Action::Allow => RET_ALLOW, Action::Errno(e) => RET_ERRNO | u32::from(e),
                    Action::Check { .. } | Action::Code(_) => unreachable!() };
                prop_assert_eq!(run(&program, ARCH, number, [0; 6]), expected, "number {}", number);
            }
        }
    }

    proptest! {
        #[test]
        fn comparisons_are_those_of_64_bits(value in edge(), second in edge(), arg in edge(), index in 0u32..6) {
            let mut args = [!arg; 6];
            args[index as usize] = arg;
            for (operator, holds) in [
                ("SCMP_CMP_EQ", arg == value), ("SCMP_CMP_NE", arg != value), ("SCMP_CMP_GT", arg > value),
                ("SCMP_CMP_GE", arg >= value), ("SCMP_CMP_LT", arg < value), ("SCMP_CMP_LE", arg <= value),
                ("SCMP_CMP_MASKED_EQ", arg & value == second),
            ] {
                let one = (index, operator, value, second);
                for conditions in [vec![one], vec![one, one]] {
                    let mut program = when(conditions.into_iter(), 7);
                    program.push(ret(9));
                    prop_assert_eq!(run(&program, ARCH, 0, args), if holds { 7 } else { 9 }, "{}", operator);
                }
            }
        }
    }

    fn edge() -> impl Strategy<Value = u64> {
        prop_oneof![
            Just(0),
            Just(1),
            Just(u64::from(u32::MAX)),
            Just(1 << 32),
            Just((1 << 32) + 1),
            Just(u64::MAX),
            any::<u64>(),
            0u64..4
        ]
    }

    #[test]
    fn foreign_architectures_are_killed_and_arguments_are_looked_at() {
        let program = assemble(
            &[
                (5, Action::Check { arg: 0, test: Test::NoneOf(0x10) }),
                (6, Action::Check { arg: 1, test: Test::OneOfValues(vec![1, 2]) }),
                (7, Action::Check { arg: 2, test: Test::NotValues(vec![3]) }),
            ],
            10,
            &DENY,
        );
        let deny = RET_ERRNO | 1;
        assert_eq!(run(&program, 0x4000_0003, 5, [0; 6]), RET_KILL_PROCESS);
        assert_eq!(run(&program, ARCH, 5, [0x0f, 0, 0, 0, 0, 0]), RET_ALLOW);
        assert_eq!(run(&program, ARCH, 5, [0x1f, 0, 0, 0, 0, 0]), deny);
        assert_eq!(run(&program, ARCH, 6, [0, 2, 0, 0, 0, 0]), RET_ALLOW);
        assert_eq!(run(&program, ARCH, 6, [0, 3, 0, 0, 0, 0]), deny);
        assert_eq!(run(&program, ARCH, 7, [0, 0, 3, 0, 0, 0]), deny);
        assert_eq!(run(&program, ARCH, 7, [0, 0, 4, 0, 0, 0]), RET_ALLOW);
        // x32's numbers have bit 30 set: past the end.
        assert_eq!(run(&program, ARCH, 0x4000_0005, [0; 6]), RET_ERRNO | 38);
    }
}
