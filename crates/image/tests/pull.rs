//! Pulling from registries that behave badly: ones that ask for tokens, break connections, redirect and lie.

mod common;

use common::{Asked, Server, answer};
use image::{Credentials, Digest, Error, PullOptions, Store, silent};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// An artifact of one large blob: manifest, configuration, blob.
struct Artifact {
    manifest: Vec<u8>,
    config: Vec<u8>,
    blob: Vec<u8>,
}

fn artifact() -> Artifact {
    let blob: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    let config = b"{}".to_vec();
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": image::media::OCI_MANIFEST, "artifactType": "application/x.data",
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": Digest::of(&config), "size": config.len()},
        "layers": [{"mediaType": "application/x.data", "digest": Digest::of(&blob), "size": blob.len()}],
    });
    Artifact { manifest: manifest.to_string().into_bytes(), config, blob }
}

impl Artifact {
    fn answer(&self, asked: &Asked) -> common::Answer {
        let last = asked.path.rsplit('/').next().unwrap();
        if asked.path.contains("/manifests/") {
            return answer(200, self.manifest.clone()).with("content-type", image::media::OCI_MANIFEST);
        }
        let content = if last == Digest::of(&self.blob).to_string() { &self.blob } else { &self.config };
        match asked
            .headers
            .get("range")
            .and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok())
        {
            Some(start) => answer(206, content[start..].to_vec())
                .with("content-range", format!("bytes {start}-{}/{}", content.len() - 1, content.len())),
            None => answer(200, content.clone()),
        }
    }
}

fn pull(store: &Store, server: &Server, options: &PullOptions) -> Result<Digest, Error> {
    store.pull(&format!("{}/a/b:1", server.address), options, &silent)
}

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("images")).unwrap();
    (dir, store)
}

#[test]
fn a_broken_download_goes_on_where_it_stopped() {
    let (_dir, store) = store();
    let wanted = artifact();
    let digest = Digest::of(&wanted.manifest);
    let (blob, tries) = (Digest::of(&wanted.blob), AtomicUsize::new(0));
    let server = Server::start(move |asked| {
        let mut answer = wanted.answer(asked);
        if asked.path.contains(&blob.hex()) && tries.fetch_add(1, Ordering::Relaxed) < 2 {
            answer.cut = Some(1_000_000.min(answer.body.len()));
        }
        answer
    });
    assert_eq!(pull(&store, &server, &PullOptions::default()).unwrap(), digest);
    let ranges: Vec<_> = server.asked().iter().filter_map(|a| a.headers.get("range").cloned()).collect();
    assert_eq!(ranges.len(), 2, "{ranges:?}");
    assert_ne!(ranges[0], ranges[1]);
    assert_eq!(store.list().unwrap()[0].digest, digest);
}

#[test]
fn a_blob_that_lies_is_not_kept() {
    let (dir, store) = store();
    let wanted = artifact();
    let blob = Digest::of(&wanted.blob);
    let server = Server::start(move |asked| {
        let mut answer = wanted.answer(asked);
        if asked.path.contains(&blob.hex()) {
            answer.body[1_500_000] ^= 1;
        }
        answer
    });
    assert!(matches!(pull(&store, &server, &PullOptions::default()), Err(Error::DigestMismatch { .. })));
    assert!(store.list().unwrap().is_empty());
    assert!(store.blob_open(&blob).unwrap().is_none());
    assert_eq!(std::fs::read_dir(dir.path().join("images/partial")).unwrap().count(), 0);
}

#[test]
fn more_than_was_announced_is_refused() {
    let (_dir, store) = store();
    let wanted = artifact();
    let blob = Digest::of(&wanted.blob);
    let server = Server::start(move |asked| {
        let mut answer = wanted.answer(asked);
        if asked.path.contains(&blob.hex()) {
            answer.body.extend([0; 4096]);
        }
        answer
    });
    assert!(matches!(pull(&store, &server, &PullOptions::default()), Err(Error::SizeMismatch { .. })));
}

#[test]
fn tokens_are_asked_for_and_go_to_their_registry_only() {
    let (dir, store) = store();
    let wanted = Arc::new(artifact());
    let cdn = {
        let wanted = wanted.clone();
        Server::start(move |asked| wanted.answer(asked))
    };
    let elsewhere = cdn.address;
    let server = Server::start(move |asked| {
        let own = format!("http://{}", asked.headers["host"]);
        let authorization = asked.headers.get("authorization").map(String::as_str);
        if asked.path.starts_with("/token") {
            // user:secret
            return match authorization {
                Some("Basic dXNlcjpzZWNyZXQ=") => answer(200, r#"{"token":"t0ken"}"#),
                _ => answer(401, ""),
            };
        }
        if authorization != Some("Bearer t0ken") {
            let challenge = format!(r#"Bearer realm="{own}/token",service="s",scope="repository:a/b:pull""#);
            return answer(401, "").with("www-authenticate", challenge);
        }
        match asked.path.contains("/blobs/") {
            true => answer(307, "").with("location", format!("http://{elsewhere}{}", asked.path)),
            false => wanted.answer(asked),
        }
    });
    let refused = pull(&store, &server, &PullOptions::default()).unwrap_err();
    assert!(matches!(refused, Error::Unauthorized { .. }), "{refused}");

    let config = dir.path().join("config.json");
    std::fs::write(&config, format!(r#"{{"auths":{{"{}":{{"auth":"dXNlcjpzZWNyZXQ="}}}}}}"#, server.address)).unwrap();
    pull(&store, &server, &PullOptions { docker_config: Some(config), ..Default::default() }).unwrap();
    assert!(cdn.asked().iter().all(|a| !a.headers.contains_key("authorization")), "the token went elsewhere");
    assert!(!cdn.asked().is_empty());

    let credentials = Some(Credentials { username: "user".into(), password: "wrong".into() });
    let refused = pull(&store, &server, &PullOptions { credentials, ..Default::default() }).unwrap_err();
    assert!(matches!(refused, Error::Unauthorized { .. }), "{refused}");
    assert!(!format!("{refused:?}").contains("wrong"));
}

#[test]
fn a_large_or_strange_manifest_is_refused() {
    let (_dir, store) = store();
    let server = Server::start(|_| answer(200, vec![b' '; (4 << 20) + 1]));
    assert!(matches!(pull(&store, &server, &PullOptions::default()), Err(Error::TooLarge { .. })));
    let server = Server::start(|_| answer(200, "<html>").with("content-type", "text/html"));
    assert!(matches!(pull(&store, &server, &PullOptions::default()), Err(Error::Invalid { .. })));
    let server = Server::start(|_| answer(302, "").with("location", "/again"));
    assert!(pull(&store, &server, &PullOptions::default()).unwrap_err().to_string().contains("redirects"));
}

/// Two processes would do as two threads do here: each has its own store and its own locks.
#[test]
fn two_pullers_fetch_each_blob_once() {
    let (dir, _) = store();
    let wanted = artifact();
    let blob = Digest::of(&wanted.blob);
    let server = Server::start(move |asked| wanted.answer(asked));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let store = Store::open(dir.path().join("images")).unwrap();
                pull(&store, &server, &PullOptions::default()).unwrap();
            });
        }
    });
    assert_eq!(server.asked().iter().filter(|a| a.path.contains(&blob.hex())).count(), 1);
}

/// TLS with a certificate that a given list vouches for, and with one that none does.
#[test]
fn tls_is_checked() {
    let (dir, store) = store();
    let wanted = Arc::new(artifact());
    let made = rcgen::generate_simple_self_signed(vec!["0.0.0.0".into()]).unwrap();
    let trusted = dir.path().join("ca.pem");
    std::fs::write(&trusted, made.cert.pem()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = rustls::pki_types::PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let config = Arc::new(config);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let (config, wanted) = (config.clone(), wanted.clone());
            std::thread::spawn(move || {
                let mut connection = rustls::ServerConnection::new(config).unwrap();
                let mut tls = rustls::Stream::new(&mut connection, &mut stream);
                let mut head = Vec::new();
                let mut byte = [0u8];
                while !head.ends_with(b"\r\n\r\n") {
                    if tls.read(&mut byte).unwrap_or(0) == 0 {
                        return;
                    }
                    head.push(byte[0]);
                }
                let path = String::from_utf8_lossy(&head).split(' ').nth(1).unwrap().to_owned();
                let answer = wanted.answer(&Asked { path, headers: HashMap::new() });
                let head =
                    format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", answer.body.len());
                let _ = tls.write_all(head.as_bytes()).and_then(|()| tls.write_all(&answer.body));
                let _ = tls.flush();
                connection.send_close_notify();
                let _ = connection.write_tls(&mut stream);
            });
        }
    });
    // The address that means "this host" to the kernel, but not loopback to the client, so that it asks for TLS.
    let name = format!("0.0.0.0:{}/a/b:1", address.port());
    let untrusted = store.pull(&name, &PullOptions::default(), &silent).unwrap_err().to_string();
    assert!(untrusted.contains("TLS with") || untrusted.contains("certificate"), "{untrusted}");
    let options = PullOptions { ca_certificates: Some(trusted), ..Default::default() };
    store.pull(&name, &options, &silent).unwrap();
}

/// A mirror is a stranger: whatever it does, the image comes, and it is the right one.
#[test]
fn mirrors_that_stall_break_or_lie_are_left_for_the_next() {
    let whole = Arc::new(artifact());
    let is_blob = |asked: &Asked| asked.path.ends_with(&Digest::of(&artifact().blob).to_string());
    let of = |change: fn(&Artifact, common::Answer) -> common::Answer| {
        let image = whole.clone();
        Server::start(move |asked| {
            let answer = image.answer(asked);
            if is_blob(asked) { change(&image, answer) } else { answer }
        })
    };
    let silent_from_the_start = Server::start(|_| common::Answer { stall: true, ..answer(200, "") });
    let stalls_at_the_blob = of(|_, answer| common::Answer { stall: true, ..answer });
    let hangs_up = of(|_, answer| common::Answer { cut: Some(answer.body.len() / 2), ..answer });
    let lies = of(|image, _| answer(200, vec![7; image.blob.len()]));
    let sends_more = of(|_, mut answer| {
        answer.body.push(0);
        answer
    });
    let refuses = Server::start(|_| answer(403, "no"));
    let nonsense = Server::start(|_| answer(200, "[").with("content-type", image::media::OCI_MANIFEST));
    let huge = Server::start(|_| {
        let descriptor = format!(r#"{{"mediaType":"a/b","digest":"{}","size":9000000000000000}}"#, Digest::of(b""));
        let text = format!(r#"{{"schemaVersion":2,"config":{descriptor},"layers":[{descriptor}]}}"#);
        answer(200, text).with("content-type", image::media::OCI_MANIFEST)
    });
    let bad = [&silent_from_the_start, &stalls_at_the_blob, &hangs_up, &lies, &sends_more, &refuses, &nonsense, &huge];
    let origin = {
        let image = whole.clone();
        Server::start(move |asked| image.answer(asked))
    };
    let host = origin.address.to_string();
    let mirrors = bad.iter().map(|m| (host.clone(), m.address.to_string()));
    let options = PullOptions {
        mirrors: mirrors.chain([(host.clone(), "127.0.0.1:1/nobody".into())]).collect(),
        silence: Some(std::time::Duration::from_millis(300)),
        ..PullOptions::default()
    };
    let (_dir, store) = store();
    assert_eq!(pull(&store, &origin, &options).unwrap(), Digest::of(&whole.manifest));
    for mirror in bad {
        assert!(!mirror.asked().is_empty(), "{}", mirror.address);
    }
    assert_eq!(store.blob_read(&Digest::of(&whole.blob), 10 << 20).unwrap(), whole.blob);
    // A good one is enough, and none after it is asked.
    let (_dir, store) = self::store();
    let asked = origin.asked().len();
    let good = {
        let image = whole.clone();
        Server::start(move |asked| image.answer(asked))
    };
    let options = PullOptions { mirrors: vec![(host.clone(), format!("{}/deep/er", good.address))], ..options };
    pull(&store, &origin, &options).unwrap();
    assert!(good.asked().iter().all(|a| a.path.starts_with("/v2/deep/er/a/b/")));
    assert_eq!(origin.asked().len(), asked);
}
