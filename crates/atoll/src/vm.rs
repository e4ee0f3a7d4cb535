//! `atoll vm`: virtual machines from the command line. What it does, `kubectl` and KubeVirt's clients can do as well: it goes
//! through the API by the kubeconfig.

mod console;
mod snapshots;
mod vnc;

use crate::cli::{Failure, Outcome, explain};
use crate::function::api::Api;
use crate::function::{At, LOOK, Wide};
use crate::output::{self, Format};
use ::api::object::Meta;
use clap::Subcommand;
use serde_json::Value;
use std::time::{Duration, Instant};

#[derive(Subcommand)]
pub enum Vm {
    /// List virtual machines
    Ls(Wide),
    /// Start a machine; a halted one runs always from then on
    Start(One),
    /// Stop a machine: its power button is pressed, and after its grace period it is killed
    Stop(One),
    /// Stop a machine and start it again
    Restart(One),
    /// Press a machine's power button, and start it again when it has shut down
    Softreboot(One),
    /// Hold a running machine's processors; its memory stays
    Pause(One),
    /// Let a paused machine go on
    Unpause(One),
    /// Save a machine as it is now: its disks and, if it runs, its memory and devices
    #[command(
        after_help = "Examples:\n  atoll vm snapshot orders --name before-upgrade -n shop\n  atoll vm snapshot orders --disks-only -n shop\n  kubectl delete vmsnapshot before-upgrade -n shop   # removes it"
    )]
    Snapshot(snapshots::Snapshot),
    /// List snapshots of machines
    Snapshots(Wide),
    /// Make a machine again what it was in a snapshot: it goes on from there if its memory was saved
    #[command(
        after_help = "Examples:\n  atoll vm restore orders --snapshot before-upgrade --stop -n shop\n  atoll vm restore orders --snapshot before-upgrade --disks-only -n shop   # boots from the disks"
    )]
    Restore(snapshots::Restore),
    /// Make a new machine with the disks of another; it boots, with a name and addresses of its own
    #[command(
        after_help = "Examples:\n  atoll vm clone orders orders-test --start -n shop\n  atoll vm clone orders orders-then --snapshot before-upgrade -n shop"
    )]
    Clone(snapshots::Clone),
    /// Speak to a machine's serial console; Ctrl-] leaves
    #[command(after_help = "Example:\n  atoll vm console orders -n shop")]
    Console {
        #[command(flatten)]
        at: At,
        name: String,
    },
    /// Open a machine's screen in a viewer
    #[command(
        after_help = "Examples:\n  atoll vm vnc windows -n shop\n  atoll vm vnc windows --proxy-only --port 5901 -n shop   # then any viewer on 127.0.0.1:5901"
    )]
    Vnc(vnc::Vnc),
}

#[derive(clap::Args)]
pub struct One {
    #[command(flatten)]
    at: At,
    name: String,
    /// Wait until it is so, at most this many seconds
    #[arg(long, value_name = "SECONDS")]
    wait: Option<u64>,
}

const SUBRESOURCES: &str = "/apis/subresources.kubevirt.io/v1";

fn machines(namespace: &str) -> String {
    format!("/apis/kubevirt.io/v1/namespaces/{namespace}/virtualmachines")
}

pub fn run(command: Vm) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(explain)?;
    runtime.block_on(async {
        match command {
            Vm::Ls(Wide { at, all_namespaces, output }) => list(&at, all_namespaces, output).await,
            Vm::Start(one) => one.ask("virtualmachines", "start", "Running").await,
            Vm::Stop(one) => one.ask("virtualmachines", "stop", "Stopped").await,
            Vm::Restart(one) => one.ask("virtualmachines", "restart", "Running").await,
            Vm::Softreboot(one) => one.ask("virtualmachineinstances", "softreboot", "Running").await,
            Vm::Pause(one) => one.ask("virtualmachineinstances", "pause", "Paused").await,
            Vm::Unpause(one) => one.ask("virtualmachineinstances", "unpause", "Running").await,
            Vm::Snapshot(command) => command.run().await,
            Vm::Snapshots(wide) => snapshots::list(wide).await,
            Vm::Restore(command) => command.run().await,
            Vm::Clone(command) => command.run().await,
            Vm::Vnc(command) => command.run().await,
            Vm::Console { at, name } => console::run(&at, &name).await,
        }
    })
}

impl One {
    /// Asks for it, and waits for the printed status if that is wanted.
    async fn ask(&self, plural: &str, action: &str, becomes: &str) -> Outcome {
        let api = self.at.api()?;
        let (namespace, name) = (self.at.namespace(&api), &self.name);
        let before = self.instance(&api, &namespace).await;
        api.put(&format!("{SUBRESOURCES}/namespaces/{namespace}/{plural}/{name}/{action}")).await?;
        let Some(seconds) = self.wait else {
            println!("{name}: {action} was asked for");
            return Ok(());
        };
        let until = Instant::now() + Duration::from_secs(seconds);
        loop {
            let machine = api.get(&format!("{}/{name}", machines(&namespace))).await?;
            let status = machine.str_at("/status/printableStatus");
            let anew = action != "restart" || self.instance(&api, &namespace).await != before;
            if status == becomes && anew {
                println!("{name}: {status}");
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(Failure(format!(
                    "{name}: still {status} after {seconds} s; kubectl describe vm {name} -n {namespace}"
                )));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Uid of the machine's instance, empty if there is none.
    async fn instance(&self, api: &Api, namespace: &str) -> String {
        let path = format!("/apis/kubevirt.io/v1/namespaces/{namespace}/virtualmachineinstances/{}", self.name);
        api.get(&path).await.map(|instance| instance.str_at("/metadata/uid").to_owned()).unwrap_or_default()
    }
}

async fn list(at: &At, all_namespaces: bool, format: Format) -> Outcome {
    let api = at.api()?;
    let path =
        if all_namespaces { "/apis/kubevirt.io/v1/virtualmachines".to_owned() } else { machines(&at.namespace(&api)) };
    let found = api.get(&path).await?;
    let instances = api.get(&path.replace("virtualmachines", "virtualmachineinstances")).await?;
    let items = |list: &Value| list.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
    if format != Format::Table {
        output::value(format, &found);
        return Ok(());
    }
    let instances = items(&instances);
    let same = |machine: &Value, instance: &Value| {
        ["/metadata/name", "/metadata/namespace"].iter().all(|p| machine.str_at(p) == instance.str_at(p))
    };
    let rows: Vec<Vec<String>> = items(&found)
        .iter()
        .map(|machine| {
            let instance = instances.iter().find(|i| same(machine, i)).unwrap_or(&Value::Null);
            let cores = instance.pointer("/status/currentCPUTopology/cores").and_then(Value::as_u64);
            let cells = [
                machine.str_at("/metadata/namespace"),
                machine.str_at("/metadata/name"),
                machine.str_at("/status/printableStatus"),
                &cores.map(|c| c.to_string()).unwrap_or_default(),
                instance.str_at("/status/memory/guestCurrent"),
                instance.str_at("/status/interfaces/0/ipAddress"),
            ];
            cells.iter().map(|cell| if cell.is_empty() { "-".to_owned() } else { (*cell).to_owned() }).collect()
        })
        .collect();
    output::table(&["NAMESPACE", "NAME", "STATUS", "CPUS", "MEMORY", "ADDRESS"], &rows);
    Ok(())
}
