//! Hooks of a configuration (runtime-spec, config.md, "POSIX-platform Hooks"): programs of the host's that are run with
//! the container's state on standard input.

use crate::error::{During, Error, Result};
use crate::runtime::Bundle;
use crate::spec::{Hook, Spec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// A container's state (runtime-spec, runtime.md, "State").
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    pub oci_version: &'static str,
    pub id: String,
    pub status: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    pub bundle: PathBuf,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// The specification's version that is implemented.
pub const OCI_VERSION: &str = "1.2.0";

impl State {
    pub fn of(spec: &Spec, bundle: &Bundle, status: &str, pid: u32) -> Self {
        Self {
            oci_version: OCI_VERSION,
            id: bundle.id.clone(),
            status: status.into(),
            pid: Some(pid).filter(|p| *p > 0),
            bundle: bundle.path.clone(),
            annotations: spec.annotations.clone(),
        }
    }
}

/// Runs them in order; the first that fails ends it.
pub fn run(kind: &str, hooks: &[Hook], state: &State) -> Result<()> {
    if hooks.is_empty() {
        return Ok(());
    }
    let input = serde_json::to_vec(state).map_err(|e| Error::Refused(format!("state for hooks: {e}")))?;
    for hook in hooks {
        run_one(hook, &input).map_err(|e| Error::Refused(format!("{kind} hook {}: {e}", hook.path.display())))?;
    }
    Ok(())
}

fn run_one(hook: &Hook, input: &[u8]) -> Result<()> {
    let mut command = Command::new(&hook.path);
    if let Some((name, rest)) = hook.args.split_first() {
        command.arg0(name).args(rest);
    }
    command.env_clear();
    for entry in &hook.env {
        let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
        command.env(name, value);
    }
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .during(|| "cannot be executed".into())?;
    // Smaller than a pipe; one that does not read is none of this runtime's business.
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(input);
    }
    if let Some(seconds) = hook.timeout {
        wait_until(&mut child, seconds)?;
    }
    let status = child.wait().during(|| "waiting for it".into())?;
    if status.success() { Ok(()) } else { Err(Error::Refused(format!("{status}"))) }
}

fn wait_until(child: &mut Child, seconds: i64) -> Result<()> {
    let pid = Pid::from_raw(child.id() as i32).ok_or_else(|| Error::Refused("has no pid".into()))?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).during(|| "watching it".into())?;
    let limit = Timespec { tv_sec: seconds, tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)).during(|| "waiting for it".into())?;
    if ended == 0 {
        let _ = child.kill();
        let _ = child.wait();
        return Err(Error::Refused(format!("not done within its timeout of {seconds} s, killed")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, timeout: Option<i64>) -> Hook {
        let args = ["named", "-c", script].iter().map(|a| (*a).to_owned()).collect();
        Hook { path: "/bin/sh".into(), args, env: vec!["WORD=hello".into()], timeout }
    }

    #[test]
    fn hooks_read_the_state_and_are_held_to_their_time() {
        let directory = tempfile::tempdir().expect("directory");
        let out = directory.path().join("out");
        let bundle = Bundle { id: "c1".into(), path: "/b".into(), ..Default::default() };
        let state = State::of(&Spec::default(), &bundle, "creating", 42);
        let script = format!("(cat; echo; echo $0 $WORD $HOME) > {}", out.display());
        run("prestart", &[hook(&script, None), hook("true", Some(30))], &state).expect("run");
        let text = std::fs::read_to_string(out).expect("written");
        assert_eq!(
            text,
            "{\"ociVersion\":\"1.2.0\",\"id\":\"c1\",\"status\":\"creating\",\"pid\":42,\"bundle\":\"/b\"}\nnamed hello\n"
        );
        let late = run("prestart", &[hook("exec sleep 1000", Some(1))], &state).expect_err("killed");
        assert!(late.to_string().contains("timeout of 1 s"), "{late}");
        let failed = run("poststop", &[hook("exit 3", None)], &state).expect_err("failed");
        assert!(failed.to_string().contains("poststop hook /bin/sh: exit status: 3"), "{failed}");
    }
}
