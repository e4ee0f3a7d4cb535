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
    for tag in ["c", "a", "B", "A"] {
        registry.push_image("shop/app", tag, &config, &layer);
    }
    registry.push_image("zoo", "1", &config, &layer);
    let tags = |query: &str| {
        let reply = registry.get(&format!("/v2/shop/app/tags/list{query}"));
        (reply.json()["tags"].clone(), reply.header("link").to_owned())
    };
    assert_eq!(tags("").0, serde_json::json!(["A", "a", "B", "c"]), "case does not order");
    assert_eq!(
        tags("?n=2"),
        (serde_json::json!(["A", "a"]), "</v2/shop/app/tags/list?n=2&last=a>; rel=\"next\"".into())
    );
    assert_eq!(tags("?n=2&last=a"), (serde_json::json!(["B", "c"]), String::new()));
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

/// Large blobs are sent by the kernel; many on one connection, one behind the other, in parts, and to clients that go.
#[test]
fn large_blobs_on_one_connection() {
    let registry = Registry::start();
    let content: Vec<u8> = (0..5_000_003u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let digest = registry.push_blob("shop/app", &content);
    let path = format!("/v2/shop/app/blobs/{digest}");
    assert_eq!(registry.get(&path).body, content);
    for (range, first, last) in [
        ("bytes=0-0", 0, 0),
        ("bytes=1048575-1048576", 1_048_575, 1_048_576),
        ("bytes=3-4000000", 3, 4_000_000),
        ("bytes=4999999-", 4_999_999, 5_000_002),
        ("bytes=-70000", 4_930_003, 5_000_002),
    ] {
        let part = registry.call("GET", &path, &[("range", range)], b"");
        assert_eq!((part.status, part.body.as_slice()), (206, &content[first..=last]), "{range}");
        assert_eq!(part.header("content-range"), format!("bytes {first}-{last}/5000003"));
    }
    // Pipelined, with a small answer and a HEAD in between.
    let requests = format!(
        "GET {path} HTTP/1.1\r\nhost: x\r\n\r\nGET /v2/ HTTP/1.1\r\nhost: x\r\n\r\nHEAD {path} HTTP/1.1\r\nhost: x\r\n\r\n\
         GET {path} HTTP/1.1\r\nhost: x\r\nrange: bytes=5-2000004\r\nconnection: close\r\n\r\n"
    );
    let mut all = registry.exchange(requests.as_bytes()).into_iter();
    let mut next = |length: usize| {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(all.next().expect("an answer"));
        }
        (String::from_utf8(head).unwrap(), all.by_ref().take(length).collect::<Vec<u8>>())
    };
    assert!(next(content.len()).1 == content, "the first body differs");
    assert_eq!(next(2).1, b"{}");
    assert!(next(0).0.contains("content-length: 5000003"));
    assert!(next(2_000_000).1 == content[5..2_000_005], "the last body differs");
    // A client that goes in the middle harms nobody.
    for _ in 0..8 {
        let mut stream = std::net::TcpStream::connect(registry.address).unwrap();
        std::io::Write::write_all(&mut stream, format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).unwrap();
        std::io::Read::read_exact(&mut stream, &mut [0u8; 9000]).unwrap();
    }
    assert_eq!(registry.get(&path).body, content);
    let known = registry.call("GET", &path, &[("if-none-match", &format!("\"{digest}\""))], b"");
    assert_eq!((known.status, known.body.len()), (304, 0));
    // Nothing is a blob too.
    let empty = registry.push_blob("shop/app", b"");
    let got = registry.get(&format!("/v2/shop/app/blobs/{empty}"));
    assert_eq!((got.status, got.body.len()), (200, 0));
}

#[test]
fn a_chunk_is_as_long_as_it_says() {
    let registry = Registry::start();
    let location = registry.call("POST", UPLOADS, &[], b"").header("location").to_owned();
    let chunk = |range: &str, body: &[u8]| registry.call("PATCH", &location, &[("content-range", range)], body);
    let short = chunk("0-9", b"01234");
    assert_eq!((short.status, short.code().as_str()), (400, "SIZE_INVALID"));
    let first = chunk("1-5", b"12345");
    assert_eq!((first.status, first.header("location")), (416, location.as_str()), "the first begins with 0");
    assert_eq!(chunk("0-4", b"01234").status, 202);
    assert_eq!(chunk("0-4", b"01234").status, 416, "the same chunk again");
    for bad in ["5", "-5", "5-", "9-5", "5-a", "bytes", "0-18446744073709551615", "+5-9"] {
        assert_eq!(chunk(bad, b"56789").status, 416, "{bad}");
    }
    let put =
        registry.call("PUT", &format!("{location}?digest={}", Digest::of(b"01234")), &[("content-range", "9-9")], b"9");
    assert_eq!(put.status, 416);
    let status = registry.get(&location);
    assert_eq!((status.status, status.header("range"), status.header("location")), (204, "0-4", location.as_str()));
    let wrong = registry.call("PUT", &format!("{location}?digest={}", Digest::of(b"x")), &[], b"");
    assert_eq!((wrong.status, wrong.code().as_str()), (400, "DIGEST_INVALID"));
    let put = registry.call("PUT", &format!("{location}?digest={}", Digest::of(b"01234")), &[], b"");
    assert_eq!(put.status, 201, "closed without a body, after a wrong digest");
    assert_eq!(registry.get(put.header("location")).body, b"01234");
    assert_eq!(chunk("5-9", b"56789").status, 404, "closed is closed");
}

#[test]
fn referrers_in_full() {
    let registry = Registry::start();
    let (layer, config) = small_image("1");
    registry.push_image("shop/app", "1", &config, &layer);
    let empty = registry.push_blob("shop/app", b"{}");
    // The subject comes after what is about it.
    let later = registry.push_blob("shop/app", b"not yet a manifest");
    let subject = serde_json::json!({"mediaType": media::OCI_MANIFEST, "digest": later, "size": 18});
    let about = |config_type: &str, artifact: Option<&str>, note: &str| {
        let mut manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": media::OCI_MANIFEST,
            "config": {"mediaType": config_type, "digest": empty, "size": 2}, "layers": [],
            "subject": subject, "annotations": {"note": note},
        });
        if let Some(artifact) = artifact {
            manifest["artifactType"] = artifact.into();
        }
        manifest.to_string()
    };
    let sbom = about("application/vnd.oci.empty.v1+json", Some("application/x.sbom"), "a");
    let old = about("application/x.old-signature", None, "b");
    let index =
        serde_json::json!({"schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests": [], "subject": subject});
    let push = |text: &str, media_type: &str| {
        let path = format!("/v2/shop/app/manifests/{}", Digest::of(text.as_bytes()));
        let put = registry.call("PUT", &path, &[("content-type", media_type)], text.as_bytes());
        assert_eq!((put.status, put.header("oci-subject")), (201, later.as_str()), "{put:?}");
        assert!(put.header("warning").starts_with("299 - \"subject sha256:"), "{put:?}");
    };
    push(&sbom, media::OCI_MANIFEST);
    push(&old, media::OCI_MANIFEST);
    push(&index.to_string(), media::OCI_INDEX);
    let list = |query: &str| registry.get(&format!("/v2/shop/app/referrers/{later}{query}"));
    let all = list("");
    assert_eq!(
        (all.status, all.header("content-type"), all.header("oci-filters-applied")),
        (200, media::OCI_INDEX, "")
    );
    let all = all.json()["manifests"].as_array().unwrap().clone();
    let of = |text: &str| {
        let digest = Digest::of(text.as_bytes()).to_string();
        all.iter().find(|d| d["digest"] == digest.as_str()).unwrap().clone()
    };
    assert_eq!(
        (of(&sbom)["artifactType"].as_str(), of(&sbom)["annotations"]["note"].as_str()),
        (Some("application/x.sbom"), Some("a"))
    );
    assert_eq!(of(&sbom)["size"], sbom.len());
    assert_eq!(of(&old)["artifactType"], "application/x.old-signature", "the config's type stands in");
    assert!(of(&index.to_string()).get("artifactType").is_none(), "an index without one has none");
    assert_eq!(all.len(), 3);
    let filtered = list("?artifactType=application%2Fx.sbom");
    assert_eq!(filtered.header("oci-filters-applied"), "artifactType");
    assert_eq!(filtered.json()["manifests"].as_array().unwrap().len(), 1);
    let bad = registry.get("/v2/shop/app/referrers/sha256:12");
    assert_eq!((bad.status, bad.code().as_str()), (400, "DIGEST_INVALID"));
    let nowhere = registry.get(&format!("/v2/no/such/referrers/{later}"));
    assert_eq!((nowhere.status, nowhere.json()["manifests"].clone()), (200, serde_json::json!([])));
    let digest = Digest::of(sbom.as_bytes());
    assert_eq!(registry.call("DELETE", &format!("/v2/shop/app/manifests/{digest}"), &[], b"").status, 202);
    assert_eq!(list("").json()["manifests"].as_array().unwrap().len(), 2);
}

/// More than one index may hold is given page by page, by links.
#[test]
fn referrers_come_in_pages() {
    let registry = Registry::start();
    let empty = registry.push_blob("a", b"{}");
    let subject = Digest::of(b"whatever");
    let note = "n".repeat(1_500_000);
    for number in 0..5 {
        let manifest = serde_json::json!({
            "schemaVersion": 2, "artifactType": "application/x.note", "layers": [],
            "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": empty, "size": 2},
            "subject": {"mediaType": media::OCI_MANIFEST, "digest": subject, "size": 8},
            "annotations": {"note": note, "number": number.to_string()},
        });
        assert_eq!(registry.put_manifest("a", &number.to_string(), &manifest.to_string()).status, 201);
    }
    let mut path = format!("/v2/a/referrers/{subject}?artifactType=application/x.note");
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..5 {
        let page = registry.get(&path);
        assert!(page.status == 200 && page.body.len() <= 4 << 20, "{} {}", page.status, page.body.len());
        for d in page.json()["manifests"].as_array().unwrap() {
            assert!(seen.insert(d["annotations"]["number"].as_str().unwrap().to_owned()), "twice");
        }
        match page.header("link").strip_prefix('<').and_then(|l| l.strip_suffix(">; rel=\"next\"")) {
            Some(next) => path = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(seen.len(), 5);
}

#[test]
fn every_kind_of_manifest() {
    let registry = Registry::start();
    let (layer, config) = small_image("1");
    let manifest = registry.push_image("a", "oci", &config, &layer);
    // Docker's: schema 2 and its list.
    let docker =
        manifest.replace(media::OCI_MANIFEST, media::DOCKER_MANIFEST).replace(media::OCI_CONFIG, media::DOCKER_CONFIG);
    let put = |tag: &str, media_type: &str, text: &str| {
        registry.call("PUT", &format!("/v2/a/manifests/{tag}"), &[("content-type", media_type)], text.as_bytes())
    };
    assert_eq!(put("docker", media::DOCKER_MANIFEST, &docker).status, 201);
    let list = serde_json::json!({"schemaVersion": 2, "mediaType": media::DOCKER_LIST, "manifests": [
        {"mediaType": media::DOCKER_MANIFEST, "digest": Digest::of(docker.as_bytes()), "size": docker.len(), "platform": {"os": "linux", "architecture": "amd64"}},
    ]})
    .to_string();
    assert_eq!(put("list", media::DOCKER_LIST, &list).status, 201);
    // Parameters of the type are ignored.
    assert_eq!(put("parameters", &format!("{}; charset=utf-8", media::OCI_MANIFEST), &manifest).status, 201);
    for (tag, media_type, text) in [
        ("docker", media::DOCKER_MANIFEST, &docker),
        ("list", media::DOCKER_LIST, &list),
        ("parameters", media::OCI_MANIFEST, &manifest),
    ] {
        let got = registry.get(&format!("/v2/a/manifests/{tag}"));
        assert_eq!((got.status, got.header("content-type"), got.body.as_slice()), (200, media_type, text.as_bytes()));
        let head = registry.call("HEAD", &format!("/v2/a/manifests/{tag}"), &[], b"");
        assert_eq!((head.status, head.header("content-length")), (200, text.len().to_string().as_str()));
        assert_eq!(head.header("docker-content-digest"), Digest::of(text.as_bytes()).to_string());
    }
    // An artifact: any type of configuration and of layers, also none.
    let sheet = registry.push_blob("a", b"1;2;3");
    let nothing = registry.push_blob("a", b"{}");
    let artifact = serde_json::json!({
        "schemaVersion": 2, "mediaType": media::OCI_MANIFEST, "artifactType": "application/vnd.example.data",
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": nothing, "size": 2},
        "layers": [{"mediaType": "text/csv; charset=utf-8", "digest": sheet, "size": 5, "data": "MTsyOzM="}],
    });
    assert_eq!(put("data", media::OCI_MANIFEST, &artifact.to_string()).status, 201);
    let mut bare = artifact.clone();
    bare["layers"] = serde_json::json!([]);
    assert_eq!(put("bare", media::OCI_MANIFEST, &bare.to_string()).status, 201);
    let index = serde_json::json!({"schemaVersion": 2, "manifests": []}).to_string();
    assert_eq!(put("none", media::OCI_INDEX, &index).status, 201);
    // A layer that may only be had elsewhere need not be here; the client is warned.
    let foreign = manifest
        .replace(media::OCI_LAYER, "application/vnd.oci.image.layer.nondistributable.v1.tar")
        .replace(&Digest::of(&layer).to_string(), &Digest::of(b"elsewhere").to_string());
    let put_foreign = put("foreign", media::OCI_MANIFEST, &foreign);
    assert_eq!(put_foreign.status, 201, "{put_foreign:?}");
    assert!(put_foreign.header("warning").starts_with("299 - \"layer sha256:"), "{put_foreign:?}");
    // Neither is both; both is neither.
    for bad in [
        r#"{"schemaVersion":1,"fsLayers":[]}"#.to_owned(),
        r#"{"schemaVersion":2}"#.into(),
        "[]".into(),
        "\u{0}".into(),
        manifest.replace("\"layers\"", "\"manifests\":[],\"layers\""),
    ] {
        let reply = put("bad", media::OCI_MANIFEST, &bad);
        assert_eq!((reply.status, reply.code().as_str()), (400, "MANIFEST_INVALID"), "{bad}");
    }
    let contradicts = put("bad", media::OCI_INDEX, &manifest);
    assert_eq!((contradicts.status, contradicts.code().as_str()), (400, "MANIFEST_INVALID"));
    let many: Vec<_> =
        (0..10_000).map(|_| serde_json::json!({"mediaType": "x/y", "digest": sheet, "size": 5})).collect();
    let mut hoard = artifact;
    hoard["layers"] = many.into();
    let reply = put("hoard", media::OCI_MANIFEST, &hoard.to_string());
    assert_eq!((reply.status, reply.code().as_str()), (400, "MANIFEST_INVALID"), "10,000 layers");
    assert!(
        !registry.get("/v2/a/tags/list").json()["tags"].as_array().unwrap().iter().any(|t| t == "bad" || t == "hoard")
    );
}
