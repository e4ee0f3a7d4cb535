//! Time as the API writes it: RFC 3339 in whole seconds (`Time`) or with microseconds (`MicroTime`), always UTC, and
//! ages as `kubectl` prints them.

use clock::days;
pub use clock::rfc3339;

/// Unix seconds now.
pub fn now() -> i64 {
    now_micros().div_euclid(1_000_000)
}

/// Unix microseconds now.
pub fn now_micros() -> i64 {
    clock::now_nanos().div_euclid(1000)
}

/// Now as `2006-01-02T15:04:05Z`.
pub fn now_rfc3339() -> String {
    rfc3339(now())
}

/// Unix microseconds as `2006-01-02T15:04:05.000000Z`.
pub fn micro_time(micros: i64) -> String {
    let mut text = rfc3339(micros.div_euclid(1_000_000));
    text.pop();
    format!("{text}.{:06}Z", micros.rem_euclid(1_000_000))
}

/// Unix seconds of an RFC 3339 time; fractions are cut off.
pub fn parse(text: &str) -> Option<i64> {
    parse_micros(text).map(|micros| micros.div_euclid(1_000_000))
}

/// Unix microseconds of an RFC 3339 time (years 0 to 9999, any offset, any number of fraction digits).
pub fn parse_micros(text: &str) -> Option<i64> {
    let bytes = text.as_bytes();
    let number = |from: usize, to: usize| -> Option<i64> {
        let part = bytes.get(from..to)?;
        part.iter().try_fold(0i64, |sum, b| b.is_ascii_digit().then(|| sum * 10 + i64::from(b - b'0')))
    };
    let is = |at: usize, any: &[u8]| bytes.get(at).is_some_and(|b| any.contains(b));
    if !(is(4, b"-") && is(7, b"-") && is(10, b"Tt ") && is(13, b":") && is(16, b":")) {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    if !(1..=12).contains(&month) || !(1..=days_in(year, month)).contains(&day) {
        return None;
    }
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let mut at = 19;
    let mut micros = 0;
    if is(at, b".,") {
        let start = at + 1;
        at = start;
        while bytes.get(at).is_some_and(u8::is_ascii_digit) {
            at += 1;
        }
        if at == start {
            return None;
        }
        for index in start..start + 6 {
            micros = micros * 10 + if index < at { number(index, index + 1)? } else { 0 };
        }
    }
    let offset = match bytes.get(at..)? {
        b"Z" | b"z" => 0,
        zone if zone.len() == 6 && (zone[0] == b'+' || zone[0] == b'-') && zone[3] == b':' => {
            let (hours, minutes) = (number(at + 1, at + 3)?, number(at + 4, at + 6)?);
            if hours > 23 || minutes > 59 {
                return None;
            }
            let seconds = hours * 3600 + minutes * 60;
            if zone[0] == b'-' { -seconds } else { seconds }
        }
        _ => return None,
    };
    let seconds = days(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second - offset;
    Some(seconds * 1_000_000 + micros)
}

/// How long ago `text` was, as `kubectl` prints ages; `<unknown>` when it is absent or not a time.
pub fn age(text: &str, now: i64) -> String {
    match parse(text) {
        Some(then) => human_duration(now - then),
        None => "<unknown>".to_owned(),
    }
}

/// Seconds of a duration such as `90s`, `5m`, `1h30m` or `0`.
pub fn duration(text: &str) -> Option<i64> {
    if text == "0" {
        return Some(0);
    }
    let (mut total, mut number) = (0i64, String::new());
    for c in text.chars() {
        if c.is_ascii_digit() {
            number.push(c);
            continue;
        }
        let unit = match c {
            'h' => 3600,
            'm' => 60,
            's' => 1,
            _ => return None,
        };
        total = total.checked_add(std::mem::take(&mut number).parse::<i64>().ok()?.checked_mul(unit)?)?;
    }
    (number.is_empty() && !text.is_empty()).then_some(total)
}

/// A duration as `kubectl` prints it: `45s`, `3m20s`, `2h5m`, `3d4h`, `2y100d`.
pub fn human_duration(seconds: i64) -> String {
    let with_rest = |whole: i64, unit: &str, rest: i64, small: &str| {
        if rest == 0 { format!("{whole}{unit}") } else { format!("{whole}{unit}{rest}{small}") }
    };
    if seconds < -1 {
        return "<invalid>".to_owned();
    }
    if seconds < 0 {
        return "0s".to_owned();
    }
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    let days = hours / 24;
    if seconds < 120 {
        format!("{seconds}s")
    } else if minutes < 10 {
        with_rest(minutes, "m", seconds % 60, "s")
    } else if minutes < 180 {
        format!("{minutes}m")
    } else if hours < 8 {
        with_rest(hours, "h", minutes % 60, "m")
    } else if hours < 48 {
        format!("{hours}h")
    } else if days < 8 {
        with_rest(days, "d", hours % 24, "h")
    } else if days < 365 * 2 {
        format!("{days}d")
    } else if days < 365 * 8 {
        with_rest(days / 365, "y", days % 365, "d")
    } else {
        format!("{}y", days / 365)
    }
}

fn leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_in(year: i64, month: i64) -> i64 {
    match month {
        2 => 28 + i64::from(leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Seconds of an ISO 8601 duration of days and smaller units, such as `PT1M30.5S`; parts of a second count as a whole one.
pub fn iso_seconds(text: &str) -> Option<i64> {
    let (days, rest) = match text.strip_prefix('P')?.split_once('T') {
        Some((days, rest)) if !rest.is_empty() => (days, rest),
        Some(_) => return None,
        None => (text.strip_prefix('P')?, ""),
    };
    let mut sum = 0i64;
    let mut units = vec![('D', 86_400, days)];
    units.extend([('H', 3600, rest), ('M', 60, ""), ('S', 1, "")]);
    let mut left = "";
    let mut seen = false;
    for (unit, seconds, begins) in units {
        if unit == 'D' || unit == 'H' {
            if !left.is_empty() {
                return None;
            }
            left = begins;
        }
        let Some((number, after)) = left.split_once(unit) else { continue };
        let (whole, part) = number.split_once('.').filter(|_| unit == 'S').unwrap_or((number, "0"));
        let digits = |text: &str| (1..=9).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
        if !digits(whole) || !digits(part) {
            return None;
        }
        let up = i64::from(part.bytes().any(|b| b != b'0'));
        sum = sum.checked_add(whole.parse::<i64>().ok()?.checked_mul(seconds)?)?.checked_add(up)?;
        (left, seen) = (after, true);
    }
    (seen && left.is_empty()).then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_are_read() {
        let cases = [("0", Some(0)), ("90s", Some(90)), ("1h30m", Some(5400)), ("", None), ("5", None), ("m", None)];
        for (text, seconds) in cases {
            assert_eq!(duration(text), seconds, "{text}");
        }
        assert_eq!(duration("99999999999999999999h"), None);
    }

    #[test]
    fn known_times() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(parse("2023-11-14T22:13:20Z"), Some(1_700_000_000));
        assert_eq!(parse("2023-11-14T23:13:20.5+01:00"), Some(1_700_000_000));
        assert_eq!(micro_time(1_700_000_000_000_042), "2023-11-14T22:13:20.000042Z");
        for bad in ["", "2023-02-29T00:00:00Z", "2023-11-14", "2023-11-14T22:13:20", "2023-11-14T22:13:20.Z"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn ages_as_kubectl_prints_them() {
        let cases = [
            (-5, "<invalid>"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (125, "2m5s"),
            (601, "10m"),
            (3 * 3600 + 60, "3h1m"),
            (9 * 3600, "9h"),
            (49 * 3600, "2d1h"),
            (9 * 86400, "9d"),
            (800 * 86400, "2y70d"),
            (4000 * 86400, "10y"),
        ];
        for (seconds, text) in cases {
            assert_eq!(human_duration(seconds), text);
        }
    }

    proptest! {
        #[test]
        fn round_trip(micros in 0i64..253_402_300_799_000_000) {
            prop_assert_eq!(parse_micros(&micro_time(micros)), Some(micros));
            prop_assert_eq!(parse(&rfc3339(micros / 1_000_000)), Some(micros / 1_000_000));
        }
        #[test]
        fn foreign_text_never_panics(text in ".{0,40}") {
            let _ = parse_micros(&text);
        }
    }

    #[test]
    fn durations_are_iso_8601() {
        for (text, seconds) in [
            ("PT1S", Some(1)),
            ("PT0.2S", Some(1)),
            ("PT1M30.5S", Some(91)),
            ("P1DT2H", Some(93_600)),
            ("P2D", Some(172_800)),
            ("PT", None),
            ("P", None),
            ("1S", None),
            ("PT1", None),
            ("PT1S2M", None),
            ("PT1.5M", None),
            ("PT-1S", None),
            ("PTxS", None),
            ("P1D2H", None),
        ] {
            assert_eq!(super::iso_seconds(text), seconds, "{text}");
        }
    }
}
