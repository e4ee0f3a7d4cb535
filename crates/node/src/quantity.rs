//! Resource quantities (`100m`, `1.5Gi`, `2e3`), as
//! <https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/> defines them.

const NANO: i128 = 1_000_000_000;

/// Value in billionths; `None` if it is not a quantity or too large to matter.
fn nanos(text: &str) -> Option<i128> {
    let text = text.trim();
    if text.len() > 64 {
        return None;
    }
    let end = text.find(|c: char| !c.is_ascii_digit() && !matches!(c, '.' | '+' | '-')).unwrap_or(text.len());
    let (mut number, mut suffix) = text.split_at(end);
    let negative = number.starts_with('-');
    number = number.trim_start_matches(['+', '-']);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') || number.contains(['+', '-']) {
        return None;
    }
    let mut value: i128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    value = value.checked_mul(NANO)?;
    let digits: String = fraction.chars().take(9).collect();
    if !digits.is_empty() {
        value = value.checked_add(format!("{digits:0<9}").parse::<i128>().ok()?)?;
    }
    let mut exponent = 0i32;
    if let Some(rest) = suffix.strip_prefix(['e', 'E'])
        && !rest.is_empty()
    {
        exponent = rest.parse().ok()?;
        suffix = "";
    }
    let (multiply, divide): (i128, i128) = match suffix {
        "" => (1, 1),
        "n" => (1, NANO),
        "u" => (1, 1_000_000),
        "m" => (1, 1000),
        "k" => (1000, 1),
        "M" => (1_000_000, 1),
        "G" => (NANO, 1),
        "T" => (NANO * 1000, 1),
        "P" => (NANO * 1_000_000, 1),
        "E" => (NANO * NANO, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        _ => return None,
    };
    value = value.checked_mul(multiply)? / divide;
    if !(-18..=18).contains(&exponent) {
        return None;
    }
    let power = 10i128.pow(exponent.unsigned_abs());
    value = if exponent >= 0 { value.checked_mul(power)? } else { value / power };
    Some(if negative { -value } else { value })
}

fn ceil(value: i128, unit: i128) -> Option<u64> {
    if value < 0 {
        return None;
    }
    u64::try_from((value + unit - 1) / unit).ok()
}

/// Thousandths, rounded up; for cores.
pub fn milli(text: &str) -> Option<u64> {
    ceil(nanos(text)?, NANO / 1000)
}

/// Whole units, rounded up; for bytes.
pub fn value(text: &str) -> Option<u64> {
    ceil(nanos(text)?, NANO)
}

/// `quantity / divisor`, rounded up, as the downward API prints it.
pub fn divided(quantity: &str, divisor: &str) -> Option<String> {
    let (q, d) = (nanos(quantity)?, nanos(divisor)?);
    if d <= 0 || q < 0 {
        return None;
    }
    Some(((q + d - 1) / d).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_kubernetes_reads() {
        for (text, want) in [
            ("0", 0),
            ("1", 1),
            ("100m", 1),
            ("1.5Gi", 1_610_612_736),
            ("2e3", 2000),
            ("1E", 1_000_000_000_000_000_000),
            ("128Mi", 134_217_728),
            ("1k", 1000),
            (".5", 1),
        ] {
            assert_eq!(value(text), Some(want), "{text}");
        }
        for (text, want) in [("100m", 100), ("1", 1000), ("0.5", 500), ("1.0001", 1001), ("100u", 1)] {
            assert_eq!(milli(text), Some(want), "{text}");
        }
        for text in ["", "a", "1x", "1.2.3", "--1", "1Kii", "-1", "9999999999999999999999999999999999999999E"] {
            assert_eq!(value(text), None, "{text}");
        }
        assert_eq!(divided("250m", "1").as_deref(), Some("1"));
        assert_eq!(divided("250m", "1m").as_deref(), Some("250"));
        assert_eq!(divided("64Mi", "1Mi").as_deref(), Some("64"));
    }
}
