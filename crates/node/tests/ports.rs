//! The agent over the real image store and the real network, with a fake boundary above them.

mod common;
use api::object::Meta;
use common::real::Real;
use common::*;
use node::boundary::Rootfs;
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn images_and_network_for_real() {
    let Some(real) = Real::start().await else { return };
    let (node, router) = (&real.node, &real.router);
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
    real.end().await;
}
