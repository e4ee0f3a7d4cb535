//! The node agent: turns the pods bound to this node into sandboxes and reports back.
//!
//! Knows nothing of controllers or HTTP verbs; it sees the API through [`api::client::Client`] and workloads through
//! [`boundary::Boundary`].
#![forbid(unsafe_code)]

pub mod boundary;
