//! One exchange over an endpoint's shared HTTP/2 connection (gRPC).

use super::endpoint::Lease;
use super::request_body::RequestBody;
use http::{Request, Response};
use hyper::body::Incoming;
use std::io;

/// Why there is no response; the request is given back if it was not sent.
pub struct Refusal {
    pub error: io::Error,
    pub request: Option<Request<RequestBody>>,
}

pub async fn exchange(lease: &Lease, request: Request<RequestBody>) -> Result<Response<Incoming>, Box<Refusal>> {
    let mut sender = match lease.endpoint().http2().await {
        Ok(sender) => sender,
        Err(error) => return Err(Box::new(Refusal { error, request: Some(request) })),
    };
    if let Err(error) = sender.ready().await {
        return Err(Box::new(Refusal { error: io::Error::other(error), request: Some(request) }));
    }
    match sender.try_send_request(request).await {
        Ok(response) => Ok(response),
        Err(mut failure) => {
            let request = failure.take_message();
            Err(Box::new(Refusal { error: io::Error::other(failure.into_error()), request }))
        }
    }
}
