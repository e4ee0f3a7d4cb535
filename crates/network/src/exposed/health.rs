//! What a load balancer in front asks of a `healthCheckNodePort`: whether this host has endpoints of the Service. The answer
//! is kube-proxy's (`pkg/proxy/healthcheck`).

use super::Exposure;
use serde_json::json;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Bytes of a request, and how long it may take to come.
const LIMIT: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(5);

pub struct Caller {
    stream: TcpStream,
    pub deadline: Instant,
    asked: Vec<u8>,
}

impl Caller {
    /// `stream` does not block.
    pub fn new(stream: TcpStream, now: Instant) -> Caller {
        Caller { stream, deadline: now + PATIENCE, asked: Vec::new() }
    }

    pub fn socket(&self) -> &TcpStream {
        &self.stream
    }

    /// Reads what has come; answers once the request's head is whole. Whether it is over.
    pub fn advance(&mut self, exposure: &Exposure, endpoints: usize) -> io::Result<bool> {
        let mut buffer = [0; 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(true),
                Ok(length) => self.asked.extend(buffer.get(..length).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if self.asked.windows(4).any(|four| four == b"\r\n\r\n") {
                let reply = answer(exposure, endpoints, self.asked.starts_with(b"HEAD "));
                self.stream.write_all(reply.as_bytes())?;
                self.stream.shutdown(std::net::Shutdown::Write)?;
                return Ok(true);
            }
            if self.asked.len() > LIMIT {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
    }
}

fn answer(exposure: &Exposure, endpoints: usize, head_only: bool) -> String {
    let status = if endpoints > 0 { "200 OK" } else { "503 Service Unavailable" };
    let told = json!({
        "service": {"namespace": exposure.namespace, "name": exposure.name},
        "localEndpoints": endpoints,
        "serviceProxyHealthy": true,
    });
    let body = format!("{told:#}");
    let length = body.len();
    let body = if head_only { "" } else { &body };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n\
         X-Load-Balancing-Endpoint-Weight: {endpoints}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}
