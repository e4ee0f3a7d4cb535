//! What reaches pods from outside: exec, logs, Services; against fakes and in virtual time.

mod common;
use api::client::Client;
use api::streams::{Exit, LogOptions, Target, Wanted};
use common::*;
use futures_util::StreamExt;
use serde_json::json;
use std::time::Duration;
use tokio::io::AsyncReadExt;

fn target(pod: &str, container: &str) -> Target {
    Target { namespace: "ns".into(), pod: pod.into(), pod_uid: String::new(), container: container.into() }
}

#[tokio::test(start_paused = true)]
async fn exec_attach_and_forward() {
    let node = Node::new();
    let running_agent = node.start();
    let streams = running_agent.agent.streams();
    node.create("p", one(&["run"])).await;
    node.until("p", "runs", running).await;
    let wanted = Wanted { stdout: true, ..Wanted::default() };
    let mut session = streams.exec(&target("p", ""), vec!["echo".into(), "hi".into()], wanted).await.unwrap();
    let mut text = String::new();
    session.stdout.take().unwrap().read_to_string(&mut text).await.unwrap();
    assert_eq!((text.as_str(), session.exit.await.unwrap()), ("echo hi", Exit::Code(0)));
    assert!(streams.attach(&target("p", "c"), wanted).await.is_ok());
    assert!(streams.port_forward(&target("p", ""), 80).await.is_ok());
    let error = |t: Target| {
        let streams = streams.clone();
        async move { streams.exec(&t, vec!["x".into()], wanted).await.err().unwrap() }
    };
    assert_eq!(error(target("no", "")).await.to_string(), "pods \"no\" not found");
    assert_eq!(error(target("p", "x")).await.to_string(), "container x is not valid for pod p");
    let mut other = target("p", "");
    other.pod_uid = "other".into();
    assert!(error(other).await.is_not_found());
    assert_eq!(streams.exec(&target("p", ""), vec![], wanted).await.err().unwrap().code(), 400);
    node.boundary.end("c", 1, Duration::from_secs(1));
    node.until("p", "restarts", |p| restarts(p, "c") == 1).await;
    node.boundary.end("c", 1, Duration::from_secs(1));
    node.until("p", "waits", |p| waiting(p, "c") == "CrashLoopBackOff").await;
    assert!(error(target("p", "")).await.to_string().contains("container not found (\"c\")"));
}

#[tokio::test(start_paused = true)]
async fn logs_of_this_run_and_the_one_before() {
    let node = Node::new();
    let running_agent = node.start();
    let streams = running_agent.agent.streams();
    node.create("p", one(&["run"])).await;
    node.until("p", "runs", running).await;
    let read = |options: LogOptions| {
        let streams = streams.clone();
        async move {
            let mut stream = streams.logs(&target("p", ""), options).await.map_err(|e| e.message)?;
            let mut out = Vec::new();
            while let Some(piece) = stream.next().await {
                out.extend(piece.unwrap());
            }
            Ok::<_, String>(String::from_utf8(out).unwrap())
        }
    };
    let previous = LogOptions { previous: true, ..LogOptions::default() };
    assert_eq!(read(LogOptions::default()).await.unwrap(), "run 0\n");
    let error = read(previous.clone()).await.unwrap_err();
    assert_eq!(error, "previous terminated container \"c\" in pod \"p\" not found");
    let following = tokio::spawn(read(LogOptions { follow: true, ..LogOptions::default() }));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!following.is_finished());
    node.boundary.end("c", 1, Duration::from_secs(1));
    node.until("p", "restarts", |p| restarts(p, "c") == 1 && running(p)).await;
    assert_eq!(following.await.unwrap().unwrap(), "run 0\n");
    assert_eq!(read(LogOptions::default()).await.unwrap(), "run 1\n");
    assert_eq!(read(previous).await.unwrap(), "run 0\n");
    let spec = json!({"containers": [{"name": "c", "image": "nowhere:1", "imagePullPolicy": "IfNotPresent"}]});
    node.create("w", spec).await;
    node.until("w", "waits", |p| waiting(p, "c") == "ImagePullBackOff").await;
    let error = streams.logs(&target("w", ""), LogOptions::default()).await.err().unwrap();
    let want = "container \"c\" in pod \"w\" is waiting to start: trying and failing to pull image";
    assert_eq!(error.to_string(), want);
}

#[tokio::test(start_paused = true)]
async fn services_reach_the_network_and_the_environment() {
    let node = Node::new();
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "ns"},
        "spec": {"clusterIP": "10.43.0.7", "ports": [{"name": "http", "port": 80}]}});
    node.client.create(&core("services"), "ns", service).await.unwrap();
    let _agent = node.start();
    node.until_true("a rule without endpoints", || node.networks.services.lock().unwrap().len() == 1).await;
    let slices = api::kind::Resource::new("discovery.k8s.io", "v1", "endpointslices");
    node.client.register(slices.clone(), api::kind::Scope::Namespaced, "EndpointSlice");
    let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "web-1", "namespace": "ns", "labels": {"kubernetes.io/service-name": "web"}},
        "ports": [{"name": "http", "port": 8080}], "endpoints": [{"addresses": ["10.42.0.1"], "conditions": {"ready": true}}]});
    node.client.create(&slices, "ns", slice).await.unwrap();
    let endpoints = || node.networks.services.lock().unwrap().first().map(|r| r.endpoints.len());
    node.until_true("an endpoint", || endpoints() == Some(1)).await;
    assert_eq!(node.networks.records.lock().unwrap().services.len(), 1);
    node.create("p", one(&["echo", "$(WEB_SERVICE_HOST)"])).await;
    node.until("p", "runs", running).await;
    assert_eq!(node.boundary.spec("c").unwrap().args, ["echo", "10.43.0.7"]);
}

/// The way from a changed EndpointSlice to the network, with one Service and with 500. Printed, not judged.
#[tokio::test]
async fn how_long_a_changed_endpoint_takes() {
    let node = Node::new();
    let slices = api::kind::Resource::new("discovery.k8s.io", "v1", "endpointslices");
    node.client.register(slices.clone(), api::kind::Scope::Namespaced, "EndpointSlice");
    let slice = |index: usize, address: &str| {
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("s{index}-1"), "namespace": "ns", "labels": {"kubernetes.io/service-name": format!("s{index}")}},
            "ports": [{"name": "http", "port": 8080}], "endpoints": [{"addresses": [address], "conditions": {"ready": true}}]})
    };
    let add = async |index: usize| {
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("s{index}"), "namespace": "ns"},
            "spec": {"clusterIP": format!("10.43.{}.{}", index / 200, index % 200 + 1), "ports": [{"name": "http", "port": 80}]}});
        node.client.create(&core("services"), "ns", service).await.unwrap();
        node.client.create(&slices, "ns", slice(index, "10.42.0.1")).await.unwrap();
    };
    add(0).await;
    let _agent = node.start();
    let first = || node.networks.services.lock().unwrap().first().and_then(|rule| rule.endpoints.first().copied());
    let mut count = 1;
    for services in [1, 500] {
        while count < services {
            add(count).await;
            count += 1;
        }
        node.until_true("all are there", || node.networks.services.lock().unwrap().len() == services).await;
        let mut times = Vec::new();
        for turn in 0..30 {
            let address = format!("10.42.1.{turn}");
            let begin = std::time::Instant::now();
            node.client.update(&slices, "ns", slice(0, &address)).await.unwrap();
            while first().is_none_or(|(now, _)| now.to_string() != address) {
                tokio::time::sleep(Duration::from_micros(100)).await;
            }
            times.push(begin.elapsed());
        }
        times.sort();
        println!("an endpoint of one of {services} Services is changed after {:?} (median)", times[times.len() / 2]);
    }
}

/// The way from a pod's creation to its process, without what the boundary itself takes. Printed, not judged.
#[tokio::test]
async fn how_long_a_start_takes() {
    let node = Node::new();
    let _agent = node.start();
    node.create("warm", json!({"containers": [{"name": "w", "image": "here:1"}]})).await;
    node.until("warm", "runs", running).await;
    let mut times = Vec::new();
    for index in 0..20 {
        let begin = std::time::Instant::now();
        node.create(&format!("p{index}"), json!({"containers": [{"name": format!("c{index}"), "image": "here:1"}]}))
            .await;
        let call = format!("start c{index} 0");
        while node.boundary.position(&call).is_none() {
            tokio::time::sleep(Duration::from_micros(100)).await;
        }
        times.push(begin.elapsed());
    }
    times.sort();
    println!("created to started: median {:?}, worst {:?}", times[times.len() / 2], times[times.len() - 1]);
}
