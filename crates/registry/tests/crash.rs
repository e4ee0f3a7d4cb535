//! A registry that is killed (SIGKILL) while clients push to it, again and again, at moments of chance. Whatever a client
//! was told is done is there after the next start, uploads go on where they stand, and in the end collection leaves
//! nothing but what tags reach. This executable is the registry, too, when it is told so.

mod common;

use common::{Client, small_image};
use image::{Digest, GcOptions, Store};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

const ROLE: &str = "ATOLL_TEST_REGISTRY_DIR";
const KILLS: u64 = 40;

fn main() {
    if let Ok(dir) = std::env::var(ROLE) {
        return serve(&dir);
    }
    if std::env::args().any(|a| a == "--list") {
        return println!("killed_while_clients_push: test");
    }
    let filters: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    if filters.is_empty() || filters.iter().any(|f| "killed_while_clients_push".contains(f.as_str())) {
        killed_while_clients_push();
        println!("test killed_while_clients_push ... ok");
    }
}

/// The registry's role: says its address, serves until it is killed.
fn serve(dir: &str) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    println!("{}", listener.local_addr().unwrap());
    let store = Arc::new(Store::open(dir).unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(registry::serve(registry::Config::new(listener, store), std::future::pending())).unwrap();
}

struct Server {
    child: Child,
    client: Client,
}

impl Server {
    fn start(dir: &Path) -> Server {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let mut child = command.env(ROLE, dir).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address: SocketAddr = line.trim().parse().unwrap();
        Server { child, client: Client { address } }
    }
}

impl Drop for Server {
    /// SIGKILL.
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// What clients were told is done.
#[derive(Default)]
struct Told {
    blobs: Vec<Digest>,
    manifests: Vec<Digest>,
    tags: HashMap<String, Digest>,
    /// Where an upload is, the blob it is of, and how far it was said to be.
    uploads: Vec<(String, Vec<u8>, usize)>,
}

fn killed_while_clients_push() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("images");
    let mut random = fastrand(7);
    let mut told = Told::default();
    for round in 0..KILLS {
        let server = Server::start(&store);
        check(&server.client, &told);
        resume(&server.client, &mut told);
        // In the middle of some request, at any point of it.
        let (requests, after) = (random() % 24, Duration::from_micros(random() % 12_000));
        let (began, begun) = std::sync::mpsc::channel();
        let pid = rustix::process::Pid::from_child(&server.child);
        let killer = std::thread::spawn(move || {
            (0..requests).for_each(|_| begun.recv().unwrap());
            // The moment is the point of the test, not a wait for something.
            std::thread::sleep(after);
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        });
        let mut number = 0;
        while push(&server.client, round * 1000 + number, &mut told, &began).is_some() {
            number += 1;
        }
        killer.join().unwrap();
    }
    assert!(told.blobs.len() > 20 && told.tags.len() > 10, "too little was pushed: {} blobs", told.blobs.len());
    let server = Server::start(&store);
    check(&server.client, &told);
    resume(&server.client, &mut told);
    drop(server);
    collected(&store);
    println!("{} blobs, {} manifests, {} kills", told.blobs.len(), told.manifests.len(), KILLS);
}

/// Pushes an image, one blob in one piece, one in chunks. `None` when the registry is gone.
fn push(client: &Client, number: u64, told: &mut Told, began: &Sender<()>) -> Option<()> {
    let call = |method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]| {
        let _ = began.send(());
        client.try_call(method, path, headers, body)
    };
    let (layer, config) = small_image(&number.to_string());
    let config_digest = Digest::of(config.as_bytes());
    let reply = call("POST", &format!("/v2/a/blobs/uploads/?digest={config_digest}"), &[], config.as_bytes())?;
    assert_eq!(reply.status, 201, "{reply:?}");
    told.blobs.push(config_digest);

    let blob: Vec<u8> =
        layer.iter().enumerate().map(|(n, _)| (n as u64 ^ number) as u8).cycle().take(200_000).collect();
    let begun = call("POST", "/v2/a/blobs/uploads/", &[], b"")?;
    let location = begun.header("location").to_owned();
    let upload = told.uploads.len();
    told.uploads.push((location.clone(), blob.clone(), 0));
    for chunk in 0..4usize {
        let part = blob.get(chunk * 50_000..(chunk + 1) * 50_000)?;
        let range = format!("{}-{}", chunk * 50_000, chunk * 50_000 + 49_999);
        let reply = call("PATCH", &location, &[("content-range", &range)], part)?;
        assert_eq!(reply.status, 202, "{reply:?}");
        told.uploads[upload].2 = (chunk + 1) * 50_000;
    }
    let digest = Digest::of(&blob);
    let reply = call("PUT", &format!("{location}?digest={digest}"), &[], b"")?;
    assert_eq!(reply.status, 201, "{reply:?}");
    told.uploads.pop();
    told.blobs.push(digest);

    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": image::media::OCI_MANIFEST,
        "config": {"mediaType": image::media::OCI_CONFIG, "digest": config_digest, "size": config.len()},
        "layers": [{"mediaType": "application/octet-stream", "digest": digest, "size": blob.len()}],
    })
    .to_string();
    let tag = format!("t{}", (number / 1000 + number) % 16);
    told.tags.remove(&tag);
    let headers = [("content-type", image::media::OCI_MANIFEST)];
    let reply = call("PUT", &format!("/v2/a/manifests/{tag}"), &headers, manifest.as_bytes())?;
    assert_eq!(reply.status, 201, "{reply:?}");
    let digest = Digest::of(manifest.as_bytes());
    told.manifests.push(digest);
    told.tags.insert(tag, digest);
    Some(())
}

fn check(client: &Client, told: &Told) {
    for digest in told.blobs.iter().rev().take(50) {
        let got = client.get(&format!("/v2/a/blobs/{digest}"));
        assert_eq!((got.status, Digest::of(&got.body)), (200, *digest), "an acknowledged blob");
    }
    for digest in told.manifests.iter().rev().take(50) {
        let got = client.get(&format!("/v2/a/manifests/{digest}"));
        assert_eq!((got.status, Digest::of(&got.body)), (200, *digest), "an acknowledged manifest");
    }
    for (tag, digest) in &told.tags {
        let got = client.get(&format!("/v2/a/manifests/{tag}"));
        assert_eq!(got.header("docker-content-digest"), digest.to_string(), "an acknowledged tag");
    }
}

/// Goes on with the uploads that a kill broke off: each has at least what was said to have arrived.
fn resume(client: &Client, told: &mut Told) {
    for (location, blob, said) in std::mem::take(&mut told.uploads) {
        let digest = Digest::of(&blob);
        let status = client.get(&location);
        if status.status == 404 {
            // Finished, and the answer never arrived.
            assert_eq!(client.get(&format!("/v2/a/blobs/{digest}")).body, blob, "an upload is lost");
            continue;
        }
        assert_eq!(status.status, 204, "{status:?}");
        let last: usize = status.header("range").strip_prefix("0-").unwrap().parse().unwrap();
        let at = if last == 0 { 0 } else { last + 1 };
        assert!(at >= said, "{said} bytes were acknowledged, {at} are there");
        let reply = client.try_call("PUT", &format!("{location}?digest={digest}"), &[], &blob[at..]).unwrap();
        assert_eq!(reply.status, 201, "{reply:?}");
        told.blobs.push(digest);
    }
}

/// Collection, told that everything is old, leaves what tags reach and nothing else.
fn collected(dir: &Path) {
    let store = Store::open(dir).unwrap();
    let now = Duration::ZERO;
    store.gc(&GcOptions { grace: now, untagged: now, unfinished: now, ..Default::default() }).unwrap();
    let names = |what: &str| -> Vec<String> {
        let entries = std::fs::read_dir(dir.join(what)).unwrap();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    };
    for what in ["uploads", "tmp", "partial"] {
        assert_eq!(names(what), Vec::<String>::new(), "{what}");
    }
    let tags = store.tags("a").unwrap().unwrap();
    let repository = image::Repository::local("a").unwrap();
    let reached: std::collections::BTreeSet<String> = tags
        .iter()
        .flat_map(|tag| {
            let manifest = store.manifest_get(&repository, &image::Selector::Tag(tag.clone())).unwrap().unwrap();
            let text: serde_json::Value = serde_json::from_slice(&manifest.bytes).unwrap();
            let named =
                [&text["config"]["digest"], &text["layers"][0]["digest"]].map(|d| d.as_str().unwrap().to_owned());
            [manifest.digest.to_string(), named[0].clone(), named[1].clone()]
        })
        .collect();
    let kept: std::collections::BTreeSet<String> =
        names("blobs/sha256").into_iter().map(|h| format!("sha256:{h}")).collect();
    assert_eq!(kept, reached, "collection left rubbish or took too much");
    for digest in &kept {
        let mut content = Vec::new();
        let blob = store.blob_open(&digest.parse().unwrap()).unwrap().unwrap();
        { blob.file }.read_to_end(&mut content).unwrap();
        assert_eq!(Digest::of(&content).to_string(), *digest);
    }
}

/// Numbers from a seed (splitmix64).
fn fastrand(mut seed: u64) -> impl FnMut() -> u64 {
    move || {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
