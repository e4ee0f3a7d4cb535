//! `atoll vm vnc`: a machine's screen on a TCP port of this computer.

use super::console;
use crate::cli::{Failure, Outcome, explain};
use crate::function::At;
use clap::Args;
use std::io::copy;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(Args)]
pub struct Vnc {
    #[command(flatten)]
    at: At,
    name: String,
    /// Start no viewer: print the port and pass its connections on until Ctrl-C
    #[arg(long)]
    proxy_only: bool,
    /// The port on 127.0.0.1; a free one if left out
    #[arg(long, default_value_t = 0, value_name = "PORT")]
    port: u16,
}

/// Viewers that take an address; the first that is installed is started.
const VIEWERS: [(&str, &str); 3] = [("remote-viewer", "vnc://"), ("vncviewer", ""), ("xtigervncviewer", "")];

impl Vnc {
    pub async fn run(self) -> Outcome {
        let run_dir = console::run_dir(&self.at, &self.name).await?;
        // Whether it has a screen is said now, not to a viewer.
        drop(vmm::Client::connect(&run_dir).and_then(vmm::Client::display).map_err(explain)?);
        let listener =
            TcpListener::bind(("127.0.0.1", self.port)).map_err(|e| Failure(format!("--port {}: {e}", self.port)))?;
        let port = listener.local_addr().map_err(explain)?.port();
        if self.proxy_only {
            println!("{{\"port\":{port}}}");
            serve(&listener, &run_dir);
            return Ok(());
        }
        let installed = |name: &str| {
            let path = std::env::var_os("PATH").unwrap_or_default();
            std::env::split_paths(&path).any(|dir| dir.join(name).exists())
        };
        let Some((viewer, scheme)) = VIEWERS.iter().find(|(name, _)| installed(name)) else {
            let names: Vec<&str> = VIEWERS.iter().map(|(name, _)| *name).collect();
            return Err(Failure(format!("no viewer here ({}); use --proxy-only", names.join(", "))));
        };
        std::thread::spawn(move || serve(&listener, &run_dir));
        let status = Command::new(viewer).arg(format!("{scheme}127.0.0.1:{port}")).status().map_err(explain)?;
        if status.success() { Ok(()) } else { Err(Failure(format!("{viewer}: {status}"))) }
    }
}

fn serve(listener: &TcpListener, run_dir: &Path) {
    for stream in listener.incoming().flatten() {
        let run_dir = run_dir.to_owned();
        std::thread::spawn(move || {
            if let Err(error) = relay(stream, run_dir) {
                eprintln!("{error}");
            }
        });
    }
}

fn relay(viewer: TcpStream, run_dir: PathBuf) -> Result<(), String> {
    let display = vmm::Client::connect(&run_dir).and_then(vmm::Client::display).map_err(|e| e.to_string())?;
    let say = |e: std::io::Error| e.to_string();
    let (mut from, mut to) = (viewer.try_clone().map_err(say)?, display.try_clone().map_err(say)?);
    let typed = std::thread::spawn(move || {
        let _ = copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Both);
    });
    let _ = copy(&mut &display, &mut &viewer);
    let _ = viewer.shutdown(Shutdown::Both);
    let _ = typed.join();
    Ok(())
}
