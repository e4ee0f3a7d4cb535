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
    /// `MS_PRIVATE`, `MS_SLAVE` or `MS_SHARED`; 0 = private, the default.
    pub propagation: u64,
    pub bind: bool,
    pub recursive: bool,
    pub id_map: bool,
    /// For the file system itself: `key=value` or `key`.
    pub data: Vec<(String, Option<String>)>,
}

impl Options {
    pub fn parse(options: &[String]) -> Result<Self> {
        let mut parsed = Self::default();
        for option in options {
            match option.as_str() {
                "ro" | "rro" => parsed.set(MOUNT_ATTR_RDONLY),
                "rw" => parsed.clear(MOUNT_ATTR_RDONLY),
                "nosuid" => parsed.set(MOUNT_ATTR_NOSUID),
                "suid" => parsed.clear(MOUNT_ATTR_NOSUID),
                "nodev" => parsed.set(MOUNT_ATTR_NODEV),
                "dev" => parsed.clear(MOUNT_ATTR_NODEV),
                "noexec" => parsed.set(MOUNT_ATTR_NOEXEC),
                "exec" => parsed.clear(MOUNT_ATTR_NOEXEC),
                "nodiratime" => parsed.set(MOUNT_ATTR_NODIRATIME),
                "diratime" => parsed.clear(MOUNT_ATTR_NODIRATIME),
                "nosymfollow" => parsed.set(MOUNT_ATTR_NOSYMFOLLOW),
                "noatime" => parsed.atime(MOUNT_ATTR_NOATIME),
                "strictatime" => parsed.atime(MOUNT_ATTR_STRICTATIME),
                "relatime" => parsed.atime(0),
                "bind" => parsed.bind = true,
                "rbind" => (parsed.bind, parsed.recursive) = (true, true),
                "private" | "rprivate" => parsed.propagation = libc::MS_PRIVATE,
                "slave" | "rslave" => parsed.propagation = libc::MS_SLAVE,
                "shared" | "rshared" => parsed.propagation = libc::MS_SHARED,
                "idmap" | "ridmap" => parsed.id_map = true,
                "defaults" | "async" | "" => {}
                "unbindable" | "runbindable" | "remount" | "tmpcopyup" => {
                    return Err(Error::Refused(format!("mount option {option:?} is not supported")));
                }
                other => parsed.data.push(match other.split_once('=') {
                    Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                    None => (other.to_owned(), None),
                }),
            }
        }
        Ok(parsed)
    }

    fn set(&mut self, bits: u64) {
        self.set |= bits;
        self.clear &= !bits;
    }

    fn clear(&mut self, bits: u64) {
        self.clear |= bits;
        self.set &= !bits;
    }

    fn atime(&mut self, bits: u64) {
        self.clear |= MOUNT_ATTR__ATIME;
        self.set = (self.set & !MOUNT_ATTR__ATIME) | bits;
    }
}

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
    }
}
