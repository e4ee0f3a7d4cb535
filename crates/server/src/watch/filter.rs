//! What a list or a watch is limited to, and what a change looks like through that.

use super::feed::{Change, Event};
use api::object::{Meta, Object, SharedObject};
use api::selector::{FieldSelector, Selector};
use api::status::{Status, StatusResult};

#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Empty = all.
    pub namespace: String,
    pub labels: Selector,
    pub fields: FieldSelector,
}

impl Filter {
    /// Parses the selectors of a request; `supported` are the fields the kind can be selected by, beside name and
    /// namespace.
    pub fn parse(namespace: &str, labels: &str, fields: &str, supported: &[&str]) -> StatusResult<Self> {
        let labels =
            Selector::parse(labels).map_err(|e| Status::bad_request(format!("unable to parse requirement: {e}")))?;
        let fields = FieldSelector::parse(fields).map_err(|e| Status::bad_request(e.to_string()))?;
        let mut allowed = vec!["metadata.name", "metadata.namespace"];
        allowed.extend_from_slice(supported);
        fields.check(&allowed).map_err(|e| Status::bad_request(e.to_string()))?;
        Ok(Filter { namespace: namespace.to_owned(), labels, fields })
    }

    /// Whether only things that never change about an object are looked at.
    fn is_fixed(&self) -> bool {
        self.labels.is_everything() && self.fields.terms.iter().all(|t| t.field.starts_with("metadata.name"))
    }

    pub fn matches(&self, object: &Object) -> bool {
        (self.namespace.is_empty() || object.namespace() == self.namespace)
            && (self.labels.is_everything() || self.labels.matches_object(object))
            && (self.fields.is_everything() || self.fields.matches(object))
    }

    /// What `event` is to a watcher behind this filter: an object that comes to match appears, one that no longer does
    /// goes away.
    pub fn see(&self, event: &Event) -> Option<(Change, SharedObject)> {
        if !self.namespace.is_empty() && event.object.namespace() != self.namespace {
            return None;
        }
        let now = self.matches(&event.object);
        if self.is_fixed() || event.change == Change::Deleted {
            return now.then(|| (event.change, event.object.clone()));
        }
        let before = event.previous().is_some_and(|previous| self.matches(&previous));
        match (before, now) {
            (false, true) => Some((Change::Added, event.object.clone())),
            (true, true) => Some((Change::Modified, event.object.clone())),
            (true, false) => {
                let mut last = event.previous()?.as_ref().clone();
                last.metadata_mut().insert("resourceVersion".into(), event.revision.to_string().into());
                Some((Change::Deleted, last.into()))
            }
            (false, false) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(phase: &str) -> Object {
        json!({"metadata": {"name": "a", "namespace": "n", "labels": {"phase": phase}}, "status": {"phase": phase}})
    }

    #[test]
    fn coming_and_going_through_a_selector() {
        let filter = Filter::parse("n", "phase=Running", "", &[]).unwrap();
        let event = |change, object: Object, previous: Option<Object>| {
            Event::new(7, change, object.into(), previous.map(|p| p.to_string().into()))
        };
        let seen = |event: &Event| filter.see(event).map(|(change, _)| change);
        assert_eq!(seen(&event(Change::Added, pod("Pending"), None)), None);
        assert_eq!(seen(&event(Change::Modified, pod("Running"), Some(pod("Pending")))), Some(Change::Added));
        assert_eq!(seen(&event(Change::Modified, pod("Running"), Some(pod("Running")))), Some(Change::Modified));
        let gone = event(Change::Modified, pod("Failed"), Some(pod("Running")));
        let (change, object) = filter.see(&gone).unwrap();
        assert_eq!((change, object.resource_version()), (Change::Deleted, "7"));
        assert_eq!(object.str_at("/status/phase"), "Running", "the last state that matched");
        assert_eq!(seen(&event(Change::Deleted, pod("Failed"), None)), None);
        let other = Filter::parse("m", "", "", &[]).unwrap();
        assert!(other.see(&gone).is_none());
    }

    #[test]
    fn fields_that_a_kind_cannot_be_selected_by_are_refused() {
        assert!(Filter::parse("", "", "status.phase=Running", &["status.phase"]).is_ok());
        let status = Filter::parse("", "", "spec.colour=red", &[]).unwrap_err();
        assert_eq!(status.code(), 400);
        assert!(status.message.contains("spec.colour"), "{}", status.message);
    }
}
