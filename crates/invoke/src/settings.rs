//! What clients say of functions, in Lambda's words.
//! <https://docs.aws.amazon.com/lambda/latest/api/API_CreateFunction.html>

use crate::answer::Refused;
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// A DNS label's.
const NAME: usize = 63;
const DESCRIPTION: usize = 256;
const TIMEOUT: RangeInclusive<i64> = 1..=900;
/// MiB.
const MEMORY: RangeInclusive<i64> = 128..=10_240;
/// The least and only size of /tmp, MiB.
const EPHEMERAL: i64 = 512;
const ENVIRONMENT: usize = 4096;
const TAGS: usize = 50;

/// CreateFunction, and UpdateFunctionConfiguration with a part of it. What is not there stays as it is.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields, default)]
pub struct Wanted {
    pub function_name: Option<String>,
    pub code: Option<Code>,
    pub package_type: Option<String>,
    pub publish: Option<bool>,
    pub tags: Option<BTreeMap<String, String>>,
    pub architectures: Option<Vec<String>>,
    pub runtime: Option<String>,
    pub role: Option<String>,
    pub handler: Option<String>,
    pub description: Option<String>,
    pub timeout: Option<i64>,
    pub memory_size: Option<i64>,
    pub environment: Option<Environment>,
    pub image_config: Option<ImageConfig>,
    pub ephemeral_storage: Option<Ephemeral>,
    pub revision_id: Option<String>,
    /// Of another cloud's observation; every function here is traced and logged.
    tracing_config: Option<IgnoredAny>,
    logging_config: Option<IgnoredAny>,
}

/// UpdateFunctionCode.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields, default)]
pub struct NewCode {
    pub zip_file: Option<String>,
    pub image_uri: Option<String>,
    pub architectures: Option<Vec<String>>,
    pub publish: Option<bool>,
    pub dry_run: Option<bool>,
    pub revision_id: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields, default)]
pub struct Code {
    pub zip_file: Option<String>,
    pub image_uri: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields, default)]
pub struct Environment {
    pub variables: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields, default)]
pub struct ImageConfig {
    pub entry_point: Option<Vec<String>>,
    pub command: Option<Vec<String>>,
    pub working_directory: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields, default)]
pub struct Ephemeral {
    pub size: i64,
}

/// Reads a request's body; an empty one is an empty object.
pub fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refused> {
    let body = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(body).map_err(|e| Refused::new(400, "InvalidRequestContentException", format!("body: {e}")))
}

impl Wanted {
    /// What holds whether a function is made or changed.
    pub fn check(&self) -> Result<(), Refused> {
        let architectures = self.architectures.as_deref();
        architecture(architectures)?;
        unpublished(self.publish)?;
        within("Timeout", self.timeout, &TIMEOUT)?;
        within("MemorySize", self.memory_size, &MEMORY)?;
        let ephemeral = self.ephemeral_storage.as_ref().map(|storage| storage.size);
        within("EphemeralStorage.Size", ephemeral, &(EPHEMERAL..=EPHEMERAL))?;
        if self.description.as_ref().is_some_and(|text| text.len() > DESCRIPTION) {
            return Err(Refused::parameter(format!("Description: at most {DESCRIPTION} bytes")));
        }
        let handler = self.handler.as_deref().unwrap_or("handler");
        if handler.is_empty() || handler.len() > 128 || handler.contains(char::is_whitespace) {
            return Err(Refused::parameter(format!(
                "Handler: {handler:?} is not a name without spaces, such as app.main"
            )));
        }
        if self.tags.as_ref().is_some_and(|tags| tags.len() > TAGS) {
            return Err(Refused::parameter(format!("Tags: at most {TAGS}")));
        }
        self.environment.as_ref().map_or(Ok(()), Environment::check)
    }
}

impl Environment {
    fn check(&self) -> Result<(), Refused> {
        for name in self.variables.keys() {
            let good = name.len() > 1
                && name.starts_with(|c: char| c.is_ascii_alphabetic())
                && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
            if !good {
                let rule = "letters, digits and _, two or more, a letter first";
                return Err(Refused::parameter(format!("Environment.Variables: {name:?}: {rule}")));
            }
        }
        let size: usize = self.variables.iter().map(|(name, value)| name.len() + value.len()).sum();
        match size > ENVIRONMENT {
            true => Err(Refused::parameter(format!("Environment.Variables: {size} bytes, of at most {ENVIRONMENT}"))),
            false => Ok(()),
        }
    }
}

impl NewCode {
    pub fn check(&self) -> Result<(), Refused> {
        architecture(self.architectures.as_deref())?;
        unpublished(self.publish)
    }
}

fn architecture(wanted: Option<&[String]>) -> Result<(), Refused> {
    match wanted {
        None => Ok(()),
        Some([one]) if one == "x86_64" => Ok(()),
        Some(other) => Err(Refused::parameter(format!("Architectures: {other:?}: only [\"x86_64\"] is there"))),
    }
}

fn unpublished(publish: Option<bool>) -> Result<(), Refused> {
    match publish {
        Some(true) => Err(Refused::parameter(
            "Publish: versions are Knative's revisions here; leave it out, and split traffic in the Knative Service",
        )),
        _ => Ok(()),
    }
}

fn within(field: &str, value: Option<i64>, range: &RangeInclusive<i64>) -> Result<(), Refused> {
    match value.filter(|value| !range.contains(value)) {
        Some(value) => {
            Err(Refused::parameter(format!("{field}: {value} is not from {} to {}", range.start(), range.end())))
        }
        None => Ok(()),
    }
}

/// The name that a path or a field means: by itself, `ACCOUNT:function:NAME`, or a whole ARN; `:$LATEST` may follow.
pub fn name(given: &str) -> Result<String, Refused> {
    let bad = |why: &str| Refused::parameter(format!("FunctionName: {given:?}: {why}"));
    let rest = given.rsplit_once("function:").map_or(given, |(_, rest)| rest);
    let (name, qualifier) = rest.split_once(':').unwrap_or((rest, "$LATEST"));
    if qualifier != "$LATEST" {
        return Err(bad("only the qualifier $LATEST is there"));
    }
    let fits = !name.is_empty()
        && name.len() <= NAME
        && name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-')
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && !name.ends_with('-');
    match fits {
        true => Ok(name.to_owned()),
        false => Err(bad("a name of lower-case letters, digits and '-', at most 63, a letter first, is needed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    #[test]
    fn names_come_in_four_forms() {
        for good in
            ["f-1", "f-1:$LATEST", "000000000000:function:f-1", "arn:aws:lambda:r:000000000000:function:f-1:$LATEST"]
        {
            assert_eq!(name(good).unwrap(), "f-1", "{good}");
        }
        for bad in ["", "F", "a_b", "1a", "a-", "f:1", &"a".repeat(64), "a/../b", "function:"] {
            assert_eq!(name(bad).unwrap_err().code, "InvalidParameterValueException", "{bad}");
        }
    }

    #[test]
    fn each_bad_field_is_named() {
        let told = |body: Value| {
            let wanted = read::<Wanted>(body.to_string().as_bytes());
            wanted.and_then(|wanted| wanted.check()).map_err(|refused| refused.message)
        };
        assert!(told(json!({"Timeout": 900, "MemorySize": 128, "TracingConfig": {"Mode": "Active"}})).is_ok());
        for (bad, field) in [
            (json!({"Timeout": 901}), "Timeout: 901 is not from 1 to 900"),
            (json!({"MemorySize": 64}), "MemorySize: 64"),
            (json!({"EphemeralStorage": {"Size": 1024}}), "EphemeralStorage.Size"),
            (json!({"Layers": ["arn"]}), "unknown field `Layers`"),
            (json!({"Code": {"S3Bucket": "b"}}), "unknown field `S3Bucket`"),
            (json!({"Architectures": ["arm64"]}), "Architectures"),
            (json!({"Publish": true}), "Publish"),
            (json!({"Handler": "a b"}), "Handler"),
            (json!({"Environment": {"Variables": {"1A": "x"}}}), "\"1A\""),
            (json!({"Environment": {"Variables": {"AB": "x".repeat(4096)}}}), "4098 bytes"),
            (json!("x"), "body"),
        ] {
            let why = told(bad).unwrap_err();
            assert!(why.contains(field), "{why}");
        }
    }

    proptest! {
        #[test]
        fn no_body_harms(bytes in proptest::collection::vec(any::<u8>(), 0..64), text in "\\PC{0,32}") {
            let _ = read::<Wanted>(&bytes);
            let _ = read::<NewCode>(json!({"ZipFile": text}).to_string().as_bytes());
            let _ = name(&text);
        }
    }
}
