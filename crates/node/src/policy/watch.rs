//! What `atoll network` shows of traffic: connections, counters, and the frames of one workload.

use super::inspect::{Inspector, protocol_name};
use api::inspect::{Answer, Connection, Frame};
use api::metrics::{Kind, Text};
use api::status::{Reason, Status, StatusResult};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::stream::{self, Stream};
use network::Router;
use network::policy::pod_address;
use network::watch::{Capture, Entry, ports};
use std::time::{Duration, UNIX_EPOCH};
use tokio::sync::mpsc;

/// How soon a capture sees that nobody listens any more.
const TURN: Duration = Duration::from_millis(200);
/// Frames on their way to a client; while it does not read, the kernel keeps some and drops the rest.
const FRAMES: usize = 256;

impl Inspector {
    /// Asks the router without holding the others up.
    pub(super) async fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Router) -> network::Result<T> + Send + 'static,
    ) -> Result<T, String> {
        let router = self.router.clone();
        match tokio::task::spawn_blocking(move || work(router.router())).await {
            Ok(result) => result.map_err(|error| crate::volumes::chain(&error)),
            Err(error) => Err(error.to_string()),
        }
    }

    pub(super) async fn connections(&self) -> StatusResult<Vec<Answer>> {
        let current = self.enforcer.current();
        let one = |entry: &Entry| {
            let (there, back) = (entry.counted[0], entry.counted[1]);
            Answer::Connection(Connection {
                from: self.name(&current, entry.original.source),
                from_port: entry.original.source_port,
                // Where it really goes: past a Service's address.
                to: self.name(&current, entry.reply.source),
                port: entry.reply.source_port,
                protocol: protocol_name(entry.original.protocol),
                packets: [there.0, back.0],
                bytes: [there.1, back.1],
            })
        };
        let all = self.ask(Router::connections).await.map_err(failed)?;
        Ok(all.iter().map(one).collect())
    }

    /// Counters of the network, a bounded number for each workload that is here.
    pub(crate) async fn metrics(&self) -> Result<Text, String> {
        let read = |router: &Router| {
            let tracked = router.tracked_connections()?;
            Ok((router.link_counters()?, router.refused_packets()?, tracked, router.by_name().count()))
        };
        let (links, refused, (tracked, most), pinned) = self.ask(read).await?;
        let current = self.enforcer.current();
        let mut text = Text::default();
        text.one("atoll_network_refused_packets_total", Kind::Counter, "Packets that the network refused.", refused);
        let help = "Connections that the network tracks.";
        text.one("atoll_network_tracked_connections", Kind::Gauge, help, tracked);
        let help = "Connections that the network can track.";
        text.one("atoll_network_tracked_connections_limit", Kind::Gauge, help, most);
        const PINNED: &str = "atoll_network_pinned_addresses";
        text.family(PINNED, Kind::Gauge, "Answers of the resolver that EgressPolicies let workloads out to.");
        for (namespace, count) in &pinned {
            text.sample(PINNED, &[("namespace", &**namespace)], count);
        }
        if let Some(dns) = self.router.dns.get() {
            const QUESTIONS: &str = "atoll_dns_questions_total";
            text.family(QUESTIONS, Kind::Counter, "Questions to the DNS server, by what became of them.");
            for (outcome, count) in dns.questions() {
                text.sample(QUESTIONS, &[("outcome", outcome)], count);
            }
        }
        type Read = fn(&network::watch::Counters) -> u64;
        // As the workload sees it: what the router's end received, it sent.
        let series: [(&str, &str, Read); 6] = [
            ("transmit_packets_total", "Packets that the workload sent.", |c| c.received_packets),
            ("transmit_bytes_total", "Bytes that the workload sent.", |c| c.received_bytes),
            ("receive_packets_total", "Packets that the workload got.", |c| c.sent_packets),
            ("receive_bytes_total", "Bytes that the workload got.", |c| c.sent_bytes),
            ("transmit_dropped_total", "Packets of the workload that were dropped.", |c| c.received_dropped),
            ("receive_dropped_total", "Packets to the workload that were dropped.", |c| c.sent_dropped),
        ];
        for (name, help, read) in series {
            let name = format!("atoll_network_workload_{name}");
            text.family(&name, Kind::Counter, help);
            for (address, counters) in &links {
                if let Some(pod) = current.policies.workloads.get(address) {
                    text.sample(&name, &[("namespace", &*pod.namespace), ("pod", &*pod.name)], read(counters));
                }
            }
        }
        Ok(text)
    }

    /// A workload's frames, until the link goes or nobody reads.
    pub(super) async fn capture(
        &self,
        pod: &str,
        port: Option<u16>,
    ) -> StatusResult<impl Stream<Item = Answer> + use<>> {
        let current = self.enforcer.current();
        let not_found = |why: String| Status::new(Reason::NotFound, why);
        let address = self.resolve(&current, pod).map_err(not_found)?;
        let workload = pod_address(&self.config, address).filter(|pod| current.policies.workloads.contains_key(pod));
        let address = workload.ok_or_else(|| not_found(format!("{pod}: no workload; name one as NAMESPACE/POD")))?;
        let capture = self.ask(move |router| router.capture(address)).await.map_err(failed)?;
        let (sender, receiver) = mpsc::channel(FRAMES);
        tokio::task::spawn_blocking(move || pass_on(capture, port, &sender));
        Ok(stream::unfold(receiver, async |mut frames| Some((frames.recv().await?, frames))))
    }
}

fn failed(why: String) -> Status {
    Status::new(Reason::InternalError, why)
}

fn pass_on(mut capture: Capture, port: Option<u16>, to: &mpsc::Sender<Answer>) {
    while !to.is_closed() {
        let frame = match capture.next(TURN) {
            Ok(Some(frame)) => frame,
            Ok(None) => continue,
            Err(error) => {
                let _ = to.blocking_send(Answer::Error(crate::volumes::chain(&error)));
                return;
            }
        };
        if port.is_some_and(|port| !ports(&frame.bytes).is_some_and(|both| both.contains(&port))) {
            continue;
        }
        let since = frame.at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let at = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        if to.blocking_send(Answer::Frame(Frame { at, bytes: STANDARD.encode(&frame.bytes) })).is_err() {
            return;
        }
    }
}
