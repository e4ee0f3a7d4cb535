//! `atoll vm snapshot|snapshots|restore|clone`: KubeVirt's objects, made and followed.

use super::{SUBRESOURCES, machines};
use crate::cli::{Failure, Outcome};
use crate::function::api::{Api, Refusal};
use crate::function::{At, LOOK, Wide};
use crate::output::{self, Format};
use ::api::object::Meta;
use clap::Args;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const MEMORY: &str = "atoll.dev/memory";

#[derive(Args)]
pub struct Snapshot {
    #[command(flatten)]
    at: At,
    name: String,
    /// The snapshot's name; the machine's and the time if left out
    #[arg(long = "name", value_name = "SNAPSHOT")]
    snapshot: Option<String>,
    /// Leave memory and devices out: the machine is held for a shorter time, and boots when it is restored
    #[arg(long)]
    disks_only: bool,
    /// Keep the files when the snapshot is deleted
    #[arg(long)]
    retain: bool,
    /// Seconds it may take
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    wait: u64,
    #[arg(short, long, default_value = "table")]
    output: Format,
}

#[derive(Args)]
pub struct Restore {
    #[command(flatten)]
    at: At,
    name: String,
    /// One of `atoll vm snapshots`
    #[arg(long)]
    snapshot: String,
    /// Stop the machine first if it runs; what it did since the snapshot is lost
    #[arg(long)]
    stop: bool,
    /// Boot from the snapshot's disks, although its memory is there
    #[arg(long)]
    disks_only: bool,
    /// Leave the machine stopped if it was
    #[arg(long)]
    no_start: bool,
    /// Seconds it may take
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    wait: u64,
    #[arg(short, long, default_value = "table")]
    output: Format,
}

#[derive(Args)]
pub struct Clone {
    #[command(flatten)]
    at: At,
    name: String,
    /// The new machine's name
    new: String,
    /// From a snapshot of the machine instead of the machine as it is
    #[arg(long)]
    snapshot: Option<String>,
    /// Start the new machine
    #[arg(long)]
    start: bool,
    /// Seconds it may take
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    wait: u64,
    #[arg(short, long, default_value = "table")]
    output: Format,
}

fn path(group: &str, namespace: &str, plural: &str) -> String {
    format!("/apis/{group}/v1beta1/namespaces/{namespace}/{plural}")
}

const SNAPSHOT: &str = "snapshot.kubevirt.io";
const CLONE: &str = "clone.kubevirt.io";

fn machine_reference(name: &str) -> Value {
    json!({"apiGroup": "kubevirt.io", "kind": "VirtualMachine", "name": name})
}

/// `NAME-20261123-014503`, of unix seconds.
fn stamped(name: &str, now: i64) -> String {
    let digits: String = api::time::rfc3339(now).chars().filter(|c| c.is_ascii_digit() || *c == 'T').collect();
    format!("{}-{}", name.chars().take(200).collect::<String>(), digits.replace('T', "-"))
}

/// Follows an object until `done` says what came of it; tells how far it is on stderr.
async fn follow(
    api: &Api,
    path: &str,
    seconds: u64,
    done: impl Fn(&Value) -> Option<Result<(), String>>,
) -> Result<Value, Failure> {
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut told = String::new();
    loop {
        let object = api.get(path).await?;
        match done(&object) {
            Some(Ok(())) => return Ok(object),
            Some(Err(why)) => return Err(Failure(format!("{}: {why}", object.name()))),
            None => {}
        }
        let message = condition(&object, "Progressing");
        if message != told {
            eprintln!("{message}");
            told = message;
        }
        if Instant::now() >= until {
            return Err(Failure(format!(
                "{}: not in {seconds} s; it goes on: kubectl get --raw {path}",
                object.name()
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn condition(object: &Value, kind: &str) -> String {
    let all = object.pointer("/status/conditions").and_then(Value::as_array);
    let found = all.and_then(|all| all.iter().find(|c| c.str_at("/type") == kind));
    found.map(|c| c.str_at("/message").to_owned()).unwrap_or_default()
}

fn show(format: Format, object: &Value, line: String) {
    match format {
        Format::Table => println!("{line}"),
        Format::Json | Format::Yaml => output::value(format, object),
    }
}

impl Snapshot {
    pub async fn run(self) -> Outcome {
        let api = self.at.api()?;
        let namespace = self.at.namespace(&api);
        api.get(&format!("{}/{}", machines(&namespace), self.name)).await?;
        let name = self.snapshot.unwrap_or_else(|| stamped(&self.name, api::time::now()));
        let mut metadata = json!({"name": name});
        if self.disks_only {
            metadata = json!({"name": name, "annotations": {MEMORY: "false"}});
        }
        let policy = if self.retain { "Retain" } else { "Delete" };
        let object = json!({"apiVersion": format!("{SNAPSHOT}/v1beta1"), "kind": "VirtualMachineSnapshot",
            "metadata": metadata,
            "spec": {"source": machine_reference(&self.name), "deletionPolicy": policy,
                     "failureDeadline": format!("{}s", self.wait)}});
        let all = path(SNAPSHOT, &namespace, "virtualmachinesnapshots");
        api.create(&all, &object).await?;
        let done = |snapshot: &Value| match snapshot.str_at("/status/phase") {
            "Succeeded" => Some(Ok(())),
            "Failed" => Some(Err(snapshot.str_at("/status/error/message").to_owned())),
            _ => None,
        };
        let snapshot = follow(&api, &format!("{all}/{name}"), self.wait, done).await?;
        show(self.output, &snapshot, format!("{name}: {}", condition(&snapshot, "Ready")));
        Ok(())
    }
}

pub async fn list(Wide { at, all_namespaces, output }: Wide) -> Outcome {
    let api = at.api()?;
    let snapshots = match all_namespaces {
        true => format!("/apis/{SNAPSHOT}/v1beta1/virtualmachinesnapshots"),
        false => path(SNAPSHOT, &at.namespace(&api), "virtualmachinesnapshots"),
    };
    let found = api.get(&snapshots).await?;
    if output != Format::Table {
        output::value(output, &found);
        return Ok(());
    }
    let contents = api.get(&format!("{}contents", snapshots.trim_end_matches('s'))).await?;
    let items = |list: &Value| list.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
    let contents = items(&contents);
    let row = |snapshot: &Value| -> Vec<String> {
        let same = |c: &&Value| {
            c.namespace() == snapshot.namespace()
                && c.name() == snapshot.str_at("/status/virtualMachineSnapshotContentName")
        };
        let content = contents.iter().find(same).unwrap_or(&Value::Null);
        let number = |field: &str| content.pointer(field).and_then(Value::as_u64);
        let kind = match content.pointer("/status/memory").and_then(Value::as_bool) {
            Some(true) => "disks, memory",
            Some(false) => "disks",
            None => "",
        };
        let cells = [
            snapshot.namespace().to_owned(),
            snapshot.name().to_owned(),
            snapshot.str_at("/spec/source/name").to_owned(),
            snapshot.str_at("/status/phase").to_owned(),
            kind.to_owned(),
            number("/status/size").map(crate::images::size).unwrap_or_default(),
            number("/status/heldMilliseconds").map(|ms| format!("{ms} ms")).unwrap_or_default(),
            snapshot.str_at("/status/creationTime").to_owned(),
        ];
        cells.map(|cell| if cell.is_empty() { "-".to_owned() } else { cell }).to_vec()
    };
    let rows: Vec<Vec<String>> = items(&found).iter().map(row).collect();
    output::table(&["NAMESPACE", "NAME", "MACHINE", "PHASE", "HOLDS", "SIZE", "HELD", "TAKEN"], &rows);
    Ok(())
}

impl Restore {
    pub async fn run(self) -> Outcome {
        let api = self.at.api()?;
        let namespace = self.at.namespace(&api);
        let snapshots = path(SNAPSHOT, &namespace, "virtualmachinesnapshots");
        api.get(&format!("{snapshots}/{}", self.snapshot)).await?;
        let machine = format!("{}/{}", machines(&namespace), self.name);
        let runs = |machine: &Value| machine.pointer("/status/created") == Some(&Value::Bool(true));
        if !self.stop && runs(&api.get(&machine).await?) {
            let stop = format!("atoll vm stop {} -n {namespace}", self.name);
            return Err(Failure(format!("{}: runs; {stop}, or --stop (what it did since is lost)", self.name)));
        }
        let name = stamped(&format!("{}-restore", self.name), api::time::now());
        let mut metadata = json!({"name": name});
        if self.disks_only {
            metadata = json!({"name": name, "annotations": {MEMORY: "false"}});
        }
        let policy = if self.stop { "StopTarget" } else { "FailImmediate" };
        let object = json!({"apiVersion": format!("{SNAPSHOT}/v1beta1"), "kind": "VirtualMachineRestore",
            "metadata": metadata,
            "spec": {"target": machine_reference(&self.name), "virtualMachineSnapshotName": self.snapshot,
                     "targetReadinessPolicy": policy}});
        let all = path(SNAPSHOT, &namespace, "virtualmachinerestores");
        api.create(&all, &object).await?;
        let done = |restore: &Value| match restore.pointer("/status/complete") {
            Some(Value::Bool(true)) => Some(Ok(())),
            _ => Some(condition(restore, "Failure")).filter(|why| !why.is_empty()).map(Err),
        };
        let begun = Instant::now();
        let restore = follow(&api, &format!("{all}/{name}"), self.wait, done).await?;
        let left = self.wait.saturating_sub(begun.elapsed().as_secs());
        if !self.no_start {
            start(&api, &namespace, &self.name, left).await?;
        }
        show(self.output, &restore, format!("{}: as it was in {}", self.name, self.snapshot));
        Ok(())
    }
}

/// Starts a machine that does not start by itself, and waits until it runs.
async fn start(api: &Api, namespace: &str, name: &str, seconds: u64) -> Outcome {
    let machine = format!("{}/{name}", machines(namespace));
    let found = api.get(&machine).await?;
    let strategy = found.str_at("/spec/runStrategy");
    let halted = matches!(strategy, "Halted" | "Manual") || found.pointer("/spec/running") == Some(&json!(false));
    if halted {
        api.put(&format!("{SUBRESOURCES}/namespaces/{namespace}/virtualmachines/{name}/start")).await?;
    }
    let done = |machine: &Value| (machine.str_at("/status/printableStatus") == "Running").then_some(Ok(()));
    follow(api, &machine, seconds, done).await.map(drop)
}

impl Clone {
    pub async fn run(self) -> Outcome {
        let api = self.at.api()?;
        let namespace = self.at.namespace(&api);
        match api.get(&format!("{}/{}", machines(&namespace), self.new)).await {
            Err(Refusal::NotFound(_)) => {}
            Ok(_) => return Err(Failure(format!("{}: exists already", self.new))),
            Err(Refusal::Other(failure)) => return Err(failure),
        }
        let source = match &self.snapshot {
            Some(name) => json!({"apiGroup": SNAPSHOT, "kind": "VirtualMachineSnapshot", "name": name}),
            None => machine_reference(&self.name),
        };
        if let Some(name) = &self.snapshot {
            let all = path(SNAPSHOT, &namespace, "virtualmachinesnapshots");
            let of = api.get(&format!("{all}/{name}")).await?.str_at("/spec/source/name").to_owned();
            if of != self.name {
                return Err(Failure(format!("{name}: is a snapshot of {of}, not of {}", self.name)));
            }
        }
        let name = stamped(&format!("{}-clone", self.new), api::time::now());
        let object = json!({"apiVersion": format!("{CLONE}/v1beta1"), "kind": "VirtualMachineClone",
            "metadata": {"name": name}, "spec": {"source": source, "target": machine_reference(&self.new)}});
        let all = path(CLONE, &namespace, "virtualmachineclones");
        api.create(&all, &object).await?;
        let done = |clone: &Value| match clone.str_at("/status/phase") {
            "Succeeded" => Some(Ok(())),
            "Failed" => Some(Err(condition(clone, "Ready"))),
            _ => None,
        };
        let begun = Instant::now();
        let clone = follow(&api, &format!("{all}/{name}"), self.wait, done).await?;
        let mut line = format!("{}: made from {}; atoll vm start {} -n {namespace}", self.new, self.name, self.new);
        if self.start {
            let left = self.wait.saturating_sub(begun.elapsed().as_secs());
            start(&api, &namespace, &self.new, left).await?;
            line = format!("{}: made from {}, Running", self.new, self.name);
        }
        show(self.output, &clone, line);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_tell_the_time() {
        assert_eq!(super::stamped("db", 0), "db-19700101-000000");
    }
}
