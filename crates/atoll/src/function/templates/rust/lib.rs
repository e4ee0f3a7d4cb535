//! A function: answers GET with a greeting and POST with what was sent.

use wasi::exports::http::incoming_handler::Guest;
use wasi::http::types::{Fields, IncomingRequest, Method, OutgoingBody, OutgoingResponse, ResponseOutparam};

struct Function;

impl Guest for Function {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let path = request.path_with_query().unwrap_or_else(|| "/".into());
        println!("{path}");
        let content = match request.method() {
            Method::Post => read(&request),
            _ => format!("hello {path}\n").into_bytes(),
        };
        let headers = Fields::from_list(&[("content-type".into(), b"text/plain; charset=utf-8".to_vec())]);
        let response = OutgoingResponse::new(headers.expect("well-formed headers"));
        let body = response.body().expect("a body is taken once");
        ResponseOutparam::set(out, Ok(response));
        {
            let stream = body.write().expect("a stream is taken once");
            for chunk in content.chunks(4096) {
                if stream.blocking_write_and_flush(chunk).is_err() {
                    return;
                }
            }
        }
        let _ = OutgoingBody::finish(body, None);
    }
}

fn read(request: &IncomingRequest) -> Vec<u8> {
    let body = request.consume().expect("a body is taken once");
    let stream = body.stream().expect("a stream is taken once");
    let mut all = Vec::new();
    while let Ok(part) = stream.blocking_read(64 << 10) {
        all.extend_from_slice(&part);
    }
    all
}

wasi::http::proxy::export!(Function);
