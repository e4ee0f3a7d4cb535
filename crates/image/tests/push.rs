//! Pushing, to Debian's registry and to one that misbehaves.

mod common;

use common::{Server, answer};
use image::{Digest, Error, ImportOptions, PullOptions, Store, silent};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

fn store(dir: &Path) -> Store {
    Store::open(dir.join("images")).unwrap()
}

/// `local/app:1`: a root file system of two files.
fn imported(dir: &Path) -> Option<Store> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: owners need root");
        return None;
    }
    let tar = dir.join("root.tar");
    std::fs::write(&tar, common::tar_of("program", 1_500_000, 3)).unwrap();
    let store = store(dir);
    let options = ImportOptions { tag: Some("local/app:1".into()), cmd: vec!["/program".into()], ..Default::default() };
    store.import(&tar, &options, &silent).unwrap();
    Some(store)
}

struct Registry {
    child: Child,
    address: String,
}

impl Registry {
    fn start(dir: &Path) -> Option<Registry> {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let config = dir.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: {free}}}\n",
            dir.join("registry").display()
        );
        std::fs::write(&config, text).unwrap();
        let quiet = || Stdio::null();
        let mut child =
            Command::new("docker-registry").arg("serve").arg(&config).stdout(quiet()).stderr(quiet()).spawn().ok()?;
        while std::net::TcpStream::connect(free).is_err() {
            assert!(child.try_wait().unwrap().is_none(), "docker-registry ended");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(Registry { child, address: free.to_string() })
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn round_trip_with_another_registry() {
    let dir = tempfile::tempdir().unwrap();
    let Some(store) = imported(dir.path()) else { return };
    let Some(registry) = Registry::start(dir.path()) else {
        println!("SKIPPED: docker-registry is not installed");
        return;
    };
    let options = PullOptions::default();
    let push = |image: &str, target: &str| {
        let said = Mutex::new(Vec::new());
        let digest =
            store.push(image, Some(target), &options, &|p| said.lock().unwrap().push(format!("{p:?}"))).unwrap();
        let said = said.into_inner().unwrap().join("\n");
        (digest, said.matches("is there already").count(), said.matches("mounted").count())
    };
    let first = format!("{}/team/app:1", registry.address);
    let (digest, there, mounted) = push("local/app:1", &first);
    assert_eq!((there, mounted), (0, 0));
    assert_eq!(push("local/app:1", &first), (digest, 2, 0), "what is there is not sent again");
    // Known to be in another repository of the same registry by the name it has here.
    store.tag("local/app:1", &first).unwrap();
    assert_eq!(push("local/app:1", &format!("{}/other/app:2", registry.address)), (digest, 0, 2));
    let elsewhere = tempfile::tempdir().unwrap();
    let other = self::store(elsewhere.path());
    let pulled = other.pull(&format!("{}/other/app:2", registry.address), &options, &silent).unwrap();
    assert_eq!(pulled, digest);
    let by_digest = format!("{}/team/app@{digest}", registry.address);
    assert_eq!(other.pull(&by_digest, &options, &silent).unwrap(), digest);
}

#[test]
fn refusals_and_silence_end_a_push() {
    let dir = tempfile::tempdir().unwrap();
    let Some(store) = imported(dir.path()) else { return };
    let push = |server: &Server, silence: u64| {
        let options = PullOptions { silence: Some(Duration::from_millis(silence)), ..Default::default() };
        store.push("local/app:1", Some(&format!("{}/a:1", server.address)), &options, &silent).unwrap_err()
    };
    let denied = Server::start(|_| answer(403, "not you"));
    assert!(matches!(push(&denied, 60_000), Error::Unauthorized { status: 403, .. }));
    let lost = Server::start(|asked| match asked.path.contains("uploads") {
        true => answer(202, ""),
        false => answer(404, ""),
    });
    assert!(push(&lost, 60_000).to_string().contains("Location"));
    let silent_one = Server::start(|asked| {
        if asked.path.contains("/take/") {
            let mut never = answer(200, "");
            never.stall = true;
            return never;
        }
        match asked.path.contains("uploads") {
            true => answer(202, "").with("location", "/take/it"),
            false => answer(404, ""),
        }
    });
    assert!(push(&silent_one, 100).to_string().contains("took nothing"));
    let other = Digest::of(b"something else");
    let liar = Server::start(move |_| answer(201, "").with("docker-content-digest", other.to_string()));
    // It says 201 to everything: nothing of that is what was asked.
    assert!(matches!(push(&liar, 60_000), Error::Refused { .. } | Error::Registry { .. }));
    assert!(matches!(
        store.push("local/app:1", Some("no-host:1"), &PullOptions::default(), &silent),
        Err(Error::InvalidReference { .. })
    ));
}
