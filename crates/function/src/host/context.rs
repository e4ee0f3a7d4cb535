//! What an instance finds when it looks at the world: its environment, two log streams, clocks, randomness. No file, no
//! socket; its own requests go through [`super::outbound`], or are refused in so many words.

use super::invocation::Invocation;
use super::log::{Lines, Log, Stream};
use super::outbound::{Outbound, request, target};
use super::trace::PARENT;
use crate::wire::FunctionSpec;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use wasmtime::ResourceLimiter;
use wasmtime::component::ResourceTable;
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};
use wasmtime_wasi_http::{
    Error as HttpError, RequestOptions, WasiBody, WasiHttpCtx, WasiHttpCtxView, WasiHttpHooks, WasiHttpView,
};

pub(super) struct Context {
    wasi: WasiCtx,
    http: WasiHttpCtx,
    table: ResourceTable,
    hooks: Sending,
    pub memory: Memory,
}

impl Context {
    pub fn new(
        spec: &FunctionSpec,
        log: &Arc<Log>,
        invocation: &Arc<Invocation>,
        outbound: Option<Arc<Outbound>>,
    ) -> Context {
        let mut builder = WasiCtx::builder();
        builder.envs(&spec.env).args(&spec.args);
        builder.stdout(Lines::new(log.clone(), Stream::Stdout)).stderr(Lines::new(log.clone(), Stream::Stderr));
        builder.allow_tcp(false).allow_udp(false).allow_ip_name_lookup(false);
        Context {
            wasi: builder.build(),
            http: WasiHttpCtx::new(),
            table: ResourceTable::new(),
            hooks: Sending {
                outbound,
                left: spec.limits.outbound_requests,
                log: log.clone(),
                invocation: invocation.clone(),
            },
            memory: Memory {
                limit: spec.limits.memory_bytes,
                used: 0,
                begun: Instant::now(),
                invocation: invocation.clone(),
            },
        }
    }
}

impl WasiView for Context {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl WasiHttpView for Context {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        WasiHttpCtxView { hooks: &mut self.hooks, table: &mut self.table, ctx: &mut self.http }
    }
}

/// Counts linear memory against the function's limit, and charges it when the instance goes.
pub(super) struct Memory {
    limit: u64,
    /// Memories only grow: at the end this is the peak.
    used: u64,
    begun: Instant,
    invocation: Arc<Invocation>,
}

impl ResourceLimiter for Memory {
    fn memory_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        let more = desired.saturating_sub(current) as u64;
        if self.used + more > self.limit {
            return Ok(false);
        }
        self.used += more;
        self.invocation.counters().memory.fetch_add(more, Ordering::Relaxed);
        Ok(true)
    }

    fn table_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        Ok(desired <= 100_000)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.invocation.counters().memory.fetch_sub(self.used, Ordering::Relaxed);
        self.invocation.ran(self.begun.elapsed(), self.used);
    }
}

/// Requests of the instance's own.
struct Sending {
    outbound: Option<Arc<Outbound>>,
    /// How many it may still send.
    left: u32,
    log: Arc<Log>,
    invocation: Arc<Invocation>,
}

type Ending = Box<dyn Future<Output = Result<(), HttpError>> + Send>;
type Answering = Box<dyn Future<Output = Result<(http::Response<WasiBody>, Ending), HttpError>> + Send>;

impl WasiHttpHooks for Sending {
    fn send_request(
        &mut self,
        mut asked: http::Request<WasiBody>,
        options: Option<RequestOptions>,
        _: Ending,
    ) -> Answering {
        let refused = |why: &str| -> Answering {
            let said = format!("the request to {} was refused: {why}", target(asked.uri()));
            self.log.note(&format!("atoll: {said}"));
            Box::new(std::future::ready(Err(HttpError::InternalError(Some(said)))))
        };
        let Some(outbound) = &self.outbound else {
            return refused("this function may send none; --allow-outbound HOST allows them");
        };
        let Some(left) = self.left.checked_sub(1) else {
            return refused("this request sent as many as it may");
        };
        self.left = left;
        // A function that does not hand the trace on itself does so all the same.
        asked.headers_mut().entry(PARENT).or_insert_with(|| self.invocation.trace.header());
        Box::new(request(outbound.clone(), self.log.clone(), asked, options))
    }
}
