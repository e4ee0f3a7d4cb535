//! `atoll image build`.

use super::cli::{Build, BuildNetwork};
use super::sandbox::Sandboxes;
use super::{open_with, show};
use crate::cli::{Failure, Outcome, explain};
use crate::instance::Instance;
use image::{BuildOptions, Platform, Secret};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub fn run(options: &Build) -> Outcome {
    if !rustix::process::geteuid().is_root() {
        return Err(Failure("image build: needs root: sudo atoll image build ...".into()));
    }
    let instance = Instance::open(&options.data.data_dir)?;
    let store = open_with(&instance)?;
    let exe = std::env::current_exe().map_err(explain)?;
    let sandboxes = Arc::new(Sandboxes::new(exe, instance.run_dir));
    sandboxes.sweep();
    stop_on_signals(&sandboxes)?;
    let pairs = options.build_arg.iter().map(|text| argument(text)).collect::<Result<Vec<_>, _>>()?;
    let build = BuildOptions {
        context: options.context.clone(),
        file: options.file.clone(),
        names: options.tag.clone(),
        epoch: epoch(&pairs)?,
        args: pairs,
        target: options.target.clone(),
        secrets: options.secret.iter().map(|s| Secret::parse(s)).collect::<Result<_, _>>().map_err(Failure)?,
        ssh: options.ssh.iter().map(|text| agent(text)).collect::<Result<_, _>>()?,
        memory: options.memory.as_deref().map(memory).transpose()?,
        no_cache: options.no_cache,
        platform: options.platform.as_deref().map(Platform::parse).transpose().map_err(explain)?,
        network: options.network == BuildNetwork::Host,
        pull: super::pull_options(&options.registry)?,
    };
    let built = store.build(&build, &*sandboxes, &|p| show(p)).map_err(explain)?;
    println!("{} ({})", built.names.join(", "), built.digest);
    Ok(())
}

/// `NAME=value`, or a name alone for what the environment has.
fn argument(text: &str) -> Result<(String, String), Failure> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        Some(_) => Err(Failure(format!("--build-arg {text:?}: write it as NAME=value"))),
        None => std::env::var(text).map(|value| (text.to_owned(), value)).map_err(|_| {
            Failure(format!("--build-arg {text}: the environment has no such variable; write NAME=value"))
        }),
    }
}

/// `NAME=SOCKET`, or a name alone for the agent of the environment.
fn agent(text: &str) -> Result<(String, PathBuf), Failure> {
    match text.split_once('=') {
        Some((name, socket)) if !name.is_empty() && !socket.is_empty() => Ok((name.to_owned(), socket.into())),
        None if !text.is_empty() => match std::env::var_os("SSH_AUTH_SOCK") {
            Some(socket) => Ok((text.to_owned(), socket.into())),
            None => Err(Failure(format!(
                "--ssh {text}: SSH_AUTH_SOCK names no agent (sudo drops it); write {text}=/path/of/the/agent's/socket"
            ))),
        },
        _ => Err(Failure(format!("--ssh {text:?}: write it as default, or as NAME=SOCKET"))),
    }
}

fn memory(text: &str) -> Result<u64, Failure> {
    let bytes = api::quantity::Quantity::parse(text).ok().and_then(|q| u64::try_from(q.value()).ok());
    bytes
        .filter(|b| *b >= 4 << 20)
        .ok_or_else(|| Failure(format!("--memory {text:?}: write it as 512Mi or 4Gi; nothing runs in less than 4Mi")))
}

/// <https://reproducible-builds.org/specs/source-date-epoch/>: a build argument, else the environment.
fn epoch(args: &[(String, String)]) -> Result<Option<u64>, Failure> {
    const NAME: &str = "SOURCE_DATE_EPOCH";
    /// The last second that RFC 3339 has a name for.
    const YEAR_9999: u64 = 253_402_300_799;
    let given = args.iter().rev().find(|(name, _)| name == NAME).map(|(_, value)| value.clone());
    match given.or_else(|| std::env::var(NAME).ok()).filter(|text| !text.is_empty()) {
        None => Ok(None),
        Some(text) => match text.parse() {
            Ok(seconds) if seconds <= YEAR_9999 => Ok(Some(seconds)),
            _ => Err(Failure(format!("{NAME}={text:?}: a number of seconds since 1970, up to the year 9999"))),
        },
    }
}

/// The first signal ends the build and takes its sandboxes away; a second one ends this process at once.
fn stop_on_signals(sandboxes: &Arc<Sandboxes>) -> Outcome {
    use tokio::signal::unix::{SignalKind, signal};
    let sandboxes = sandboxes.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(explain)?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt()).map_err(explain)?, signal(SignalKind::terminate()).map_err(explain)?)
    };
    let wait = move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if sandboxes.cancelled.swap(true, Ordering::Relaxed) {
                    std::process::exit(130);
                }
            }
        });
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait).map_err(explain)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_and_arguments() {
        let of = |text: &str| epoch(&[("SOURCE_DATE_EPOCH".into(), text.into())]);
        assert_eq!(of("0").unwrap(), Some(0));
        assert_eq!(of("253402300799").unwrap(), Some(253_402_300_799));
        for bad in ["-1", "253402300800", "18446744073709551615", "tomorrow"] {
            assert!(of(bad).is_err(), "{bad}");
        }
        assert_eq!(argument("A=b=c").unwrap(), ("A".into(), "b=c".into()));
        assert!(argument("=x").is_err());
    }
}
