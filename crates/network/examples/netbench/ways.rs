//! Ways from a client to a server, and what a packet costs on each.
//!
//! Client and server are one thread where the cost is asked for: every packet is then worked off inside the system call
//! that sent it, and the thread's processor time is the cost, which other load on the machine changes little. Rates are of
//! two threads and the clock.

use network::in_netns;
use rustix::net::sockopt;
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How a client in one namespace reaches a server in another.
#[derive(Clone)]
pub struct Way {
    pub name: &'static str,
    pub from: PathBuf,
    pub to: PathBuf,
    pub at: SocketAddr,
}

pub const PORT: u16 = 80;
const TURN: Duration = Duration::from_millis(60);
pub const ROUNDS: usize = 25;
const CHUNK: usize = 128 << 10;
const QUESTION: usize = 128;

pub fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// The figures of a way, in their order here and in each round: the first two are microseconds.
pub const FIGURES: [&str; 5] = ["connect_us", "request_us", "requests_per_s", "gbit_per_core_s", "gbit_per_s"];

/// What each way did, round by round.
#[derive(Default)]
pub struct Seen(BTreeMap<&'static str, Vec<[f64; FIGURES.len()]>>);

impl Seen {
    fn each(&self, way: &str, figure: &str) -> Option<Vec<f64>> {
        let place = FIGURES.iter().position(|name| *name == figure)?;
        Some(self.0.get(way)?.iter().map(|round| round[place]).collect())
    }
    /// The median of the rounds' ratios: what disturbs one round disturbs both sides of it.
    pub fn ratio(&self, figure: &str, one: &str, other: &str) -> Option<f64> {
        let pairs = self.each(one, figure)?.into_iter().zip(self.each(other, figure)?);
        Some(median(pairs.map(|(one, other)| one / other).collect()))
    }
    /// Medians, by way and figure.
    pub fn medians(&self) -> serde_json::Value {
        let of = |way: &str| {
            let figures = FIGURES.map(|figure| (figure.to_owned(), self.each(way, figure).map(median).into()));
            serde_json::Value::Object(figures.into_iter().collect())
        };
        serde_json::Value::Object(self.0.keys().map(|way| ((*way).to_owned(), of(way))).collect())
    }
}

struct Link<'a> {
    way: &'a Way,
    listener: TcpListener,
}

impl Link<'_> {
    fn of(way: &Way) -> Link<'_> {
        let listener = in_netns(&way.to, || TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap()).unwrap();
        Link { way, listener }
    }
    fn pair(&self) -> (TcpStream, TcpStream) {
        let client = TcpStream::connect(self.way.at).unwrap_or_else(|error| panic!("{}: {error}", self.way.name));
        let (server, _) = self.listener.accept().unwrap();
        for end in [&client, &server] {
            end.set_nodelay(true).unwrap();
        }
        (client, server)
    }

    /// Microseconds until a connection is made and accepted.
    fn connects(&self) -> f64 {
        let (begun, mut spent, mut count) = (Instant::now(), Duration::ZERO, 0);
        while begun.elapsed() < TURN {
            let start = processor_time();
            let (client, server) = self.pair();
            spent += processor_time() - start;
            count += 1;
            // A reset leaves nothing behind that would take its port for a minute.
            sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
            drop((client, server));
        }
        spent.as_secs_f64() * 1e6 / f64::from(count)
    }

    /// Microseconds for a question and its answer on a kept connection.
    fn requests(&self) -> f64 {
        let (mut client, mut server) = self.pair();
        let (mut question, mut count) = ([7; QUESTION], 0);
        let (begun, start) = (Instant::now(), processor_time());
        while begun.elapsed() < TURN {
            for _ in 0..16 {
                client.write_all(&question).unwrap();
                server.read_exact(&mut question).unwrap();
                server.write_all(&question).unwrap();
                client.read_exact(&mut question).unwrap();
            }
            count += 16;
        }
        (processor_time() - start).as_secs_f64() * 1e6 / f64::from(count)
    }

    /// The same between threads, on four connections: requests a second.
    fn busy_requests(&self) -> f64 {
        let pairs: Vec<_> = (0..4).map(|_| self.pair()).collect();
        let begun = Instant::now();
        std::thread::scope(|scope| {
            let clients: Vec<_> = pairs
                .into_iter()
                .map(|(mut client, mut server)| {
                    scope.spawn(move || {
                        let mut question = [0; QUESTION];
                        while server.read_exact(&mut question).is_ok() {
                            server.write_all(&question).unwrap();
                        }
                    });
                    scope.spawn(move || {
                        let (mut question, mut count) = ([7; QUESTION], 0);
                        while begun.elapsed() < TURN {
                            client.write_all(&question).unwrap();
                            client.read_exact(&mut question).unwrap();
                            count += 1;
                        }
                        count
                    })
                })
                .collect();
            let count: u32 = clients.into_iter().map(|client| client.join().unwrap()).sum();
            f64::from(count) / begun.elapsed().as_secs_f64()
        })
    }

    /// Gigabits a second of one stream whose ends are one thread.
    fn stream(&self) -> f64 {
        let (mut client, mut server) = self.pair();
        server.set_nonblocking(true).unwrap();
        client.set_nonblocking(true).unwrap();
        let (mut buffer, mut carried) = (vec![1; CHUNK], 0);
        let mut one = |turn: Duration| {
            let (begun, start) = (Instant::now(), processor_time());
            carried = 0;
            while begun.elapsed() < turn {
                moved(client.write(&buffer));
                while let received @ 1.. = moved(server.read(&mut buffer)) {
                    carried += received;
                }
            }
            carried as f64 * 8e-9 / (processor_time() - start).as_secs_f64()
        };
        // The window opens.
        one(TURN / 6);
        one(TURN)
    }

    /// The same between two threads.
    fn busy_stream(&self) -> f64 {
        let (mut client, mut server) = self.pair();
        std::thread::scope(|scope| {
            let reader = scope.spawn(move || {
                let mut buffer = vec![0; CHUNK];
                while server.read(&mut buffer).is_ok_and(|length| length > 0) {}
            });
            let buffer = vec![1; CHUNK];
            let mut one = |turn: Duration| {
                let (begun, mut sent) = (Instant::now(), 0);
                while begun.elapsed() < turn {
                    sent += client.write(&buffer).unwrap();
                }
                sent as f64 * 8e-9 / begun.elapsed().as_secs_f64()
            };
            one(TURN / 6);
            let rate = one(TURN);
            drop(client);
            reader.join().unwrap();
            rate
        })
    }
}

/// Of this thread, with what interrupts did in its time: packets that it sent.
fn processor_time() -> Duration {
    let mut spent = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one `timespec`, which `spent` is and which outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut spent) };
    Duration::new(spent.tv_sec as u64, spent.tv_nsec as u32)
}

fn moved(result: std::io::Result<usize>) -> usize {
    match result {
        Ok(length) => length,
        Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
        Err(error) => panic!("{error}"),
    }
}

/// All ways in turn, many times.
pub fn measure(ways: &[Way], rounds: usize) -> Seen {
    let mut seen = Seen::default();
    for _ in 0..rounds {
        for way in ways {
            // Made anew each time: ways that share a server share its port.
            let link = Link::of(way);
            let round = in_netns(&way.from, || {
                drop(link.pair());
                [link.connects(), link.requests(), link.busy_requests(), link.stream(), link.busy_stream()]
            });
            seen.0.entry(way.name).or_default().push(round.unwrap());
        }
    }
    seen
}
