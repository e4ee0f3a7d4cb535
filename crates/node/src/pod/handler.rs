//! What probes and lifecycle hooks do: run a command in the container, fetch a URL, connect, ask gRPC, sleep.

use crate::boundary::{Boundary, ExecRequest, SandboxSpec};
use crate::net_probe::{self, HttpGet};
use api::k8s::api::core::v1::{Container, HTTPGetAction, LifecycleHandler, Probe};
use api::k8s::apimachinery::pkg::util::intstr::IntOrString;
use api::streams::{Exit, Wanted};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncReadExt;

const OUTPUT_LIMIT: u64 = 10 << 10;

/// Where an action takes place.
#[derive(Clone)]
pub(crate) struct Place {
    pub boundary: Arc<dyn Boundary>,
    pub sandbox: Arc<SandboxSpec>,
    pub container: Arc<Container>,
}

#[derive(Clone, Debug)]
pub(crate) enum Action {
    Exec(Vec<String>),
    Http(HttpGet),
    Tcp { host: String, port: u16 },
    Grpc { port: u16, service: String },
    Sleep(Duration),
}

impl Place {
    fn address(&self) -> String {
        self.sandbox.network.address.map(|a| a.to_string()).unwrap_or_else(|| "127.0.0.1".into())
    }

    fn port(&self, port: &IntOrString) -> Result<u16, String> {
        let number = match port {
            IntOrString::Int(number) => i64::from(*number),
            IntOrString::String(name) => {
                let named = self.container.ports.iter().flatten().find(|p| p.name.as_deref() == Some(name));
                match named {
                    Some(port) => i64::from(port.container_port),
                    None => {
                        name.parse().map_err(|_| format!("couldn't find port \"{name}\" in the container's ports"))?
                    }
                }
            }
        };
        u16::try_from(number).ok().filter(|p| *p > 0).ok_or_else(|| format!("invalid port number: {number}"))
    }

    fn http(&self, get: &HTTPGetAction) -> Result<Action, String> {
        let path = get.path.as_deref().unwrap_or("/");
        let headers = get.http_headers.iter().flatten().map(|h| (h.name.clone(), h.value.clone())).collect();
        Ok(Action::Http(HttpGet {
            tls: get.scheme.as_deref().is_some_and(|s| s.eq_ignore_ascii_case("https")),
            host: get.host.clone().filter(|h| !h.is_empty()).unwrap_or_else(|| self.address()),
            port: self.port(&get.port)?,
            path: if path.starts_with('/') { path.to_owned() } else { format!("/{path}") },
            headers,
        }))
    }

    pub fn probe(&self, probe: &Probe) -> Result<Action, String> {
        if let Some(exec) = &probe.exec {
            Ok(Action::Exec(exec.command.clone().unwrap_or_default()))
        } else if let Some(get) = &probe.http_get {
            self.http(get)
        } else if let Some(tcp) = &probe.tcp_socket {
            let host = tcp.host.clone().filter(|h| !h.is_empty()).unwrap_or_else(|| self.address());
            Ok(Action::Tcp { host, port: self.port(&tcp.port)? })
        } else if let Some(grpc) = &probe.grpc {
            let port = self.port(&IntOrString::Int(grpc.port))?;
            Ok(Action::Grpc { port, service: grpc.service.clone().unwrap_or_default() })
        } else {
            Err("missing probe handler".into())
        }
    }

    pub fn hook(&self, handler: &LifecycleHandler) -> Result<Action, String> {
        if let Some(exec) = &handler.exec {
            Ok(Action::Exec(exec.command.clone().unwrap_or_default()))
        } else if let Some(get) = &handler.http_get {
            self.http(get)
        } else if let Some(sleep) = &handler.sleep {
            Ok(Action::Sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))))
        } else {
            Err("invalid handler: none of exec, httpGet and sleep is given".into())
        }
    }

    /// The error is what the user reads.
    pub async fn run(&self, action: &Action) -> Result<(), String> {
        match action {
            Action::Exec(command) => self.exec(command).await,
            Action::Http(get) => net_probe::http(get).await,
            Action::Tcp { host, port } => net_probe::tcp(host, *port).await,
            Action::Grpc { port, service } => net_probe::grpc(&self.address(), *port, service).await,
            Action::Sleep(time) => {
                tokio::time::sleep(*time).await;
                Ok(())
            }
        }
    }

    async fn exec(&self, command: &[String]) -> Result<(), String> {
        let wanted = Wanted { stdout: true, stderr: true, ..Wanted::default() };
        let request = ExecRequest { command: command.to_vec(), env: Vec::new(), wanted };
        let session =
            self.boundary.exec(&self.sandbox, &self.container.name, request).await.map_err(|e| e.to_string())?;
        let mut output = Vec::new();
        let mut errors = Vec::new();
        let (stdout, stderr, exit) = (session.stdout, session.stderr, session.exit);
        let out = async {
            if let Some(stream) = stdout {
                read_some(stream, &mut output).await;
            }
        };
        let err = async {
            if let Some(stream) = stderr {
                read_some(stream, &mut errors).await;
            }
        };
        let (exit, (), ()) = tokio::join!(exit, out, err);
        output.extend(errors);
        let text = String::from_utf8_lossy(&output).trim_end().to_owned();
        match exit {
            Ok(Exit::Code(0)) => Ok(()),
            Ok(Exit::Code(code)) if text.is_empty() => Err(format!("command exited with code {code}")),
            Ok(Exit::Code(_)) => Err(text),
            Ok(Exit::Failed(why)) => Err(why),
            Err(_) => Err("the container went away".into()),
        }
    }
}

/// Keeps the beginning; reads the rest too, so that the command is not held up.
async fn read_some(mut stream: api::streams::Output, into: &mut Vec<u8>) {
    let _ = (&mut stream).take(OUTPUT_LIMIT).read_to_end(into).await;
    let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
}
