//! `serviceaccounts/token`: tokens made for whoever may ask, bound to the account and, if wished, to a pod.

use super::lookup;
use crate::auth::{Claims, User};
use crate::core::{Core, Target};
use crate::rest::cause;
use api::object::{Meta, Object, object_of};
use api::status::{Reason, Status, StatusResult};
use serde_json::{Value, json};

const DEFAULT_SECONDS: i64 = 3600;
const SHORTEST: i64 = 600;
const LONGEST: i64 = 24 * 3600;

/// Answers a `TokenRequest`.
pub async fn request(core: &Core, target: &Target, mut request: Object) -> StatusResult<Object> {
    let (account, _) = core.storage.must_get(&target.kind, &target.namespace, &target.name).await?;
    let invalid = |field: &str, reason: &str, text: String| {
        Status::invalid("authentication.k8s.io", "TokenRequest", &target.name, vec![cause(reason, field, text)])
    };
    let seconds = request.pointer("/spec/expirationSeconds").and_then(Value::as_i64).unwrap_or(DEFAULT_SECONDS);
    if seconds < SHORTEST {
        let text = format!("Invalid value: {seconds}: may not specify a duration less than 10 minutes");
        return Err(invalid("spec.expirationSeconds", "FieldValueInvalid", text));
    }
    let seconds = seconds.min(LONGEST);
    let audiences: Vec<String> = request
        .pointer("/spec/audiences")
        .and_then(Value::as_array)
        .map(|list| list.iter().filter_map(Value::as_str).map(str::to_owned).collect())
        .unwrap_or_default();
    let audiences = if audiences.is_empty() { vec![core.tokens.issuer.clone()] } else { audiences };
    let mut bound = json!({"namespace": target.namespace,
                           "serviceaccount": {"name": target.name, "uid": account.uid()}});
    if let Some(reference) = request.pointer("/spec/boundObjectRef").filter(|r| r.is_object()) {
        let (kind, name) = (reference.str_at("/kind"), reference.str_at("/name"));
        let plural = match kind {
            "Pod" => "pods",
            "Secret" => "secrets",
            other => {
                let text = format!("cannot bind token to object of type {other}");
                return Err(invalid("spec.boundObjectRef", "FieldValueInvalid", format!("Invalid value: {text}")));
            }
        };
        let Some(object) = lookup(core, "", plural, &target.namespace, name).await? else {
            return Err(Status::not_found("", plural, name));
        };
        let uid = reference.str_at("/uid");
        if !uid.is_empty() && uid != object.uid() {
            let why = format!("the UID in the bound object reference ({uid}) does not match the UID in record");
            return Err(Status::conflict("", plural, name, &why));
        }
        if kind == "Pod" && object.str_at("/spec/serviceAccountName") != target.name {
            let text = "cannot bind token for serviceaccount to pod running with different serviceaccount name.";
            return Err(Status::bad_request(text));
        }
        let named = json!({"name": name, "uid": object.uid()});
        object_of(&mut bound).insert(kind.to_ascii_lowercase(), named);
    }
    let now = api::time::now();
    let claims = json!({"iss": core.tokens.issuer, "aud": audiences, "exp": now + seconds, "iat": now, "nbf": now,
                        "sub": format!("system:serviceaccount:{}:{}", target.namespace, target.name),
                        "jti": api::names::uid(), "kubernetes.io": bound});
    let claims: Claims = serde_json::from_value(claims).map_err(Status::internal)?;
    let token = core.tokens.sign(&claims).map_err(Status::internal)?;
    let fields = object_of(&mut request);
    fields.insert("apiVersion".into(), "authentication.k8s.io/v1".into());
    fields.insert("kind".into(), "TokenRequest".into());
    let expires = api::time::rfc3339(now + seconds);
    fields.insert("status".into(), json!({"token": token, "expirationTimestamp": expires}));
    let spec = api::object::child(fields, "spec");
    spec.insert("expirationSeconds".into(), seconds.into());
    spec.insert("audiences".into(), claims.aud.clone().into());
    request.metadata_mut().insert("name".into(), target.name.as_str().into());
    request.metadata_mut().insert("namespace".into(), target.namespace.as_str().into());
    Ok(request)
}

/// The account a token speaks for; refused if it, or what it is bound to, is gone.
pub async fn authenticate(core: &Core, token: &str) -> StatusResult<User> {
    let refused = |why: String| {
        tracing::debug!("token refused: {why}");
        Status::new(Reason::Unauthorized, "Unauthorized")
    };
    let audience = [core.tokens.issuer.as_str()];
    let claims = core.tokens.verify(token, &audience, api::time::now()).map_err(|e| refused(e.to_string()))?;
    let bound = &claims.bound;
    let mut needed = vec![("serviceaccounts", &bound.serviceaccount)];
    needed.extend(bound.pod.iter().map(|pod| ("pods", pod)));
    needed.extend(bound.secret.iter().map(|secret| ("secrets", secret)));
    for (plural, named) in needed {
        let object = lookup(core, "", plural, &bound.namespace, &named.name).await?;
        if object.is_none_or(|object| object.uid() != named.uid) {
            return Err(refused(format!("{plural} {}/{} is gone", bound.namespace, named.name)));
        }
    }
    let mut user = User::service_account(&bound.namespace, &bound.serviceaccount.name, &bound.serviceaccount.uid);
    if claims.sub != user.name {
        return Err(refused("subject and claims differ".into()));
    }
    user.extra.insert("authentication.kubernetes.io/credential-id".into(), vec![format!("JTI={}", claims.jti)]);
    if let Some(pod) = &bound.pod {
        user.extra.insert("authentication.kubernetes.io/pod-name".into(), vec![pod.name.clone()]);
        user.extra.insert("authentication.kubernetes.io/pod-uid".into(), vec![pod.uid.clone()]);
    }
    Ok(user)
}
