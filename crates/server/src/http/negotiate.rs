//! What form of an answer the client wants.

use api::status::{Reason, Status, StatusResult};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// The object itself.
    Full,
    /// `meta.k8s.io` `Table`, for people.
    Table { v1: bool },
    /// `PartialObjectMetadata` and its list.
    Metadata { v1: bool },
}

impl Form {
    /// A number per form, for caches.
    pub fn id(self) -> u64 {
        match self {
            Form::Full => 0,
            Form::Metadata { v1 } => 1 + u64::from(v1),
            Form::Table { v1 } => 3 + u64::from(v1),
        }
    }
    pub fn meta_version(self) -> &'static str {
        match self {
            Form::Table { v1: false } | Form::Metadata { v1: false } => "meta.k8s.io/v1beta1",
            _ => "meta.k8s.io/v1",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    pub form: Form,
    /// Said to the client as the content type; JSON is YAML.
    pub yaml: bool,
    pub pretty: bool,
}

/// One media range of an `Accept` header.
#[derive(Debug)]
pub struct Range<'a> {
    pub media: &'a str,
    params: Vec<(&'a str, &'a str)>,
    weight: f32,
}

impl Range<'_> {
    pub fn param(&self, name: &str) -> &str {
        self.params.iter().find(|(k, _)| k.eq_ignore_ascii_case(name)).map(|(_, v)| *v).unwrap_or("")
    }
}

/// The media ranges of an `Accept` header, wanted most first.
pub fn ranges(accept: &str) -> Vec<Range<'_>> {
    let mut list: Vec<Range<'_>> = accept
        .split(',')
        .filter_map(|part| {
            let mut parts = part.split(';').map(str::trim);
            let media = parts.next().filter(|m| !m.is_empty())?;
            let params: Vec<_> =
                parts.filter_map(|p| p.split_once('=')).map(|(k, v)| (k.trim(), v.trim().trim_matches('"'))).collect();
            let weight = params.iter().find(|(k, _)| *k == "q").and_then(|(_, v)| v.parse().ok()).unwrap_or(1.0);
            Some(Range { media, params, weight })
        })
        .take(32)
        .collect();
    list.sort_by(|a, b| b.weight.total_cmp(&a.weight));
    list
}

/// The form of an answer that is objects; tables and metadata only where `convertible`.
pub fn accepted(accept: &str, pretty: bool, convertible: bool) -> StatusResult<Accepted> {
    let full = |yaml| Accepted { form: Form::Full, yaml, pretty };
    if accept.is_empty() {
        return Ok(full(false));
    }
    for range in ranges(accept).iter().filter(|r| r.weight > 0.0) {
        let yaml = match range.media {
            "application/json" | "*/*" | "application/*" => false,
            "application/yaml" => true,
            _ => continue,
        };
        let v1 = match (range.param("g"), range.param("v")) {
            ("meta.k8s.io", "v1") => Some(true),
            ("meta.k8s.io", "v1beta1") => Some(false),
            _ => None,
        };
        let form = match (range.param("as"), v1) {
            ("", _) => return Ok(Accepted { yaml, ..full(yaml) }),
            ("Table", Some(v1)) if convertible => Form::Table { v1 },
            ("PartialObjectMetadata" | "PartialObjectMetadataList", Some(v1)) if convertible => Form::Metadata { v1 },
            _ => continue,
        };
        return Ok(Accepted { form, yaml, pretty });
    }
    Err(Status::new(
        Reason::NotAcceptable,
        "only the following media types are accepted: application/json, application/yaml",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clients_ask_for() {
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(accepted(kubectl, false, true).unwrap().form, Form::Table { v1: true });
        assert_eq!(accepted(kubectl, false, false).unwrap().form, Form::Full);
        let go = "application/vnd.kubernetes.protobuf,application/json";
        assert_eq!(accepted(go, false, true).unwrap().form, Form::Full);
        assert!(accepted("application/yaml", false, true).unwrap().yaml);
        assert!(accepted("application/json;q=0.1, application/yaml", false, true).unwrap().yaml);
        for bad in ["application/vnd.kubernetes.protobuf", "text/html", "application/json;q=0"] {
            assert_eq!(accepted(bad, false, true).unwrap_err().code(), 406, "{bad}");
        }
        let metadata = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";
        assert_eq!(accepted(metadata, false, true).unwrap().form, Form::Metadata { v1: true });
    }
}
