//! Which containers of a pod have to run now, and whether the pod has come to its end: the restart rules, pure.
//! <https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/>, <https://kubernetes.io/docs/concepts/workloads/pods/sidecar-containers/>

use api::k8s::api::core::v1::{Container, PodSpec};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Runs to its end before the next one starts.
    Init,
    /// An init container with `restartPolicy: Always`: started in order, then runs beside the main ones.
    Sidecar,
    Main,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RestartPolicy {
    Always,
    OnFailure,
    Never,
}

impl RestartPolicy {
    pub fn of(spec: &PodSpec) -> Self {
        match spec.restart_policy.as_deref() {
            Some("Never") => RestartPolicy::Never,
            Some("OnFailure") => RestartPolicy::OnFailure,
            _ => RestartPolicy::Always,
        }
    }
}

/// All containers in the order they start: init containers, then main ones.
pub(crate) fn containers(spec: &PodSpec) -> impl Iterator<Item = (Role, &Container)> {
    let init = spec.init_containers.iter().flatten().map(|c| {
        let role = if c.restart_policy.as_deref() == Some("Always") { Role::Sidecar } else { Role::Init };
        (role, c)
    });
    init.chain(spec.containers.iter().map(|c| (Role::Main, c)))
}

/// How far one container is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Not yet run in this sandbox.
    New,
    /// `up`: its startup probe and postStart hook have succeeded.
    Running {
        up: bool,
    },
    Ended {
        code: i32,
    },
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Containers that should run and do not (back-off still applies), by index.
    pub start: Vec<usize>,
    /// No main container will run again: `true` if all succeeded. What still runs is to be stopped.
    pub finished: Option<bool>,
    pub initialized: bool,
}

/// `began`: a main container has started in this sandbox, so init containers are not looked at again.
pub(crate) fn plan(containers: &[(Role, Progress)], policy: RestartPolicy, began: bool) -> Plan {
    let mut plan = Plan::default();
    let mains = || containers.iter().enumerate().filter(|(_, c)| c.0 == Role::Main);
    let mut blocked = false;
    for (index, (role, progress)) in containers.iter().enumerate() {
        match (role, progress) {
            (Role::Main, _) => break,
            (Role::Sidecar, Progress::Running { up }) => blocked |= !up && !began,
            (Role::Sidecar, Progress::New | Progress::Ended { .. }) => {
                plan.start.push(index);
                blocked |= !began;
            }
            (Role::Init, _) if began => {}
            (Role::Init, Progress::Ended { code: 0 }) => {}
            (Role::Init, Progress::Running { .. }) => blocked = true,
            (Role::Init, Progress::New) => {
                plan.start.push(index);
                blocked = true;
            }
            (Role::Init, Progress::Ended { .. }) => {
                if policy == RestartPolicy::Never {
                    return Plan { start: Vec::new(), finished: Some(false), initialized: false };
                }
                plan.start.push(index);
                blocked = true;
            }
        }
        if blocked {
            return plan;
        }
    }
    plan.initialized = true;
    let (mut open, mut failed) = (false, false);
    for (index, (_, progress)) in mains() {
        match progress {
            Progress::New => plan.start.push(index),
            Progress::Running { .. } => open = true,
            Progress::Ended { code } => {
                let again = match policy {
                    RestartPolicy::Always => true,
                    RestartPolicy::OnFailure => *code != 0,
                    RestartPolicy::Never => false,
                };
                failed |= *code != 0;
                if again {
                    plan.start.push(index);
                }
            }
        }
    }
    let mains_to_start = plan.start.iter().any(|i| containers.get(*i).is_some_and(|c| c.0 == Role::Main));
    if !open && !mains_to_start {
        plan.start.clear();
        plan.finished = Some(!failed);
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::Progress::{Ended, New, Running};
    use super::RestartPolicy::{Always, Never, OnFailure};
    use super::Role::{Init, Main, Sidecar};
    use super::*;
    use proptest::prelude::*;

    const UP: Progress = Running { up: true };
    const DOWN: Progress = Running { up: false };

    #[test]
    fn order_and_restarts() {
        type Row<'a> = (&'a str, Vec<(Role, Progress)>, RestartPolicy, Vec<usize>, Option<bool>);
        let table: Vec<Row<'_>> = vec![
            ("all mains at once", vec![(Main, New), (Main, New)], Always, vec![0, 1], None),
            ("first init first", vec![(Init, New), (Init, New), (Main, New)], Always, vec![0], None),
            ("init running", vec![(Init, DOWN), (Main, New)], Always, vec![], None),
            ("next init", vec![(Init, Ended { code: 0 }), (Init, New), (Main, New)], Always, vec![1], None),
            ("init fails, Never", vec![(Init, Ended { code: 1 }), (Main, New)], Never, vec![], Some(false)),
            ("init fails, Always", vec![(Init, Ended { code: 1 }), (Main, New)], Always, vec![0], None),
            ("init fails, OnFailure", vec![(Init, Ended { code: 1 }), (Main, New)], OnFailure, vec![0], None),
            ("sidecar must be up", vec![(Sidecar, DOWN), (Init, New), (Main, New)], Always, vec![], None),
            ("sidecar up", vec![(Sidecar, UP), (Main, New)], Always, vec![1], None),
            ("sidecar restarts", vec![(Sidecar, Ended { code: 0 }), (Main, UP)], Never, vec![0], None),
            ("sidecar alone ends", vec![(Sidecar, UP), (Main, Ended { code: 0 })], Never, vec![], Some(true)),
            ("init after main is done", vec![(Init, New), (Main, UP)], Always, vec![], None),
            ("main ends, Always", vec![(Main, Ended { code: 0 })], Always, vec![0], None),
            ("main ends well, OnFailure", vec![(Main, Ended { code: 0 })], OnFailure, vec![], Some(true)),
            ("main fails, OnFailure", vec![(Main, Ended { code: 3 })], OnFailure, vec![0], None),
            ("main fails, Never", vec![(Main, Ended { code: 3 })], Never, vec![], Some(false)),
            ("one of two still runs", vec![(Main, Ended { code: 3 }), (Main, UP)], Never, vec![], None),
        ];
        for (name, containers, policy, start, finished) in table {
            let began = containers.iter().any(|c| c.0 == Main && c.1 != New);
            let plan = plan(&containers, policy, began);
            assert_eq!((plan.start, plan.finished), (start, finished), "{name}");
        }
    }

    fn progress() -> impl Strategy<Value = Progress> {
        prop_oneof![Just(New), Just(UP), Just(DOWN), (0..3i32).prop_map(|code| Ended { code })]
    }

    proptest! {
        #[test]
        fn never_starts_what_runs_and_always_goes_on(
            inits in prop::collection::vec((prop_oneof![Just(Init), Just(Sidecar)], progress()), 0..4),
            mains in prop::collection::vec(progress(), 1..4),
            policy in prop_oneof![Just(Always), Just(OnFailure), Just(Never)],
        ) {
            let mut all = inits;
            all.extend(mains.into_iter().map(|p| (Main, p)));
            let began = all.iter().any(|c| c.0 == Main && c.1 != New);
            let plan = plan(&all, policy, began);
            for index in &plan.start {
                let runs = matches!(all[*index].1, Running { .. });
                prop_assert!(!runs);
            }
            let something_runs = all.iter().any(|c| matches!(c.1, Running { .. }));
            prop_assert!(plan.finished.is_some() || !plan.start.is_empty() || something_runs, "stuck: {all:?}");
            prop_assert!(plan.finished.is_none() || plan.start.is_empty());
            if policy == Always {
                prop_assert_eq!(plan.finished, None);
            }
        }
    }
}
