//! When a schedule comes due: five fields of cron(5), in UTC.
//! <https://kubernetes.io/docs/concepts/workloads/controllers/cron-jobs/#schedule-syntax>

const MINUTE: i64 = 60;
const DAY: i64 = 86_400;
/// A 29th of February that is a given day of the week comes within so many days.
const HORIZON: i64 = 40 * 366;
const MONTHS: [&str; 12] = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const DAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];
const MACROS: [(&str, &str); 7] = [
    ("@hourly", "0 * * * *"),
    ("@daily", "0 0 * * *"),
    ("@midnight", "0 0 * * *"),
    ("@weekly", "0 0 * * 0"),
    ("@monthly", "0 0 1 * *"),
    ("@yearly", "0 0 1 1 *"),
    ("@annually", "0 0 1 1 *"),
];

/// Each field as a set of bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    weekdays: u64,
    /// Both kinds of days are restricted: either will do.
    either_day: bool,
}

impl Schedule {
    /// The error says which field, and what it may be.
    pub fn parse(text: &str) -> Result<Schedule, String> {
        let text = text.trim();
        let expanded = MACROS.iter().find(|(name, _)| *name == text).map_or(text, |(_, meaning)| meaning);
        let fields: Vec<&str> = expanded.split_ascii_whitespace().collect();
        let [minutes, hours, days, months, weekdays] = fields.as_slice() else {
            return Err(format!(
                "{} fields, where five are needed: minute hour day month weekday, or @daily",
                fields.len()
            ));
        };
        let mut week = field("weekday", weekdays, 0, 7, &DAYS, 0)?;
        // Sunday is 0, and 7.
        week |= week >> 7 & 1;
        let schedule = Schedule {
            minutes: field("minute", minutes, 0, 59, &[], 0)?,
            hours: field("hour", hours, 0, 23, &[], 0)?,
            days: field("day", days, 1, 31, &[], 0)?,
            months: field("month", months, 1, 12, &MONTHS, 1)?,
            weekdays: week & 0x7f,
            either_day: !days.starts_with('*') && !weekdays.starts_with('*'),
        };
        match schedule.next(0) {
            Some(_) => Ok(schedule),
            None => Err("no such day ever comes".into()),
        }
    }

    /// The first time after `after`, unix seconds.
    pub fn next(&self, after: i64) -> Option<i64> {
        let from = after.div_euclid(MINUTE) * MINUTE + MINUTE;
        let first = from.div_euclid(DAY);
        for day in first..first + HORIZON {
            if !self.has_day(day) {
                continue;
            }
            let begin = if day == first { from.rem_euclid(DAY) / MINUTE } else { 0 };
            let fits = |minute: &i64| has(self.hours, minute / 60) && has(self.minutes, minute % 60);
            if let Some(minute) = (begin..DAY / MINUTE).find(fits) {
                return Some(day * DAY + minute * MINUTE);
            }
        }
        None
    }

    /// The last time after `after` that is not after `now`.
    pub fn last(&self, after: i64, now: i64) -> Option<i64> {
        let latest = |from: i64| {
            let mut found = self.next(from).filter(|time| *time <= now)?;
            while let Some(later) = self.next(found).filter(|time| *time <= now) {
                found = later;
            }
            Some(found)
        };
        // Seldom more than a day's worth is looked through.
        latest(after.max(now - DAY)).or_else(|| latest(after))
    }

    fn has_day(&self, day: i64) -> bool {
        let (_, month, of_month) = clock::civil(day);
        // 1970-01-01 was a Thursday.
        let weekday = has(self.weekdays, (day + 4).rem_euclid(7));
        let date = has(self.days, of_month);
        has(self.months, month) && if self.either_day { weekday || date } else { weekday && date }
    }
}

fn has(set: u64, bit: i64) -> bool {
    u32::try_from(bit).is_ok_and(|bit| set.checked_shr(bit).unwrap_or(0) & 1 == 1)
}

/// `*`, `a`, `a-b`, with `/n`, several joined by commas.
fn field(what: &str, text: &str, low: u32, high: u32, names: &[&str], first: u32) -> Result<u64, String> {
    let bad = |part: &str| {
        format!("{what} {part:?}: it may be *, a number from {low} to {high}, a-b, */n, or several, with commas")
    };
    let number = |part: &str, whole: &str| -> Result<u32, String> {
        let name = names.iter().position(|name| name.eq_ignore_ascii_case(part)).and_then(|at| u32::try_from(at).ok());
        let digits = part.bytes().all(|c| c.is_ascii_digit());
        let value = name.map(|at| at + first).or_else(|| part.parse().ok().filter(|_| digits));
        value.filter(|value| (low..=high).contains(value)).ok_or_else(|| bad(whole))
    };
    let mut set = 0;
    for part in text.split(',') {
        let (range, step) = part.split_once('/').map_or((part, None), |(range, step)| (range, Some(step)));
        let step: u32 = match step {
            None => 1,
            Some(text) => text.parse().ok().filter(|step| (1..=high).contains(step)).ok_or_else(|| bad(part))?,
        };
        let (from, to) = match range.split_once('-') {
            _ if range == "*" => (low, high),
            Some((from, to)) => (number(from, part)?, number(to, part)?),
            // `5/10` goes on to the end.
            None => (number(range, part)?, if part.contains('/') { high } else { number(range, part)? }),
        };
        if from > to {
            return Err(bad(part));
        }
        (from..=to).step_by(usize::try_from(step).unwrap_or(1)).for_each(|bit| set |= 1 << bit);
    }
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn next(schedule: &str, after: &str) -> String {
        let time = crate::time::parse(after).unwrap();
        crate::time::rfc3339(Schedule::parse(schedule).unwrap().next(time).unwrap())
    }

    #[test]
    fn times_come_as_cron_says() {
        for (schedule, after, due) in [
            ("* * * * *", "2026-01-01T00:00:59Z", "2026-01-01T00:01:00Z"),
            ("*/15 * * * *", "2026-01-01T00:45:00Z", "2026-01-01T01:00:00Z"),
            ("5/20 3 * * *", "2026-01-01T03:05:00Z", "2026-01-01T03:25:00Z"),
            ("0 9-17/4 * * mon-fri", "2026-01-02T17:00:00Z", "2026-01-05T09:00:00Z"),
            ("30 4 1,15 * 5", "2026-01-03T00:00:00Z", "2026-01-09T04:30:00Z"),
            ("0 0 29 FEB *", "2026-03-01T00:00:00Z", "2028-02-29T00:00:00Z"),
            ("0 0 * * 7", "2026-01-01T00:00:00Z", "2026-01-04T00:00:00Z"),
            ("@monthly", "2026-01-31T23:59:00Z", "2026-02-01T00:00:00Z"),
            ("0 12 * * *", "1969-12-31T11:00:00Z", "1969-12-31T12:00:00Z"),
        ] {
            assert_eq!(next(schedule, after), due, "{schedule}");
        }
    }

    #[test]
    fn the_latest_that_was_missed_is_found() {
        let time = |text: &str| crate::time::parse(text).unwrap();
        let hourly = Schedule::parse("@hourly").unwrap();
        assert_eq!(hourly.last(0, time("2026-01-01T10:30:00Z")), Some(time("2026-01-01T10:00:00Z")));
        assert_eq!(hourly.last(time("2026-01-01T10:00:00Z"), time("2026-01-01T10:30:00Z")), None);
        let yearly = Schedule::parse("@yearly").unwrap();
        assert_eq!(
            yearly.last(time("2024-06-01T00:00:00Z"), time("2026-06-01T00:00:00Z")),
            Some(time("2026-01-01T00:00:00Z"))
        );
    }

    #[test]
    fn what_is_no_schedule_is_told() {
        for (bad, why) in [
            ("", "0 fields"),
            ("* * * *", "4 fields"),
            ("60 * * * *", "minute \"60\""),
            ("* 1-x * * *", "hour"),
            ("* * 0 * *", "day"),
            ("* * * 5-3 *", "month"),
            ("* * * * 8", "weekday"),
            ("*/0 * * * *", "minute"),
            ("+5 * * * *", "minute"),
            ("0 0 30 2 *", "no such day"),
            ("@often", "1 fields"),
        ] {
            let told = Schedule::parse(bad).unwrap_err();
            assert!(told.contains(why), "{bad}: {told}");
        }
    }

    proptest! {
        #[test]
        fn the_next_is_later_and_nothing_lies_between(minute in 0i64..60, hour in 0i64..24, after in 0i64..4_000_000_000) {
            let schedule = Schedule::parse(&format!("{minute} {hour} * * *")).unwrap();
            let next = schedule.next(after).unwrap();
            prop_assert!(next > after && next - after <= DAY);
            prop_assert_eq!(next.rem_euclid(DAY), hour * 3600 + minute * 60);
        }

        #[test]
        fn no_text_harms(text in "[ -~]{0,40}") {
            let _ = Schedule::parse(&text);
        }
    }
}
