use super::{MAXIMUM, REVISION, replicas};
use crate::context::{DEPLOYMENTS, PODS, REPLICA_SETS};
use crate::objects::{condition, int, is_controlled_by};
use crate::testing::{World, template};
use api::object::{Meta, Object, SharedObject};
use serde_json::{Value, json};
use std::sync::atomic::Ordering;

fn deployment(replicas: i64, image: &str) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment",
           "metadata": {"name": "web", "namespace": "x", "annotations": {"kubernetes.io/change-cause": image}},
           "spec": {"replicas": replicas, "progressDeadlineSeconds": 600, "revisionHistoryLimit": 10,
                    "selector": {"matchLabels": {"app": "web"}},
                    "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}},
                    "template": template("web", image)}})
}

/// What `kubectl rollout status` waits for.
fn rolled_out(d: &Object) -> bool {
    let count = |name: &str| int(d, &format!("/status/{name}")).unwrap_or(0);
    let wanted = int(d, "/spec/replicas").unwrap_or(0);
    count("observedGeneration") >= d.generation()
        && count("updatedReplicas") == wanted
        && count("replicas") == wanted
        && count("availableReplicas") == wanted
        && reason(d, "Progressing") == "NewReplicaSetAvailable"
}

fn reason<'a>(d: &'a Object, kind: &str) -> &'a str {
    d.get("status").and_then(|status| condition(status, kind)).map_or("", |c| c.str_at("/reason"))
}

fn image(set: &Object) -> &str {
    set.str_at("/spec/template/spec/containers/0/image")
}

async fn set_image(world: &World, image: &str) {
    let spec = template("web", image)["spec"].clone();
    let patch = json!({"metadata": {"annotations": {"kubernetes.io/change-cause": image}}, "spec": {"template": {"spec": spec}}});
    world.patch(&DEPLOYMENTS, "web", patch).await;
}

async fn set_of(world: &World, wanted: &str) -> SharedObject {
    let sets = world.wait_all(&REPLICA_SETS, |sets| sets.iter().any(|set| image(set) == wanted)).await;
    sets.into_iter().find(|set| image(set) == wanted).unwrap()
}

#[tokio::test]
async fn rolls_out_and_back() {
    let world = World::new().await;
    world.node("n", |_| true).await;
    let made = world.create(&DEPLOYMENTS, deployment(4, "v1")).await;
    let done = world.wait(&DEPLOYMENTS, "web", rolled_out).await;
    assert_eq!(done.annotation(REVISION), Some("1"));
    assert_eq!(reason(&done, "Available"), "MinimumReplicasAvailable");
    let v1 = set_of(&world, "v1").await;
    let hash = v1.label("pod-template-hash").unwrap().to_owned();
    assert_eq!(v1.name(), format!("web-{hash}"));
    assert_eq!(v1.pointer("/spec/selector/matchLabels/pod-template-hash").unwrap(), &json!(hash));
    assert_eq!(v1.pointer("/spec/template/metadata/labels/pod-template-hash").unwrap(), &json!(hash));
    assert!(is_controlled_by(&v1, made.uid()));
    world.wait_event("ScalingReplicaSet: Scaled up replica set").await;

    set_image(&world, "v2").await;
    let done = world.wait(&DEPLOYMENTS, "web", |d| rolled_out(d) && d.annotation(REVISION) == Some("2")).await;
    assert!(done["status"]["conditions"].as_array().unwrap().len() >= 2);
    let (v1, v2) = (set_of(&world, "v1").await, set_of(&world, "v2").await);
    assert_eq!((replicas(&v1), replicas(&v2)), (0, 4));
    assert_eq!((v1.annotation(REVISION), v2.annotation(REVISION)), (Some("1"), Some("2")));
    assert_eq!(v2.annotation("kubernetes.io/change-cause"), Some("v2"), "rollout history shows it");
    assert_eq!(v2.annotation(MAXIMUM), Some("5"));

    // What `kubectl rollout undo` sends: the old template.
    set_image(&world, "v1").await;
    world.wait(&DEPLOYMENTS, "web", |d| rolled_out(d) && d.annotation(REVISION) == Some("3")).await;
    let v1 = set_of(&world, "v1").await;
    assert_eq!((replicas(&v1), v1.annotation(REVISION)), (4, Some("3")), "the old set again, as a new revision");
    assert_eq!(v1.annotation("deployment.kubernetes.io/revision-history"), Some("1"));
    assert_eq!(world.list(&REPLICA_SETS).await.len(), 2);
}

#[tokio::test]
async fn stays_within_its_limits() {
    let world = World::new().await;
    world.node("n", |_| true).await;
    world.create(&DEPLOYMENTS, deployment(10, "v1")).await;
    world.wait(&DEPLOYMENTS, "web", rolled_out).await;
    set_image(&world, "v2").await;
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        let sets = world.list(&REPLICA_SETS).await;
        let wanted: i64 = sets.iter().map(|set| replicas(set)).sum();
        let available: i64 = sets.iter().filter_map(|set| int(set, "/status/availableReplicas")).sum();
        assert!(wanted <= 13, "maxSurge 25% of 10 is 3: {wanted}");
        // The sets' status is behind their size while pods are on their way out.
        assert!(available >= 8 || wanted >= 8, "maxUnavailable 25% of 10 is 2: {available}");
        if rolled_out(&world.get(&DEPLOYMENTS, "web").await.unwrap()) && sets.len() == 2 {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{sets:#?}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_bad_version_stops_and_times_out() {
    let world = World::new().await;
    world.node("n", |pod| pod.str_at("/spec/containers/0/image") != "bad").await;
    world.create(&DEPLOYMENTS, deployment(4, "v1")).await;
    world.wait(&DEPLOYMENTS, "web", rolled_out).await;
    set_image(&world, "bad").await;
    let stuck = world.wait(&DEPLOYMENTS, "web", |d| {
        let count = |name: &str| int(d, &format!("/status/{name}"));
        (count("replicas"), count("updatedReplicas"), count("unavailableReplicas")) == (Some(5), Some(2), Some(2))
    });
    let stuck = stuck.await;
    assert_eq!(int(&stuck, "/status/availableReplicas"), Some(3));
    world.wait_all(&PODS, |pods| pods.len() == 5).await;
    let (v1, bad) = (set_of(&world, "v1").await, set_of(&world, "bad").await);
    assert_eq!((replicas(&v1), replicas(&bad)), (3, 2));
    assert_eq!(reason(&stuck, "Progressing"), "ReplicaSetUpdated");

    world.now.fetch_add(601, Ordering::Relaxed);
    world.patch(&DEPLOYMENTS, "web", json!({"metadata": {"labels": {"look": "again"}}})).await;
    let late = world.wait(&DEPLOYMENTS, "web", |d| reason(d, "Progressing") == "ProgressDeadlineExceeded").await;
    assert_eq!(condition(&late["status"], "Progressing").unwrap()["status"], "False");
    assert_eq!(int(&late, "/status/readyReplicas"), Some(3), "the old version still serves");

    set_image(&world, "v1").await;
    world.wait(&DEPLOYMENTS, "web", rolled_out).await;
    assert_eq!(replicas(&*set_of(&world, "bad").await), 0);
}

#[tokio::test]
async fn pauses_and_scales() {
    let world = World::new().await;
    world.node("n", |_| true).await;
    world.create(&DEPLOYMENTS, deployment(2, "v1")).await;
    world.wait(&DEPLOYMENTS, "web", rolled_out).await;
    world.patch(&DEPLOYMENTS, "web", json!({"spec": {"paused": true}})).await;
    world.wait(&DEPLOYMENTS, "web", |d| reason(d, "Progressing") == "DeploymentPaused").await;
    set_image(&world, "v2").await;
    world.patch(&DEPLOYMENTS, "web", json!({"spec": {"replicas": 5}})).await;
    let scaled = world.wait(&DEPLOYMENTS, "web", |d| int(d, "/status/availableReplicas") == Some(5)).await;
    assert_eq!(int(&scaled, "/status/updatedReplicas"), None, "nothing of the new version yet");
    assert_eq!(world.list(&REPLICA_SETS).await.len(), 1);
    world.patch(&DEPLOYMENTS, "web", json!({"spec": {"paused": null}})).await;
    world.wait(&DEPLOYMENTS, "web", rolled_out).await;
    assert_eq!(replicas(&*set_of(&world, "v2").await), 5);
    world.patch(&DEPLOYMENTS, "web", json!({"spec": {"replicas": 0}})).await;
    world.wait_all(&PODS, |pods| pods.is_empty()).await;
}

#[tokio::test]
async fn scales_both_versions_in_proportion() {
    let world = World::new().await;
    world.node("n", |pod| pod.str_at("/spec/containers/0/image") != "bad").await;
    let mut wanted = deployment(10, "v1");
    wanted["spec"]["strategy"]["rollingUpdate"] = json!({"maxSurge": 3, "maxUnavailable": 2});
    world.create(&DEPLOYMENTS, wanted).await;
    world.wait(&DEPLOYMENTS, "web", rolled_out).await;
    set_image(&world, "bad").await;
    let sizes = async |old: i64, new: i64| {
        world
            .wait_all(&REPLICA_SETS, |sets| {
                let size = |name: &str| sets.iter().find(|set| image(set) == name).map(|set| replicas(set));
                size("v1") == Some(old) && size("bad") == Some(new)
            })
            .await
    };
    sizes(8, 5).await;
    world.patch(&DEPLOYMENTS, "web", json!({"spec": {"replicas": 15}})).await;
    sizes(11, 7).await;
}

#[tokio::test]
async fn recreate_waits_for_the_last_old_pod() {
    let world = World::new().await;
    world.node("n", |_| true).await;
    let mut wanted = deployment(3, "v1");
    wanted["spec"]["strategy"] = json!({"type": "Recreate"});
    world.create(&DEPLOYMENTS, wanted).await;
    world.wait(&DEPLOYMENTS, "web", rolled_out).await;
    set_image(&world, "v2").await;
    world
        .wait_all(&PODS, |pods| {
            let of = |version: &str| pods.iter().filter(|p| p.str_at("/spec/containers/0/image") == version).count();
            assert!(of("v1") == 0 || of("v2") == 0, "both versions at once");
            of("v2") == 3
        })
        .await;
    world.wait(&DEPLOYMENTS, "web", rolled_out).await;
}

#[tokio::test]
async fn forgets_old_revisions_and_survives_collisions() {
    let world = World::new().await;
    world.node("n", |_| true).await;
    let mut wanted = deployment(1, "v1");
    wanted["spec"]["revisionHistoryLimit"] = json!(2);
    // Someone else has the name that the first set would get.
    let hash = super::plan::hash(&template("web", "v1"), None);
    let taken = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": {"name": format!("web-{hash}"), "namespace": "x"},
        "spec": {"replicas": 0, "selector": {"matchLabels": {"app": "other"}}, "template": template("other", "i")}});
    world.create(&REPLICA_SETS, taken).await;
    world.create(&DEPLOYMENTS, wanted).await;
    let done = world.wait(&DEPLOYMENTS, "web", rolled_out).await;
    assert_eq!(int(&done, "/status/collisionCount"), Some(1));
    for version in ["v2", "v3", "v4", "v5"] {
        set_image(&world, version).await;
        world
            .wait(&DEPLOYMENTS, "web", |d| rolled_out(d) && d.annotation("kubernetes.io/change-cause") == Some(version))
            .await;
        set_of(&world, version).await;
    }
    let sets = world
        .wait_all(&REPLICA_SETS, |sets| {
            sets.iter().filter(|s| s.str_at("/metadata/ownerReferences/0/name") == "web").count() == 3
        })
        .await;
    let kept: Vec<&str> = sets.iter().map(|set| image(set)).filter(|image| image.starts_with('v')).collect();
    assert!(["v3", "v4", "v5"].iter().all(|version| kept.contains(version)), "{kept:?}");
}
