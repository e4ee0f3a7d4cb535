//! The agent over the real image store and the real network, with a fake boundary above them.

use super::{Node, core};
use api::client::Client;
use network::{DnsServer, Router, RouterConfig};
use node::boundary::Boundary;
use node::{Agent, Config};
use serde_json::json;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub struct Real {
    pub node: Node,
    pub router: Arc<Router>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Real {
    /// With the image `app:1`. `None` (said aloud) where there can be no router.
    pub async fn start() -> Option<Real> {
        let node = Node::new();
        let dir = node.dir.path();
        let router = match Router::open(RouterConfig::new(dir.join("network"), dir.join("netrun"))) {
            Ok(router) => Arc::new(router),
            Err(error) => {
                println!("SKIPPED: no router namespace here: {error}");
                return None;
            }
        };
        let root = dir.join("root/etc");
        std::fs::create_dir_all(&root).unwrap();
        std::fs::write(root.join("passwd"), "web:x:101:102::/srv:/bin/sh\n").unwrap();
        let tar = dir.join("root.tar");
        let made =
            std::process::Command::new("tar").arg("-cf").arg(&tar).arg("-C").arg(dir.join("root")).arg(".").status();
        if !made.is_ok_and(|s| s.success()) {
            println!("SKIPPED: no tar here");
            return None;
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
        Some(Real { node, router, stop, task })
    }

    /// All pods have gone.
    pub async fn end(self) {
        let Real { node, router, stop, task } = self;
        node.until_true("all links are gone", || router.list().is_empty()).await;
        stop.send_replace(true);
        task.await.unwrap();
        // A blocking thread drops its share a moment after it has answered.
        node.until_true("the router is let go", || Arc::strong_count(&router) == 1).await;
        Arc::into_inner(router).unwrap().teardown().unwrap();
        // The namespaces were pinned by mounts.
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let own = node.dir.path().to_str().unwrap();
        let mut left: Vec<&str> =
            table.lines().filter_map(|l| l.split(' ').nth(4)).filter(|p| p.starts_with(own)).collect();
        left.sort();
        for point in left.into_iter().rev() {
            let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
        }
    }
}
