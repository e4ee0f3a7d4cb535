//! Who asks ([`User`], from a client certificate or a token) and whether they may ([`authorize`], which hands out the
//! [`Permit`] that every handler must be given).

mod impersonate;
mod permit;
mod reviews;
mod token;

pub(crate) use impersonate::impersonated;
pub use permit::{Attributes, Permit, allows, authorize};
pub(crate) use reviews::{REVIEWS, serve as serve_review};
pub use token::{Claims, TokenError, TokenIssuer};

use std::collections::BTreeMap;
use std::sync::Arc;

/// Who a request comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: String,
    pub groups: Vec<String>,
    pub extra: BTreeMap<String, Vec<String>>,
}

impl User {
    pub const MASTERS: &'static str = "system:masters";
    const ANONYMOUS: &'static str = "system:anonymous";
    const AUTHENTICATED: &'static str = "system:authenticated";

    pub fn anonymous() -> Self {
        User { name: Self::ANONYMOUS.into(), groups: vec!["system:unauthenticated".into()], ..Self::default() }
    }

    /// The control plane itself, in process.
    pub fn internal() -> Arc<Self> {
        static INTERNAL: std::sync::LazyLock<Arc<User>> = std::sync::LazyLock::new(|| {
            Arc::new(User {
                name: "system:atoll".into(),
                groups: vec![User::MASTERS.into(), User::AUTHENTICATED.into()],
                ..User::default()
            })
        });
        INTERNAL.clone()
    }

    pub fn is_anonymous(&self) -> bool {
        self.name == Self::ANONYMOUS
    }

    pub fn in_group(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }

    /// The subject of a client certificate that the TLS layer has verified: CN = user, O = groups.
    pub fn from_certificate(der: &[u8]) -> Option<Self> {
        let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
        let subject = certificate.subject();
        let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
        let mut groups: Vec<String> =
            subject.iter_organization().filter_map(|o| o.as_str().ok()).map(str::to_owned).collect();
        groups.push(Self::AUTHENTICATED.into());
        Some(User { name, groups, ..Self::default() })
    }

    pub fn service_account(namespace: &str, name: &str, uid: &str) -> Self {
        User {
            name: format!("system:serviceaccount:{namespace}:{name}"),
            uid: uid.into(),
            groups: vec![
                "system:serviceaccounts".into(),
                format!("system:serviceaccounts:{namespace}"),
                Self::AUTHENTICATED.into(),
            ],
            ..Self::default()
        }
    }
}
