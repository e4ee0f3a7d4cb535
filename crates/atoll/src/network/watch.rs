//! `atoll network top`, `capture` and `metrics`.

use super::{ask, encoded};
use crate::cli::{Failure, Outcome, explain};
use crate::function::api::Api;
use crate::output::{self, Format};
use ::api::inspect::{Answer, Connection, Frame};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// Flows shown on a terminal.
const SHOWN: usize = 30;
/// A classic pcap file with nanoseconds, version 2.4, of Ethernet frames
/// (<https://www.ietf.org/archive/id/draft-ietf-opsawg-pcap-05.html>).
const MAGIC: u32 = 0xa1b2_3c4d;
const SNAPLEN: u32 = 262_144;
const ETHERNET: u32 = 1;

/// Connections of one client to one port of one server.
#[derive(Default)]
struct Flow {
    connections: u64,
    packets: f64,
    bytes: [f64; 2],
}

type Key = (String, String, String, u16);

pub async fn top(api: &Api, every: u64, turns: Option<u64>, format: Format) -> Outcome {
    let terminal = std::io::stdout().is_terminal();
    let turns = turns.unwrap_or(if terminal { u64::MAX } else { 1 });
    let (mut before, mut since) = (connections(api).await?, Instant::now());
    for _ in 0..turns {
        tokio::time::sleep(Duration::from_secs(every.max(1))).await;
        let now = connections(api).await?;
        let flows = rates(&before, &now, since.elapsed().as_secs_f64());
        (before, since) = (now, Instant::now());
        show(flows, format, terminal)?;
    }
    Ok(())
}

type Connections = HashMap<(String, u16, Key), Connection>;

async fn connections(api: &Api) -> Result<Connections, Failure> {
    let mut all = HashMap::new();
    ask(api, "connections", |answer| {
        if let Answer::Connection(one) = answer {
            let key = (one.from.clone(), one.to.clone(), one.protocol.clone(), one.port);
            all.insert((one.from.clone(), one.from_port, key), one);
        }
        Ok(())
    })
    .await?;
    Ok(all)
}

/// What flows carried a second between two looks; a connection that ended meanwhile no longer counts.
fn rates(before: &Connections, now: &Connections, seconds: f64) -> Vec<(Key, Flow)> {
    let mut flows: BTreeMap<Key, Flow> = BTreeMap::new();
    for (key, connection) in now {
        let earlier = before.get(key);
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
        let flow = flows.entry(key.2.clone()).or_default();
        flow.connections += 1;
        for way in 0..2 {
            flow.packets += rate(connection.packets[way], earlier.map_or(0, |earlier| earlier.packets[way]));
            flow.bytes[way] += rate(connection.bytes[way], earlier.map_or(0, |earlier| earlier.bytes[way]));
        }
    }
    let mut flows: Vec<(Key, Flow)> = flows.into_iter().collect();
    flows.sort_by(|a, b| (b.1.bytes[0] + b.1.bytes[1]).total_cmp(&(a.1.bytes[0] + a.1.bytes[1])));
    flows
}

fn show(flows: Vec<(Key, Flow)>, format: Format, terminal: bool) -> Outcome {
    if format != Format::Table {
        let one = |((from, to, protocol, port), flow): (Key, Flow)| {
            json!({"from": from, "to": to, "protocol": protocol, "port": port, "connections": flow.connections,
                "packetsPerSecond": flow.packets, "bytesPerSecondThere": flow.bytes[0], "bytesPerSecondBack": flow.bytes[1]})
        };
        let all: serde_json::Value = flows.into_iter().map(one).collect();
        return written(writeln!(std::io::stdout(), "{all}"));
    }
    let most = if terminal { SHOWN } else { usize::MAX };
    let row = |((from, to, protocol, port), flow): (Key, Flow)| {
        let port = if port == 0 { protocol } else { format!("{protocol}/{port}") };
        let number = |n: f64| format!("{n:.0}");
        vec![
            from,
            to,
            port,
            flow.connections.to_string(),
            number(flow.packets),
            number(flow.bytes[0]),
            number(flow.bytes[1]),
        ]
    };
    let rows: Vec<Vec<String>> = flows.into_iter().take(most).map(row).collect();
    if terminal {
        print!("\x1b[H\x1b[J");
    }
    output::table(&["FROM", "TO", "PORT", "CONNECTIONS", "PACKETS/S", "BYTES/S OUT", "BYTES/S BACK"], &rows);
    Ok(())
}

pub async fn metrics(api: &Api) -> Outcome {
    api.lines("/metrics", |line| {
        let mut out = std::io::stdout().lock();
        written(out.write_all(line).and_then(|()| out.write_all(b"\n")))
    })
    .await
}

/// Which frames.
pub struct Wanted<'a> {
    pub namespace: &'a str,
    pub pod: &'a str,
    pub port: Option<u16>,
    pub count: Option<u64>,
}

pub async fn capture(api: &Api, wanted: Wanted<'_>, file: &Path) -> Outcome {
    let mut out: Box<dyn Write> = match file.to_str() {
        Some("-") => Box::new(std::io::stdout()),
        _ => {
            let opened = std::fs::File::create(file);
            Box::new(opened.map_err(|error| Failure(format!("{}: {error}", file.display())))?)
        }
    };
    let Wanted { namespace, pod, port, count } = wanted;
    let mut path = format!("namespaces/{}/pods/{}/capture?", encoded(namespace), encoded(pod));
    path.extend(port.map(|port| format!("port={port}&")));
    path.extend(count.map(|count| format!("count={count}")));
    let mut frames = 0u64;
    ask(api, &path, |answer| match answer {
        Answer::Capturing => {
            eprintln!("capturing; end with Ctrl-C");
            written(out.write_all(&header()).and_then(|()| out.flush()))
        }
        Answer::Frame(frame) => {
            frames += 1;
            written(out.write_all(&record(&frame).map_err(explain)?).and_then(|()| out.flush()))
        }
        _ => Ok(()),
    })
    .await?;
    eprintln!("{frames} frames");
    Ok(())
}

fn header() -> Vec<u8> {
    let mut bytes = MAGIC.to_le_bytes().to_vec();
    bytes.extend(2u16.to_le_bytes());
    bytes.extend(4u16.to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend(SNAPLEN.to_le_bytes());
    bytes.extend(ETHERNET.to_le_bytes());
    bytes
}

fn record(frame: &Frame) -> Result<Vec<u8>, base64::DecodeError> {
    let packet = STANDARD.decode(&frame.bytes)?;
    let length = u32::try_from(packet.len()).unwrap_or(u32::MAX);
    let seconds = u32::try_from(frame.at / 1_000_000_000).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(packet.len() + 16);
    for field in [seconds, (frame.at % 1_000_000_000) as u32, length, length] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend(packet);
    Ok(bytes)
}

/// Whoever read it has seen enough.
fn written(result: std::io::Result<()>) -> Outcome {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => other.map_err(explain),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(from_port: u16, packets: u64) -> Connections {
        let key: Key = ("shop/web".into(), "shop/db".into(), "tcp".into(), 5432);
        let one = Connection {
            from: key.0.clone(),
            from_port,
            to: key.1.clone(),
            port: 5432,
            protocol: key.2.clone(),
            packets: [packets, packets],
            bytes: [packets * 100, packets * 10],
        };
        HashMap::from([((key.0.clone(), from_port, key), one)])
    }

    #[test]
    fn rates_are_between_two_looks() {
        let mut now = connection(1, 30);
        now.extend(connection(2, 4));
        let flows = rates(&connection(1, 10), &now, 2.0);
        assert_eq!(flows.len(), 1);
        let flow = &flows[0].1;
        assert_eq!((flow.connections, flow.packets, flow.bytes), (2, 24.0, [1200.0, 120.0]));
        // Counters that start again, as after a conntrack flush, are no negative rate.
        assert_eq!(rates(&connection(1, 10), &connection(1, 3), 1.0)[0].1.packets, 0.0);
    }

    #[test]
    fn records_are_what_pcap_says() {
        let frame = Frame { at: 1_500_000_000_000_000_007, bytes: STANDARD.encode(b"frame") };
        let record = record(&frame).unwrap();
        assert_eq!(record[..4], 1_500_000_000u32.to_le_bytes());
        assert_eq!(record[4..8], 7u32.to_le_bytes());
        assert_eq!((&record[8..12], &record[16..]), (&5u32.to_le_bytes()[..], &b"frame"[..]));
        assert_eq!(header().len(), 24);
    }
}
