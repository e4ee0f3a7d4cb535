//! Spans of requests on their way to a collector, by OTLP over HTTP with JSON
//! (<https://opentelemetry.io/docs/specs/otlp/>).
//!
//! Who has a span offers it and goes on: what the bounded queue has no room for is dropped and counted. One thread sends
//! what is queued, in batches; a collector that is slow or gone costs spans, never a request.

#![forbid(unsafe_code)]

mod collector;
mod encode;
mod exporter;
mod span;

pub use collector::{Collector, Invalid};
pub use exporter::{Exporter, Numbers};
pub use span::{Origin, Span, Value, identifier};
