//! Which devices a group may use: `devices.allow` and `devices.deny` of version 1, a BPF program on version 2.

use super::{Cgroup, Hierarchies};
use crate::error::{During, Error, Result};
use crate::spec::DeviceRule;
use crate::sys::{BpfInstruction, attach_device_program, load_device_program};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};

/// Bounds the program; the verifier takes far more.
const MAX_RULES: usize = 4096;

const CHARACTER: u8 = b'c';
const BLOCK: u8 = b'b';

/// For a container without rules of its own: nothing but the usual nodes, which may be made too. As the field's
/// runtimes have it.
pub fn default_rules() -> Vec<DeviceRule> {
    let mut rules = vec![DeviceRule { access: "rwm".into(), ..Default::default() }];
    rules.extend(always_allowed());
    rules
}

/// What every container may use, whatever its configuration says before.
pub fn always_allowed() -> Vec<DeviceRule> {
    let rule = |kind: &str, major, minor, access: &str| DeviceRule {
        allow: true,
        kind: Some(kind.into()),
        major,
        minor,
        access: access.into(),
    };
    let mut rules = vec![rule("c", None, None, "m"), rule("b", None, None, "m"), rule("c", Some(136), None, "rwm")];
    for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)] {
        rules.push(rule("c", Some(major), Some(minor), "rwm"));
    }
    rules
}

/// The program of [`default_rules`], loaded before a container waits for it.
pub struct DefaultDevices(OwnedFd);

impl DefaultDevices {
    /// `None` where no program decides, or where it cannot be loaded: whoever needs it tells why.
    pub fn load(hierarchies: &Hierarchies) -> Option<DefaultDevices> {
        if hierarchies.v1("devices").is_some() {
            return None;
        }
        let rules = default_rules().iter().map(Rule::parse).collect::<Result<Vec<_>>>().ok()?;
        load_device_program(&program(&rules)).ok().map(DefaultDevices)
    }
}

impl Cgroup {
    /// Holds the group to `rules`; without any it keeps what its parent has.
    pub fn set_devices(&self, rules: &[DeviceRule], default: Option<&DefaultDevices>) -> Result<()> {
        if rules.is_empty() {
            return Ok(());
        }
        if rules.len() > MAX_RULES {
            return Err(Error::Refused(format!(
                "linux.resources.devices: {} rules; {MAX_RULES} are possible",
                rules.len()
            )));
        }
        let is_default = rules == default_rules();
        let rules = rules.iter().map(Rule::parse).collect::<Result<Vec<_>>>()?;
        if let Some(mount) = self.hierarchies.v1("devices") {
            let directory = mount.join(&self.path);
            for rule in &rules {
                let file = directory.join(if rule.allow { "devices.allow" } else { "devices.deny" });
                for line in rule.lines() {
                    fs::write(&file, &line).during(|| format!("{} {line}", file.display()))?;
                }
            }
            return Ok(());
        }
        let Some(directory) = self.v2_directory_to_use() else { return Ok(()) };
        let attach = |program: &OwnedFd| attach_device_program(directory.as_fd(), program.as_fd());
        let attached = match default.filter(|_| is_default) {
            Some(DefaultDevices(program)) => attach(program),
            None => load_device_program(&program(&rules)).and_then(|program| attach(&program)),
        };
        attached.during(|| "linux.resources.devices: attaching the device program".into())
    }
}

struct Rule {
    allow: bool,
    kinds: &'static [u8],
    major: Option<i32>,
    minor: Option<i32>,
    /// 1 make, 2 read, 4 write.
    access: u8,
    everything: bool,
}

impl Rule {
    fn parse(rule: &DeviceRule) -> Result<Self> {
        let refuse = |why: String| Error::Refused(format!("linux.resources.devices: {why}"));
        let kinds: &[u8] = match rule.kind.as_deref() {
            None | Some("" | "a") => &[CHARACTER, BLOCK],
            Some("c" | "u") => &[CHARACTER],
            Some("b") => &[BLOCK],
            Some(other) => return Err(refuse(format!("type {other:?}: a, c or b"))),
        };
        let number = |n: Option<i64>| match n {
            None | Some(-1) => Ok(None),
            Some(n) => i32::try_from(n).ok().filter(|n| *n >= 0).map(Some).ok_or_else(|| refuse(format!("number {n}"))),
        };
        let mut access = 0;
        for letter in rule.access.chars() {
            access |= match letter {
                'm' => 1,
                'r' => 2,
                'w' => 4,
                other => return Err(refuse(format!("access {other:?}: r, w and m"))),
            };
        }
        if access == 0 {
            access = 7;
        }
        let (major, minor) = (number(rule.major)?, number(rule.minor)?);
        let everything = kinds.len() == 2 && major.is_none() && minor.is_none() && access == 7;
        Ok(Self { allow: rule.allow, kinds, major, minor, access, everything })
    }

    /// In the words of version 1.
    fn lines(&self) -> Vec<String> {
        if self.everything {
            return vec!["a".into()];
        }
        let number = |n: Option<i32>| n.map_or("*".into(), |n| n.to_string());
        let access: String =
            [(2, 'r'), (4, 'w'), (1, 'm')].iter().filter(|(bit, _)| self.access & bit != 0).map(|(_, c)| *c).collect();
        let line = |kind: &u8| format!("{} {}:{} {access}", *kind as char, number(self.major), number(self.minor));
        self.kinds.iter().map(line).collect()
    }
}

fn op(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> BpfInstruction {
    BpfInstruction { code, registers: destination | source << 4, offset, immediate }
}

/// Looks at the rules from the last to the first: the first that says something about the request decides. What no rule
/// is about is allowed, as a version 1 group begins.
fn program(rules: &[Rule]) -> Vec<BpfInstruction> {
    const LOAD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
    const AND: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K
    const SHIFT_RIGHT: u8 = 0x74;
    const COPY: u8 = 0xbc; // BPF_ALU | BPF_MOV | BPF_X
    const SET: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
    const JUMP_NOT_EQUAL: u8 = 0x55;
    const JUMP_EQUAL: u8 = 0x15;
    const EXIT: u8 = 0x95;
    // struct bpf_cgroup_dev_ctx: access in the high half of the first word, type in the low one; major; minor.
    let mut code = vec![
        op(LOAD, 2, 1, 0, 0),
        op(COPY, 3, 2, 0, 0),
        op(AND, 2, 0, 0, 0xffff),
        op(SHIFT_RIGHT, 3, 0, 0, 16),
        op(LOAD, 4, 1, 4, 0),
        op(LOAD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let mut tests = Vec::new();
        if let [kind] = rule.kinds {
            tests.push(op(JUMP_NOT_EQUAL, 2, 0, 0, if *kind == BLOCK { 1 } else { 2 }));
        }
        if rule.access != 7 {
            tests.push(op(COPY, 1, 3, 0, 0));
            if rule.allow {
                // Allows only what it covers wholly.
                tests.extend([op(AND, 1, 0, 0, i32::from(!rule.access & 7)), op(JUMP_NOT_EQUAL, 1, 0, 0, 0)]);
            } else {
                tests.extend([op(AND, 1, 0, 0, i32::from(rule.access)), op(JUMP_EQUAL, 1, 0, 0, 0)]);
            }
        }
        tests.extend(rule.major.map(|n| op(JUMP_NOT_EQUAL, 4, 0, 0, n)));
        tests.extend(rule.minor.map(|n| op(JUMP_NOT_EQUAL, 5, 0, 0, n)));
        let length = tests.len();
        let decides_all = length == 0;
        for (n, mut test) in tests.into_iter().enumerate() {
            if matches!(test.code, JUMP_NOT_EQUAL | JUMP_EQUAL) {
                // Over the rest of the tests and the two instructions of the verdict.
                test.offset = (length - n - 1 + 2) as i16;
            }
            code.push(test);
        }
        code.extend([op(SET, 0, 0, 0, i32::from(rule.allow)), op(EXIT, 0, 0, 0, 0)]);
        if decides_all {
            // The verifier refuses what cannot be reached.
            return code;
        }
    }
    code.extend([op(SET, 0, 0, 0, 1), op(EXIT, 0, 0, 0, 0)]);
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel would.
    fn run(code: &[BpfInstruction], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let mut registers = [0u64; 6];
        let memory = [access << 16 | kind, major, minor];
        let mut at = 0usize;
        loop {
            let i = code[at];
            at += 1;
            let (to, from) = ((i.registers & 15) as usize, (i.registers >> 4) as usize);
            match i.code {
                0x61 => registers[to] = u64::from(memory[i.offset as usize / 4]),
                0xbc => registers[to] = registers[from],
                0x54 => registers[to] &= u64::from(i.immediate as u32),
                0x74 => registers[to] >>= i.immediate,
                0xb7 => registers[to] = i.immediate as u64,
                0x55 => at += if registers[to] != i.immediate as u64 { i.offset as usize } else { 0 },
                0x15 => at += if registers[to] == i.immediate as u64 { i.offset as usize } else { 0 },
                0x95 => return registers[0] != 0,
                other => panic!("{other:#x}"),
            }
        }
    }

    fn rules(list: &[DeviceRule]) -> Vec<Rule> {
        list.iter().map(|r| Rule::parse(r).expect("rule")).collect()
    }

    #[test]
    fn later_rules_win() {
        let code = program(&rules(&default_rules()));
        let (block, character) = (1, 2);
        assert!(run(&code, character, 6, 1, 3), "/dev/null");
        assert!(run(&code, character, 2, 136, 7), "a terminal");
        assert!(run(&code, block, 1, 8, 0), "making a node");
        assert!(!run(&code, block, 2, 8, 0), "reading a disk");
        assert!(!run(&code, block, 3, 8, 0), "making and reading");
        assert!(!run(&code, character, 6, 1, 1), "/dev/mem");
        let mut list = default_rules();
        list.push(DeviceRule { allow: true, kind: Some("b".into()), major: Some(8), minor: None, access: "r".into() });
        list.push(DeviceRule {
            allow: false,
            kind: Some("c".into()),
            major: Some(1),
            minor: Some(3),
            access: "w".into(),
        });
        let code = program(&rules(&list));
        assert!(run(&code, block, 2, 8, 5) && !run(&code, block, 4, 8, 5) && !run(&code, block, 6, 8, 5));
        assert!(run(&code, character, 2, 1, 3) && !run(&code, character, 6, 1, 3));
        assert!(run(&program(&rules(&list[3..4])), block, 7, 9, 9), "without a rule for it all is allowed");
    }

    #[test]
    fn in_the_words_of_version_1() {
        let lines: Vec<String> = rules(&default_rules()).iter().flat_map(Rule::lines).collect();
        assert_eq!(lines[..4], ["a", "c *:* m", "b *:* m", "c 136:* rwm"]);
        let odd = DeviceRule { kind: Some("a".into()), major: Some(1), minor: Some(-1), ..Default::default() };
        assert_eq!(Rule::parse(&odd).expect("rule").lines(), ["c 1:* rwm", "b 1:* rwm"]);
        for bad in ["x", "rwx"] {
            assert!(Rule::parse(&DeviceRule { access: bad.into(), ..Default::default() }).is_err());
        }
        assert!(Rule::parse(&DeviceRule { kind: Some("q".into()), ..Default::default() }).is_err());
    }
}
