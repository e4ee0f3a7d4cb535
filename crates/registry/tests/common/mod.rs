//! A registry on a loopback port of its own and a plain HTTP client.
#![allow(dead_code, reason = "each test program uses its part")]

use image::Store;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;

pub struct Registry {
    pub dir: tempfile::TempDir,
    pub store: Arc<Store>,
    pub address: SocketAddr,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Registry {
    pub fn start() -> Registry {
        Registry::start_with(image::Limits::default(), |config| config)
    }

    pub fn start_with(limits: image::Limits, configure: impl FnOnce(registry::Config) -> registry::Config) -> Registry {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let store =
            Store::open(dir.path().join("images")).unwrap().with_local_hosts([address.to_string()]).with_limits(limits);
        let store = Arc::new(store);
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let config = configure(registry::Config::new(listener, store.clone()));
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime
                .block_on(registry::serve(config, async {
                    let _ = stopped.await;
                }))
                .unwrap();
        });
        Registry { dir, store, address, stop: Some(stop), thread: Some(thread) }
    }

    pub fn exchange(&self, sent: &[u8]) -> Vec<u8> {
        self.client().exchange(sent)
    }

    pub fn client(&self) -> Client {
        Client { address: self.address }
    }

    pub fn call(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        self.client().call(method, path, headers, body)
    }

    pub fn get(&self, path: &str) -> Reply {
        self.client().get(path)
    }

    /// Pushes a blob in one piece and gives its digest.
    pub fn push_blob(&self, name: &str, content: &[u8]) -> String {
        let digest = image::Digest::of(content).to_string();
        let reply = self.call("POST", &format!("/v2/{name}/blobs/uploads/?digest={digest}"), &[], content);
        assert_eq!(reply.status, 201, "{reply:?}");
        digest
    }

    /// Pushes an image of one small layer; gives the manifest's text.
    pub fn push_image(&self, name: &str, tag: &str, config: &str, layer: &[u8]) -> String {
        let (c, l) = (self.push_blob(name, config.as_bytes()), self.push_blob(name, layer));
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": image::media::OCI_MANIFEST,
            "config": {"mediaType": image::media::OCI_CONFIG, "digest": c, "size": config.len()},
            "layers": [{"mediaType": image::media::OCI_LAYER, "digest": l, "size": layer.len()}],
        })
        .to_string();
        let reply = self.put_manifest(name, tag, &manifest);
        assert_eq!(reply.status, 201, "{reply:?}");
        manifest
    }

    pub fn put_manifest(&self, name: &str, reference: &str, manifest: &str) -> Reply {
        let headers = [("content-type", image::media::OCI_MANIFEST)];
        self.call("PUT", &format!("/v2/{name}/manifests/{reference}"), &headers, manifest.as_bytes())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A plain HTTP client, a connection for each request.
pub struct Client {
    pub address: SocketAddr,
}

impl Client {
    /// Everything that comes back for what is sent.
    pub fn exchange(&self, sent: &[u8]) -> Vec<u8> {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.write_all(sent).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        answer
    }

    pub fn call(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        self.try_call(method, path, headers, body).expect("an answer")
    }

    /// `None` if no whole answer came.
    pub fn try_call(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Option<Reply> {
        let mut stream = TcpStream::connect(self.address).ok()?;
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n", self.address);
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
        stream.write_all(head.as_bytes()).ok()?;
        // The server may refuse a body it has not read.
        let _ = stream.write_all(body);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        Reply::parse(&answer)
    }

    pub fn get(&self, path: &str) -> Reply {
        self.call("GET", path, &[], b"")
    }
}

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    fn parse(bytes: &[u8]) -> Option<Reply> {
        let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&bytes[..end]);
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers = lines.filter_map(|l| l.split_once(": ")).map(|(n, v)| (n.to_lowercase(), v.to_owned())).collect();
        Some(Reply { status, headers, body: bytes[end + 4..].to_vec() })
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(n, _)| n == name).map_or("", |(_, v)| v)
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    pub fn code(&self) -> String {
        self.json()["errors"][0]["code"].as_str().unwrap_or_default().to_owned()
    }
}

/// An empty tar and the configuration of an image that has it as its only layer.
pub fn small_image(variable: &str) -> (Vec<u8>, String) {
    let layer = vec![0u8; 1024];
    let diff_id = image::Digest::of(&layer);
    let config = serde_json::json!({
        "architecture": image::Platform::host().architecture, "os": "linux",
        "config": {"Cmd": ["/bin/x"], "Env": [format!("V={variable}")]},
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
    });
    (layer, config.to_string())
}
