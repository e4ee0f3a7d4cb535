//! What the network is asked through the API: questions, and answers as lines of JSON. The node agent implements it.

use crate::status::StatusResult;
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use serde::{Deserialize, Serialize};

/// Where the API serves it: `explanations`, `refusals`, `connections`, `namespaces/NAMESPACE/pods/POD/capture`.
pub const GROUP: &str = "subresources.atoll.dev";
pub const VERSION: &str = "v1alpha1";

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    /// Whether a connection passes, and why.
    Explain { from: String, to: String, protocol: String, port: Option<u16> },
    /// What was refused.
    Log { follow: bool },
    /// All connections with what they have carried.
    Connections,
    /// A workload's frames; those with this port, so many.
    Capture { namespace: String, pod: String, port: Option<u16>, count: Option<u64> },
}

/// One way that a connection may go; a Service has one for each endpoint.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Explained {
    pub from: String,
    pub to: String,
    pub protocol: String,
    pub port: Option<u16>,
    pub allowed: bool,
    /// Why the source's side lets it out, or not.
    pub egress: String,
    /// Why the destination's side lets it in, or not.
    pub ingress: String,
}

/// A refused packet.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Told {
    /// Milliseconds since 1970.
    pub at: u64,
    pub from: String,
    pub to: String,
    pub protocol: String,
    pub port: u16,
    pub why: String,
}

/// A tracked connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Connection {
    pub from: String,
    pub from_port: u16,
    pub to: String,
    pub port: u16,
    pub protocol: String,
    /// There, and back.
    pub packets: [u64; 2],
    pub bytes: [u64; 2],
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Frame {
    /// Nanoseconds since 1970.
    pub at: u64,
    /// Base64.
    pub bytes: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Answer {
    Explained(Explained),
    Refused(Told),
    Connection(Connection),
    /// Frames are captured from now on.
    Capturing,
    Frame(Frame),
    /// It ends here, and why.
    Error(String),
}

/// A line for each [`Answer`]; what goes on ends when it is dropped.
pub type Lines = BoxStream<'static, std::io::Result<Bytes>>;

#[async_trait]
pub trait Inspect: Send + Sync + 'static {
    async fn ask(&self, question: Question) -> StatusResult<Lines>;
}
