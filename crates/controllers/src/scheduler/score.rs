//! Which of the possible nodes is best. Each view gives every node 0 to 100; the weights are Kubernetes' own.

use super::affinity::{node_matches, preferred};
use super::cluster::{Cluster, Node};
use super::demand::Demand;
use crate::objects::{int, list};
use api::object::Meta;
use serde_json::Value;

/// What a pod that asks for nothing is counted as.
const DEFAULT_CPU: i64 = 100;
const DEFAULT_MEMORY: i64 = 200 << 20;

pub(super) fn best<'a>(cluster: &Cluster, demand: &Demand<'_>, possible: &[&'a Node]) -> Option<&'a Node> {
    if let [only] = possible {
        return Some(only);
    }
    let mut totals = vec![0_i64; possible.len()];
    let mut view = |weight: i64, scores: Vec<i64>| {
        totals.iter_mut().zip(scores).for_each(|(total, score)| *total += weight * score);
    };
    view(1, possible.iter().map(|node| least_allocated(demand, node)).collect());
    view(1, possible.iter().map(|node| balanced(demand, node)).collect());
    view(2, spanned(possible.iter().map(|node| wished_node(demand, node)).collect()));
    view(3, spanned(possible.iter().map(|node| -unwelcome(demand, node)).collect()));
    view(2, spanned(wished_pods(cluster, demand, possible)));
    view(2, spanned(possible.iter().map(|node| -siblings(demand, node)).collect()));
    let most = totals.iter().max()?;
    let ties: Vec<&&Node> = possible.iter().zip(&totals).filter(|(_, total)| *total == most).map(|(n, _)| n).collect();
    let pick = usize::try_from(api::names::random_u64() % (ties.len().max(1) as u64)).unwrap_or(0);
    ties.get(pick).map(|node| **node)
}

/// Brings any numbers to 0..=100, the largest at 100; all equal says nothing.
fn spanned(raw: Vec<i64>) -> Vec<i64> {
    let (least, most) = (raw.iter().min().copied().unwrap_or(0), raw.iter().max().copied().unwrap_or(0));
    let span = most - least;
    raw.iter().map(|value| if span == 0 { 0 } else { (value - least) * 100 / span }).collect()
}

/// Used share of cpu and memory with the pod on it, in thousandths.
fn used(demand: &Demand<'_>, node: &Node) -> [i64; 2] {
    let share = |name: &str, default: i64| {
        let own = Some(demand.requests.get(name)).filter(|own| *own > 0).unwrap_or(default);
        let all = node.allocatable.get(name);
        if all == 0 { 1000 } else { (node.requested.get(name).saturating_add(own)).saturating_mul(1000) / all }
    };
    [share("cpu", DEFAULT_CPU).clamp(0, 1000), share("memory", DEFAULT_MEMORY).clamp(0, 1000)]
}

fn least_allocated(demand: &Demand<'_>, node: &Node) -> i64 {
    let [cpu, memory] = used(demand, node);
    (2000 - cpu - memory) / 20
}

fn balanced(demand: &Demand<'_>, node: &Node) -> i64 {
    let [cpu, memory] = used(demand, node);
    (1000 - (cpu - memory).abs() / 2) / 10
}

fn wished_node(demand: &Demand<'_>, node: &Node) -> i64 {
    let wishes = list(demand.pod, "/spec/affinity/nodeAffinity/preferredDuringSchedulingIgnoredDuringExecution");
    let met = wishes.iter().filter(|wish| node_matches(wish.get("preference").unwrap_or(&Value::Null), node));
    met.map(|wish| int(wish, "/weight").unwrap_or(0)).sum()
}

/// Taints that would rather not have the pod.
fn unwelcome(demand: &Demand<'_>, node: &Node) -> i64 {
    let Some(object) = node.object.as_deref() else { return 0 };
    let taints = list(object, "/spec/taints").iter();
    let count = taints.filter(|t| t.str_at("/effect") == "PreferNoSchedule" && !demand.tolerates(t)).count();
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn wished_pods(cluster: &Cluster, demand: &Demand<'_>, possible: &[&Node]) -> Vec<i64> {
    let (near, apart) = (preferred(demand.pod, "podAffinity"), preferred(demand.pod, "podAntiAffinity"));
    let sum = |terms: &[super::affinity::Term], node: &Node| -> i64 {
        let each = terms
            .iter()
            .map(|term| term.weight.saturating_mul(i64::try_from(term.count_near(cluster, node)).unwrap_or(i64::MAX)));
        each.fold(0, i64::saturating_add)
    };
    possible.iter().map(|node| sum(&near, node).saturating_sub(sum(&apart, node))).collect()
}

/// Pods of the same controller.
fn siblings(demand: &Demand<'_>, node: &Node) -> i64 {
    let Some(owner) = demand.pod.controller_ref() else { return 0 };
    let uid = owner.str_at("/uid");
    let count = node.pods.values().filter(|placed| crate::objects::is_controlled_by(&placed.pod, uid)).count();
    i64::try_from(count).unwrap_or(i64::MAX)
}
