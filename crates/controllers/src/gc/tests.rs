use crate::context::{DEPLOYMENTS, PODS, REPLICA_SETS};
use crate::objects::int;
use crate::testing::{World, template};
use api::client::{Client, DeleteOptions, Propagation};
use api::kind::{Resource, Scope};
use api::object::{Meta, SharedObject};
use serde_json::{Value, json};
use std::sync::LazyLock;

static MAPS: LazyLock<Resource> = LazyLock::new(|| Resource::new("", "v1", "configmaps"));

fn map(name: &str, owners: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap",
           "metadata": {"name": name, "namespace": "x", "ownerReferences": owners}})
}

fn owned_by(owner: &SharedObject, blocks: bool) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "name": owner.name(), "uid": owner.uid(), "blockOwnerDeletion": blocks})
}

async fn delete(world: &World, resource: &Resource, name: &str, propagation: Propagation) {
    let options = DeleteOptions { propagation, ..Default::default() };
    world.client.delete(resource, "x", name, &options).await.unwrap();
}

fn names(objects: &[SharedObject]) -> Vec<&str> {
    objects.iter().map(|object| object.name()).collect()
}

fn deployment() -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": "x"},
           "spec": {"replicas": 3, "selector": {"matchLabels": {"app": "web"}}, "template": template("web", "i")}})
}

async fn running() -> World {
    let world = World::new().await;
    world.node("n", |_| true).await;
    world.create(&DEPLOYMENTS, deployment()).await;
    world.wait(&DEPLOYMENTS, "web", |d| int(d, "/status/availableReplicas") == Some(3)).await;
    world
}

#[tokio::test]
async fn a_deployment_takes_its_sets_and_pods_with_it() {
    for propagation in [Propagation::Background, Propagation::Foreground] {
        let world = running().await;
        delete(&world, &DEPLOYMENTS, "web", propagation).await;
        world.wait_all(&PODS, |pods| pods.is_empty()).await;
        world.wait_all(&REPLICA_SETS, |sets| sets.is_empty()).await;
        world.wait_all(&DEPLOYMENTS, |deployments| deployments.is_empty()).await;
    }
}

#[tokio::test]
async fn orphans_live_on_and_are_adopted_again() {
    let world = running().await;
    let before = world.list(&PODS).await;
    delete(&world, &DEPLOYMENTS, "web", Propagation::Orphan).await;
    world.wait_all(&DEPLOYMENTS, |deployments| deployments.is_empty()).await;
    let sets = world.wait_all(&REPLICA_SETS, |sets| sets.iter().all(|set| set.controller_ref().is_none())).await;
    assert_eq!(sets.len(), 1);
    let again = world.create(&DEPLOYMENTS, deployment()).await;
    world
        .wait_all(&REPLICA_SETS, |sets| sets.iter().all(|set| crate::objects::is_controlled_by(set, again.uid())))
        .await;
    let after = world.list(&PODS).await;
    assert_eq!(names(&before), names(&after), "no pod was touched");
}

#[tokio::test]
async fn owners_that_are_gone_or_others_by_now() {
    let world = World::new().await;
    let one = world.create(&MAPS, map("one", json!([]))).await;
    let two = world.create(&MAPS, map("two", json!([]))).await;
    world.create(&MAPS, map("of-one", json!([owned_by(&one, false)]))).await;
    world.create(&MAPS, map("of-both", json!([owned_by(&one, false), owned_by(&two, false)]))).await;
    let mut wrong = owned_by(&two, false);
    wrong["uid"] = json!("another");
    world.create(&MAPS, map("of-another", json!([wrong]))).await;
    let unknown = json!([{"apiVersion": "example.com/v1", "kind": "Unknown", "name": "u", "uid": "u"}]);
    world.create(&MAPS, map("of-unknown", unknown)).await;
    world.wait_all(&MAPS, |all| !names(all).contains(&"of-another")).await;
    delete(&world, &MAPS, "one", Propagation::Background).await;
    let left = world.wait_all(&MAPS, |all| !names(all).contains(&"of-one")).await;
    assert!(names(&left).contains(&"of-unknown"));
    let both =
        world.wait(&MAPS, "of-both", |map| map["metadata"]["ownerReferences"].as_array().unwrap().len() == 1).await;
    assert_eq!(both.str_at("/metadata/ownerReferences/0/name"), "two");
}

#[tokio::test]
async fn foreground_waits_for_what_blocks() {
    let world = World::new().await;
    let owner = world.create(&MAPS, map("owner", json!([]))).await;
    let mut held = map("held", json!([owned_by(&owner, true)]));
    held["metadata"]["finalizers"] = json!(["example.com/f"]);
    world.create(&MAPS, held).await;
    world.create(&MAPS, map("free", json!([owned_by(&owner, false)]))).await;
    delete(&world, &MAPS, "owner", Propagation::Foreground).await;
    world.wait(&MAPS, "held", |map| map.is_deleting()).await;
    assert!(world.get(&MAPS, "owner").await.is_some(), "it waits");
    world.patch(&MAPS, "held", json!({"metadata": {"finalizers": null}})).await;
    world.wait_all(&MAPS, |all| all.is_empty()).await;
}

#[tokio::test]
async fn custom_resources_that_come_later() {
    let world = World::new().await;
    let owner = world.create(&MAPS, map("owner", json!([]))).await;
    let widgets = Resource::new("example.com", "v1", "widgets");
    world.client.register(widgets.clone(), Scope::Namespaced, "Widget");
    let widget = json!({"apiVersion": "example.com/v1", "kind": "Widget",
        "metadata": {"name": "w", "namespace": "x", "ownerReferences": [owned_by(&owner, true)]}});
    let widget = world.create(&widgets, widget).await;
    let part = json!([{"apiVersion": "example.com/v1", "kind": "Widget", "name": "w", "uid": widget.uid()}]);
    world.create(&MAPS, map("part", part)).await;
    delete(&world, &MAPS, "owner", Propagation::Background).await;
    world.wait_all(&widgets, |all| all.is_empty()).await;
    world.wait_all(&MAPS, |all| all.is_empty()).await;
}
