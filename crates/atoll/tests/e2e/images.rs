//! Images in and out with other people's tools.

use crate::cluster::Cluster;
use crate::{Outcome, Test};

pub const TESTS: &[Test] = &[("image_push_pull_with_skopeo", skopeo), ("image_commands", commands)];

fn skopeo(c: &Cluster) -> Outcome {
    if c.inside("skopeo").arg("--version").output().is_err() {
        return Outcome::Skipped("skopeo is not installed".into());
    }
    let copy = |from: &str, to: &str| {
        let args = ["--insecure-policy", "copy", "--src-tls-verify=false", "--dest-tls-verify=false", from, to];
        let output = c.inside("skopeo").args(args).output().unwrap();
        assert!(output.status.success(), "{from} -> {to}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let dir = format!("oci:{}:t", c.scratch("oci").display());
    copy("docker://127.0.0.1:5000/test/busybox:1", &dir);
    copy(&dir, "docker://127.0.0.1:5000/test/pushed:2");
    let ns = c.namespace("t-pushed");
    let pod = crate::cluster::sleeper("p", &ns).replace("test/busybox:1", "test/pushed:2");
    c.apply(&pod);
    c.wait_ready(&ns, "pod/p");
    Outcome::Passed
}

fn commands(c: &Cluster) -> Outcome {
    let data = c.data().to_string_lossy().into_owned();
    let image = |args: &[&str]| c.atoll(&[&["image", args[0], "--data-dir", &data], &args[1..]].concat());
    assert!(image(&["ls"]).good().contains("test/busybox:1"));
    assert!(image(&["inspect", "127.0.0.1:5000/test/busybox:1"]).good().contains("sha256:"));
    let tar = c.scratch("exported.tar");
    image(&["export", "127.0.0.1:5000/test/busybox:1", &tar.to_string_lossy()]).good();
    image(&["import", &tar.to_string_lossy(), "--tag", "test/again:1"]).good();
    image(&["rm", "test/again:1"]).good();
    assert!(!image(&["ls"]).good().contains("test/again"));
    assert!(image(&["rm", "test/again:1"]).bad().contains("test/again:1"));
    Outcome::Passed
}
