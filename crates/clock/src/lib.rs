//! Calendar dates and RFC 3339 in UTC: what every room writes into logs, images and objects. Parsing, ages and the
//! API's own forms are in `api::time`.

#![forbid(unsafe_code)]

use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

/// Length of what [`stamp`] writes for the years 0 to 9999.
pub const STAMP: usize = 30;

/// Unix nanoseconds now.
pub fn now_nanos() -> i64 {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => -i64::try_from(before.duration().as_nanos()).unwrap_or(i64::MAX),
    }
}

/// Unix seconds as `2006-01-02T15:04:05Z`.
pub fn rfc3339(seconds: i64) -> String {
    let (year, month, day) = civil(seconds.div_euclid(86_400));
    let rest = seconds.rem_euclid(86_400);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

/// Unix nanoseconds as `2006-01-02T15:04:05.000000000Z`, as container logs have them; without allocating, for a log
/// stamps every line.
pub fn stamp(nanos: i64) -> [u8; STAMP] {
    let (seconds, nanos) = (nanos.div_euclid(1_000_000_000), nanos.rem_euclid(1_000_000_000));
    let (year, month, day) = civil(seconds.div_euclid(86_400));
    let rest = seconds.rem_euclid(86_400);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    let mut out = [0; STAMP];
    let _ = write!(out.as_mut_slice(), "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z");
    out
}

/// Days from 1970-01-01 of a proleptic Gregorian date (years counted from March, in eras of 400: H. Hinnant,
/// "chrono-compatible low-level date algorithms").
pub fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// The inverse of [`days`]: year, month, day.
pub fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_times() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(rfc3339(-1), "1969-12-31T23:59:59Z");
        let text = |nanos| String::from_utf8(stamp(nanos).to_vec()).expect("text");
        assert_eq!(text(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(text(1_795_359_845_123_456_789), "2026-11-22T15:04:05.123456789Z");
        assert_eq!(text(951_782_400_000_000_001), "2000-02-29T00:00:00.000000001Z");
    }

    proptest! {
        #[test]
        fn days_and_dates_are_inverse(day in -1_000_000i64..4_000_000) {
            let (year, month, date) = civil(day);
            prop_assert!((1..=12).contains(&month) && (1..=31).contains(&date));
            prop_assert_eq!(days(year, month, date), day);
            prop_assert!(civil(day + 1) > (year, month, date));
        }
    }
}
