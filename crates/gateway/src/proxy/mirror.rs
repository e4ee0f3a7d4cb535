//! Copies of requests for a rule's mirrors. Their answers are read and forgotten; nothing of it touches the request
//! itself. Bodies are copied as they pass, up to [`KEEP`](crate::upstream::KEEP) bytes; a request with a larger one is
//! not copied.

use super::attempt::http2_request;
use super::{Visit, random};
use crate::counters::Counters;
use crate::gateway::Shared;
use crate::proxy_protocol;
use crate::request::{Length, Outgoing};
use crate::routing::{Rule, Target};
use crate::upstream::{Endpoint, Kept, Lease, RequestBody, exchange, exchange_http2};
use http::header::CONTENT_LENGTH;
use http::{Method, Request};
use http_body::Body;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::sync::watch;

/// Copies on their way at a time; further ones are left out.
const MAX_COPIES: u64 = 1024;
const MAX_TIME: Duration = Duration::from_secs(30);

enum Head {
    /// Whether it begins with a PROXY protocol header.
    Http1(Vec<u8>, Method, bool),
    Http2(Box<Request<RequestBody>>),
}

impl Visit<'_> {
    /// `kept` will have the request's body, if it has one.
    pub(super) fn mirror(&self, rule: &Rule, outgoing: &Outgoing<'_>, kept: Option<&watch::Receiver<Option<Kept>>>) {
        for mirror in &rule.filters.mirrors {
            let Target::Upstream(upstream) = &mirror.target else { continue };
            let (of, all) = mirror.share;
            if outgoing.upgrade.is_some() || random() % all.max(1) >= of {
                continue;
            }
            let Some(endpoint) = upstream.pick(random(), None, None).endpoint() else { continue };
            let counters = &self.shared.counters;
            if counters.mirrors_active.load(Relaxed) >= MAX_COPIES {
                Counters::add(&counters.mirrors_left_out_total);
                continue;
            }
            let head = if upstream.http2 {
                let Some(request) = http2_request(outgoing, RequestBody::empty()) else { continue };
                Head::Http2(Box::new(request))
            } else {
                let mut head = Vec::new();
                Outgoing { length: Length::None, ..*outgoing }.write(&mut head);
                let proxy = upstream.group().rules.proxy_protocol;
                if let Some(version) = proxy {
                    head.splice(0..0, proxy_protocol::header(version, self.peer.client, self.peer.local));
                }
                Head::Http1(head, self.parts.method.clone(), proxy.is_some())
            };
            let (shared, kept) = (self.shared.clone(), kept.cloned());
            counters.mirrors_active.fetch_add(1, Relaxed);
            tokio::spawn(async move {
                let copied = tokio::time::timeout(MAX_TIME, copy(&shared, endpoint, head, kept)).await;
                if !matches!(copied, Ok(Some(()))) {
                    Counters::add(&shared.counters.mirrors_left_out_total);
                }
                shared.counters.mirrors_active.fetch_sub(1, Relaxed);
            });
        }
    }
}

/// `None` if no copy was sent.
async fn copy(
    shared: &Shared,
    endpoint: Arc<Endpoint>,
    head: Head,
    kept: Option<watch::Receiver<Option<Kept>>>,
) -> Option<()> {
    let has_body = kept.is_some();
    let body = match kept {
        // The sender goes when the body is too large or breaks off.
        Some(mut kept) => kept.wait_for(Option::is_some).await.ok()?.clone()?,
        None => Kept::default(),
    };
    let lease = Lease::take(endpoint.clone());
    Counters::add(&shared.counters.mirrored_total);
    match head {
        Head::Http1(mut head, method, proxied) => {
            if has_body {
                head.truncate(head.len().saturating_sub(2));
                head.extend_from_slice(format!("content-length: {}\r\n\r\n", body.bytes.len()).as_bytes());
            }
            let connected = if proxied { endpoint.connect_new().await } else { endpoint.connect(true).await };
            let mut connection = connected.ok()?;
            connection.out = head;
            connection.once = proxied;
            let body = (!body.bytes.is_empty()).then(|| RequestBody::again(&Kept { trailers: None, ..body }));
            drain(exchange(connection, lease, &method, body, false).await.ok()?.body).await;
        }
        Head::Http2(mut request) => {
            if has_body {
                request.headers_mut().insert(CONTENT_LENGTH, body.bytes.len().into());
                *request.body_mut() = RequestBody::again(&body);
            }
            drain(exchange_http2(&lease, *request).await.ok()?.into_body()).await;
        }
    }
    Some(())
}

async fn drain(body: impl Body) {
    let mut body = pin!(body);
    while let Some(Ok(_)) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {}
}
