//! Selectors: which objects a request, a Service or a ReplicaSet means, by labels or by fields.
//!
//! Syntax and semantics: <https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#label-selectors>.

use crate::names;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SelectorError(pub String);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
    GreaterThan,
    LessThan,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    pub key: String,
    pub operator: Operator,
    pub values: BTreeSet<String>,
}

/// All requirements must hold; none = everything matches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    pub requirements: Vec<Requirement>,
    /// Matches no object at all (an absent LabelSelector).
    pub nothing: bool,
}

impl Requirement {
    pub fn matches(&self, value: Option<&str>) -> bool {
        let compare = |wanted: fn(i64, i64) -> bool| {
            let limit = self.values.first().and_then(|text| text.parse().ok());
            matches!((value.and_then(|text| text.parse().ok()), limit), (Some(have), Some(limit)) if wanted(have, limit))
        };
        match self.operator {
            Operator::In => value.is_some_and(|value| self.values.contains(value)),
            Operator::NotIn => !value.is_some_and(|value| self.values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
            Operator::GreaterThan => compare(|have, limit| have > limit),
            Operator::LessThan => compare(|have, limit| have < limit),
        }
    }
}

impl Selector {
    /// Matches everything.
    pub fn everything() -> Self {
        Selector::default()
    }
    pub fn nothing() -> Self {
        Selector { requirements: Vec::new(), nothing: true }
    }
    pub fn is_everything(&self) -> bool {
        self.requirements.is_empty() && !self.nothing
    }

    /// `a=b,c!=d,e in (f,g),h notin (i),j,!k,l>1`; empty text matches everything.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        Parser::new(text).selector()
    }

    /// A `LabelSelector` object with `matchLabels` and `matchExpressions`; `null` matches nothing, `{}` everything.
    pub fn from_object(selector: &Value) -> Result<Self, SelectorError> {
        let Value::Object(fields) = selector else {
            return Ok(Selector::nothing());
        };
        let mut all = Selector::from_map(fields.get("matchLabels").unwrap_or(&Value::Null))?;
        let expressions =
            fields.get("matchExpressions").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        for expression in expressions {
            let key = expression.get("key").and_then(Value::as_str).unwrap_or("");
            let operator = expression.get("operator").and_then(Value::as_str).unwrap_or("");
            let values = expression.get("values").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
            all.requirements.push(requirement(
                key,
                match operator {
                    "In" => Operator::In,
                    "NotIn" => Operator::NotIn,
                    "Exists" => Operator::Exists,
                    "DoesNotExist" => Operator::DoesNotExist,
                    "Gt" => Operator::GreaterThan,
                    "Lt" => Operator::LessThan,
                    other => return Err(SelectorError(format!("{other:?} is not a valid label selector operator"))),
                },
                values.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
            )?);
        }
        Ok(all)
    }

    /// A plain map of labels that must all be equal (`Service.spec.selector`, `nodeSelector`).
    pub fn from_map(labels: &Value) -> Result<Self, SelectorError> {
        let mut all = Selector::default();
        for (key, value) in labels.as_object().into_iter().flatten() {
            let value = value.as_str().unwrap_or("").to_owned();
            all.requirements.push(requirement(key, Operator::In, BTreeSet::from([value]))?);
        }
        Ok(all)
    }

    /// What stands at a scale subresource's selector path: an object, a map or text.
    pub fn from_any(value: &Value) -> Result<Self, SelectorError> {
        match value {
            Value::String(text) => Selector::parse(text),
            Value::Object(fields) if fields.contains_key("matchLabels") || fields.contains_key("matchExpressions") => {
                Selector::from_object(value)
            }
            Value::Object(fields) if !fields.is_empty() => Selector::from_map(value),
            _ => Ok(Selector::nothing()),
        }
    }

    /// `labels` is `metadata.labels` or `null`.
    pub fn matches(&self, labels: &Value) -> bool {
        !self.nothing && self.requirements.iter().all(|r| r.matches(labels.get(&r.key).and_then(Value::as_str)))
    }

    /// Against an object's `metadata.labels`.
    pub fn matches_object(&self, object: &Value) -> bool {
        self.matches(object.pointer("/metadata/labels").unwrap_or(&Value::Null))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, r) in self.requirements.iter().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            let values = || r.values.iter().map(String::as_str).collect::<Vec<_>>().join(",");
            match r.operator {
                Operator::In if r.values.len() == 1 => write!(f, "{}={}", r.key, values())?,
                Operator::In => write!(f, "{} in ({})", r.key, values())?,
                Operator::NotIn if r.values.len() == 1 => write!(f, "{}!={}", r.key, values())?,
                Operator::NotIn => write!(f, "{} notin ({})", r.key, values())?,
                Operator::Exists => f.write_str(&r.key)?,
                Operator::DoesNotExist => write!(f, "!{}", r.key)?,
                Operator::GreaterThan => write!(f, "{}>{}", r.key, values())?,
                Operator::LessThan => write!(f, "{}<{}", r.key, values())?,
            }
        }
        Ok(())
    }
}

fn requirement(key: &str, operator: Operator, values: BTreeSet<String>) -> Result<Requirement, SelectorError> {
    if let Some(problem) = names::qualified_name(key).first() {
        return Err(SelectorError(format!("key: Invalid value: {key:?}: {problem}")));
    }
    match operator {
        Operator::In | Operator::NotIn if values.is_empty() => {
            return Err(SelectorError(
                "values: Invalid value: []: for 'in', 'notin' operators, values set can't be empty".into(),
            ));
        }
        Operator::Exists | Operator::DoesNotExist if !values.is_empty() => {
            return Err(SelectorError(
                "values: Invalid value: values set must be empty for exists and does not exist".into(),
            ));
        }
        Operator::GreaterThan | Operator::LessThan
            if values.len() != 1 || values.iter().any(|v| v.parse::<i64>().is_err()) =>
        {
            return Err(SelectorError(
                "values: Invalid value: for 'Gt', 'Lt' operators, the value must be an integer".into(),
            ));
        }
        _ => {}
    }
    for value in &values {
        if let Some(problem) = names::label_value(value).first() {
            return Err(SelectorError(format!("values[0][{key}]: Invalid value: {value:?}: {problem}")));
        }
    }
    Ok(Requirement { key: key.to_owned(), operator, values })
}

/// Words and symbols of a selector's text.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    Symbol(&'static str),
    End,
}

impl Token {
    fn text(&self) -> &str {
        match self {
            Token::Word(word) => word,
            Token::Symbol(symbol) => symbol,
            Token::End => "",
        }
    }
}

struct Parser {
    tokens: std::vec::IntoIter<Token>,
    peeked: Token,
}

impl Parser {
    fn new(text: &str) -> Self {
        let mut tokens = tokens(text).into_iter();
        let peeked = tokens.next().unwrap_or(Token::End);
        Parser { tokens, peeked }
    }
    fn take(&mut self) -> Token {
        let next = self.tokens.next().unwrap_or(Token::End);
        std::mem::replace(&mut self.peeked, next)
    }
    fn take_symbol(&mut self, symbol: &str) -> bool {
        let found = matches!(&self.peeked, Token::Symbol(s) if *s == symbol);
        if found {
            self.take();
        }
        found
    }

    fn selector(mut self) -> Result<Selector, SelectorError> {
        let mut all = Selector::default();
        if self.peeked == Token::End {
            return Ok(all);
        }
        loop {
            let parsed =
                self.requirement().map_err(|error| SelectorError(format!("unable to parse requirement: {error}")))?;
            all.requirements.push(parsed);
            match self.take() {
                Token::End => break,
                Token::Symbol(",") => {
                    if !matches!(&self.peeked, Token::Word(_) | Token::Symbol("!")) {
                        return Err(SelectorError(format!(
                            "found '{}', expected: identifier after ','",
                            self.peeked.text()
                        )));
                    }
                }
                other => {
                    return Err(SelectorError(format!("found '{}', expected: ',' or 'end of string'", other.text())));
                }
            }
        }
        all.requirements.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(all)
    }

    fn requirement(&mut self) -> Result<Requirement, SelectorError> {
        let absent = self.take_symbol("!");
        let key = match self.take() {
            Token::Word(word) => word,
            other => return Err(SelectorError(format!("found '{}', expected: identifier", other.text()))),
        };
        if absent {
            return requirement(&key, Operator::DoesNotExist, BTreeSet::new());
        }
        if matches!(&self.peeked, Token::End | Token::Symbol(",")) {
            return requirement(&key, Operator::Exists, BTreeSet::new());
        }
        let operator = self.take();
        let (operator, set) = match operator.text() {
            "=" | "==" => (Operator::In, false),
            "!=" => (Operator::NotIn, false),
            ">" => (Operator::GreaterThan, false),
            "<" => (Operator::LessThan, false),
            "in" => (Operator::In, true),
            "notin" => (Operator::NotIn, true),
            other => {
                return Err(SelectorError(format!("found '{other}', expected: in, notin, =, ==, !=, gt, lt")));
            }
        };
        let values = if set { self.set()? } else { BTreeSet::from([self.value()]) };
        requirement(&key, operator, values)
    }

    /// A value may be empty: `a=`, `a=,b`.
    fn value(&mut self) -> String {
        match &self.peeked {
            Token::Word(_) => self.take().text().to_owned(),
            _ => String::new(),
        }
    }

    fn set(&mut self) -> Result<BTreeSet<String>, SelectorError> {
        if !self.take_symbol("(") {
            return Err(SelectorError(format!("found '{}' expected: '('", self.peeked.text())));
        }
        let mut values = BTreeSet::new();
        if self.take_symbol(")") {
            return Ok(BTreeSet::from([String::new()]));
        }
        loop {
            values.insert(self.value());
            match self.take() {
                Token::Symbol(")") => return Ok(values),
                Token::Symbol(",") => {}
                other => return Err(SelectorError(format!("found '{}', expected: ',' or ')'", other.text()))),
            }
        }
    }
}

fn tokens(text: &str) -> Vec<Token> {
    let mut all = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start();
        if rest.is_empty() {
            return all;
        }
        let symbols = ["==", "!=", "=", "!", "(", ")", ",", "<", ">"];
        if let Some(symbol) = symbols.into_iter().find(|symbol| rest.starts_with(symbol)) {
            all.push(Token::Symbol(symbol));
            rest = rest.get(symbol.len()..).unwrap_or("");
        } else {
            let end = rest.find(|c: char| c.is_whitespace() || "=!(),<>".contains(c)).unwrap_or(rest.len());
            let (word, after) = rest.split_at(end);
            all.push(Token::Word(word.to_owned()));
            rest = after;
        }
    }
}

/// One term of a field selector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldTerm {
    /// Dotted path, `status.phase`.
    pub field: String,
    pub value: String,
    pub negated: bool,
}

/// `metadata.name=x,spec.nodeName!=y`: all terms must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSelector {
    pub terms: Vec<FieldTerm>,
}

impl FieldSelector {
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut terms = Vec::new();
        for term in split_escaped(text) {
            if term.is_empty() {
                continue;
            }
            let (field, operator, value) = split_term(term)
                .ok_or_else(|| SelectorError(format!("invalid selector: '{text}'; can't understand '{term}'")))?;
            let value = unescape(value).ok_or_else(|| {
                SelectorError(format!("invalid field selector: invalid escape sequence in {value:?}"))
            })?;
            terms.push(FieldTerm { field: field.to_owned(), value, negated: operator == "!=" });
        }
        Ok(FieldSelector { terms })
    }

    /// Refuses fields that a kind cannot be selected by, as Kubernetes words it.
    pub fn check(&self, supported: &[&str]) -> Result<(), SelectorError> {
        match self.terms.iter().find(|term| !supported.contains(&term.field.as_str())) {
            Some(term) => Err(SelectorError(format!("field label not supported: {}", term.field))),
            None => Ok(()),
        }
    }

    /// The value `field` must have, when the selector says so.
    pub fn required(&self, field: &str) -> Option<&str> {
        self.terms.iter().find(|term| term.field == field && !term.negated).map(|term| term.value.as_str())
    }

    pub fn is_everything(&self) -> bool {
        self.terms.is_empty()
    }

    pub fn matches(&self, object: &Value) -> bool {
        self.terms.iter().all(|term| (field_text(object, &term.field) == term.value) != term.negated)
    }
}

/// The text of a dotted field; absent reads as empty, an absent flag as `false`.
pub fn field_text(object: &Value, field: &str) -> String {
    let mut at = object;
    for part in field.split('.') {
        match at.get(part) {
            Some(next) => at = next,
            None => return if field == "spec.unschedulable" { "false".to_owned() } else { String::new() },
        }
    }
    match at {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// Splits at commas that no backslash precedes.
fn split_escaped(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut start, mut escaped) = (0, false);
    for (index, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ',' => {
                parts.push(text.get(start..index).unwrap_or(""));
                start = index + 1;
            }
            _ => {}
        }
    }
    parts.push(text.get(start..).unwrap_or(""));
    parts
}

fn split_term(term: &str) -> Option<(&str, &str, &str)> {
    let mut escaped = false;
    for (index, c) in term.char_indices() {
        if escaped {
            escaped = false;
            continue;
        }
        if c == '\\' {
            escaped = true;
            continue;
        }
        let rest = term.get(index..)?;
        for operator in ["!=", "==", "="] {
            if rest.starts_with(operator) {
                return Some((term.get(..index)?, operator, rest.get(operator.len()..)?));
            }
        }
    }
    None
}

fn unescape(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some(next @ ('\\' | ',' | '=')) => out.push(next),
                _ => return None,
            },
            ',' | '=' => return None,
            _ => out.push(c),
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn matches(selector: &str, labels: Value) -> bool {
        Selector::parse(selector).unwrap().matches(&labels)
    }

    #[test]
    fn text_selectors() {
        let labels = json!({"app": "web", "tier": "front", "n": "5"});
        for yes in [
            "",
            "app=web",
            "app==web",
            "app in (web, api),tier",
            "!x",
            "x!=y",
            "tier notin (back)",
            "n>4",
            "n<6",
            "app",
        ] {
            assert!(matches(yes, labels.clone()), "{yes}");
        }
        for no in ["app=api", "app!=web", "!app", "x", "app notin (web)", "n>5", "x>1", "app in (api)", "app="] {
            assert!(!matches(no, labels.clone()), "{no}");
        }
        for bad in ["a b", "=", ",a", "a,", "a in web", "a in (b", "a=b=c", "a>x", "a in ()x", "-a=b", "a=b c", "a=%"] {
            assert!(Selector::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn object_selectors() {
        let selector = Selector::from_object(&json!({"matchLabels": {"a": "b"},
            "matchExpressions": [{"key": "c", "operator": "In", "values": ["d", "e"]}, {"key": "f", "operator": "DoesNotExist"}]}));
        let selector = selector.unwrap();
        assert!(selector.matches(&json!({"a": "b", "c": "e"})));
        assert!(!selector.matches(&json!({"a": "b", "c": "e", "f": ""})));
        assert_eq!(selector.to_string(), "a=b,c in (d,e),!f");
        assert!(!Selector::from_object(&Value::Null).unwrap().matches(&json!({})));
        assert!(Selector::from_object(&json!({})).unwrap().matches(&Value::Null));
        let bad = json!({"matchExpressions": [{"key": "a", "operator": "Is"}]});
        assert_eq!(
            Selector::from_object(&bad).unwrap_err().to_string(),
            "\"Is\" is not a valid label selector operator"
        );
    }

    #[test]
    fn field_selectors() {
        let pod = json!({"metadata": {"name": "a"}, "spec": {"nodeName": "n,1"}, "status": {"phase": "Running"}});
        for yes in
            ["", "metadata.name=a", "spec.nodeName=n\\,1,status.phase!=Failed", "spec.x=", "spec.unschedulable=false"]
        {
            assert!(FieldSelector::parse(yes).unwrap().matches(&pod), "{yes}");
        }
        for no in ["metadata.name!=a", "status.phase=Failed"] {
            assert!(!FieldSelector::parse(no).unwrap().matches(&pod), "{no}");
        }
        assert!(FieldSelector::parse("metadata.name").is_err());
        assert!(FieldSelector::parse("a=b\\c").is_err());
        let selector = FieldSelector::parse("spec.foo=x").unwrap();
        assert_eq!(selector.check(&["metadata.name"]).unwrap_err().to_string(), "field label not supported: spec.foo");
    }

    proptest! {
        #[test]
        fn printed_selectors_parse_to_the_same(
            terms in prop::collection::btree_map("[a-z]{1,6}", (0u8..6, prop::collection::btree_set("[a-z0-9]{1,4}", 1..3)), 0..5)
        ) {
            let requirements = terms.into_iter().map(|(key, (operator, values))| {
                let (operator, values) = match operator {
                    0 => (Operator::In, values),
                    1 => (Operator::NotIn, values),
                    2 => (Operator::Exists, BTreeSet::new()),
                    3 => (Operator::DoesNotExist, BTreeSet::new()),
                    4 => (Operator::GreaterThan, BTreeSet::from(["3".to_owned()])),
                    _ => (Operator::LessThan, BTreeSet::from(["-3".to_owned()])),
                };
                Requirement { key, operator, values }
            }).collect();
            let selector = Selector { requirements, nothing: false };
            // A negative bound is not a label value, so Kubernetes refuses it in text as well.
            if !selector.requirements.iter().any(|r| r.values.contains("-3")) {
                prop_assert_eq!(Selector::parse(&selector.to_string()).unwrap(), selector);
            }
        }
        #[test]
        fn foreign_text_never_panics(text in "\\PC{0,60}") {
            let _ = Selector::parse(&text);
            let _ = FieldSelector::parse(&text);
        }
    }
}
