//! See `crate::fuzz`.

use super::chmod::Chmod;
use super::ignore::Ignore;
use super::pattern::Pattern;
use super::{mounts, parse, remote, words};

pub(crate) fn containerfile(text: &str) {
    let _ = parse::parse("Containerfile", text);
    let _ = parse::trigger(text);
    let lookup = |name: &str| name.len().is_multiple_of(2).then(|| name.to_owned());
    for escape in ['\\', '`'] {
        let _ = (
            words::split(text, escape),
            words::expand(text, escape, &lookup),
            words::expand_text(text, escape, &lookup),
        );
    }
    let _ = (mounts::parse(text), super::Secret::parse(text), remote::parse(text));
    if let Ok(chmod) = Chmod::parse(text) {
        assert!(chmod.apply(0o644, false) <= 0o7777 && chmod.apply(0o755, true) <= 0o7777);
    }
    let (rules, path) = text.split_once('\0').unwrap_or((text, "a/b/c.txt"));
    if let Ok(ignore) = Ignore::parse(rules) {
        let _ = (ignore.excludes(path), ignore.has_exceptions());
    }
    for pattern in [Pattern::path(rules), Pattern::shell(rules)].into_iter().flatten() {
        let _ = pattern.matches(path);
    }
}
