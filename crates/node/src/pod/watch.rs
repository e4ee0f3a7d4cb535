//! Wakes a pod's worker when a ConfigMap or Secret that its volumes show changes.

use super::slot::Task;
use super::{Wake, Worker};
use crate::sources::{self, SourceRef};
use api::client::{Client, ListOptions};
use api::informer::Informer;
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::sync::mpsc;

pub(super) struct SourceWatch {
    names: BTreeSet<SourceRef>,
    _tasks: Vec<Task>,
}

impl Worker {
    /// Starts (or keeps) the watches. The first list of each counts as a change, so nothing is missed between set-up
    /// and now.
    pub(super) fn watch_sources(&mut self) {
        let names = sources::of_volumes(&self.pod);
        if self.source_watch.as_ref().is_some_and(|w| w.names == names) {
            return;
        }
        let namespace = self.pod.metadata.namespace.clone().unwrap_or_default();
        let follow = |name: &SourceRef| {
            Task::spawn(follow(self.shared.client.clone(), namespace.clone(), name.clone(), self.wake.clone()))
        };
        let tasks = names.iter().map(follow).collect();
        self.source_watch = Some(SourceWatch { names, _tasks: tasks });
    }
}

async fn follow(client: Arc<dyn Client>, namespace: String, (kind, name): SourceRef, wake: mpsc::Sender<Wake>) {
    let options = ListOptions { field_selector: format!("metadata.name={name}"), ..ListOptions::default() };
    let informer = Informer::spawn(client, kind.resource(), &namespace, options);
    let mut changes = informer.subscribe();
    loop {
        changes.next().await;
        while changes.try_next().is_some() {}
        if wake.send(Wake::Source).await.is_err() {
            return;
        }
    }
}
