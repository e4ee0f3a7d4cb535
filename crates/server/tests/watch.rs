//! Watches: order, filters, bookmarks, and what happens when history is gone.

mod common;

use common::{As, Running};
use serde_json::{Value, json};
use std::sync::Arc;
use store::Store;

const CMS: &str = "/api/v1/namespaces/default/configmaps";

fn config_map(name: &str, colour: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": {"colour": colour}}})
}

fn event(kind: &str, name: &str) -> (String, String) {
    (kind.to_owned(), name.to_owned())
}

#[tokio::test]
async fn changes_come_in_order_from_a_version_on() {
    let running = Running::start().await;
    let start = running.post(CMS, &config_map("a", "red")).await.json();
    let version = start["metadata"]["resourceVersion"].as_str().unwrap();
    running.post(CMS, &config_map("b", "red")).await;
    let mut watch = running.watch(&format!("{CMS}?watch=true&resourceVersion={version}"), &[]).await;
    assert_eq!(watch.next_name().await, event("ADDED", "b"));
    running.put(&format!("{CMS}/a"), &config_map("a", "blue")).await;
    assert_eq!(watch.next_name().await, event("MODIFIED", "a"));
    running.delete(&format!("{CMS}/a"), &Value::Null).await;
    let gone = watch.next().await.unwrap();
    assert_eq!(gone["type"], "DELETED");
    let at = |v: &Value| v["metadata"]["resourceVersion"].as_str().unwrap().parse::<i64>().unwrap();
    assert!(at(&gone["object"]) > at(&start), "a deletion has a version of its own");
}

#[tokio::test]
async fn selectors_make_objects_come_and_go() {
    let running = Running::start().await;
    let mut red = running.watch(&format!("{CMS}?watch=1&labelSelector=colour%3Dred&resourceVersion=1"), &[]).await;
    let mut one = running.watch(&format!("{CMS}?watch=1&fieldSelector=metadata.name%3Db&resourceVersion=1"), &[]).await;
    let mut other = running.watch("/api/v1/namespaces/kube-system/configmaps?watch=1&resourceVersion=1", &[]).await;
    running.post(CMS, &config_map("a", "blue")).await;
    running.post(CMS, &config_map("b", "red")).await;
    assert_eq!(red.next_name().await, event("ADDED", "b"));
    assert_eq!(one.next_name().await, event("ADDED", "b"));
    running.put(&format!("{CMS}/a"), &config_map("a", "red")).await;
    assert_eq!(red.next_name().await, event("ADDED", "a"));
    running.put(&format!("{CMS}/b"), &config_map("b", "blue")).await;
    assert_eq!(red.next_name().await, event("DELETED", "b"));
    assert_eq!(one.next_name().await, event("MODIFIED", "b"));
    running.post("/api/v1/namespaces/kube-system/configmaps", &config_map("c", "red")).await;
    assert_eq!(other.next_name().await, event("ADDED", "c"));
}

#[tokio::test]
async fn lists_that_go_on_as_watches() {
    let running = Running::start().await;
    running.post(CMS, &config_map("a", "red")).await;
    let mut watch = running.watch(&format!("{CMS}?watch=1"), &[]).await;
    assert_eq!(watch.next_name().await, event("ADDED", "a"));
    let streaming =
        format!("{CMS}?watch=1&sendInitialEvents=true&allowWatchBookmarks=true&resourceVersionMatch=NotOlderThan");
    let mut streaming = running.watch(&streaming, &[]).await;
    assert_eq!(streaming.next_name().await, event("ADDED", "a"));
    let bookmark = streaming.next().await.unwrap();
    assert_eq!(bookmark["type"], "BOOKMARK");
    assert_eq!(bookmark["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    running.post(CMS, &config_map("b", "red")).await;
    assert_eq!(watch.next_name().await, event("ADDED", "b"));
    assert_eq!(streaming.next_name().await, event("ADDED", "b"));
    running.get(&format!("{CMS}?watch=1&sendInitialEvents=true")).await.refusal(422);
    let table = [("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")];
    let mut rows = running.watch(&format!("{CMS}?watch=1"), &table).await;
    let first = rows.next().await.unwrap();
    assert_eq!(first["object"]["kind"], "Table");
    assert!(first["object"]["columnDefinitions"].is_array());
    assert!(rows.next().await.unwrap()["object"]["columnDefinitions"].is_null());
}

#[tokio::test]
async fn a_watch_ends_in_time_and_refuses_what_is_gone() {
    let store = Arc::new(store::memory::Engine::new());
    let running = Running::start_with(store.clone()).await;
    let mut short = running.watch(&format!("{CMS}?watch=1&timeoutSeconds=1"), &[]).await;
    assert!(short.next().await.is_none());
    for n in 0..10 {
        running.post(CMS, &config_map(&format!("c{n}"), "red")).await;
    }
    let first = running.get(&format!("{CMS}?limit=1")).await.json();
    running.post(CMS, &config_map("late", "red")).await;
    let now = store.revision().await.unwrap();
    store.compact(now).await.unwrap();
    let mut watch = running.watch(&format!("{CMS}?watch=1&resourceVersion=2"), &[]).await;
    let event = watch.next().await.unwrap();
    assert_eq!(
        (&event["type"], &event["object"]["code"], &event["object"]["reason"]),
        (&json!("ERROR"), &json!(410), &json!("Expired"))
    );
    assert!(watch.next().await.is_none());
    let token = first["metadata"]["continue"].as_str().unwrap();
    let expired = running.get(&format!("{CMS}?limit=1&continue={token}")).await;
    assert_eq!(expired.json()["reason"], "Expired");
    assert!(expired.refusal(410).contains("continue parameter is too old"));
    running.send(&As::Admin, "GET", &format!("{CMS}?watch=1&resourceVersion=x"), &[], "").await.refusal(400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_watchers_see_every_event_once() {
    let running = Running::start().await;
    let mut watchers = Vec::new();
    for _ in 0..100 {
        watchers.push(running.watch(&format!("{CMS}?watch=1&resourceVersion=1"), &[]).await);
    }
    for n in 0..20 {
        running.post(CMS, &config_map(&format!("c{n:02}"), "red")).await;
    }
    for watcher in &mut watchers {
        for n in 0..20 {
            assert_eq!(watcher.next_name().await, event("ADDED", &format!("c{n:02}")));
        }
    }
}

#[tokio::test]
async fn slow_watchers_read_history_by_themselves() {
    let running = Running::start().await;
    let client = running.server.client();
    let resource = api::kind::Resource::new("", "v1", "configmaps");
    let mut watch = client.watch(&resource, "", &Default::default(), "1").await.unwrap();
    // More than the ring of shared events holds.
    for n in 0..3000 {
        client.create(&resource, "default", config_map(&format!("c{n:04}"), "red")).await.unwrap();
    }
    use futures_util::StreamExt;
    for n in 0..3000 {
        loop {
            match watch.next().await.unwrap().unwrap() {
                api::client::WatchEvent::Added(object) => {
                    assert_eq!(object.pointer("/metadata/name").unwrap(), &json!(format!("c{n:04}")));
                    break;
                }
                api::client::WatchEvent::Bookmark(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}
