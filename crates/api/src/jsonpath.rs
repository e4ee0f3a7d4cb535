//! The simple JSON paths of printed columns and selectable fields: `.spec.replicas`, `.metadata.labels['a/b']`,
//! `.status.list[0].x`, `.status.conditions[?(@.type=="Ready")].status`.

use serde_json::Value;

/// Steps a path may have.
const MAX_STEPS: usize = 32;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Field(String),
    Index(usize),
    Each,
    /// Elements whose field equals the text.
    Where(Vec<String>, String),
}

/// The values at `path`; none if it is not there or the path cannot be read.
pub fn find<'a>(value: &'a Value, path: &str) -> Vec<&'a Value> {
    let Some(steps) = parse(path) else { return Vec::new() };
    let mut found = vec![value];
    for step in &steps {
        found = found
            .into_iter()
            .flat_map(|value| match step {
                Step::Field(name) => value.get(name).into_iter().collect::<Vec<_>>(),
                Step::Index(index) => value.get(index).into_iter().collect(),
                Step::Each => match value {
                    Value::Array(list) => list.iter().collect(),
                    Value::Object(fields) => fields.values().collect(),
                    _ => Vec::new(),
                },
                Step::Where(field, text) => {
                    let equal = |item: &&Value| {
                        let at = field.iter().try_fold(*item, |at, name| at.get(name));
                        at.is_some_and(|at| match at {
                            Value::String(have) => have == text,
                            Value::Bool(have) => text == if *have { "true" } else { "false" },
                            Value::Number(have) => have.to_string().as_str() == text,
                            _ => false,
                        })
                    };
                    value.as_array().into_iter().flatten().filter(equal).collect()
                }
            })
            .collect();
    }
    found
}

/// Whether `path` can be read.
pub fn is_valid(path: &str) -> bool {
    parse(path).is_some()
}

fn parse(path: &str) -> Option<Vec<Step>> {
    let mut rest = path.trim();
    rest = rest.strip_prefix('{').and_then(|inner| inner.strip_suffix('}')).unwrap_or(rest);
    rest = rest.strip_prefix('$').unwrap_or(rest);
    let mut steps = Vec::new();
    while !rest.is_empty() {
        if steps.len() >= MAX_STEPS {
            return None;
        }
        if let Some(inner) = rest.strip_prefix('[') {
            let (step, after) = bracket(inner)?;
            steps.push(step);
            rest = after;
        } else {
            let (name, after) = name(rest.strip_prefix('.')?)?;
            if name == "*" {
                steps.push(Step::Each);
            } else if !name.is_empty() {
                steps.push(Step::Field(name));
            } else if !after.starts_with('[') {
                // A lone dot is the object itself, two in a row are nothing.
                return (after.is_empty() && steps.is_empty()).then_some(steps);
            }
            rest = after;
        }
    }
    Some(steps)
}

/// A field's name up to the next step; `\.` is a dot in it.
fn name(text: &str) -> Option<(String, &str)> {
    let mut name = String::new();
    let mut chars = text.char_indices();
    while let Some((index, c)) = chars.next() {
        match c {
            '\\' => name.push(chars.next()?.1),
            '.' | '[' => return Some((name, text.get(index..)?)),
            _ => name.push(c),
        }
    }
    Some((name, ""))
}

/// What stands in brackets, after the opening one.
fn bracket(text: &str) -> Option<(Step, &str)> {
    if let Some(inner) = text.strip_prefix("?(@.") {
        let (condition, after) = inner.split_once(")]")?;
        let (field, wanted) = condition.split_once("==")?;
        let wanted = wanted.trim();
        let wanted = quoted(wanted).unwrap_or(wanted);
        let field = field.trim().split('.').map(str::to_owned).collect();
        return Some((Step::Where(field, wanted.to_owned()), after));
    }
    if let Some(quote @ ('\'' | '"')) = text.chars().next() {
        let (key, after) = text.get(1..)?.split_once(quote)?;
        return Some((Step::Field(key.replace("\\.", ".")), after.strip_prefix(']')?));
    }
    let (inner, after) = text.split_once(']')?;
    let step = if inner == "*" { Step::Each } else { Step::Index(inner.parse().ok()?) };
    Some((step, after))
}

fn quoted(text: &str) -> Option<&str> {
    ['\'', '"'].into_iter().find_map(|quote| text.strip_prefix(quote)?.strip_suffix(quote))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn paths() {
        let object = json!({"metadata": {"labels": {"a.b/c": "x"}}, "spec": {"list": [{"n": 1}, {"n": 2}]},
            "status": {"conditions": [{"type": "A", "status": "False"}, {"type": "Ready", "status": "True"}]}});
        let first = |path: &str| find(&object, path).first().map(|v| v.to_string()).unwrap_or_default();
        assert_eq!(first(".spec.list[1].n"), "2");
        assert_eq!(first("{.spec.list[0].n}"), "1");
        assert_eq!(first(".metadata.labels['a.b/c']"), "\"x\"");
        assert_eq!(first(".metadata.labels.a\\.b/c"), "\"x\"");
        assert_eq!(first(".status.conditions[?(@.type==\"Ready\")].status"), "\"True\"");
        assert_eq!(first(".status.conditions[?(@.type=='Ready')].status"), "\"True\"");
        assert_eq!(find(&object, ".spec.list[*].n").len(), 2);
        assert_eq!(first(".spec.none"), "");
        assert!(is_valid(".") && !is_valid("spec") && !is_valid(".a[") && !is_valid(".a..b") && !is_valid(".a[x]"));
    }

    proptest! {
        #[test]
        fn foreign_text_never_panics(text in "[.\\[\\]'\"?(@)=a-c0-9*\\\\$]{0,30}") {
            let _ = find(&json!({"a": [{"b": 1}]}), &text);
        }
    }
}
