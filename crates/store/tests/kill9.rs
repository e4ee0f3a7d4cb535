//! `kill -9` under load: this test runs itself as a child that writes and reports each acknowledged write on a pipe,
//! kills it at a random moment, reopens the store and checks what must hold. 200 times, fixed seed.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use store::redb::Engine;
use store::{Compare, KeyRange, KeyValue, Op, RangeRequest, Store, Txn};

const CHILD: &str = "ATOLL_STORE_KILL9_DIR";
const KILLS: usize = 200;
/// A new directory after so many.
const ROUNDS_PER_DIR: usize = 20;
const WRITERS: usize = 8;

#[derive(Clone, Copy, Default)]
struct Acknowledged {
    sequence: u64,
    revision: i64,
}

#[test]
fn acknowledged_writes_survive() {
    if let Some(dir) = std::env::var_os(CHILD) {
        child(Path::new(&dir));
    }
    let mut random = Random(0x5eed_0001);
    for _ in 0..KILLS / ROUNDS_PER_DIR {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut known: HashMap<usize, Acknowledged> = HashMap::new();
        for round in 0..ROUNDS_PER_DIR {
            run_and_kill(dir.path(), random.below(150), random.below(3000), &mut known);
            check(dir.path(), &mut known, round);
        }
        let total: u64 = known.values().map(|a| a.sequence).sum();
        assert!(total > 0, "the children wrote nothing");
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn spawn(dir: &Path) -> Child {
    Command::new(std::env::current_exe().expect("own path"))
        .args(["--exact", "acknowledged_writes_survive", "--nocapture", "--test-threads=1"])
        .env(CHILD, dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("child")
}

/// Kills after `lines` acknowledgements and `spins` turns of a loop, so that all phases of a commit are hit.
fn run_and_kill(dir: &Path, lines: u64, spins: u64, known: &mut HashMap<usize, Acknowledged>) {
    let mut child = spawn(dir);
    let mut reader = BufReader::new(child.stdout.take().expect("stdout"));
    let mut text = String::new();
    for _ in 0..lines {
        if reader.read_line(&mut text).expect("read") == 0 {
            panic!("the child ended by itself: {:?}", child.wait());
        }
    }
    (0..spins).for_each(|_| std::hint::spin_loop());
    child.kill().expect("kill");
    child.wait().expect("wait");
    reader.read_to_string(&mut text).expect("drain");
    // A last line without its end was cut by the kill; that write was acknowledged but not reported.
    let whole = text.rfind('\n').map_or("", |end| text.get(..end).unwrap_or_default());
    for line in whole.lines() {
        let mut fields = line.split(' ');
        if fields.next() != Some("ack") {
            continue;
        }
        let mut number = || fields.next().and_then(|field| field.parse::<u64>().ok()).expect("a number");
        let (writer, sequence, revision) = (number(), number(), number());
        let revision = i64::try_from(revision).expect("a revision");
        let last = known.entry(usize::try_from(writer).expect("a writer")).or_default();
        assert!(sequence > last.sequence && revision > last.revision, "acknowledgements go up: {line}");
        *last = Acknowledged { sequence, revision };
    }
}

fn reading(range: KeyRange) -> RangeRequest {
    RangeRequest { range, revision: 0, limit: 0, count_only: false }
}

async fn get(store: &dyn Store, key: String) -> Option<KeyValue> {
    store.range(reading(KeyRange::one(key))).await.expect("read").kvs.pop()
}

fn number(kv: &KeyValue) -> u64 {
    String::from_utf8_lossy(&kv.value).parse().expect("a number")
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime")
}

/// Afterwards `known` is what was found: that must survive the next kill.
fn check(dir: &Path, known: &mut HashMap<usize, Acknowledged>, round: usize) {
    let engine = Engine::open(dir).expect("open after the kill");
    runtime().block_on(async {
        let newest = engine.revision().await.expect("revision");
        for (writer, acknowledged) in known.iter_mut() {
            let at = format!("round {round}, writer {writer}");
            assert!(newest >= acknowledged.revision, "{at}: revision went back");
            let a = get(&engine, format!("w/{writer}/a")).await.unwrap_or_else(|| panic!("{at}: lost"));
            let b = get(&engine, format!("w/{writer}/b")).await.unwrap_or_else(|| panic!("{at}: lost half"));
            assert_eq!((number(&a), a.mod_revision), (number(&b), b.mod_revision), "{at}: half a transaction");
            let extra = number(&a).checked_sub(acknowledged.sequence).unwrap_or_else(|| panic!("{at}: lost a write"));
            assert!(extra <= 1, "{at}: {extra} writes that were never sent");
            assert!(a.mod_revision >= acknowledged.revision && a.mod_revision <= newest, "{at}");
            let c = engine.range(reading(KeyRange::prefix(format!("w/{writer}/c/")))).await.expect("read");
            let names: Vec<_> = c.kvs.iter().map(|kv| String::from_utf8_lossy(&kv.key).into_owned()).collect();
            assert_eq!(names, [format!("w/{writer}/c/{}", number(&a))], "{at}: half a transaction");
            *acknowledged = Acknowledged { sequence: number(&a), revision: a.mod_revision };
        }
        history_is_whole(&engine, newest).await;
    });
}

/// Every kept revision is there, once, in order.
async fn history_is_whole(engine: &Engine, newest: i64) {
    let from = (newest - 300).max(2);
    let Ok(mut watch) = engine.watch(KeyRange::prefix("w/"), from).await else { return };
    let mut wanted = from;
    while wanted <= newest {
        match watch.next().await.expect("open") {
            Ok(batch) if batch.events.is_empty() => assert!(batch.revision < wanted, "revision {wanted} is missing"),
            Ok(batch) => {
                assert_eq!(batch.revision, wanted, "a gap in history");
                wanted += 1;
            }
            Err(store::Error::Compacted { .. }) => return,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Writes until it is killed.
fn child(dir: &Path) -> ! {
    // The test harness has begun a line of its own.
    std::io::stdout().lock().write_all(b"\n").expect("report");
    let engine = Arc::new(Engine::open(dir).expect("open"));
    runtime().block_on(async {
        let tasks: Vec<_> = (0..WRITERS).map(|writer| tokio::spawn(write(Arc::clone(&engine), writer))).collect();
        for task in tasks {
            task.await.expect("writer");
        }
    });
    unreachable!("writers never end")
}

async fn write(engine: Arc<Engine>, writer: usize) {
    let mut sequence = get(&*engine, format!("w/{writer}/a")).await.map_or(0, |kv| number(&kv));
    loop {
        let next = sequence + 1;
        let put = |key: String| Op::Put { key: key.into(), value: next.to_string().into(), lease: 0 };
        let txn = Txn {
            compare: vec![match sequence {
                0 => Compare::ModRevision(format!("w/{writer}/a").into(), 0),
                _ => Compare::Value(format!("w/{writer}/a").into(), sequence.to_string().into()),
            }],
            then: vec![
                put(format!("w/{writer}/a")),
                Op::Delete(KeyRange::one(format!("w/{writer}/c/{sequence}"))),
                put(format!("w/{writer}/c/{next}")),
                put(format!("w/{writer}/b")),
            ],
            otherwise: Vec::new(),
        };
        let response = engine.txn(txn).await.expect("write");
        assert!(response.succeeded, "another writer has been here");
        sequence = next;
        let line = format!("ack {writer} {sequence} {}\n", response.revision);
        std::io::stdout().lock().write_all(line.as_bytes()).expect("report");
        if writer == 0 && sequence.is_multiple_of(97) {
            // Fails when another compaction got there first; both are fine.
            drop(engine.compact(response.revision - 150).await);
        }
    }
}
