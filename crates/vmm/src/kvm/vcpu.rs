//! A vCPU's thread, and the gate that pauses and ends them all.

use super::bus::Bus;
use super::seccomp::{self, Role};
use super::{End, sys};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Stop,
}

struct State {
    wanted: Wanted,
    /// Threads that wait here or have ended.
    parked: usize,
}

/// What all vCPUs do: `Run -> Pause -> Run -> ... -> Stop`.
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    pub fn new() -> Self {
        Gate { state: Mutex::new(State { wanted: Wanted::Run, parked: 0 }), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns at once while the machine runs, later if it is paused; false when it ends.
    fn pass(&self) -> bool {
        let mut state = self.lock();
        if state.wanted == Wanted::Run {
            return true;
        }
        state.parked += 1;
        self.changed.notify_all();
        while state.wanted == Wanted::Pause {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let runs = state.wanted == Wanted::Run;
        if runs {
            state.parked -= 1;
        }
        runs
    }

    fn set(&self, wanted: Wanted, threads: &[JoinHandle<()>]) {
        let mut state = self.lock();
        state.wanted = wanted;
        self.changed.notify_all();
        // a wake-up that comes just before KVM_RUN is missed, so it is sent until all have noticed
        while wanted != Wanted::Run && state.parked < threads.len() {
            threads.iter().for_each(sys::wake);
            let waited = self.changed.wait_timeout(state, Duration::from_millis(1));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Returns when no vCPU runs any more.
    pub fn pause(&self, threads: &[JoinHandle<()>]) {
        self.set(Wanted::Pause, threads);
    }

    pub fn is_paused(&self) -> bool {
        self.lock().wanted == Wanted::Pause
    }

    pub fn resume(&self) {
        self.set(Wanted::Run, &[]);
    }

    pub fn stop(&self, threads: &[JoinHandle<()>]) {
        self.set(Wanted::Stop, threads);
    }
}

/// A processor: its thread runs it, and while that waits at the gate the owner looks at it.
pub type Shared = Arc<Mutex<VcpuFd>>;

pub fn lock(vcpu: &Shared) -> MutexGuard<'_, VcpuFd> {
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn start(vcpu: Shared, id: u8, bus: Arc<Bus>, gate: Arc<Gate>) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(format!("vcpu{id}")).stack_size(256 << 10).spawn(move || {
        seccomp::enter(Role::Vcpu);
        while gate.pass() {
            let step = turn(&mut lock(&vcpu), &bus);
            if let Step::End(end) = step {
                bus.ending.end(end);
                // the owner stops all of them; until then this one has nothing to run
                while gate.pass() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                return;
            }
        }
    })
}

/// What an exit of the guest leads to.
enum Step {
    Served,
    Interrupted,
    End(End),
}

/// Completes the instruction that the guest was at when its processor stopped: KVM does that when it is entered again, and
/// what it holds is whole only then. The processor's thread must wait at the gate.
pub fn settle(vcpu: &mut VcpuFd, bus: &Bus) {
    vcpu.set_kvm_immediate_exit(1);
    loop {
        match turn(vcpu, bus) {
            Step::Served => {}
            Step::Interrupted => break,
            Step::End(end) => {
                bus.ending.end(end);
                break;
            }
        }
    }
    vcpu.set_kvm_immediate_exit(0);
}

/// Runs the guest until it needs something.
fn turn(vcpu: &mut VcpuFd, bus: &Bus) -> Step {
    let broken = |what: String| Step::End(End::Broken(what));
    match vcpu.run() {
        Ok(VcpuExit::IoIn(port, data)) => bus.port_in(port, data),
        Ok(VcpuExit::IoOut(port, data)) => bus.port_out(port, data),
        Ok(VcpuExit::MmioRead(address, data)) => bus.read(address, data),
        Ok(VcpuExit::MmioWrite(address, data)) => bus.write(address, data),
        Ok(VcpuExit::Intr) => return Step::Interrupted,
        Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_)) => {}
        Ok(VcpuExit::SystemEvent(kind, _)) if kind == kvm_bindings::KVM_SYSTEM_EVENT_RESET => {
            return Step::End(End::Reset);
        }
        Ok(VcpuExit::SystemEvent(..)) => return Step::End(End::PowerOff),
        Ok(VcpuExit::Shutdown) => {
            let at = vcpu.get_regs().map_or(0, |r| r.rip);
            return broken(format!("a processor shut down (triple fault) at {at:#x}"));
        }
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            return broken(format!("processor {cpu} cannot be entered: hardware reason {reason:#x}"));
        }
        Ok(VcpuExit::InternalError) => {
            let at = vcpu.get_regs().map_or(0, |r| r.rip);
            return broken(format!("KVM cannot emulate the instruction at {at:#x}"));
        }
        Ok(other) => return broken(format!("an exit nobody asked for: {other:?}")),
        Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Step::Interrupted,
        Err(e) => return broken(format!("run: {e}")),
    }
    Step::Served
}
