//! Spans of invocations on their way from hosts, which reach nobody, to the collector.

use super::{Inner, Known};
use spans::Origin;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

const FETCH: Duration = Duration::from_secs(1);
/// Answers that one host is asked for at a time: what it makes faster it drops itself.
const TURNS: usize = 64;

/// OpenTelemetry's names for what a function is.
pub(super) fn origin(sandbox: &super::SandboxSpec, account: &str) -> Arc<Origin> {
    let revision = sandbox.labels.get(super::REVISION).cloned().unwrap_or_default();
    let attributes = [
        ("service.name", account.to_owned()),
        ("service.namespace", sandbox.namespace.clone()),
        ("service.version", revision),
        ("service.instance.id", sandbox.uid.clone()),
        ("faas.name", account.to_owned()),
        ("k8s.namespace.name", sandbox.namespace.clone()),
        ("k8s.pod.name", sandbox.name.clone()),
    ];
    let known = attributes.into_iter().filter(|(_, value)| !value.is_empty());
    Arc::new(Origin { attributes: known.collect() })
}

/// For as long as there is a boundary.
pub(super) async fn fetch(inner: std::sync::Weak<Inner>) {
    loop {
        tokio::time::sleep(FETCH).await;
        let Some(inner) = inner.upgrade() else { return };
        let _ = tokio::task::spawn_blocking(move || {
            let namespaces: BTreeSet<String> = inner.known().into_values().map(|known| known.namespace).collect();
            namespaces.iter().for_each(|namespace| inner.fetch_spans(namespace));
        })
        .await;
    }
}

impl Inner {
    /// What a namespace's host has kept goes to the exporter.
    pub(super) fn fetch_spans(&self, namespace: &str) {
        let Some(exporter) = self.spans.get() else { return };
        let Ok(host) = self.hosts.connect(namespace) else { return };
        let known = self.known();
        for _ in 0..TURNS {
            // A host of an older version knows no spans.
            let Ok((spans, dropped)) = host.spans() else { return };
            exporter.lost(dropped);
            if spans.is_empty() {
                return;
            }
            for recorded in spans {
                match known.get(&recorded.function) {
                    Some(Known { origin, .. }) => exporter.offer(origin, recorded.span),
                    None => exporter.lost(1),
                }
            }
        }
    }
}
