//! Which tags may be set once and never moved or deleted.

use image::Repository;

/// Patterns `REPOSITORY:TAG`; `*` in either part stands for any characters, slashes among them.
#[derive(Clone, Debug, Default)]
pub struct TagRules {
    immutable: Vec<(String, String)>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "immutable tags {0:?}: write it as REPOSITORY:TAG, `*` in either stands for any characters, such as `shop/*:v*`"
)]
pub struct InvalidRule(String);

impl TagRules {
    pub fn immutable<I: IntoIterator<Item = S>, S: AsRef<str>>(patterns: I) -> Result<TagRules, InvalidRule> {
        let parse = |pattern: S| {
            let text = pattern.as_ref();
            let fine = |part: &str, more: &[u8]| {
                let known = |b: u8| b.is_ascii_alphanumeric() || b"*._-".contains(&b) || more.contains(&b);
                !part.is_empty() && part.len() <= 255 && part.bytes().all(known)
            };
            match text.split_once(':') {
                Some((repository, tag)) if fine(repository, b"/") && fine(tag, b"") => {
                    Ok((repository.to_owned(), tag.to_owned()))
                }
                _ => Err(InvalidRule(text.chars().take(300).collect())),
            }
        };
        Ok(TagRules { immutable: patterns.into_iter().map(parse).collect::<Result<_, _>>()? })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.immutable.is_empty()
    }

    pub(crate) fn is_immutable(&self, repository: &Repository, tag: &str) -> bool {
        self.immutable
            .iter()
            .any(|(r, t)| matches(r.as_bytes(), repository.path.as_bytes()) && matches(t.as_bytes(), tag.as_bytes()))
    }
}

/// Goes back to the last star only, so the time is at most the product of the lengths.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p, t));
                p += 1;
            }
            Some(c) if text.get(t) == Some(c) => {
                p += 1;
                t += 1;
            }
            _ => match retry {
                Some((star, from)) => {
                    retry = Some((star, from + 1));
                    p = star + 1;
                    t = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern.get(p..).unwrap_or_default().iter().all(|b| *b == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn patterns() {
        let rules = TagRules::immutable(["shop/*:v*", "base:*", "*:release-*-final"]).unwrap();
        let is = |name: &str, tag: &str| rules.is_immutable(&Repository::local(name).unwrap(), tag);
        assert!(is("shop/a", "v1") && is("shop/a/b", "v") && is("base", "latest") && is("x", "release-9-final"));
        assert!(!is("shop", "v1") && !is("shop/a", "latest") && !is("base/x", "1") && !is("x", "release-9"));
        for bad in ["", "shop", ":v1", "shop:", "a b:*", "a:b:c"] {
            assert!(TagRules::immutable([bad]).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn as_a_regular_expression_would(pattern in "[ab*]{0,8}", text in "[ab]{0,10}") {
            fn slow(p: &[u8], t: &[u8]) -> bool {
                match (p.split_first(), t.split_first()) {
                    (Some((b'*', rest)), Some((_, less))) => slow(rest, t) || slow(p, less),
                    (Some((b'*', rest)), None) => slow(rest, t),
                    (Some((a, p)), Some((b, t))) => a == b && slow(p, t),
                    (None, None) => true,
                    (Some(_), None) | (None, Some(_)) => false,
                }
            }
            prop_assert_eq!(matches(pattern.as_bytes(), text.as_bytes()), slow(pattern.as_bytes(), text.as_bytes()));
        }
    }
}
