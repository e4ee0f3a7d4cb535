//! Networks (`atoll.dev`) and the pods that name them, with the real network.

mod common;
use api::client::{Client, DeleteOptions, Patch};
use api::kind::Resource;
use api::object::{Meta, SharedObject};
use common::real::Real;
use common::*;
use serde_json::{Value, json};
use std::time::Duration;

fn networks() -> Resource {
    Resource::new("atoll.dev", "v1alpha1", "networks")
}

impl Real {
    async fn network(&self, name: &str, cidr: &str) {
        let object = json!({"apiVersion": "atoll.dev/v1alpha1", "kind": "Network",
            "metadata": {"name": name, "namespace": "ns"}, "spec": {"cidr": cidr}});
        self.node.client.create(&networks(), "ns", object).await.unwrap();
    }

    async fn delete_network(&self, name: &str) {
        self.node.client.delete(&networks(), "ns", name, &DeleteOptions::default()).await.unwrap();
    }

    /// Waits for the reason that a Network's condition gives.
    async fn says(&self, name: &str, reason: &str) -> SharedObject {
        let begun = std::time::Instant::now();
        loop {
            let object = self.node.client.get(&networks(), "ns", name).await.unwrap();
            if object.str_at("/status/conditions/0/reason") == reason {
                return object;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "{name} is not {reason}: {object:#}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn pod(&self, name: &str, annotations: Value) {
        let spec = json!({"nodeName": "n1", "terminationGracePeriodSeconds": 0, "containers": [{"name": name, "image": "app:1"}]});
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "spec": spec, "status": {"phase": "Pending"},
            "metadata": {"name": name, "namespace": "ns", "annotations": annotations}});
        self.node.client.create(&pods(), "ns", pod).await.unwrap();
    }

    async fn address(&self, name: &str) -> String {
        self.node.until(name, "runs", running).await.str_at("/status/podIP").to_owned()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_have_addresses_of_the_network_they_name() {
    let Some(real) = Real::start().await else { return };
    let at = |name: &str| json!({"atoll.dev/network": name});
    for (name, cidr) in
        [("edge", "10.44.1.0/28"), ("wide", "10.44.0.0/20"), ("pods", "10.42.1.0/24"), ("far", "192.0.2.0/24")]
    {
        real.network(name, cidr).await;
        let reason = match name {
            "edge" => "Ready",
            "far" => "Invalid",
            _ => "Overlaps",
        };
        real.says(name, reason).await;
    }
    let wide = real.says("wide", "Overlaps").await;
    assert_eq!(wide.str_at("/status/conditions/0/message"), "overlaps Network ns/edge, 10.44.1.0/28");
    assert!(wide.pointer("/status/used").is_none(), "{wide:#}");

    real.pod("a", at("edge")).await;
    assert_eq!(real.address("a").await, "10.44.1.2");
    // What is not there, or cannot be, says so; then it comes.
    real.pod("b", at("later")).await;
    real.node.until("b", "waits for its network", |pod| waiting(pod, "b") == "NetworkNotReady").await;
    real.node.until_event("there is no Network ns/later").await;
    real.pod("c", at("wide")).await;
    real.node.until_event("Network ns/wide is not ready: overlaps Network ns/edge, 10.44.1.0/28").await;
    real.network("later", "10.44.2.0/24").await;
    assert_eq!(real.address("b").await, "10.44.2.2");
    real.node.delete("c", Some(0)).await;

    // The namespace's default is for pods that do not say.
    let namespace =
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ns", "annotations": at("edge")}});
    real.node.client.create(&core("namespaces"), "", namespace).await.unwrap();
    // The agent hears of it a moment later.
    for n in 0.. {
        let name = format!("d{n}");
        real.pod(&name, json!({})).await;
        let address = real.address(&name).await;
        real.node.delete(&name, Some(0)).await;
        if address.starts_with("10.44.1.") {
            break;
        }
        assert!(n < 100, "{address}");
    }
    real.pod("e", at("")).await;
    assert!(real.address("e").await.starts_with("10.42."));

    for name in ["a", "b", "e"] {
        real.node.delete(name, Some(0)).await;
    }
    real.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_in_use_stays_until_nobody_uses_it() {
    let Some(real) = Real::start().await else { return };
    let at = |name: &str| json!({"atoll.dev/network": name});
    real.network("edge", "10.44.1.0/28").await;
    for n in 0..13 {
        real.pod(&format!("p{n}"), at("edge")).await;
        real.address(&format!("p{n}")).await;
    }
    let full = real.says("edge", "Exhausted").await;
    assert_eq!((&full["status"]["used"], &full["status"]["free"]), (&json!(13), &json!(0)));
    real.pod("more", at("edge")).await;
    real.node.until("more", "says why", |pod| waiting(pod, "more") == "NetworkExhausted").await;
    real.node.until_event("no free address in Network ns/edge, 10.44.1.0/28: 13 are in use").await;
    // Nothing else stops, and what is given back is used.
    real.pod("other", json!({})).await;
    real.address("other").await;
    real.node.delete("p0", Some(0)).await;
    assert_eq!(real.address("more").await, "10.44.1.2");
    for n in 1..13 {
        real.node.delete(&format!("p{n}"), Some(0)).await;
    }
    real.says("edge", "Ready").await;

    real.delete_network("edge").await;
    let going = real.says("edge", "Terminating").await;
    assert!(going.str_at("/status/conditions/0/message").contains("pod ns/more"), "{going:#}");
    real.pod("late", at("edge")).await;
    real.node.until_event("Network ns/edge is being deleted").await;
    real.node.delete("late", Some(0)).await;
    // Somebody who takes the finalizer away frees nobody's address.
    let gone = json!({"metadata": {"finalizers": null}});
    real.node.client.patch(&networks(), "ns", "edge", "", Patch::Merge(gone)).await.unwrap();
    real.network("edge", "10.44.9.0/28").await;
    let other = real.says("edge", "Overlaps").await;
    let why = "an earlier Network of this name still has addresses in use";
    assert_eq!(other.str_at("/status/conditions/0/message"), why);
    real.node.delete("more", Some(0)).await;
    real.says("edge", "Ready").await;
    real.delete_network("edge").await;
    real.node.delete("other", Some(0)).await;
    let begun = std::time::Instant::now();
    while real.node.client.get(&networks(), "ns", "edge").await.is_ok() {
        assert!(begun.elapsed() < Duration::from_secs(30), "the Network stays");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(real.router.subnets().is_empty());
    real.end().await;
}
