//! Policies against real packets: generated policies compared with an independent model of what Kubernetes means, and the
//! recipes of its documentation as named cases. All in network namespaces that the test makes.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod generate;
mod lab;
mod model;
mod recipes;

use lab::{Lab, Probe};
use model::World;
use serde_json::Value;
use std::collections::BTreeSet;

/// What the model lets through.
fn expected(lab: &Lab, private: bool, policies: &[Value]) -> BTreeSet<Probe> {
    let world = World { private, namespaces: &lab.namespaces, policies };
    let allowed = |probe: &Probe| {
        let (from, to, protocol, port) = *probe;
        model::allowed(&world, &lab.pods[from], &lab.pods[to], protocol, port)
    };
    lab.all().into_iter().filter(allowed).collect()
}

fn compare(lab: &mut Lab, what: &str, private: bool, policies: &[Value]) -> BTreeSet<Probe> {
    lab.enforce(private, policies);
    let wanted = expected(lab, private, policies);
    let passed = lab.probe(&wanted);
    let name = |probe: &Probe| {
        let pod = |index: usize| format!("{}/{}", lab.pods[index].namespace, lab.pods[index].name);
        format!("{} -> {} {} {}", pod(probe.0), pod(probe.1), probe.2, probe.3)
    };
    let refused: Vec<String> = wanted.difference(&passed).map(name).collect();
    let leaked: Vec<String> = passed.difference(&wanted).map(name).collect();
    assert!(
        refused.is_empty() && leaked.is_empty(),
        "{what} (private: {private})\nwrongly refused: {refused:#?}\nwrongly let through: {leaked:#?}\npolicies: {}",
        serde_json::to_string_pretty(policies).unwrap()
    );
    passed
}

/// `ATOLL_POLICY_ROUNDS` and `ATOLL_POLICY_SEED` choose more of them, or one again.
#[test]
fn generated_policies_mean_what_the_model_says() {
    let Some(mut lab) = Lab::new() else { return };
    let number = |name: &str, default: u64| std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default);
    let (rounds, seed) = (number("ATOLL_POLICY_ROUNDS", 40), number("ATOLL_POLICY_SEED", 1));
    let (mut policies, mut tried) = (0, 0);
    for round in seed..seed + rounds {
        let generated = generate::policies(round);
        policies += generated.len();
        compare(&mut lab, &format!("seed {round}"), round % 2 == 0, &generated);
        tried += lab.all().len();
    }
    println!("{policies} policies in {rounds} rounds, {tried} pairs and ports");
}

#[test]
fn recipes_of_the_documentation() {
    let Some(mut lab) = Lab::new() else { return };
    for recipe in recipes::all().into_iter().chain(recipes::administrators()) {
        // In open networks, as Kubernetes has them, each says what must and must not pass.
        let passed = compare(&mut lab, recipe.name, false, &recipe.policies);
        for (from, to, port, wanted) in &recipe.checks {
            let probe = (lab.index(from), lab.index(to), "TCP", *port);
            assert_eq!(passed.contains(&probe), *wanted, "{}: {from} -> {to}:{port}", recipe.name);
        }
        // Where a namespace is private, by the model.
        compare(&mut lab, recipe.name, true, &recipe.policies);
    }
}
