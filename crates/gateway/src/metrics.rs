//! The counters for Prometheus, at a socket of their own: they are for the administrator, not for clients.

use crate::counters::Counters;
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;

/// Answers `GET /metrics` until it is dropped.
pub async fn serve(listener: TcpListener, counters: Arc<Counters>) {
    let mut open = tokio::task::JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        while open.try_join_next().is_some() {}
        let counters = counters.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let answer = answer(&request, &counters);
            async move { Ok::<_, Infallible>(answer) }
        });
        open.spawn(async move {
            let mut builder = hyper::server::conn::http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(10)).keep_alive(false);
            // A scraper that breaks off comes again.
            let _ = builder.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

fn answer(request: &Request<Incoming>, counters: &Counters) -> Response<Full<Bytes>> {
    let status = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => StatusCode::OK,
        (_, "/metrics") => StatusCode::METHOD_NOT_ALLOWED,
        _ => StatusCode::NOT_FOUND,
    };
    let text = if status == StatusCode::OK { text(counters) } else { format!("{status}: GET /metrics\n") };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

/// Prometheus' text format.
pub fn text(counters: &Counters) -> String {
    let mut text = String::new();
    for (name, value) in counters.read() {
        let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
        text.push_str(&format!("# TYPE {name} {kind}\n{name} {value}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_has_a_type_and_a_value() {
        let counters = Counters::default();
        Counters::add(&counters.requests_total);
        let text = text(&counters);
        assert!(text.contains("# TYPE atoll_gateway_requests_total counter\natoll_gateway_requests_total 1\n"));
        assert!(text.contains("# TYPE atoll_gateway_requests_active gauge\natoll_gateway_requests_active 0\n"));
        assert!(text.lines().all(|line| line.split(' ').count() == if line.starts_with('#') { 4 } else { 2 }));
    }
}
