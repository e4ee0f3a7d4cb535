//! Registries that are slow, break, lie or want too much: a clear error or the image in the end, and nothing half done.

mod common;

use common::{Asked, INDEX, Image, Server, answer, left_in, tar_of};
use image::{Digest, Error, GcOptions, Kind, Limits, PullOptions, Store, silent};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

struct Bench {
    dir: tempfile::TempDir,
    store: Store,
}

fn bench() -> Option<Bench> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: owners need root");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("images")).unwrap();
    Some(Bench { dir, store })
}

impl Bench {
    fn pull(&self, server: &Server, options: &PullOptions) -> Result<Digest, Error> {
        self.store.pull(&format!("{}/a/b:1", server.address), options, &silent)
    }

    fn left(&self) -> Vec<String> {
        left_in(&self.dir.path().join("images"))
    }

    #[track_caller]
    fn refusal(&self, server: &Server, options: &PullOptions) -> Error {
        let error = self.pull(server, options).unwrap_err();
        let left: Vec<String> = self.left().into_iter().filter(|n| !n.starts_with("blobs/")).collect();
        assert_eq!(left, [""; 0], "{error}");
        error
    }

    #[track_caller]
    fn is_whole(&self, server: &Server, layers: usize) {
        let resolved = self.store.resolve(&format!("{}/a/b:1", server.address)).unwrap();
        let Kind::Container { layers: dirs, .. } = resolved.kind else { panic!() };
        assert_eq!(dirs.len(), layers);
        for (n, dir) in dirs.iter().enumerate() {
            assert_eq!(std::fs::metadata(dir.join(format!("f{n}"))).unwrap().len(), 700_000);
        }
        assert!(!self.left().iter().any(|n| n.starts_with("tmp/")), "{:?}", self.left());
    }
}

fn three_layers() -> Image {
    Image::new(&(0..3).map(|n| tar_of(&format!("f{n}"), 700_000, n)).collect::<Vec<_>>())
}

fn is_blob(asked: &Asked) -> bool {
    asked.path.contains("/blobs/")
}

#[test]
fn layers_are_unpacked_through_breaks() {
    let Some(b) = bench() else { return };
    let (image, tries) = (three_layers(), AtomicUsize::new(0));
    let server = Server::start(move |asked| {
        let mut given = image.answer(asked);
        // Every second answer breaks off, wherever it began.
        if is_blob(asked) && given.body.len() > 10_000 && tries.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
            given.cut = Some(given.body.len() / 2);
        }
        given
    });
    b.pull(&server, &PullOptions::default()).unwrap();
    b.is_whole(&server, 3);
    assert!(server.asked().iter().any(|a| a.headers.contains_key("range")));
}

#[test]
fn one_that_starts_over_instead_of_going_on_is_fine_too() {
    let Some(b) = bench() else { return };
    let (image, tries) = (three_layers(), AtomicUsize::new(0));
    let server = Server::start(move |asked| {
        let mut whole = asked.clone();
        whole.headers.remove("range");
        let mut given = image.answer(&whole);
        if is_blob(asked) && given.body.len() > 10_000 && tries.fetch_add(1, Ordering::Relaxed) < 2 {
            given.cut = Some(300_000);
        }
        given
    });
    b.pull(&server, &PullOptions::default()).unwrap();
    b.is_whole(&server, 3);
}

#[test]
fn a_layer_that_lies_is_seen_by_nobody() {
    let Some(b) = bench() else { return };
    let image = three_layers();
    let server = Server::start(move |asked| {
        let mut given = image.answer(asked);
        if is_blob(asked) && given.body.len() > 10_000 {
            // In the checksum at its end: all of it unpacks well before that is noticed.
            let last = given.body.len() - 5;
            given.body[last] ^= 1;
        }
        given
    });
    assert!(matches!(b.refusal(&server, &PullOptions::default()), Error::DigestMismatch { .. }));
}

#[test]
fn failures_pass_and_refusals_do_not() {
    let Some(b) = bench() else { return };
    let (image, tries) = (three_layers(), AtomicUsize::new(0));
    let server = Server::start(move |asked| match tries.fetch_add(1, Ordering::Relaxed) {
        0 => answer(503, "later"),
        1 => answer(429, "slowly"),
        _ => image.answer(asked),
    });
    b.pull(&server, &PullOptions::default()).unwrap();
    b.is_whole(&server, 3);
    let server = Server::start(|_| answer(400, "no such thing"));
    assert!(matches!(b.pull(&server, &PullOptions::default()), Err(Error::Refused { status: 400, .. })));
    assert_eq!(server.asked().len(), 1, "it was asked again");
}

#[test]
fn silence_ends() {
    let Some(b) = bench() else { return };
    let silence = Some(Duration::from_millis(50));
    let server = Server::start(|_| {
        let mut given = answer(200, "");
        given.stall = true;
        given
    });
    let error = b.refusal(&server, &PullOptions { silence, ..Default::default() });
    assert!(error.to_string().contains("no answer for"), "{error}");
    // One that stalls in the middle of a blob, once.
    let (image, tries) = (three_layers(), AtomicUsize::new(0));
    let server = Server::start(move |asked| {
        let mut given = image.answer(asked);
        given.stall = is_blob(asked) && tries.fetch_add(1, Ordering::Relaxed) == 0;
        given
    });
    b.pull(&server, &PullOptions { silence: Some(Duration::from_secs(2)), ..Default::default() }).unwrap();
    b.is_whole(&server, 3);
}

#[test]
fn mirrors_are_asked_first_and_trusted_with_nothing() {
    let Some(b) = bench() else { return };
    let origin = {
        let image = three_layers();
        Server::start(move |asked| image.answer(asked))
    };
    let host = origin.address.to_string();
    let with = |mirrors: &[String]| PullOptions {
        mirrors: mirrors.iter().map(|m| (host.clone(), m.clone())).collect(),
        credentials: Some(image::Credentials { username: "u".into(), password: "p".into() }),
        ..Default::default()
    };
    let missing = Server::start(|_| answer(404, ""));
    let lying = {
        let image = three_layers();
        Server::start(move |asked| {
            let mut given = image.answer(asked);
            if is_blob(asked) {
                given.body[20] ^= 1;
            }
            given
        })
    };
    b.pull(&origin, &with(&[missing.address.to_string(), lying.address.to_string()])).unwrap();
    b.is_whole(&origin, 3);
    assert!(!missing.asked().is_empty() && !lying.asked().is_empty());
    let fresh = bench().unwrap();
    let mirror = {
        let image = three_layers();
        Server::start(move |asked| image.answer(asked))
    };
    let before = origin.asked().len();
    fresh.pull(&origin, &with(&[format!("{}/copies", mirror.address)])).unwrap();
    fresh.is_whole(&origin, 3);
    assert_eq!(origin.asked().len(), before);
    assert!(
        mirror
            .asked()
            .iter()
            .all(|a| a.path.starts_with("/v2/copies/a/b/") && !a.headers.contains_key("authorization"))
    );
}

#[test]
fn manifests_that_name_themselves_or_too_much() {
    let Some(b) = bench() else { return };
    // An index that says it is its own child: no digest is that of a text with the digest in it.
    let child = |digest: &str, size: usize| {
        let platform = image::Platform::host();
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{{"mediaType":"{INDEX}","digest":"{digest}","size":{size},"platform":{{"os":"{}","architecture":"{}"}}}}]}}"#,
            platform.os, platform.architecture
        )
    };
    let own = child(&Digest::of(b"me").to_string(), 1);
    let server = Server::start(move |_| answer(200, own.clone()).with("content-type", INDEX));
    assert!(matches!(b.refusal(&server, &PullOptions::default()), Error::DigestMismatch { .. }));
    // An index within an index.
    let inner = child(&Digest::of(b"x").to_string(), 1);
    let outer = child(&Digest::of(inner.as_bytes()).to_string(), inner.len());
    let server = Server::start(move |asked| {
        let text = if asked.path.contains("sha256") { &inner } else { &outer };
        answer(200, text.clone()).with("content-type", INDEX)
    });
    assert!(b.refusal(&server, &PullOptions::default()).to_string().contains("index within an index"));
    let image = Image::new(&vec![tar_of("f", 10, 1); 10_000]);
    let server = Server::start(move |asked| image.answer(asked));
    assert!(b.refusal(&server, &PullOptions::default()).to_string().contains("more than 500 layers"));
    assert_eq!(server.asked().len(), 1, "layers were fetched");
}

#[test]
fn bombs_are_defused_on_their_way() {
    let Some(b) = bench() else { return };
    let mut tar = tar_of("small", 100, 1);
    tar.truncate(1024);
    tar.extend(vec![0u8; 8 << 20]);
    let limits = Limits { ratio_floor: 1 << 20, ratio: 20, ..Limits::default() };
    let b = Bench { store: Store::open(b.dir.path().join("images")).unwrap().with_limits(limits), dir: b.dir };
    let image = Image::new(&[tar]);
    let server = Server::start(move |asked| image.answer(asked));
    let error = b.pull(&server, &PullOptions::default()).unwrap_err();
    assert!(error.to_string().contains("decompression bomb"), "{error}");
    let left = b.left();
    assert!(!left.iter().any(|n| n.starts_with("tmp/") || n.starts_with("layers/")), "{left:?}");
}

/// Collections beside pulls take nothing that is on its way or was pulled.
#[test]
fn garbage_is_taken_while_images_come() {
    let Some(b) = bench() else { return };
    let images: Vec<Image> = (0..6)
        .map(|i| Image::new(&(0..3).map(|n| tar_of(&format!("f{n}"), 700_000, i * 10 + n)).collect::<Vec<_>>()))
        .collect();
    let server = Server::start(move |asked| {
        let name = asked.path.split('/').nth(2).and_then(|n| n.strip_prefix('i')?.parse::<usize>().ok());
        match name.and_then(|n| images.get(n)) {
            Some(image) => image.answer(asked),
            None => answer(404, ""),
        }
    });
    let left = AtomicUsize::new(3);
    std::thread::scope(|scope| {
        for worker in 0..3 {
            let (b, server, left) = (&b, &server, &left);
            scope.spawn(move || {
                for image in [worker, worker + 3] {
                    let name = format!("{}/i{image}/x:1", server.address);
                    b.store.pull(&name, &PullOptions::default(), &silent).unwrap();
                    let Kind::Container { layers, .. } = b.store.resolve(&name).unwrap().kind else { panic!() };
                    assert!(layers.iter().enumerate().all(|(n, dir)| dir.join(format!("f{n}")).exists()));
                }
                left.fetch_sub(1, Ordering::Relaxed);
            });
        }
        let options = GcOptions {
            untagged: Duration::ZERO,
            unfinished: Duration::from_secs(20),
            image_bytes: Some(0),
            build_bytes: 0,
            ..GcOptions::default()
        };
        while left.load(Ordering::Relaxed) > 0 {
            b.store.gc(&options).unwrap();
        }
    });
    assert_eq!(b.store.list().unwrap().len(), 6);
    let at_once = Duration::ZERO;
    let all = GcOptions {
        grace: at_once,
        untagged: at_once,
        unfinished: at_once,
        image_bytes: Some(0),
        ..GcOptions::default()
    };
    assert_eq!(b.store.gc(&all).unwrap().images, 6);
    assert_eq!(b.left(), [""; 0]);
}
