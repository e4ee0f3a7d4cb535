//! The default seccomp profile: which system calls a container may make. `default.table` is the policy, to be read and
//! argued about; this turns it into a filter for a set of capabilities.

mod bpf;
mod numbers;
mod profile;

pub use profile::{ACTIONS, ARCHITECTURES, FLAGS, Filter, OPERATORS, compile};

use crate::sys::Instruction;
use bpf::{Action, Test};
use std::collections::BTreeMap;

const TABLE: &str = include_str!("default.table");

/// CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET.
const NAMESPACES: u32 = 0x7e02_0000;
const AF_ALG: u32 = 38;
const AF_VSOCK: u32 = 40;

/// The filter for a container with these capabilities (`CAP_*`).
pub fn default_filter(capabilities: &[String]) -> Vec<Instruction> {
    let rules: Vec<(u32, Action)> = rules(capabilities)
        .into_iter()
        .filter_map(|(name, action)| Some((numbers::number(name)?, action)))
        .collect::<BTreeMap<_, _>>()
        .into_iter()
        .collect();
    bpf::assemble(&rules, numbers::LAST, &Action::Errno(libc::EPERM as u16))
}

/// Later lines win over earlier ones: a capability lifts a check.
fn rules(capabilities: &[String]) -> BTreeMap<&'static str, Action> {
    let mut rules = BTreeMap::new();
    for line in TABLE.lines() {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let action = match words.next() {
            Some("allow") => Action::Allow,
            Some("absent") => Action::Errno(libc::ENOSYS as u16),
            Some("check") => check(words.next().unwrap_or_default()),
            Some("with") => {
                let wanted = words.next().unwrap_or_default();
                if !capabilities.iter().any(|c| c == wanted) {
                    continue;
                }
                Action::Allow
            }
            _ => continue,
        };
        rules.extend(words.map(|name| (name, action.clone())));
    }
    rules
}

fn check(rule: &str) -> Action {
    match rule {
        "namespaces" => {
            // On s390 the flags are the second argument; Atoll does not run there.
            Action::Check { arg: 0, test: Test::NoneOf(NAMESPACES) }
        }
        "families" => Action::Check { arg: 0, test: Test::NotValues(vec![AF_ALG, AF_VSOCK]) },
        "personas" => {
            Action::Check { arg: 0, test: Test::OneOfValues(vec![0, 0x0008, 0x2_0000, 0x2_0008, 0xffff_ffff]) }
        }
        _ => Action::Errno(libc::EPERM as u16),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_name_in_the_table_is_a_system_call() {
        for line in TABLE.lines().filter(|l| !l.starts_with('#') && !l.is_empty()) {
            let mut words = line.split_whitespace();
            let verb = words.next().expect("a verb");
            match verb {
                "allow" | "absent" => {}
                "with" => assert!(words.next().is_some_and(|c| crate::process::capability(c).is_some()), "{line}"),
                "check" => assert_ne!(check(words.next().unwrap_or_default()), Action::Errno(1), "{line}"),
                _ => panic!("{line}"),
            }
            for name in words {
                let known = numbers::number(name).is_some() || cfg!(not(target_arch = "x86_64"));
                assert!(known, "{name} is no system call");
            }
        }
    }

    #[test]
    fn what_it_must_refuse() {
        let filter = default_filter(&[]);
        let arch = if cfg!(target_arch = "x86_64") { 0xc000_003e } else { 0xc000_00b7 };
        let outcome =
            |name: &str, arg: u64| bpf::run(&filter, arch, numbers::number(name).expect(name), [arg, 0, 0, 0, 0, 0]);
        let (allow, eperm) = (0x7fff_0000, 0x0005_0001);
        for name in [
            "unshare",
            "mount",
            "keyctl",
            "add_key",
            "setns",
            "bpf",
            "io_uring_setup",
            "userfaultfd",
            "reboot",
            "kexec_load",
            "init_module",
            "open_by_handle_at",
            "pivot_root",
            "perf_event_open",
            "syslog",
            "chroot",
        ] {
            assert_eq!(outcome(name, 0), eperm, "{name}");
        }
        for name in ["read", "execve", "futex", "openat", "exit_group", "rseq", "mmap"] {
            assert_eq!(outcome(name, 0), allow, "{name}");
        }
        assert_eq!(outcome("clone", 0x0001_1200), allow);
        assert_eq!(outcome("clone", 0x1000_0000), eperm);
        assert_eq!(outcome("clone3", 0), 0x0005_0026);
        assert_eq!(outcome("socket", 2), allow);
        assert_eq!(outcome("socket", 40), eperm);
        assert_eq!(outcome("personality", 0x0004_0000), eperm);
    }

    #[test]
    fn capabilities_open_what_they_are_for() {
        let rules = rules(&["CAP_SYS_ADMIN".to_owned()]);
        assert_eq!(rules.get("mount"), Some(&Action::Allow));
        assert_eq!(rules.get("clone3"), Some(&Action::Allow));
        assert_eq!(rules.get("reboot"), None);
    }

    /// Compared with the profile that the distribution's container tools install, where it is.
    #[test]
    fn no_looser_than_the_fields_default() {
        let Ok(text) = std::fs::read_to_string("/usr/share/containers/seccomp.json") else {
            println!("SKIPPED: no /usr/share/containers/seccomp.json here");
            return;
        };
        let profile: serde_json::Value = serde_json::from_str(&text).expect("profile parses");
        let mut theirs = BTreeSet::new();
        for rule in profile["syscalls"].as_array().expect("list") {
            let unconditional = rule["includes"]["caps"].is_null() && rule["args"].as_array().is_none_or(Vec::is_empty);
            if rule["action"] == "SCMP_ACT_ALLOW" && unconditional {
                theirs.extend(rule["names"].as_array().expect("names").iter().filter_map(|n| n.as_str()));
            }
        }
        // Younger than that file, harmless: each only a variant of what it allows.
        let newer = [
            "cachestat",
            "fchmodat2",
            "futex_requeue",
            "futex_wait",
            "futex_waitv",
            "futex_wake",
            "getxattrat",
            "listxattrat",
            "map_shadow_stack",
            "mseal",
            "removexattrat",
            "setxattrat",
        ];
        for (name, action) in rules(&[]) {
            if action == Action::Allow && !newer.contains(&name) {
                assert!(theirs.contains(name), "{name} is allowed here and not there");
            }
        }
    }
}
