//! Resource quantities: `100m`, `1.5Gi`, `2e3`. Exact fixed-point numbers, never floating point.
//!
//! Syntax and canonical form: <https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/>.

use serde_json::Value;
use std::cmp::Ordering;
use std::fmt;
use std::ops::{Add, Sub};

const NANO: i128 = 1_000_000_000;
/// No quantity is greater in magnitude than this many units.
const LIMIT: i128 = i64::MAX as i128 * NANO;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    #[error("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")]
    Syntax,
    #[error("unable to parse quantity's suffix")]
    Suffix,
}

/// How a quantity is written again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// `k`, `M`, `m` ...
    #[default]
    Decimal,
    /// `Ki`, `Mi` ...
    Binary,
    /// `e3`, `e6` ...
    Exponent,
}

/// A number in billionths of a unit. Compares by value, whatever the format.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quantity {
    nanos: i128,
    format: Format,
}

impl Quantity {
    pub const ZERO: Quantity = Quantity { nanos: 0, format: Format::Decimal };

    /// Whole units.
    pub fn units(value: i64) -> Self {
        Quantity { nanos: i128::from(value) * NANO, format: Format::Decimal }
    }
    /// Thousandths (CPU).
    pub fn millis(value: i64) -> Self {
        Quantity { nanos: i128::from(value) * (NANO / 1000), format: Format::Decimal }
    }
    /// Bytes, written with binary suffixes.
    pub fn bytes(value: i64) -> Self {
        Quantity { nanos: i128::from(value) * NANO, format: Format::Binary }
    }

    /// Values out of range are capped, digits below a billionth rounded away from zero.
    pub fn parse(text: &str) -> Result<Self, QuantityError> {
        let (negative, rest) = match text.as_bytes().first() {
            Some(b'-') => (true, text.get(1..).unwrap_or("")),
            Some(b'+') => (false, text.get(1..).unwrap_or("")),
            _ => (false, text),
        };
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, suffix) = rest.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
            return Err(QuantityError::Syntax);
        }
        let (scale, format) = suffix_scale(suffix)?;
        let mut value = Decimal::default();
        for digit in whole.bytes() {
            value.push(digit - b'0');
        }
        for digit in fraction.bytes() {
            value.push(digit - b'0');
            value.exponent -= 1;
        }
        let nanos = match scale {
            Scale::Ten(exponent) => value.times_ten(exponent + 9),
            Scale::Two(bits) => {
                value.mantissa = value.mantissa.saturating_mul(1 << bits);
                value.times_ten(9)
            }
        }
        .min(LIMIT);
        Ok(Quantity { nanos: if negative { -nanos } else { nanos }, format })
    }

    /// From its JSON form: text or a number.
    pub fn from_value(value: &Value) -> Result<Self, QuantityError> {
        match value {
            Value::String(text) => Quantity::parse(text),
            Value::Number(number) => Quantity::parse(&number.to_string()),
            _ => Err(QuantityError::Syntax),
        }
    }

    /// Units, rounded up.
    pub fn value(self) -> i64 {
        self.rounded_up(NANO)
    }
    /// Thousandths, rounded up.
    pub fn milli_value(self) -> i64 {
        self.rounded_up(NANO / 1000)
    }
    pub fn is_zero(self) -> bool {
        self.nanos == 0
    }
    pub fn is_negative(self) -> bool {
        self.nanos < 0
    }
    /// Whether it is a whole number of units.
    pub fn is_whole(self) -> bool {
        self.nanos % NANO == 0
    }

    fn rounded_up(self, step: i128) -> i64 {
        let up = self.nanos.div_euclid(step) + i128::from(self.nanos.rem_euclid(step) != 0);
        i64::try_from(up).unwrap_or(if up < 0 { i64::MIN } else { i64::MAX })
    }
}

/// A mantissa and a power of ten, filled digit by digit.
#[derive(Default)]
struct Decimal {
    mantissa: i128,
    exponent: i32,
    /// Digits were dropped: round up.
    inexact: bool,
}

impl Decimal {
    fn push(&mut self, digit: u8) {
        if self.mantissa > 10i128.pow(27) {
            // Enough digits for every value in range; the rest only matters for rounding.
            self.inexact |= digit != 0;
            self.exponent += 1;
        } else {
            self.mantissa = self.mantissa * 10 + i128::from(digit);
        }
    }

    /// `mantissa * 10^(exponent + power)`, rounded up, capped.
    fn times_ten(&self, power: i32) -> i128 {
        let power = self.exponent.saturating_add(power);
        if power >= 0 {
            let factor = 10i128.checked_pow(power.unsigned_abs());
            return match factor {
                Some(factor) => self.mantissa.saturating_mul(factor),
                None if self.mantissa == 0 => 0,
                None => LIMIT,
            };
        }
        match 10i128.checked_pow(power.unsigned_abs()) {
            Some(divisor) => {
                let up = self.mantissa % divisor != 0 || self.inexact;
                self.mantissa / divisor + i128::from(up)
            }
            None => i128::from(self.mantissa != 0),
        }
    }
}

enum Scale {
    Ten(i32),
    Two(u32),
}

const DECIMAL: [(&str, i32); 10] =
    [("E", 18), ("P", 15), ("T", 12), ("G", 9), ("M", 6), ("k", 3), ("", 0), ("m", -3), ("u", -6), ("n", -9)];
const BINARY: [(&str, u32); 6] = [("Ei", 60), ("Pi", 50), ("Ti", 40), ("Gi", 30), ("Mi", 20), ("Ki", 10)];

fn suffix_scale(suffix: &str) -> Result<(Scale, Format), QuantityError> {
    if let Some((_, exponent)) = DECIMAL.iter().find(|(name, _)| *name == suffix) {
        return Ok((Scale::Ten(*exponent), Format::Decimal));
    }
    if let Some((_, bits)) = BINARY.iter().find(|(name, _)| *name == suffix) {
        return Ok((Scale::Two(*bits), Format::Binary));
    }
    match suffix.strip_prefix(['e', 'E']) {
        Some(digits) if digits.len() <= 8 => {
            let exponent: i32 = digits.parse().map_err(|_| QuantityError::Suffix)?;
            Ok((Scale::Ten(exponent), Format::Exponent))
        }
        Some(_) => Err(QuantityError::Suffix),
        None if suffix.bytes().all(|b| b"eEinumkKMGTP+-0123456789".contains(&b)) => Err(QuantityError::Suffix),
        None => Err(QuantityError::Syntax),
    }
}

/// The canonical form: no fraction, the largest suffix that fits.
impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nanos == 0 {
            return f.write_str("0");
        }
        if self.format == Format::Binary && self.nanos % NANO == 0 {
            let units = self.nanos / NANO;
            for (suffix, bits) in BINARY {
                if units % (1i128 << bits) == 0 {
                    return write!(f, "{}{suffix}", units >> bits);
                }
            }
            return write!(f, "{units}");
        }
        for (suffix, exponent) in DECIMAL {
            let step = 10i128.pow((exponent + 9).unsigned_abs());
            if self.nanos % step == 0 {
                let mantissa = self.nanos / step;
                return match (self.format, exponent) {
                    (Format::Exponent, 0) | (Format::Decimal | Format::Binary, _) => write!(f, "{mantissa}{suffix}"),
                    (Format::Exponent, _) => write!(f, "{mantissa}e{exponent}"),
                };
            }
        }
        Ok(())
    }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}
impl Eq for Quantity {}
impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nanos.cmp(&other.nanos)
    }
}
impl Add for Quantity {
    type Output = Quantity;
    /// Keeps the left format unless it is zero.
    fn add(self, other: Quantity) -> Quantity {
        let format = if self.is_zero() { other.format } else { self.format };
        Quantity { nanos: (self.nanos + other.nanos).clamp(-LIMIT, LIMIT), format }
    }
}
impl Sub for Quantity {
    type Output = Quantity;
    fn sub(self, other: Quantity) -> Quantity {
        let format = if self.is_zero() { other.format } else { self.format };
        Quantity { nanos: (self.nanos - other.nanos).clamp(-LIMIT, LIMIT), format }
    }
}
impl std::iter::Sum for Quantity {
    fn sum<I: Iterator<Item = Quantity>>(items: I) -> Quantity {
        items.fold(Quantity::ZERO, Add::add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn canonical(text: &str) -> String {
        Quantity::parse(text).map(|q| q.to_string()).unwrap_or_else(|e| e.to_string())
    }

    #[test]
    fn canonical_forms() {
        let cases = [
            ("0", "0"),
            ("100m", "100m"),
            ("0.1", "100m"),
            ("1.5", "1500m"),
            ("1000m", "1"),
            ("1500", "1500"),
            ("1000", "1k"),
            ("1.5Gi", "1536Mi"),
            ("1024Ki", "1Mi"),
            ("1000Ki", "1000Ki"),
            ("0.5Ki", "512"),
            ("2e3", "2e3"),
            ("12E2", "1200"),
            ("1E", "1E"),
            ("-5", "-5"),
            ("+3k", "3k"),
            (".5", "500m"),
            ("5.", "5"),
            ("0.0000000001", "1n"),
            ("123456789012345678901234567890", "9223372036854775807"),
            ("1e99", "9223372036854775807"),
            ("0e99", "0"),
            ("100Ei", "9223372036854775807"),
        ];
        for (text, expected) in cases {
            assert_eq!(canonical(text), expected, "{text}");
        }
        for bad in ["", "a", "1.2.3", "1x", "1ki", "1Kim", "--1", ".", "1e", "1e1.5", "1 Gi", "Gi"] {
            assert!(Quantity::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn values_round_up() {
        assert_eq!(Quantity::parse("1500m").unwrap().value(), 2);
        assert_eq!(Quantity::parse("0.1m").unwrap().milli_value(), 1);
        assert_eq!(Quantity::parse("64Mi").unwrap().value(), 64 << 20);
        assert_eq!(Quantity::bytes(64 << 20).to_string(), "64Mi");
        assert!(Quantity::parse("1Gi").unwrap() > Quantity::parse("1G").unwrap());
    }

    proptest! {
        #[test]
        fn printed_form_parses_to_the_same(value in any::<i64>(), suffix in "(|n|u|m|k|M|Ki|Mi|Gi|e3|e-3)") {
            let one = Quantity::parse(&format!("{value}{suffix}")).unwrap();
            let two = Quantity::parse(&one.to_string()).unwrap();
            prop_assert_eq!(one, two);
            prop_assert_eq!(one.to_string(), two.to_string());
        }
        #[test]
        fn order_is_that_of_numbers(a in -1_000_000i64..1_000_000, b in -1_000_000i64..1_000_000) {
            let (x, y) = (Quantity::millis(a), Quantity::millis(b));
            prop_assert_eq!(x.cmp(&y), a.cmp(&b));
            prop_assert_eq!((x + y).milli_value(), a + b);
            prop_assert_eq!((x - y).milli_value(), a - b);
        }
        #[test]
        fn foreign_text_never_panics(text in "[-+0-9.eEinumkKMGTP]{0,24}") {
            let _ = Quantity::parse(&text);
        }
    }
}
