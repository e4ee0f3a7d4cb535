//! Network: networks that can be ones, and that stay as they are.

use super::field::{Problems, at, text};
use super::network::network;
use crate::object::Object;
use crate::status::Cause;
use serde_json::Value;

pub fn validate(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let spec = at(new, "spec");
    cidr(&mut p, spec, ("cidr", true, 8..=28), "10.44.7.0/24");
    cidr(&mut p, spec, ("cidr6", false, 16..=124), "fd00:10:44:7::/64");
    if let Some(old) = old {
        for field in ["cidr", "cidr6"] {
            p.immutable(&format!("spec.{field}"), at(spec, field), at(at(old, "spec"), field));
        }
    }
    p.into_causes()
}

fn cidr(p: &mut Problems, spec: &Value, (field, v4, prefixes): (&str, bool, std::ops::RangeInclusive<u8>), like: &str) {
    let (path, value) = (format!("spec.{field}"), text(spec, field));
    if value.is_empty() {
        return;
    }
    let family = if v4 { "an IPv4" } else { "an IPv6" };
    let Some((bits, prefix, _)) = network(value).filter(|(.., is_v4)| *is_v4 == v4) else {
        return p.invalid_text(&path, value, &format!("must be {family} network, such as {like}"));
    };
    if !prefixes.contains(&prefix) {
        let (least, most) = (prefixes.start(), prefixes.end());
        return p.invalid_text(&path, value, &format!("the prefix length must be {least} to {most}, as in {like}"));
    }
    if bits & u128::MAX.checked_shr(prefix.into()).unwrap_or(0) != 0 {
        p.invalid_text(&path, value, "the address has bits below the prefix; zero them");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds;
    use crate::schema::strict;
    use serde_json::json;

    fn told(spec: Value, old: Option<Value>) -> Vec<String> {
        let kind = kinds::find("atoll.dev", "networks").unwrap();
        let object = json!({"metadata": {"name": "x"}, "spec": spec});
        let old = old.map(|spec| json!({"metadata": {"name": "x"}, "spec": spec}));
        let mut causes = strict::validate_values(&kind.schema, &kind.types, &object);
        causes.extend((kind.hooks.validate.unwrap())(&object, old.as_ref()));
        causes.into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect()
    }

    #[test]
    fn networks_are_networks() {
        for fine in [
            json!({"cidr": "10.44.7.0/24"}),
            json!({"cidr": "10.0.0.0/8", "cidr6": "fd00:10:44:7::/64", "description": "machines"}),
            json!({"cidr": "192.168.4.16/28", "cidr6": "2001:db8::10/124"}),
        ] {
            assert_eq!(told(fine, None), Vec::<String>::new());
        }
        for bad in ["", "10.44.7.0", "10.44.7.1/24", "10.44.7.0/29", "10.0.0.0/7", "fd00::/64", "a/b", "10.44.7.0/024"]
        {
            let told = told(json!({"cidr": bad}), None);
            assert!(told.len() == 1 && told[0].starts_with("spec.cidr: "), "{bad}: {told:?}");
        }
        for bad in ["", "fd00::1/64", "fd00::/125", "::/8", "10.44.0.0/16"] {
            let told = told(json!({"cidr": "10.44.7.0/24", "cidr6": bad}), None);
            assert!(told.len() == 1 && told[0].starts_with("spec.cidr6: "), "{bad}: {told:?}");
        }
        assert!(told(json!({}), None)[0].starts_with("spec.cidr: Required"));
    }

    #[test]
    fn they_stay_as_they_are() {
        let before = || Some(json!({"cidr": "10.44.7.0/24"}));
        assert!(told(json!({"cidr": "10.44.7.0/24", "description": "new"}), before()).is_empty());
        assert_eq!(
            told(json!({"cidr": "10.44.8.0/24"}), before()),
            ["spec.cidr: Invalid value: \"10.44.8.0/24\": field is immutable"]
        );
        assert!(told(json!({"cidr": "10.44.7.0/24", "cidr6": "fd00::/64"}), before())[0].starts_with("spec.cidr6: "));
    }
}
