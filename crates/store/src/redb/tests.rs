use super::{Engine, Options};
use crate::contract::{self, delete, put, reading};
use crate::memory;
use crate::model::{Compare, Error, Event, KeyRange, Op, Store, Txn};
use ::redb::{Database, ReadableDatabase};
use bytes::Bytes;
use proptest::prelude::*;
use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);

async fn write(store: &dyn Store, ops: Vec<Op>) -> i64 {
    store.txn(Txn { then: ops, ..Txn::default() }).await.expect("write").revision
}

#[tokio::test(flavor = "multi_thread")]
async fn contract() {
    let dirs = RefCell::new(Vec::new());
    contract::all(&|| {
        let dir = tempfile::tempdir().expect("tempdir");
        let engine = Engine::open(&dir.path().join("store")).expect("open");
        dirs.borrow_mut().push(dir);
        Arc::new(engine)
    })
    .await;
}

#[tokio::test]
async fn survives_reopening() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("deep/store");
    let engine = Engine::open(&path).expect("open");
    assert_eq!(fs::metadata(&path).expect("made").mode() & 0o777, 0o700);
    let lease = engine.lease_grant(Duration::from_millis(200)).await.expect("grant");
    write(&engine, vec![put("a", "1")]).await;
    write(&engine, vec![Op::Put { key: "leased".into(), value: "v".into(), lease }, put("a", "2")]).await;
    write(&engine, vec![delete("a")]).await;
    engine.compact(3).await.expect("compact");
    drop(engine);

    let engine = Engine::open(&path).expect("open again");
    assert_eq!(engine.revision().await.expect("revision"), 4);
    let old = engine.range(reading(KeyRange::one("a"), 3)).await.expect("history");
    assert_eq!(old.kvs.first().map(|kv| kv.value.clone()), Some(Bytes::from("2")));
    assert!(matches!(engine.range(reading(KeyRange::one("a"), 2)).await, Err(Error::Compacted { oldest: 3 })));
    let mut watch = engine.watch(KeyRange::prefix("leased"), 4).await.expect("watch");
    let gone = loop {
        let batch = tokio::time::timeout(PATIENCE, watch.next()).await.expect("in time").expect("open").expect("batch");
        if !batch.events.is_empty() {
            break batch;
        }
    };
    assert!(matches!(&gone.events[..], [Event::Delete { .. }]), "the lease ended after all");
    assert!(engine.lease_grant(PATIENCE).await.expect("grant") > lease, "a lease's number is not used again");
    drop(engine);
    assert!(watch.next().await.is_none(), "a watch ends with the engine");
}

#[tokio::test]
async fn says_why_it_does_not_open() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("store");
    let engine = Engine::open(&path).expect("open");
    write(&engine, vec![put("a", "1")]).await;
    let Err(Error::InUse { path: named }) = Engine::open(&path) else { panic!("opened twice") };
    assert!(named.ends_with("store.redb"));
    drop(engine);

    let file = path.join("store.redb");
    let good = fs::read(&file).expect("read");
    set_format(&file, 7);
    let newer = Engine::open(&path).map(drop);
    assert!(matches!(newer, Err(Error::NewerVersion { found: 7, known: 1, .. })), "{newer:?}");

    for damage in [
        |bytes: &mut Vec<u8>| bytes.clear(),
        |bytes: &mut Vec<u8>| bytes.truncate(100),
        |bytes: &mut Vec<u8>| bytes.truncate(5000),
        |bytes: &mut Vec<u8>| bytes.iter_mut().for_each(|byte| *byte = 0x5a),
        |bytes: &mut Vec<u8>| bytes.iter_mut().skip(8).take(600).for_each(|byte| *byte = !*byte),
        |bytes: &mut Vec<u8>| bytes.iter_mut().skip(4096).for_each(|byte| *byte = !*byte),
    ] {
        let mut bytes = good.clone();
        damage(&mut bytes);
        fs::write(&file, &bytes).expect("write");
        match Engine::open(&path) {
            Err(Error::Storage { path, .. }) => assert!(path.ends_with("store.redb")),
            // An empty file is what redb makes a database of; then the table is missing or it is new.
            other => panic!("opened a damaged file: {:?}", other.map(drop)),
        }
    }
    fs::write(&file, &good).expect("write");
    drop(Engine::open(&path).expect("the good file opens again"));
}

fn set_format(file: &Path, format: u32) {
    let db = Database::open(file).expect("open");
    let txn = db.begin_write().expect("write");
    txn.open_table(super::tables::META)
        .expect("meta")
        .insert("format", format.to_le_bytes().as_slice())
        .expect("insert");
    txn.commit().expect("commit");
}

#[tokio::test]
async fn is_busy_rather_than_unbounded() {
    let dir = tempfile::tempdir().expect("tempdir");
    let engine = Engine::open(dir.path()).expect("open");
    // With its transaction held here the writer cannot begin one.
    let held = engine.shared.db.begin_write().expect("write");
    let waiting: Vec<_> = (0..super::QUEUE + super::writer::GROUP + 10)
        .map(|at| Box::pin(engine.txn(Txn { then: vec![put(&at.to_string(), "v")], ..Txn::default() })))
        .collect();
    let mut busy = 0;
    let mut accepted = Vec::new();
    for mut future in waiting {
        match futures_poll(&mut future).await {
            Some(Err(Error::Busy)) => busy += 1,
            Some(other) => panic!("{other:?}"),
            None => accepted.push(future),
        }
    }
    assert!(busy > 0 && accepted.len() >= super::QUEUE);
    held.abort().expect("abort");
    let all = accepted.len();
    for future in accepted {
        future.await.expect("written after all");
    }
    assert_eq!(engine.range(reading(KeyRange { key: "".into(), end: "z".into() }, 0)).await.expect("read").count, all);
}

/// Polls once.
async fn futures_poll<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    std::future::poll_fn(|context| {
        std::task::Poll::Ready(match std::pin::Pin::new(&mut *future).poll(context) {
            std::task::Poll::Ready(output) => Some(output),
            std::task::Poll::Pending => None,
        })
    })
    .await
}

#[tokio::test]
async fn the_file_stops_growing() {
    let dir = tempfile::tempdir().expect("tempdir");
    let options = Options { keep_revisions: 400, ..Options::default() };
    let engine = Engine::open_with(dir.path(), &options).expect("open");
    let size = || fs::metadata(dir.path().join("store.redb")).expect("file").len();
    let round = async || {
        for at in 0..1500 {
            write(&engine, vec![put(&format!("k{}", at % 20), &"v".repeat(4000))]).await;
        }
    };
    round().await;
    let after_one = size();
    for _ in 0..4 {
        round().await;
    }
    assert!(size() <= after_one * 2, "{} after the first round, {} after five", after_one, size());
    let oldest = engine.range(reading(KeyRange::one("k1"), 2)).await;
    assert!(matches!(oldest, Err(Error::Compacted { .. })));
    let until = Instant::now() + PATIENCE;
    loop {
        let counters = engine.shared.counters().expect("counters");
        if counters.scrubbed == counters.compacted {
            break;
        }
        assert!(Instant::now() < until, "compaction never ends: {counters:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let txn = engine.shared.db.begin_read().expect("read");
    let rows = ::redb::ReadableTableMetadata::len(&txn.open_table(super::tables::HISTORY).expect("history"));
    assert!(rows.expect("len") < 900, "superseded values are gone");
}

#[tokio::test]
async fn a_large_empty_file_is_made_smaller() {
    let dir = tempfile::tempdir().expect("tempdir");
    let size = || fs::metadata(dir.path().join("store.redb")).expect("file").len();
    let engine = Engine::open(dir.path()).expect("open");
    for at in 0..12 {
        write(&engine, vec![Op::Put { key: format!("k{at}").into(), value: vec![1; 3 << 20].into(), lease: 0 }]).await;
    }
    let newest = write(&engine, vec![Op::Delete(KeyRange::prefix("k"))]).await;
    let newest = newest.max(write(&engine, vec![put("kept", "v")]).await);
    engine.compact(newest).await.expect("compact");
    let before = size();
    drop(engine);
    // Scrubbing goes on after opening when it was cut short.
    let engine = Engine::open(dir.path()).expect("open");
    let until = Instant::now() + PATIENCE;
    while {
        let counters = engine.shared.counters().expect("counters");
        counters.scrubbed < counters.compacted
    } {
        assert!(Instant::now() < until, "compaction never ends");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(engine);
    let engine = Engine::open(dir.path()).expect("open");
    assert!(size() < before / 2, "{before} before, {} after", size());
    assert_eq!(engine.range(reading(KeyRange::prefix("k"), 0)).await.expect("read").count, 1);
}

#[derive(Clone, Debug)]
enum Step {
    Txn(Txn),
    /// Per mille of what is left.
    Compact(u16),
    Reopen,
}

fn name() -> impl Strategy<Value = Bytes> {
    prop::sample::select(vec!["a", "a\u{0}", "aa", "ab", "b", "b/1", "b/2", "c"]).prop_map(Bytes::from)
}

fn range() -> impl Strategy<Value = KeyRange> {
    prop_oneof![
        name().prop_map(KeyRange::one),
        name().prop_map(KeyRange::prefix),
        (name(), name()).prop_map(|(key, end)| KeyRange { key, end }),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (name(), "[xyz]{0,3}").prop_map(|(key, value)| Op::Put { key, value: value.into(), lease: 0 }),
        2 => range().prop_map(Op::Delete),
        1 => (range(), 0..30_i64).prop_map(|(range, revision)| Op::Range(reading(range, revision))),
    ]
}

fn compare() -> impl Strategy<Value = Compare> {
    prop_oneof![
        (name(), 0..20_i64).prop_map(|(key, revision)| Compare::ModRevision(key, revision)),
        (name(), 0..20_i64).prop_map(|(key, revision)| Compare::CreateRevision(key, revision)),
        (name(), 0..3_i64).prop_map(|(key, version)| Compare::Version(key, version)),
        (name(), "[xyz]{0,1}").prop_map(|(key, value)| Compare::Value(key, value.into())),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let ops = || prop::collection::vec(op(), 0..4);
    prop_oneof![
        20 => (prop::collection::vec(compare(), 0..2), ops(), ops())
            .prop_map(|(compare, then, otherwise)| Step::Txn(Txn { compare, then, otherwise })),
        1 => (0..1000_u16).prop_map(Step::Compact),
        1 => Just(Step::Reopen),
    ]
}

/// All that can be read of a store.
async fn visible(store: &dyn Store) -> String {
    let newest = store.revision().await.expect("revision");
    let mut text = String::new();
    for revision in 0..=newest + 1 {
        let all = KeyRange { key: "a".into(), end: "z".into() };
        let seen = match store.range(reading(all, revision)).await {
            Ok(response) => format!("{:?} {} {}", response.kvs, response.count, response.revision),
            Err(error) => error.to_string(),
        };
        text += &format!("{revision}: {seen}\n");
    }
    text + &history(store, newest).await
}

async fn history(store: &dyn Store, newest: i64) -> String {
    for from in 1..=newest {
        let range = KeyRange { key: "a".into(), end: "z".into() };
        let Ok(mut watch) = store.watch(range, from).await else { continue };
        let mut text = format!("from {from}\n");
        loop {
            let batch = watch.next().await.expect("open").expect("batch");
            text += &format!("{} {:?}\n", batch.revision, batch.events);
            if batch.revision >= newest {
                return text;
            }
        }
    }
    String::new()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// The engine on disk and the plain one in memory give the same answers and show the same past.
    #[test]
    fn agrees_with_memory(steps in prop::collection::vec(step(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let dir = tempfile::tempdir().expect("tempdir");
            let mut disk = Engine::open(dir.path()).expect("open");
            let memory = memory::Engine::new();
            for step in steps {
                match step {
                    Step::Txn(txn) => {
                        let (one, other) = (disk.txn(txn.clone()).await, memory.txn(txn.clone()).await);
                        assert_eq!(format!("{one:?}"), format!("{other:?}"), "{txn:?}");
                    }
                    Step::Compact(share) => {
                        let revision = memory.revision().await.expect("revision") * i64::from(share) / 1000;
                        let (one, other) = (disk.compact(revision).await, memory.compact(revision).await);
                        assert_eq!(format!("{one:?}"), format!("{other:?}"));
                    }
                    Step::Reopen => {
                        drop(disk);
                        disk = Engine::open(dir.path()).expect("open again");
                    }
                }
            }
            assert_eq!(visible(&disk).await, visible(&memory).await);
        });
    }
}
