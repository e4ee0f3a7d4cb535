//! What `fuzz/` gives foreign bytes to: decoding of bodies. Not an interface.

use crate::http::decode::{Format, decode, format_of};
use serde_json::Value;

/// A body in one of the formats that are taken; what it says, if it says anything.
pub fn body(bytes: &[u8], format: u8) -> Option<Value> {
    let format = match format % 3 {
        0 => Format::Json,
        1 => Format::Yaml,
        _ => Format::Protobuf,
    };
    decode(bytes, format).ok().map(|decoded| decoded.value)
}

pub fn content_type(text: &str) {
    let _ = format_of(text);
}
