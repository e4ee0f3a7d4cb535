//! Creates per second with 64 concurrent writers, and the time from a write's start to the last of 100 watchers.
//! `cargo run --release -p store --example bench [DIR]`

use std::sync::Arc;
use std::time::{Duration, Instant};
use store::{Compare, KeyRange, Op, Store, Txn};

const WRITERS: usize = 64;
const WATCHERS: usize = 100;
const VALUE: usize = 1024;

fn create(key: String) -> Txn {
    Txn {
        compare: vec![Compare::ModRevision(key.clone().into(), 0)],
        then: vec![Op::Put { key: key.into(), value: vec![b'x'; VALUE].into(), lease: 0 }],
        otherwise: Vec::new(),
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = match std::env::args().nth(1) {
        Some(dir) => std::path::PathBuf::from(dir).join("store-bench"),
        None => std::env::temp_dir().join(format!("store-bench-{}", std::process::id())),
    };
    let engine = Arc::new(store::redb::Engine::open(&dir)?);
    let end = Instant::now() + Duration::from_secs(5);
    let mut tasks = Vec::new();
    for writer in 0..WRITERS {
        let engine = Arc::clone(&engine);
        tasks.push(tokio::spawn(async move {
            let mut done = 0_u64;
            while Instant::now() < end {
                engine.txn(create(format!("/bench/{writer:03}/{done:08}"))).await?;
                done += 1;
            }
            Ok::<u64, store::Error>(done)
        }));
    }
    let mut creates = 0;
    for task in tasks {
        creates += task.await??;
    }

    let mut watches = Vec::new();
    for _ in 0..WATCHERS {
        watches.push(engine.watch(KeyRange::prefix("/watched/"), 0).await?);
    }
    let mut delays = Vec::new();
    for round in 0..200 {
        let begun = Instant::now();
        engine.txn(create(format!("/watched/{round}"))).await?;
        for watch in &mut watches {
            while watch.next().await.ok_or("closed")??.events.is_empty() {}
        }
        delays.push(begun.elapsed());
    }
    delays.sort();
    let begun = Instant::now();
    let all = engine
        .range(store::RangeRequest { range: KeyRange::prefix("/bench/"), revision: 0, limit: 0, count_only: false })
        .await?;
    println!(
        "{{\"writers\": {WRITERS}, \"value_bytes\": {VALUE}, \"creates_per_s\": {}, \"watchers\": {WATCHERS}, \
         \"write_to_last_watcher_ms_median\": {:.3}, \"list_{}_keys_ms\": {:.1}}}",
        creates / 5,
        delays.get(delays.len() / 2).map_or(0.0, |d| d.as_secs_f64() * 1e3),
        all.kvs.len(),
        begun.elapsed().as_secs_f64() * 1e3,
    );
    drop(watches);
    drop(engine);
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}
