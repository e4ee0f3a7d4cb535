//! Which address families a Service has, as Kubernetes settles `ipFamilyPolicy`, `ipFamilies` and `clusterIPs`
//! (<https://kubernetes.io/docs/concepts/services-networking/dual-stack/>).

use crate::ranges::{Family, ServiceRanges};
use api::object::{Meta, Object};
use api::status::Cause;
use serde_json::Value;
use std::net::IpAddr;

/// What a Service shall have. `asked` are addresses for the first of the families, or `None`, alone, for a headless one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Families {
    pub policy: &'static str,
    pub families: Vec<Family>,
    pub asked: Vec<String>,
}

const SINGLE: &str = "SingleStack";
const PREFER: &str = "PreferDualStack";
const REQUIRE: &str = "RequireDualStack";
const NO_DUAL_STACK: &str = "this cluster is not configured for dual-stack services";

fn texts(service: &Object, field: &str) -> Vec<String> {
    let list = service.pointer(&format!("/spec/{field}")).and_then(Value::as_array);
    list.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn policy_of(service: &Object) -> Result<Option<&'static str>, Vec<Cause>> {
    let text = service.str_at("/spec/ipFamilyPolicy");
    let policies = [PREFER, REQUIRE, SINGLE];
    let found = policies.into_iter().find(|known| *known == text);
    if found.is_none() && !text.is_empty() {
        return Err(unsupported("spec.ipFamilyPolicy", text, &policies));
    }
    Ok(found)
}

fn families_of(service: &Object) -> Result<Vec<Family>, Vec<Cause>> {
    let known = |(index, text): (usize, &String)| {
        let field = format!("spec.ipFamilies[{index}]");
        Family::parse(text).ok_or_else(|| unsupported(&field, text, &["IPv4", "IPv6"]))
    };
    texts(service, "ipFamilies").iter().enumerate().map(known).collect()
}

fn unsupported(field: &str, value: &str, known: &[&str]) -> Vec<Cause> {
    let known: Vec<String> = known.iter().map(|value| format!("\"{value}\"")).collect();
    let text = format!("Unsupported value: \"{value}\": supported values: {}", known.join(", "));
    vec![crate::rest::cause("FieldValueNotSupported", field, text)]
}

/// The addresses that a Service names; `clusterIP` alone stands for a list of one.
fn addresses_of(service: &Object) -> Vec<String> {
    let all = texts(service, "clusterIPs");
    let one = service.str_at("/spec/clusterIP");
    if all.is_empty() && !one.is_empty() { vec![one.to_owned()] } else { all }
}

fn invalid(field: &str, value: &str, why: &str) -> Vec<Cause> {
    vec![crate::rest::cause("FieldValueInvalid", field, format!("Invalid value: \"{value}\": {why}"))]
}

/// Settles a Service that is not an `ExternalName`; `live` likewise, if it was one of these.
pub fn settle(ranges: &ServiceRanges, live: Option<&Object>, new: &Object) -> Result<Families, Vec<Cause>> {
    let mut policy = policy_of(new)?;
    let mut asked = addresses_of(new);
    let mut families = families_of(new)?;
    if let Some(live) = live {
        carry_over(live, &mut policy, &mut asked, &mut families)?;
    }
    let headless = asked.first().is_some_and(|first| first == "None");
    for (index, text) in asked.iter().enumerate().filter(|_| !headless) {
        let Ok(address) = text.parse::<IpAddr>() else {
            let field = format!("spec.clusterIPs[{index}]");
            return Err(invalid(&field, text, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"));
        };
        match families.get(index) {
            None => families.push(Family::of(address)),
            Some(family) if *family == Family::of(address) => {}
            Some(family) => {
                let field = format!("spec.clusterIPs[{index}]");
                return Err(invalid(
                    &field,
                    text,
                    &format!("expected an {} value as indicated by `ipFamilies[{index}]`", family.name()),
                ));
            }
        }
    }
    if asked.len() > if headless { 1 } else { 2 } {
        let why = "may hold \"None\" alone, or one address of each family";
        return Err(invalid("spec.clusterIPs", &asked.join(","), why));
    }
    if families.len() > 2 || matches!(families.as_slice(), [first, second] if first == second) {
        let names: Vec<&str> = families.iter().map(|family| family.name()).collect();
        return Err(invalid("spec.ipFamilies", &names.join(","), "may specify no more than one of each IP family"));
    }
    let selectorless =
        headless && new.pointer("/spec/selector").and_then(Value::as_object).is_none_or(|s| s.is_empty());
    let policy = policy.unwrap_or(if selectorless { REQUIRE } else { SINGLE });
    complete(ranges, policy, selectorless, &mut families)?;
    Ok(Families { policy, families, asked })
}

/// What an update does not mention stays; a dual-stack Service made `SingleStack` keeps its first family.
fn carry_over(
    live: &Object,
    policy: &mut Option<&'static str>,
    asked: &mut Vec<String>,
    families: &mut Vec<Family>,
) -> Result<(), Vec<Cause>> {
    let old = families_of(live)?;
    let held = addresses_of(live);
    if policy.is_none() {
        *policy = policy_of(live)?;
    }
    if families.is_empty() {
        families.clone_from(&old);
    }
    if asked.is_empty() || held.starts_with(asked) {
        asked.clone_from(&held);
    }
    if asked.first() != held.first() {
        let first = asked.first().map(String::as_str).unwrap_or_default();
        return Err(invalid("spec.clusterIPs[0]", first, "may not change once set"));
    }
    if let (Some(first), Some(before)) = (families.first(), old.first())
        && first != before
    {
        return Err(invalid("spec.ipFamilies[0]", first.name(), "may not change once set"));
    }
    if *policy == Some(SINGLE) {
        families.truncate(1);
        asked.truncate(1);
    }
    asked.truncate(families.len().max(1));
    Ok(())
}

fn complete(
    ranges: &ServiceRanges,
    policy: &'static str,
    selectorless: bool,
    families: &mut Vec<Family>,
) -> Result<(), Vec<Cause>> {
    if families.is_empty() {
        families.push(Family::V4);
    }
    let dual = ranges.of(Family::V6).is_some();
    // What has neither address nor endpoints of ours may be of any family.
    if !selectorless {
        if let Some(at) = families.iter().position(|family| ranges.of(*family).is_none()) {
            let name = families.get(at).copied().unwrap_or(Family::V6).name();
            return Err(invalid(&format!("spec.ipFamilies[{at}]"), name, "not configured on this cluster"));
        }
        if policy == REQUIRE && !dual {
            return Err(invalid("spec.ipFamilyPolicy", policy, NO_DUAL_STACK));
        }
    }
    if let ([only], true) = (families.as_slice(), policy != SINGLE && (dual || selectorless)) {
        families.push(only.other());
    }
    if policy == SINGLE && families.len() > 1 {
        let why = "must be RequireDualStack or PreferDualStack when multiple ipFamilies are specified";
        return Err(invalid("spec.ipFamilyPolicy", policy, why));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn service(spec: Value) -> Object {
        let mut spec = spec;
        if spec.get("selector").is_none() {
            spec["selector"] = json!({"a": "b"});
        }
        json!({"spec": spec})
    }
    fn ranges(text: &str) -> ServiceRanges {
        ServiceRanges::parse(text).unwrap()
    }
    fn dual() -> ServiceRanges {
        ranges("10.43.0.0/16,fd00:10:43::/112")
    }
    fn of(found: Result<Families, Vec<Cause>>) -> (&'static str, Vec<&'static str>, Vec<String>) {
        let found = found.unwrap();
        (found.policy, found.families.iter().map(|family| family.name()).collect(), found.asked)
    }
    fn new(spec: Value) -> (&'static str, Vec<&'static str>, Vec<String>) {
        of(settle(&dual(), None, &service(spec)))
    }
    fn refused(ranges: &ServiceRanges, live: Option<Value>, spec: Value) -> String {
        let live = live.map(service);
        let causes = settle(ranges, live.as_ref(), &service(spec)).unwrap_err();
        format!("{}: {}", causes[0].field, causes[0].message)
    }

    #[test]
    fn what_is_left_out_is_settled_as_kubernetes_does() {
        assert_eq!(new(json!({})), (SINGLE, vec!["IPv4"], vec![]));
        assert_eq!(new(json!({"ipFamilies": ["IPv6"]})), (SINGLE, vec!["IPv6"], vec![]));
        let asked = vec!["fd00:10:43::99".to_owned()];
        assert_eq!(new(json!({"clusterIP": "fd00:10:43::99"})), (SINGLE, vec!["IPv6"], asked.clone()));
        assert_eq!(new(json!({"ipFamilyPolicy": PREFER})), (PREFER, vec!["IPv4", "IPv6"], vec![]));
        assert_eq!(
            new(json!({"ipFamilyPolicy": REQUIRE, "ipFamilies": ["IPv6"]})),
            (REQUIRE, vec!["IPv6", "IPv4"], vec![])
        );
        assert_eq!(new(json!({"ipFamilyPolicy": PREFER, "clusterIPs": asked})).1, ["IPv6", "IPv4"]);
        assert_eq!(new(json!({"clusterIP": "None"})), (SINGLE, vec!["IPv4"], vec!["None".to_owned()]));
        assert_eq!(new(json!({"clusterIP": "None", "selector": {}})).1, ["IPv4", "IPv6"]);
        let single = of(settle(&ranges("10.43.0.0/16"), None, &service(json!({"ipFamilyPolicy": PREFER}))));
        assert_eq!(single, (PREFER, vec!["IPv4"], vec![]));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let two = json!({"ipFamilies": ["IPv4", "IPv6"]});
        assert!(refused(&dual(), None, two).starts_with("spec.ipFamilyPolicy: "));
        let only = ranges("10.43.0.0/16");
        assert!(refused(&only, None, json!({"ipFamilyPolicy": REQUIRE})).contains(NO_DUAL_STACK));
        assert!(refused(&only, None, json!({"ipFamilies": ["IPv6"]})).contains("not configured on this cluster"));
        let crossed = json!({"ipFamilies": ["IPv6"], "clusterIP": "10.43.0.9"});
        assert!(refused(&dual(), None, crossed).contains("expected an IPv6 value"));
        assert!(refused(&dual(), None, json!({"clusterIP": "nonsense"})).contains("valid IP address"));
        for (spec, field) in [
            (json!({"ipFamilies": ["IPv5"]}), "spec.ipFamilies[0]: Unsupported"),
            (json!({"ipFamilyPolicy": "Both"}), "spec.ipFamilyPolicy: Unsupported"),
            (json!({"ipFamilyPolicy": REQUIRE, "ipFamilies": ["IPv4", "IPv4"]}), "spec.ipFamilies: "),
            (json!({"ipFamilyPolicy": REQUIRE, "clusterIPs": ["10.43.0.8", "10.43.0.9"]}), "spec.ipFamilies: "),
            (json!({"clusterIPs": ["10.43.0.8", "fd00:10:43::8", "10.43.0.9"]}), "spec.clusterIPs: "),
            (json!({"clusterIPs": ["None", "None"]}), "spec.clusterIPs: "),
        ] {
            let told = refused(&dual(), None, spec);
            assert!(told.starts_with(field), "{told}");
        }
        let live = json!({"clusterIP": "10.43.0.9", "clusterIPs": ["10.43.0.9"], "ipFamilies": ["IPv4"], "ipFamilyPolicy": SINGLE});
        let other = json!({"ipFamilies": ["IPv6"]});
        assert!(refused(&dual(), Some(live.clone()), other).contains("spec.ipFamilies[0]: "));
        assert!(refused(&dual(), Some(live), json!({"clusterIP": "10.43.0.8"})).contains("may not change once set"));
    }

    #[test]
    fn families_come_and_go_with_the_policy() {
        let one = json!({"clusterIP": "10.43.0.9", "clusterIPs": ["10.43.0.9"], "ipFamilies": ["IPv4"], "ipFamilyPolicy": SINGLE});
        let update = |live: &Value, spec: Value| of(settle(&dual(), Some(&service(live.clone())), &service(spec)));
        let v4 = vec!["10.43.0.9".to_owned()];
        assert_eq!(update(&one, json!({})), (SINGLE, vec!["IPv4"], v4.clone()));
        assert_eq!(update(&one, json!({"ipFamilyPolicy": PREFER})), (PREFER, vec!["IPv4", "IPv6"], v4.clone()));
        let both = vec!["10.43.0.9".to_owned(), "fd00:10:43::7".to_owned()];
        let two = json!({"clusterIP": "10.43.0.9", "clusterIPs": both, "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": PREFER});
        assert_eq!(update(&two, json!({})), (PREFER, vec!["IPv4", "IPv6"], both.clone()));
        assert_eq!(update(&two, json!({"clusterIP": "10.43.0.9"})).2, both);
        let mut down = two.clone();
        down["ipFamilyPolicy"] = SINGLE.into();
        assert_eq!(update(&two, down), (SINGLE, vec!["IPv4"], v4));
    }
}
