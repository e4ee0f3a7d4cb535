//! The agent over the real image store and the real network, with a fake boundary above them.

mod common;
use api::client::Client;
use api::object::Meta;
use common::*;
use network::{DnsServer, Router, RouterConfig};
use node::boundary::{Boundary, Rootfs};
use node::{Agent, Config};
use serde_json::json;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::sync::watch;

#[tokio::test(flavor = "multi_thread")]
async fn images_and_network_for_real() {
    let node = Node::new();
    let dir = node.dir.path();
    let router = match Router::open(RouterConfig::new(dir.join("network"), dir.join("netrun"))) {
        Ok(router) => Arc::new(router),
        Err(error) => {
            println!("SKIPPED: no router namespace here: {error}");
            return;
        }
    };
    let root = dir.join("root/etc");
    std::fs::create_dir_all(&root).unwrap();
    std::fs::write(root.join("passwd"), "web:x:101:102::/srv:/bin/sh\n").unwrap();
    let tar = dir.join("root.tar");
    let made = std::process::Command::new("tar").arg("-cf").arg(&tar).arg("-C").arg(dir.join("root")).arg(".").status();
    if !made.is_ok_and(|s| s.success()) {
        println!("SKIPPED: no tar here");
        return;
    }
    let images = Arc::new(image::Store::open(dir.join("images")).unwrap());
    let options = image::ImportOptions {
        tag: Some("app:1".into()),
        cmd: vec!["/bin/app".into()],
        user: Some("web".into()),
        ..image::ImportOptions::default()
    };
    images.import(&tar, &options, &image::silent).unwrap();

    let config = Config::new("n1", dir.join("data"), dir.join("run/abcd"));
    std::fs::create_dir_all(&config.data_dir).unwrap();
    let dns_at: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let dns = router.run(|| DnsServer::start(&router, dns_at, Vec::new())).unwrap().unwrap();
    let boundaries: Vec<Arc<dyn Boundary>> = vec![node.boundary.clone()];
    let agent = Agent::new(config, node.client.clone(), images, router.clone(), boundaries).with_dns(Arc::new(dns));
    let (stop, shutdown) = watch::channel(false);
    let task = tokio::spawn(async move { agent.run(shutdown).await });

    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "ns"},
        "spec": {"clusterIP": "10.43.0.7", "ports": [{"port": 80}]}});
    node.client.create(&core("services"), "ns", service).await.unwrap();
    for (index, policy) in ["IfNotPresent", "Always", "Never"].iter().enumerate() {
        for image in ["app:1", "127.0.0.1:5000/app:1"] {
            let name = format!("p{index}-{}", image.len());
            let spec = json!({"containers": [{"name": name, "image": image, "imagePullPolicy": policy}]});
            node.create(&name, spec).await;
            let pod = node.until(&name, "runs", running).await;
            let made = node.boundary.spec(&name).unwrap();
            assert_eq!((made.args.join(" ").as_str(), made.security.uid, made.security.gid), ("/bin/app", 101, 102));
            assert!(made.env.iter().any(|(n, v)| n == "HOME" && v == "/srv"));
            let Rootfs::Layers { layers, .. } = &made.rootfs else { panic!("{:?}", made.rootfs) };
            assert!(layers[0].join("etc/passwd").exists());
            assert!(container(&pod, &name).str_at("/imageID").starts_with("sha256:"));
            assert!(pod.str_at("/status/podIP").starts_with("10.42."), "{pod}");
            assert_eq!(pod.str_at("/status/hostIP"), "10.42.0.1");
            assert!(router.list().iter().any(|uid| uid == pod.uid()));
        }
    }
    let spec = json!({"containers": [{"name": "c", "image": "nothing:1", "imagePullPolicy": "Never"}]});
    node.create("never", spec).await;
    node.until("never", "is not there", |p| waiting(p, "c") == "ErrImageNeverPull").await;
    let spec = json!({"containers": [{"name": "c", "image": "Not A Name", "imagePullPolicy": "IfNotPresent"}]});
    node.create("bad", spec).await;
    node.until("bad", "is no name", |p| waiting(p, "c") == "InvalidImageName").await;
    for name in ["p0-5", "p0-20", "p1-5", "p1-20", "p2-5", "p2-20", "never", "bad"] {
        node.delete(name, Some(0)).await;
    }
    node.until_true("all links are gone", || router.list().is_empty()).await;
    stop.send_replace(true);
    task.await.unwrap();
    // A blocking thread drops its share a moment after it has answered.
    node.until_true("the router is let go", || Arc::strong_count(&router) == 1).await;
    Arc::into_inner(router).unwrap().teardown().unwrap();
    // The namespaces were pinned by mounts.
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut left: Vec<&str> =
        table.lines().filter_map(|l| l.split(' ').nth(4)).filter(|p| p.starts_with(dir.to_str().unwrap())).collect();
    left.sort();
    for point in left.into_iter().rev() {
        let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
    }
}
