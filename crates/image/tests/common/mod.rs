//! A registry that answers as a test tells it, and images for it to have.
#![allow(dead_code, reason = "each test file takes what it needs")]

use image::Digest;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// One request as a test sees it.
#[derive(Clone, Debug)]
pub struct Asked {
    pub path: String,
    pub headers: HashMap<String, String>,
}

/// What a test answers: status, headers, body, and after how many bytes of the body to hang up.
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub cut: Option<usize>,
    /// Never answer.
    pub stall: bool,
}

pub fn answer(status: u16, body: impl Into<Vec<u8>>) -> Answer {
    Answer { status, headers: Vec::new(), body: body.into(), cut: None, stall: false }
}

impl Answer {
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Answer {
        self.headers.push((name.into(), value.into()));
        self
    }
}

/// An HTTP server on loopback that answers as it is told.
pub struct Server {
    pub address: SocketAddr,
    stop: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Server {
    pub fn start(respond: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (stopped, seen, respond) = (stop.clone(), asked.clone(), Arc::new(respond));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (seen, respond) = (seen.clone(), respond.clone());
                std::thread::spawn(move || {
                    let mut reader = BufReader::new(stream);
                    let mut lines = Vec::new();
                    loop {
                        let mut line = String::new();
                        if reader.read_line(&mut line).unwrap_or(0) == 0 {
                            return;
                        }
                        match line.trim_end() {
                            "" => break,
                            line => lines.push(line.to_owned()),
                        }
                    }
                    let path = lines[0].split(' ').nth(1).unwrap().to_owned();
                    let headers = lines[1..].iter().filter_map(|l| l.split_once(": "));
                    let headers = headers.map(|(n, v)| (n.to_lowercase(), v.to_owned())).collect();
                    let asked = Asked { path, headers };
                    let answer = respond(&asked);
                    seen.lock().unwrap().push(asked);
                    if answer.stall {
                        // Until the client has enough.
                        let _ = reader.into_inner().read_to_end(&mut Vec::new());
                        return;
                    }
                    let mut head = format!("HTTP/1.1 {} X\r\nconnection: close\r\n", answer.status);
                    for (name, value) in &answer.headers {
                        head.push_str(&format!("{name}: {value}\r\n"));
                    }
                    head.push_str(&format!("content-length: {}\r\n\r\n", answer.body.len()));
                    let mut stream = reader.into_inner();
                    let _ = stream.write_all(head.as_bytes());
                    let _ = stream.write_all(&answer.body[..answer.cut.unwrap_or(answer.body.len())]);
                    if answer.cut.is_none() {
                        let _ = stream.shutdown(std::net::Shutdown::Write);
                        let _ = stream.read(&mut [0u8; 16]);
                    }
                });
            }
        });
        Server { address, stop, asked }
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = std::net::TcpStream::connect(self.address);
    }
}

pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A container image of `linux/amd64`, or whatever this machine is.
pub struct Image {
    pub manifest: Vec<u8>,
    pub blobs: HashMap<String, Vec<u8>>,
}

impl Image {
    /// `layers`: uncompressed tars.
    pub fn new(layers: &[Vec<u8>]) -> Image {
        let (mut blobs, mut descriptors, mut diff_ids) = (HashMap::new(), Vec::new(), Vec::new());
        for tar in layers {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(tar).unwrap();
            let blob = encoder.finish().unwrap();
            let digest = Digest::of(&blob).to_string();
            descriptors.push(serde_json::json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest, "size": blob.len(),
            }));
            diff_ids.push(Digest::of(tar).to_string());
            blobs.insert(digest, blob);
        }
        let host = image::Platform::host();
        let config = serde_json::json!({
            "architecture": host.architecture, "os": host.os, "config": {"Cmd": ["/a"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = serde_json::to_vec(&config).unwrap();
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "layers": descriptors,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": Digest::of(&config).to_string(), "size": config.len(),
            },
        });
        blobs.insert(Digest::of(&config).to_string(), config);
        Image { manifest: serde_json::to_vec(&manifest).unwrap(), blobs }
    }

    /// As a registry has it, ranges included.
    pub fn answer(&self, asked: &Asked) -> Answer {
        if asked.path.contains("/manifests/") {
            return answer(200, self.manifest.clone()).with("content-type", MANIFEST);
        }
        let Some(blob) = self.blobs.get(asked.path.rsplit('/').next().unwrap()) else { return answer(404, "") };
        let range = asked.headers.get("range").and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        match range {
            Some::<usize>(start) => answer(206, blob[start..].to_vec())
                .with("content-range", format!("bytes {start}-{}/{}", blob.len() - 1, blob.len())),
            None => answer(200, blob.clone()),
        }
    }
}

/// A tar of one file, which does not compress well.
pub fn tar_of(name: &str, size: usize, seed: u64) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let mut state = seed | 1;
    let content: Vec<u8> = (0..size)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u8
        })
        .collect();
    std::fs::write(dir.path().join(name), content).unwrap();
    let output = std::process::Command::new("tar").arg("-C").arg(dir.path()).args(["-cf", "-", name]).output().unwrap();
    assert!(output.status.success());
    output.stdout
}

/// What a store holds but directories and marks.
pub fn left_in(store: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for dir in ["blobs/sha256", "layers", "refs", "tmp", "uploads", "build"] {
        let entries = std::fs::read_dir(store.join(dir)).unwrap().flatten();
        found.extend(entries.map(|e| format!("{dir}/{}", e.file_name().to_string_lossy())));
    }
    found
}
