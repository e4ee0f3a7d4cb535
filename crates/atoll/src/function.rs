//! `atoll function`: functions from the command line. What it does, `kubectl` could do as well: a function is a Knative
//! Service, and everything here goes through the API by the kubeconfig.

pub(crate) mod api;
mod deploy;
mod lambda;
mod packager;
mod project;
mod watch;

use crate::cli::{DataDir, Failure, Outcome, explain};
use crate::instance::Instance;
use crate::output::{self, Format};
use ::api::object::Meta;
use api::Api;
use clap::{Args, Subcommand};
use http_body_util::Full;
use hyper::Request;
use hyper::body::Bytes;
pub use packager::Packager;
use serde_json::Value;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

const READY: Duration = Duration::from_secs(300);
/// Between two looks at something that is waited for.
pub(crate) const LOOK: Duration = Duration::from_millis(200);

#[derive(Subcommand)]
pub enum Function {
    /// Serve a component: from its file, from a project's directory, or from an image
    #[command(
        after_help = "Examples:\n  atoll function deploy price ./price.wasm --route shop.localhost/price --env TAX=19\n  atoll function deploy price ./project --secret DB_PASSWORD=db/password\n  atoll function deploy greet ./greet.zip --lambda --base 127.0.0.1:5000/lambda/python:3.11 --handler app.handler"
    )]
    Deploy(Deploy),
    /// List functions
    Ls(Wide),
    /// Send a function one request through the gateway and print its answer
    #[command(
        after_help = "Examples:\n  atoll function invoke price --path '/price?sku=teapot'\n  atoll function invoke greet --data '{\"name\":\"Ada\"}' -H 'content-type: application/json'"
    )]
    Invoke(Invoke),
    /// Print what a function wrote: its instances that are gone, then those that run
    Logs {
        #[command(flatten)]
        at: At,
        name: String,
        #[command(flatten)]
        wanted: watch::Wanted,
    },
    /// What functions used since the ledger began
    Usage(Wide),
    /// Remove functions
    Rm {
        #[command(flatten)]
        at: At,
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Write a project that its language's own tools build
    #[command(
        after_help = "Example:\n  atoll function new greet --lang js && greet/build.sh && atoll function deploy greet ./greet"
    )]
    New {
        /// The directory to make
        directory: PathBuf,
        #[arg(long, value_enum)]
        lang: project::Language,
    },
}

/// What a listing is asked for.
#[derive(Args)]
pub struct Wide {
    #[command(flatten)]
    pub at: At,
    /// Of all namespaces
    #[arg(short = 'A', long)]
    pub all_namespaces: bool,
    #[arg(short, long, default_value = "table")]
    pub output: Format,
}

/// Which cloud, which namespace.
#[derive(Args, Clone)]
pub struct At {
    #[command(flatten)]
    pub data: DataDir,
    /// How to reach the API; else the variable KUBECONFIG, else DATA_DIR/kubeconfig
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The kubeconfig's, or `default`, if left out
    #[arg(short, long)]
    namespace: Option<String>,
}

impl At {
    pub(crate) fn api(&self) -> Result<Api, Failure> {
        let variable = std::env::var_os("KUBECONFIG").filter(|path| !path.is_empty()).map(PathBuf::from);
        let path = self.kubeconfig.clone().or(variable).unwrap_or_else(|| self.data.data_dir.join("kubeconfig"));
        Api::open(&path)
    }

    pub(crate) fn namespace(&self, api: &Api) -> String {
        self.namespace.clone().unwrap_or_else(|| api.namespace.clone())
    }
}

#[derive(Args)]
pub struct Deploy {
    #[command(flatten)]
    at: At,
    name: String,
    /// A .wasm file, a project's directory, or an image's name; with --lambda a .zip file or an image's name
    #[arg(value_name = "FILE|DIR|IMAGE")]
    source: String,
    /// Where the gateway serves it, HOST/PATH; may be given several times
    #[arg(long, value_name = "HOST/PATH")]
    route: Vec<String>,
    /// Environment variable; may be given several times
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// All of a Secret's keys, or one, as environment variables
    #[arg(long, value_name = "SECRET|VARIABLE=SECRET/KEY")]
    secret: Vec<String>,
    /// A host that it may send requests to, HOST[:PORT]: a name, *.NAME, an address or a range; may be given several times
    #[arg(long, value_name = "HOST[:PORT]")]
    allow_outbound: Vec<String>,
    /// Memory of one request's instance, such as 64Mi
    #[arg(long)]
    memory: Option<String>,
    /// Seconds until the answer must begin
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u32>,
    /// Requests at once; more wait
    #[arg(long)]
    concurrency: Option<u32>,
    /// Instances kept at least
    #[arg(long)]
    min_scale: Option<u32>,
    /// Instances at most
    #[arg(long)]
    max_scale: Option<u32>,
    /// It speaks Lambda's runtime API: a zip with a `bootstrap`, or an image with a runtime interface client in it
    #[arg(long)]
    lambda: bool,
    /// The image that a zip is put over; without one, its `bootstrap` must need no other file
    #[arg(long, value_name = "IMAGE", requires = "lambda")]
    base: Option<String>,
    /// What the runtime is told to call, such as app.handler
    #[arg(long, requires = "lambda")]
    handler: Option<String>,
    /// What runs it: wasm, container or microvm; wasm if left out, container with --lambda
    #[arg(long, value_parser = ["wasm", "container", "microvm"])]
    boundary: Option<String>,
    /// Host part of the name that a file gets as an image
    #[arg(long, default_value = "127.0.0.1:5000", value_name = "ADDR:PORT")]
    registry: String,
    /// Do not wait until it serves
    #[arg(long)]
    no_wait: bool,
}

#[derive(Args)]
pub struct Invoke {
    #[command(flatten)]
    at: At,
    name: String,
    /// The request's body, @FILE for a file's content, @- for standard input; makes it a POST
    #[arg(short, long)]
    data: Option<String>,
    #[arg(short = 'X', long)]
    method: Option<String>,
    /// Path and query
    #[arg(long, default_value = "/")]
    path: String,
    #[arg(short = 'H', long = "header", value_name = "NAME: VALUE")]
    headers: Vec<String>,
    /// Where the gateway listens; else what the function's URL says, names of .local and .localhost being this machine
    #[arg(long, value_name = "ADDR:PORT")]
    gateway: Option<String>,
    /// Print status and headers of the answer, too
    #[arg(short, long)]
    include: bool,
}

pub fn run(command: Function) -> Outcome {
    let work = async {
        match command {
            Function::Deploy(options) => deploy::run(&options).await,
            Function::Ls(Wide { at, all_namespaces, output }) => list(&at, all_namespaces, output).await,
            Function::Invoke(options) => invoke(&options).await,
            Function::Logs { at, name, wanted } => watch::logs(&at, &name, &wanted).await,
            Function::Usage(Wide { at, all_namespaces, output }) => usage(&at, all_namespaces, output),
            Function::Rm { at, names } => remove(&at, &names).await,
            Function::New { directory, lang } => project::write(&directory, lang),
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(explain)?;
    runtime.block_on(work)
}

fn services(namespace: &str) -> String {
    match namespace {
        "" => "/apis/serving.knative.dev/v1/services".into(),
        namespace => format!("/apis/serving.knative.dev/v1/namespaces/{namespace}/services"),
    }
}

/// Status, reason and message of the condition `Ready`.
fn readiness(service: &Value) -> (&str, &str, &str) {
    let conditions = service.pointer("/status/conditions").and_then(Value::as_array);
    let ready = conditions.into_iter().flatten().find(|c| c.get("type").is_some_and(|t| t == "Ready"));
    ready.map_or(("Unknown", "", ""), |c| (c.str_at("/status"), c.str_at("/reason"), c.str_at("/message")))
}

/// Waits until the given generation serves. Trouble that will not go away by itself ends it at once.
async fn wait_ready(api: &Api, namespace: &str, name: &str, generation: Option<&Value>) -> Result<Value, Failure> {
    let path = format!("{}/{name}", services(namespace));
    let deadline = Instant::now() + READY;
    loop {
        let service = api.get(&path).await?;
        let (status, reason, message) = readiness(&service);
        if service.pointer("/status/observedGeneration") == generation {
            match status {
                "True" => return Ok(service),
                "False" => return Err(Failure(format!("{namespace}/{name} does not serve: {reason}: {message}"))),
                _ => {}
            }
        }
        if Instant::now() > deadline {
            return Err(Failure(format!(
                "{namespace}/{name} does not serve after {READY:?}: {reason}: {message}; kubectl describe ksvc -n {namespace} {name} says more"
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn list(at: &At, all: bool, format: Format) -> Outcome {
    let api = at.api()?;
    let namespace = if all { String::new() } else { at.namespace(&api) };
    let list = api.get(&services(&namespace)).await?;
    let items: Vec<Value> = list.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
    if format != Format::Table {
        output::value(format, &serde_json::json!({ "functions": items }));
        return Ok(());
    }
    let row = |item: &Value| {
        let (ready, reason, _) = readiness(item);
        let boundary = match item.str_at("/spec/template/spec/runtimeClassName") {
            "" => "container",
            named => named,
        };
        [item.str_at("/metadata/namespace"), item.str_at("/metadata/name"), boundary, ready]
            .into_iter()
            .chain([item.str_at("/status/latestReadyRevisionName"), item.str_at("/status/url"), reason])
            .map(str::to_owned)
            .collect()
    };
    let rows: Vec<Vec<String>> = items.iter().map(row).collect();
    output::table(&["NAMESPACE", "NAME", "BOUNDARY", "READY", "REVISION", "URL", "REASON"], &rows);
    Ok(())
}

/// From the ledger on disk, which the node agent writes every few seconds.
fn usage(at: &At, all: bool, format: Format) -> Outcome {
    let instance = Instance::existing(&at.data.data_dir)?;
    let namespace = at.namespace.as_deref().unwrap_or("default");
    let mut ledger = node::boundary::wasm::usage(&instance.data_dir).map_err(explain)?;
    ledger.retain(|name, _| all || name == namespace);
    if format != Format::Table {
        output::value(format, &serde_json::to_value(ledger).map_err(explain)?);
        return Ok(());
    }
    let mut rows: Vec<Vec<String>> = Vec::new();
    for (namespace, accounts) in &ledger {
        for (account, used) in accounts {
            rows.push(vec![
                namespace.clone(),
                account.clone(),
                used.requests.to_string(),
                used.failures.to_string(),
                format!("{:.3}", used.cpu_nanos as f64 / 1e9),
                format!("{:.6}", used.gib_seconds()),
                used.sent_bytes.to_string(),
                used.outbound_requests.to_string(),
                used.outbound_sent_bytes.to_string(),
                used.outbound_received_bytes.to_string(),
            ]);
        }
    }
    let columns = [
        "NAMESPACE",
        "NAME",
        "REQUESTS",
        "FAILED",
        "CPU-SECONDS",
        "GIB-SECONDS",
        "BYTES-SENT",
        "OUTBOUND",
        "OUT-BYTES",
        "IN-BYTES",
    ];
    output::table(&columns, &rows);
    Ok(())
}

async fn remove(at: &At, names: &[String]) -> Outcome {
    let api = at.api()?;
    let namespace = at.namespace(&api);
    for name in names {
        let path = format!("{}/{name}", services(&namespace));
        api.delete(&path).await?;
        while api.get(&path).await.is_ok() {
            tokio::time::sleep(LOOK).await;
        }
        println!("removed {namespace}/{name}");
    }
    Ok(())
}

async fn invoke(options: &Invoke) -> Outcome {
    let api = options.at.api()?;
    let namespace = options.at.namespace(&api);
    let service = api.get(&format!("{}/{}", services(&namespace), options.name)).await?;
    let url = service.str_at("/status/url");
    let Some(host) = url.strip_prefix("http://").map(|rest| rest.trim_end_matches('/')) else {
        let (_, reason, message) = readiness(&service);
        return Err(Failure(format!("{namespace}/{} has no URL yet: {reason}: {message}", options.name)));
    };
    let gateway = options.gateway.clone().unwrap_or_else(|| {
        let (name, port) = host.rsplit_once(':').unwrap_or((host, "80"));
        let here = name.ends_with(".local") || name.ends_with(".localhost");
        format!("{}:{port}", if here { "127.0.0.1" } else { name })
    });
    let body = options.data.as_deref().map(body).transpose()?;
    let method = options.method.as_deref().unwrap_or(if body.is_some() { "POST" } else { "GET" });
    let mut request = Request::builder().method(method).uri(&options.path).header("host", host);
    for header in &options.headers {
        let (name, value) =
            header.split_once(':').ok_or_else(|| Failure(format!("--header {header}: NAME: VALUE is needed")))?;
        request = request.header(name.trim(), value.trim());
    }
    let request = request.body(Full::new(Bytes::from(body.unwrap_or_default()))).map_err(explain)?;
    let response = api::plain(&gateway, request).await?;
    let status = response.status();
    let mut out = Vec::new();
    if options.include {
        out.extend_from_slice(format!("{:?} {status}\n", response.version()).as_bytes());
        for (name, value) in response.headers() {
            out.extend_from_slice(format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes())).as_bytes());
        }
        out.push(b'\n');
    }
    out.extend_from_slice(&api::read(response.into_body()).await?);
    std::io::stdout().write_all(&out).map_err(explain)?;
    match status.is_success() {
        true => Ok(()),
        false => Err(Failure(format!("{namespace}/{} answered {status}", options.name))),
    }
}

fn body(data: &str) -> Result<Vec<u8>, Failure> {
    match data.strip_prefix('@') {
        None => Ok(data.as_bytes().to_vec()),
        Some("-") => {
            let mut bytes = Vec::new();
            std::io::stdin().read_to_end(&mut bytes).map_err(explain)?;
            Ok(bytes)
        }
        Some(file) => std::fs::read(file).map_err(|e| Failure(format!("--data @{file}: {e}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn readiness_is_that_of_the_condition_ready() {
        let service = json!({"status": {"conditions": [{"type": "RoutesReady", "status": "True"},
            {"type": "Ready", "status": "False", "reason": "RevisionFailed", "message": "no"}]}});
        assert_eq!(readiness(&service), ("False", "RevisionFailed", "no"));
        assert_eq!(readiness(&json!({})), ("Unknown", "", ""));
    }
}
