//! What every engine must do, as a suite: call [`all`] with a way to make an empty engine. Each case panics with the
//! case's name when the engine breaks it. Source: etcd's API guarantees and `v3` documentation.

use crate::model::{
    Compare, Error, Event, KeyRange, KeyValue, LeaseId, Op, OpResponse, RangeRequest, RangeResponse, Revision, Store,
    Txn, TxnResponse, Watch, WatchBatch,
};
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;

/// How long a case waits for what must come.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs the suite; `make` gives a fresh, empty engine for each case.
pub async fn all(make: &dyn Fn() -> Arc<dyn Store>) {
    revisions_and_versions(&*make()).await;
    ranges(&*make()).await;
    ranges_at_a_revision(&*make()).await;
    transactions(&*make()).await;
    refusals_change_nothing(&*make()).await;
    large_values(&*make()).await;
    compaction(&*make()).await;
    watch_live(&*make()).await;
    watch_history_then_live(make()).await;
    watch_ranges_and_marks(&*make()).await;
    watch_compacted(&*make()).await;
    slow_watchers(&*make()).await;
    leases(&*make()).await;
    concurrent_compare_and_swap(make()).await;
}

pub fn put(key: &str, value: &str) -> Op {
    Op::Put { key: Bytes::copy_from_slice(key.as_bytes()), value: Bytes::copy_from_slice(value.as_bytes()), lease: 0 }
}

fn put_leased(key: &str, lease: LeaseId) -> Op {
    Op::Put { key: Bytes::copy_from_slice(key.as_bytes()), value: Bytes::from_static(b"v"), lease }
}

pub fn delete(key: &str) -> Op {
    Op::Delete(KeyRange::one(Bytes::copy_from_slice(key.as_bytes())))
}

fn prefix(prefix: &str) -> KeyRange {
    KeyRange::prefix(Bytes::copy_from_slice(prefix.as_bytes()))
}

fn key(key: &str) -> Bytes {
    Bytes::copy_from_slice(key.as_bytes())
}

pub fn reading(range: KeyRange, revision: Revision) -> RangeRequest {
    RangeRequest { range, revision, limit: 0, count_only: false }
}

async fn write(store: &dyn Store, ops: Vec<Op>) -> TxnResponse {
    store.txn(Txn { compare: Vec::new(), then: ops, otherwise: Vec::new() }).await.expect("write")
}

async fn read(store: &dyn Store, range: KeyRange, revision: Revision) -> RangeResponse {
    store.range(reading(range, revision)).await.expect("read")
}

async fn get(store: &dyn Store, name: &str) -> Option<KeyValue> {
    read(store, KeyRange::one(key(name)), 0).await.kvs.pop()
}

fn pairs(response: &RangeResponse) -> Vec<(String, String)> {
    let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
    response.kvs.iter().map(|kv| (text(&kv.key), text(&kv.value))).collect()
}

fn expect(pairs_wanted: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs_wanted.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

async fn next(watch: &mut Box<dyn Watch>) -> WatchBatch {
    loop {
        let batch = tokio::time::timeout(PATIENCE, watch.next()).await.expect("watch: nothing came");
        let batch = batch.expect("watch: ended").expect("watch: failed");
        if !batch.events.is_empty() {
            return batch;
        }
    }
}

async fn revisions_and_versions(store: &dyn Store) {
    assert_eq!(store.revision().await.expect("revision"), 1, "an empty store is at 1");
    assert_eq!(write(store, vec![put("a", "1")]).await.revision, 2);
    assert_eq!(write(store, vec![put("a", "2"), put("b", "1")]).await.revision, 3, "one revision per transaction");
    let a = get(store, "a").await.expect("a");
    assert_eq!((a.create_revision, a.mod_revision, a.version), (2, 3, 2));
    assert_eq!(write(store, vec![delete("a")]).await.revision, 4);
    assert_eq!(write(store, vec![delete("a")]).await.revision, 4, "a deletion of nothing writes nothing");
    assert_eq!(write(store, vec![Op::Range(reading(prefix("a"), 0))]).await.revision, 4, "reads write nothing");
    assert!(get(store, "a").await.is_none());
    write(store, vec![put("a", "3")]).await;
    let a = get(store, "a").await.expect("a");
    assert_eq!((a.create_revision, a.mod_revision, a.version), (5, 5, 1), "created again");
    assert_eq!(store.revision().await.expect("revision"), 5);
}

async fn ranges(store: &dyn Store) {
    for name in ["a", "aa", "ab", "b", "b\u{0}", "ba", "c"] {
        write(store, vec![put(name, "v")]).await;
    }
    let names = |response: &RangeResponse| pairs(response).into_iter().map(|(key, _)| key).collect::<Vec<_>>();
    let all = read(store, prefix("a"), 0).await;
    assert_eq!((names(&all), all.count, all.more), (vec!["a".into(), "aa".into(), "ab".into()], 3, false));
    let one = read(store, KeyRange::one(key("b")), 0).await;
    assert_eq!((names(&one), one.count), (vec!["b".into()], 1), "an empty end is one key");
    let some = KeyRange { key: key("ab"), end: key("ba") };
    assert_eq!(names(&read(store, some, 0).await), ["ab", "b", "b\u{0}"], "the end is not in it");
    let none = KeyRange { key: key("c"), end: key("a") };
    assert_eq!(read(store, none, 0).await.count, 0, "an end before the beginning is nothing");
    let page = store.range(RangeRequest { limit: 2, ..reading(prefix("a"), 0) }).await.expect("page");
    assert_eq!((names(&page), page.more, page.count), (vec!["a".into(), "aa".into()], true, 3));
    let whole = store.range(RangeRequest { limit: 3, ..reading(prefix("a"), 0) }).await.expect("page");
    assert!(!whole.more);
    let count = store.range(RangeRequest { count_only: true, ..reading(prefix("b"), 0) }).await.expect("count");
    assert_eq!((count.kvs.len(), count.count), (0, 3));
}

async fn ranges_at_a_revision(store: &dyn Store) {
    write(store, vec![put("k1", "1"), put("k2", "1")]).await; // 2
    write(store, vec![put("k1", "2")]).await; // 3
    write(store, vec![delete("k2"), put("k3", "1")]).await; // 4
    write(store, vec![put("k2", "2")]).await; // 5
    write(store, vec![delete("k1")]).await; // 6
    let wanted: [&[(&str, &str)]; 6] = [
        &[],
        &[("k1", "1"), ("k2", "1")],
        &[("k1", "2"), ("k2", "1")],
        &[("k1", "2"), ("k3", "1")],
        &[("k1", "2"), ("k2", "2"), ("k3", "1")],
        &[("k2", "2"), ("k3", "1")],
    ];
    for (revision, wanted) in (1..).zip(wanted) {
        let response = read(store, prefix("k"), revision).await;
        assert_eq!(pairs(&response), expect(wanted), "at revision {revision}");
        assert_eq!((response.count, response.revision), (wanted.len(), 6));
        let page = store.range(RangeRequest { limit: 1, ..reading(prefix("k"), revision) }).await.expect("page");
        assert_eq!((page.kvs.len(), page.more, page.count), (wanted.len().min(1), wanted.len() > 1, wanted.len()));
    }
    let old = read(store, KeyRange::one(key("k1")), 2).await.kvs.pop().expect("k1 at 2");
    assert_eq!((old.create_revision, old.mod_revision, old.version), (2, 2, 1));
    let future = store.range(reading(prefix("k"), 7)).await;
    assert!(matches!(future, Err(Error::FutureRevision { asked: 7, newest: 6 })), "{future:?}");
}

async fn transactions(store: &dyn Store) {
    let create = |value: &str| Txn {
        compare: vec![Compare::ModRevision(key("k"), 0)],
        then: vec![put("k", value)],
        otherwise: vec![Op::Range(reading(KeyRange::one(key("k")), 0))],
    };
    let first = store.txn(create("1")).await.expect("create");
    assert!(first.succeeded && matches!(&first.responses[..], [OpResponse::Put { previous: None }]));
    let second = store.txn(create("2")).await.expect("create again");
    assert!(!second.succeeded && second.revision == 2, "nothing written");
    let [OpResponse::Range(found)] = &second.responses[..] else { panic!("{second:?}") };
    assert_eq!(pairs(found), expect(&[("k", "1")]));

    let check =
        async |compare: Vec<Compare>| store.txn(Txn { compare, ..Txn::default() }).await.expect("compare").succeeded;
    assert!(check(vec![]).await, "no compares: all hold");
    assert!(check(vec![Compare::CreateRevision(key("k"), 2), Compare::Version(key("k"), 1)]).await);
    assert!(check(vec![Compare::Value(key("k"), key("1"))]).await);
    assert!(!check(vec![Compare::Value(key("k"), key("2"))]).await);
    assert!(!check(vec![Compare::Value(key("absent"), key(""))]).await, "no value equals nothing");
    assert!(check(vec![Compare::Version(key("absent"), 0), Compare::CreateRevision(key("absent"), 0)]).await);
    assert!(!check(vec![Compare::ModRevision(key("k"), 2), Compare::ModRevision(key("k"), 3)]).await, "all must hold");

    let ops = vec![
        put("m", "1"),
        Op::Range(reading(KeyRange::one(key("m")), 0)),
        Op::Delete(prefix("k")),
        Op::Range(reading(prefix("k"), 0)),
        put("m2", "2"),
    ];
    let done = write(store, ops).await;
    assert_eq!(done.revision, 3);
    let [_, OpResponse::Range(own), OpResponse::Delete { deleted }, OpResponse::Range(gone), _] = &done.responses[..]
    else {
        panic!("{done:?}")
    };
    assert_eq!((pairs(own), own.revision), (expect(&[("m", "1")]), 3), "later operations see earlier ones");
    assert_eq!((deleted.len(), gone.count), (1, 0));
    let over = write(store, vec![put("m", "2")]).await;
    let [OpResponse::Put { previous: Some(previous) }] = &over.responses[..] else { panic!("{over:?}") };
    assert_eq!(previous.value, key("1"));
}

async fn refusals_change_nothing(store: &dyn Store) {
    write(store, vec![put("a", "1")]).await;
    let refused =
        async |ops: Vec<Op>| store.txn(Txn { then: ops, ..Txn::default() }).await.expect_err("must be refused");
    assert!(matches!(refused(vec![put("x", "1"), put("x", "2")]).await, Error::DuplicateKey));
    assert!(matches!(refused(vec![put("x", "1"), Op::Delete(prefix("x"))]).await, Error::DuplicateKey));
    assert!(matches!(refused(vec![put("x", "1"), put_leased("y", 77)]).await, Error::LeaseNotFound(77)));
    let future = refused(vec![put("x", "1"), Op::Range(reading(prefix("x"), 99))]).await;
    assert!(matches!(future, Error::FutureRevision { asked: 99, .. }));
    let huge = Op::Put { key: key("x"), value: vec![0; crate::VALUE_LIMIT + 1].into(), lease: 0 };
    assert!(matches!(refused(vec![put("y", "1"), huge]).await, Error::TooLarge { .. }));
    assert_eq!(store.revision().await.expect("revision"), 2);
    assert_eq!(read(store, KeyRange { key: key("b"), end: key("z") }, 0).await.count, 0, "nothing half done");
}

async fn large_values(store: &dyn Store) {
    let value: Bytes = (0..crate::VALUE_LIMIT).map(|at| u8::try_from(at % 251).unwrap_or(0)).collect();
    for name in ["big1", "big2"] {
        write(store, vec![Op::Put { key: key(name), value: value.clone(), lease: 0 }]).await;
    }
    assert!(get(store, "big2").await.expect("big2").value == value);
    write(store, vec![put("empty", "")]).await;
    assert!(get(store, "empty").await.expect("empty").value.is_empty());
}

async fn compaction(store: &dyn Store) {
    for value in ["1", "2", "3"] {
        write(store, vec![put("k", value), put(&format!("once-{value}"), value)]).await; // 2, 3, 4
    }
    write(store, vec![delete("k")]).await; // 5
    write(store, vec![put("other", "1")]).await; // 6
    store.compact(4).await.expect("compact");
    for revision in [1, 2, 3] {
        let gone = store.range(reading(prefix("k"), revision)).await;
        assert!(matches!(gone, Err(Error::Compacted { oldest: 4 })), "{gone:?}");
    }
    assert_eq!(pairs(&read(store, prefix("k"), 4).await), expect(&[("k", "3")]), "the revision itself is kept");
    assert_eq!(read(store, prefix("once"), 4).await.count, 3);
    assert_eq!(read(store, prefix("k"), 5).await.count, 0);
    assert!(matches!(store.compact(4).await, Err(Error::Compacted { .. })), "twice");
    assert!(matches!(store.compact(7).await, Err(Error::FutureRevision { .. })));
    store.compact(6).await.expect("compact to the newest");
    assert_eq!(read(store, prefix("k"), 0).await.count, 0);
    assert_eq!(read(store, prefix("o"), 6).await.count, 4);
    assert_eq!(write(store, vec![put("k", "4")]).await.revision, 7);
    assert_eq!(get(store, "k").await.expect("k").version, 1);
}

async fn watch_live(store: &dyn Store) {
    write(store, vec![put("w/before", "1")]).await; // 2
    let mut watch = store.watch(prefix("w/"), 0).await.expect("watch");
    write(store, vec![put("w/a", "1"), put("elsewhere", "1"), put("w/b", "1")]).await; // 3
    write(store, vec![put("w/a", "2"), delete("w/b")]).await; // 4
    let batch = next(&mut watch).await;
    assert_eq!((batch.revision, batch.events.len()), (3, 2), "all of one revision, and only what is watched");
    assert!(batch.events.iter().all(|event| matches!(event, Event::Put { previous: None, .. })));
    let batch = next(&mut watch).await;
    assert_eq!(batch.revision, 4);
    let [Event::Put { kv, previous: Some(was) }, Event::Delete { key: gone, revision: 4, previous: Some(last) }] =
        &batch.events[..]
    else {
        panic!("{batch:?}")
    };
    assert_eq!((&kv.value, &was.value, gone, &last.value), (&key("2"), &key("1"), &key("w/b"), &key("1")));
}

async fn watch_history_then_live(store: Arc<dyn Store>) {
    const OLD: i64 = 1500;
    const NEW: i64 = 500;
    for round in 0..OLD {
        write(&*store, vec![put(&format!("w/{}", round % 7), &round.to_string())]).await;
    }
    write(&*store, vec![delete("w/0")]).await;
    let mut watch = store.watch(prefix("w/"), 2).await.expect("watch");
    let writer = Arc::clone(&store);
    let writing = tokio::spawn(async move {
        for round in 0..NEW {
            write(&*writer, vec![put(&format!("w/{}", round % 7), &round.to_string())]).await;
        }
    });
    let mut last: std::collections::HashMap<Bytes, KeyValue> = std::collections::HashMap::new();
    for revision in 2..(2 + OLD + 1 + NEW) {
        let batch = next(&mut watch).await;
        assert_eq!(batch.revision, revision, "no gap, no duplicate, in order");
        for event in batch.events.iter() {
            match event {
                Event::Put { kv, previous } => {
                    assert_eq!(previous.as_ref(), last.get(&kv.key), "previous at {revision}");
                    last.insert(kv.key.clone(), kv.clone());
                }
                Event::Delete { key, previous, .. } => assert_eq!(*previous, last.remove(key)),
            }
        }
    }
    writing.await.expect("writer");
}

async fn watch_ranges_and_marks(store: &dyn Store) {
    let mut one = store.watch(KeyRange::one(key("k")), 0).await.expect("watch");
    let mut late = store.watch(prefix("k"), 4).await.expect("a future revision may be watched");
    for value in ["1", "2", "3"] {
        write(store, vec![put("k", value), put("kk", value)]).await; // 2, 3, 4
    }
    for revision in 2..5 {
        let batch = next(&mut one).await;
        assert_eq!((batch.revision, batch.events.len()), (revision, 1));
    }
    assert_eq!(next(&mut late).await.revision, 4);
    write(store, vec![put("unrelated", "1")]).await; // 5
    let mark = tokio::time::timeout(PATIENCE, one.next()).await.expect("a mark").expect("open").expect("mark");
    assert_eq!((mark.revision, mark.events.len()), (5, 0), "a quiet watcher learns how far the store is");
}

async fn watch_compacted(store: &dyn Store) {
    for value in ["1", "2", "3", "4"] {
        write(store, vec![put("k", value)]).await; // 2..5
    }
    store.compact(4).await.expect("compact");
    let error = match store.watch(prefix("k"), 3).await {
        Err(error) => error,
        Ok(mut watch) => watch.next().await.expect("an answer").expect_err("must be compacted"),
    };
    assert!(matches!(error, Error::Compacted { oldest: 4 }), "{error:?}");
    let mut watch = store.watch(prefix("k"), 5).await.expect("watch");
    let batch = next(&mut watch).await;
    let [Event::Put { kv, previous: Some(previous) }] = &batch.events[..] else { panic!("{batch:?}") };
    assert_eq!((&kv.value, &previous.value), (&key("4"), &key("3")), "what was before the oldest event is kept");
}

async fn slow_watchers(store: &dyn Store) {
    const VALUE: usize = 2 << 20;
    let mut slow = store.watch(prefix("k"), 0).await.expect("watch");
    let mut seen = store.revision().await.expect("revision");
    for _ in 0..20 {
        write(store, vec![Op::Put { key: key("k"), value: vec![0; VALUE].into(), lease: 0 }]).await;
    }
    let newest = store.revision().await.expect("revision");
    let after = loop {
        match tokio::time::timeout(PATIENCE, slow.next()).await.expect("an answer").expect("open") {
            Ok(batch) => {
                assert_eq!(batch.revision, seen + 1, "in order until cut off");
                seen = batch.revision;
            }
            Err(Error::Lagged { after }) => break after,
            Err(other) => panic!("{other}"),
        }
    };
    assert!(after == seen && seen < newest, "cut off after what was seen");
    assert!(slow.next().await.is_none());
    let mut again = store.watch(prefix("k"), seen + 1).await.expect("watch again");
    for revision in seen + 1..=newest {
        assert_eq!(next(&mut again).await.revision, revision, "nothing was lost");
    }
}

async fn leases(store: &dyn Store) {
    let long = store.lease_grant(Duration::from_secs(3600)).await.expect("grant");
    let other = store.lease_grant(Duration::from_secs(3600)).await.expect("grant");
    assert_ne!(long, other);
    write(store, vec![put_leased("l/1", long), put_leased("l/2", long), put_leased("l/3", long)]).await;
    assert_eq!(get(store, "l/1").await.expect("l/1").lease, long);
    assert_eq!(store.lease_keep_alive(long).await.expect("keep alive"), Duration::from_secs(3600));
    write(store, vec![put("l/2", "no lease"), put_leased("l/3", other)]).await;
    let mut watch = store.watch(prefix("l/"), 0).await.expect("watch");
    let before = store.revision().await.expect("revision");
    store.lease_revoke(long).await.expect("revoke");
    let batch = next(&mut watch).await;
    assert_eq!(batch.revision, before + 1, "all keys of a lease go at one revision");
    assert!(
        matches!(&batch.events[..], [Event::Delete { key, .. }] if key == "l/1"),
        "only keys still on it: {batch:?}"
    );
    assert!(matches!(store.lease_revoke(long).await, Err(Error::LeaseNotFound(id)) if id == long));
    assert!(matches!(store.lease_keep_alive(long).await, Err(Error::LeaseNotFound(_))));

    let short = store.lease_grant(Duration::from_millis(50)).await.expect("grant");
    write(store, vec![put_leased("l/4", short)]).await;
    let gone = loop {
        let batch = next(&mut watch).await;
        if batch.events.iter().any(|event| matches!(event, Event::Delete { .. })) {
            break batch;
        }
    };
    assert!(matches!(&gone.events[..], [Event::Delete { key, .. }] if key == "l/4"), "{gone:?}");
    assert!(matches!(store.lease_keep_alive(short).await, Err(Error::LeaseNotFound(_))));
    assert_eq!(read(store, prefix("l/"), 0).await.count, 2);
}

async fn concurrent_compare_and_swap(store: Arc<dyn Store>) {
    const TASKS: usize = 16;
    const ROUNDS: usize = 20;
    write(&*store, vec![put("n", "0")]).await;
    let increment = async |store: Arc<dyn Store>| {
        for _ in 0..ROUNDS {
            loop {
                let kv = get(&*store, "n").await.expect("n");
                let count: usize = String::from_utf8_lossy(&kv.value).parse().expect("a number");
                let txn = Txn {
                    compare: vec![Compare::ModRevision(key("n"), kv.mod_revision)],
                    then: vec![put("n", &(count + 1).to_string())],
                    otherwise: Vec::new(),
                };
                if store.txn(txn).await.expect("swap").succeeded {
                    break;
                }
            }
        }
    };
    let tasks: Vec<_> = (0..TASKS).map(|_| tokio::spawn(increment(Arc::clone(&store)))).collect();
    for task in tasks {
        task.await.expect("task");
    }
    let n = get(&*store, "n").await.expect("n");
    assert_eq!(n.value, key(&(TASKS * ROUNDS).to_string()), "no update was lost");
}
