//! Subresources beyond `status` and `scale`: what single kinds can be asked to do.

use api::kind::Kind;

/// A subresource as discovery shows it and as requests find it.
pub struct Sub {
    pub name: &'static str,
    /// Kind of its object; empty = the parent's.
    pub kind: &'static str,
    /// Group and version of that kind where they differ from the parent's.
    pub group: Option<(&'static str, &'static str)>,
    pub verbs: &'static [&'static str],
}

const fn sub(
    name: &'static str,
    kind: &'static str,
    group: Option<(&'static str, &'static str)>,
    verbs: &'static [&'static str],
) -> Sub {
    Sub { name, kind, group, verbs }
}

const PROXY: &[&str] = &["create", "delete", "get", "patch", "update"];

const PODS: &[Sub] = &[
    sub("attach", "PodAttachOptions", None, &["create", "get"]),
    sub("binding", "Binding", None, &["create"]),
    sub("eviction", "Eviction", Some(("policy", "v1")), &["create"]),
    sub("exec", "PodExecOptions", None, &["create", "get"]),
    sub("log", "", None, &["get"]),
    sub("portforward", "PodPortForwardOptions", None, &["create", "get"]),
    sub("proxy", "PodProxyOptions", None, PROXY),
];
const SERVICES: &[Sub] = &[sub("proxy", "ServiceProxyOptions", None, PROXY)];
/// Logs of pods that are gone.
const FUNCTIONS: &[Sub] = &[sub("log", "", None, &["get"])];
const NAMESPACES: &[Sub] = &[sub("finalize", "", None, &["update"])];
const ACCOUNTS: &[Sub] = &[sub("token", "TokenRequest", Some(("authentication.k8s.io", "v1")), &["create"])];

/// The special subresources of a kind.
pub fn special(kind: &Kind) -> &'static [Sub] {
    match (&*kind.resource.group, &*kind.resource.plural) {
        ("", "pods") => PODS,
        ("", "services") => SERVICES,
        ("serving.knative.dev", "services") => FUNCTIONS,
        ("", "namespaces") => NAMESPACES,
        ("", "serviceaccounts") => ACCOUNTS,
        _ => &[],
    }
}

/// The subresource of that name, if the kind has it.
pub fn find(kind: &Kind, name: &str) -> Option<&'static Sub> {
    special(kind).iter().find(|sub| sub.name == name)
}
