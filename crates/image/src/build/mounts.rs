//! `RUN --mount`.

use super::Secret;
use std::collections::BTreeMap;

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Mount {
    pub kind: Kind,
    /// Empty: below the working directory or where the kind has its usual place.
    pub target: String,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind {
    Bind { from: Option<String>, source: String },
    Cache { id: String, sharing: Sharing, read_only: bool, mode: u32, uid: u32, gid: u32 },
    Tmpfs { size: Option<u64> },
    Ssh { id: String, required: bool, mode: u32, uid: u32, gid: u32 },
    Secret { id: String, variable: Option<String>, file: bool, required: bool, mode: u32, uid: u32, gid: u32 },
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Sharing {
    Shared,
    Locked,
    Private,
}

/// The fields of one `--mount`, taken out one by one: what is left is unknown.
struct Fields<'a> {
    text: &'a str,
    left: BTreeMap<String, String>,
}

impl Fields<'_> {
    fn told(&self, why: &str) -> String {
        format!("--mount={}: {why}", self.text)
    }

    fn take(&mut self, name: &str) -> Option<String> {
        self.left.remove(name)
    }

    fn flag(&mut self, name: &str) -> Result<bool, String> {
        match self.take(name).as_deref() {
            None | Some("false" | "0") => Ok(false),
            Some("true" | "1") => Ok(true),
            Some(other) => Err(self.told(&format!("{name}={other}: it is true or false"))),
        }
    }

    fn id(&mut self, name: &str) -> Result<u32, String> {
        match self.take(name) {
            None => Ok(0),
            Some(text) => text.parse().map_err(|_| self.told(&format!("{name} is a number"))),
        }
    }

    fn mode(&mut self, usual: u32) -> Result<u32, String> {
        let Some(text) = self.take("mode") else { return Ok(usual) };
        let mode = u32::from_str_radix(&text, 8).ok().filter(|m| *m <= 0o7777);
        mode.ok_or_else(|| self.told("mode is an octal number"))
    }

    fn target(&mut self) -> Result<String, String> {
        self.take("target").filter(|t| !t.is_empty()).ok_or_else(|| self.told("it needs target="))
    }

    fn bind(&mut self) -> Result<Mount, String> {
        if self.flag("rw")? {
            return Err(self.told("bind mounts are read-only; COPY what is to be changed"));
        }
        self.flag("readonly")?;
        let source = self.take("source").unwrap_or_else(|| "/".into());
        Ok(Mount { target: self.target()?, kind: Kind::Bind { from: self.take("from"), source } })
    }

    fn cache(&mut self) -> Result<Mount, String> {
        let target = self.target()?;
        let sharing = match self.take("sharing").as_deref() {
            None | Some("shared") => Sharing::Shared,
            Some("locked") => Sharing::Locked,
            Some("private") => Sharing::Private,
            Some(other) => return Err(self.told(&format!("sharing={other}: it is shared, locked or private"))),
        };
        let kind = Kind::Cache {
            id: self.take("id").unwrap_or_else(|| target.clone()),
            sharing,
            read_only: self.flag("readonly")?,
            mode: self.mode(0o755)?,
            uid: self.id("uid")?,
            gid: self.id("gid")?,
        };
        Ok(Mount { target, kind })
    }

    fn tmpfs(&mut self) -> Result<Mount, String> {
        let size = match self.take("size") {
            None => None,
            Some(text) => Some(bytes(&text).ok_or_else(|| self.told("size is a number of bytes, such as 64m"))?),
        };
        Ok(Mount { target: self.target()?, kind: Kind::Tmpfs { size } })
    }

    fn ssh(&mut self) -> Result<Mount, String> {
        let kind = Kind::Ssh {
            id: self.take("id").unwrap_or_else(|| "default".into()),
            required: self.flag("required")?,
            mode: self.mode(0o600)?,
            uid: self.id("uid")?,
            gid: self.id("gid")?,
        };
        Ok(Mount { target: self.take("target").unwrap_or_else(|| "/run/buildkit/ssh_agent.0".into()), kind })
    }

    fn secret(&mut self) -> Result<Mount, String> {
        let target = self.take("target");
        let id = self
            .take("id")
            .or_else(|| target.as_ref().and_then(|t| t.rsplit('/').next().map(str::to_owned)))
            .filter(|n| !n.is_empty())
            .ok_or_else(|| self.told("it needs id="))?;
        let variable = self.take("env");
        let kind = Kind::Secret {
            file: variable.is_none() || target.is_some(),
            variable,
            required: self.flag("required")?,
            mode: self.mode(0o400)?,
            uid: self.id("uid")?,
            gid: self.id("gid")?,
            id: id.clone(),
        };
        Ok(Mount { target: target.unwrap_or_else(|| format!("/run/secrets/{id}")), kind })
    }
}

/// Parses the value of a `--mount`.
pub(crate) fn parse(text: &str) -> Result<Mount, String> {
    let mut fields = Fields { text, left: BTreeMap::new() };
    for part in text.split(',').filter(|p| !p.is_empty()) {
        let (name, value) = part.split_once('=').unwrap_or((part, "true"));
        let name = match name {
            "dst" | "destination" => "target",
            "src" => "source",
            "ro" => "readonly",
            "readwrite" => "rw",
            other => other,
        };
        if fields.left.insert(name.to_owned(), value.to_owned()).is_some() {
            return Err(fields.told(&format!("{name} is given twice")));
        }
    }
    let kind = fields.take("type").unwrap_or_else(|| "bind".into());
    let mount = match kind.as_str() {
        "bind" => fields.bind()?,
        "cache" => fields.cache()?,
        "tmpfs" => fields.tmpfs()?,
        "secret" => fields.secret()?,
        "ssh" => fields.ssh()?,
        other => return Err(fields.told(&format!("type {other:?}: it is bind, cache, tmpfs, secret or ssh"))),
    };
    match fields.left.keys().next() {
        Some(unknown) => Err(fields.told(&format!("a {kind} mount has no {unknown}"))),
        None => Ok(mount),
    }
}

fn bytes(text: &str) -> Option<u64> {
    let text = text.trim_end_matches(['b', 'B']);
    let (digits, scale) = match text.strip_suffix(['k', 'K', 'm', 'M', 'g', 'G']) {
        Some(digits) => (
            digits,
            match text.bytes().last()?.to_ascii_lowercase() {
                b'k' => 1 << 10,
                b'm' => 1 << 20,
                _ => 1 << 30,
            },
        ),
        None => (text, 1u64),
    };
    digits.parse::<u64>().ok()?.checked_mul(scale)
}

impl Secret {
    /// `id=NAME[,src=PATH|,env=VARIABLE]`; with neither, the variable or file of that name.
    pub fn parse(text: &str) -> Result<Secret, String> {
        let told =
            |why: &str| format!("--secret {text:?}: {why}; write it as id=NAME,src=PATH or id=NAME,env=VARIABLE");
        let (mut id, mut file, mut variable) = (None, None, None);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("id", value)) if !value.is_empty() => id = Some(value.to_owned()),
                Some(("src" | "source", value)) => file = Some(value.into()),
                Some(("env", value)) => variable = Some(value.to_owned()),
                Some(("type", "file" | "env")) => {}
                _ => return Err(told(&format!("{part:?} is not known"))),
            }
        }
        let id = id.ok_or_else(|| told("it has no id"))?;
        Ok(match (file, variable) {
            (Some(path), None) => Secret::File { id, path },
            (None, Some(variable)) => Secret::Variable { id, variable },
            (None, None) if std::env::var_os(&id).is_some() => Secret::Variable { variable: id.clone(), id },
            (None, None) => Secret::File { path: id.clone().into(), id },
            (Some(_), Some(_)) => return Err(told("it has both src and env")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn kinds() {
        assert_eq!(
            parse("target=/x,from=a,src=b").unwrap(),
            Mount { target: "/x".into(), kind: Kind::Bind { from: Some("a".into()), source: "b".into() } }
        );
        let cache = parse("type=cache,dst=/c,sharing=locked,uid=5").unwrap();
        assert!(
            matches!(cache.kind, Kind::Cache { id, sharing: Sharing::Locked, uid: 5, mode: 0o755, .. } if id == "/c")
        );
        assert_eq!(parse("type=tmpfs,target=/t,size=2m").unwrap().kind, Kind::Tmpfs { size: Some(2 << 20) });
        let secret = parse("type=secret,id=k,required").unwrap();
        assert_eq!(secret.target, "/run/secrets/k");
        assert!(matches!(secret.kind, Kind::Secret { required: true, file: true, mode: 0o400, .. }));
        let ssh = parse("type=ssh").unwrap();
        assert!(matches!(ssh.kind, Kind::Ssh { id, mode: 0o600, required: false, .. } if id == "default"));
        for bad in [
            "type=ssh,source=/x",
            "type=cache",
            "type=bind,target=/x,rw",
            "target=/x,target=/y",
            "type=tmpfs,target=/t,size=x",
            "type=cache,target=/c,mode=9",
            "type=secret",
            "target=/x,colour=red",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn secrets() {
        assert!(matches!(Secret::parse("id=a,src=/x").unwrap(), Secret::File { .. }));
        assert!(matches!(Secret::parse("id=a,env=B").unwrap(), Secret::Variable { .. }));
        assert!(Secret::parse("src=/x").is_err());
    }

    proptest! {
        #[test]
        fn never_panics(text in "(type|bind|cache|secret|tmpfs|target|size|id|=|,|/x|[ -~]){0,12}") {
            let _ = parse(&text);
            let _ = Secret::parse(&text);
        }
    }
}
