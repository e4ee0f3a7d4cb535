//! Lists: at a resource version, in pages, through selectors.

use super::{cause, schema, storage};
use crate::core::Core;
use crate::watch::Filter;
use api::kind::Kind;
use api::object::Object;
use api::status::{Reason, Status, StatusResult};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use store::{KeyRange, RangeRequest, Revision};

/// Objects read at once when only some of them will match.
const CHUNK: usize = 500;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VersionMatch {
    #[default]
    Unset,
    Exact,
    NotOlderThan,
}

#[derive(Clone)]
pub struct ListRequest {
    pub kind: Arc<Kind>,
    pub filter: Filter,
    /// 0 = all.
    pub limit: usize,
    pub continue_token: String,
    /// As the client sent it.
    pub resource_version: String,
    pub version_match: VersionMatch,
}

impl ListRequest {
    pub fn all(kind: &Arc<Kind>, filter: Filter) -> Self {
        ListRequest {
            kind: kind.clone(),
            filter,
            limit: 0,
            continue_token: String::new(),
            resource_version: String::new(),
            version_match: VersionMatch::Unset,
        }
    }
}

pub struct ListAnswer {
    pub items: Vec<Object>,
    pub revision: Revision,
    /// Where the next page begins; empty = that was all.
    pub continue_token: String,
    pub remaining: Option<usize>,
}

/// What a `continue` token carries: the revision all pages are read at and the first key of the next one.
#[derive(Serialize, Deserialize)]
struct Token {
    v: String,
    rv: Revision,
    start: String,
}

const TOKEN_VERSION: &str = "meta.k8s.io/v1";

fn parse_token(token: &str) -> StatusResult<Token> {
    let invalid = || Status::bad_request("continue key is not valid: it was not made by this server");
    let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| invalid())?;
    let token: Token = serde_json::from_slice(&bytes).map_err(|_| invalid())?;
    if token.v != TOKEN_VERSION || token.rv < 1 || token.start.split('/').any(|part| part == "..") {
        return Err(invalid());
    }
    Ok(token)
}

/// A resource version as clients send it; empty and `0` are 0.
pub fn parse_version(text: &str) -> StatusResult<Revision> {
    if text.is_empty() {
        return Ok(0);
    }
    text.parse::<u64>().ok().and_then(|n| Revision::try_from(n).ok()).ok_or_else(|| {
        Status::bad_request(format!("resourceVersion: Invalid value: \"{text}\": must be an unsigned integer"))
    })
}

impl ListRequest {
    /// The revision to read at; 0 = newest.
    fn revision(&self) -> StatusResult<Revision> {
        let asked = parse_version(&self.resource_version)?;
        let forbidden = |why: &str| {
            let causes = vec![cause("FieldValueForbidden", "resourceVersionMatch", format!("Forbidden: {why}"))];
            Status::invalid("meta.k8s.io", "ListOptions", "", causes)
        };
        if self.version_match != VersionMatch::Unset {
            if self.resource_version.is_empty() {
                return Err(forbidden("resourceVersionMatch is forbidden unless resourceVersion is provided"));
            }
            if !self.continue_token.is_empty() {
                return Err(forbidden("resourceVersionMatch is forbidden when continue is provided"));
            }
            if self.version_match == VersionMatch::Exact && asked == 0 {
                return Err(forbidden("resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\""));
            }
        }
        if !self.continue_token.is_empty() && asked != 0 {
            return Err(Status::bad_request("specifying resource version is not allowed when using continue"));
        }
        let exact = self.version_match == VersionMatch::Exact
            || (self.version_match == VersionMatch::Unset && asked > 0 && self.limit > 0);
        Ok(if exact { asked } else { 0 })
    }
}

impl Core {
    pub async fn list(&self, request: &ListRequest) -> StatusResult<ListAnswer> {
        let mut revision = request.revision()?;
        let prefix = storage::prefix(&request.kind, &request.filter.namespace);
        let mut range = KeyRange::prefix(prefix.clone());
        if let Some(name) = request.filter.fields.required("metadata.name")
            && (!request.filter.namespace.is_empty() || request.kind.scope == api::kind::Scope::Cluster)
            && request.continue_token.is_empty()
        {
            range = KeyRange::one(storage::key(&request.kind, &request.filter.namespace, name));
        }
        if !request.continue_token.is_empty() {
            let token = parse_token(&request.continue_token)?;
            revision = token.rv;
            let mut start = storage::prefix(&request.kind, "").to_vec();
            start.extend_from_slice(token.start.as_bytes());
            if !start.starts_with(&prefix) {
                return Err(Status::bad_request("continue key is not valid: it is of another list"));
            }
            range.key = start.into();
        }
        self.read(request, range, revision).await
    }

    async fn read(
        &self,
        request: &ListRequest,
        mut range: KeyRange,
        mut revision: Revision,
    ) -> StatusResult<ListAnswer> {
        let kind = &request.kind;
        let selective = !request.filter.labels.is_everything() || !request.filter.fields.is_everything();
        let asked = parse_version(&request.resource_version)?;
        let custom = self.is_custom(kind);
        let mut items = Vec::new();
        loop {
            let limit = match (request.limit, selective) {
                (0, _) => 0,
                (limit, false) => limit,
                (limit, true) => limit.max(CHUNK),
            };
            let response = self
                .storage
                .range(RangeRequest { range: range.clone(), revision, limit, count_only: false })
                .await
                .map_err(|status| expired(status, request))?;
            if asked > response.revision {
                return Err(storage::too_new(asked, response.revision));
            }
            if revision == 0 {
                revision = response.revision;
            }
            let total = response.kvs.len();
            for (index, kv) in response.kvs.iter().enumerate() {
                let mut object = storage::decode_kv(kind, kv)?;
                schema::default_on_read(kind, &mut object, custom);
                if !request.filter.matches(&object) {
                    continue;
                }
                items.push(object);
                let more = response.more || index + 1 < total;
                if request.limit > 0 && items.len() == request.limit && more {
                    let remaining = (!selective).then(|| response.count.saturating_sub(index + 1));
                    let continue_token = token_after(kind, &kv.key, revision)?;
                    return Ok(ListAnswer { items, revision, continue_token, remaining });
                }
            }
            match response.kvs.last() {
                Some(last) if response.more => {
                    let mut next = last.key.to_vec();
                    next.push(0);
                    range.key = next.into();
                }
                _ => return Ok(ListAnswer { items, revision, continue_token: String::new(), remaining: None }),
            }
        }
    }
}

/// Compaction in the middle of a paged list has words of its own.
fn expired(status: Status, request: &ListRequest) -> Status {
    if status.reason != Reason::Expired || request.continue_token.is_empty() {
        return status;
    }
    Status::new(
        Reason::Expired,
        "The provided continue parameter is too old to display a consistent list result. You must start a new list \
         without the continue parameter.",
    )
}

fn token_after(kind: &Kind, key: &[u8], revision: Revision) -> StatusResult<String> {
    let prefix = storage::prefix(kind, "");
    let rest = key.get(prefix.len()..).unwrap_or_default();
    let start = format!("{}\0", String::from_utf8_lossy(rest));
    let token = Token { v: TOKEN_VERSION.into(), rv: revision, start };
    Ok(URL_SAFE_NO_PAD.encode(serde_json::to_vec(&token).map_err(Status::internal)?))
}
