//! Images in and out with other people's tools.

use crate::cluster::Cluster;
use crate::{Outcome, Test};

pub const TESTS: &[Test] = &[
    ("image_push_pull_with_skopeo", skopeo),
    ("image_commands", commands),
    ("image_push_and_prune", push),
    ("image_mirrors_serve_pods", mirrors),
];

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

/// To the built-in registry over HTTP, and back into a store that has nothing.
fn push(c: &Cluster) -> Outcome {
    let data = c.data().to_string_lossy().into_owned();
    let image = |args: &[&str]| c.atoll(&[&["image", args[0], "--data-dir", &data], &args[1..]].concat());
    let digest = |text: &str| text.split_once("(sha256:").map(|(_, d)| d.trim_end().trim_end_matches(')').to_owned());
    let pushed = image(&["push", "127.0.0.1:5000/test/busybox:1", "127.0.0.1:5000/test/copy:1"]).good();
    let again = image(&["push", "127.0.0.1:5000/test/busybox:1", "127.0.0.1:5000/test/copy:1"]);
    assert!(again.err.contains("is there already"), "{}", again.err);
    let other = c.scratch("elsewhere");
    let other = other.to_string_lossy();
    // The loopback address by another name: the store's own registry would need no pull.
    let pulled = c.atoll(&[
        "image",
        "pull",
        "--data-dir",
        &other,
        "127.0.0.2:5000/test/copy:1",
        "--mirror",
        "127.0.0.2:5000=127.0.0.1:5000",
    ]);
    assert_eq!(digest(&pushed), digest(&pulled.good()));
    assert!(digest(&pushed).is_some());
    let told = image(&["push", "127.0.0.1:5000/test/busybox:1", "test/copy:1"]).bad();
    assert!(told.contains("names no registry"), "{told}");
    let prune = |args: &[&str]| c.atoll(&[&["image", "prune", "--data-dir", &other], args].concat());
    assert!(prune(&[]).good().contains("0 images"));
    assert!(prune(&["--image-size", "0", "--grace", "0s"]).good().contains("1 images"));
    assert!(!c.atoll(&["image", "ls", "--data-dir", &other]).good().contains("test/copy"));
    assert!(prune(&["--image-age", "soon"]).bad().contains("--image-age \"soon\""));
    Outcome::Passed
}

/// The registry itself is not to be reached, the first mirror says nothing, the second is nobody, the third has it.
fn mirrors(c: &Cluster) -> Outcome {
    let stall = "import socket, time\ns = socket.socket()\ns.bind((\"127.0.0.1\", 5999))\ns.listen()\nprint(\"up\", flush=True)\n\
                 held = []\nwhile True: held.append(s.accept())\n";
    let mut stalling =
        c.inside("python3").args(["-c", stall]).stdout(std::process::Stdio::piped()).spawn().expect("python3 runs");
    let mut up = [0u8; 2];
    std::io::Read::read_exact(stalling.stdout.as_mut().unwrap(), &mut up).unwrap();
    c.stop(rustix::process::Signal::TERM);
    let mirrors =
        ["127.0.0.1:5999", "127.0.0.1:5998/none", "127.0.0.1:5000/test"].map(|m| format!("images.invalid={m}"));
    let args: Vec<&str> = mirrors.iter().flat_map(|m| ["--pull-mirror", m]).collect();
    c.up_with(&args, &[]);
    let ns = c.namespace("t-mirrors");
    c.apply(&crate::cluster::sleeper("p", &ns).replace("127.0.0.1:5000/test/busybox:1", "images.invalid/busybox:1"));
    c.wait_ready(&ns, "pod/p");
    let image = c.kubectl(&["get", "-n", &ns, "pod/p", "-o", "jsonpath={.status.containerStatuses[0].image}"]).good();
    stalling.kill().unwrap();
    stalling.wait().unwrap();
    c.kubectl(&["delete", "-n", &ns, "pod/p", "--now"]).good();
    c.stop(rustix::process::Signal::TERM);
    c.up();
    assert_eq!(image, "images.invalid/busybox:1");
    let data = c.scratch("nothing");
    let wrong = c.atoll(&["up", "--data-dir", &data.to_string_lossy(), "--pull-mirror", "here"]).bad();
    assert!(wrong.contains("--pull-mirror \"here\""), "{wrong}");
    Outcome::Passed
}
