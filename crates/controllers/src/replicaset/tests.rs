use crate::context::{PODS, REPLICA_SETS};
use crate::objects::{int, is_controlled_by};
use crate::testing::{World, template};
use api::object::Meta;
use serde_json::{Value, json};

fn set(name: &str, replicas: i64) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": {"name": name, "namespace": "x"},
           "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": name}}, "template": template(name, "i")}})
}

#[tokio::test]
async fn keeps_its_number() {
    let world = World::new().await;
    world.node("n", |_| true).await;
    let made = world.create(&REPLICA_SETS, set("web", 3)).await;
    let status = world.wait(&REPLICA_SETS, "web", |s| int(s, "/status/availableReplicas") == Some(3)).await;
    assert_eq!(status["status"]["fullyLabeledReplicas"], 3);
    assert_eq!(status["status"]["observedGeneration"], 1);
    let pods = world.list(&PODS).await;
    assert_eq!(pods.len(), 3);
    for pod in &pods {
        assert!(pod.name().starts_with("web-") && is_controlled_by(pod, made.uid()));
        assert_eq!(pod.controller_ref().unwrap()["blockOwnerDeletion"], true);
    }
    world.wait_event("SuccessfulCreate: Created pod: web-").await;

    world.delete(&PODS, pods[0].name()).await;
    world.wait_all(&PODS, |now| now.len() == 3 && now.iter().all(|pod| pod.uid() != pods[0].uid())).await;
    world.patch(&REPLICA_SETS, "web", json!({"spec": {"replicas": 1}})).await;
    world.wait_all(&PODS, |now| now.len() == 1).await;
    world.wait(&REPLICA_SETS, "web", |s| int(s, "/status/replicas") == Some(1)).await;
    world.wait_event("SuccessfulDelete: Deleted pod: web-").await;
    world.patch(&REPLICA_SETS, "web", json!({"spec": {"replicas": 0}})).await;
    let none = world.wait(&REPLICA_SETS, "web", |s| int(s, "/status/replicas") == Some(0)).await;
    assert_eq!(none.pointer("/status/readyReplicas"), None);
}

#[tokio::test]
async fn never_makes_too_many() {
    let world = World::new().await;
    world.node("n", |_| true).await;
    world.create(&REPLICA_SETS, set("web", 40)).await;
    world.wait(&REPLICA_SETS, "web", |s| int(s, "/status/readyReplicas") == Some(40)).await;
    let created = world.events().await.iter().filter(|event| event.starts_with("SuccessfulCreate")).count();
    assert!(created <= 40, "{created}");
    assert_eq!(world.list(&PODS).await.len(), 40);
}

#[tokio::test]
async fn adopts_and_lets_go() {
    let world = World::new().await;
    world.node("n", |_| true).await;
    let orphan = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "orphan", "namespace": "x",
        "labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    world.create(&PODS, orphan).await;
    let made = world.create(&REPLICA_SETS, set("web", 2)).await;
    world.wait(&PODS, "orphan", |pod| is_controlled_by(pod, made.uid())).await;
    world.wait(&REPLICA_SETS, "web", |s| int(s, "/status/readyReplicas") == Some(2)).await;
    world.patch(&PODS, "orphan", json!({"metadata": {"labels": {"app": "other"}}})).await;
    world.wait(&PODS, "orphan", |pod| pod.controller_ref().is_none()).await;
    world.wait_all(&PODS, |pods| pods.iter().filter(|pod| is_controlled_by(pod, made.uid())).count() == 2).await;
    assert!(world.get(&PODS, "orphan").await.is_some(), "what is let go lives on");
}

#[tokio::test]
async fn available_after_min_ready_seconds() {
    let world = World::new().await;
    world.node("n", |_| true).await;
    let mut set = set("web", 1);
    set["spec"]["minReadySeconds"] = json!(5000);
    world.create(&REPLICA_SETS, set).await;
    let ready = world.wait(&REPLICA_SETS, "web", |s| int(s, "/status/readyReplicas") == Some(1)).await;
    assert_eq!(ready.pointer("/status/availableReplicas"), None);
    world.now.fetch_add(5001, std::sync::atomic::Ordering::Relaxed);
    // Any change makes it look again, as its own timer would after that time.
    world.patch(&REPLICA_SETS, "web", json!({"metadata": {"labels": {"a": "b"}}})).await;
    world.wait(&REPLICA_SETS, "web", |s| int(s, "/status/availableReplicas") == Some(1)).await;
}
