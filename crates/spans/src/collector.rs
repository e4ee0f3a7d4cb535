//! Where spans go: the URL of a collector, and one request to it.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

/// OTLP over HTTP listens there.
const PORT: u16 = 4318;
const PATH: &str = "/v1/traces";
const CONNECT: Duration = Duration::from_secs(3);
const ANSWER: Duration = Duration::from_secs(10);
/// Of an answer, whose first line says all.
const READ: u64 = 4096;

/// A collector's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collector {
    host: String,
    port: u16,
    path: String,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    #[error("{0:?}: a collector is named as http://HOST[:PORT][/PATH]")]
    Form(String),
    #[error("{0:?}: spans are sent over http only; a collector on this machine can send them on with TLS")]
    Tls(String),
}

impl Collector {
    /// `http://HOST[:PORT][/PATH]`; 4318 and `/v1/traces` if left out.
    pub fn parse(url: &str) -> Result<Collector, Invalid> {
        let form = || Invalid::Form(url.to_owned());
        if url.starts_with("https://") {
            return Err(Invalid::Tls(url.to_owned()));
        }
        let rest = url.strip_prefix("http://").ok_or_else(form)?;
        let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
        let (host, port) = match authority.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
            Some((address, "")) => (address, None),
            Some((address, port)) => (address, Some(port.strip_prefix(':').ok_or_else(form)?)),
            None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
        };
        let port = port.map_or(Some(PORT), |port| port.parse().ok().filter(|port| *port > 0)).ok_or_else(form)?;
        let fine = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:".contains(&byte);
        let clean = |byte: u8| byte.is_ascii_graphic() && !b"?#".contains(&byte);
        if host.is_empty() || !host.bytes().all(fine) || !path.bytes().all(clean) {
            return Err(form());
        }
        let path = if matches!(path, "" | "/") { PATH } else { path };
        Ok(Collector { host: host.to_owned(), port, path: path.to_owned() })
    }

    pub(crate) fn name(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// Sends one batch on a connection of its own; the status of the answer.
    pub(crate) fn post(&self, body: &[u8]) -> io::Result<u16> {
        let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        let mut connected = None;
        for address in (self.host.as_str(), self.port).to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, CONNECT) {
                Ok(stream) => {
                    connected = Some(stream);
                    break;
                }
                Err(error) => failed = error,
            }
        }
        let Some(mut stream) = connected else { return Err(failed) };
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        let head = format!(
            "POST {} HTTP/1.1\r\nhost: {}\r\nuser-agent: atoll/{}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\nconnection: close\r\n\r\n",
            self.path,
            self.name(),
            env!("CARGO_PKG_VERSION"),
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(body)?;
        let mut answer = Vec::new();
        let mut limited = stream.take(READ);
        let mut piece = [0u8; 512];
        // Not to its end: a collector may be slow to close.
        while !answer.windows(2).any(|pair| pair == b"\r\n") {
            match limited.read(&mut piece)? {
                0 => break,
                read => answer.extend_from_slice(piece.get(..read).unwrap_or_default()),
            }
        }
        status(&answer).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "an answer that is not HTTP"))
    }
}

fn status(answer: &[u8]) -> Option<u16> {
    let line = answer.split(|byte| *byte == b'\r').next()?;
    let line = std::str::from_utf8(line).ok()?.strip_prefix("HTTP/1.")?;
    line.split(' ').nth(1)?.parse().ok().filter(|code| (100..600).contains(code))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn urls_of_collectors() {
        let read = |url: &str| Collector::parse(url).map(|c| (c.host.clone(), c.port, c.path));
        let good = |host: &str, port: u16, path: &str| Ok((host.to_owned(), port, path.to_owned()));
        assert_eq!(read("http://127.0.0.1"), good("127.0.0.1", 4318, "/v1/traces"));
        assert_eq!(read("http://otel.example:9/"), good("otel.example", 9, "/v1/traces"));
        assert_eq!(read("http://[::1]:4319/in/traces"), good("::1", 4319, "/in/traces"));
        assert!(read("https://x").unwrap_err().to_string().contains("over http only"));
        for bad in [
            "",
            "x:1",
            "http://",
            "http://:4",
            "http://a:0",
            "http://a:x",
            "http://a/ b",
            "http://[::1]x",
            "http://a\r\nb",
        ] {
            assert!(matches!(read(bad), Err(Invalid::Form(_))), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn answers_and_urls_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..60), url in "http://\\PC{0,40}") {
            let _ = status(&bytes);
            let _ = Collector::parse(&url);
        }
    }
}
