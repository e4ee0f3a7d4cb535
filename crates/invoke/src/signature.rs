//! Who signed a request: AWS Signature Version 4.
//! <https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html>

use http::HeaderMap;
use http::request::Parts;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use ring::{digest, hmac};
use std::collections::BTreeSet;

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const SERVICE: &str = "lambda";
const TERMINATOR: &str = "aws4_request";
/// How far a request's time may be from ours.
const SKEW_SECONDS: i64 = 300;
const HEADERS: usize = 64;
/// What a path keeps as it is when it is signed.
const PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'~').remove(b'-').remove(b'_').remove(b'.');

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the request is not signed; sign it by AWS Signature Version 4 for the service lambda")]
    Missing,
    #[error("the header Authorization is not of AWS Signature Version 4: {0}")]
    Malformed(&'static str),
    #[error("the request's time {0:?} is not within {SKEW_SECONDS} s of ours")]
    Time(String),
    #[error("the security token included in the request is invalid")]
    UnknownKey,
    #[error("the signature is not that of the request and the access key's secret")]
    Mismatch,
}

impl Refusal {
    /// In AWS's words.
    pub fn code(&self) -> &'static str {
        match self {
            Refusal::Missing => "MissingAuthenticationTokenException",
            Refusal::Malformed(_) => "IncompleteSignatureException",
            Refusal::Time(_) => "RequestExpired",
            Refusal::UnknownKey => "UnrecognizedClientException",
            Refusal::Mismatch => "InvalidSignatureException",
        }
    }
}

/// What the header `Authorization` says.
#[derive(Debug, PartialEq, Eq)]
pub struct Claim {
    pub key_id: String,
    date: String,
    region: String,
    signed: Vec<String>,
    signature: Vec<u8>,
    time: String,
}

impl Claim {
    /// Reads it, and holds its time against `now`, unix seconds.
    pub fn read(headers: &HeaderMap, now: i64) -> Result<Claim, Refusal> {
        let text = headers.get("authorization").ok_or(Refusal::Missing)?;
        let text = text.to_str().map_err(|_| Refusal::Malformed("it is not text"))?;
        let rest = text.strip_prefix(ALGORITHM).ok_or(Refusal::Malformed("another algorithm"))?;
        let field = |name: &str| {
            rest.split(',').find_map(|part| part.trim().strip_prefix(name)?.strip_prefix('=')).map(str::to_owned)
        };
        let scope = field("Credential").ok_or(Refusal::Malformed("no Credential"))?;
        let parts: Vec<&str> = scope.split('/').collect();
        let [key_id, date, region, SERVICE, TERMINATOR] = parts.as_slice() else {
            return Err(Refusal::Malformed("Credential is not KEY/DATE/REGION/lambda/aws4_request"));
        };
        let signed = field("SignedHeaders").ok_or(Refusal::Malformed("no SignedHeaders"))?;
        let signed: Vec<String> = signed.split(';').map(str::to_owned).collect();
        let unique: BTreeSet<&String> = signed.iter().collect();
        if unique.len() != signed.len() || signed.len() > HEADERS || !signed.iter().any(|name| name == "host") {
            return Err(Refusal::Malformed("SignedHeaders names headers twice, too many, or not the host"));
        }
        let signature = field("Signature").and_then(|hex| unhex(&hex)).ok_or(Refusal::Malformed("no Signature"))?;
        let time = headers.get("x-amz-date").and_then(|time| time.to_str().ok()).unwrap_or_default().to_owned();
        let then = seconds(&time).ok_or_else(|| Refusal::Time(time.clone()))?;
        if (then - now).abs() > SKEW_SECONDS
            || !time.starts_with(date)
            || !signed.iter().any(|name| name == "x-amz-date")
        {
            return Err(Refusal::Time(time));
        }
        let (key_id, date, region) = ((*key_id).to_owned(), (*date).to_owned(), (*region).to_owned());
        Ok(Claim { key_id, date, region, signed, signature, time })
    }

    /// Whether the key's secret signed this request.
    pub fn verify(&self, parts: &Parts, body: &[u8], secret: &str) -> Result<(), Refusal> {
        let canonical = self.canonical(parts, body)?;
        let scope = format!("{}/{}/{SERVICE}/{TERMINATOR}", self.date, self.region);
        let text = format!(
            "{ALGORITHM}\n{}\n{scope}\n{}",
            self.time,
            hex(digest::digest(&digest::SHA256, canonical.as_bytes()).as_ref())
        );
        let mut key = format!("AWS4{secret}").into_bytes();
        for part in [self.date.as_str(), self.region.as_str(), SERVICE, TERMINATOR] {
            key = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &key), part.as_bytes()).as_ref().to_vec();
        }
        let key = hmac::Key::new(hmac::HMAC_SHA256, &key);
        hmac::verify(&key, text.as_bytes(), &self.signature).map_err(|_| Refusal::Mismatch)
    }

    fn canonical(&self, parts: &Parts, body: &[u8]) -> Result<String, Refusal> {
        let path = utf8_percent_encode(parts.uri.path(), PATH);
        let mut query: Vec<(&str, &str)> = parts
            .uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
            .collect();
        query.sort_unstable();
        let query: Vec<String> = query.into_iter().map(|(name, value)| format!("{name}={value}")).collect();
        let mut headers = String::new();
        for name in &self.signed {
            let values: Vec<String> = parts
                .headers
                .get_all(name.as_str())
                .iter()
                .map(|value| String::from_utf8_lossy(value.as_bytes()).split_whitespace().collect::<Vec<_>>().join(" "))
                .collect();
            if values.is_empty() {
                return Err(Refusal::Malformed("SignedHeaders names a header that is not there"));
            }
            headers.push_str(&format!("{name}:{}\n", values.join(",")));
        }
        let payload = hex(digest::digest(&digest::SHA256, body).as_ref());
        Ok(format!("{}\n{path}\n{}\n{headers}\n{}\n{payload}", parts.method, query.join("&"), self.signed.join(";")))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> =
        text.chars().map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok())).collect::<Option<_>>()?;
    (digits.len() == 64)
        .then(|| digits.chunks(2).map(|pair| pair.iter().fold(0, |all, digit| all << 4 | digit)).collect())
}

/// Unix seconds of `20150830T123600Z`.
fn seconds(time: &str) -> Option<i64> {
    let number = |from: usize, to: usize| -> Option<i64> {
        let digits = time.get(from..to).filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))?;
        digits.parse().ok()
    };
    let shaped = time.len() == 16 && time.get(8..9) == Some("T") && time.get(15..) == Some("Z");
    let (month, day) = (number(4, 6)?, number(6, 8)?);
    let (hour, minute, second) = (number(9, 11)?, number(11, 13)?, number(13, 15)?);
    let fine =
        shaped && (1..=12).contains(&month) && (1..=31).contains(&day) && hour < 24 && minute < 60 && second < 61;
    fine.then_some(clock::days(number(0, 4)?, month, day) * 86_400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;
    use proptest::prelude::*;

    const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
    const TIME: &str = "20150830T123600Z";

    /// Signed by botocore 1.44's SigV4Auth.
    fn signed() -> (Parts, &'static [u8]) {
        let request = Request::builder()
            .method("POST")
            .uri("/2015-03-31/functions/arn%3Aaws%3Alambda%3Aus-east-1%3A000000000000%3Afunction%3Agreet/invocations?b=2&a=1%20x&c")
            .header("host", "127.0.0.1:9000")
            .header("x-amz-date", TIME)
            .header("x-amz-invocation-type", "Event")
            .header("authorization", include_str!("signature.txt").trim());
        let (parts, ()) = request.body(()).unwrap().into_parts();
        (parts, b"{\"a\":1}")
    }

    #[test]
    fn a_public_clients_signature_holds_and_no_changed_request_passes() {
        let (parts, body) = signed();
        let now = seconds(TIME).unwrap();
        let claim = Claim::read(&parts.headers, now + 60).unwrap();
        assert_eq!((claim.key_id.as_str(), claim.region.as_str()), ("AKIDEXAMPLE", "us-east-1"));
        claim.verify(&parts, body, SECRET).unwrap();
        assert_eq!(claim.verify(&parts, b"{}", SECRET), Err(Refusal::Mismatch));
        assert_eq!(claim.verify(&parts, body, "another"), Err(Refusal::Mismatch));
        let mut other = parts.clone();
        other.headers.insert("x-amz-invocation-type", "DryRun".parse().unwrap());
        assert_eq!(claim.verify(&other, body, SECRET), Err(Refusal::Mismatch));
        let mut other = parts.clone();
        other.uri = "/2015-03-31/functions/other/invocations".parse().unwrap();
        assert_eq!(claim.verify(&other, body, SECRET), Err(Refusal::Mismatch));
        assert!(matches!(Claim::read(&parts.headers, now + 301), Err(Refusal::Time(_))));
        assert!(matches!(Claim::read(&parts.headers, now - 301), Err(Refusal::Time(_))));
    }

    #[test]
    fn what_is_no_signature_is_told() {
        let of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("authorization", text.parse().unwrap());
            headers.insert("x-amz-date", TIME.parse().unwrap());
            Claim::read(&headers, seconds(TIME).unwrap()).unwrap_err().code()
        };
        assert_eq!(Claim::read(&HeaderMap::new(), 0), Err(Refusal::Missing));
        let incomplete = "IncompleteSignatureException";
        let credential = "AWS4-HMAC-SHA256 Credential=A/20150830/r/lambda/aws4_request";
        let signature = "0".repeat(64);
        assert_eq!(of("Bearer x"), incomplete);
        assert_eq!(of("AWS4-HMAC-SHA256 Credential=A/20150830/r/s3/aws4_request"), incomplete);
        assert_eq!(of(&format!("{credential}, SignedHeaders=x-amz-date, Signature={signature}")), incomplete);
        assert_eq!(of(&format!("{credential}, SignedHeaders=host;host, Signature={signature}")), incomplete);
        assert_eq!(of(&format!("{credential}, SignedHeaders=host;x-amz-date, Signature=00")), incomplete);
        // Its time has to be signed.
        assert_eq!(of(&format!("{credential}, SignedHeaders=host, Signature={signature}")), "RequestExpired");
    }

    proptest! {
        #[test]
        fn nothing_foreign_harms(text in "[ -~]{0,120}", time in "[0-9TZ-]{0,17}") {
            let mut headers = HeaderMap::new();
            headers.insert("authorization", format!("{ALGORITHM} {text}").parse().unwrap());
            headers.insert("x-amz-date", time.parse().unwrap());
            let _ = Claim::read(&headers, 0);
        }
    }
}
