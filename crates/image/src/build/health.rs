//! `HEALTHCHECK`.

use serde_json::{Value, json};

/// As the image's configuration has it (docker's image specification, `Healthcheck`).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Health(pub Value);

pub(crate) fn parse(flags: Vec<(String, Option<String>)>, rest: &str) -> Result<Health, String> {
    let rest = rest.trim();
    let (word, command) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    match word.to_ascii_uppercase().as_str() {
        "NONE" if command.is_empty() && flags.is_empty() => return Ok(Health(json!({"Test": ["NONE"]}))),
        "CMD" if !command.trim().is_empty() => {}
        _ => return Err("HEALTHCHECK is followed by CMD and a command, or by NONE alone".into()),
    }
    let command = command.trim();
    let test = match serde_json::from_str::<Vec<String>>(command).ok().filter(|_| command.starts_with('[')) {
        Some(list) => [vec!["CMD".to_owned()], list].concat(),
        None => vec!["CMD-SHELL".to_owned(), command.to_owned()],
    };
    let mut health = serde_json::Map::from_iter([("Test".to_owned(), json!(test))]);
    for (name, value) in flags {
        let value = value.ok_or(format!("--{name} needs a value"))?;
        let (key, value) = match name.as_str() {
            "interval" => ("Interval", json!(nanoseconds(&value)?)),
            "timeout" => ("Timeout", json!(nanoseconds(&value)?)),
            "start-period" => ("StartPeriod", json!(nanoseconds(&value)?)),
            "start-interval" => ("StartInterval", json!(nanoseconds(&value)?)),
            "retries" => ("Retries", json!(value.parse::<u32>().map_err(|_| format!("--retries={value}: a number"))?)),
            other => return Err(format!("HEALTHCHECK has no flag --{other}")),
        };
        health.insert(key.to_owned(), value);
    }
    Ok(Health(Value::Object(health)))
}

/// `1m30s`, as Go writes durations.
fn nanoseconds(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no duration; write it as 30s, 1m30s or 500ms");
    let mut rest = text;
    let mut total = 0f64;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
        let (number, after) = rest.split_at(end);
        let (unit, scale) = [("ms", 1e6), ("us", 1e3), ("ns", 1.0), ("h", 3600e9), ("m", 60e9), ("s", 1e9)]
            .into_iter()
            .find(|(unit, _)| after.starts_with(unit))
            .ok_or_else(wrong)?;
        total += number.parse::<f64>().map_err(|_| wrong())? * scale;
        rest = after.get(unit.len()..).unwrap_or_default();
    }
    // The largest that other tools read (an int64).
    if text.is_empty() || total > 9.2e18 { Err(wrong()) } else { Ok(total as u64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        assert_eq!(nanoseconds("1m30s"), Ok(90_000_000_000));
        assert_eq!(nanoseconds("500ms"), Ok(500_000_000));
        assert_eq!(nanoseconds("1.5h"), Ok(5_400_000_000_000));
        for bad in ["", "5", "s", "-1s", "1x", "99999999999h"] {
            assert!(nanoseconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn checks() {
        let of = |flags: &[(&str, &str)], rest: &str| {
            parse(flags.iter().map(|(n, v)| ((*n).to_owned(), Some((*v).to_owned()))).collect(), rest)
        };
        assert_eq!(of(&[], "none").unwrap().0, json!({"Test": ["NONE"]}));
        assert_eq!(
            of(&[("interval", "5s"), ("retries", "2")], "CMD curl -f x").unwrap().0,
            json!({"Test": ["CMD-SHELL", "curl -f x"], "Interval": 5_000_000_000u64, "Retries": 2})
        );
        assert_eq!(of(&[], r#"CMD ["a", "b"]"#).unwrap().0, json!({"Test": ["CMD", "a", "b"]}));
        assert!(of(&[("every", "5s")], "CMD x").is_err());
        assert!(of(&[], "curl").is_err());
    }
}
