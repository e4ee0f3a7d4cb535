//! The binary must not be writable through the `/proc/self/exe` of a process on its way into a container
//! (CVE-2019-5736): a container whose program is `/proc/self/exe`, or an interpreter of that name, would hold it.

use crate::error::{Error, Result};
use crate::shim::sealed_executable;
use crate::sys::{self, SingleThreaded};
use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags, StatVfsMountFlags, accessat, fstatvfs, open};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

const OWN: &str = "/proc/self/exe";
/// Set for the second execution, so that it is not the third.
const SEALED: &str = "_ATOLL_OCI_SEALED";
/// For tests: take the second way.
const AGAIN: &str = "_ATOLL_OCI_EXECUTE_AGAIN";

/// Makes sure that this process runs from a read-only mount of its own: moves over to one, or executes itself again
/// through it where the kernel has no way to move.
pub fn executable() -> Result<()> {
    if is_sealed()? {
        return Ok(());
    }
    let sealed = match sealed_executable(Path::new(OWN)) {
        Ok(sealed) => sealed,
        // A plain user cannot mount; but what that user may not write to, the user's containers may not either.
        Err(_) if accessat(CWD, OWN, Access::WRITE_OK, AtFlags::EACCESS).is_err() => return Ok(()),
        Err(e) => return Err(Error::Refused(format!("{e}; give the binary to another user, without write access"))),
    };
    let again = std::env::var_os(AGAIN).is_some();
    if !again && move_to(&sealed).is_ok() && is_sealed()? {
        return Ok(());
    }
    if std::env::var_os(SEALED).is_some() {
        return Err(Error::Refused("this binary could not be made read-only".into()));
    }
    let text = |bytes: Vec<u8>| CString::new(bytes).map_err(|_| Error::Refused("zero byte in an argument".into()));
    let program = text(format!("/proc/self/fd/{}", sealed.as_raw_fd()).into_bytes())?;
    let args = std::env::args_os().map(|a| text(a.into_vec())).collect::<Result<Vec<_>>>()?;
    let mut env = vec![text(format!("{SEALED}=1").into_bytes())?];
    for (name, value) in std::env::vars_os() {
        env.push(text([name.into_vec(), value.into_vec()].join(&b'='))?);
    }
    Err(Error::step("executing the sealed runtime", sys::execve(&program, &args, &env)))
}

fn is_sealed() -> Result<bool> {
    let own = open(OWN, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(|e| Error::step(OWN, e))?;
    Ok(fstatvfs(&own).is_ok_and(|s| s.f_flag.contains(StatVfsMountFlags::RDONLY)))
}

fn move_to(sealed: &OwnedFd) -> io::Result<()> {
    let alone = SingleThreaded::prove()?;
    let path = format!("/proc/self/fd/{}", sealed.as_raw_fd());
    let view = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    sys::run_from(alone, view.as_fd())
}
