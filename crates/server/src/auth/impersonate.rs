//! `kubectl --as`: acting as someone else, for those who may.
//! <https://kubernetes.io/docs/reference/access-authn-authz/authentication/#user-impersonation>

use super::{Attributes, User, authorize};
use api::status::{Status, StatusResult};
use http::{HeaderMap, HeaderValue};
use std::sync::Arc;

const USER: &str = "impersonate-user";
const GROUP: &str = "impersonate-group";
const UID: &str = "impersonate-uid";
const EXTRA: &str = "impersonate-extra-";

fn text(value: &HeaderValue) -> StatusResult<String> {
    let text = value.to_str().map_err(|_| Status::bad_request("impersonation headers must be ASCII text"))?;
    Ok(text.to_owned())
}

/// Who the request is to be treated as coming from: `user`, or whom it names if `user` may act as them.
pub fn impersonated(user: Arc<User>, headers: &HeaderMap) -> StatusResult<Arc<User>> {
    let asked = headers.keys().any(|name| name.as_str().starts_with("impersonate-"));
    if !asked {
        return Ok(user);
    }
    let name = match headers.get(USER) {
        Some(name) => text(name)?,
        None => return Err(Status::bad_request("requested groups, uid or extra without impersonating a user")),
    };
    let may = |resource: &str, name: &str| {
        let (verb, resource, name) = ("impersonate".into(), resource.into(), name.into());
        authorize(&user, Attributes { verb, resource, name, ..Attributes::default() }).map(drop)
    };
    let mut other = User::default();
    match name.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':')) {
        Some((namespace, account)) => {
            may("serviceaccounts", account)?;
            other = User::service_account(namespace, account, "");
        }
        None => may("users", &name)?,
    }
    let groups = headers.get_all(GROUP).iter().map(text).collect::<StatusResult<Vec<_>>>()?;
    for group in groups {
        may("groups", &group)?;
        other.groups.push(group);
    }
    if let Some(uid) = headers.get(UID) {
        other.uid = text(uid)?;
        may("uids", &other.uid)?;
    }
    for (header, value) in headers {
        if let Some(key) = header.as_str().strip_prefix(EXTRA) {
            may("userextras", key)?;
            other.extra.entry(key.to_owned()).or_default().push(text(value)?);
        }
    }
    if name != User::ANONYMOUS && !other.in_group(User::AUTHENTICATED) {
        other.groups.push(User::AUTHENTICATED.into());
    }
    other.name = name;
    Ok(Arc::new(other))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(k, v)| (http::HeaderName::from_static(k), HeaderValue::from_str(v).unwrap())).collect()
    }

    #[test]
    fn only_masters_act_as_others() {
        let master = Arc::new(User { name: "m".into(), groups: vec![User::MASTERS.into()], ..User::default() });
        let jane = headers(&[("impersonate-user", "jane"), ("impersonate-group", "devs")]);
        let seen = impersonated(master.clone(), &jane).unwrap();
        assert_eq!((seen.name.as_str(), seen.groups.join(" ")), ("jane", "devs system:authenticated".into()));
        assert_eq!(impersonated(master.clone(), &HeaderMap::new()).unwrap(), master);
        assert_eq!(impersonated(seen, &jane).unwrap_err().code(), 403);
        let anonymous = Arc::new(User::anonymous());
        assert_eq!(impersonated(anonymous, &jane).unwrap_err().code(), 401);
        let nobody = headers(&[("impersonate-group", "system:masters")]);
        assert_eq!(impersonated(master.clone(), &nobody).unwrap_err().code(), 400);
        let account = headers(&[("impersonate-user", "system:serviceaccount:ns:sa")]);
        assert!(impersonated(master, &account).unwrap().in_group("system:serviceaccounts:ns"));
    }
}
