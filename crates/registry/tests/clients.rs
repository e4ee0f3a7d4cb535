//! Clients that no one here wrote: skopeo and podman; and our own pull.

mod common;

use common::{Registry, small_image};
use image::{ImportOptions, Kind, PullOptions, Store, silent};
use std::fs;
use std::path::Path;
use std::process::Command;

fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok_and(|o| o.status.success());
    if !found {
        println!("SKIPPED: {program} is not on this machine");
    }
    found
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {text}");
    text
}

fn skopeo(arguments: &[&str]) -> String {
    run(Command::new("skopeo")
        .args(["--insecure-policy", "copy", "--src-tls-verify=false", "--dest-tls-verify=false"])
        .args(arguments))
}

/// An image with a real layer, exported as a layout.
fn sample(dir: &Path) -> String {
    let root = dir.join("root");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::write(root.join("bin/hello"), "#!/bin/sh\necho hello\n").unwrap();
    let tar = dir.join("root.tar");
    run(Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&tar).arg("."));
    let store = Store::open(dir.join("source")).unwrap();
    let options = ImportOptions { tag: Some("hello:1".into()), cmd: vec!["/bin/hello".into()], ..Default::default() };
    store.import(&tar, &options, &silent).unwrap();
    let layout = dir.join("hello.oci.tar");
    store.export("hello:1", &layout, &silent).unwrap();
    layout.to_str().unwrap().to_owned()
}

fn check(store: &Store, name: &str) {
    let Kind::Container { layers, config } = store.resolve(name).unwrap().kind else { panic!("{name}") };
    assert_eq!(config.config.cmd, ["/bin/hello"]);
    assert!(fs::read_to_string(layers[0].join("bin/hello")).unwrap().contains("echo hello"));
}

#[test]
fn skopeo_pushes_and_fetches_every_form() {
    if !has("skopeo") {
        return;
    }
    let registry = Registry::start();
    let layout = sample(registry.dir.path());
    let at = |name: &str| format!("docker://{}/{name}", registry.address);
    let path = |name: &str| registry.dir.path().join(name).to_str().unwrap().to_owned();
    skopeo(&[&format!("oci-archive:{layout}"), &at("shop/hello:1")]);
    check(&registry.store, "shop/hello:1");
    check(&registry.store, &format!("{}/shop/hello:1", registry.address));

    skopeo(&[&at("shop/hello:1"), &format!("oci:{}:hello", path("oci"))]);
    skopeo(&[&at("shop/hello:1"), &format!("dir:{}", path("dir"))]);
    skopeo(&[&at("shop/hello:1"), &format!("docker-archive:{}:hello:fromdocker", path("docker.tar"))]);
    skopeo(&[&format!("dir:{}", path("dir")), &at("shop/dir:1")]);
    skopeo(&[&format!("docker-archive:{}", path("docker.tar")), &at("shop/docker:1")]);
    skopeo(&["--format", "v2s2", &format!("oci:{}:hello", path("oci")), &at("shop/v2s2:1")]);
    for name in ["shop/dir:1", "shop/docker:1", "shop/v2s2:1"] {
        check(&registry.store, name);
    }
    // What skopeo wrote can be imported too.
    let imported = registry.store.import(Path::new(&path("docker.tar")), &ImportOptions::default(), &silent).unwrap();
    assert_eq!(imported.names, ["docker.io/library/hello:fromdocker"]);
    check(&registry.store, "docker.io/library/hello:fromdocker");
    check(&registry.store, "hello:fromdocker");
    let options = ImportOptions { tag: Some("fromoci".into()), ..Default::default() };
    registry.store.import(Path::new(&path("oci")), &options, &silent).unwrap();
    check(&registry.store, "fromoci");

    let listed = run(Command::new("skopeo").args(["list-tags", "--tls-verify=false", &at("shop/hello")]));
    assert!(listed.contains("\"1\""), "{listed}");
    run(Command::new("skopeo").args(["--insecure-policy", "delete", "--tls-verify=false", &at("shop/dir:1")]));
}

#[test]
fn podman_pushes_and_pulls() {
    if !has("podman") {
        return;
    }
    let registry = Registry::start();
    let layout = sample(registry.dir.path());
    let root = registry.dir.path().join("podman");
    let podman = |arguments: &[&str]| {
        let mut command = Command::new("podman");
        command.arg("--root").arg(root.join("root")).arg("--runroot").arg(root.join("run"));
        command.args(["--storage-driver", "vfs"]).args(arguments);
        run(&mut command)
    };
    let name = format!("{}/shop/podman:1", registry.address);
    let id = podman(&["load", "-q", "-i", &layout]);
    let id = id.split(": ").nth(1).unwrap().trim().to_owned();
    podman(&["push", "--tls-verify=false", &id, &name]);
    check(&registry.store, &name);
    podman(&["rmi", "-af"]);
    podman(&["pull", "--tls-verify=false", &name]);
    let config = podman(&["inspect", "--format", "{{.Config.Cmd}}", &name]);
    assert!(config.contains("/bin/hello"), "{config}");
}

#[test]
fn our_own_pull() {
    let registry = Registry::start();
    let (layer, config) = small_image("1");
    registry.push_image("shop/app", "1", &config, &layer);
    let store = Store::open(registry.dir.path().join("client")).unwrap();
    let name = format!("{}/shop/app:1", registry.address);
    let digest = store.pull(&name, &PullOptions::default(), &silent).unwrap();
    assert_eq!(store.resolve(&name).unwrap().digest, digest);
    assert_eq!(store.list().unwrap()[0].name, name);

    let missing = store.pull(&format!("{}/shop/app:2", registry.address), &PullOptions::default(), &silent);
    assert!(missing.unwrap_err().to_string().contains("404"), "a tag that is not there");

    // A multi-platform image: ours is chosen; without ours, what there is is said.
    let arch = image::Platform::host().architecture;
    let child = image::Digest::of(&registry.get("/v2/shop/app/manifests/1").body);
    let size = registry.get("/v2/shop/app/manifests/1").body.len();
    for (tag, arch) in [("multi", arch.as_str()), ("alien", "s390x")] {
        let index = serde_json::json!({"schemaVersion": 2, "mediaType": image::media::OCI_INDEX, "manifests": [
            {"mediaType": image::media::OCI_MANIFEST, "digest": child, "size": size, "platform": {"os": "linux", "architecture": arch}},
        ]});
        let headers = [("content-type", image::media::OCI_INDEX)];
        let path = format!("/v2/shop/app/manifests/{tag}");
        assert_eq!(registry.call("PUT", &path, &headers, index.to_string().as_bytes()).status, 201);
    }
    let pull =
        |tag: &str| store.pull(&format!("{}/shop/app:{tag}", registry.address), &PullOptions::default(), &silent);
    pull("multi").unwrap();
    let error = pull("alien").unwrap_err().to_string();
    assert!(error.contains("it is there for linux/s390x"), "{error}");
}
