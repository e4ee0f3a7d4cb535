//! `atoll vm console`: the terminal here becomes the machine's serial console.

use crate::cli::{Failure, Outcome, explain};
use crate::function::At;
use crate::instance::Instance;
use ::api::object::Meta;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use serde_json::Value;
use std::io::{Read, Write};
use std::path::PathBuf;

/// Ctrl-], as virtctl and telnet have it.
const LEAVE: u8 = 0x1d;

/// Raw as long as it lives.
struct Raw(Option<Termios>);

impl Raw {
    fn enter() -> Raw {
        let stdin = std::io::stdin();
        let before = tcgetattr(&stdin).ok();
        if let Some(before) = &before {
            let mut raw = before.clone();
            raw.make_raw();
            let _ = tcsetattr(&stdin, OptionalActions::Now, &raw);
        }
        Raw(before)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
    }
}

/// Where the machine's monitor is: the API says which pod the machine is, and its monitor's socket is on this node.
pub(super) async fn run_dir(at: &At, name: &str) -> Result<PathBuf, Failure> {
    let api = at.api()?;
    let namespace = at.namespace(&api);
    let path = format!("/apis/kubevirt.io/v1/namespaces/{namespace}/virtualmachineinstances/{name}");
    let instance = api.get(&path).await?;
    if instance.str_at("/status/phase") != "Running" {
        return Err(Failure(format!("{name}: does not run; atoll vm start {name} -n {namespace}")));
    }
    let pods = instance.pointer("/status/activePods").and_then(Value::as_object);
    let uid = pods.and_then(|pods| pods.keys().next()).ok_or_else(|| Failure(format!("{name}: has no pod yet")))?;
    Ok(Instance::open(&at.data.data_dir)?.run_dir.join("pods").join(uid))
}

pub async fn run(at: &At, name: &str) -> Outcome {
    let run_dir = run_dir(at, name).await?;
    let mut stream = vmm::Client::connect(&run_dir).and_then(vmm::Client::console).map_err(explain)?;
    let mut input = stream.try_clone().map_err(explain)?;
    eprintln!("console of {name}; Ctrl-] leaves");
    let raw = Raw::enter();
    std::thread::spawn(move || {
        let mut bytes = [0u8; 256];
        while let Ok(n) = std::io::stdin().read(&mut bytes) {
            let typed = bytes.get(..n).unwrap_or_default();
            let (send, leave) = match typed.iter().position(|b| *b == LEAVE) {
                Some(at) => (typed.get(..at).unwrap_or_default(), true),
                None => (typed, n == 0),
            };
            if input.write_all(send).is_err() || leave {
                break;
            }
        }
        let _ = input.shutdown(std::net::Shutdown::Both);
    });
    let mut buffer = [0u8; 4096];
    while let Ok(n) = stream.read(&mut buffer) {
        let Some(bytes) = buffer.get(..n).filter(|b| !b.is_empty()) else { break };
        let mut out = std::io::stdout();
        if out.write_all(bytes).and_then(|()| out.flush()).is_err() {
            break;
        }
    }
    drop(raw);
    Ok(())
}
