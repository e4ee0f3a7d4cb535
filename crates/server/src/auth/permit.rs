//! Authorisation. One function decides; its answer is a value that cannot be made anywhere else.

use super::User;
use api::status::{Reason, Status, StatusResult};
use std::sync::Arc;

/// What is asked for, in the terms of an access rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`; lower-case HTTP method for
    /// paths that are no resources.
    pub verb: String,
    pub group: String,
    pub version: String,
    pub resource: String,
    pub subresource: String,
    pub namespace: String,
    pub name: String,
    /// The request's path; the only thing set, beside the verb, when `resource` is empty.
    pub path: String,
}

/// Proof that `user` may do what was asked. Only [`authorize`] makes one.
#[derive(Clone, Debug)]
pub struct Permit {
    user: Arc<User>,
    attributes: Arc<Attributes>,
}

impl Permit {
    pub fn user(&self) -> &Arc<User> {
        &self.user
    }
    pub fn attributes(&self) -> &Attributes {
        &self.attributes
    }
    /// For the control plane in this process, which stands above access rules.
    pub(crate) fn internal() -> Self {
        Permit { user: User::internal(), attributes: Arc::new(Attributes::default()) }
    }
}

/// Paths that answer anyone: liveness and version, nothing about what runs here.
const OPEN_PATHS: [&str; 4] = ["/healthz", "/livez", "/readyz", "/version"];

/// Discovery: what every authenticated user may read.
const DISCOVERY: [&str; 4] = ["/api", "/apis", "/openapi", "/.well-known/openid-configuration"];

/// Whether `user` may do that. The one place where access is decided; roles will be looked up here.
pub fn allows(user: &User, asked: &Attributes) -> bool {
    if user.in_group(User::MASTERS) {
        return true;
    }
    let path = asked.path.trim_end_matches('/');
    if asked.resource.is_empty() {
        let below = |root: &str| path == root || path.strip_prefix(root).is_some_and(|rest| rest.starts_with('/'));
        if asked.verb != "get" {
            return false;
        }
        return OPEN_PATHS.iter().any(|p| below(p))
            || (!user.is_anonymous() && (DISCOVERY.iter().any(|p| below(p)) || below("/openid")));
    }
    let self_review = matches!(
        (asked.group.as_str(), asked.resource.as_str()),
        ("authorization.k8s.io", "selfsubjectaccessreviews" | "selfsubjectrulesreviews")
            | ("authentication.k8s.io", "selfsubjectreviews")
    );
    !user.is_anonymous() && self_review && asked.verb == "create" && asked.subresource.is_empty()
}

/// A permit, or the refusal in Kubernetes' words.
pub fn authorize(user: &Arc<User>, asked: Attributes) -> StatusResult<Permit> {
    if allows(user, &asked) {
        return Ok(Permit { user: user.clone(), attributes: Arc::new(asked) });
    }
    if user.is_anonymous() {
        return Err(Status::new(Reason::Unauthorized, "Unauthorized"));
    }
    let name = &user.name;
    if asked.resource.is_empty() {
        let text = format!("forbidden: User \"{name}\" cannot {} path \"{}\"", asked.verb, asked.path);
        return Err(Status::new(Reason::Forbidden, text));
    }
    let resource = if asked.subresource.is_empty() {
        asked.resource.clone()
    } else {
        format!("{}/{}", asked.resource, asked.subresource)
    };
    let dotted =
        if asked.group.is_empty() { asked.resource.clone() } else { format!("{}.{}", asked.resource, asked.group) };
    let place = if asked.namespace.is_empty() {
        " at the cluster scope".to_owned()
    } else {
        format!(" in the namespace \"{}\"", asked.namespace)
    };
    let object = if asked.name.is_empty() { dotted } else { format!("{dotted} \"{}\"", asked.name) };
    let text = format!(
        "{object} is forbidden: User \"{name}\" cannot {} resource \"{resource}\" in API group \"{}\"{place}",
        asked.verb, asked.group
    );
    Err(Status::new(Reason::Forbidden, text).about(&asked.group, &asked.resource, &asked.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(verb: &str, path: &str) -> Attributes {
        Attributes { verb: verb.into(), path: path.into(), ..Attributes::default() }
    }

    #[test]
    fn who_may_what() {
        let masters = User { groups: vec![User::MASTERS.into()], ..User::default() };
        let account = User::service_account("ns", "default", "1");
        let anonymous = User::anonymous();
        let pods = Attributes {
            verb: "list".into(),
            resource: "pods".into(),
            namespace: "ns".into(),
            ..Attributes::default()
        };
        assert!(allows(&masters, &pods) && !allows(&account, &pods) && !allows(&anonymous, &pods));
        for open in ["/healthz", "/livez/ping", "/readyz", "/version", "/version/"] {
            assert!(allows(&anonymous, &path("get", open)), "{open}");
        }
        for shut in ["/api", "/apis/apps", "/openapi/v3", "/healthzz", "/", "/metrics"] {
            assert!(!allows(&anonymous, &path("get", shut)), "{shut}");
        }
        assert!(allows(&account, &path("get", "/apis/apps/v1")) && !allows(&account, &path("get", "/metrics")));
        let review = Attributes {
            verb: "create".into(),
            group: "authorization.k8s.io".into(),
            resource: "selfsubjectaccessreviews".into(),
            ..Attributes::default()
        };
        assert!(allows(&account, &review) && !allows(&anonymous, &review));
    }

    #[test]
    fn refusals_are_worded_as_kubernetes_does() {
        let account = Arc::new(User::service_account("ns", "default", "1"));
        let asked = Attributes {
            verb: "get".into(),
            group: "apps".into(),
            resource: "deployments".into(),
            namespace: "ns".into(),
            name: "web".into(),
            ..Attributes::default()
        };
        let status = authorize(&account, asked).unwrap_err();
        assert_eq!(
            status.message,
            "deployments.apps \"web\" is forbidden: User \"system:serviceaccount:ns:default\" cannot get resource \
             \"deployments\" in API group \"apps\" in the namespace \"ns\""
        );
        assert_eq!(status.code(), 403);
    }
}
