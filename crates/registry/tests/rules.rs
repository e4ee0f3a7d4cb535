//! Access, immutable tags and limits.

mod common;

use common::{Registry, small_image};
use image::{Digest, Limits, media};
use registry::{Access, Caller, Config, Denied, TagRules, Verb};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};

/// Pulls and pushes of whoever says "team" where the name begins so; nothing else.
#[derive(Default)]
struct Teams {
    asked: Mutex<Vec<(Verb, Option<String>)>>,
}

impl Access for Teams {
    fn decide(&self, caller: &Caller, verb: Verb, repository: Option<&str>) -> Result<(), Denied> {
        self.asked.lock().unwrap().push((verb, repository.map(str::to_owned)));
        let Some(team) = caller.authorization.as_deref() else {
            return Err(Denied::Unauthenticated("Basic realm=\"atoll\"".into()));
        };
        match repository {
            Some(name) if !name.starts_with(&format!("{team}/")) => Err(Denied::Forbidden(format!("not {team}'s"))),
            _ => Ok(()),
        }
    }

    fn sees_everything(&self, _: &Caller) -> bool {
        false
    }
}

fn guarded() -> (Registry, Arc<Teams>) {
    let teams = Arc::new(Teams::default());
    let access = teams.clone();
    (Registry::start_with(Limits::default(), |config| Config { access, ..config }), teams)
}

#[test]
fn an_anonymous_call_is_refused_at_every_endpoint() {
    let (registry, teams) = guarded();
    let digest = Digest::of(b"x");
    let id = "0".repeat(32);
    let expected = [
        ("GET", "/v2/".to_owned(), Verb::Enter),
        ("GET", "/v2/_catalog".into(), Verb::List),
        ("GET", "/v2/a/b/tags/list".into(), Verb::Pull),
        ("GET", format!("/v2/a/b/referrers/{digest}"), Verb::Pull),
        ("GET", "/v2/a/b/manifests/1".into(), Verb::Pull),
        ("HEAD", "/v2/a/b/manifests/1".into(), Verb::Pull),
        ("PUT", "/v2/a/b/manifests/1".into(), Verb::Push),
        ("DELETE", "/v2/a/b/manifests/1".into(), Verb::Delete),
        ("GET", format!("/v2/a/b/blobs/{digest}"), Verb::Pull),
        ("HEAD", format!("/v2/a/b/blobs/{digest}"), Verb::Pull),
        ("DELETE", format!("/v2/a/b/blobs/{digest}"), Verb::Delete),
        ("POST", "/v2/a/b/blobs/uploads/".into(), Verb::Push),
        ("POST", format!("/v2/a/b/blobs/uploads/?mount={digest}"), Verb::Push),
        ("GET", format!("/v2/a/b/blobs/uploads/{id}"), Verb::Push),
        ("PATCH", format!("/v2/a/b/blobs/uploads/{id}"), Verb::Push),
        ("PUT", format!("/v2/a/b/blobs/uploads/{id}?digest={digest}"), Verb::Push),
        ("DELETE", format!("/v2/a/b/blobs/uploads/{id}"), Verb::Push),
    ];
    for (method, path, verb) in expected {
        let reply = registry.call(method, &path, &[], b"");
        assert_eq!((reply.status, reply.header("www-authenticate")), (401, "Basic realm=\"atoll\""), "{method} {path}");
        if method != "HEAD" {
            assert_eq!(reply.code(), "UNAUTHORIZED");
        }
        let asked = std::mem::take(&mut *teams.asked.lock().unwrap());
        let repository = path.starts_with("/v2/a/b").then(|| "a/b".to_owned());
        assert_eq!(asked, [(verb, repository)], "{method} {path}");
        let other = registry.call(method, &path, &[("authorization", "z")], b"");
        assert_eq!(other.status == 403, path.starts_with("/v2/a/b"), "{method} {path}: {other:?}");
        teams.asked.lock().unwrap().clear();
    }
}

/// A blob cannot be had through a repository that was never given it, whatever digest one knows.
#[test]
fn repositories_do_not_leak_into_each_other() {
    let (registry, _) = guarded();
    let call = |who: &str, method: &str, path: &str, body: &[u8]| {
        let headers = [("authorization", who), ("content-type", media::OCI_MANIFEST)];
        registry.call(method, path, &headers, body)
    };
    let secret = b"a's secret";
    let digest = Digest::of(secret);
    assert_eq!(call("a", "POST", &format!("/v2/a/x/blobs/uploads/?digest={digest}"), secret).status, 201);
    assert_eq!(call("a", "GET", &format!("/v2/a/x/blobs/{digest}"), b"").body, secret);
    assert_eq!(call("a", "GET", &format!("/v2/a/y/blobs/{digest}"), b"").status, 404);
    assert_eq!(call("b", "GET", &format!("/v2/a/x/blobs/{digest}"), b"").status, 403);
    for method in ["GET", "HEAD", "DELETE"] {
        assert_eq!(call("b", method, &format!("/v2/b/x/blobs/{digest}"), b"").status, 404, "{method}");
    }
    // Not by mounting, said where from or not, ...
    for from in ["", "&from=a/x", "&from=b/x", "&from=%2e%2e"] {
        let reply = call("b", "POST", &format!("/v2/b/x/blobs/uploads/?mount={digest}{from}"), b"");
        assert_eq!(reply.status, 202, "{from}");
    }
    // ... not by a manifest that names it, ...
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","config":{{"mediaType":"a/b","digest":"{digest}","size":10}},"layers":[]}}"#,
        media::OCI_MANIFEST
    );
    let put = call("b", "PUT", "/v2/b/x/manifests/1", manifest.as_bytes());
    assert_eq!((put.status, put.code().as_str()), (400, "MANIFEST_BLOB_UNKNOWN"));
    // ... not by an upload that claims to be it, ...
    let wrong = call("b", "POST", &format!("/v2/b/x/blobs/uploads/?digest={digest}"), b"no idea");
    assert_eq!(wrong.code(), "DIGEST_INVALID");
    assert_eq!(call("b", "GET", &format!("/v2/b/x/blobs/{digest}"), b"").status, 404);
    // ... not by an index of another's manifest.
    assert_eq!(call("a", "PUT", "/v2/a/x/manifests/1", manifest.as_bytes()).status, 201);
    let child = Digest::of(manifest.as_bytes());
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{}","digest":"{child}","size":{}}}]}}"#,
        media::OCI_MANIFEST,
        manifest.len()
    );
    let headers = [("authorization", "b"), ("content-type", media::OCI_INDEX)];
    let put = registry.call("PUT", "/v2/b/x/manifests/i", &headers, index.as_bytes());
    assert_eq!((put.status, put.code().as_str()), (400, "MANIFEST_BLOB_UNKNOWN"));
    // Mounts within one's own go, without saying where from too.
    for (into, from) in [("y", "&from=a/x"), ("z", "")] {
        let path = format!("/v2/a/{into}/blobs/uploads/?mount={digest}{from}");
        assert_eq!(call("a", "POST", &path, b"").status, 201, "{from}");
        assert_eq!(call("a", "GET", &format!("/v2/a/{into}/blobs/{digest}"), b"").body, secret);
    }
    assert_eq!(call("b", "GET", "/v2/_catalog", b"").json()["repositories"], serde_json::json!([]));
    assert_eq!(call("a", "GET", "/v2/_catalog", b"").json()["repositories"], serde_json::json!(["a/x"]));
}

#[test]
fn a_tag_under_a_rule_is_set_once() {
    let rules = TagRules::immutable(["shop/*:v*"]).unwrap();
    let registry = Registry::start_with(Limits::default(), |config| Config { rules, ..config });
    let (layer, config) = small_image("1");
    let first = registry.push_image("shop/app", "v1", &config, &layer);
    let digest = Digest::of(first.as_bytes());
    assert_eq!(registry.put_manifest("shop/app", "v1", &first).status, 201, "the same again");
    let (_, other) = small_image("2");
    let second =
        first.replace(&Digest::of(config.as_bytes()).to_string(), &registry.push_blob("shop/app", other.as_bytes()));
    let moved = registry.put_manifest("shop/app", "v1", &second);
    assert_eq!((moved.status, moved.code().as_str()), (409, "DENIED"));
    assert_eq!(registry.get("/v2/shop/app/manifests/v1").body, first.as_bytes());
    for path in ["v1".to_owned(), digest.to_string()] {
        let deleted = registry.call("DELETE", &format!("/v2/shop/app/manifests/{path}"), &[], b"");
        assert_eq!((deleted.status, deleted.code().as_str()), (409, "DENIED"), "{path}");
    }
    // Others move and go.
    for manifest in [&first, &second] {
        assert_eq!(registry.put_manifest("shop/app", "latest", manifest).status, 201);
    }
    assert_eq!(registry.call("DELETE", "/v2/shop/app/manifests/latest", &[], b"").status, 202);

    // Of many who set it at once one wins.
    let manifests: Vec<String> = (0..8).map(|n| format!("{second}{}", " ".repeat(n))).collect();
    let won: Vec<usize> = std::thread::scope(|scope| {
        let all: Vec<_> =
            manifests.iter().map(|m| scope.spawn(|| registry.put_manifest("shop/app", "v2", m))).collect();
        let replies = all.into_iter().map(|t| t.join().unwrap().status);
        replies.enumerate().filter(|(_, status)| *status == 201).map(|(n, _)| n).collect()
    });
    assert_eq!(won.len(), 1);
    assert_eq!(registry.get("/v2/shop/app/manifests/v2").body, manifests[won[0]].as_bytes());
}

#[test]
fn uploads_are_bounded() {
    let limits = Limits { blob_bytes: 1000, ..Limits::default() };
    let sessions = registry::Limits { uploads: 1, sessions: 3 };
    let registry = Registry::start_with(limits, |config| Config { limits: sessions, ..config });
    let large = vec![7u8; 1001];
    let path = format!("/v2/a/blobs/uploads/?digest={}", Digest::of(&large));
    let reply = registry.call("POST", &path, &[], &large);
    assert_eq!((reply.status, reply.code().as_str()), (413, "SIZE_INVALID"));
    // A body that does not say how long it is is cut where it goes too far.
    let location = registry.call("POST", "/v2/a/blobs/uploads/", &[], b"").header("location").to_owned();
    let mut stream = TcpStream::connect(registry.address).unwrap();
    let head =
        format!("PATCH {location} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    for piece in [&large[..600], &large[600..]] {
        stream.write_all(format!("{:x}\r\n", piece.len()).as_bytes()).unwrap();
        stream.write_all(piece).unwrap();
        stream.write_all(b"\r\n").unwrap();
    }
    stream.write_all(b"0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    assert_eq!(registry.call("DELETE", &location, &[], b"").status, 204);

    let begun: Vec<String> =
        (0..3).map(|_| registry.call("POST", "/v2/a/blobs/uploads/", &[], b"").header("location").to_owned()).collect();
    let refused = registry.call("POST", "/v2/a/blobs/uploads/", &[], b"");
    assert_eq!((refused.status, refused.code().as_str()), (429, "TOOMANYREQUESTS"));
    assert!(!refused.header("retry-after").is_empty());
    assert_eq!(registry.call("DELETE", &begun[0], &[], b"").status, 204);
    assert_eq!(registry.call("POST", "/v2/a/blobs/uploads/", &[], b"").status, 202);

    // One body at a time: the second waits for the first, and both arrive.
    let mut slow = TcpStream::connect(registry.address).unwrap();
    let head = format!("PATCH {} HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\nconnection: close\r\n\r\nab", begun[1]);
    slow.write_all(head.as_bytes()).unwrap();
    std::thread::scope(|scope| {
        let other = scope.spawn(|| registry.call("PATCH", &begun[2], &[], b"other"));
        slow.write_all(b"cd").unwrap();
        let mut answer = String::new();
        slow.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 202 "), "{answer}");
        assert_eq!(other.join().unwrap().header("range"), "0-4");
    });
}
