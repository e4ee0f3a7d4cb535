//! `IntOrString`: a number, or text that is a name or a percentage.

use serde_json::Value;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IntOrString {
    Int(i64),
    Text(String),
}

impl IntOrString {
    pub fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Number(number) => number.as_i64().map(IntOrString::Int),
            Value::String(text) => Some(IntOrString::Text(text.clone())),
            _ => None,
        }
    }

    /// `25` of `25%`.
    pub fn percent(&self) -> Option<i64> {
        match self {
            IntOrString::Int(_) => None,
            IntOrString::Text(text) => {
                let digits = text.strip_suffix('%')?;
                if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                    return None;
                }
                digits.parse().ok()
            }
        }
    }

    /// The number it means out of `total`: itself, or a percentage of it rounded up or down. `None` for other text.
    pub fn scaled(&self, total: i64, round_up: bool) -> Option<i64> {
        match self {
            IntOrString::Int(value) => Some(*value),
            IntOrString::Text(_) => {
                let product = i128::from(self.percent()?) * i128::from(total);
                i64::try_from((product + if round_up { 99 } else { 0 }).div_euclid(100)).ok()
            }
        }
    }
}

/// [`IntOrString::scaled`] of a JSON value; `None` when it is absent or neither number nor percentage.
pub fn scaled(value: Option<&Value>, total: i64, round_up: bool) -> Option<i64> {
    IntOrString::from_value(value?)?.scaled(total, round_up)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_and_percentages() {
        assert_eq!(scaled(Some(&json!("25%")), 10, true), Some(3));
        assert_eq!(scaled(Some(&json!("25%")), 10, false), Some(2));
        assert_eq!(scaled(Some(&json!(4)), 10, false), Some(4));
        assert_eq!(scaled(Some(&json!("%")), 10, false), None);
        assert_eq!(scaled(Some(&json!("-5%")), 10, false), None);
        assert_eq!(scaled(Some(&json!("http")), 10, false), None);
        assert_eq!(scaled(None, 10, false), None);
    }
}
