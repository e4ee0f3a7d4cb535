use super::{ROUTING_STATE, State, set_conditions};
use crate::context::{
    DEPLOYMENTS, ENDPOINT_SLICES, HTTP_ROUTES, KN_CONFIGURATIONS, KN_REVISIONS, KN_ROUTES, KN_SERVICES, PODS, SERVICES,
};
use crate::endpoints::SERVICE_NAME;
use crate::objects::{condition_status, int, is_controlled_by, list};
use crate::testing::World;
use api::object::{Meta, Object, SharedObject};
use api::sleep::ASLEEP;
use serde_json::{Value, json};

fn service(image: &str) -> Value {
    json!({"apiVersion": "serving.knative.dev/v1", "kind": "Service", "metadata": {"name": "fn", "namespace": "x", "labels": {"l": "m"}},
           "spec": {"template": {"spec": {"runtimeClassName": "wasm", "timeoutSeconds": 60, "containerConcurrency": 0,
               "containers": [{"name": "user-container", "image": image, "env": [{"name": "A", "value": "b"}],
                               "readinessProbe": {"tcpSocket": {"port": 0}, "successThreshold": 1}}]}}}})
}

fn ready(revision: &'static str) -> impl Fn(&Object) -> bool {
    move |service| {
        condition_status(service, "Ready") == "True"
            && service.str_at("/status/latestReadyRevisionName") == revision
            && service.str_at("/status/traffic/0/revisionName") == revision
            && int(service, "/status/observedGeneration") == Some(service.generation())
    }
}

async fn set_image(world: &World, image: &str) {
    let template = service(image)["spec"]["template"].clone();
    world.patch(&KN_SERVICES, "fn", json!({"spec": {"template": template}})).await;
}

async fn world() -> World {
    let world = World::new().await;
    world.node("n", |pod| pod.str_at("/spec/containers/0/image") != "bad").await;
    world
}

#[test]
fn the_worst_condition_decides() {
    let ready = |states: &[(&str, State)]| {
        let mut status = json!({});
        set_conditions(&mut status, states, "now");
        let types: Vec<&str> = list(&status, "/conditions").iter().map(|c| c.str_at("/type")).collect();
        assert!(types.is_sorted());
        list(&status, "/conditions").iter().find(|c| c.str_at("/type") == "Ready").unwrap().clone()
    };
    assert_eq!(ready(&[("A", State::True), ("B", State::True)])["status"], "True");
    assert_eq!(ready(&[("A", State::True), ("B", State::unknown("r", ""))])["status"], "Unknown");
    let failed = ready(&[("A", State::failed("Bad", "very")), ("B", State::unknown("r", ""))]);
    assert_eq!(
        (&failed["status"], &failed["reason"], &failed["message"]),
        (&json!("False"), &json!("Bad"), &json!("very"))
    );
}

#[tokio::test]
async fn a_service_from_beginning_to_end() {
    let world = world().await;
    let made = world.create(&KN_SERVICES, service("v1")).await;
    let done = world.wait(&KN_SERVICES, "fn", ready("fn-00001")).await;
    assert_eq!(done["status"]["url"], "http://fn.x.atoll.local:8080");
    assert_eq!(done["status"]["address"]["url"], "http://fn.x.svc.cluster.local");
    assert_eq!(
        done["status"]["traffic"],
        json!([{"revisionName": "fn-00001", "latestRevision": true, "percent": 100}])
    );
    for kind in ["ConfigurationsReady", "RoutesReady"] {
        assert_eq!(condition_status(&done, kind), "True");
    }
    for resource in [&*KN_CONFIGURATIONS, &*KN_ROUTES] {
        let part = world.get(resource, "fn").await.unwrap();
        assert!(is_controlled_by(&part, made.uid()));
        assert_eq!((part.label("serving.knative.dev/service"), part.label("l")), (Some("fn"), Some("m")));
        assert_eq!(condition_status(&part, "Ready"), "True");
    }
    let revision = world.get(&KN_REVISIONS, "fn-00001").await.unwrap();
    assert_eq!(revision.label("serving.knative.dev/configurationGeneration"), Some("1"));
    for kind in ["Ready", "Active", "ContainerHealthy", "ResourcesAvailable"] {
        assert_eq!(condition_status(&revision, kind), "True", "{kind}");
    }
    let deployment = world.get(&DEPLOYMENTS, "fn-00001-deployment").await.unwrap();
    assert!(is_controlled_by(&deployment, revision.uid()));
    assert_eq!(deployment["spec"]["replicas"], 1);
    let pod = &deployment["spec"]["template"]["spec"];
    assert_eq!(pod["runtimeClassName"], "wasm");
    assert!(pod.get("timeoutSeconds").is_none() && pod.get("containerConcurrency").is_none());
    let container = &pod["containers"][0];
    assert_eq!(container["ports"], json!([{"name": "user-port", "containerPort": 8080, "protocol": "TCP"}]));
    assert_eq!(container["readinessProbe"]["tcpSocket"]["port"], 8080);
    let env: Vec<(&str, &str)> =
        list(container, "/env").iter().map(|e| (e.str_at("/name"), e.str_at("/value"))).collect();
    assert_eq!(
        env,
        [("A", "b"), ("PORT", "8080"), ("K_SERVICE", "fn"), ("K_CONFIGURATION", "fn"), ("K_REVISION", "fn-00001")]
    );
    for name in ["fn", "fn-00001"] {
        let service = world.get(&SERVICES, name).await.unwrap();
        assert_eq!(service["spec"]["selector"], json!({"serving.knative.dev/revisionUID": revision.uid()}));
        assert_eq!(
            (&service["spec"]["ports"][0]["port"], &service["spec"]["ports"][0]["targetPort"]),
            (&json!(80), &json!(8080))
        );
    }
    let route = world.get(&HTTP_ROUTES, "fn").await.unwrap();
    assert_eq!(route["spec"]["hostnames"], json!(["fn.x.svc.cluster.local", "fn.x.atoll.local"]));
    assert_eq!(route["spec"]["parentRefs"][0]["name"], "atoll");
    assert_eq!(route["spec"]["rules"][0]["backendRefs"][0]["name"], "fn-00001");
    assert_eq!(route["spec"]["rules"][0]["timeouts"]["request"], "60s");

    world.delete(&KN_SERVICES, "fn").await;
    world.wait_all(&PODS, |pods| pods.is_empty()).await;
    for resource in
        [&*KN_CONFIGURATIONS, &*KN_ROUTES, &*KN_REVISIONS, &*DEPLOYMENTS, &*HTTP_ROUTES, &*SERVICES, &*ENDPOINT_SLICES]
    {
        world.wait_all(resource, |all| all.is_empty()).await;
    }
}

#[tokio::test]
async fn each_template_is_a_revision() {
    let world = world().await;
    world.create(&KN_SERVICES, service("v1")).await;
    world.wait(&KN_SERVICES, "fn", ready("fn-00001")).await;
    set_image(&world, "v2").await;
    world.wait(&KN_SERVICES, "fn", ready("fn-00002")).await;
    let old = world.wait(&KN_REVISIONS, "fn-00001", |r| r.label(ROUTING_STATE) == Some("reserve")).await;
    assert_eq!(old["spec"]["containers"][0]["image"], "v1", "a revision never changes");
    world.wait(&DEPLOYMENTS, "fn-00001-deployment", |d| int(d, "/spec/replicas") == Some(0)).await;
    let old = world.wait(&KN_REVISIONS, "fn-00001", |r| condition_status(r, "Active") == "False").await;
    assert_eq!(condition_status(&old, "Ready"), "True", "it could serve");
    let route = world.get(&HTTP_ROUTES, "fn").await.unwrap();
    assert_eq!(route["spec"]["rules"][0]["backendRefs"][0]["name"], "fn-00002");

    // Metadata makes no revision.
    world.patch(&KN_SERVICES, "fn", json!({"metadata": {"labels": {"other": "o"}}})).await;
    world.wait(&KN_CONFIGURATIONS, "fn", |c| c.label("other") == Some("o")).await;
    assert_eq!(world.list(&KN_REVISIONS).await.len(), 2);
}

#[test]
fn only_a_configuration_that_knows_a_revision_says_it_is_superseded() {
    let revision = |generation: &str| json!({"metadata": {"name": "fn-00002", "labels": {"serving.knative.dev/configurationGeneration": generation}}});
    let says = |observed: i64, newest: &str| json!({"status": {"observedGeneration": observed, "latestCreatedRevisionName": newest}});
    let newer = |configuration: Value| super::route::newer(&configuration, &revision("2")).map(str::to_owned);
    assert_eq!(newer(says(1, "fn-00001")), None, "it was just made");
    assert_eq!(newer(says(2, "fn-00002")), None);
    assert_eq!(newer(says(3, "fn-00003")), Some("fn-00003".to_owned()));
    // Back to an earlier one, by its name.
    assert_eq!(newer(says(3, "fn-00001")), Some("fn-00001".to_owned()));
}

#[tokio::test]
async fn a_bad_revision_gets_no_requests() {
    let world = world().await;
    world.create(&KN_SERVICES, service("v1")).await;
    world.wait(&KN_SERVICES, "fn", ready("fn-00001")).await;
    set_image(&world, "bad").await;
    world.wait(&KN_SERVICES, "fn", |s| s.str_at("/status/latestCreatedRevisionName") == "fn-00002").await;
    let pods = world.wait_all(&PODS, |pods| pods.len() == 2).await;
    let bad = pods.iter().find(|pod| pod.str_at("/spec/containers/0/image") == "bad").unwrap();
    let crash = json!({"status": {"containerStatuses": [{"name": "user-container",
        "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": {"exitCode": 3, "message": "no"}}}]}});
    use api::client::{Client, Patch};
    world.client.patch(&PODS, "x", bad.name(), "status", Patch::Merge(crash)).await.unwrap();
    let failed = world.wait(&KN_SERVICES, "fn", |s| condition_status(s, "Ready") == "False").await;
    let told = list(&failed, "/status/conditions").iter().find(|c| c.str_at("/type") == "Ready").unwrap().clone();
    assert_eq!(told["reason"], "RevisionFailed");
    assert_eq!(told["message"], "Revision \"fn-00002\" failed with message: Container failed with: no.");
    assert_eq!(failed.str_at("/status/traffic/0/revisionName"), "fn-00001", "the good one goes on");
    assert_eq!(world.get(&KN_REVISIONS, "fn-00001").await.unwrap().label(ROUTING_STATE), Some("active"));

    set_image(&world, "v3").await;
    world.wait(&KN_SERVICES, "fn", ready("fn-00003")).await;
    world.wait(&KN_REVISIONS, "fn-00002", |r| r.label(ROUTING_STATE) == Some("reserve")).await;
    world.wait_all(&PODS, |pods| pods.len() == 1).await;
}

#[tokio::test]
async fn shares_requests_and_names_targets() {
    let world = world().await;
    world.create(&KN_SERVICES, service("v1")).await;
    world.wait(&KN_SERVICES, "fn", ready("fn-00001")).await;
    let mut second = service("v2")["spec"].clone();
    second["traffic"] = json!([
        {"revisionName": "fn-00001", "percent": 90, "tag": "old"}, {"latestRevision": true, "percent": 10}]);
    world.patch(&KN_SERVICES, "fn", json!({"spec": second})).await;
    let both = |s: &Object| {
        condition_status(s, "Ready") == "True"
            && list(s, "/status/traffic").len() == 2
            && s.str_at("/status/traffic/1/revisionName") == "fn-00002"
    };
    let done = world.wait(&KN_SERVICES, "fn", both).await;
    assert_eq!(done["status"]["traffic"][0]["url"], "http://old-fn.x.atoll.local:8080");
    let route = world.get(&HTTP_ROUTES, "fn").await.unwrap();
    let weights: Vec<(&str, Option<i64>)> = list(&route, "/spec/rules/0/backendRefs")
        .iter()
        .map(|backend| (backend.str_at("/name"), int(backend, "/weight")))
        .collect();
    assert_eq!(weights, [("fn-00001", Some(90)), ("fn-00002", Some(10))]);
    let tagged = world.wait(&HTTP_ROUTES, "old-fn", |_| true).await;
    assert_eq!(tagged["spec"]["rules"][0]["backendRefs"][0]["name"], "fn-00001");
    let service = world.wait(&SERVICES, "fn", |s| s.pointer("/spec/selector").is_none()).await;
    assert_eq!(service["spec"]["ports"][0]["port"], 80);
    let pods_of = |slices: &[SharedObject]| {
        let own = slices.iter().filter(|slice| slice.label(SERVICE_NAME) == Some("fn"));
        own.map(|slice| list(slice, "/endpoints").len()).sum::<usize>()
    };
    world.wait_all(&ENDPOINT_SLICES, |slices| pods_of(slices) == 2).await;
    assert_eq!(world.list(&PODS).await.len(), 2, "both have a pod");

    world.patch(&KN_SERVICES, "fn", json!({"spec": {"traffic": [{"latestRevision": true, "percent": 100}]}})).await;
    world.wait(&KN_SERVICES, "fn", ready("fn-00002")).await;
    world.wait_all(&HTTP_ROUTES, |routes| routes.iter().all(|route| route.name() != "old-fn")).await;
    world.wait(&SERVICES, "fn", |s| s.pointer("/spec/selector").is_some()).await;
    world.wait_all(&ENDPOINT_SLICES, |slices| pods_of(slices) == 1).await;
    world.wait_all(&PODS, |pods| pods.len() == 1).await;
}

#[tokio::test]
async fn pods_sleep_as_their_deployment_says() {
    let world = world().await;
    world.create(&KN_SERVICES, service("v1")).await;
    world.wait(&KN_SERVICES, "fn", ready("fn-00001")).await;
    let rest = |word: Value| json!({"metadata": {"annotations": {ASLEEP: word}}});
    world.patch(&DEPLOYMENTS, "fn-00001-deployment", rest(json!("frozen"))).await;
    world.wait_all(&PODS, |pods| pods.iter().all(|pod| pod.annotation(ASLEEP) == Some("frozen"))).await;
    let asleep = world.wait(&KN_REVISIONS, "fn-00001", |r| condition_status(r, "Active") == "False").await;
    assert_eq!(asleep["status"]["desiredReplicas"], 0);
    assert_eq!(condition_status(&asleep, "Ready"), "True");
    world.patch(&DEPLOYMENTS, "fn-00001-deployment", rest(Value::Null)).await;
    world.wait_all(&PODS, |pods| pods.iter().all(|pod| pod.annotation(ASLEEP).is_none())).await;
    world.wait(&KN_REVISIONS, "fn-00001", |r| condition_status(r, "Active") == "True").await;
}

#[tokio::test]
async fn names_that_are_taken() {
    let world = world().await;
    let taken =
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "fn", "namespace": "x"}, "spec": {}});
    world.create(&SERVICES, taken).await;
    let mut named = service("v1");
    named["spec"]["template"]["metadata"] = json!({"name": "fn-first"});
    world.create(&KN_SERVICES, named).await;
    let told = world.wait(&KN_SERVICES, "fn", |s| condition_status(s, "RoutesReady") == "False").await;
    assert_eq!(told.str_at("/status/latestReadyRevisionName"), "fn-first");
    assert!(world.get(&SERVICES, "fn").await.unwrap().controller_ref().is_none());
    let spec = json!({"spec": {"template": {"spec": {"containers": [{"name": "user-container", "image": "v2"}]}}}});
    world.patch(&KN_SERVICES, "fn", spec).await;
    let told = world.wait(&KN_CONFIGURATIONS, "fn", |c| condition_status(c, "Ready") == "False").await;
    assert!(told.str_at("/status/conditions/0/message").contains("\"fn-first\" already exists"));
}
