//! Mount options as `config.json` writes them, sorted by what the kernel takes them for.

use crate::error::{Error, Result};
use libc::{
    MOUNT_ATTR__ATIME, MOUNT_ATTR_NOATIME, MOUNT_ATTR_NODEV, MOUNT_ATTR_NODIRATIME, MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID, MOUNT_ATTR_NOSYMFOLLOW, MOUNT_ATTR_RDONLY, MOUNT_ATTR_STRICTATIME,
};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// `MOUNT_ATTR_*` bits.
    pub set: u64,
    pub clear: u64,
    /// The same for all mounts below.
    pub set_below: u64,
    pub clear_below: u64,
    /// `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED` or `MS_UNBINDABLE`; 0 = private, the default.
    pub propagation: u64,
    pub propagation_below: bool,
    pub bind: bool,
    pub recursive: bool,
    pub id_map: bool,
    pub id_map_below: bool,
    /// A tmpfs begins with what it covers.
    pub copy_up: bool,
    /// For the file system itself: `key=value` or `key`.
    pub data: Vec<(String, Option<String>)>,
}

impl Options {
    pub fn parse(options: &[String]) -> Result<Self> {
        let mut parsed = Self::default();
        for option in options {
            if parsed.flag(option) {
                continue;
            }
            match option.as_str() {
                "bind" => parsed.bind = true,
                "rbind" => (parsed.bind, parsed.recursive) = (true, true),
                "private" | "slave" | "shared" | "unbindable" => parsed.propagation = propagation(option),
                "rprivate" | "rslave" | "rshared" | "runbindable" => {
                    (parsed.propagation, parsed.propagation_below) = (propagation(&option[1..]), true);
                }
                "idmap" => parsed.id_map = true,
                "ridmap" => (parsed.id_map, parsed.id_map_below) = (true, true),
                "tmpcopyup" => parsed.copy_up = true,
                // Defaults, and what the new mount calls have no name for.
                "defaults" | "async" | "silent" | "loud" | "iversion" | "noiversion" | "" => {}
                "remount" => return Err(Error::Refused(format!("mount option {option:?} is not supported"))),
                other => parsed.data.push(match other.split_once('=') {
                    Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                    None => (other.to_owned(), None),
                }),
            }
        }
        Ok(parsed)
    }

    /// Options that are attributes of a mount; with an `r` in front they are of all mounts below too.
    fn flag(&mut self, option: &str) -> bool {
        if let Some((bits, on)) = attribute(option) {
            change(&mut self.set, &mut self.clear, bits, on);
            return true;
        }
        // `ro` and `relatime` have an `r` of their own and are found above.
        let Some((bits, on)) = option.strip_prefix('r').and_then(attribute) else { return false };
        change(&mut self.set_below, &mut self.clear_below, bits, on);
        true
    }

    /// What is set on the mount itself, whichever way it was asked for.
    pub fn set_at_top(&self) -> u64 {
        (self.set & !self.clear_below) | self.set_below
    }
}

/// An option's bits, and whether it sets or clears them.
fn attribute(option: &str) -> Option<(u64, bool)> {
    Some(match option {
        "ro" => (MOUNT_ATTR_RDONLY, true),
        "rw" => (MOUNT_ATTR_RDONLY, false),
        "nosuid" => (MOUNT_ATTR_NOSUID, true),
        "suid" => (MOUNT_ATTR_NOSUID, false),
        "nodev" => (MOUNT_ATTR_NODEV, true),
        "dev" => (MOUNT_ATTR_NODEV, false),
        "noexec" => (MOUNT_ATTR_NOEXEC, true),
        "exec" => (MOUNT_ATTR_NOEXEC, false),
        "nodiratime" => (MOUNT_ATTR_NODIRATIME, true),
        "diratime" => (MOUNT_ATTR_NODIRATIME, false),
        "nosymfollow" => (MOUNT_ATTR_NOSYMFOLLOW, true),
        "symfollow" => (MOUNT_ATTR_NOSYMFOLLOW, false),
        "noatime" => (MOUNT_ATTR_NOATIME, true),
        "strictatime" => (MOUNT_ATTR_STRICTATIME, true),
        "relatime" => (MOUNT_ATTR__ATIME, false),
        "atime" => (MOUNT_ATTR_NOATIME, false),
        "norelatime" | "nostrictatime" => (0, true),
        _ => return None,
    })
}

fn change(set: &mut u64, clear: &mut u64, bits: u64, on: bool) {
    if bits & MOUNT_ATTR__ATIME != 0 {
        // The kernel wants the whole field cleared before one of its values is set.
        *clear |= MOUNT_ATTR__ATIME;
        *set = (*set & !MOUNT_ATTR__ATIME) | if on { bits } else { 0 };
    } else if on {
        *set |= bits;
        *clear &= !bits;
    } else {
        *clear |= bits;
        *set &= !bits;
    }
}

fn propagation(name: &str) -> u64 {
    match name {
        "slave" => libc::MS_SLAVE,
        "shared" => libc::MS_SHARED,
        "unbindable" => libc::MS_UNBINDABLE,
        _ => libc::MS_PRIVATE,
    }
}

/// Every option that is understood by name, for `features`.
pub const KNOWN: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "exec",
    "idmap",
    "iversion",
    "loud",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "noiversion",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "rexec",
    "ridmap",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "tmpcopyup",
    "unbindable",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_options_win() {
        let of = |list: &[&str]| Options::parse(&list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>()).expect("ok");
        let parsed = of(&["rbind", "ro", "rw", "nosuid", "rslave", "mode=755", "size=1k", "inode64"]);
        assert!(parsed.bind && parsed.recursive);
        assert_eq!(parsed.set, MOUNT_ATTR_NOSUID);
        assert_eq!(parsed.clear, MOUNT_ATTR_RDONLY);
        assert_eq!(parsed.propagation, libc::MS_SLAVE);
        assert_eq!(parsed.data.len(), 3);
        assert_eq!(of(&["noatime", "relatime"]).set, 0);
        assert!(Options::parse(&["remount".to_owned()]).is_err());
        let recursive = of(&["rro", "rnosuid", "rw", "rstrictatime", "rprivate"]);
        assert_eq!(recursive.set_below, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_STRICTATIME);
        assert_eq!((recursive.set, recursive.clear), (0, MOUNT_ATTR_RDONLY));
        assert!(recursive.propagation_below && recursive.data.is_empty());
    }

    #[test]
    fn every_known_option_is_no_data() {
        for option in KNOWN {
            let parsed = Options::parse(&[(*option).to_owned()]).expect(option);
            assert!(parsed.data.is_empty(), "{option}");
        }
    }
}
