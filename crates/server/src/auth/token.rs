//! Service account tokens: JSON Web Tokens signed with ES256 (RFC 7515, RFC 7518 §3.4, RFC 7519).

use crate::pki::TokenKey;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Longer than any token of ours.
const LIMIT: usize = 8192;
/// Clocks differ.
const LEEWAY: i64 = 10;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TokenError {
    #[error("token is malformed")]
    Malformed,
    #[error("token is signed by another key")]
    Signature,
    #[error("token has expired")]
    Expired,
    #[error("token is not valid yet")]
    Early,
    #[error("token is from another issuer")]
    Issuer,
    #[error("token is for another audience")]
    Audience,
    #[error("signing key is not usable")]
    Key,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    pub iss: String,
    pub sub: String,
    pub aud: Vec<String>,
    pub exp: i64,
    pub iat: i64,
    pub nbf: i64,
    pub jti: String,
    #[serde(rename = "kubernetes.io")]
    pub bound: Bound,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bound {
    pub namespace: String,
    pub serviceaccount: Named,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Named>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<Named>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named {
    pub name: String,
    pub uid: String,
}

/// Signs and checks tokens with the installation's key.
pub struct TokenIssuer {
    key: EcdsaKeyPair,
    public: Vec<u8>,
    key_id: String,
    random: SystemRandom,
    pub issuer: String,
}

impl TokenIssuer {
    pub fn new(key: &TokenKey, issuer: String) -> Result<Self, TokenError> {
        let random = SystemRandom::new();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &key.pkcs8, &random)
            .map_err(|_| TokenError::Key)?;
        let key_id = URL_SAFE_NO_PAD.encode(Sha256::digest(&key.public));
        Ok(TokenIssuer { key: pair, public: key.public.clone(), key_id, random, issuer })
    }

    pub fn sign(&self, claims: &Claims) -> Result<String, TokenError> {
        let header = json!({"alg": "ES256", "kid": self.key_id, "typ": "JWT"});
        let claims = serde_json::to_vec(claims).map_err(|_| TokenError::Malformed)?;
        let mut token = URL_SAFE_NO_PAD.encode(header.to_string());
        token.push('.');
        token.push_str(&URL_SAFE_NO_PAD.encode(claims));
        let signature = self.key.sign(&self.random, token.as_bytes()).map_err(|_| TokenError::Key)?;
        token.push('.');
        token.push_str(&URL_SAFE_NO_PAD.encode(signature));
        Ok(token)
    }

    /// The claims of a token of ours that is for one of `audiences` (empty = any) at `now`, unix seconds. Whether what
    /// it is bound to still exists is for the caller to see.
    pub fn verify(&self, token: &str, audiences: &[&str], now: i64) -> Result<Claims, TokenError> {
        if token.len() > LIMIT {
            return Err(TokenError::Malformed);
        }
        let (signed, signature) = token.rsplit_once('.').ok_or(TokenError::Malformed)?;
        let (header, claims) = signed.split_once('.').ok_or(TokenError::Malformed)?;
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Malformed);
        let header: Value = serde_json::from_slice(&decode(header)?).map_err(|_| TokenError::Malformed)?;
        if header.get("alg").and_then(Value::as_str) != Some("ES256") {
            return Err(TokenError::Malformed);
        }
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &self.public)
            .verify(signed.as_bytes(), &decode(signature)?)
            .map_err(|_| TokenError::Signature)?;
        let claims: Claims = serde_json::from_slice(&decode(claims)?).map_err(|_| TokenError::Malformed)?;
        if claims.iss != self.issuer {
            return Err(TokenError::Issuer);
        }
        if claims.exp.saturating_add(LEEWAY) <= now {
            return Err(TokenError::Expired);
        }
        if claims.nbf.saturating_sub(LEEWAY) > now {
            return Err(TokenError::Early);
        }
        if !audiences.is_empty() && !claims.aud.iter().any(|a| audiences.contains(&a.as_str())) {
            return Err(TokenError::Audience);
        }
        Ok(claims)
    }

    /// The public key as a JSON Web Key Set (RFC 7517).
    pub fn key_set(&self) -> Value {
        let coordinate =
            |range: std::ops::Range<usize>| URL_SAFE_NO_PAD.encode(self.public.get(range).unwrap_or_default());
        json!({"keys": [{"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": self.key_id,
                         "x": coordinate(1..33), "y": coordinate(33..65)}]})
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn issuer() -> TokenIssuer {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let key = TokenKey { pkcs8: key.serialize_der(), public: key.public_key_raw().to_vec() };
        TokenIssuer::new(&key, "https://api".into()).unwrap()
    }

    fn claims() -> Claims {
        Claims {
            iss: "https://api".into(),
            sub: "system:serviceaccount:ns:sa".into(),
            aud: vec!["api".into()],
            exp: 1000,
            iat: 100,
            nbf: 100,
            jti: "x".into(),
            bound: Bound { namespace: "ns".into(), ..Bound::default() },
        }
    }

    #[test]
    fn only_our_valid_tokens_pass() {
        let (ours, other) = (issuer(), issuer());
        let token = ours.sign(&claims()).unwrap();
        assert_eq!(ours.verify(&token, &["api"], 500).unwrap(), claims());
        assert_eq!(ours.verify(&token, &[], 500).unwrap(), claims());
        assert_eq!(other.verify(&token, &["api"], 500), Err(TokenError::Signature));
        assert_eq!(ours.verify(&token, &["db"], 500), Err(TokenError::Audience));
        assert_eq!(ours.verify(&token, &["api"], 1010), Err(TokenError::Expired));
        assert_eq!(ours.verify(&token, &["api"], 5), Err(TokenError::Early));
        let (_, rest) = token.split_once('.').unwrap();
        let none = format!("{}.{rest}", URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#));
        assert_eq!(ours.verify(&none, &["api"], 500), Err(TokenError::Malformed));
    }

    proptest! {
        #[test]
        fn foreign_text_is_refused(text in "[A-Za-z0-9_.-]{0,200}") {
            prop_assert!(issuer().verify(&text, &[], 0).is_err());
        }
    }
}
