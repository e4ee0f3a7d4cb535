//! The arithmetic of rollouts: how many pods may be there, how many must be, how a change of size is shared out.

use crate::objects::{fnv32a, int};
use api::object::{Meta, Object};
use serde_json::Value;

/// What a Deployment asks for, in pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    pub replicas: i64,
    /// Pods above `replicas` during a rollout.
    pub surge: i64,
    /// Pods below `replicas` during a rollout.
    pub unavailable: i64,
}

impl Size {
    pub fn of(deployment: &Object) -> Size {
        let replicas = int(deployment, "/spec/replicas").unwrap_or(1).max(0);
        if deployment.str_at("/spec/strategy/type") == "Recreate" {
            return Size { replicas, surge: 0, unavailable: 0 };
        }
        let quarter = Value::from("25%");
        let limit = |pointer: &str, up: bool| {
            let value = deployment.pointer(pointer).filter(|value| !value.is_null()).unwrap_or(&quarter);
            api::intstr::scaled(Some(value), replicas, up).unwrap_or(0).max(0)
        };
        let surge = limit("/spec/strategy/rollingUpdate/maxSurge", true);
        let mut unavailable = limit("/spec/strategy/rollingUpdate/maxUnavailable", false);
        if surge == 0 && unavailable == 0 {
            // Both can come out as zero by rounding; then nothing could ever move.
            unavailable = 1;
        }
        Size { replicas, surge, unavailable: unavailable.min(replicas) }
    }

    pub fn most(self) -> i64 {
        self.replicas + self.surge
    }

    pub fn least_available(self) -> i64 {
        self.replicas - self.unavailable
    }

    /// To how many pods the newest set may go, with `all` pods in all sets and `own` in it.
    pub fn grown(self, recreate: bool, all: i64, own: i64) -> i64 {
        if recreate {
            return self.replicas;
        }
        if all >= self.most() { own } else { own + (self.most() - all).min(self.replicas - own) }
    }
}

/// One set in a change of size.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    pub replicas: i64,
    /// `replicas + surge` when the set was sized last.
    pub most_before: i64,
}

/// New sizes when a Deployment in the middle of a rollout is scaled: every set changes in proportion; what rounding
/// leaves goes to the first. `sets` come in the order in which they are served.
pub(super) fn shared_out(size: Size, sets: &[Share]) -> Vec<i64> {
    let allowed = if size.replicas > 0 { size.most() } else { 0 };
    let change = allowed - sets.iter().map(|set| set.replicas).sum::<i64>();
    let mut done = 0;
    let mut sizes: Vec<i64> = sets
        .iter()
        .map(|set| {
            let part = part(size, *set, change, done);
            done += part;
            set.replicas + part
        })
        .collect();
    if change != 0
        && let Some(first) = sizes.first_mut()
    {
        *first = (*first + change - done).max(0);
    }
    sizes
}

fn part(size: Size, set: Share, change: i64, done: i64) -> i64 {
    if set.replicas == 0 || change == 0 || change == done {
        return 0;
    }
    let fair = if size.replicas == 0 {
        -set.replicas
    } else if set.most_before <= 0 {
        0
    } else {
        rounded(set.replicas.saturating_mul(size.most()), set.most_before) - set.replicas
    };
    if change > 0 { fair.min(change - done) } else { fair.max(change - done) }
}

/// Halves away from zero; both are positive here.
fn rounded(value: i64, by: i64) -> i64 {
    value.saturating_mul(2).saturating_add(by) / by.saturating_mul(2)
}

/// A template as it is compared: without the label that tells its own ReplicaSet's pods.
pub(super) fn without_hash(template: &Value) -> Value {
    let mut template = template.clone();
    if let Some(labels) = template.pointer_mut("/metadata/labels").and_then(Value::as_object_mut) {
        labels.remove(super::HASH);
    }
    template
}

/// The name suffix and label of a template: FNV-32a of its canonical JSON and of how often that collided.
pub(super) fn hash(template: &Value, collisions: Option<i64>) -> String {
    let json = without_hash(template).to_string();
    let extra = collisions.map(i64::to_le_bytes).into_iter().flatten();
    api::names::safe_encode(&fnv32a(json.bytes().chain(extra)).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn size(replicas: i64, surge: Value, unavailable: Value) -> Size {
        Size::of(&json!({"spec": {"replicas": replicas, "strategy": {"type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}}}}))
    }

    #[test]
    fn limits_round_as_kubernetes_rounds() {
        let of = |replicas, surge: Value, unavailable: Value| {
            let size = size(replicas, surge, unavailable);
            (size.surge, size.unavailable)
        };
        assert_eq!(of(10, json!("25%"), json!("25%")), (3, 2));
        assert_eq!(of(3, json!("25%"), json!("25%")), (1, 0));
        assert_eq!(of(1, json!(0), json!("25%")), (0, 1), "one must be able to go");
        assert_eq!(of(2, json!(0), json!(5)), (0, 2));
        assert_eq!(of(4, json!("100%"), json!(0)), (4, 0));
        let recreate = Size::of(&json!({"spec": {"replicas": 4, "strategy": {"type": "Recreate"}}}));
        assert_eq!((recreate.surge, recreate.unavailable), (0, 0));
        assert_eq!(Size::of(&json!({"spec": {}})), Size { replicas: 1, surge: 1, unavailable: 0 });
    }

    #[test]
    fn shares() {
        let before = |replicas, most_before| Share { replicas, most_before };
        let to = |replicas| size(replicas, json!(3), json!(2));
        // 10 + 3 pods in two versions, scaled to 15 (the example of the Kubernetes documentation).
        assert_eq!(shared_out(to(15), &[before(8, 13), before(5, 13)]), [11, 7]);
        assert_eq!(shared_out(to(5), &[before(8, 13), before(5, 13)]), [5, 3]);
        assert_eq!(shared_out(to(0), &[before(8, 13), before(5, 13)]), [0, 0]);
    }

    #[test]
    fn hashes() {
        let template = json!({"metadata": {"labels": {"a": "b"}}, "spec": {"x": 1}});
        let labelled = json!({"metadata": {"labels": {"a": "b", "pod-template-hash": "q"}}, "spec": {"x": 1}});
        assert_eq!(hash(&template, None), hash(&labelled, None));
        assert_ne!(hash(&template, None), hash(&template, Some(1)));
        assert_ne!(hash(&template, None), hash(&json!({"spec": {"x": 1}}), None));
        assert!(api::names::dns_label(&hash(&template, None)).is_empty());
    }

    proptest! {
        #[test]
        fn sharing_out_hits_the_total(
            replicas in 0..60i64, surge in 0..20i64,
            sets in prop::collection::vec((0..40i64, 0..80i64), 1..6),
        ) {
            let size = Size { replicas, surge, unavailable: 1 };
            let shares: Vec<_> = sets.iter().map(|(r, m)| Share { replicas: *r, most_before: *m }).collect();
            let sizes = shared_out(size, &shares);
            let wanted = if replicas > 0 { size.most() } else { 0 };
            prop_assert!(sizes.iter().all(|n| *n >= 0), "{sizes:?}");
            prop_assert!(sizes.iter().sum::<i64>() >= wanted.min(sets.iter().map(|s| s.0).sum()));
            if sets.iter().map(|s| s.0).sum::<i64>() <= wanted {
                prop_assert_eq!(sizes.iter().sum::<i64>(), wanted);
            }
        }
        #[test]
        fn growth_stays_in_bounds(replicas in 0..50i64, surge in 0..20i64, all in 0..80i64, own in 0..50i64) {
            let own = own.min(replicas).min(all);
            let size = Size { replicas, surge, unavailable: 1 };
            let grown = size.grown(false, all, own);
            prop_assert!(grown >= own && grown <= replicas);
            prop_assert!(grown == own || all - own + grown <= size.most());
        }
    }
}
