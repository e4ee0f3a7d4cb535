//! Settings and limits of the gateway.

use crate::access::Format as AccessFormat;
use crate::activator::Inside;
use api::demand::Demand;
use std::fmt;
use std::io::Write;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

/// How the gateway listens and what it bounds. [`Config::new`] has sensible values for all but the socket.
#[derive(Debug)]
pub struct Config {
    /// Bound by the caller (in the host's network namespace); one address serves all Gateways' HTTP listeners.
    pub listener: TcpListener,
    /// Another one for HTTP, whose clients say nothing by PROXY protocol: the node's own.
    pub inner_listener: Option<TcpListener>,
    /// Where workloads' connections to Services that may sleep arrive.
    pub inside: Option<Inside>,
    /// The same for HTTPS and TLS listeners.
    pub tls_listener: Option<TcpListener>,
    /// Every client connection begins with a PROXY protocol header: a load balancer is in front.
    pub proxy_protocol: bool,
    /// Where the counters are told to Prometheus.
    pub metrics_listener: Option<TcpListener>,
    /// Where a line for each request goes.
    pub access_log: Option<AccessSink>,
    /// The node that this is, for the hints of endpoints.
    pub node: String,
    /// Gateways whose `gatewayClassName` is this are served.
    pub class: String,
    /// Bytes of a request's head.
    pub max_head: usize,
    /// What requests want of Services, for who scales them.
    pub demand: Arc<Demand>,
    /// Header lines of a request.
    pub max_headers: usize,
    /// Client connections at a time; further ones wait in the kernel's queue.
    pub max_connections: usize,
    /// Concurrent streams of one HTTP/2 client.
    pub max_streams: u32,
    /// How long a client may take to send a request's head, and may keep a connection idle.
    pub head_timeout: Duration,
    /// How long a client may take to finish the TLS handshake and say who it is.
    pub handshake_timeout: Duration,
    /// How long a client may send nothing of a body, or take nothing of an answer.
    pub body_timeout: Duration,
    pub connect_timeout: Duration,
    /// How long an unused connection to an endpoint is kept.
    pub upstream_idle: Duration,
    /// How long requests in flight may take to end after shutdown began.
    pub drain: Duration,
}

/// What access log lines are written to, and how.
pub struct AccessSink {
    pub format: AccessFormat,
    pub out: Box<dyn Write + Send>,
}

impl fmt::Debug for AccessSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccessSink").field("format", &self.format).finish_non_exhaustive()
    }
}

impl Config {
    pub fn new(listener: TcpListener) -> Config {
        Config {
            listener,
            inner_listener: None,
            inside: None,
            tls_listener: None,
            proxy_protocol: false,
            metrics_listener: None,
            access_log: None,
            node: String::new(),
            class: "atoll".to_owned(),
            max_head: 64 << 10,
            demand: Arc::default(),
            max_headers: 100,
            max_connections: 16 << 10,
            max_streams: 128,
            head_timeout: Duration::from_secs(60),
            handshake_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(60),
            connect_timeout: Duration::from_secs(3),
            upstream_idle: Duration::from_secs(60),
            drain: Duration::from_secs(30),
        }
    }
}
