//! JSON Web Tokens: signature, issuer, audience, times (RFC 7515, 7517, 7519). Only the algorithms of the issuer's public
//! keys are taken: neither `none` nor a shared secret can be talked into.

use super::{Grant, Refusal, challenge, refuse};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::AUTHORIZATION;
use http::request::Parts;
use http::{HeaderName, HeaderValue, StatusCode};
use ring::signature::{self, RsaPublicKeyComponents, UnparsedPublicKey};
use serde_json::Value;

/// Seconds by which clocks may differ.
const LEEWAY: u64 = 60;
const MAX_TOKEN: usize = 16 << 10;
const MAX_KEYS: usize = 64;

#[derive(Debug)]
pub struct Tokens {
    pub issuer: String,
    pub audiences: Vec<String>,
    pub claims: Vec<(String, HeaderName)>,
    keys: Vec<Key>,
}

#[derive(Debug)]
struct Key {
    id: Option<String>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Rsa { n: Vec<u8>, e: Vec<u8> },
    P256(Vec<u8>),
    P384(Vec<u8>),
    Ed25519(Vec<u8>),
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value.get(field).and_then(Value::as_str).unwrap_or_default()
}

impl Kind {
    /// `None` for keys that are not for signatures of these kinds: a set may have others.
    fn read(key: &Value) -> Option<Kind> {
        let bytes = |field: &str| URL_SAFE_NO_PAD.decode(text(key, field)).ok().filter(|bytes| !bytes.is_empty());
        let point = |length: usize| {
            let (x, y) = (bytes("x")?, bytes("y")?);
            (x.len() == length && y.len() == length).then(|| [vec![4], x, y].concat())
        };
        match (text(key, "kty"), text(key, "crv")) {
            ("RSA", _) => Some(Kind::Rsa { n: bytes("n")?, e: bytes("e")? }),
            ("EC", "P-256") => Some(Kind::P256(point(32)?)),
            ("EC", "P-384") => Some(Kind::P384(point(48)?)),
            ("OKP", "Ed25519") => Some(Kind::Ed25519(bytes("x")?)),
            _ => None,
        }
    }

    fn verify(&self, algorithm: &str, message: &[u8], signed: &[u8]) -> bool {
        let rsa = |n: &[u8], e: &[u8], parameters| {
            RsaPublicKeyComponents { n, e }.verify(parameters, message, signed).is_ok()
        };
        let plain = |algorithm: &'static dyn signature::VerificationAlgorithm, key: &[u8]| {
            UnparsedPublicKey::new(algorithm, key).verify(message, signed).is_ok()
        };
        match (self, algorithm) {
            (Kind::Rsa { n, e }, "RS256") => rsa(n, e, &signature::RSA_PKCS1_2048_8192_SHA256),
            (Kind::Rsa { n, e }, "RS384") => rsa(n, e, &signature::RSA_PKCS1_2048_8192_SHA384),
            (Kind::Rsa { n, e }, "RS512") => rsa(n, e, &signature::RSA_PKCS1_2048_8192_SHA512),
            (Kind::Rsa { n, e }, "PS256") => rsa(n, e, &signature::RSA_PSS_2048_8192_SHA256),
            (Kind::P256(key), "ES256") => plain(&signature::ECDSA_P256_SHA256_FIXED, key),
            (Kind::P384(key), "ES384") => plain(&signature::ECDSA_P384_SHA384_FIXED, key),
            (Kind::Ed25519(key), "EdDSA") => plain(&signature::ED25519, key),
            _ => false,
        }
    }
}

impl Tokens {
    pub fn new(
        issuer: &str,
        audiences: Vec<String>,
        claims: Vec<(String, HeaderName)>,
        jwks: &str,
    ) -> Result<Tokens, String> {
        let set: Value = serde_json::from_str(jwks).map_err(|e| format!("jwt.jwks: {e}"))?;
        let all = set.get("keys").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let key = |key: &Value| {
            let id = key.get("kid").and_then(Value::as_str).map(str::to_owned);
            Some(Key { id, kind: Kind::read(key)? })
        };
        let keys: Vec<Key> = all.iter().take(MAX_KEYS).filter_map(key).collect();
        if keys.is_empty() {
            return Err("jwt.jwks has no RSA, P-256, P-384 or Ed25519 key".into());
        }
        Ok(Tokens { issuer: issuer.to_owned(), audiences, claims, keys })
    }

    pub fn check(&self, parts: &Parts, now: u64, grant: &mut Grant) -> Result<(), Refusal> {
        grant.remove.extend(self.claims.iter().map(|(_, header)| header.clone()));
        let token = parts.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token =
            token.and_then(|text| text.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let Some((_, token)) = token else {
            return Err(challenge(HeaderValue::from_static("Bearer"), "a bearer token is needed"));
        };
        let claims = self.claims(token.trim(), now).map_err(|why| {
            let value = format!("Bearer error=\"invalid_token\", error_description=\"{why}\"");
            match HeaderValue::try_from(value) {
                Ok(value) => challenge(value, why),
                Err(_) => refuse(StatusCode::UNAUTHORIZED, why),
            }
        })?;
        for (claim, header) in &self.claims {
            let value = match claims.get(claim) {
                Some(Value::String(text)) => text.clone(),
                Some(value @ (Value::Number(_) | Value::Bool(_))) => value.to_string(),
                Some(value @ Value::Array(_)) => value.to_string(),
                Some(Value::Object(_) | Value::Null) | None => continue,
            };
            // A claim that cannot be a header is left out, never changed.
            if let Ok(value) = HeaderValue::from_str(&value) {
                grant.set.push((header.clone(), value));
            }
        }
        Ok(())
    }

    /// The claims of a token that holds.
    fn claims(&self, token: &str, now: u64) -> Result<Value, &'static str> {
        if token.len() > MAX_TOKEN {
            return Err("the token is too long");
        }
        let (message, signed) = token.rsplit_once('.').ok_or("the token is not one")?;
        let (head, body) = message.split_once('.').ok_or("the token is not one")?;
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| "the token is not one");
        let head: Value = serde_json::from_slice(&decode(head)?).map_err(|_| "the token is not one")?;
        let signed = decode(signed)?;
        // RFC 7515, section 4.1.11: what must be understood is not.
        if head.get("crit").is_some() {
            return Err("the token asks for an extension");
        }
        let (algorithm, id) = (text(&head, "alg"), head.get("kid").and_then(Value::as_str));
        let meant = |key: &&Key| id.is_none() || key.id.is_none() || key.id.as_deref() == id;
        if !self.keys.iter().filter(meant).any(|key| key.kind.verify(algorithm, message.as_bytes(), &signed)) {
            return Err("the token's signature does not hold");
        }
        let claims: Value = serde_json::from_slice(&decode(body)?).map_err(|_| "the token is not one")?;
        let time = |field: &str| claims.get(field).and_then(Value::as_f64);
        if text(&claims, "iss") != self.issuer {
            return Err("the token is of another issuer");
        }
        let is_meant = |one: &str| self.audiences.iter().any(|audience| audience == one);
        let audience = match claims.get("aud") {
            Some(Value::String(one)) => is_meant(one),
            Some(Value::Array(all)) => all.iter().filter_map(Value::as_str).any(is_meant),
            _ => false,
        };
        if !self.audiences.is_empty() && !audience {
            return Err("the token is for another audience");
        }
        match time("exp") {
            None => return Err("the token has no end"),
            Some(end) if end + LEEWAY as f64 <= now as f64 => return Err("the token has expired"),
            Some(_) => {}
        }
        if time("nbf").is_some_and(|begin| begin > (now + LEEWAY) as f64) {
            return Err("the token is not valid yet");
        }
        Ok(claims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use ring::rand::SystemRandom;
    use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
    use serde_json::json;

    struct Issuer(EcdsaKeyPair, SystemRandom);

    impl Issuer {
        fn new() -> Issuer {
            let random = SystemRandom::new();
            let der = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
            Issuer(EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der.as_ref(), &random).unwrap(), random)
        }
        fn jwks(&self) -> String {
            let (x, y) = self.0.public_key().as_ref()[1..].split_at(32);
            json!({"keys": [{"kty": "oct", "k": "AAAA"}, {"kty": "EC", "crv": "P-256", "kid": "1",
                "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y)}]})
            .to_string()
        }
        fn token(&self, head: Value, claims: Value) -> String {
            let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
            let message = format!("{}.{}", part(head), part(claims));
            let signed = self.0.sign(&self.1, message.as_bytes()).unwrap();
            format!("{message}.{}", URL_SAFE_NO_PAD.encode(signed))
        }
    }

    #[test]
    fn only_tokens_that_hold() {
        let (issuer, other) = (Issuer::new(), Issuer::new());
        let tokens = Tokens::new("me", vec!["us".into()], Vec::new(), &issuer.jwks()).unwrap();
        let head = || json!({"alg": "ES256", "kid": "1"});
        let good = || json!({"iss": "me", "aud": ["x", "us"], "exp": 1000, "sub": "ann"});
        let why = |token: &str| tokens.claims(token, 900).map(|claims| claims["sub"].clone());
        assert_eq!(why(&issuer.token(head(), good())), Ok(json!("ann")));
        let with = |field: &str, value: Value| {
            let mut claims = good();
            claims[field] = value;
            why(&issuer.token(head(), claims)).unwrap_err()
        };
        assert_eq!(with("iss", json!("you")), "the token is of another issuer");
        assert_eq!(with("aud", json!("them")), "the token is for another audience");
        assert_eq!(with("exp", json!(840)), "the token has expired");
        assert_eq!(with("exp", Value::Null), "the token has no end");
        assert_eq!(with("nbf", json!(961)), "the token is not valid yet");
        assert_eq!(why(&other.token(head(), good())), Err("the token's signature does not hold"));
        assert_eq!(
            why(&issuer.token(json!({"alg": "ES256", "kid": "2"}), good())),
            Err("the token's signature does not hold")
        );
        for algorithm in ["none", "HS256", "RS256", "ES384"] {
            let token = issuer.token(json!({"alg": algorithm}), good());
            assert_eq!(why(&token), Err("the token's signature does not hold"), "{algorithm}");
        }
        assert_eq!(
            why(&issuer.token(json!({"alg": "ES256", "crit": ["b64"]}), good())),
            Err("the token asks for an extension")
        );
        let token = issuer.token(head(), good());
        let unsigned = token.rsplit_once('.').unwrap().0;
        assert!(why(&format!("{unsigned}.")).is_err() && why(unsigned).is_err() && why("").is_err());
        assert!(Tokens::new("me", Vec::new(), Vec::new(), r#"{"keys": [{"kty": "oct", "k": "AA"}]}"#).is_err());
    }

    proptest! {
        #[test]
        fn foreign_tokens_never_hold(token in "[A-Za-z0-9_.-]{0,120}") {
            let tokens = Tokens::new("me", Vec::new(), Vec::new(), &Issuer::new().jwks()).unwrap();
            prop_assert!(tokens.claims(&token, 0).is_err());
        }
    }
}
