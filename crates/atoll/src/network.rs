//! `atoll network`: asks the API whether and why a connection passes, what was refused, and what flows.

mod watch;

use crate::cli::{Failure, Outcome, explain};
use crate::function::At;
use crate::function::api::Api;
use crate::output::{self, Format};
use ::api::inspect::{Answer, Explained, GROUP, Told, VERSION};
use clap::{Subcommand, ValueEnum};
use std::io::Write;

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
        at: At,
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
        at: At,
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
        at: At,
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
        at: At,
        /// POD, or NAMESPACE/POD
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
        at: At,
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
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(explain)?;
    let named = |command: &str| {
        let command = command.to_owned();
        move |Failure(why): Failure| Failure(format!("network {command}: {why}"))
    };
    runtime.block_on(async {
        match command {
            Network::Explain { at, from, to, port, protocol, output } => {
                let all = explained(&at.api()?, (&from, &to, protocol, port)).await.map_err(named("explain"))?;
                tell(&all, output)
            }
            Network::Log { at, follow, output } => {
                let show = |answer| if let Answer::Refused(told) = answer { line(&told, output) } else { Ok(()) };
                ask(&at.api()?, &format!("refusals?follow={follow}"), show).await.map_err(named("log"))
            }
            Network::Top { at, every, turns, output } => {
                watch::top(&at.api()?, every, turns, output).await.map_err(named("top"))
            }
            Network::Capture { at, pod, write, port, count } => {
                let api = at.api()?;
                let namespace = at.namespace(&api);
                let (namespace, pod) = pod.split_once('/').unwrap_or((&namespace, &pod));
                let wanted = watch::Wanted { namespace, pod, port, count };
                watch::capture(&api, wanted, &write).await.map_err(named("capture"))
            }
            Network::Metrics { at } => watch::metrics(&at.api()?).await.map_err(named("metrics")),
        }
    })
}

async fn explained(
    api: &Api,
    (from, to, protocol, port): (&str, &str, Protocol, Option<u16>),
) -> Result<Vec<Explained>, Failure> {
    if port.is_none() && !matches!(protocol, Protocol::Icmp) {
        return Err(Failure("--port: name the port that is connected to".into()));
    }
    let protocol = match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
        Protocol::Icmp => "icmp",
    };
    let port = port.map_or_else(String::new, |port| format!("&port={port}"));
    let path = format!("explanations?from={}&to={}&protocol={protocol}{port}", encoded(from), encoded(to));
    let mut all = Vec::new();
    ask(api, &path, |answer| {
        if let Answer::Explained(one) = answer {
            all.push(one);
        }
        Ok(())
    })
    .await?;
    Ok(all)
}

/// Asks the API, with what the kubeconfig says, and hands on its answers as they come.
async fn ask(api: &Api, path: &str, mut each: impl FnMut(Answer) -> Outcome) -> Outcome {
    let path = format!("/apis/{GROUP}/{VERSION}/{path}");
    api.lines(&path, |line| match serde_json::from_slice(line).map_err(explain)? {
        Answer::Error(error) => Err(Failure(error)),
        answer => each(answer),
    })
    .await
}

fn encoded(text: &str) -> impl std::fmt::Display {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC)
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
        let at = ::api::time::rfc3339(i64::try_from(told.at / 1000).unwrap_or(i64::MAX));
        let port = if told.port == 0 { String::new() } else { format!("/{}", told.port) };
        writeln!(out, "{at}  {}{port}  {} -> {}  {}", told.protocol, told.from, told.to, told.why)
    } else {
        writeln!(out, "{}", serde_json::to_string(told).map_err(explain)?)
    };
    // Whoever read it has seen enough.
    written.or_else(|error| if error.kind() == std::io::ErrorKind::BrokenPipe { Ok(()) } else { Err(explain(error)) })
}
