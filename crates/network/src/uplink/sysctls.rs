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
    let mut names = Vec::new();
    if read(FORWARD)?.as_deref() == Some("0") {
        // Forwarding turned on or off sets each device's own switch, and whether redirects are believed.
        names.push(FORWARD.to_owned());
        for device in devices("ipv4")? {
            names.extend(["forwarding", "accept_redirects"].map(|name| format!("ipv4/conf/{device}/{name}")));
        }
    }
    write_down(state, format!("{MARK}\n"), &names)
}

fn devices(family: &str) -> Result<Vec<String>> {
    let conf = Path::new("/proc/sys/net").join(family).join("conf");
    let entries = fs::read_dir(&conf).map_err(Error::file("list", &conf))?;
    Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

/// Adds what `names` are now to the `text` that is there, whole or not at all.
fn write_down(state: &Path, mut text: String, names: &[String]) -> Result<()> {
    for name in names {
        if let Some(value) = read(name)? {
            text.push_str(&format!("{name} {value}\n"));
        }
    }
    let new = state.with_extension("new");
    fs::write(&new, text).map_err(Error::file("write", &new))?;
    fs::rename(&new, state).map_err(Error::file("rename", &new))
}

/// How the host lets IPv6 pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forwarding6 {
    /// It is an IPv6 router already.
    Router,
    /// It can forward without becoming one (`force_forwarding`, Linux 6.17).
    Forced,
    /// Only by becoming a router, which believes no router advertisements: not Atoll's to decide.
    No,
}

/// The thread is in the host's namespace. Not by `force_forwarding` unless `may_force`.
pub fn forwarding6(may_force: bool) -> Result<Forwarding6> {
    Ok(match (read("ipv6/conf/all/forwarding")?.as_deref(), read(&forced("all"))?) {
        (None, _) => Forwarding6::No,
        (Some("0"), Some(_)) if may_force => Forwarding6::Forced,
        (Some("0"), _) => Forwarding6::No,
        (Some(_), _) => Forwarding6::Router,
    })
}

fn forced(device: &str) -> String {
    format!("ipv6/conf/{device}/force_forwarding")
}

/// Lets IPv6 pass, and the host stay a host; what was before is written down beside [`save`]'s, once. The thread is in the
/// host's namespace.
pub fn force_forwarding6(state: &Path) -> Result<()> {
    let text = fs::read_to_string(state).map_err(Error::file("read", state))?;
    let all = forced("all");
    if !text.contains(&all) {
        // Of all devices first: it sets each device's own switch.
        let names: Vec<String> = [all.clone()].into_iter().chain(devices("ipv6")?.iter().map(|d| forced(d))).collect();
        write_down(state, text, &names)?;
    }
    // Links that come later, too.
    for name in [forced("default"), all] {
        ns::sysctl(&name, "1")?;
    }
    Ok(())
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
