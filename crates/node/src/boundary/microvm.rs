//! The `microvm` boundary: a pod is one virtual machine with a kernel of its own. It is either a whole operating system
//! ([`machines`]: what a VirtualMachine describes, its only container the machine) or containers from images ([`pods`]: an
//! agent of ours is the guest's process 1).

mod asleep;
mod link;
mod log;
mod machines;
mod pods;
mod streams;
mod volumes;

use super::*;
use machines::Machines;
use pods::Pods;

const NAME: &str = "microvm";

pub struct MicrovmBoundary {
    machines: Machines,
    pods: Pods,
}

impl MicrovmBoundary {
    /// `exe` is this program, whose role `vmm` is the monitor; `kvm_cache` a file that lasts until the next boot, in a
    /// directory of root's; pods boot a kernel of `data_dir`.
    pub fn new(exe: PathBuf, kvm_cache: PathBuf, data_dir: PathBuf) -> Self {
        let machines = Machines::new(exe.clone(), kvm_cache.clone());
        MicrovmBoundary { machines, pods: Pods::new(exe, kvm_cache, data_dir) }
    }

    fn of(&self, sandbox: &SandboxSpec) -> &dyn Boundary {
        if sandbox.machine.is_some() { &self.machines } else { &self.pods }
    }
}

#[async_trait]
impl Boundary for MicrovmBoundary {
    fn name(&self) -> &'static str {
        NAME
    }
    fn wants_tap(&self) -> bool {
        true
    }
    fn wants_block_images(&self) -> bool {
        true
    }
    async fn prepare(&self, sandbox: &SandboxSpec) -> Result<()> {
        self.of(sandbox).prepare(sandbox).await
    }
    async fn start(&self, sandbox: &SandboxSpec, container: &ContainerSpec) -> Result<ContainerState> {
        self.of(sandbox).start(sandbox, container).await
    }
    async fn list(&self, sandbox: &SandboxSpec) -> Result<Vec<ContainerState>> {
        self.of(sandbox).list(sandbox).await
    }
    async fn changed(&self, sandbox: &SandboxSpec) -> Result<()> {
        self.of(sandbox).changed(sandbox).await
    }
    async fn signal(&self, sandbox: &SandboxSpec, container: &str, signal: i32) -> Result<()> {
        self.of(sandbox).signal(sandbox, container, signal).await
    }
    async fn remove(&self, sandbox: &SandboxSpec, container: &str) -> Result<()> {
        self.of(sandbox).remove(sandbox, container).await
    }
    async fn exec(&self, sandbox: &SandboxSpec, container: &str, request: ExecRequest) -> Result<Session> {
        self.of(sandbox).exec(sandbox, container, request).await
    }
    async fn attach(&self, sandbox: &SandboxSpec, container: &str, wanted: Wanted) -> Result<Session> {
        self.of(sandbox).attach(sandbox, container, wanted).await
    }
    async fn port_forward(&self, sandbox: &SandboxSpec, port: u16) -> Result<Box<dyn Duplex>> {
        self.of(sandbox).port_forward(sandbox, port).await
    }
    async fn stats(&self, sandbox: &SandboxSpec, container: &str) -> Result<Stats> {
        self.of(sandbox).stats(sandbox, container).await
    }
    async fn pause(&self, sandbox: &SandboxSpec) -> Result<()> {
        self.of(sandbox).pause(sandbox).await
    }
    async fn resume(&self, sandbox: &SandboxSpec) -> Result<()> {
        self.of(sandbox).resume(sandbox).await
    }
    async fn sleep(&self, sandbox: &SandboxSpec, how: Sleep) -> Result<()> {
        self.of(sandbox).sleep(sandbox, how).await
    }
    async fn wake(&self, sandbox: &SandboxSpec) -> Result<()> {
        self.of(sandbox).wake(sandbox).await
    }
    async fn volumes_changed(&self, sandbox: &SandboxSpec) -> Result<()> {
        self.of(sandbox).volumes_changed(sandbox).await
    }
    async fn soft_reboot(&self, sandbox: &SandboxSpec) -> Result<()> {
        self.of(sandbox).soft_reboot(sandbox).await
    }
    async fn machine_stream(&self, sandbox: &SandboxSpec, stream: MachineStream) -> Result<Box<dyn Duplex>> {
        self.of(sandbox).machine_stream(sandbox, stream).await
    }
    async fn destroy(&self, sandbox: &SandboxSpec) -> Result<()> {
        self.of(sandbox).destroy(sandbox).await
    }
}
