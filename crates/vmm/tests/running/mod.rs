//! A machine that ends with its test, however that ends.

use std::path::{Path, PathBuf};
use vmm::client::{Request, State};
use vmm::{Client, Machine};

pub struct Running {
    pub state: State,
    run_dir: PathBuf,
}

pub fn start(exe: &Path, machine: &Machine) -> Running {
    let state = vmm::launch(exe, machine, |_| Ok(())).unwrap();
    Running { state, run_dir: machine.run_dir.clone() }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Ok(mut client) = Client::connect(&self.run_dir) else { return };
        if client.request(Request::Kill).is_ok() {
            let _ = client.wait();
        }
    }
}
