//! What is served: `/version`, `/api`, `/apis`, their aggregated form, and the OpenAPI documents. Derived from the kinds
//! of the moment and kept until those change.

mod aggregated;
mod openapi;
mod plain;
mod protobuf;

use crate::auth::Permit;
use crate::core::Core;
use crate::http::{COMPRESS_FROM, Response, accepts_gzip, bytes, gunzip, gzip, header_text, ranges};
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
    /// By name, with the stamp of the kinds they were made of.
    cache: Mutex<HashMap<String, (u64, Document)>>,
}

#[derive(Clone)]
struct Document {
    bytes: Bytes,
    /// Large documents are kept compressed: that is how nearly everybody wants them, and they are a tenth as large.
    compressed: bool,
    etag: Arc<str>,
    content_type: &'static str,
}

impl Document {
    fn new(bytes: Bytes, content_type: &'static str) -> Self {
        let hash = Sha256::digest(&bytes);
        let etag: Arc<str> = hash.iter().map(|b| format!("{b:02X}")).collect::<String>().into();
        match gzip(&bytes) {
            Some(small) if bytes.len() >= COMPRESS_FROM => {
                Document { bytes: small, compressed: true, etag, content_type }
            }
            _ => Document { bytes, compressed: false, etag, content_type },
        }
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
        let json = "application/json";
        let document = match route {
            Route::Version => Document::json(&version(), json),
            Route::Index => Document::json(&plain::index(&set), json),
            Route::CoreVersions | Route::Groups => {
                let core = matches!(route, Route::CoreVersions);
                match aggregated::wanted(accept) {
                    Some(form) => self.cached(&set, &format!("{}/{core}", form.content_type()), None, &|set| {
                        Ok(Document::json(&aggregated::list(set, core, form), form.content_type()))
                    })?,
                    None if core => Document::json(&plain::core_versions(&set), json),
                    None => Document::json(&plain::groups(&set), json),
                }
            }
            Route::Group(group) => Document::json(&plain::group(&set, group).ok_or_else(not_found)?, json),
            Route::Resources { group, version } => {
                self.cached(&set, &format!("r/{group}/{version}"), Some(group), &|set| {
                    let value = plain::resources(set, group, version).ok_or_else(not_found)?;
                    Ok(Document::json(&value, json))
                })?
            }
            Route::OpenApiV2 => self.open_api_v2(&set, accept)?,
            Route::OpenApiV3 => {
                let index = self.open_api_index(&set)?;
                Document::json(&index, json)
            }
            Route::OpenApiV3Of(path) => self.open_api_v3(&set, path)?,
            Route::OpenId => Document::json(&plain::open_id(&self.core.tokens.issuer), json),
            Route::KeySet => Document::json(&self.core.tokens.key_set(), "application/jwk-set+json"),
        };
        Ok(respond(document, headers))
    }

    /// A document made once per state of the kinds it is about: those of `group`, or all.
    fn cached(
        &self,
        set: &Set,
        name: &str,
        group: Option<&str>,
        make: &dyn Fn(&Set) -> StatusResult<Document>,
    ) -> StatusResult<Document> {
        let stamp = set.stamp(group);
        let lock = || self.cache.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((made_of, document)) = lock().get(name)
            && *made_of == stamp
        {
            return Ok(document.clone());
        }
        let made = make(set);
        let mut cache = lock();
        match &made {
            Ok(document) => drop(cache.insert(name.to_owned(), (stamp, document.clone()))),
            // Nothing of it is served any more; and names that nobody serves are not remembered.
            Err(_) => drop(cache.remove(name)),
        }
        made
    }

    fn open_api_v2(&self, set: &Set, accept: &str) -> StatusResult<Document> {
        let protobuf = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
        for range in ranges(accept) {
            match range.media {
                "application/com.github.proto-openapi.spec.v2@v1.0+protobuf"
                | "application/com.github.proto-openapi.spec.v2.v1.0+protobuf" => {
                    return self.cached(set, "v2/protobuf", None, &|set| {
                        Ok(Document::new(protobuf::document(&openapi::v2(set)).into(), protobuf))
                    });
                }
                "application/json" | "*/*" | "application/*" => break,
                _ => {}
            }
        }
        self.cached(set, "v2/json", None, &|set| Ok(Document::json(&openapi::v2(set), "application/json")))
    }

    fn open_api_v3(&self, set: &Set, path: &str) -> StatusResult<Document> {
        let group = path.split('/').nth(1).filter(|_| path.starts_with("apis/")).unwrap_or("");
        self.cached(set, &format!("v3/{path}"), Some(group), &|set| {
            let value = openapi::v3(set, path).ok_or_else(not_found)?;
            Ok(Document::json(&value, "application/json"))
        })
    }

    /// Paths of the v3 documents with a hash each, by which clients cache them.
    fn open_api_index(&self, set: &Set) -> StatusResult<Value> {
        let mut paths = serde_json::Map::new();
        for path in openapi::paths(set) {
            let document = self.open_api_v3(set, &path)?;
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
    let unchanged = known.split(',').any(|tag| tag.trim().trim_start_matches("W/") == quoted);
    let mut response = if unchanged {
        bytes(StatusCode::NOT_MODIFIED, document.content_type, Bytes::new())
    } else if document.compressed && accepts_gzip(headers) {
        let mut response = bytes(StatusCode::OK, document.content_type, document.bytes);
        response.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        response
    } else if document.compressed {
        bytes(StatusCode::OK, document.content_type, gunzip(&document.bytes))
    } else {
        bytes(StatusCode::OK, document.content_type, document.bytes)
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
