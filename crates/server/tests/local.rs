//! The API in process, as controllers and the agent use it: same rules as over HTTP, under contention too.

mod common;

use api::client::{DeleteOptions, ListOptions, Patch, Propagation};
use api::informer::Informer;
use api::kind::Resource;
use api::object::{Meta, Object};
use common::{Running, eventually};
use serde_json::json;
use std::collections::HashSet;
use std::sync::Arc;
use store::{KeyRange, RangeRequest, Store};

fn resource(group: &str, plural: &str) -> Resource {
    Resource::new(group, "v1", plural)
}

fn config_map(name: &str) -> Object {
    json!({"metadata": {"name": name}, "data": {"count": "0"}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_update_is_lost() {
    let running = Running::start().await;
    let (client, maps) = (running.server.client(), resource("", "configmaps"));
    client.create(&maps, "default", config_map("counter")).await.unwrap();
    let mut tasks = Vec::new();
    for _ in 0..40 {
        let (client, maps) = (client.clone(), maps.clone());
        tasks.push(tokio::spawn(async move {
            loop {
                let mut object = (*client.get(&maps, "default", "counter").await.unwrap()).clone();
                let count: u32 = object.str_at("/data/count").parse().unwrap();
                object["data"]["count"] = (count + 1).to_string().into();
                match client.update(&maps, "default", object).await {
                    Ok(_) => return,
                    Err(status) => assert!(status.is_conflict(), "{status}"),
                }
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(client.get(&maps, "default", "counter").await.unwrap().str_at("/data/count"), "40");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn patches_from_many_hands_all_land() {
    let running = Running::start().await;
    let (client, maps) = (running.server.client(), resource("", "configmaps"));
    client.create(&maps, "default", config_map("shared")).await.unwrap();
    let mut tasks = Vec::new();
    for n in 0..30 {
        let (client, maps) = (client.clone(), maps.clone());
        tasks.push(tokio::spawn(async move {
            let patch = Patch::Merge(json!({"data": {format!("k{n}"): "v"}}));
            client.patch(&maps, "default", "shared", "", patch).await.unwrap();
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let object = client.get(&maps, "default", "shared").await.unwrap();
    assert_eq!(object["data"].as_object().unwrap().len(), 31);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn addresses_are_never_given_twice_and_come_back() {
    let store = Arc::new(store::memory::Engine::new());
    let running = Running::start_with(store.clone()).await;
    let (client, services) = (running.server.client(), resource("", "services"));
    let mut tasks = Vec::new();
    for n in 0..100 {
        let (client, services) = (client.clone(), services.clone());
        tasks.push(tokio::spawn(async move {
            let object = json!({"metadata": {"name": format!("s{n}")},
                                "spec": {"type": "NodePort", "ports": [{"port": 80}]}});
            let made = client.create(&services, "default", object).await.unwrap();
            (made.str_at("/spec/clusterIP").to_owned(), made["spec"]["ports"][0]["nodePort"].as_i64().unwrap())
        }));
    }
    let (mut addresses, mut ports) = (HashSet::new(), HashSet::new());
    for task in tasks {
        let (address, port) = task.await.unwrap();
        assert!(addresses.insert(address) && ports.insert(port));
    }
    let wanted = json!({"metadata": {"name": "wanted"}, "spec": {"clusterIP": "10.43.7.7", "ports": [{"port": 80}]}});
    let mut takers = Vec::new();
    for n in 0..8 {
        let (client, services, mut object) = (client.clone(), services.clone(), wanted.clone());
        object["metadata"]["name"] = format!("w{n}").into();
        takers.push(tokio::spawn(async move { client.create(&services, "default", object).await.is_ok() }));
    }
    let mut won = 0;
    for taker in takers {
        won += usize::from(taker.await.unwrap());
    }
    assert_eq!(won, 1, "one of them gets the address they all want");
    for service in client.list(&services, "default", &ListOptions::default()).await.unwrap().items {
        client.delete(&services, "default", service.name(), &DeleteOptions::default()).await.unwrap();
    }
    let left = RangeRequest { range: KeyRange::prefix("/allocations/"), revision: 0, limit: 0, count_only: true };
    assert_eq!(store.range(left).await.unwrap().count, 0);
}

#[tokio::test]
async fn what_controllers_do() {
    let running = Running::start().await;
    let client = running.server.client();
    let (namespaces, pods, maps) = (resource("", "namespaces"), resource("", "pods"), resource("", "configmaps"));
    client.create(&namespaces, "", json!({"metadata": {"name": "n"}})).await.unwrap();
    let pod = json!({"metadata": {"generateName": "p-"}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    let pod = client.create(&pods, "n", pod).await.unwrap();
    assert!(client.bind("n", pod.name(), "other-uid", "node").await.unwrap_err().is_conflict());
    client.bind("n", pod.name(), pod.uid(), "node").await.unwrap();
    let mut status = (*client.get(&pods, "n", pod.name()).await.unwrap()).clone();
    status["status"]["phase"] = "Running".into();
    status["spec"]["nodeName"] = "elsewhere".into();
    let kept = client.update_status(&pods, "n", status).await.unwrap();
    assert_eq!((kept.str_at("/status/phase"), kept.str_at("/spec/nodeName")), ("Running", "node"));
    let on_node = ListOptions { field_selector: "spec.nodeName=node".into(), ..ListOptions::default() };
    assert_eq!(client.list(&pods, "", &on_node).await.unwrap().items.len(), 1);

    client.delete(&pods, "n", pod.name(), &DeleteOptions::default()).await.unwrap();
    assert!(client.get(&pods, "n", pod.name()).await.unwrap().is_deleting());
    let wrong = DeleteOptions { grace_period_seconds: Some(0), uid: Some("other".into()), ..DeleteOptions::default() };
    assert!(client.delete(&pods, "n", pod.name(), &wrong).await.unwrap_err().is_conflict());
    let now = DeleteOptions { grace_period_seconds: Some(0), ..DeleteOptions::default() };
    client.delete(&pods, "n", pod.name(), &now).await.unwrap();
    assert!(client.get(&pods, "n", pod.name()).await.unwrap_err().is_not_found());

    client.create(&maps, "n", config_map("owner")).await.unwrap();
    let foreground = DeleteOptions { propagation: Propagation::Foreground, ..DeleteOptions::default() };
    client.delete(&maps, "n", "owner", &foreground).await.unwrap();
    // A second, plain delete does not undo the first one's choice.
    client.delete(&maps, "n", "owner", &DeleteOptions::default()).await.unwrap();
    assert_eq!(client.get(&maps, "n", "owner").await.unwrap().finalizers(), ["foregroundDeletion"]);
    let done = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    client.patch(&maps, "n", "owner", "", done).await.unwrap();
    assert!(client.get(&maps, "n", "owner").await.unwrap_err().is_not_found());

    client.delete(&namespaces, "", "n", &DeleteOptions::default()).await.unwrap();
    let emptied = Patch::Merge(json!({"spec": {"finalizers": []}}));
    client.patch(&namespaces, "", "n", "finalize", emptied).await.unwrap();
    assert!(client.get(&namespaces, "", "n").await.unwrap_err().is_not_found());

    let strange = client.list(&resource("example.com", "things"), "", &ListOptions::default()).await.unwrap_err();
    assert!(strange.is_not_found());
    assert!(client.resources().iter().any(|(r, _, kind)| *r.plural == *"deployments" && kind == "Deployment"));
    let applied = Patch::Apply {
        object: json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"k": "v"}}),
        manager: "m".into(),
        force: false,
    };
    assert_eq!(client.patch(&maps, "default", "a", "", applied).await.unwrap().str_at("/data/k"), "v");
}

#[tokio::test]
async fn an_informer_follows_through_compaction() {
    let store = Arc::new(store::memory::Engine::new());
    let running = Running::start_with(store.clone()).await;
    let (client, maps) = (running.server.client(), resource("", "configmaps"));
    let informer = Informer::spawn(client.clone(), maps.clone(), "default", ListOptions::default());
    client.create(&maps, "default", config_map("a")).await.unwrap();
    eventually("the informer sees a", async || informer.get("default", "a").is_some()).await;
    store.compact(store.revision().await.unwrap()).await.unwrap();
    client.create(&maps, "default", config_map("b")).await.unwrap();
    client.delete(&maps, "default", "a", &DeleteOptions::default()).await.unwrap();
    eventually("the informer goes on", async || {
        informer.get("default", "b").is_some() && informer.get("default", "a").is_none()
    })
    .await;
    let expired = client.watch(&maps, "", &ListOptions::default(), "2").await;
    let expired = match expired {
        Err(status) => status,
        Ok(mut stream) => futures_util::StreamExt::next(&mut stream).await.unwrap().unwrap_err(),
    };
    assert_eq!(expired.code(), 410);
}
