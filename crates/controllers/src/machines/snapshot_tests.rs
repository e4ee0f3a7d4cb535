use super::content::{FILES, IN_USE};
use super::{DISKS_FROM, GO_ON_FROM};
use crate::context::{CLONES, INSTANCES, MACHINES, PODS, RESTORES, SNAPSHOT_CONTENTS, SNAPSHOTS};
use crate::objects::condition_status;
use crate::testing::World;
use api::client::{Client, Patch};
use api::object::{Meta, Object, SharedObject};
use serde_json::{Value, json};
use std::sync::atomic::Ordering;

fn machine(strategy: &str) -> Value {
    json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": "db", "namespace": "x"},
        "spec": {"runStrategy": strategy, "template": {"spec": {
            "domain": {"memory": {"guest": "64Mi"}, "devices": {"disks": [{"name": "root", "disk": {"bus": "virtio"}}]}},
            "terminationGracePeriodSeconds": 0,
            "volumes": [{"name": "root", "containerDisk": {"image": "disks/db:1"}}]}}}})
}

fn reference(kind: &str, name: &str) -> Value {
    let group = if kind == "VirtualMachine" { "kubevirt.io" } else { "snapshot.kubevirt.io" };
    json!({"apiGroup": group, "kind": kind, "name": name})
}

fn snapshot(name: &str) -> Value {
    json!({"apiVersion": "snapshot.kubevirt.io/v1beta1", "kind": "VirtualMachineSnapshot",
           "metadata": {"name": name, "namespace": "x"}, "spec": {"source": reference("VirtualMachine", "db")}})
}

fn restore(name: &str, policy: &str) -> Value {
    json!({"apiVersion": "snapshot.kubevirt.io/v1beta1", "kind": "VirtualMachineRestore",
           "metadata": {"name": name, "namespace": "x"},
           "spec": {"target": reference("VirtualMachine", "db"), "virtualMachineSnapshotName": "s",
                    "targetReadinessPolicy": policy}})
}

fn printed(status: &'static str) -> impl Fn(&Object) -> bool {
    move |machine| machine.str_at("/status/printableStatus") == status
}

fn phase(phase: &'static str) -> impl Fn(&Object) -> bool {
    move |object| object.str_at("/status/phase") == phase
}

/// Does what the node agent does for the only content there is.
async fn save(world: &World, status: Value) -> SharedObject {
    let contents = world.wait_all(&SNAPSHOT_CONTENTS, |all| all.len() == 1).await;
    let patch = Patch::Merge(json!({"status": status}));
    world.client.patch(&SNAPSHOT_CONTENTS, "x", contents[0].name(), "status", patch).await.unwrap()
}

fn saved(memory: bool) -> Value {
    json!({"readyToUse": true, "creationTime": "2026-01-01T00:00:00Z", "volumes": ["root"], "memory": memory})
}

#[tokio::test]
async fn a_running_machine_is_saved_and_goes_on_from_its_memory_once() {
    let world = World::new().await;
    world.node("n", |_| true).await;
    world.create(&MACHINES, machine("Always")).await;
    world.wait(&MACHINES, "db", printed("Running")).await;
    world.create(&SNAPSHOTS, snapshot("s")).await;
    let content = save(&world, saved(true)).await;
    let done = world.wait(&SNAPSHOTS, "s", phase("Succeeded")).await;
    assert_eq!(condition_status(&done, "Ready"), "True");
    assert_eq!(done["status"]["indications"], json!(["NoGuestAgent", "Online"]));
    assert_eq!(done["status"]["snapshotVolumes"]["includedVolumes"], json!(["root"]));
    let pod = world.list(&PODS).await.remove(0);
    assert_eq!(content.annotation("atoll.dev/pod-uid"), Some(pod.uid()));
    assert_eq!(content.finalizers(), [IN_USE, FILES]);

    world.create(&RESTORES, restore("never", "FailImmediate")).await;
    let failed = world.wait(&RESTORES, "never", |r| condition_status(r, "Failure") == "True").await;
    assert!(failed["status"]["conditions"].to_string().contains("must be stopped"));

    let before = world.get(&INSTANCES, "db").await.unwrap();
    world.create(&RESTORES, restore("r", "StopTarget")).await;
    world.wait(&RESTORES, "r", |r| r["status"]["complete"] == true).await;
    let again = world.wait(&INSTANCES, "db", |i| i.uid() != before.uid() && phase("Running")(i)).await;
    assert_eq!(again.annotation(GO_ON_FROM), Some(content.uid()));
    let machine = world.wait(&MACHINES, "db", |m| m.annotation(GO_ON_FROM).is_none() && printed("Running")(m)).await;
    assert_eq!(machine["spec"]["template"].annotation(DISKS_FROM), Some(content.uid()));
    assert_eq!(machine.pointer("/status/restoreInProgress"), None);
    world.delete(&INSTANCES, "db").await;
    let booted = world.wait(&INSTANCES, "db", |i| i.uid() != again.uid() && phase("Running")(i)).await;
    assert_eq!((booted.annotation(GO_ON_FROM), booted.annotation(DISKS_FROM)), (None, Some(content.uid())));

    // files that a machine begins as outlive their snapshot
    world.delete(&SNAPSHOTS, "s").await;
    let left = world.wait(&SNAPSHOT_CONTENTS, content.name(), |c| c.is_deleting()).await;
    assert!(left.finalizers().contains(&IN_USE));
    world.delete(&MACHINES, "db").await;
    world.wait(&SNAPSHOT_CONTENTS, content.name(), |c| c.finalizers() == [FILES]).await;
}

#[tokio::test]
async fn a_content_that_was_made_before_a_crash_is_bound() {
    let world = World::new().await;
    world.create(&MACHINES, machine("Halted")).await;
    world.create(&SNAPSHOTS, snapshot("s")).await;
    let bound = world.wait(&SNAPSHOTS, "s", |s| !s.str_at("/status/sourceUID").is_empty()).await;
    // as if it had been killed between the two
    let forget = json!({"status": {"virtualMachineSnapshotContentName": null, "sourceUID": null}});
    world.client.patch(&SNAPSHOTS, "x", "s", "status", Patch::Merge(forget)).await.unwrap();
    let content = save(&world, saved(false)).await;
    let done = world.wait(&SNAPSHOTS, "s", phase("Succeeded")).await;
    assert_eq!(done.str_at("/status/virtualMachineSnapshotContentName"), content.name());
    assert_eq!(done["status"]["sourceUID"], bound["status"]["sourceUID"]);
}

#[tokio::test]
async fn clones_have_disks_of_the_machine_and_nothing_else() {
    let world = World::new().await;
    world.node("n", |_| true).await;
    world.create(&MACHINES, machine("Halted")).await;
    let clone = |name: &str, target: &str| {
        json!({"apiVersion": "clone.kubevirt.io/v1beta1", "kind": "VirtualMachineClone",
               "metadata": {"name": name, "namespace": "x"},
               "spec": {"source": reference("VirtualMachine", "db"), "target": reference("VirtualMachine", target)}})
    };
    world.create(&CLONES, clone("c", "copy")).await;
    let content = save(&world, saved(false)).await;
    assert_eq!(
        (content.annotation("atoll.dev/pod-uid"), content.annotation("atoll.dev/memory")),
        (None, Some("false"))
    );
    let done = world.wait(&CLONES, "c", phase("Succeeded")).await;
    assert_eq!(done.str_at("/status/targetName"), "copy");
    let copy = world.get(&MACHINES, "copy").await.unwrap();
    assert_eq!(copy["spec"]["template"].annotation(DISKS_FROM), Some(content.uid()));
    assert_eq!(copy.str_at("/spec/runStrategy"), "Halted");
    world.wait_all(&SNAPSHOTS, |all| all.is_empty()).await;
    let held = world.get(&SNAPSHOT_CONTENTS, content.name()).await.unwrap();
    assert!(held.is_deleting() && held.finalizers().contains(&IN_USE));
    world.create(&CLONES, clone("d", "db")).await;
    let failed = world.wait(&CLONES, "d", phase("Failed")).await;
    assert!(failed["status"]["conditions"].to_string().contains("exists already"));
}

#[tokio::test]
async fn what_cannot_be_saved_fails_with_the_reason() {
    let world = World::new().await;
    world.node("n", |_| true).await;
    world.create(&SNAPSHOTS, snapshot("s")).await;
    let waiting = world.wait(&SNAPSHOTS, "s", phase("InProgress")).await;
    assert!(waiting["status"]["conditions"].to_string().contains("does not exist"));
    world.create(&MACHINES, machine("Halted")).await;
    let content = save(&world, json!({"readyToUse": false, "error": {"message": "no room"}})).await;
    let failed = world.wait(&SNAPSHOTS, "s", phase("Failed")).await;
    assert_eq!(failed.str_at("/status/error/message"), "no room");
    world.create(&RESTORES, restore("r", "WaitEventually")).await;
    world.wait(&RESTORES, "r", |r| condition_status(r, "Failure") == "True").await;
    world.delete(&SNAPSHOTS, "s").await;
    world.wait(&SNAPSHOT_CONTENTS, content.name(), |c| c.finalizers() == [FILES]).await;

    let mut late = snapshot("late");
    late["spec"]["source"]["name"] = "nothing".into();
    late["spec"]["failureDeadline"] = "1s".into();
    world.create(&SNAPSHOTS, late).await;
    world.now.fetch_add(10, Ordering::Relaxed);
    let failed = world.wait(&SNAPSHOTS, "late", phase("Failed")).await;
    assert!(failed.str_at("/status/error/message").contains("deadline"));
}
