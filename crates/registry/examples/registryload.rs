//! A parallel loader for any registry that speaks the distribution spec without credentials. `bench/registry.py` runs it.
//!
//! registryload ADDRESS get|head|pull|push|push-small SECONDS CONNECTIONS [BYTES]: prints JSON with requests (or blobs) and bytes
//! a second.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// docker-registry gives an OCI manifest to no one who does not ask for one.
const ACCEPT: &str = "accept: application/vnd.oci.image.manifest.v1+json\r\n";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, what, seconds, connections, rest @ ..] = arguments.as_slice() else {
        eprintln!("usage: load ADDRESS get|head|pull|push|push-small SECONDS CONNECTIONS [BYTES]");
        std::process::exit(2);
    };
    let number = |text: &str| text.parse::<usize>().unwrap_or_else(|_| panic!("{text:?} is not a number"));
    let size = rest.first().map_or(64 << 20, |b| number(b));
    let run = Run { address, repository: "bench/load", size };
    let done = run.measure(what, number(seconds) as u64, number(connections)).expect("the registry answers");
    println!("{done}");
}

struct Run<'a> {
    address: &'a str,
    repository: &'a str,
    size: usize,
}

impl Run<'_> {
    fn measure(&self, what: &str, seconds: u64, connections: usize) -> io::Result<String> {
        let mut first = Client::connect(self.address)?;
        let config = first.push(self.repository, b"{}")?;
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":2}},"layers":[]}}"#
        );
        let media = "content-type: application/vnd.oci.image.manifest.v1+json\r\n";
        let path = format!("/v2/{}/manifests/1", self.repository);
        first.expect("PUT", &path, media, manifest.as_bytes(), 201)?;
        let blob = match what {
            "pull" => first.push(self.repository, &content(self.size, 0))?,
            _ => config,
        };
        let blob_path = format!("/v2/{}/blobs/{blob}", self.repository);
        let blobs = match what {
            // What is to be pushed is made before the clock runs.
            "push" => Some(prepared((1 << 30) / self.size, self.size)),
            "push-small" => Some(prepared(20_000, self.size)),
            _ => None,
        };
        let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
        let waiting = Mutex::new(blobs.unwrap_or_default());
        let begun = Instant::now();
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..connections)
                .map(|_| {
                    scope.spawn(|| -> io::Result<()> {
                        let mut client = Client::connect(self.address)?;
                        while !stop.load(Ordering::Relaxed) {
                            match what {
                                "get" => client.expect("GET", &path, ACCEPT, b"", 200)?,
                                "head" => client.expect("HEAD", &blob_path, "", b"", 200)?,
                                "pull" => client.expect("GET", &blob_path, "", b"", 200)?,
                                _ => {
                                    let next = waiting.lock().expect("no panic").pop();
                                    let Some((content, digest)) = next else { return Ok(()) };
                                    client.push_as(self.repository, &content, &digest)?;
                                }
                            }
                            count.fetch_add(1, Ordering::Relaxed);
                        }
                        Ok(())
                    })
                })
                .collect();
            let timer = scope.spawn(|| {
                let end = begun + Duration::from_secs(seconds);
                while Instant::now() < end && !stop.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(5));
                }
                stop.store(true, Ordering::Relaxed);
            });
            let results: Vec<_> = all.into_iter().map(|t| t.join().expect("no panic")).collect();
            stop.store(true, Ordering::Relaxed);
            timer.join().expect("no panic");
            results.into_iter().collect::<io::Result<Vec<()>>>()
        })?;
        let took = begun.elapsed().as_secs_f64();
        let done = count.load(Ordering::Relaxed) as f64;
        let each = if matches!(what, "get" | "head") { 0.0 } else { self.size as f64 };
        Ok(format!(
            r#"{{"what":"{what}","connections":{connections},"per_second":{:.1},"mib_per_second":{:.1}}}"#,
            done / took,
            done * each / took / 1048576.0
        ))
    }
}

fn content(size: usize, number: u64) -> Vec<u8> {
    let mut seed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = vec![0u8; size];
    for chunk in bytes.chunks_mut(8) {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        chunk.copy_from_slice(&seed.to_le_bytes()[..chunk.len()]);
    }
    bytes
}

/// Blobs no registry has seen: they begin with the time.
fn prepared(count: usize, size: usize) -> Vec<(Vec<u8>, String)> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    let blob = |number| {
        let bytes = content(size, now.wrapping_add(number));
        let digest = image::Digest::of(&bytes).to_string();
        (bytes, digest)
    };
    (0..count as u64).map(blob).collect()
}

struct Client {
    stream: BufReader<TcpStream>,
    host: String,
    buffer: Vec<u8>,
}

impl Client {
    fn connect(address: &str) -> io::Result<Client> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        Ok(Client {
            stream: BufReader::with_capacity(256 * 1024, stream),
            host: address.to_owned(),
            buffer: vec![0; 256 * 1024],
        })
    }

    fn push(&mut self, repository: &str, content: &[u8]) -> io::Result<String> {
        let digest = image::Digest::of(content).to_string();
        self.push_as(repository, content, &digest)?;
        Ok(digest)
    }

    /// As docker, podman and skopeo do: POST, PATCH with all of it, PUT.
    fn push_as(&mut self, repository: &str, content: &[u8], digest: &str) -> io::Result<()> {
        let begun = self.call("POST", &format!("/v2/{repository}/blobs/uploads/"), "", b"")?;
        let location = self.local(&begun.location);
        let octets = "content-type: application/octet-stream\r\n";
        let sent = self.call("PATCH", &location, octets, content)?;
        let location = self.local(&sent.location);
        let separator = if location.contains('?') { '&' } else { '?' };
        self.expect("PUT", &format!("{location}{separator}digest={digest}"), "", b"", 201)
    }

    fn local(&self, location: &str) -> String {
        location.strip_prefix(&format!("http://{}", self.host)).unwrap_or(location).to_owned()
    }

    fn expect(&mut self, method: &str, path: &str, headers: &str, body: &[u8], status: u16) -> io::Result<()> {
        let answer = self.call(method, path, headers, body)?;
        if answer.status == status {
            return Ok(());
        }
        Err(io::Error::other(format!("{method} {path}: {}", answer.status)))
    }

    fn call(&mut self, method: &str, path: &str, headers: &str, body: &[u8]) -> io::Result<Answer> {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\n{headers}content-length: {}\r\n\r\n",
            self.host,
            body.len()
        );
        self.stream.get_mut().write_all(head.as_bytes())?;
        self.stream.get_mut().write_all(body)?;
        let mut answer = Answer { status: 0, location: String::new() };
        let (mut left, mut line) = (0u64, String::new());
        loop {
            line.clear();
            if self.stream.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let text = line.trim_end();
            if text.is_empty() {
                break;
            }
            if answer.status == 0 {
                answer.status = text.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
            } else if let Some((name, value)) = text.split_once(": ") {
                match name.to_ascii_lowercase().as_str() {
                    "content-length" => left = value.parse().map_err(io::Error::other)?,
                    "location" => answer.location = value.to_owned(),
                    _ => {}
                }
            }
        }
        while left > 0 && method != "HEAD" {
            let wanted = self.buffer.len().min(left as usize);
            let read = self.stream.read(&mut self.buffer[..wanted])?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            left -= read as u64;
        }
        Ok(answer)
    }
}

struct Answer {
    status: u16,
    location: String,
}
