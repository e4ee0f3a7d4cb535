//! How many pods a revision should have: Knative's autoscaler over requests at the gateway. Pure; time is a parameter.
//!
//! Concurrency is averaged over a stable window; a tenth of it, the panic window, answers to a rush.

use api::object::{Meta, Object};
use std::collections::VecDeque;

/// Seconds.
const WINDOW: i64 = 60;
const PANIC_SHARE: f64 = 0.1;
const PANIC_THRESHOLD: f64 = 2.0;
const TARGET: f64 = 100.0;
const UTILIZATION: f64 = 0.7;
const MAX_UP_RATE: f64 = 1000.0;
const MAX_DOWN_RATE: f64 = 2.0;
const MOST: i64 = 1000;

/// What a revision's annotations ask for.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rules {
    pub min: i64,
    /// 0: as many as it takes.
    pub max: i64,
    pub initial: i64,
    /// Requests at once, or requests a second, that one pod is to have.
    target: f64,
    by_rate: bool,
    window: i64,
    down_delay: i64,
    retention: i64,
}

impl Rules {
    pub fn of(revision: &Object) -> Rules {
        let text = |name: &str| {
            let camel = format!("autoscaling.knative.dev/{}", camel(name));
            revision.annotation(&format!("autoscaling.knative.dev/{name}")).or_else(|| revision.annotation(&camel))
        };
        let number = |name: &str| text(name).and_then(|t| t.parse::<f64>().ok()).filter(|n| n.is_finite() && *n >= 0.0);
        let whole = |name: &str, default: i64| number(name).map_or(default, |n| (n as i64).clamp(0, MOST));
        let seconds = |name: &str| text(name).and_then(duration);
        let by_rate = text("metric") == Some("rps");
        let limit = crate::objects::int(revision, "/spec/containerConcurrency").filter(|n| *n > 0);
        let share = number("target-utilization-percentage").map_or(UTILIZATION, |p| (p / 100.0).clamp(0.01, 1.0));
        let target = match (number("target"), limit) {
            (Some(target), _) if by_rate => target * share,
            (Some(target), Some(limit)) => target.min(limit as f64 * share),
            (Some(target), None) => target * share,
            (None, Some(limit)) => limit as f64 * share,
            (None, None) if by_rate => 200.0 * share,
            (None, None) => TARGET * share,
        };
        let (min, max) = (whole("min-scale", 1), whole("max-scale", 0));
        Rules {
            min: if max > 0 { min.min(max) } else { min },
            max,
            initial: whole("initial-scale", 1),
            target: target.max(0.01),
            by_rate,
            window: seconds("window").unwrap_or(WINDOW).clamp(6, 3600),
            down_delay: seconds("scale-down-delay").unwrap_or(0).clamp(0, 3600),
            retention: seconds("scale-to-zero-pod-retention-period").unwrap_or(0).clamp(0, 3600),
        }
    }

    pub fn within(&self, pods: i64) -> i64 {
        let most = if self.max > 0 { self.max } else { MOST };
        pods.clamp(self.min, most.max(self.min))
    }
}

/// `min-scale` was `minScale` once.
fn camel(name: &str) -> String {
    let mut parts = name.split('-');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |mut all, part| {
        let mut letters = part.chars();
        all.extend(letters.next().map(|c| c.to_ascii_uppercase()));
        all.push_str(letters.as_str());
        all
    })
}

/// Go's notation, as far as whole seconds go: `90s`, `5m`, `1h30m`, `0s`.
fn duration(text: &str) -> Option<i64> {
    let (mut total, mut digits) = (0f64, String::new());
    for c in text.chars() {
        let unit = match c {
            'h' => 3600.0,
            'm' => 60.0,
            's' => 1.0,
            _ if c.is_ascii_digit() || c == '.' => {
                digits.push(c);
                continue;
            }
            _ => return None,
        };
        total += digits.parse::<f64>().ok()? * unit;
        digits.clear();
    }
    (digits.is_empty() && !text.is_empty()).then_some(total.ceil() as i64)
}

/// What was seen in one second.
#[derive(Clone, Copy, Debug, Default)]
struct Second {
    at: i64,
    concurrency: f64,
    requests: f64,
}

/// What a revision's requests have been.
#[derive(Debug, Default)]
pub(super) struct History {
    seconds: VecDeque<Second>,
    /// What was wanted of late, for the delay before scaling down.
    wanted: VecDeque<(i64, i64)>,
    /// Panic began, with the most pods wanted since.
    panic: Option<(i64, i64)>,
    last_request: Option<i64>,
}

impl History {
    /// Requests under way on average in the second that ends at `now`, and requests that came in it.
    pub fn record(&mut self, rules: &Rules, now: i64, concurrency: f64, requests: u64) {
        if concurrency > 0.0 || requests > 0 {
            self.last_request = Some(now);
        }
        self.seconds.push_back(Second { at: now, concurrency, requests: requests as f64 });
        while self.seconds.front().is_some_and(|second| second.at <= now - rules.window) {
            self.seconds.pop_front();
        }
    }

    fn average(&self, rules: &Rules, now: i64, window: i64) -> f64 {
        let seen = self.seconds.iter().filter(|second| second.at > now - window);
        let sum: f64 = seen.map(|s| if rules.by_rate { s.requests } else { s.concurrency }).sum();
        // A revision younger than the window was not idle before.
        let first = self.seconds.front().map_or(now, |second| second.at);
        sum / ((now - first + 1).clamp(1, window)) as f64
    }

    /// Pods wanted, `ready` being there now.
    pub fn decide(&mut self, rules: &Rules, now: i64, ready: i64) -> i64 {
        let panic_window = ((rules.window as f64 * PANIC_SHARE) as i64).max(1);
        let pods = |average: f64| (average / rules.target).ceil() as i64;
        let stable = pods(self.average(rules, now, rules.window));
        let rush = pods(self.average(rules, now, panic_window));
        let (now_there, there) = (ready.max(0), ready.max(1) as f64);
        if rush as f64 / there >= PANIC_THRESHOLD {
            let most = self.panic.map_or(now_there, |(_, most)| most);
            self.panic = Some((now, most.max(rush)));
        } else if self.panic.is_some_and(|(since, _)| now - since >= rules.window) {
            self.panic = None;
        }
        let mut wanted = match self.panic {
            // While in panic it only grows.
            Some((since, most)) => {
                let most = most.max(rush).max(now_there);
                self.panic = Some((since, most));
                most
            }
            None => stable,
        };
        wanted = wanted.min((there * MAX_UP_RATE) as i64).max((there / MAX_DOWN_RATE).floor() as i64);
        if stable == 0 && self.panic.is_none() && ready <= 1 {
            wanted = 0;
        }
        if wanted == 0 && self.last_request.is_some_and(|last| now - last < rules.window.max(rules.retention)) {
            wanted = 1;
        }
        self.wanted.push_back((now, wanted));
        while self.wanted.front().is_some_and(|(at, _)| *at < now - rules.down_delay) {
            self.wanted.pop_front();
        }
        rules.within(self.wanted.iter().map(|(_, wanted)| *wanted).max().unwrap_or(wanted))
    }

    /// Nothing known yet: it counts as used just now.
    pub fn begin(now: i64) -> History {
        History { last_request: Some(now), ..History::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn rules(annotations: serde_json::Value, concurrency: i64) -> Rules {
        Rules::of(&json!({"metadata": {"annotations": annotations}, "spec": {"containerConcurrency": concurrency}}))
    }

    fn run(rules: &Rules, load: impl Fn(i64) -> f64, until: i64, ready: i64) -> i64 {
        let mut history = History::begin(0);
        let mut pods = ready;
        for now in 1..=until {
            history.record(rules, now, load(now), u64::from(load(now) > 0.0));
            pods = history.decide(rules, now, pods);
        }
        pods
    }

    #[test]
    fn annotations_in_both_spellings() {
        let new = rules(
            json!({"autoscaling.knative.dev/min-scale": "2", "autoscaling.knative.dev/max-scale": "5",
            "autoscaling.knative.dev/window": "1m30s", "autoscaling.knative.dev/scale-down-delay": "15m"}),
            0,
        );
        assert_eq!((new.min, new.max, new.window, new.down_delay), (2, 5, 90, 900));
        let old = rules(json!({"autoscaling.knative.dev/minScale": "2", "autoscaling.knative.dev/maxScale": "1"}), 10);
        assert_eq!((old.min, old.max, old.target), (1, 1, 7.0));
        assert_eq!(rules(json!({}), 0).min, 1, "to zero only who asks for it");
        assert_eq!(duration("1h"), Some(3600));
        assert_eq!([duration("5"), duration(""), duration("x"), duration("1d")], [None; 4]);
    }

    #[test]
    fn pods_follow_concurrency() {
        let rules =
            rules(json!({"autoscaling.knative.dev/target": "10", "autoscaling.knative.dev/max-scale": "20"}), 0);
        assert_eq!(run(&rules, |_| 35.0, 120, 1), 5, "35 of 7 each");
        assert_eq!(run(&rules, |_| 1e6, 30, 1), 20, "never more than the most");
        assert_eq!(run(&rules, |now| if now < 60 { 35.0 } else { 0.0 }, 600, 1), 1, "never less than the least");
    }

    #[test]
    fn a_rush_is_met_at_once_and_not_forgotten_at_once() {
        let rules = rules(json!({"autoscaling.knative.dev/target": "10"}), 0);
        let rush = |now: i64| if (60..66).contains(&now) { 70.0 } else { 1.0 };
        assert!(run(&rules, rush, 66, 1) >= 9);
        assert!(run(&rules, rush, 100, 1) >= 9, "panic lasts a window");
        assert_eq!(run(&rules, rush, 300, 1), 1);
    }

    #[test]
    fn to_zero_after_a_window_without_requests() {
        let zero = |more: serde_json::Value| {
            let mut all = json!({"autoscaling.knative.dev/min-scale": "0"});
            all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            rules(all, 0)
        };
        let once = |now: i64| if now == 10 { 1.0 } else { 0.0 };
        let plain = zero(json!({}));
        assert_eq!((run(&plain, once, 69, 1), run(&plain, once, 70, 1)), (1, 0));
        let quick = zero(json!({"autoscaling.knative.dev/window": "6s"}));
        assert_eq!((run(&quick, once, 15, 1), run(&quick, once, 16, 1)), (1, 0));
        let late = zero(json!({"autoscaling.knative.dev/window": "6s",
            "autoscaling.knative.dev/scale-to-zero-pod-retention-period": "30s"}));
        assert_eq!((run(&late, once, 39, 1), run(&late, once, 40, 1)), (1, 0));
        let delayed =
            zero(json!({"autoscaling.knative.dev/window": "6s", "autoscaling.knative.dev/scale-down-delay": "20s"}));
        assert_eq!((run(&delayed, once, 30, 1), run(&delayed, once, 40, 1)), (1, 0));
    }

    proptest! {
        #[test]
        fn always_within_its_bounds(min in 0i64..5, max in 0i64..9, loads in proptest::collection::vec(0f64..1e4, 1..200)) {
            let rules = rules(json!({"autoscaling.knative.dev/min-scale": min.to_string(),
                "autoscaling.knative.dev/max-scale": max.to_string()}), 1);
            let mut history = History::begin(0);
            let mut pods = 1;
            for (now, load) in loads.iter().enumerate() {
                history.record(&rules, now as i64, *load, 1);
                pods = history.decide(&rules, now as i64, pods);
                prop_assert!(pods >= rules.min && (max == 0 || pods <= max));
            }
        }
    }
}
