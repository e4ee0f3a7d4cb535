//! `/etc/hosts`, `/etc/resolv.conf` and the host name of a pod. Pure text.

use api::k8s::api::core::v1::PodSpec;
use std::net::{IpAddr, Ipv4Addr};

/// A Linux host name is at most 64 bytes, a DNS label 63.
const LABEL: usize = 63;

/// Host name and, where the pod has a subdomain, its full DNS name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostName {
    pub short: String,
    pub full: Option<String>,
    /// What `hostname` prints.
    pub shown: String,
}

pub(crate) fn host_name(pod: &str, namespace: &str, spec: &PodSpec, domain: &str) -> HostName {
    let mut short = spec.hostname.clone().filter(|h| !h.is_empty()).unwrap_or_else(|| pod.to_owned());
    if short.len() > LABEL {
        short = short.chars().take(LABEL).collect::<String>().trim_end_matches(['-', '.']).to_owned();
    }
    let subdomain = spec.subdomain.as_deref().filter(|s| !s.is_empty());
    let full = subdomain.map(|s| format!("{short}.{s}.{namespace}.svc.{domain}"));
    let shown = match &full {
        Some(full) if spec.set_hostname_as_fqdn == Some(true) && full.len() <= 64 => full.clone(),
        _ => short.clone(),
    };
    HostName { short, full, shown }
}

pub(crate) fn hosts(spec: &PodSpec, ips: &[IpAddr], name: &HostName) -> String {
    let mut text = String::from(
        "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::\tip6-localnet\nfe00::\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
    );
    for ip in ips {
        match &name.full {
            Some(full) => text.push_str(&format!("{ip}\t{full}\t{}\n", name.short)),
            None => text.push_str(&format!("{ip}\t{}\n", name.short)),
        }
    }
    let aliases = spec.host_aliases.as_deref().unwrap_or_default();
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        for alias in aliases {
            let names = alias.hostnames.as_deref().unwrap_or_default().join("\t");
            text.push_str(&format!("{}\t{names}\n", alias.ip));
        }
    }
    text
}

/// Name servers, search list and options of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Resolver {
    pub servers: Vec<String>,
    pub search: Vec<String>,
    pub options: Vec<String>,
}

impl Resolver {
    pub fn parse(text: &str) -> Self {
        let mut out = Resolver::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => out.servers.extend(words.next().map(str::to_owned)),
                Some("search" | "domain") => out.search = words.map(str::to_owned).collect(),
                Some("options") => out.options = words.map(str::to_owned).collect(),
                _ => {}
            }
        }
        out
    }
    pub fn text(&self) -> String {
        let mut text = String::new();
        if !self.search.is_empty() {
            text.push_str(&format!("search {}\n", self.search.join(" ")));
        }
        for server in &self.servers {
            text.push_str(&format!("nameserver {server}\n"));
        }
        if !self.options.is_empty() {
            text.push_str(&format!("options {}\n", self.options.join(" ")));
        }
        text
    }
}

/// By `dnsPolicy` and `dnsConfig`. `node` is the node's own resolver, used by `Default`.
pub(crate) fn resolver(
    spec: &PodSpec,
    namespace: &str,
    cluster_dns: Ipv4Addr,
    domain: &str,
    node: &Resolver,
) -> Resolver {
    let cluster = || Resolver {
        servers: vec![cluster_dns.to_string()],
        search: vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.to_owned()],
        options: vec!["ndots:5".into()],
    };
    let mut out = match spec.dns_policy.as_deref() {
        Some("None") => Resolver::default(),
        Some("Default") => node.clone(),
        Some("ClusterFirst") | None if spec.host_network == Some(true) => node.clone(),
        _ => cluster(),
    };
    if let Some(config) = &spec.dns_config {
        let add = |to: &mut Vec<String>, from: Option<&Vec<String>>| {
            for item in from.into_iter().flatten() {
                if !to.contains(item) && !item.contains(char::is_whitespace) {
                    to.push(item.clone());
                }
            }
        };
        add(&mut out.servers, config.nameservers.as_ref());
        add(&mut out.search, config.searches.as_ref());
        for option in config.options.iter().flatten() {
            let Some(name) = option.name.as_deref().filter(|n| !n.is_empty() && !n.contains(char::is_whitespace))
            else {
                continue;
            };
            out.options.retain(|o| o.split(':').next() != Some(name));
            out.options.push(match option.value.as_deref().filter(|v| !v.is_empty()) {
                Some(value) => format!("{name}:{value}"),
                None => name.to_owned(),
            });
        }
    }
    out.servers.truncate(3);
    out.search.truncate(32);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(value: serde_json::Value) -> PodSpec {
        let mut value = value;
        value["containers"] = json!([]);
        serde_json::from_value(value).unwrap()
    }
    const DNS: Ipv4Addr = Ipv4Addr::new(10, 43, 0, 10);

    #[test]
    fn names() {
        let plain = host_name("p", "ns", &spec(json!({})), "cluster.local");
        assert_eq!((plain.short.as_str(), plain.full.as_deref(), plain.shown.as_str()), ("p", None, "p"));
        let sub = host_name("p", "ns", &spec(json!({"hostname": "h", "subdomain": "s"})), "cluster.local");
        assert_eq!(sub.full.as_deref(), Some("h.s.ns.svc.cluster.local"));
        assert_eq!(host_name(&"a".repeat(80), "ns", &spec(json!({})), "x").short.len(), 63);
        let hosts =
            hosts(&spec(json!({"hostAliases": [{"ip": "1.2.3.4", "hostnames": ["a", "b"]}]})), &[DNS.into()], &sub);
        assert!(hosts.contains("10.43.0.10\th.s.ns.svc.cluster.local\th\n"), "{hosts}");
        assert!(hosts.ends_with("1.2.3.4\ta\tb\n"), "{hosts}");
    }

    #[test]
    fn policies() {
        let node = Resolver::parse("nameserver 9.9.9.9\nsearch lan\noptions edns0 trust-ad\n#x\n");
        let go = |v| resolver(&spec(v), "ns", DNS, "cluster.local", &node).text();
        let cluster =
            "search ns.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.43.0.10\noptions ndots:5\n";
        assert_eq!(go(json!({})), cluster);
        assert_eq!(go(json!({"dnsPolicy": "ClusterFirstWithHostNet", "hostNetwork": true})), cluster);
        let own = "search lan\nnameserver 9.9.9.9\noptions edns0 trust-ad\n";
        assert_eq!(go(json!({"dnsPolicy": "Default"})), own);
        assert_eq!(go(json!({"hostNetwork": true})), own);
        let none = json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["1.1.1.1"], "searches": ["x"],
            "options": [{"name": "ndots", "value": "2"}, {"name": "rotate"}, {"name": "bad opt"}]}});
        assert_eq!(go(none), "search x\nnameserver 1.1.1.1\noptions ndots:2 rotate\n");
        let merged = json!({"dnsConfig": {"options": [{"name": "ndots", "value": "1"}]}});
        assert!(go(merged).ends_with("options ndots:1\n"));
    }
}
