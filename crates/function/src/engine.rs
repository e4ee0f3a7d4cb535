//! The one configuration of wasmtime that compile role and host share: code compiled by one must fit the other.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use wasmtime::{
    Config, CustomCodeMemory, Enabled, Engine, InstanceAllocationStrategy, OptLevel, PoolingAllocationConfig,
};

/// Instances alive at once in one host.
pub(crate) const INSTANCES: u32 = 256;
/// Largest linear memory a function may ask for, bytes.
pub(crate) const MEMORY_MAX: u64 = 1 << 30;

fn common() -> Config {
    let mut config = Config::new();
    config.wasm_component_model(true);
    config.epoch_interruption(true);
    config.cranelift_opt_level(OptLevel::Speed);
    config.memory_init_cow(true);
    config.async_stack_size(1 << 20);
    config.max_wasm_stack(512 << 10);
    config
}

/// For compiling: nothing is ever instantiated with it.
pub(crate) fn compiling() -> wasmtime::Result<Engine> {
    Engine::new(&common())
}

/// For serving: instances come from a pool of address space reserved once.
pub(crate) fn serving() -> wasmtime::Result<Engine> {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(INSTANCES)
        .total_core_instances(INSTANCES * 16)
        .total_memories(INSTANCES * 2)
        .total_tables(INSTANCES * 8)
        .total_stacks(INSTANCES * 2)
        .max_component_instance_size(1 << 20)
        .max_core_instance_size(1 << 20)
        .max_core_instances_per_component(64)
        .max_memories_per_component(8)
        .max_tables_per_component(32)
        .max_memory_size(MEMORY_MAX as usize)
        .table_elements(100_000)
        // Pages that a request wrote are found and put back to what they were, instead of being given back and faulted
        // in again: with several threads, taking pages out of an address space is what costs most.
        .pagemap_scan(Enabled::Auto)
        .linear_memory_keep_resident(16 << 20)
        .table_keep_resident(1 << 20)
        .max_unused_warm_slots(16)
        .async_stack_keep_resident(64 << 10);
    let mut config = common();
    config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    config.with_custom_code_memory(Some(Arc::new(MappedCode)));
    Engine::new(&config)
}

/// What compiled code has to fit: version of wasmtime and every setting that shapes code. Short, for file names.
pub(crate) fn key(engine: &Engine) -> String {
    let mut hasher = DefaultHasher::new();
    engine.precompile_compatibility_hash().hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// Code that was mapped from a file by `sys::map_for_ever`.
struct MappedCode;

impl CustomCodeMemory for MappedCode {
    fn required_alignment(&self) -> usize {
        rustix::param::page_size()
    }

    fn publish_executable(&self, at: *const u8, length: usize) -> wasmtime::Result<()> {
        crate::sys::make_executable(at, length).map_err(wasmtime::Error::from)
    }

    fn unpublish_executable(&self, _: *const u8, _: usize) -> wasmtime::Result<()> {
        Ok(())
    }
}
