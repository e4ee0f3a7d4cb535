//! What an instance finds when it looks at the world: its environment, two log streams, clocks, randomness. No file, no
//! socket; outbound HTTP is refused in so many words.

use super::function::Counters;
use super::log::{Lines, Log, Stream};
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
    hooks: NoOutbound,
    pub memory: Memory,
}

impl Context {
    pub fn new(spec: &FunctionSpec, log: &Arc<Log>, counters: &Arc<Counters>) -> Context {
        let mut builder = WasiCtx::builder();
        builder.envs(&spec.env).args(&spec.args);
        builder.stdout(Lines::new(log.clone(), Stream::Stdout)).stderr(Lines::new(log.clone(), Stream::Stderr));
        builder.allow_tcp(false).allow_udp(false).allow_ip_name_lookup(false);
        Context {
            wasi: builder.build(),
            http: WasiHttpCtx::new(),
            table: ResourceTable::new(),
            hooks: NoOutbound { log: log.clone() },
            memory: Memory {
                limit: spec.limits.memory_bytes,
                used: 0,
                begun: Instant::now(),
                counters: counters.clone(),
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
    counters: Arc<Counters>,
}

impl ResourceLimiter for Memory {
    fn memory_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        let more = desired.saturating_sub(current) as u64;
        if self.used + more > self.limit {
            return Ok(false);
        }
        self.used += more;
        self.counters.memory.fetch_add(more, Ordering::Relaxed);
        Ok(true)
    }

    fn table_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        Ok(desired <= 100_000)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.counters.memory.fetch_sub(self.used, Ordering::Relaxed);
        let micros = u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.counters.run_micros.fetch_add(micros, Ordering::Relaxed);
        self.counters.memory_kib_micros.fetch_add((self.used >> 10).saturating_mul(micros), Ordering::Relaxed);
    }
}

struct NoOutbound {
    log: Arc<Log>,
}

type Ending = Box<dyn Future<Output = Result<(), HttpError>> + Send>;
type Answering = Box<dyn Future<Output = Result<(http::Response<WasiBody>, Ending), HttpError>> + Send>;

impl WasiHttpHooks for NoOutbound {
    fn send_request(&mut self, request: http::Request<WasiBody>, _: Option<RequestOptions>, _: Ending) -> Answering {
        self.log.note(&format!(
            "atoll: the request to {} was refused: functions may not send requests of their own",
            request.uri()
        ));
        Box::new(std::future::ready(Err(HttpError::HttpRequestDenied)))
    }
}
