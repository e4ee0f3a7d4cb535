//! The examples of Kubernetes' documentation and of the collection that it points to, in terms of the lab's pods.

use serde_json::{Value, json};

pub struct Recipe {
    pub name: &'static str,
    pub policies: Vec<Value>,
    /// From, to, TCP port, whether it passes in an open network.
    pub checks: Vec<(&'static str, &'static str, u16, bool)>,
}

fn policy(namespace: &str, spec: Value) -> Value {
    json!({"metadata": {"namespace": namespace, "name": "recipe"}, "spec": spec})
}

fn admin(name: &str, spec: Value) -> Value {
    json!({"kind": "AdminNetworkPolicy", "metadata": {"name": name}, "spec": spec})
}

fn baseline(spec: Value) -> Value {
    json!({"kind": "BaselineAdminNetworkPolicy", "metadata": {"name": "default"}, "spec": spec})
}

/// The user stories of <https://network-policy-api.sigs.k8s.io/user-stories/>.
pub fn administrators() -> Vec<Recipe> {
    let testing = || json!({"namespaces": {"matchLabels": {"purpose": "testing"}}});
    let all = || json!({"namespaces": {}});
    let open_a = || policy("a", json!({"podSelector": {}, "ingress": [{}]}));
    vec![
        Recipe {
            name: "deny traffic at a cluster level, whatever namespaces say",
            policies: vec![
                admin(
                    "deny",
                    json!({"priority": 10, "subject": {"namespaces": {"matchLabels": {"team": "one"}}},
                    "ingress": [{"action": "Deny", "from": [testing()]}]}),
                ),
                open_a(),
            ],
            checks: vec![("b/p0", "a/p0", 80, false), ("c/p0", "a/p0", 80, true)],
        },
        Recipe {
            name: "allow traffic at a cluster level, whatever namespaces say",
            policies: vec![
                admin(
                    "allow",
                    json!({"priority": 30, "subject": all(),
                    "ingress": [{"action": "Allow", "from": [testing()], "ports": [{"portNumber": {"port": 80}}]}]}),
                ),
                policy("a", json!({"podSelector": {}, "ingress": []})),
            ],
            checks: vec![("b/p0", "a/p0", 80, true), ("b/p0", "a/p0", 81, false), ("c/p0", "a/p0", 80, false)],
        },
        Recipe {
            name: "leave it to the namespace",
            policies: vec![
                admin(
                    "pass",
                    json!({"priority": 1, "subject": all(), "ingress": [{"action": "Pass", "from": [testing()]}]}),
                ),
                admin(
                    "rest",
                    json!({"priority": 2, "subject": all(), "ingress": [{"action": "Deny", "from": [all()]}]}),
                ),
                policy("a", json!({"podSelector": web(), "ingress": [{"ports": [{"port": 80}]}]})),
            ],
            checks: vec![
                ("b/p0", "a/p0", 80, true),
                ("b/p0", "a/p0", 81, false),
                ("b/p0", "a/p1", 81, true),
                ("c/p0", "a/p0", 80, false),
            ],
        },
        Recipe {
            name: "namespaces are apart unless they say otherwise",
            policies: vec![
                baseline(json!({"subject": all(), "ingress": [{"action": "Deny", "from": [all()]}]})),
                open_a(),
            ],
            checks: vec![("b/p0", "a/p0", 80, true), ("b/p0", "c/p0", 80, false), ("c/p1", "c/p0", 80, false)],
        },
        Recipe {
            name: "lower numbers come first, whatever the names",
            policies: vec![
                admin("a", json!({"priority": 9, "subject": all(), "ingress": [{"action": "Allow", "from": [all()]}]})),
                admin(
                    "b",
                    json!({"priority": 8, "subject": all(), "ingress": [{"action": "Deny", "from": [testing()]}]}),
                ),
            ],
            checks: vec![("b/p0", "a/p0", 80, false), ("a/p0", "b/p0", 80, true)],
        },
    ]
}

fn web() -> Value {
    json!({"matchLabels": {"app": "web", "role": "front"}})
}

/// `p0` is web/front, `p1` api/back, `p2` db/back, `p3` web without a role.
#[allow(clippy::too_many_lines)]
pub fn all() -> Vec<Recipe> {
    vec![
        Recipe { name: "no policy", policies: vec![], checks: vec![("b/p0", "a/p0", 80, true)] },
        Recipe {
            name: "deny all traffic to an application",
            policies: vec![policy("a", json!({"podSelector": web(), "ingress": []}))],
            checks: vec![("a/p1", "a/p0", 80, false), ("b/p1", "a/p0", 80, false), ("a/p0", "a/p1", 80, true)],
        },
        Recipe {
            name: "limit traffic to an application",
            policies: vec![policy(
                "a",
                json!({"podSelector": web(), "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "api"}}}]}]}),
            )],
            checks: vec![("a/p1", "a/p0", 80, true), ("a/p2", "a/p0", 80, false), ("b/p1", "a/p0", 80, false)],
        },
        Recipe {
            name: "allow all traffic to an application",
            policies: vec![
                policy("a", json!({"podSelector": {}, "ingress": []})),
                policy("a", json!({"podSelector": web(), "ingress": [{}]})),
            ],
            checks: vec![("c/p2", "a/p0", 80, true), ("a/p0", "a/p1", 80, false)],
        },
        Recipe {
            name: "deny all traffic that no policy names",
            policies: vec![policy("a", json!({"podSelector": {}, "policyTypes": ["Ingress"]}))],
            checks: vec![("a/p1", "a/p0", 80, false), ("a/p1", "b/p0", 80, true)],
        },
        Recipe {
            name: "deny traffic from other namespaces",
            policies: vec![policy("a", json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]}))],
            checks: vec![("a/p1", "a/p0", 80, true), ("b/p1", "a/p0", 80, false)],
        },
        Recipe {
            name: "allow traffic from all namespaces",
            policies: vec![policy(
                "a",
                json!({"podSelector": web(), "ingress": [{"from": [{"namespaceSelector": {}}]}]}),
            )],
            checks: vec![("b/p1", "a/p0", 80, true), ("c/p1", "a/p0", 81, true)],
        },
        Recipe {
            name: "allow traffic from a namespace",
            policies: vec![policy(
                "a",
                json!({"podSelector": web(), "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"purpose": "testing"}}}]}]}),
            )],
            checks: vec![("b/p1", "a/p0", 80, true), ("c/p1", "a/p0", 80, false), ("a/p1", "a/p0", 80, false)],
        },
        Recipe {
            name: "allow traffic from some pods in another namespace",
            policies: vec![policy(
                "a",
                json!({"podSelector": web(), "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"team": "two"}},
                    "podSelector": {"matchLabels": {"app": "db"}}}]}]}),
            )],
            checks: vec![
                ("b/p2", "a/p0", 80, true),
                ("c/p2", "a/p0", 80, true),
                ("b/p1", "a/p0", 80, false),
                ("a/p2", "a/p0", 80, false),
            ],
        },
        Recipe {
            name: "allow traffic only to a port of an application",
            policies: vec![policy(
                "a",
                json!({"podSelector": web(), "ingress": [{"ports": [{"port": 81}], "from": [{"podSelector": {}}]}]}),
            )],
            checks: vec![("a/p1", "a/p0", 81, true), ("a/p1", "a/p0", 80, false)],
        },
        Recipe {
            name: "allow traffic with several selectors",
            policies: vec![policy(
                "a",
                json!({"podSelector": web(), "ingress": [{"from": [
                    {"podSelector": {"matchLabels": {"app": "api"}}}, {"podSelector": {"matchLabels": {"app": "db"}}}]}]}),
            )],
            checks: vec![("a/p1", "a/p0", 80, true), ("a/p2", "a/p0", 80, true), ("a/p3", "a/p0", 80, false)],
        },
        Recipe {
            name: "deny egress from an application",
            policies: vec![policy("a", json!({"podSelector": web(), "policyTypes": ["Egress"], "egress": []}))],
            checks: vec![("a/p0", "a/p1", 80, false), ("a/p1", "a/p0", 80, true)],
        },
        Recipe {
            name: "deny all egress from a namespace",
            policies: vec![policy("a", json!({"podSelector": {}, "policyTypes": ["Egress"]}))],
            checks: vec![("a/p0", "b/p1", 80, false), ("b/p0", "a/p1", 80, true)],
        },
        Recipe {
            name: "limit egress to one's own namespace",
            policies: vec![policy(
                "a",
                json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"to": [{"podSelector": {}}]}]}),
            )],
            checks: vec![("a/p0", "a/p1", 80, true), ("a/p0", "b/p1", 80, false)],
        },
        Recipe {
            name: "deny all ingress and all egress",
            policies: vec![policy("a", json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}))],
            checks: vec![("a/p0", "a/p0", 80, true), ("a/p0", "a/p1", 80, false), ("b/p0", "c/p0", 80, true)],
        },
        Recipe {
            name: "allow all egress",
            policies: vec![policy("a", json!({"podSelector": {}, "egress": [{}], "policyTypes": ["Egress"]}))],
            checks: vec![("a/p0", "c/p1", 80, true)],
        },
        Recipe {
            name: "the policy that the documentation explains",
            policies: vec![policy(
                "a",
                json!({"podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Ingress", "Egress"],
                    "ingress": [{"from": [{"ipBlock": {"cidr": "10.42.0.0/16", "except": ["10.42.0.8/29"]}},
                        {"namespaceSelector": {"matchLabels": {"team": "two"}}}, {"podSelector": {"matchLabels": {"role": "front"}}}],
                        "ports": [{"protocol": "TCP", "port": 80}]}],
                    "egress": [{"to": [{"ipBlock": {"cidr": "10.42.0.0/24"}}], "ports": [{"protocol": "TCP", "port": 81}]}]}),
            )],
            checks: vec![
                ("a/p0", "a/p2", 80, true),
                ("a/p0", "a/p2", 81, false),
                ("a/p2", "b/p0", 81, true),
                ("a/p2", "b/p0", 80, false),
            ],
        },
        Recipe {
            name: "a range of ports",
            policies: vec![policy(
                "a",
                json!({"podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Egress"],
                    "egress": [{"to": [{"ipBlock": {"cidr": "10.42.0.0/24"}}], "ports": [{"port": 81, "endPort": 32768}]}]}),
            )],
            checks: vec![("a/p2", "a/p0", 81, true), ("a/p2", "a/p0", 80, false)],
        },
        Recipe {
            name: "several namespaces by label",
            policies: vec![policy(
                "a",
                json!({"podSelector": web(), "policyTypes": ["Egress"], "egress": [{"to": [{"namespaceSelector": {"matchExpressions":
                    [{"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["b", "c"]}]}}]}]}),
            )],
            checks: vec![("a/p0", "b/p1", 80, true), ("a/p0", "c/p1", 80, true), ("a/p0", "a/p1", 80, false)],
        },
        Recipe {
            name: "a port by its name",
            policies: vec![
                policy("a", json!({"podSelector": {}, "ingress": [{"ports": [{"port": "http"}]}]})),
                policy(
                    "b",
                    json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"ports": [{"port": "http"}]}]}),
                ),
            ],
            checks: vec![
                ("b/p0", "a/p0", 80, true),
                ("b/p0", "a/p0", 81, false),
                ("b/p0", "a/p1", 81, true),
                ("b/p0", "c/p1", 80, false),
            ],
        },
        Recipe {
            name: "both namespaces agree",
            policies: vec![
                policy(
                    "a",
                    json!({"podSelector": web(), "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"purpose": "testing"}}}]}]}),
                ),
                policy(
                    "b",
                    json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"to": [{"podSelector": {}},
                    {"namespaceSelector": {"matchLabels": {"purpose": "production"}}}]}]}),
                ),
            ],
            checks: vec![
                ("b/p0", "a/p0", 80, true),
                ("b/p0", "a/p1", 80, true),
                ("b/p0", "c/p0", 80, false),
                ("c/p0", "a/p0", 80, false),
            ],
        },
    ]
}
