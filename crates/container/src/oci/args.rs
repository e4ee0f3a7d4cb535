//! Flags as the field's runtimes take them: `--flag value`, `--flag=value`, one dash or two, up to the first word that is
//! none.

use crate::error::{Error, Result};

#[derive(Debug, Default)]
pub struct Args {
    values: Vec<(String, String)>,
    switches: Vec<String>,
}

impl Args {
    /// The flags, and the words after them.
    pub fn parse<'a>(args: &'a [String], values: &[&str], switches: &[&str]) -> Result<(Self, &'a [String])> {
        let mut parsed = Self::default();
        let mut rest = args;
        while let Some((word, after)) = rest.split_first() {
            if word == "--" {
                return Ok((parsed, after));
            }
            let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')).filter(|f| !f.is_empty())
            else {
                break;
            };
            rest = after;
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            if switches.contains(&name) {
                match value.as_deref() {
                    None | Some("true" | "1") => parsed.switches.push(name.to_owned()),
                    Some("false" | "0") => parsed.switches.retain(|s| s != name),
                    Some(other) => return Err(Error::Refused(format!("--{name}={other}: true or false"))),
                }
            } else if values.contains(&name) {
                let value = match value {
                    Some(value) => value,
                    None => {
                        let (value, after) = rest
                            .split_first()
                            .ok_or_else(|| Error::Refused(format!("--{name}: needs a value after it")))?;
                        rest = after;
                        value.clone()
                    }
                };
                parsed.values.push((name.to_owned(), value));
            } else {
                return Err(Error::Refused(format!("{word}: no such flag here; atoll oci help lists them")));
            }
        }
        Ok((parsed, rest))
    }

    pub fn has(&self, switch: &str) -> bool {
        self.switches.iter().any(|s| s == switch)
    }

    /// The last one counts.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.iter().rev().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    pub fn all<'a>(&'a self, names: &'a [&str]) -> impl Iterator<Item = &'a str> {
        self.values.iter().filter(|(n, _)| names.contains(&n.as_str())).map(|(_, value)| value.as_str())
    }

    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>> {
        let Some(text) = self.get(name) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| Error::Refused(format!("--{name}: {text:?} is no number that fits")))
    }
}

/// The one word that commands about a container take.
pub fn only_id(rest: &[String]) -> Result<&str> {
    match rest {
        [id] => Ok(id),
        [] => Err(Error::Refused("a container's id is missing".into())),
        [_, extra, ..] => Err(Error::Refused(format!("{extra:?}: one id only"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn flags_end_at_the_first_word() {
        let all = words("--bundle /b -pid-file=/p --no-pivot --detach=false c1 --tty x");
        let (args, rest) = Args::parse(&all, &["bundle", "pid-file"], &["no-pivot", "detach"]).expect("parsed");
        assert_eq!((args.get("bundle"), args.get("pid-file")), (Some("/b"), Some("/p")));
        assert!(args.has("no-pivot") && !args.has("detach"));
        assert_eq!(rest, ["c1", "--tty", "x"]);
        assert!(only_id(rest).is_err());
    }

    #[test]
    fn what_is_not_known_is_named() {
        for (text, named) in [("--what c1", "--what"), ("--bundle", "--bundle"), ("--detach=maybe", "maybe")] {
            let e = Args::parse(&words(text), &["bundle"], &["detach"]).expect_err("refused");
            assert!(e.to_string().contains(named), "{e}");
        }
        let all = words("--n x");
        let (args, _) = Args::parse(&all, &["n"], &[]).expect("parsed");
        assert!(args.number::<u32>("n").is_err());
    }
}
