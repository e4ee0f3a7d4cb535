//! The host's forwarding switches, as they were before an uplink: one `name value` line each.

use crate::error::{Error, Result};
use crate::ns;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

const MARK: &str = "atoll-uplink 1";
const FORWARD: &str = "ipv4/ip_forward";

/// Writes down what turning on forwarding changes, unless an earlier process has. The thread is in the host's namespace.
pub fn save(state: &Path) -> Result<()> {
    if state.exists() {
        return Ok(());
    }
    let mut text = format!("{MARK}\n");
    if read(FORWARD)?.as_deref() == Some("0") {
        // Forwarding turned on or off sets each device's own switch, and whether redirects are believed.
        let mut names = vec![FORWARD.to_owned()];
        let conf = Path::new("/proc/sys/net/ipv4/conf");
        for entry in fs::read_dir(conf).map_err(Error::file("list", conf))?.flatten() {
            let device = entry.file_name().to_string_lossy().into_owned();
            names.extend(["forwarding", "accept_redirects"].map(|name| format!("ipv4/conf/{device}/{name}")));
        }
        for name in names {
            if let Some(value) = read(&name)? {
                text.push_str(&format!("{name} {value}\n"));
            }
        }
    }
    let new = state.with_extension("new");
    fs::write(&new, text).map_err(Error::file("write", &new))?;
    fs::rename(&new, state).map_err(Error::file("rename", &new))
}

/// Puts back what [`save`] wrote down, and forgets it. The thread is in the host's namespace.
pub fn restore(state: &Path) -> Result<()> {
    let text = fs::read_to_string(state).map_err(Error::file("read", state))?;
    let mut lines = text.lines();
    if lines.next() == Some(MARK) {
        for (name, value) in lines.filter_map(|line| line.split_once(' ')) {
            if read(name)?.is_some_and(|now| now != value) {
                ns::sysctl(name, value)?;
            }
        }
    }
    fs::remove_file(state).map_err(Error::file("remove", state))
}

/// `None`: not there (any more).
fn read(name: &str) -> Result<Option<String>> {
    let path = format!("/proc/sys/net/{name}");
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::file("read the sysctl", path)(error)),
    }
}
