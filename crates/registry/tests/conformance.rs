//! The distribution spec's cases: pull, push, discovery, management.

mod common;

use common::{Registry, small_image};
use image::{Digest, media};

const UPLOADS: &str = "/v2/shop/app/blobs/uploads/";

#[test]
fn version_and_unknown_things() {
    let registry = Registry::start();
    let version = registry.get("/v2/");
    assert_eq!((version.status, version.header("docker-distribution-api-version")), (200, "registry/2.0"));
    let digest = Digest::of(b"absent");
    for (path, code) in [
        (format!("/v2/a/blobs/{digest}"), "BLOB_UNKNOWN"),
        (format!("/v2/a/manifests/{digest}"), "MANIFEST_UNKNOWN"),
        ("/v2/a/manifests/latest".into(), "MANIFEST_UNKNOWN"),
        ("/v2/a/tags/list".into(), "NAME_UNKNOWN"),
        (format!("/v2/a/blobs/uploads/{}", "0".repeat(32)), "BLOB_UPLOAD_UNKNOWN"),
        ("/v2/a/blobs/uploads/..%2f..%2fx".into(), "NAME_INVALID"),
    ] {
        let reply = registry.get(&path);
        assert!(reply.status == 404 || reply.status == 400, "{path}: {reply:?}");
        assert!(reply.code() == code || reply.status == 404, "{path}: {reply:?}");
        if !path.contains("/uploads/") {
            assert_eq!(registry.call("HEAD", &path, &[], b"").status, reply.status, "{path}");
        }
    }
    assert_eq!(registry.get("/v2/UPPER/manifests/x").code(), "NAME_INVALID");
    assert_eq!(registry.get("/v2/a/blobs/sha256:12").code(), "DIGEST_INVALID");
    let post = registry.call("POST", "/v2/a/tags/list", &[], b"");
    assert_eq!((post.status, post.header("allow")), (405, "GET, HEAD"));
    assert_eq!(registry.call("GET", "/v2/", &[("origin", "http://evil.example")], b"").status, 403);
}

#[test]
fn blobs_in_one_piece() {
    let registry = Registry::start();
    let content = b"some content of a blob";
    let digest = registry.push_blob("shop/app", content);
    let path = format!("/v2/shop/app/blobs/{digest}");
    let got = registry.get(&path);
    assert_eq!((got.status, got.body.as_slice()), (200, &content[..]));
    let head = registry.call("HEAD", &path, &[], b"");
    assert_eq!((head.status, head.header("content-length"), head.body.len()), (200, "22", 0));
    let part = registry.call("GET", &path, &[("range", "bytes=5-11")], b"");
    assert_eq!((part.status, part.body.as_slice()), (206, &content[5..12]));
    assert_eq!(part.header("content-range"), "bytes 5-11/22");
    assert_eq!(registry.call("GET", &path, &[("range", "bytes=99-")], b"").status, 416);

    let wrong = registry.call("POST", &format!("{UPLOADS}?digest={}", Digest::of(b"other")), &[], content);
    assert_eq!((wrong.status, wrong.code().as_str()), (400, "DIGEST_INVALID"));

    // POST, then PUT with the body.
    let begun = registry.call("POST", UPLOADS, &[], b"");
    assert_eq!(begun.status, 202);
    let other = Digest::of(b"second");
    let location = begun.header("location").to_owned();
    let put = registry.call("PUT", &format!("{location}?digest=sha256%3A{}", other.hex()), &[], b"second");
    assert_eq!((put.status, put.header("location")), (201, format!("/v2/shop/app/blobs/{other}").as_str()));
    assert_eq!(registry.call("PUT", &location, &[], b"second").code(), "DIGEST_INVALID");
}

#[test]
fn blobs_in_chunks() {
    let registry = Registry::start();
    let location = registry.call("POST", UPLOADS, &[], b"").header("location").to_owned();
    let chunk = |range: &str, body: &[u8]| registry.call("PATCH", &location, &[("content-range", range)], body);
    let first = chunk("0-4", b"01234");
    assert_eq!((first.status, first.header("range")), (202, "0-4"));
    let early = chunk("9-10", b"9x");
    assert_eq!((early.status, early.header("location")), (416, location.as_str()));
    assert_eq!(chunk("nonsense", b"x").status, 416);
    let status = registry.get(&location);
    assert_eq!((status.status, status.header("range")), (204, "0-4"));
    assert_eq!(chunk("5-7", b"567").status, 202);
    let digest = Digest::of(b"0123456789");
    let put = registry.call("PUT", &format!("{location}?digest={digest}"), &[("content-range", "8-9")], b"89");
    assert_eq!(put.status, 201, "{put:?}");
    assert_eq!(registry.get(&format!("/v2/shop/app/blobs/{digest}")).body, b"0123456789");

    let location = registry.call("POST", UPLOADS, &[], b"").header("location").to_owned();
    assert_eq!(registry.call("DELETE", &location, &[], b"").status, 204);
    assert_eq!(registry.get(&location).status, 404);
}

#[test]
fn manifests_must_be_whole() {
    let registry = Registry::start();
    let (layer, config) = small_image("1");
    let manifest = registry.push_image("shop/app", "1", &config, &layer);
    let digest = Digest::of(manifest.as_bytes());
    for reference in ["1".to_owned(), digest.to_string()] {
        let got = registry.get(&format!("/v2/shop/app/manifests/{reference}"));
        assert_eq!((got.status, got.body.as_slice()), (200, manifest.as_bytes()));
        assert_eq!(got.header("content-type"), media::OCI_MANIFEST);
        assert_eq!(got.header("docker-content-digest"), digest.to_string());
    }
    // It is a pod's image now.
    let resolved = registry.store.resolve(&format!("{}/shop/app:1", registry.address)).unwrap();
    assert_eq!(resolved.digest, digest);

    let absent = manifest.replace(&Digest::of(&layer).to_string(), &Digest::of(b"absent").to_string());
    let reply = registry.put_manifest("shop/app", "2", &absent);
    assert_eq!((reply.status, reply.code().as_str()), (400, "MANIFEST_BLOB_UNKNOWN"));
    let lying = manifest.replace("\"size\":1024", "\"size\":1025");
    assert_eq!(registry.put_manifest("shop/app", "2", &lying).code(), "SIZE_INVALID");
    assert_eq!(registry.put_manifest("shop/app", "2", "{}").code(), "MANIFEST_INVALID");
    assert_eq!(registry.put_manifest("shop/app", &Digest::of(b"x").to_string(), &manifest).code(), "DIGEST_INVALID");
    assert_eq!(registry.put_manifest("shop/app", "-bad", &manifest).code(), "NAME_INVALID");
    let huge = format!("{manifest}{}", " ".repeat((4 << 20) + 1 - manifest.len()));
    assert_eq!(registry.put_manifest("shop/app", "2", &huge).status, 413);
    let full = format!("{manifest}{}", " ".repeat((4 << 20) - manifest.len()));
    assert_eq!(registry.put_manifest("shop/app", "2", &full).status, 201);
}

#[test]
fn lists_come_in_pages() {
    let registry = Registry::start();
    let (layer, config) = small_image("1");
    for tag in ["c", "a", "b", "A"] {
        registry.push_image("shop/app", tag, &config, &layer);
    }
    registry.push_image("zoo", "1", &config, &layer);
    let tags = |query: &str| {
        let reply = registry.get(&format!("/v2/shop/app/tags/list{query}"));
        (reply.json()["tags"].clone(), reply.header("link").to_owned())
    };
    assert_eq!(tags("").0, serde_json::json!(["A", "a", "b", "c"]));
    assert_eq!(
        tags("?n=2"),
        (serde_json::json!(["A", "a"]), "</v2/shop/app/tags/list?n=2&last=a>; rel=\"next\"".into())
    );
    assert_eq!(tags("?n=2&last=a"), (serde_json::json!(["b", "c"]), String::new()));
    assert_eq!(tags("?n=0").0, serde_json::json!([]));
    assert_eq!(registry.get("/v2/_catalog").json()["repositories"], serde_json::json!(["shop/app", "zoo"]));
    assert_eq!(registry.get("/v2/_catalog?n=x").status, 400);
}

#[test]
fn mounting_deleting_and_referring() {
    let registry = Registry::start();
    let (layer, config) = small_image("1");
    let manifest = registry.push_image("shop/app", "1", &config, &layer);
    let digest = Digest::of(manifest.as_bytes());
    let blob = Digest::of(&layer);
    let mounted = registry.call("POST", &format!("/v2/other/blobs/uploads/?mount={blob}&from=shop/app"), &[], b"");
    assert_eq!((mounted.status, mounted.header("location")), (201, format!("/v2/other/blobs/{blob}").as_str()));
    let absent = Digest::of(b"absent");
    let not = registry.call("POST", &format!("/v2/other/blobs/uploads/?mount={absent}&from=shop/app"), &[], b"");
    assert_eq!(not.status, 202);

    let signature = registry.push_blob("shop/app", b"{}");
    let about = serde_json::json!({
        "schemaVersion": 2, "mediaType": media::OCI_MANIFEST, "artifactType": "application/x.signature",
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": signature, "size": 2}, "layers": [],
        "subject": {"mediaType": media::OCI_MANIFEST, "digest": digest, "size": manifest.len()},
        "annotations": {"who": "me"},
    })
    .to_string();
    let put = registry.put_manifest("shop/app", &Digest::of(about.as_bytes()).to_string(), &about);
    assert_eq!((put.status, put.header("oci-subject")), (201, digest.to_string().as_str()));
    let referrers = registry.get(&format!("/v2/shop/app/referrers/{digest}?artifactType=application/x.signature"));
    assert_eq!(referrers.header("oci-filters-applied"), "artifactType");
    assert_eq!(referrers.json()["manifests"][0]["annotations"]["who"], "me");
    assert_eq!(referrers.json()["manifests"][0]["artifactType"], "application/x.signature");
    assert_eq!(registry.get(&format!("/v2/shop/app/referrers/{absent}")).json()["manifests"], serde_json::json!([]));

    let path = format!("/v2/shop/app/blobs/{blob}");
    assert_eq!(registry.call("DELETE", &path, &[], b"").status, 405, "an image still has it");
    assert_eq!(registry.call("DELETE", &format!("/v2/shop/app/manifests/{digest}"), &[], b"").status, 202);
    assert_eq!(registry.get("/v2/shop/app/manifests/1").status, 404, "its tags go with it");
    assert_eq!(registry.call("DELETE", &format!("/v2/shop/app/manifests/{digest}"), &[], b"").status, 404);
    assert_eq!(registry.call("DELETE", &path, &[], b"").status, 202);
    assert_eq!(registry.get(&path).status, 404);
}

/// Many at once, on the same repository, with garbage collection running as hard as it can.
#[test]
fn pushes_pulls_and_collection_side_by_side() {
    let registry = Registry::start();
    let options = image::GcOptions { grace: std::time::Duration::from_secs(60), ..Default::default() };
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let collector = scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                registry.store.gc(&options).unwrap();
            }
        });
        let pushers: Vec<_> = (0..6)
            .map(|number| {
                let registry = &registry;
                scope.spawn(move || {
                    for round in 0..8 {
                        let (layer, config) = small_image(&format!("{number}-{round}"));
                        let tag = format!("t{number}");
                        let manifest = registry.push_image("shop/busy", &tag, &config, &layer);
                        let got = registry.get(&format!("/v2/shop/busy/manifests/{tag}"));
                        assert_eq!(got.body, manifest.as_bytes());
                        let path = format!("/v2/shop/busy/manifests/{}", Digest::of(manifest.as_bytes()));
                        if round % 2 == 0 {
                            assert_eq!(registry.call("DELETE", &path, &[], b"").status, 202);
                        }
                    }
                })
            })
            .collect();
        for pusher in pushers {
            pusher.join().unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        collector.join().unwrap();
    });
    assert_eq!(registry.store.tags("shop/busy").unwrap().unwrap().len(), 6);
}
