//! What `fuzz/` gives foreign bytes to. Not an interface.

use crate::settings::{NewCode, Wanted, name, read};
use crate::signature::Claim;
use http::Request;

/// Bodies, names, and a request's head: signature in the first line, path in the second.
pub fn request(bytes: &[u8]) {
    if let Ok(wanted) = read::<Wanted>(bytes) {
        let _ = wanted.check();
    }
    if let Ok(new) = read::<NewCode>(bytes) {
        let _ = new.check();
    }
    let text = String::from_utf8_lossy(bytes);
    let _ = name(&text);
    let (signature, path) = text.split_once('\n').unwrap_or((&text, "/"));
    let request = Request::builder().method("POST").uri(path).header("authorization", signature);
    let request = request.header("host", "h").header("x-amz-date", "20150830T123600Z").body(());
    let Ok((parts, ())) = request.map(Request::into_parts) else { return };
    let _ = crate::http_api::operation(&parts.method, parts.uri.path());
    if let Ok(claim) = Claim::read(&parts.headers, 1_440_938_160) {
        assert!(claim.verify(&parts, b"", "a secret that nobody has").is_err());
    }
}
