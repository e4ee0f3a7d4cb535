//! Requests for resources: which verb on which kind, its options, and the form of the answer.

use super::negotiate::{Accepted, accepted};
use super::objects::{self, Include};
use super::query::propagation;
use super::route::ResourcePath;
use super::{
    Decoded, Format, Query, Request, Response, Service, decode, header_text, inspect, logs, machines,
    method_not_allowed, no_such_path, proxy, respond, review, watch,
};
use crate::admission::{pods, returns_deleted, selectable, subresources, tokens};
use crate::auth::Permit;
use crate::core::Target;
use crate::patch;
use crate::rest::{Deleted, FieldValidation, ListRequest, Preconditions, Wanted, WriteOptions, Written, scale};
use crate::watch::Filter;
use api::client::{DeleteOptions, Patch};
use api::kind::{Kind, Scope};
use api::object::{Meta, Object};
use api::status::{Reason, Status, StatusResult};
use http::{Method, StatusCode, header};
use serde_json::{Value, json};
use std::sync::Arc;

/// Groups that are answered, not stored.
fn is_review(path: &ResourcePath) -> bool {
    matches!(path.group.as_str(), "authorization.k8s.io" | "authentication.k8s.io")
        && path.version == "v1"
        && path.name.is_empty()
}

/// What a request brings beside its body.
struct Asked<'a> {
    service: &'a Service,
    permit: &'a Permit,
    path: ResourcePath,
    query: Query,
    accepted: Accepted,
    gzip: bool,
    user_agent: String,
    content_type: String,
}

pub async fn handle(
    service: &Service,
    permit: &Permit,
    request: Request,
    path: ResourcePath,
    query: Query,
) -> StatusResult<Response> {
    if is_review(&path) {
        return review(service, permit, request, &path).await;
    }
    if path.group == machines::GROUP {
        return machines::handle(service, permit, request, &path).await;
    }
    if path.group == api::inspect::GROUP {
        return inspect::handle(service, request, &path, &query).await;
    }
    let kinds = service.core.kinds.current();
    let kind = kinds.get(&path.group, &path.version, &path.plural).cloned().ok_or_else(no_such_path)?;
    if !path.name.is_empty() || matches!(request.method(), &Method::POST) {
        scoped(&kind, &path)?;
    }
    if kind.scope == Scope::Cluster && !path.namespace.is_empty() && path.plural != "namespaces" {
        return Err(no_such_path());
    }
    let streams = logs::is_stream(&kind, &path) || path.subresource == "proxy";
    let headers = request.headers();
    let pretty = query.flag("pretty");
    let accept = header_text(headers, header::ACCEPT).to_owned();
    let accepted = if streams { accepted("", false, false) } else { accepted(&accept, pretty, true) }?;
    let asked = Asked {
        service,
        permit,
        accepted,
        gzip: respond::accepts_gzip(headers),
        user_agent: header_text(headers, header::USER_AGENT).to_owned(),
        content_type: header_text(headers, header::CONTENT_TYPE).to_owned(),
        path,
        query,
    };
    if asked.path.subresource == "proxy" && subresources::find(&kind, "proxy").is_some() {
        return proxy::handle(&service.core, permit, &kind, &asked.path, request).await;
    }
    if streams {
        let target = asked.target(&kind);
        return logs::handle(service, permit, request, &target, &asked.path.subresource, &asked.query).await;
    }
    asked.dispatch(&kind, request).await
}

/// Namespaced kinds need a namespace for what is about one object; cluster-scoped ones must have none.
fn scoped(kind: &Kind, path: &ResourcePath) -> StatusResult<()> {
    match (kind.scope, path.namespace.is_empty()) {
        (Scope::Namespaced, true) if path.name.is_empty() => Err(method_not_allowed()),
        (Scope::Namespaced, true) => Err(Status::bad_request("an empty namespace may not be set during creation")),
        _ => Ok(()),
    }
}

impl Asked<'_> {
    fn target(&self, kind: &Arc<Kind>) -> Target {
        Target::new(kind, &self.path.namespace, &self.path.name)
    }

    async fn dispatch(&self, kind: &Arc<Kind>, request: Request) -> StatusResult<Response> {
        let method = request.method().clone();
        let path = &self.path;
        self.check_subresource(kind)?;
        match (&method, path.name.is_empty(), path.subresource.as_str()) {
            (&Method::GET | &Method::HEAD, true, "") if self.query.flag("watch") => self.watch(kind).await,
            (&Method::GET | &Method::HEAD, true, "") => self.list(kind).await,
            (&Method::GET | &Method::HEAD, false, "") if self.query.flag("watch") => self.watch(kind).await,
            (&Method::GET | &Method::HEAD, false, "" | "status" | "scale") => self.get(kind).await,
            (&Method::POST, true, "") => self.create(kind, request).await,
            (&Method::POST, false, "binding" | "eviction" | "token") => self.act(kind, request).await,
            (&Method::PUT, false, "" | "status" | "scale" | "finalize") => self.replace(kind, request).await,
            (&Method::PATCH, false, "" | "status" | "scale") => self.patch(kind, request).await,
            (&Method::DELETE, false, "") => self.delete(kind, request).await,
            (&Method::DELETE, true, "") => self.delete_collection(kind, request).await,
            _ => Err(method_not_allowed()),
        }
    }

    /// Whether the kind has the subresource that the path names.
    fn check_subresource(&self, kind: &Arc<Kind>) -> StatusResult<()> {
        let there = match self.path.subresource.as_str() {
            "" => true,
            "status" => kind.subresources.status,
            "scale" => kind.subresources.scale.is_some(),
            other => subresources::find(kind, other).is_some(),
        };
        if there && self.path.rest.is_empty() { Ok(()) } else { Err(no_such_path()) }
    }

    fn filter(&self, kind: &Arc<Kind>) -> StatusResult<Filter> {
        let namespace = if kind.scope == Scope::Cluster { "" } else { self.path.namespace.as_str() };
        let mut fields = self.query.get("fieldSelector").to_owned();
        if !self.path.name.is_empty() {
            fields = format!("metadata.name={}", self.path.name);
        }
        Filter::parse(namespace, self.query.get("labelSelector"), &fields, selectable(kind))
    }

    fn include(&self) -> StatusResult<Include> {
        Include::parse(self.query.get("includeObject"))
    }

    fn write_options(&self, manager: Option<&str>) -> StatusResult<WriteOptions> {
        Ok(WriteOptions {
            dry_run: self.query.dry_run()?,
            manager: patch::manager_name(
                manager,
                Some(&self.user_agent).filter(|a| !a.is_empty()).map(|a| a.as_str()),
            )?,
            subresource: self.path.subresource.clone(),
            validation: self.query.field_validation()?,
            duplicates: Vec::new(),
        })
    }

    fn manager(&self) -> Option<&str> {
        Some(self.query.get("fieldManager")).filter(|m| !m.is_empty())
    }

    async fn body(&self, request: Request) -> StatusResult<Decoded> {
        let format = decode::format_of(&self.content_type)?;
        let bytes = decode::read(request.into_body()).await?;
        if bytes.is_empty() {
            return Err(Status::bad_request("the body of the request is empty; an object is expected"));
        }
        decode::decode(&bytes, format)
    }

    async fn watch(&self, kind: &Arc<Kind>) -> StatusResult<Response> {
        watch::serve(self.service, kind, self.filter(kind)?, &self.query, self.accepted).await
    }

    async fn list(&self, kind: &Arc<Kind>) -> StatusResult<Response> {
        let request = ListRequest {
            kind: kind.clone(),
            filter: self.filter(kind)?,
            limit: self.query.number::<usize>("limit")?.unwrap_or(0),
            continue_token: self.query.get("continue").to_owned(),
            resource_version: self.query.get("resourceVersion").to_owned(),
            version_match: self.query.version_match()?,
        };
        let answer = self.service.core.list(&request).await?;
        objects::list(kind, &answer, self.accepted, self.include()?, self.gzip)
    }

    async fn get(&self, kind: &Arc<Kind>) -> StatusResult<Response> {
        let target = self.target(kind);
        let object = self.service.core.get(&target).await?;
        let version: i64 = self.query.number("resourceVersion")?.unwrap_or(0);
        if version > 0 {
            let now = self.service.core.storage.store.revision().await.map_err(crate::rest::storage::status_of)?;
            if version > now {
                return Err(crate::rest::storage::too_new(version, now));
            }
        }
        if self.path.subresource == "scale" {
            return Ok(respond::json(StatusCode::OK, &scale::show(&target, &object)?));
        }
        objects::object(kind, &object, self.accepted, self.include()?, StatusCode::OK)
    }

    fn written(&self, kind: &Arc<Kind>, written: Written) -> StatusResult<Response> {
        let code = if written.created { StatusCode::CREATED } else { StatusCode::OK };
        let mut response = if self.path.subresource == "scale" {
            respond::json(code, &scale::show(&self.target(kind), &written.object)?)
        } else {
            objects::object(kind, &written.object, self.accepted, self.include()?, code)?
        };
        respond::warn(&mut response, &written.warnings);
        Ok(response)
    }

    async fn create(&self, kind: &Arc<Kind>, request: Request) -> StatusResult<Response> {
        let body = self.body(request).await?;
        let mut options = self.write_options(self.manager())?;
        options.duplicates = body.duplicates;
        let target = self.target(kind);
        // `Binding`s may be posted to their own collection too; nobody does any more.
        let written = self.service.core.create(self.permit, &target, body.value, &options).await?;
        self.written(kind, written)
    }

    async fn replace(&self, kind: &Arc<Kind>, request: Request) -> StatusResult<Response> {
        let body = self.body(request).await?;
        let mut options = self.write_options(self.manager())?;
        options.duplicates = body.duplicates;
        let target = self.target(kind);
        let written = self.service.core.update(self.permit, &target, body.value, &options).await?;
        self.written(kind, written)
    }

    async fn patch(&self, kind: &Arc<Kind>, request: Request) -> StatusResult<Response> {
        let media = self.content_type.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
        let bytes = decode::read(request.into_body()).await?;
        let format = if media == "application/apply-patch+yaml" { Format::Yaml } else { Format::Json };
        let wrong = || {
            Status::new(
                Reason::UnsupportedMediaType,
                format!(
                    "the body of the request was in an unknown format ({media}) - accepted media types include: \
                     application/json-patch+json, application/merge-patch+json, \
                     application/strategic-merge-patch+json, application/apply-patch+yaml"
                ),
            )
        };
        if !matches!(
            media.as_str(),
            "application/json-patch+json"
                | "application/merge-patch+json"
                | "application/strategic-merge-patch+json"
                | "application/apply-patch+yaml"
        ) {
            return Err(wrong());
        }
        let body = decode::decode(&bytes, format)?;
        let apply = media == "application/apply-patch+yaml";
        if apply && self.manager().is_none() {
            return Err(Status::bad_request(
                "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch",
            ));
        }
        if !apply && self.query.has("force") {
            return Err(Status::bad_request(
                "PatchOptions.meta.k8s.io \"\" is invalid: force: Forbidden: may not be specified for non-apply patch",
            ));
        }
        let mut options = self.write_options(self.manager())?;
        options.duplicates = body.duplicates;
        let patch = match media.as_str() {
            "application/json-patch+json" => Patch::Json(body.value),
            "application/merge-patch+json" => Patch::Merge(body.value),
            "application/strategic-merge-patch+json" => {
                if !api::openapi::takes_strategic(kind) {
                    return Err(wrong());
                }
                Patch::Strategic(body.value)
            }
            _ => Patch::Apply { object: body.value, manager: options.manager.clone(), force: self.query.flag("force") },
        };
        let written = self.service.core.patch(self.permit, &self.target(kind), &patch, &options).await?;
        self.written(kind, written)
    }

    /// `DeleteOptions` from the body, else from the query.
    async fn delete_options(&self, request: Request) -> StatusResult<(DeleteOptions, Wanted, bool)> {
        let bytes = decode::read(request.into_body()).await?;
        let body = if bytes.is_empty() {
            Value::Null
        } else {
            let value = decode::decode(&bytes, decode::format_of(&self.content_type)?)?.value;
            if value.get("kind").and_then(Value::as_str).is_some_and(|kind| kind != "DeleteOptions") {
                return Err(Status::bad_request("the body of a delete must be DeleteOptions"));
            }
            value
        };
        delete_options(&body, &self.query)
    }

    async fn delete(&self, kind: &Arc<Kind>, request: Request) -> StatusResult<Response> {
        let (options, wanted, dry_run) = self.delete_options(request).await?;
        let target = self.target(kind);
        match self.service.core.delete(self.permit, &target, &options, wanted, dry_run).await? {
            Deleted::Marked(object) => objects::object(kind, &object, self.accepted, self.include()?, StatusCode::OK),
            Deleted::Gone(object) if returns_deleted(kind) => {
                objects::object(kind, &object, self.accepted, self.include()?, StatusCode::OK)
            }
            Deleted::Gone(object) => Ok(respond::json(StatusCode::OK, &success(kind, object.name(), object.uid()))),
        }
    }

    async fn delete_collection(&self, kind: &Arc<Kind>, request: Request) -> StatusResult<Response> {
        if kind.scope == Scope::Namespaced && self.path.namespace.is_empty() {
            return Err(method_not_allowed());
        }
        let (options, wanted, dry_run) = self.delete_options(request).await?;
        let list = ListRequest::all(kind, self.filter(kind)?);
        let write = WriteOptions { dry_run, ..WriteOptions::default() };
        let answer = self.service.core.delete_collection(self.permit, &list, &options, wanted, &write).await?;
        objects::list(kind, &answer, self.accepted, self.include()?, self.gzip)
    }

    /// Subresources that are something to do.
    async fn act(&self, kind: &Arc<Kind>, request: Request) -> StatusResult<Response> {
        let core = &self.service.core;
        let target = self.target(kind);
        let body = self.body(request).await?.value;
        match self.path.subresource.as_str() {
            "binding" => {
                let options = self.write_options(self.manager())?;
                core.bind(self.permit, &target, &body, &options).await?;
                Ok(respond::json(
                    StatusCode::CREATED,
                    &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}),
                ))
            }
            "eviction" => {
                let inner = body.get("deleteOptions").cloned().unwrap_or(Value::Null);
                let (options, wanted, mut dry_run) = delete_options(&inner, &self.query)?;
                dry_run |= self.query.dry_run()?;
                core.delete(self.permit, &target, &options, wanted, dry_run).await?;
                Ok(respond::json(
                    StatusCode::CREATED,
                    &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}),
                ))
            }
            _ => Ok(respond::json(StatusCode::CREATED, &tokens::request(core, &target, body).await?)),
        }
    }
}

fn delete_options(body: &Value, query: &Query) -> StatusResult<(DeleteOptions, Wanted, bool)> {
    let text = |pointer: &str| body.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
    let grace = match body.get("gracePeriodSeconds").and_then(Value::as_i64) {
        Some(seconds) => Some(seconds),
        None => query.number::<i64>("gracePeriodSeconds")?,
    };
    if grace.is_some_and(|seconds| seconds < 0) {
        return Err(Status::bad_request("gracePeriodSeconds: Invalid value: must be greater than or equal to 0"));
    }
    let policy = text("/propagationPolicy").unwrap_or_else(|| query.get("propagationPolicy").to_owned());
    let mut wanted = propagation(&policy)?;
    let orphan = body.get("orphanDependents").and_then(Value::as_bool);
    let orphan = orphan.or_else(|| query.has("orphanDependents").then(|| query.flag("orphanDependents")));
    if let Some(orphan) = orphan {
        if wanted.is_some() {
            return Err(Status::bad_request("orphanDependents and propagationPolicy cannot be both set"));
        }
        use api::client::Propagation;
        wanted = Some(if orphan { Propagation::Orphan } else { Propagation::Background });
    }
    let listed = body.get("dryRun").and_then(Value::as_array).is_some_and(|l| l.iter().any(|v| v == "All"));
    let options = DeleteOptions {
        grace_period_seconds: grace,
        propagation: wanted.unwrap_or_default(),
        uid: text("/preconditions/uid"),
        resource_version: text("/preconditions/resourceVersion"),
    };
    Ok((options, Wanted { propagation: wanted }, listed || query.dry_run()?))
}

fn success(kind: &Kind, name: &str, uid: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
           "details": {"name": name, "group": &*kind.resource.group, "kind": &*kind.resource.plural, "uid": uid}})
}

impl crate::core::Core {
    /// `pods/binding`: the pod's node, once and for all.
    pub async fn bind(
        &self,
        permit: &Permit,
        target: &Target,
        binding: &Object,
        options: &WriteOptions,
    ) -> StatusResult<()> {
        let options =
            WriteOptions { subresource: "binding".into(), validation: FieldValidation::Ignore, ..options.clone() };
        let change = |live: &Object| pods::bound(target, live, binding);
        self.modify(permit, target, &options, &Preconditions::default(), change).await.map(drop)
    }
}
