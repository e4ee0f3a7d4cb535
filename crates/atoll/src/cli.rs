//! What the command line takes.

use crate::output::Format;
use clap::{Args, Parser, Subcommand};
use std::net::SocketAddr;
use std::path::PathBuf;

/// What went wrong, said once, with the chain of causes.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Failure(pub String);

pub type Outcome = Result<(), Failure>;

/// An error and its causes on one line.
pub fn explain(error: impl std::error::Error) -> Failure {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let said = inner.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        source = inner.source();
    }
    Failure(text)
}

#[derive(Parser)]
#[command(name = "atoll", version, about = "A private cloud in one binary", long_about = None)]
#[command(
    after_help = "Example:\n  atoll up &\n  export KUBECONFIG=/var/lib/atoll/kubeconfig\n  kubectl apply -f app.yaml"
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the cloud: API, controllers, node agent, registry and gateway in one process
    #[command(after_help = "Example:\n  atoll up --data-dir /srv/atoll --gateway-addr 0.0.0.0:80")]
    Up(Box<Up>),
    /// Stop the cloud and every workload
    #[command(after_help = "Example:\n  atoll down --data-dir /srv/atoll")]
    Down(DataDir),
    /// Say what this machine offers and what follows for each boundary
    #[command(after_help = "Example:\n  atoll doctor -o json")]
    Doctor {
        #[command(flatten)]
        data: DataDir,
        #[arg(short, long, default_value = "table")]
        output: Format,
    },
    /// The OCI runtime, with runc's commands and flags: atoll oci help lists them
    #[command(disable_help_flag = true)]
    Oci {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Images in the local store
    #[command(subcommand)]
    Image(crate::images::Image),
    /// Kernels for pods with `runtimeClassName: microvm`
    #[command(subcommand)]
    Kernel(crate::kernel::Kernel),
    /// The virtual network: why a connection passes or not, what was refused
    #[command(subcommand)]
    Network(crate::network::Network),
    /// Functions: serve a component, call it, read its log
    #[command(subcommand)]
    Function(crate::function::Function),
    /// Virtual machines: list, start, stop, restart, pause, console
    #[command(subcommand)]
    Vm(crate::vm::Vm),
}

#[derive(Args, Clone)]
pub struct DataDir {
    /// Where everything is kept
    #[arg(long, default_value = "/var/lib/atoll", value_name = "DIR")]
    pub data_dir: PathBuf,
}

#[derive(Args, Clone)]
pub struct Up {
    #[command(flatten)]
    pub data: DataDir,
    /// The Kubernetes API (TLS)
    #[arg(long, default_value = "127.0.0.1:7443", value_name = "ADDR:PORT")]
    pub api_addr: SocketAddr,
    /// The HTTP gateway
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "ADDR:PORT")]
    pub gateway_addr: SocketAddr,
    /// The gateway for HTTPS and TLS listeners
    #[arg(long, default_value = "127.0.0.1:8443", value_name = "ADDR:PORT")]
    pub gateway_tls_addr: SocketAddr,
    /// Client connections to the gateway begin with a PROXY protocol header (a load balancer is in front)
    #[arg(long)]
    pub gateway_proxy_protocol: bool,
    /// A line for each request at the gateway goes to this file, `-` for standard output
    #[arg(long, value_name = "FILE")]
    pub gateway_access_log: Option<PathBuf>,
    /// How those lines are written
    #[arg(long, default_value = "json", value_parser = ["json", "common"], value_name = "json|common")]
    pub gateway_access_format: String,
    /// The gateway's counters for Prometheus, at /metrics
    #[arg(long, value_name = "ADDR:PORT")]
    pub gateway_metrics_addr: Option<SocketAddr>,
    /// Lambda's Invoke API, for AWS' clients and their signatures; not served without it
    #[arg(long, value_name = "ADDR:PORT")]
    pub invoke_addr: Option<SocketAddr>,
    /// CloudEvents for brokers are taken at this address; one that other machines reach needs --events-token
    #[arg(long, value_name = "ADDR:PORT")]
    pub events_addr: Option<SocketAddr>,
    /// Whoever sends events there has to know the token in this file (authorization: Bearer TOKEN)
    #[arg(long, value_name = "FILE", requires = "events_addr")]
    pub events_token: Option<PathBuf>,
    /// Where spans of invocations go: an OpenTelemetry collector that takes OTLP over HTTP
    #[arg(long, value_name = "http://HOST[:PORT]", value_parser = spans::Collector::parse)]
    pub otlp_endpoint: Option<spans::Collector>,
    /// The image registry
    #[arg(long, default_value = "127.0.0.1:5000", value_name = "ADDR:PORT")]
    pub registry_addr: SocketAddr,
    /// Tags that may be set once and never moved or deleted; `*` stands for any characters; may be repeated
    #[arg(long, value_name = "REPOSITORY:TAG")]
    pub registry_immutable: Vec<String>,
    /// Largest blob that the registry takes
    #[arg(long, default_value = "1Ti", value_name = "SIZE")]
    pub registry_max_blob: String,
    /// Blobs that the registry receives at once; more wait
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub registry_max_uploads: u16,
    /// Pods' images of a registry are asked for here first: HOST=MIRROR[/PREFIX]; may be repeated, the first is asked first
    #[arg(long, value_name = "HOST=MIRROR")]
    pub pull_mirror: Vec<String>,
    /// Credentials for pods' images besides imagePullSecrets, as docker keeps them; default: ~/.docker/config.json
    #[arg(long, value_name = "FILE")]
    pub pull_authfile: Option<PathBuf>,
    /// A registry that pods' images are pulled from without TLS; loopback needs no mention; may be repeated
    #[arg(long, value_name = "HOST[:PORT]")]
    pub pull_insecure: Vec<String>,
    /// PEM certificates of registries trusted besides the system's
    #[arg(long, value_name = "FILE")]
    pub pull_ca: Option<PathBuf>,
    /// This machine's name as a Node; the host name if left out
    #[arg(long, value_name = "NAME")]
    pub node_name: Option<String>,
    /// What holds where no NetworkPolicy does: a namespace is private, or everyone reaches everyone as in Kubernetes
    #[arg(long, default_value = "private", value_name = "DEFAULT")]
    pub network_default: NetworkDefault,
    /// How workloads that a policy lets out get out: not at all, with an address of the host, with their own, or through a
    /// process that connects for them and needs nothing of the host's
    #[arg(long, default_value = "none", value_name = "none|nat|routed|user")]
    pub egress: Egress,
    /// Connections that one workload may have open, and may open in a second; from 64 to 1048576
    #[arg(long, default_value_t = 16_384, value_name = "N", value_parser = clap::value_parser!(u32).range(64..=1_048_576))]
    pub workload_connections: u32,
    /// What snapshots of machines may take on disk, images aside
    #[arg(long, default_value = "32Gi", value_name = "SIZE")]
    pub snapshot_space: String,
    /// Servers that are asked for names outside, at most three [default: those of the host's /etc/resolv.conf]
    #[arg(long, value_delimiter = ',', value_name = "ADDRESS[,ADDRESS]")]
    pub dns_servers: Vec<std::net::IpAddr>,
    #[command(flatten)]
    pub networks: crate::networks::Networks,
    #[command(flatten)]
    pub exposed: crate::exposed::Exposed,
    #[command(flatten)]
    pub budget: crate::images::Budget,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Egress {
    None,
    Nat,
    Routed,
    User,
}

impl From<Egress> for network::Egress {
    fn from(egress: Egress) -> Self {
        match egress {
            Egress::None => network::Egress::None,
            Egress::Nat => network::Egress::Nat,
            Egress::Routed => network::Egress::Routed,
            Egress::User => network::Egress::User,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum NetworkDefault {
    Private,
    Open,
}

impl From<NetworkDefault> for network::Isolation {
    fn from(default: NetworkDefault) -> Self {
        match default {
            NetworkDefault::Private => network::Isolation::Private,
            NetworkDefault::Open => network::Isolation::Open,
        }
    }
}

pub fn run(cli: Cli) -> Outcome {
    match cli.command {
        Command::Up(options) => crate::up::run(&options),
        Command::Down(data) => crate::down::run(&data.data_dir),
        Command::Doctor { data, output } => crate::doctor::run(&data.data_dir, output),
        // The role is taken before; this is for the list of commands.
        Command::Oci { args } => std::process::exit(container::oci::main(&args)),
        Command::Image(command) => crate::images::run(command),
        Command::Kernel(command) => crate::kernel::run(command),
        Command::Network(command) => crate::network::run(command),
        Command::Function(command) => crate::function::run(command),
        Command::Vm(command) => crate::vm::run(command),
    }
}
