//! Requests that functions send themselves: an annotation names the hosts, a connector in the pod's network namespace
//! (`function::connect`) makes the connections, so the pod's link and policies hold for them.

use super::{Result, SandboxSpec, failed, refused, translate};
use function::{AllowList, ConnectSpec, launch_connector};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Pod annotation: hosts, as [`AllowList`] reads them.
const ALLOW: &str = "functions.atoll.dev/allow-outbound";
/// User ids of connectors: one for each range of a pod's ids, above those of Lambda runtimes.
const FIRST_UID: u32 = 2_300_000_000;
const RANGE: u32 = 65_536;
/// Where distributions keep the list of certificate authorities: Debian, Fedora, Alpine.
const ROOTS: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// `None` if the function may send nothing.
pub(super) fn list(sandbox: &SandboxSpec) -> Result<Option<AllowList>> {
    let Some(text) = sandbox.annotations.get(ALLOW) else { return Ok(None) };
    let list =
        AllowList::parse(text).map_err(|why| refused("CreateContainerError", format!("annotation {ALLOW}: {why}")))?;
    Ok((!list.is_empty()).then_some(list))
}

pub(super) fn connector(exe: &Path, sandbox: &SandboxSpec, list: &AllowList) -> Result<OwnedFd> {
    let network = &sandbox.network;
    let Some(netns) = &network.netns else {
        return Err(refused("CreateContainerError", "hostNetwork: functions run on the pod network only"));
    };
    let spec = ConnectSpec { allow: list.to_string(), resolver: network.dns, search: network.dns_search.clone() };
    let uid = FIRST_UID + sandbox.id_base / RANGE;
    let run_dir = run_dir(sandbox);
    let launched = network::in_netns(netns, move || launch_connector(exe, &run_dir, uid, &spec));
    launched.map_err(|e| failed("enter the pod's network namespace", e))?.map_err(translate)
}

/// The system's certificate authorities; what is read of `/dev/null` is that there are none.
pub(super) fn roots() -> Result<File> {
    let own = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let places = own.into_iter().chain(ROOTS.map(PathBuf::from));
    let path = places.into_iter().find(|path| path.exists()).unwrap_or_else(|| "/dev/null".into());
    File::open(path).map_err(|e| failed("open the list of certificate authorities", e))
}

pub(super) fn destroyed(sandbox: &SandboxSpec) -> Result<()> {
    match fs::remove_dir_all(run_dir(sandbox)) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(failed("remove the connector's directory", e)),
        _ => Ok(()),
    }
}

fn run_dir(sandbox: &SandboxSpec) -> PathBuf {
    sandbox.run_dir.join("connect")
}
