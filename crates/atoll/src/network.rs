//! `atoll network`: asks the running `atoll up` whether and why a connection passes, what was refused, and what flows.

mod watch;

use crate::cli::{DataDir, Failure, Outcome, explain};
use crate::instance::Instance;
use crate::output::{self, Format};
use clap::{Subcommand, ValueEnum};
use node::policy::inspect::{Answer, Explained, Question, SOCKET, Told};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

#[derive(Subcommand)]
pub enum Network {
    /// Say whether a connection passes, and which rule decides
    #[command(
        after_help = "Workloads are NAMESPACE/POD, svc/NAMESPACE/NAME, node, an address, or a name. Exit code 2: refused.\n\n\
                      Examples:\n  atoll network explain shop/catalog-7d9f shop/orders-x2x --port 5432\n  \
                      atoll network explain shop/catalog-7d9f api.example.org --port 443"
    )]
    Explain {
        #[command(flatten)]
        data: DataDir,
        from: String,
        to: String,
        /// Destination port
        #[arg(long)]
        port: Option<u16>,
        #[arg(long, default_value = "tcp")]
        protocol: Protocol,
        #[arg(short, long, default_value = "table")]
        output: Format,
    },
    /// Show refused connections, newest last
    #[command(after_help = "Example:\n  atoll network log --follow")]
    Log {
        #[command(flatten)]
        data: DataDir,
        /// Go on as more are refused
        #[arg(short, long)]
        follow: bool,
        #[arg(short, long, default_value = "table")]
        output: Format,
    },
    /// Show what flows between workloads, most first
    #[command(
        after_help = "Counting begins with the first look; connections that were open before have no counters.\n\n\
                      Example:\n  atoll network top --turns 1 -o json"
    )]
    Top {
        #[command(flatten)]
        data: DataDir,
        /// Seconds between two looks
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
        every: u64,
        /// How often it is shown; on a terminal until ended, else once
        #[arg(long)]
        turns: Option<u64>,
        #[arg(short, long, default_value = "table")]
        output: Format,
    },
    /// Write a workload's packets into a file for tcpdump or wireshark
    #[command(after_help = "Example:\n  atoll network capture shop/orders-x2x -w orders.pcap --port 5432 --count 100")]
    Capture {
        #[command(flatten)]
        data: DataDir,
        /// NAMESPACE/POD
        pod: String,
        /// The file; `-` for standard output
        #[arg(short, long)]
        write: std::path::PathBuf,
        /// Only packets with this source or destination port
        #[arg(long)]
        port: Option<u16>,
        /// End after so many
        #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
    },
    /// Print the network's counters in Prometheus' text format
    #[command(
        after_help = "For node_exporter's textfile collector:\n  atoll network metrics > /var/lib/node_exporter/atoll.prom"
    )]
    Metrics {
        #[command(flatten)]
        data: DataDir,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
    Icmp,
}

pub fn run(command: Network) -> Outcome {
    match command {
        Network::Explain { data, from, to, port, protocol, output } => {
            if port.is_none() && !matches!(protocol, Protocol::Icmp) {
                return Err(Failure("network explain: --port: name the port that is connected to".into()));
            }
            let protocol = match protocol {
                Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
                Protocol::Sctp => "sctp",
                Protocol::Icmp => "icmp",
            };
            let question = Question::Explain { from, to, protocol: protocol.into(), port };
            let mut all = Vec::new();
            ask(&data, &question, |answer| {
                match answer {
                    Answer::Explained(one) => all.push(one),
                    Answer::Error(error) => return Err(Failure(format!("network explain: {error}"))),
                    _ => {}
                }
                Ok(())
            })?;
            tell(&all, output)
        }
        Network::Log { data, follow, output } => ask(&data, &Question::Log { follow }, |answer| match answer {
            Answer::Refused(told) => line(&told, output),
            Answer::Error(error) => Err(Failure(format!("network log: {error}"))),
            _ => Ok(()),
        }),
        Network::Top { data, every, turns, output } => watch::top(&data, every, turns, output),
        Network::Capture { data, pod, write, port, count } => watch::capture(&data, pod, &write, port, count),
        Network::Metrics { data } => watch::metrics(&data),
    }
}

fn ask(data: &DataDir, question: &Question, mut each: impl FnMut(Answer) -> Outcome) -> Outcome {
    let instance = Instance::existing(&data.data_dir)?;
    let path = instance.run_dir.join(SOCKET);
    let mut stream = UnixStream::connect(&path).map_err(|error| {
        Failure(format!("network: {}: {error}: it takes root and a running `atoll up`", path.display()))
    })?;
    let question = serde_json::to_string(question).map_err(explain)?;
    writeln!(stream, "{question}").map_err(explain)?;
    for line in BufReader::new(stream).lines() {
        each(serde_json::from_str(&line.map_err(explain)?).map_err(explain)?)?;
    }
    Ok(())
}

fn tell(all: &[Explained], format: Format) -> Outcome {
    if format == Format::Table {
        for one in all {
            let port = one.port.map_or_else(String::new, |port| format!("/{port}"));
            let verdict = if one.allowed { "passes" } else { "is refused" };
            println!("{}{port} from {} to {} {verdict}", one.protocol, one.from, one.to);
            println!("  out: {}", one.egress);
            println!("  in:  {}", one.ingress);
        }
    } else {
        output::value(format, &serde_json::to_value(all).map_err(explain)?);
    }
    // For scripts: some way that the connection may go is closed.
    if all.iter().any(|one| !one.allowed) {
        std::process::exit(2);
    }
    Ok(())
}

fn line(told: &Told, format: Format) -> Outcome {
    let mut out = std::io::stdout().lock();
    let written = if format == Format::Table {
        let at = api::time::rfc3339(i64::try_from(told.at / 1000).unwrap_or(i64::MAX));
        let port = if told.port == 0 { String::new() } else { format!("/{}", told.port) };
        writeln!(out, "{at}  {}{port}  {} -> {}  {}", told.protocol, told.from, told.to, told.why)
    } else {
        writeln!(out, "{}", serde_json::to_string(told).map_err(explain)?)
    };
    // Whoever read it has seen enough.
    written.or_else(|error| if error.kind() == std::io::ErrorKind::BrokenPipe { Ok(()) } else { Err(explain(error)) })
}
