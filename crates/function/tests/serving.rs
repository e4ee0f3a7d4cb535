//! A host in its jail, from the daemon's side. The program is its own host and compiler: it is started again in those
//! roles.

mod outbound;

use function::{Cache, Client, Error, FunctionLimits, FunctionSpec, launch};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

type Test = (&'static str, fn(&Bench));

const TESTS: &[Test] = &[
    ("answers, on one connection and on many", answers),
    ("every request has an instance of its own", fresh_instances),
    ("a trap costs one request", traps),
    ("a function that computes for ever is ended", endless),
    ("memory is bounded", memory),
    ("recursion ends where the stack does", recursion),
    ("processor time is bounded", processor_time),
    ("an answer is bounded", endless_answer),
    ("a flood in the log ends where the log does, and costs its author only", flood),
    ("what is charged is what was sent", ledger),
    ("what is not a component is refused", refusals),
    ("stopping drains, killing does not", stopping),
    ("the daemon comes back to a host that went on", reconnecting),
    ("the host is in its jail", jailed),
    ("compiled code that was changed is not used", tampering),
    ("too many at once are turned away", overload),
    ("its own requests go where its list says", outbound::test),
    ("a function written in JavaScript", javascript),
];

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some("function-host") => std::process::exit(function::host::main(&args[2..])),
        Some("function-connect") => std::process::exit(function::connect::main(&args[2..])),
        Some("function-compile") => std::process::exit(function::compile::main(&args[2..])),
        Some("--list") => return,
        Some("bench") => return bench(),
        _ => {}
    }
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: namespaces and users need root");
        return;
    }
    let filter = args.get(1).filter(|a| !a.starts_with('-'));
    let bench = Bench::new();
    for (name, test) in TESTS.iter().filter(|(name, _)| filter.is_none_or(|f| name.contains(f.as_str()))) {
        let begun = Instant::now();
        test(&bench);
        println!("test {name} ... ok ({:?})", begun.elapsed());
    }
}

/// `serving bench`: requests a second with wrk and latencies of single requests, for the smallest component and for one in
/// JavaScript.
fn bench() {
    let bench = Bench::new();
    let hello = bench.start("hello", ANSWER, FunctionLimits::default());
    measure("smallest component", &hello, "/");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/shop/pricing/pricing.wasm");
    let Ok(bytes) = fs::read(&path) else { return println!("SKIPPED: {} is not built", path.display()) };
    let (path, digest) = bench.store(&bytes);
    let begun = Instant::now();
    bench.cache().get(&path, &digest).unwrap();
    println!("JavaScript: compiled in {:?}", begun.elapsed());
    let begun = Instant::now();
    let pricing = bench.start_component("pricing", &path, &digest, FunctionLimits::default(), &[]).unwrap();
    println!("JavaScript: from compiled code to listening in {:?}", begun.elapsed());
    measure("JavaScript", &pricing, "/price?sku=teapot&qty=1");
    println!("after it: {:?}", bench.client.stats("pricing").unwrap());
}

fn measure(what: &str, running: &Running, path: &str) {
    let mut times: Vec<Duration> = Vec::new();
    for _ in 0..200 {
        let begun = Instant::now();
        assert_eq!(running.get(path).0, 200);
        times.push(begun.elapsed());
    }
    let first = times[0];
    times.sort_unstable();
    println!("{what}: first request {first:?}, median of 200 with connection {:?}, best {:?}", times[100], times[0]);
    for connections in ["1", "16"] {
        let url = format!("http://{}{path}", running.address);
        let wrk = std::process::Command::new("wrk").args(["-t1", "-d5", "-c", connections, &url]).output();
        let text = wrk.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
        let lines =
            text.lines().filter(|l| ["Requests/sec", "Latency", "Non-2xx", "Socket"].iter().any(|w| l.contains(w)));
        println!("{what}, {connections} connections: {}", lines.map(str::trim).collect::<Vec<_>>().join("; "));
    }
}

struct Bench {
    dir: tempfile::TempDir,
    exe: PathBuf,
    client: Client,
}

const UID: u32 = 2_000_000_017;

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let exe = std::env::current_exe().unwrap();
        let client = launch(&exe, &dir.path().join("host"), UID).unwrap();
        Bench { dir, exe, client }
    }

    fn cache(&self) -> Cache {
        Cache::open(self.exe.clone(), self.dir.path().join("cache"), UID + 1).unwrap()
    }

    fn component(&self, body: &str) -> (PathBuf, String) {
        let bytes = wat::parse_str(include_str!("handler.wat").replace("@HANDLER@", body)).unwrap();
        self.store(&bytes)
    }

    fn store(&self, bytes: &[u8]) -> (PathBuf, String) {
        use sha2::Digest;
        let digest: String = sha2::Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
        let path = self.dir.path().join(&digest);
        fs::write(&path, bytes).unwrap();
        (path, digest)
    }

    /// Starts a function; gives its address and log.
    fn start(&self, id: &str, body: &str, limits: FunctionLimits) -> Running {
        let (path, digest) = self.component(body);
        self.start_component(id, &path, &digest, limits, &[]).unwrap()
    }

    fn start_component(
        &self,
        id: &str,
        path: &Path,
        digest: &str,
        limits: FunctionLimits,
        env: &[(&str, &str)],
    ) -> Result<Running, Error> {
        let code = self.cache().get(path, digest)?;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let log_path = self.dir.path().join(format!("{id}.log"));
        let log = File::options().create(true).append(true).open(&log_path).unwrap();
        let spec = FunctionSpec {
            id: id.into(),
            code: code.name,
            env: env.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
            args: vec![],
            limits,
            log_max_bytes: 1 << 20,
        };
        self.client.add(spec, &code.file, &listener, &log)?;
        Ok(Running { address, log_path })
    }

    fn exit_of(&self, id: &str) -> function::Exit {
        let mut since = 0;
        loop {
            let listing = self.client.list().unwrap();
            if let Some(exit) = listing.functions.iter().find(|f| f.id == id).unwrap().exit.clone() {
                return exit;
            }
            since = since.max(listing.sequence);
            Client::connect(&self.dir.path().join("host")).unwrap().changed(since).unwrap();
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for function in self.client.list().map(|l| l.functions).unwrap_or_default() {
            let _ = self.client.forget(&function.id);
        }
        assert!(self.client.retire().unwrap_or(true));
    }
}

struct Running {
    address: SocketAddr,
    log_path: PathBuf,
}

impl Running {
    /// Status and body of one request on a connection of its own.
    fn get(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        let status = text.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        (status, text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
    }

    /// Waits until the log has a text.
    fn logged(&self, wanted: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let text = fs::read_to_string(&self.log_path).unwrap();
            if text.contains(wanted) {
                return text;
            }
            assert!(Instant::now() < deadline, "no {wanted:?} in the log:\n{text}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

const ANSWER: &str = "(call $answer (local.get $out))";

fn answers(bench: &Bench) {
    let running = bench.start("hello", ANSWER, FunctionLimits::default());
    assert_eq!(running.get("/").0, 200);
    let mut stream = TcpStream::connect(running.address).unwrap();
    for _ in 0..3 {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n").unwrap();
        let mut head = [0u8; 15];
        stream.read_exact(&mut head).unwrap();
        assert_eq!(&head, b"HTTP/1.1 200 OK");
        let mut rest = Vec::new();
        let mut byte = [0u8];
        while !rest.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte).unwrap();
            rest.push(byte[0]);
        }
    }
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| (0..20).for_each(|_| assert_eq!(running.get("/").0, 200)));
        }
    });
    let stats = bench.client.stats("hello").unwrap();
    assert_eq!((stats.requests, stats.failures, stats.in_flight), (164, 0, 0));
    assert!(stats.cpu_nanos > 0);
}

/// The second request to one instance would trap.
fn fresh_instances(bench: &Bench) {
    let body = format!(
        "(if (global.get $served) (then unreachable)) (global.set $served (i32.const 1))
         (if (i32.load (i32.const 64)) (then unreachable)) (i32.store (i32.const 64) (i32.const 1)) {ANSWER}"
    );
    let running = bench.start("fresh", &body, FunctionLimits::default());
    for _ in 0..20 {
        assert_eq!(running.get("/").0, 200);
    }
}

fn traps(bench: &Bench) {
    let running = bench.start("trap", "unreachable", FunctionLimits::default());
    for _ in 0..3 {
        let (status, body) = running.get("/where");
        assert_eq!((status, body.as_str()), (500, "the function failed; its log says why\n"));
    }
    let log = running.logged("unreachable");
    assert!(log.contains("stderr F atoll: GET /where: the function failed: "), "{log}");
    assert_eq!(bench.client.stats("trap").unwrap().failures, 3);
    let silent = bench.start("silent", "", FunctionLimits::default());
    assert_eq!(silent.get("/").0, 500);
    silent.logged("it ended without an answer");
}

fn endless(bench: &Bench) {
    let limits = FunctionLimits { timeout_ms: 200, ..FunctionLimits::default() };
    let running = bench.start("endless", "(loop (br 0))", limits);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| assert_eq!(running.get("/").0, 504));
        }
    });
    running.logged("no answer within");
    let deadline = Instant::now() + Duration::from_secs(20);
    while bench.client.stats("endless").unwrap().in_flight > 0 {
        assert!(Instant::now() < deadline, "instances go on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn memory(bench: &Bench) {
    // 16 MiB more.
    let body = format!("(if (i32.eq (memory.grow (i32.const 256)) (i32.const -1)) (then unreachable)) {ANSWER}");
    let small = FunctionLimits { memory_bytes: 8 << 20, ..FunctionLimits::default() };
    assert_eq!(bench.start("small", &body, small).get("/").0, 500);
    assert_eq!(bench.start("large", &body, FunctionLimits::default()).get("/").0, 200);
    assert_eq!(bench.client.stats("large").unwrap().memory_bytes, 0);
}

fn recursion(bench: &Bench) {
    let body = format!("(drop (call $recurse (i32.const 0))) {ANSWER}");
    let running = bench.start("recursion", &body, FunctionLimits::default());
    assert_eq!(running.get("/").0, 500);
    running.logged("call stack exhausted");
    assert_eq!(running.get("/").0, 500, "the host goes on");
}

fn processor_time(bench: &Bench) {
    let limits = FunctionLimits { cpu_ms: 50, ..FunctionLimits::default() };
    let running = bench.start("busy", "(loop (br 0))", limits);
    assert_eq!(running.get("/").0, 500, "long before its minute is over");
    running.logged("it used more than 50ms of processor time");
    let stats = bench.client.stats("busy").unwrap();
    assert!(stats.cpu_nanos >= 50_000_000 && stats.in_flight == 0, "{stats:?}");
}

fn endless_answer(bench: &Bench) {
    let limits = FunctionLimits { response_bytes: 1 << 20, ..FunctionLimits::default() };
    let running = bench.start("endless-answer", "(call $answer-for-ever (local.get $out))", limits);
    let mut stream = TcpStream::connect(running.address).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    // Cut off: an end, or a reset.
    let _ = stream.read_to_end(&mut answer);
    assert!(answer.starts_with(b"HTTP/1.1 200 ") && answer.len() < 2 << 20, "{} bytes", answer.len());
    assert!(!answer.ends_with(b"0\r\n\r\n"), "it does not look whole");
    running.logged("an answer was cut off: an answer of more than 1048576 bytes");
    let other = bench.start("beside", ANSWER, FunctionLimits::default());
    assert_eq!(other.get("/").0, 200);
}

fn flood(bench: &Bench) {
    let write = "(local.set $out (call $stdout)) (memory.fill (i32.const 1024) (i32.const 10) (i32.const 4096))
        (loop (call $write (local.get $out) (i32.const 1024) (i32.const 4096) (i32.const 96)) (br 0))";
    let limits = FunctionLimits { timeout_ms: 1000, ..FunctionLimits::default() };
    let running = bench.start("flood", write, limits);
    let beside = bench.start("calm", ANSWER, FunctionLimits::default());
    let full = || fs::read_to_string(&running.log_path).unwrap().contains("the log was not rotated in time");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !full() {
        assert!(Instant::now() < deadline, "the log never ends");
        std::thread::scope(|scope| {
            let flooding = scope.spawn(|| running.get("/").0);
            while !flooding.is_finished() {
                assert_eq!(beside.get("/").0, 200);
            }
            assert_eq!(flooding.join().unwrap(), 504);
        });
    }
    let length = fs::metadata(&running.log_path).unwrap().len();
    assert!(length < 8 << 20, "{length} bytes");
}

/// The sum of what single requests cost is what the counters say.
fn ledger(bench: &Bench) {
    let pages = 64;
    let body = format!("(drop (memory.grow (i32.const {}))) {ANSWER}", pages - 1);
    let running = bench.start("ledger", &body, FunctionLimits::default());
    let begun = Instant::now();
    let sent = 200;
    (0..sent).for_each(|_| assert_eq!(running.get("/").0, 200));
    let took = begun.elapsed();
    let deadline = Instant::now() + Duration::from_secs(20);
    let stats = loop {
        let stats = bench.client.stats("ledger").unwrap();
        if stats.in_flight == 0 && stats.memory_bytes == 0 {
            break stats;
        }
        assert!(Instant::now() < deadline, "{stats:?}");
    };
    assert_eq!((stats.requests, stats.failures, stats.sent_bytes), (sent, 0, 0));
    assert!(stats.run_micros > 0 && u128::from(stats.run_micros) <= took.as_micros() + 100_000, "{stats:?}");
    // Every instance had the same memory: what is charged is its size times the time all of them had.
    assert_eq!(stats.memory_kib_micros, stats.run_micros * pages * 64);
    let gib = (pages << 16) as f64 / (1u64 << 30) as f64;
    assert!((stats.gib_seconds() - gib * stats.run_micros as f64 / 1e6).abs() < 1e-9);
}

fn refusals(bench: &Bench) {
    let refused = |bytes: &[u8]| {
        let (path, digest) = bench.store(bytes);
        bench.start_component("refused", &path, &digest, FunctionLimits::default(), &[]).err().unwrap().to_string()
    };
    assert!(refused(b"nonsense").contains("does not compile"));
    assert!(refused(b"\0asm\x01\0\0\0").contains("does not compile"));
    assert!(refused(b"\0asm\x0d\0\x01\0").contains("does not export wasi:http/incoming-handler"));
    let other =
        wat::parse_str(r#"(component (import "shop:db/query@1.0.0" (instance (export "run" (func)))))"#).unwrap();
    let why = refused(&other);
    assert!(why.contains("asks for what there is not") && why.contains("shop:db/query"), "{why}");
}

fn stopping(bench: &Bench) {
    let running = bench.start("stop", ANSWER, FunctionLimits::default());
    let mut idle = TcpStream::connect(running.address).unwrap();
    bench.client.stop("stop", Duration::from_secs(5), None).unwrap();
    let exit = bench.exit_of("stop");
    assert_eq!((exit.code, exit.signal), (0, None));
    assert_eq!(idle.read(&mut [0u8; 1]).unwrap_or(0), 0, "an idle connection is closed");
    assert!(TcpStream::connect(running.address).is_err());

    for round in 0..50 {
        let id = format!("brief-{round}");
        bench.start(&id, ANSWER, FunctionLimits::default());
        bench.client.stop(&id, Duration::ZERO, None).unwrap();
        assert_eq!(bench.exit_of(&id).code, 0, "stopped before it began to serve");
        bench.client.forget(&id).unwrap();
    }

    let running = bench.start("kill", "(loop (br 0))", FunctionLimits::default());
    let mut busy = TcpStream::connect(running.address).unwrap();
    busy.write_all(b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n").unwrap();
    while bench.client.stats("kill").unwrap().in_flight == 0 {
        std::thread::yield_now();
    }
    bench.client.stop("kill", Duration::ZERO, Some(9)).unwrap();
    let exit = bench.exit_of("kill");
    assert_eq!((exit.code, exit.signal), (137, Some(9)));
    bench.client.forget("kill").unwrap();
    assert!(matches!(bench.client.forget("kill"), Err(Error::UnknownFunction(_))));
}

fn reconnecting(bench: &Bench) {
    let running = bench.start("lasting", ANSWER, FunctionLimits::default());
    let again = Client::connect(&bench.dir.path().join("host")).unwrap();
    assert!(again.list().unwrap().functions.iter().any(|f| f.id == "lasting" && f.exit.is_none()));
    assert!(!again.retire().unwrap(), "a host with functions stays");
    assert_eq!(running.get("/").0, 200);
    assert!(matches!(Client::connect(Path::new("/nonexistent")), Err(Error::NotRunning)));
}

/// What the kernel says of the host's process.
fn jailed(bench: &Bench) {
    let wanted = bench.dir.path().join("host").to_str().unwrap().to_owned();
    let pid = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok())
        .find(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            line.contains("--serve") && line.contains(&wanted)
        })
        .expect("the host's process");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|l| l.starts_with(&format!("{name}:"))).unwrap();
        line.split_once(':').unwrap().1.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let id = UID.to_string();
    assert_eq!(field("Uid"), [id.as_str(); 4].join(" "));
    assert_eq!(field("Gid"), [id.as_str(); 4].join(" "));
    assert_eq!(field("Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!((field("NoNewPrivs").as_str(), field("Seccomp").as_str()), ("1", "2"));
    for kind in ["net", "mnt", "pid", "ipc", "uts"] {
        let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/{kind}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{kind} namespace");
    }
    assert_eq!(fs::read_dir(format!("/proc/{pid}/root")).unwrap().count(), 0, "its root is empty");
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert!(mounts.lines().count() == 1 && mounts.contains(" ro,"), "{mounts}");
}

fn tampering(bench: &Bench) {
    let (path, digest) = bench.component(&format!("(drop (i32.const 4711)) {ANSWER}"));
    let cache = bench.cache();
    let code = cache.get(&path, &digest).unwrap();
    let file = bench.dir.path().join("cache").join(format!("{}.cwasm", code.name));
    let good = fs::read(&file).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 0xff;
    fs::write(&file, &bad).unwrap();
    let mut again = Vec::new();
    cache.get(&path, &digest).unwrap().file.read_to_end(&mut again).unwrap();
    assert!(again == good, "it was compiled again");
    assert!(cache.get(&path, "../../etc/passwd").is_err());
}

fn overload(bench: &Bench) {
    let limits = FunctionLimits { concurrency: 1, timeout_ms: 500, ..FunctionLimits::default() };
    let running = bench.start("overload", "(loop (br 0))", limits);
    let mut seen: Vec<u16> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..12).map(|_| scope.spawn(|| running.get("/").0)).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    });
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen, [503, 504]);
}

fn javascript(bench: &Bench) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/shop/pricing/pricing.wasm");
    let Ok(bytes) = fs::read(&path) else {
        println!("SKIPPED: examples/shop/pricing/pricing.wasm is not built; run build.sh there");
        return;
    };
    let (path, digest) = bench.store(&bytes);
    let begun = Instant::now();
    let running =
        bench.start_component("pricing", &path, &digest, FunctionLimits::default(), &[("TAX_PERCENT", "7")]).unwrap();
    println!("compiled and started in {:?}", begun.elapsed());
    let begun = Instant::now();
    let (status, body) = running.get("/price?sku=teapot&qty=10");
    println!("first answer in {:?}", begun.elapsed());
    assert_eq!(status, 200, "{body}");
    assert!(body.contains(r#""net":24990,"discount":1250"#) && body.contains(r#""taxPercent":7"#), "{body}");
    assert_eq!(running.get("/price?sku=teapot&qty=x").0, 400);
    assert_eq!(running.get("/price?sku=unknown").0, 404);
    running.logged("stdout F priced 10 x teapot: ");
    assert_eq!(bench.client.stats("pricing").unwrap().memory_bytes, 0);
}
