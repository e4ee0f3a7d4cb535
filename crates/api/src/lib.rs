//! The vocabulary of Atoll: resource kinds, their schemas, defaults, validation and printed columns, and how rooms
//! talk to the API ([`client::Client`]), to running pods ([`streams::PodStreams`]), of the network ([`inspect::Inspect`]), of requests ([`demand::Demand`]) and of what they
//! count ([`metrics::Source`]).
//!
//! Knows nothing of HTTP, storage or runtimes.
#![forbid(unsafe_code)]

pub mod balancing;
pub mod bandwidth;
pub mod client;
pub mod crd;
pub mod cron;
pub mod demand;
pub mod informer;
pub mod inspect;
pub mod intstr;
pub mod jsonpath;
pub mod kind;
pub mod kinds;
pub mod metrics;
pub mod names;
pub mod networks;
pub mod object;
pub mod openapi;
pub mod quantity;
pub mod schema;
pub mod selector;
pub mod sleep;
pub mod status;
pub mod streams;
pub mod table;
pub mod testing;
pub mod time;
pub mod topology;

/// The field's own typed wire structs for built-in kinds; deserialize from `&serde_json::Value` at the edge of a room.
pub use k8s_openapi as k8s;
pub use object::Object;
pub use status::{Status, StatusResult};
