//! The query of a request.

use crate::rest::{FieldValidation, VersionMatch};
use api::client::Propagation;
use api::status::{Status, StatusResult};
use percent_encoding::percent_decode_str;

/// Decoded parameters, in order.
#[derive(Clone, Debug, Default)]
pub struct Query {
    pairs: Vec<(String, String)>,
}

impl Query {
    pub fn parse(text: &str) -> Self {
        let decode = |part: &str| {
            let spaced = part.replace('+', " ");
            percent_decode_str(&spaced).decode_utf8_lossy().into_owned()
        };
        let pair = |part: &str| match part.split_once('=') {
            Some((key, value)) => (decode(key), decode(value)),
            None => (decode(part), String::new()),
        };
        Query { pairs: text.split('&').filter(|p| !p.is_empty()).map(pair).collect() }
    }

    /// The parameter's value; empty when it is not there.
    pub fn get(&self, key: &str) -> &str {
        self.pairs.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str()).unwrap_or("")
    }

    pub fn has(&self, key: &str) -> bool {
        self.pairs.iter().any(|(k, _)| k == key)
    }

    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.pairs.iter().filter(move |(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    pub fn flag(&self, key: &str) -> bool {
        self.has(key) && !matches!(self.get(key), "false" | "0" | "False" | "f")
    }

    /// A number, if the parameter is there.
    pub fn number<T: std::str::FromStr>(&self, key: &str) -> StatusResult<Option<T>> {
        match self.get(key) {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|_| invalid(key, text, "must be a number")),
        }
    }

    pub fn dry_run(&self) -> StatusResult<bool> {
        let mut on = false;
        for value in self.all("dryRun") {
            match value {
                "All" => on = true,
                "" => {}
                other => {
                    return Err(invalid("dryRun", other, "Unsupported value: supported values: \"All\""));
                }
            }
        }
        Ok(on)
    }

    pub fn field_validation(&self) -> StatusResult<FieldValidation> {
        match self.get("fieldValidation") {
            "" | "Warn" => Ok(FieldValidation::Warn),
            "Ignore" => Ok(FieldValidation::Ignore),
            "Strict" => Ok(FieldValidation::Strict),
            other => Err(invalid("fieldValidation", other, "supported values: \"Ignore\", \"Strict\", \"Warn\"")),
        }
    }

    pub fn version_match(&self) -> StatusResult<VersionMatch> {
        match self.get("resourceVersionMatch") {
            "" => Ok(VersionMatch::Unset),
            "Exact" => Ok(VersionMatch::Exact),
            "NotOlderThan" => Ok(VersionMatch::NotOlderThan),
            other => Err(invalid("resourceVersionMatch", other, "supported values: \"Exact\", \"NotOlderThan\", \"\"")),
        }
    }
}

/// How dependents are to be treated, by its name.
pub fn propagation(name: &str) -> StatusResult<Option<Propagation>> {
    match name {
        "" => Ok(None),
        "Background" => Ok(Some(Propagation::Background)),
        "Foreground" => Ok(Some(Propagation::Foreground)),
        "Orphan" => Ok(Some(Propagation::Orphan)),
        other => {
            Err(invalid("propagationPolicy", other, "supported values: \"Foreground\", \"Background\", \"Orphan\""))
        }
    }
}

fn invalid(key: &str, value: &str, why: &str) -> Status {
    Status::bad_request(format!("{key}: Invalid value: \"{value}\": {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters() {
        let query = Query::parse("a=1&b=x%3Dy+z&watch&dryRun=All&command=ls&command=-l");
        assert_eq!((query.get("a"), query.get("b")), ("1", "x=y z"));
        assert!(query.flag("watch") && !query.flag("follow") && query.dry_run().unwrap());
        assert_eq!(query.all("command").collect::<Vec<_>>(), ["ls", "-l"]);
        assert_eq!(query.number::<usize>("a").unwrap(), Some(1));
        assert!(Query::parse("limit=x").number::<usize>("limit").is_err());
        assert!(Query::parse("fieldValidation=Maybe").field_validation().is_err());
    }
}
