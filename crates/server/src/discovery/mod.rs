//! What is served: `/version`, `/api`, `/apis`, their aggregated form, and the OpenAPI documents. Derived from the kinds
//! of the moment and kept until those change.

mod aggregated;
mod openapi;
mod plain;
mod protobuf;

use crate::auth::Permit;
use crate::core::Core;
use crate::http::{Response, accepts_gzip, bytes, compressed, header_text, ranges};
use crate::kinds::Set;
use api::status::{Reason, Status, StatusResult};
use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{HeaderMap, StatusCode};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// The Kubernetes version whose API this is.
const MAJOR: &str = "1";
const MINOR: &str = "32";
const GIT_VERSION: &str = "v1.32.4+atoll";

pub struct Discovery {
    core: Arc<Core>,
    cache: Mutex<Cache>,
}

#[derive(Default)]
struct Cache {
    generation: u64,
    documents: HashMap<String, Document>,
}

#[derive(Clone)]
struct Document {
    bytes: Bytes,
    etag: Arc<str>,
    content_type: &'static str,
}

impl Document {
    fn new(bytes: Bytes, content_type: &'static str) -> Self {
        let hash = Sha256::digest(&bytes);
        let etag: String = hash.iter().map(|b| format!("{b:02X}")).collect();
        Document { bytes, etag: etag.into(), content_type }
    }
    fn json(value: &Value, content_type: &'static str) -> Self {
        Document::new(value.to_string().into(), content_type)
    }
}

pub(crate) use crate::http::DiscoveryRoute as Route;

impl Discovery {
    pub fn new(core: Arc<Core>) -> Self {
        Discovery { core, cache: Mutex::default() }
    }

    pub fn answer(&self, _permit: &Permit, route: &Route, headers: &HeaderMap) -> StatusResult<Response> {
        let set = self.core.kinds.current();
        let accept = header_text(headers, header::ACCEPT);
        let make = |name: &str, make: &dyn Fn(&Set) -> StatusResult<Document>| self.cached(&set, name, make);
        let json = "application/json";
        let document = match route {
            Route::Version => Document::json(&version(), json),
            Route::Index => Document::json(&plain::index(&set), json),
            Route::CoreVersions | Route::Groups => {
                let core = matches!(route, Route::CoreVersions);
                match aggregated::wanted(accept) {
                    Some(form) => make(&format!("{}/{core}", form.content_type()), &|set| {
                        Ok(Document::json(&aggregated::list(set, core, form), form.content_type()))
                    })?,
                    None if core => Document::json(&plain::core_versions(&set), json),
                    None => Document::json(&plain::groups(&set), json),
                }
            }
            Route::Group(group) => Document::json(&plain::group(&set, group).ok_or_else(not_found)?, json),
            Route::Resources { group, version } => make(&format!("r/{group}/{version}"), &|set| {
                let value = plain::resources(set, group, version).ok_or_else(not_found)?;
                Ok(Document::json(&value, json))
            })?,
            Route::OpenApiV2 => self.open_api_v2(&set, accept)?,
            Route::OpenApiV3 => {
                let index = self.open_api_index(&set)?;
                Document::json(&index, json)
            }
            Route::OpenApiV3Of(path) => make(&format!("v3/{path}"), &|set| {
                let value = openapi::v3(set, path).ok_or_else(not_found)?;
                Ok(Document::json(&value, json))
            })?,
            Route::OpenId => Document::json(&plain::open_id(&self.core.tokens.issuer), json),
            Route::KeySet => Document::json(&self.core.tokens.key_set(), "application/jwk-set+json"),
        };
        Ok(respond(document, headers))
    }

    /// A document made once per state of the kinds.
    fn cached(&self, set: &Set, name: &str, make: &dyn Fn(&Set) -> StatusResult<Document>) -> StatusResult<Document> {
        let lock = || self.cache.lock().unwrap_or_else(|e| e.into_inner());
        {
            let mut cache = lock();
            if cache.generation != set.generation {
                *cache = Cache { generation: set.generation, documents: HashMap::new() };
            }
            if let Some(document) = cache.documents.get(name) {
                return Ok(document.clone());
            }
        }
        let document = make(set)?;
        let mut cache = lock();
        if cache.generation == set.generation {
            cache.documents.insert(name.to_owned(), document.clone());
        }
        Ok(document)
    }

    fn open_api_v2(&self, set: &Set, accept: &str) -> StatusResult<Document> {
        let protobuf = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
        for range in ranges(accept) {
            match range.media {
                "application/com.github.proto-openapi.spec.v2@v1.0+protobuf"
                | "application/com.github.proto-openapi.spec.v2.v1.0+protobuf" => {
                    return self.cached(set, "v2/protobuf", &|set| {
                        Ok(Document::new(protobuf::document(&openapi::v2(set)).into(), protobuf))
                    });
                }
                "application/json" | "*/*" | "application/*" => break,
                _ => {}
            }
        }
        self.cached(set, "v2/json", &|set| Ok(Document::json(&openapi::v2(set), "application/json")))
    }

    /// Paths of the v3 documents with a hash each, by which clients cache them.
    fn open_api_index(&self, set: &Set) -> StatusResult<Value> {
        let mut paths = serde_json::Map::new();
        for path in openapi::paths(set) {
            let document = self.cached(set, &format!("v3/{path}"), &|set| {
                openapi::v3(set, &path).map(|v| Document::json(&v, "application/json")).ok_or_else(not_found)
            })?;
            let url = format!("/openapi/v3/{path}?hash={}", document.etag);
            paths.insert(path, serde_json::json!({"serverRelativeURL": url}));
        }
        Ok(serde_json::json!({"paths": paths}))
    }
}

fn not_found() -> Status {
    Status::new(Reason::NotFound, "the server could not find the requested resource")
}

fn respond(document: Document, headers: &HeaderMap) -> Response {
    let quoted = format!("\"{}\"", document.etag);
    let known = header_text(headers, header::IF_NONE_MATCH);
    let mut response = if known.split(',').any(|tag| tag.trim().trim_start_matches("W/") == quoted) {
        bytes(StatusCode::NOT_MODIFIED, document.content_type, Bytes::new())
    } else {
        compressed(document.content_type, document.bytes, accepts_gzip(headers))
    };
    if let Ok(value) = HeaderValue::from_str(&quoted) {
        response.headers_mut().insert(header::ETAG, value);
    }
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept, Accept-Encoding"));
    response
}

fn version() -> Value {
    serde_json::json!({
        "major": MAJOR, "minor": MINOR, "gitVersion": GIT_VERSION, "gitCommit": "", "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z", "goVersion": "none", "compiler": "rustc", "platform": "linux/amd64"})
}
