//! Reviews: virtual resources by which a client asks who it is and what it may.

use super::{Attributes, Permit, User, allows};
use crate::admission::tokens;
use crate::core::Core;
use api::object::{Meta, Object, object_of};
use api::status::{Reason, Status, StatusResult};
use serde_json::{Value, json};

/// Resources of the two review groups: group, plural, kind.
pub const REVIEWS: [(&str, &str, &str); 6] = [
    ("authorization.k8s.io", "selfsubjectaccessreviews", "SelfSubjectAccessReview"),
    ("authorization.k8s.io", "selfsubjectrulesreviews", "SelfSubjectRulesReview"),
    ("authorization.k8s.io", "subjectaccessreviews", "SubjectAccessReview"),
    ("authorization.k8s.io", "localsubjectaccessreviews", "LocalSubjectAccessReview"),
    ("authentication.k8s.io", "selfsubjectreviews", "SelfSubjectReview"),
    ("authentication.k8s.io", "tokenreviews", "TokenReview"),
];

pub async fn serve(core: &Core, permit: &Permit, group: &str, plural: &str, object: Object) -> StatusResult<Value> {
    let known = REVIEWS.iter().find(|(g, p, _)| *g == group && *p == plural);
    let Some((_, _, kind)) = known else {
        return Err(Status::new(Reason::NotFound, "the server could not find the requested resource"));
    };
    if !object.is_object() || object.get("kind").and_then(Value::as_str).is_some_and(|found| found != *kind) {
        return Err(Status::bad_request(format!("the object provided is not a {kind}")));
    }
    let user = permit.user();
    let status = match plural {
        "selfsubjectaccessreviews" => access(user, &object)?,
        "subjectaccessreviews" | "localsubjectaccessreviews" => access(&subject(&object)?, &object)?,
        "selfsubjectrulesreviews" => rules(user),
        "selfsubjectreviews" => json!({"userInfo": user_info(user)}),
        _ => token(core, &object).await,
    };
    let mut answer = object;
    let fields = object_of(&mut answer);
    fields.insert("kind".into(), (*kind).into());
    fields.insert("apiVersion".into(), format!("{group}/v1").into());
    fields.insert("status".into(), status);
    let metadata = answer.metadata_mut();
    metadata.entry("creationTimestamp").or_insert(Value::Null);
    Ok(answer)
}

fn user_info(user: &User) -> Value {
    let mut info = json!({"username": user.name, "groups": user.groups});
    let fields = object_of(&mut info);
    if !user.uid.is_empty() {
        fields.insert("uid".into(), user.uid.as_str().into());
    }
    if !user.extra.is_empty() {
        fields.insert("extra".into(), json!(user.extra));
    }
    info
}

fn subject(review: &Object) -> StatusResult<User> {
    let strings = |pointer: &str| -> Vec<String> {
        let list = review.pointer(pointer).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        list.iter().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let user =
        User { name: review.str_at("/spec/user").to_owned(), groups: strings("/spec/groups"), ..User::default() };
    if user.name.is_empty() && user.groups.is_empty() {
        return Err(Status::bad_request("spec.user: Invalid value: at least one of user or group must be specified"));
    }
    Ok(user)
}

fn access(user: &User, review: &Object) -> StatusResult<Value> {
    let text = |pointer: &str| review.str_at(pointer).to_owned();
    let asked = if review.pointer("/spec/resourceAttributes").is_some_and(Value::is_object) {
        Attributes {
            verb: text("/spec/resourceAttributes/verb"),
            group: text("/spec/resourceAttributes/group"),
            version: text("/spec/resourceAttributes/version"),
            resource: text("/spec/resourceAttributes/resource"),
            subresource: text("/spec/resourceAttributes/subresource"),
            namespace: text("/spec/resourceAttributes/namespace"),
            name: text("/spec/resourceAttributes/name"),
            path: String::new(),
        }
    } else if review.pointer("/spec/nonResourceAttributes").is_some_and(Value::is_object) {
        Attributes {
            verb: text("/spec/nonResourceAttributes/verb"),
            path: text("/spec/nonResourceAttributes/path"),
            ..Attributes::default()
        }
    } else {
        return Err(Status::bad_request(
            "spec.resourceAttributes: Invalid value: exactly one of nonResourceAttributes or resourceAttributes must be specified",
        ));
    };
    Ok(json!({"allowed": allows(user, &asked)}))
}

fn rules(user: &User) -> Value {
    let mut resources = vec![
        json!({"verbs": ["create"], "apiGroups": ["authorization.k8s.io"],
               "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews"]}),
        json!({"verbs": ["create"], "apiGroups": ["authentication.k8s.io"], "resources": ["selfsubjectreviews"]}),
    ];
    let mut paths = vec![json!({"verbs": ["get"], "nonResourceURLs": [
        "/api", "/api/*", "/apis", "/apis/*", "/healthz", "/livez", "/openapi", "/openapi/*", "/readyz", "/version"]})];
    if user.in_group(User::MASTERS) {
        resources.insert(0, json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}));
        paths.insert(0, json!({"verbs": ["*"], "nonResourceURLs": ["*"]}));
    }
    json!({"resourceRules": resources, "nonResourceRules": paths, "incomplete": false})
}

async fn token(core: &Core, review: &Object) -> Value {
    match tokens::authenticate(core, review.str_at("/spec/token")).await {
        Ok(user) => json!({"authenticated": true, "user": user_info(&user), "audiences": [core.tokens.issuer]}),
        Err(_) => json!({"authenticated": false, "error": "the token is not valid here"}),
    }
}
