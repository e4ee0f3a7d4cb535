//! Names: which are allowed where, with the wording Kubernetes uses to refuse the others, and the random parts of
//! generated ones.

use std::hash::{BuildHasher, Hasher};

/// Letters and digits that cannot be misread or spell words.
const SUFFIX_ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
const SUFFIX_LENGTH: usize = 5;
/// A name made from `generateName` is at most this long, so that it stays a DNS label.
const MAX_GENERATED: usize = 63;

/// 64 random bits; good for names, uids and jitter, not for secrets.
pub fn random_u64() -> u64 {
    std::hash::RandomState::new().build_hasher().finish()
}

/// The five random characters that follow a `generateName` or a ReplicaSet's name.
pub fn suffix() -> String {
    let mut bits = random_u64();
    let mut text = String::with_capacity(SUFFIX_LENGTH);
    for _ in 0..SUFFIX_LENGTH {
        let index = (bits % SUFFIX_ALPHABET.len() as u64) as usize;
        bits /= SUFFIX_ALPHABET.len() as u64;
        text.push(char::from(SUFFIX_ALPHABET[index]));
    }
    text
}

/// `base` (cut to fit) and a random suffix.
pub fn generate(base: &str) -> String {
    let mut end = base.len().min(MAX_GENERATED - SUFFIX_LENGTH);
    while !base.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{}", base.get(..end).unwrap_or(""), suffix())
}

/// `text` spelled with the characters of generated names, so that a hash is no accidental word.
pub fn safe_encode(text: &str) -> String {
    text.bytes().map(|b| char::from(SUFFIX_ALPHABET[usize::from(b) % SUFFIX_ALPHABET.len()])).collect()
}

/// A new version-4 UUID.
pub fn uid() -> String {
    let (high, low) = (random_u64(), random_u64());
    let (high, low) = (high & !0xf000 | 0x4000, low & !(3 << 62) | 2 << 62);
    format!(
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        high >> 32,
        high >> 16 & 0xffff,
        high & 0xffff,
        low >> 48,
        low & 0xffff_ffff_ffff
    )
}

const LABEL_ERROR: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must \
    start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const SUBDOMAIN_ERROR: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or \
    '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL_1035_ERROR: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an \
    alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for \
    validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
const QUALIFIED_ERROR: &str = "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an \
    alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is \
    '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const LABEL_VALUE_ERROR: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or \
    '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used \
    for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
const CONFIG_KEY_ERROR: &str = "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. \
    'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')";
const ENV_NAME_ERROR: &str = "a valid environment variable name must consist only of printable ASCII characters other \
    than '='";

type Problems = Vec<String>;

fn lower_alnum(b: u8) -> bool {
    b.is_ascii_lowercase() || b.is_ascii_digit()
}

fn framed(text: &str, inner: fn(u8) -> bool, edge: fn(u8) -> bool) -> bool {
    let bytes = text.as_bytes();
    match (bytes.first(), bytes.last()) {
        (Some(first), Some(last)) => edge(*first) && edge(*last) && bytes.iter().all(|b| inner(*b)),
        _ => false,
    }
}

fn too_long(text: &str, limit: usize, problems: &mut Problems) {
    if text.len() > limit {
        problems.push(format!("must be no more than {limit} characters"));
    }
}

fn is_label_text(text: &str) -> bool {
    framed(text, |b| lower_alnum(b) || b == b'-', lower_alnum)
}

/// RFC 1123 label: up to 63 of `a-z0-9-`. Empty = fine.
pub fn dns_label(text: &str) -> Problems {
    let mut problems = Problems::new();
    too_long(text, 63, &mut problems);
    if !is_label_text(text) {
        problems.push(LABEL_ERROR.to_owned());
    }
    problems
}

/// RFC 1035 label: a DNS label that begins with a letter (Services).
pub fn dns_1035_label(text: &str) -> Problems {
    let mut problems = Problems::new();
    too_long(text, 63, &mut problems);
    if !is_label_text(text) || !text.starts_with(|c: char| c.is_ascii_lowercase()) {
        problems.push(LABEL_1035_ERROR.to_owned());
    }
    problems
}

/// RFC 1123 subdomain: labels with dots, up to 253.
pub fn dns_subdomain(text: &str) -> Problems {
    let mut problems = Problems::new();
    too_long(text, 253, &mut problems);
    if !text.split('.').all(is_label_text) {
        problems.push(SUBDOMAIN_ERROR.to_owned());
    }
    problems
}

/// A subdomain that may begin with `*.` (Gateway hostnames, wildcard hosts).
pub fn wildcard_subdomain(text: &str) -> Problems {
    match text.strip_prefix("*.") {
        Some(rest) => dns_subdomain(rest),
        None => dns_subdomain(text),
    }
}

/// The number of a well-known port, by its name in IANA's registry
/// (<https://www.iana.org/assignments/service-names-port-numbers>).
pub fn service_port(name: &str) -> Option<u16> {
    Some(match name {
        "ftp" => 21,
        "ssh" => 22,
        "smtp" => 25,
        "domain" => 53,
        "http" => 80,
        "pop3" => 110,
        "ntp" => 123,
        "imap" => 143,
        "ldap" => 389,
        "https" => 443,
        "submissions" => 465,
        "syslog" => 514,
        "submission" => 587,
        "ldaps" => 636,
        "domain-s" => 853,
        "imaps" => 993,
        "pop3s" => 995,
        "mqtt" => 1883,
        "nfs" => 2049,
        "mysql" => 3306,
        "amqps" => 5671,
        "amqp" => 5672,
        "postgresql" => 5432,
        "redis" => 6379,
        "secure-mqtt" => 8883,
        "git" => 9418,
        _ => return None,
    })
}

/// A label or annotation key: `[prefix/]name`.
pub fn qualified_name(text: &str) -> Problems {
    let mut problems = Problems::new();
    let name = match text.split_once('/') {
        Some((_, name)) if name.contains('/') => {
            return vec![format!(
                "a qualified name {QUALIFIED_ERROR} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
            )];
        }
        Some((prefix, name)) => {
            if prefix.is_empty() {
                problems.push("prefix part must be non-empty".to_owned());
            } else {
                problems.extend(dns_subdomain(prefix).into_iter().map(|problem| format!("prefix part {problem}")));
            }
            name
        }
        None => text,
    };
    if name.is_empty() {
        problems.push("name part must be non-empty".to_owned());
    } else if name.len() > 63 {
        problems.push("name part must be no more than 63 characters".to_owned());
    }
    if !framed(name, |b| b.is_ascii_alphanumeric() || b"-_.".contains(&b), |b| b.is_ascii_alphanumeric()) {
        problems.push(format!("name part {QUALIFIED_ERROR}"));
    }
    problems
}

/// A label's value: empty, or up to 63 of `A-Za-z0-9-_.`.
pub fn label_value(text: &str) -> Problems {
    let mut problems = Problems::new();
    too_long(text, 63, &mut problems);
    let fits = framed(text, |b| b.is_ascii_alphanumeric() || b"-_.".contains(&b), |b| b.is_ascii_alphanumeric());
    if !text.is_empty() && !fits {
        problems.push(LABEL_VALUE_ERROR.to_owned());
    }
    problems
}

/// A key of a ConfigMap or Secret: a file name.
pub fn config_key(text: &str) -> Problems {
    let mut problems = Problems::new();
    too_long(text, 253, &mut problems);
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
        problems.push(CONFIG_KEY_ERROR.to_owned());
    }
    if text == "." || text == ".." {
        problems.push(format!("must not be '{text}'"));
    } else if text.starts_with("..") {
        problems.push("must not start with '..'".to_owned());
    }
    problems
}

/// A port's name: up to 15 of `a-z0-9-` with a letter.
pub fn port_name(text: &str) -> Problems {
    let mut problems = Problems::new();
    too_long(text, 15, &mut problems);
    if !text.bytes().all(|b| lower_alnum(b) || b == b'-') {
        problems.push("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)".to_owned());
    }
    if !text.bytes().any(|b| b.is_ascii_lowercase()) {
        problems.push("must contain at least one letter (a-z)".to_owned());
    }
    if text.contains("--") {
        problems.push("must not contain consecutive hyphens".to_owned());
    }
    if text.starts_with('-') || text.ends_with('-') {
        problems.push("must not begin or end with a hyphen".to_owned());
    }
    problems
}

/// A port number.
pub fn port_number(port: i64) -> Problems {
    if (1..=65535).contains(&port) {
        Problems::new()
    } else {
        vec!["must be between 1 and 65535, inclusive".to_owned()]
    }
}

/// The name of an environment variable.
pub fn env_name(text: &str) -> Problems {
    if !text.is_empty() && text.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'=') {
        Problems::new()
    } else {
        vec![ENV_NAME_ERROR.to_owned()]
    }
}

/// A name that becomes one segment of a URL path and is otherwise free.
pub fn path_segment(text: &str) -> Problems {
    if text == "." || text == ".." {
        return vec![format!("may not be '{text}'")];
    }
    ["/", "%"].iter().filter(|part| text.contains(**part)).map(|part| format!("may not contain '{part}'")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn generated_names() {
        let name = generate("web-7d9f-");
        assert!(name.starts_with("web-7d9f-") && name.len() == 14, "{name}");
        assert_eq!(generate(&"x".repeat(300)).len(), 63);
        assert_ne!(uid(), uid());
        assert_eq!(uid().len(), 36);
        assert_eq!(uid().as_bytes()[14], b'4');
    }

    #[test]
    fn rules() {
        assert!(dns_label("a-1").is_empty() && !dns_label("A").is_empty() && !dns_label("-a").is_empty());
        assert!(!dns_label("").is_empty() && !dns_label(&"a".repeat(64)).is_empty());
        assert!(dns_1035_label("a1").is_empty() && !dns_1035_label("1a").is_empty());
        assert!(dns_subdomain("a.b-c.d").is_empty() && !dns_subdomain("a..b").is_empty());
        assert!(qualified_name("app.kubernetes.io/name").is_empty() && qualified_name("MyName_1").is_empty());
        for bad in ["", "/a", "a/", "a/b/c", "A.b/c", "-x"] {
            assert!(!qualified_name(bad).is_empty(), "{bad}");
        }
        assert!(label_value("").is_empty() && label_value("a.B_c-1").is_empty() && !label_value("a b").is_empty());
        assert!(config_key("a.conf").is_empty() && !config_key("..").is_empty() && !config_key("a/b").is_empty());
        assert!(
            port_name("http").is_empty() && !port_name("80").is_empty() && !port_name("sixteen-letters-").is_empty()
        );
        assert!(wildcard_subdomain("*.example.com").is_empty() && !wildcard_subdomain("*").is_empty());
    }

    proptest! {
        #[test]
        fn generated_names_are_labels(base in "[a-z]([a-z0-9-]{0,80})?") {
            prop_assert!(dns_label(&generate(&base)).is_empty());
        }
        #[test]
        fn foreign_text_never_panics(text in "\\PC{0,80}") {
            for rule in [dns_label, dns_1035_label, dns_subdomain, qualified_name, label_value, config_key, port_name, env_name] {
                let _ = rule(&text);
            }
            let _ = generate(&text);
        }
    }
}
