use crate::context::{INSTANCES, MACHINES, PODS};
use crate::objects::{condition_status, is_controlled_by, list};
use crate::testing::World;
use api::client::{Client, DeleteOptions, Patch};
use api::object::{Meta, Object, SharedObject};
use serde_json::{Value, json};
use std::sync::atomic::Ordering;

fn machine(strategy: &str) -> Value {
    json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": "db", "namespace": "x"},
        "spec": {"runStrategy": strategy, "template": {
            "metadata": {"labels": {"app": "db"}},
            "spec": {
                "domain": {"cpu": {"cores": 2}, "memory": {"guest": "512Mi"},
                           "devices": {"disks": [{"name": "root", "disk": {"bus": "virtio"}}],
                                       "interfaces": [{"name": "net", "bridge": {}, "ports": [{"name": "pg", "port": 5432}]}]}},
                "networks": [{"name": "net", "pod": {}}],
                "readinessProbe": {"tcpSocket": {"port": 5432}},
                "livenessProbe": {"guestAgentPing": {}},
                "terminationGracePeriodSeconds": 7,
                "volumes": [{"name": "root", "containerDisk": {"image": "disks/db:1"}}]}}}})
}

fn printed(status: &'static str) -> impl Fn(&Object) -> bool {
    move |machine| machine.str_at("/status/printableStatus") == status
}

async fn end_pod(world: &World, phase: &str) -> SharedObject {
    let pods = world.wait_all(&PODS, |pods| pods.iter().any(|pod| pod.str_at("/status/phase") == "Running")).await;
    let pod = pods.into_iter().find(|pod| pod.str_at("/status/phase") == "Running").unwrap();
    let patch = Patch::Merge(json!({"status": {"phase": phase, "conditions": [{"type": "Ready", "status": "False"}]}}));
    world.client.patch(&PODS, "x", pod.name(), "status", patch).await.unwrap();
    pod
}

#[tokio::test]
async fn runs_stops_and_runs_again() {
    let world = World::new().await;
    world.node("n", |_| true).await;
    let made = world.create(&MACHINES, machine("Always")).await;
    let running = world.wait(&MACHINES, "db", |m| printed("Running")(m) && m["status"]["ready"] == true).await;
    assert_eq!(running["status"]["created"], true);
    assert_eq!(condition_status(&running, "Ready"), "True");
    let instance = world.get(&INSTANCES, "db").await.unwrap();
    assert!(is_controlled_by(&instance, made.uid()));
    assert_eq!(instance.str_at("/status/phase"), "Running");
    assert_eq!(instance.str_at("/status/nodeName"), "n");
    assert_eq!(condition_status(&instance, "LiveMigratable"), "False");
    assert_eq!(instance["status"]["interfaces"][0]["name"], "net");
    assert_eq!(instance["status"]["interfaces"][0]["ipAddress"], "10.42.0.1");

    let pod = world.list(&PODS).await.remove(0);
    assert!(pod.name().starts_with("virt-launcher-db-") && is_controlled_by(&pod, instance.uid()));
    for (label, value) in [("kubevirt.io/domain", "db"), ("vm.kubevirt.io/name", "db"), ("app", "db")] {
        assert_eq!(pod.label(label), Some(value), "{label}");
    }
    assert_eq!(pod.annotation("atoll.dev/address-key"), Some("vm/x/db"));
    let spec: Value = serde_json::from_str(pod.annotation("atoll.dev/machine").unwrap()).unwrap();
    assert_eq!(spec, instance["spec"]);
    let container = &pod["spec"]["containers"][0];
    assert_eq!((&container["name"], &container["image"]), (&json!("compute"), &json!("disks/db:1")));
    assert_eq!(container["resources"], json!({"requests": {"memory": "512Mi", "cpu": "200m"}}));
    assert_eq!(container["readinessProbe"]["tcpSocket"]["port"], 5432);
    assert_eq!(container["ports"], json!([{"containerPort": 5432, "name": "pg"}]));
    assert!(container.get("livenessProbe").is_none(), "the guest's agent cannot be pinged from outside");
    assert_eq!(pod["spec"]["runtimeClassName"], "microvm");
    assert_eq!(pod["spec"]["hostname"], "db");
    assert_eq!(pod["spec"]["terminationGracePeriodSeconds"], 7);

    world.patch(&MACHINES, "db", json!({"spec": {"runStrategy": "Halted"}})).await;
    let stopped = world.wait(&MACHINES, "db", printed("Stopped")).await;
    assert_eq!(stopped.pointer("/status/created"), None);
    world.wait_all(&PODS, |pods| pods.is_empty()).await;
    world.patch(&MACHINES, "db", json!({"spec": {"runStrategy": null, "running": true}})).await;
    world.wait(&MACHINES, "db", printed("Running")).await;
    world.delete(&MACHINES, "db").await;
    world.wait_all(&INSTANCES, |instances| instances.is_empty()).await;
    world.wait_all(&PODS, |pods| pods.is_empty()).await;
}

#[tokio::test]
async fn restarts_after_a_crash_with_back_off() {
    let world = World::new().await;
    world.node("n", |_| true).await;
    world.create(&MACHINES, machine("Always")).await;
    let first = end_pod(&world, "Failed").await;
    let waiting = world.wait(&MACHINES, "db", printed("CrashLoopBackOff")).await;
    assert_eq!(waiting["status"]["startFailure"]["consecutiveFailCount"], 1);
    world.wait_event("Stopped: The VirtualMachineInstance crashed.").await;
    world.now.fetch_add(11, Ordering::Relaxed);
    world.patch(&MACHINES, "db", json!({"metadata": {"labels": {"look": "again"}}})).await;
    world.wait(&MACHINES, "db", printed("Running")).await;
    let second = end_pod(&world, "Failed").await;
    assert_ne!(first.uid(), second.uid());
    world.wait(&MACHINES, "db", |m| m["status"]["startFailure"]["consecutiveFailCount"] == 2).await;
}

#[tokio::test]
async fn strategies_when_the_guest_shuts_down() {
    for (strategy, phase, runs_again) in
        [("Always", "Succeeded", true), ("RerunOnFailure", "Succeeded", false), ("Once", "Failed", false)]
    {
        let world = World::new().await;
        world.node("n", |_| true).await;
        world.create(&MACHINES, machine(strategy)).await;
        let ended = end_pod(&world, phase).await;
        if runs_again {
            let fresh = |pods: &[SharedObject]| {
                pods.iter().any(|p| p.uid() != ended.uid() && p.str_at("/status/phase") == "Running")
            };
            world.wait_all(&PODS, fresh).await;
        } else {
            world.wait(&MACHINES, "db", printed("Stopped")).await;
            assert_eq!(world.get(&INSTANCES, "db").await.unwrap().str_at("/status/phase"), phase);
        }
    }
    let world = World::new().await;
    world.create(&MACHINES, machine("Manual")).await;
    world.wait(&MACHINES, "db", printed("Stopped")).await;
    assert!(world.list(&INSTANCES).await.is_empty());
}

#[tokio::test]
async fn says_what_it_waits_for() {
    let world = World::new().await;
    world.create(&MACHINES, machine("Always")).await;
    world.wait(&MACHINES, "db", printed("ErrorUnschedulable")).await;
    let pod = world.list(&PODS).await.remove(0);
    world.client.bind("x", pod.name(), pod.uid(), "n").await.unwrap();
    world.wait(&MACHINES, "db", printed("Starting")).await;
    let waiting = json!({"status": {"containerStatuses": [{"name": "compute", "state": {"waiting": {"reason": "ImagePullBackOff"}}}]}});
    world.client.patch(&PODS, "x", pod.name(), "status", Patch::Merge(waiting)).await.unwrap();
    world.wait(&MACHINES, "db", printed("ImagePullBackOff")).await;
    assert_eq!(world.get(&INSTANCES, "db").await.unwrap().str_at("/status/phase"), "Scheduled");
}

#[tokio::test]
async fn never_two_pods_of_one_machine() {
    let world = World::new().await;
    // Nobody ends pods here: they stay until this test says so.
    world.create(&MACHINES, machine("Always")).await;
    let first = world.wait_all(&PODS, |pods| pods.len() == 1).await.remove(0);
    world.client.bind("x", first.name(), first.uid(), "n").await.unwrap();
    world.delete(&INSTANCES, "db").await;
    world.wait(&PODS, first.name(), |pod| pod.is_deleting()).await;
    world.wait(&MACHINES, "db", printed("Stopping")).await;
    assert_eq!(world.list(&PODS).await.len(), 1);
    let now = DeleteOptions { grace_period_seconds: Some(0), ..Default::default() };
    world.client.delete(&PODS, "x", first.name(), &now).await.unwrap();
    world.wait_all(&PODS, |pods| pods.len() == 1 && pods[0].uid() != first.uid()).await;
}

#[tokio::test]
async fn a_lost_pod_fails_and_a_change_asks_for_a_restart() {
    let world = World::new().await;
    world.node("n", |_| true).await;
    let alone = json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "metadata": {"name": "one", "namespace": "x"},
                       "spec": machine("Always")["spec"]["template"]["spec"]});
    world.create(&INSTANCES, alone).await;
    world.wait(&INSTANCES, "one", |i| i.str_at("/status/phase") == "Running").await;
    let pod = world.list(&PODS).await.remove(0);
    world.delete(&PODS, pod.name()).await;
    world.wait(&INSTANCES, "one", |i| i.str_at("/status/phase") == "Failed").await;

    world.create(&MACHINES, machine("Always")).await;
    world.wait(&MACHINES, "db", printed("Running")).await;
    world.patch(&MACHINES, "db", json!({"spec": {"template": {"spec": {"domain": {"cpu": {"cores": 4}}}}}})).await;
    let told = world.wait(&MACHINES, "db", |m| condition_status(m, "RestartRequired") == "True").await;
    assert!(printed("Running")(&told));
    world.delete(&INSTANCES, "db").await;
    world.wait(&MACHINES, "db", |m| printed("Running")(m) && condition_status(m, "RestartRequired").is_empty()).await;
    assert_eq!(list(&world.get(&INSTANCES, "db").await.unwrap(), "/status/interfaces").len(), 1);
}

#[tokio::test]
async fn starts_and_stops_that_were_asked_for_are_carried_out_once() {
    let world = World::new().await;
    world.node("n", |_| true).await;
    world.create(&MACHINES, machine("Manual")).await;
    world.wait(&MACHINES, "db", printed("Stopped")).await;
    let ask = async |requests: Value| {
        let patch = Patch::Merge(json!({"status": {"stateChangeRequests": requests}}));
        world.client.patch(&MACHINES, "x", "db", "status", patch).await.unwrap();
    };
    let done = |m: &Object| printed("Running")(m) && m.pointer("/status/stateChangeRequests").is_none();
    ask(json!([{"action": "Start"}])).await;
    world.wait(&MACHINES, "db", done).await;
    let first = world.get(&INSTANCES, "db").await.unwrap().uid().to_owned();
    ask(json!([{"action": "Stop", "uid": first}, {"action": "Start"}])).await;
    world.wait(&INSTANCES, "db", |i| i.uid() != first && i.str_at("/status/phase") == "Running").await;
    world.wait(&MACHINES, "db", done).await;
    let second = world.get(&INSTANCES, "db").await.unwrap().uid().to_owned();
    // one that names an instance long gone is forgotten
    ask(json!([{"action": "Stop", "uid": first}])).await;
    world.wait(&MACHINES, "db", done).await;
    assert_eq!(world.get(&INSTANCES, "db").await.unwrap().uid(), second);
    ask(json!([{"action": "Stop", "uid": second}])).await;
    world.wait(&MACHINES, "db", |m| printed("Stopped")(m) && m.pointer("/status/stateChangeRequests").is_none()).await;
}
