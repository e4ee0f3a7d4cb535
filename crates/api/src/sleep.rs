//! Sleep of what nobody asks anything of: how a Knative revision sleeps when it is at zero, and that a pod does.

use serde::{Deserialize, Serialize};

/// Annotation of a revision's template: `stopped`, `frozen` or `snapshot`.
pub const SLEEP: &str = "functions.atoll.dev/sleep";
/// Annotation of a pod that sleeps or is to, `frozen` or `snapshot`; and of a revision's Deployment, whose pod it is.
/// Without it a pod is awake.
pub const ASLEEP: &str = "atoll.dev/asleep";

/// How a pod sleeps that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sleep {
    /// In memory: its processes, or its machine's processors, stand still.
    Frozen,
    /// A machine on disk: its memory is written to a file and given back.
    Snapshot,
}

impl Sleep {
    pub fn word(self) -> &'static str {
        match self {
            Sleep::Frozen => "frozen",
            Sleep::Snapshot => "snapshot",
        }
    }

    /// Of a pod, or what is wrong with the annotation's value.
    pub fn of_pod(text: &str) -> Result<Sleep, String> {
        match text {
            "frozen" => Ok(Sleep::Frozen),
            "snapshot" => Ok(Sleep::Snapshot),
            _ => Err("must be frozen or snapshot; without the annotation the pod is awake".into()),
        }
    }

    /// Of a revision with this RuntimeClass; `None`: its pods go and come anew. A machine's memory is kept unless the
    /// annotation says otherwise, since booting it again takes longer.
    pub fn of_revision(text: Option<&str>, class: &str) -> Result<Option<Sleep>, String> {
        match (text, class) {
            (None, "microvm") => Ok(Some(Sleep::Snapshot)),
            (None | Some("stopped"), _) => Ok(None),
            (Some("frozen" | "snapshot"), "wasm") => Err("a wasm function has nothing to wake; leave it out".into()),
            (Some("frozen"), _) => Ok(Some(Sleep::Frozen)),
            (Some("snapshot"), "microvm") => Ok(Some(Sleep::Snapshot)),
            (Some("snapshot"), _) => {
                Err("only a machine can: runtimeClassName: microvm; else stopped or frozen".into())
            }
            _ => Err("must be stopped, frozen or snapshot".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_a_revision_sleeps() {
        let of = |text, class| Sleep::of_revision(text, class).ok();
        assert_eq!([of(None, ""), of(None, "wasm"), of(Some("stopped"), "microvm")], [Some(None); 3]);
        assert_eq!(of(None, "microvm"), Some(Some(Sleep::Snapshot)));
        assert_eq!([of(Some("frozen"), ""), of(Some("frozen"), "microvm")], [Some(Some(Sleep::Frozen)); 2]);
        assert_eq!([of(Some("snapshot"), ""), of(Some("frozen"), "wasm"), of(Some(""), "")], [None; 3]);
        for how in [Sleep::Frozen, Sleep::Snapshot] {
            assert_eq!(Sleep::of_pod(how.word()), Ok(how));
        }
    }
}
