//! The registry of the real binary, with other people's clients.

use crate::cluster::{Cluster, Said};
use crate::engines::docker_beside;
use crate::{Outcome, Test};
use std::fs;
use std::process::Stdio;

pub const TESTS: &[Test] = &[
    ("registry_round_trips_keep_digests", round_trips),
    ("registry_docker_client", docker),
    ("registry_upload_outlives_a_kill", killed),
];

const REGISTRY: &str = "http://127.0.0.1:5000";

fn has(c: &Cluster, program: &str) -> bool {
    c.inside(program).arg("--version").output().is_ok_and(|o| o.status.success())
}

fn curl(c: &Cluster, arguments: &[&str]) -> Said {
    Said::of(c.inside("curl").args(["-sS", "--max-time", "60"]).args(arguments).output().expect("curl runs"))
}

/// The digest that the registry says a name has.
fn digest(c: &Cluster, name: &str) -> String {
    let head = curl(c, &["-I", &format!("{REGISTRY}/v2/{}", name.replacen(':', "/manifests/", 1))]).good();
    let line = head.lines().find_map(|l| l.strip_prefix("docker-content-digest: "));
    line.unwrap_or_else(|| panic!("{name}: {head}")).trim().to_owned()
}

fn round_trips(c: &Cluster) -> Outcome {
    for tool in ["skopeo", "podman"] {
        if !has(c, tool) {
            return Outcome::Skipped(format!("{tool} is not installed"));
        }
    }
    let insecure = ["--src-tls-verify=false", "--dest-tls-verify=false", "--preserve-digests", "--all"];
    let skopeo = |from: &str, to: &str| {
        let arguments = ["--insecure-policy", "copy"];
        Said::of(c.inside("skopeo").args(arguments).args(insecure).args([from, to]).output().unwrap()).good()
    };
    let at = |name: &str| format!("docker://127.0.0.1:5000/{name}");
    let first = digest(c, "test/busybox:1");
    let layout = format!("oci:{}:t", c.scratch("round").display());
    skopeo(&at("test/busybox:1"), &layout);
    skopeo(&layout, &at("round/skopeo:1"));
    assert_eq!(digest(c, "round/skopeo:1"), first);
    skopeo(&at("round/skopeo:1"), &at("round/copied:1"));
    assert_eq!(digest(c, "round/copied:1"), first);

    let podman = |arguments: &[&str]| {
        let mut command = c.inside("podman");
        command.arg("--root").arg(c.scratch("podman/root")).arg("--runroot").arg(c.scratch("podman/run"));
        Said::of(command.args(["--storage-driver", "vfs"]).args(arguments).output().unwrap()).good()
    };
    let name = "127.0.0.1:5000/round/skopeo:1";
    podman(&["pull", "--tls-verify=false", name]);
    podman(&["push", "--tls-verify=false", name, "docker://127.0.0.1:5000/round/podman:1"]);
    let pushed = digest(c, "round/podman:1");
    podman(&["rmi", "-af"]);
    podman(&["pull", "--tls-verify=false", "127.0.0.1:5000/round/podman:1"]);
    let seen = podman(&["inspect", "--format", "{{.Digest}}", "127.0.0.1:5000/round/podman:1"]);
    assert_eq!(seen.trim(), pushed, "what podman pushed and pulled");
    podman(&["push", "--tls-verify=false", "127.0.0.1:5000/round/podman:1", "docker://127.0.0.1:5000/round/again:1"]);
    assert_eq!(digest(c, "round/again:1"), pushed, "what was pulled and pushed again");
    podman(&["rmi", "-af"]);
    Outcome::Passed
}

/// Docker's client pushes and pulls through its engine; its manifest commands speak to registries themselves.
fn docker(c: &Cluster) -> Outcome {
    let engine = match docker_beside(c) {
        Ok(engine) => engine,
        Err(reason) => return Outcome::Skipped(reason),
    };
    let at = |name: &str| format!("127.0.0.1:5000/{name}");
    let (first, pushed, again) = (at("test/busybox:1"), at("round/docker:1"), at("round/docker-again:1"));
    let seen = |name: &str| engine.good(&["inspect", "--format", "{{join .RepoDigests \" \"}}", name]);
    engine.good(&["pull", &first]);
    assert_eq!(seen(&first), format!("{}@{}", at("test/busybox"), digest(c, "test/busybox:1")));
    engine.good(&["tag", &first, &pushed]);
    let said = engine.good(&["push", &pushed]);
    let of_docker = digest(c, "round/docker:1");
    assert!(said.contains(&of_docker), "{said}");
    engine.good(&["rmi", &first, &pushed]);
    engine.good(&["pull", &pushed]);
    assert_eq!(seen(&pushed), format!("{}@{of_docker}", at("round/docker")));
    assert_eq!(engine.good(&["run", "--rm", "--network=none", &pushed, "echo", "hello"]), "hello");
    engine.good(&["tag", &pushed, &again]);
    engine.good(&["push", &again]);
    assert_eq!(digest(c, "round/docker-again:1"), of_docker, "what was pulled and pushed again");
    // Layers of docker's own making: compressed by it, mounted from nowhere.
    let made = at("round/docker-made:1");
    let (tar, file) = (c.scratch("made.tar"), c.scratch("made"));
    fs::write(&file, "made here").unwrap();
    let (directory, name) = (file.parent().unwrap(), file.file_name().unwrap());
    let packed = std::process::Command::new("tar").arg("-C").arg(directory).arg("-cf").arg(&tar).arg(name).status();
    assert!(packed.unwrap().success());
    engine.good(&["import", &tar.to_string_lossy(), &made]);
    let said = engine.good(&["push", &made]);
    assert!(said.contains(&digest(c, "round/docker-made:1")), "{said}");
    engine.good(&["rmi", &made]);
    engine.good(&["pull", &format!("{}@{}", at("round/docker-made"), digest(c, "round/docker-made:1"))]);
    assert!(engine.good(&["manifest", "inspect", "--insecure", &pushed]).contains("sha256:"));
    Outcome::Passed
}

fn killed(c: &Cluster) -> Outcome {
    let content: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let (first, second) = (c.scratch("chunk.1"), c.scratch("chunk.2"));
    fs::write(&first, &content[..2_000_000]).unwrap();
    let begun = curl(c, &["-i", "-X", "POST", &format!("{REGISTRY}/v2/killed/app/blobs/uploads/")]).good();
    let location = begun.lines().find_map(|l| l.strip_prefix("location: ")).expect("a location").trim();
    let url = format!("{REGISTRY}{location}");
    let data = format!("@{}", first.display());
    let sent = curl(c, &["-i", "-X", "PATCH", "-H", "Content-Range: 0-1999999", "--data-binary", &data, &url]).good();
    assert!(sent.contains(" 202 ") && sent.contains("range: 0-1999999"), "{sent}");

    // The next chunk is on its way, as slowly as it takes, when the program is killed.
    fs::write(&second, &content[2_000_000..]).unwrap();
    let data = format!("@{}", second.display());
    let mut slow = c.inside("curl");
    slow.args(["-sS", "--limit-rate", "50k", "-X", "PATCH", "--data-binary", &data, &url]).stderr(Stdio::null());
    let mut slow = slow.spawn().expect("curl runs");
    let stands = || {
        let status = curl(c, &["-i", &url]).good();
        let range = status.lines().find_map(|l| l.strip_prefix("range: 0-")).expect("a range");
        range.trim().parse::<usize>().expect("a number") + 1
    };
    c.until("some of the second chunk arrives", || stands() > 2_000_000);
    c.stop(rustix::process::Signal::KILL);
    let _ = slow.wait();
    c.up();

    let at = stands();
    assert!((2_000_000..3_000_000).contains(&at), "{at}");
    fs::write(&second, &content[at..]).unwrap();
    let whole = c.scratch("whole");
    fs::write(&whole, &content).unwrap();
    let hash = Said::of(c.inside("sha256sum").arg(&whole).output().unwrap()).good();
    let digest = format!("sha256:{}", hash.split(' ').next().unwrap());
    let range = format!("Content-Range: {at}-2999999");
    let put = format!("{url}?digest={digest}");
    let sent = curl(c, &["-i", "-X", "PUT", "-H", &range, "--data-binary", &data, &put]).good();
    assert!(sent.contains(" 201 "), "{sent}");
    let back = c.scratch("back");
    let blob = format!("{REGISTRY}/v2/killed/app/blobs/{digest}");
    curl(c, &["-f", "-o", &back.to_string_lossy(), &blob]).good();
    assert!(fs::read(&back).unwrap() == content, "what came back differs");
    // In parts, as a broken download goes on.
    let part = Said::of(c.inside("curl").args(["-sS", "-r", "2999990-", &blob]).output().unwrap()).good();
    assert_eq!(part.chars().count(), String::from_utf8_lossy(&content[2_999_990..]).chars().count());
    Outcome::Passed
}
