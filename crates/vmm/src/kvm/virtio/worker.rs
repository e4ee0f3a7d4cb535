//! The thread of a device whose driver is ready: it sleeps until a queue is kicked or the host has something.

use super::Device;
use super::queue::{self, Chain};
use crate::kvm::memory::Memory;
use crate::kvm::seccomp::{self, Role};
use crate::kvm::sys::Signal;
use crate::kvm::{End, Ending, Fault};
use rustix::event::epoll;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use virtio_queue::{Queue, QueueT};

const USED: u32 = 1;
const CONFIG: u32 = 2;

/// A device's interrupt: the status its driver reads, and the line.
pub struct Interrupt {
    pub status: AtomicU32,
    pub line: Signal,
}

impl Interrupt {
    fn raise(&self, why: u32) {
        self.status.fetch_or(why, Ordering::SeqCst);
        let _ = self.line.raise();
    }
    pub fn used(&self) {
        self.raise(USED);
    }
    pub fn config(&self) {
        self.raise(CONFIG);
    }
}

/// The configuration space.
pub struct Config {
    pub bytes: Mutex<Vec<u8>>,
    pub generation: AtomicU32,
}

impl Config {
    pub fn lock(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a device works on.
pub struct Io {
    pub memory: Memory,
    pub queues: Vec<Queue>,
    pub interrupt: Arc<Interrupt>,
    pub config: Arc<Config>,
}

impl Io {
    fn queue(&mut self, index: usize) -> Result<&mut Queue, Fault> {
        self.queues.get_mut(index).ok_or_else(|| Fault(format!("there is no queue {index}")))
    }

    /// The next request; none from a queue that the driver did not set up.
    pub fn take(&mut self, index: usize) -> Result<Option<Chain>, Fault> {
        let memory = self.memory.clone();
        let queue = self.queue(index)?;
        if queue.ready() { queue::take(queue, &memory) } else { Ok(None) }
    }

    /// Puts the request just taken back: the next `take` returns it again.
    pub fn untake(&mut self, index: usize) -> Result<(), Fault> {
        let queue = self.queue(index)?;
        queue.set_next_avail(queue.next_avail().wrapping_sub(1));
        Ok(())
    }

    /// Gives a request back with `written` bytes in it.
    pub fn finish(&mut self, index: usize, head: u16, written: u32) -> Result<(), Fault> {
        let memory = self.memory.clone();
        self.queue(index)?.add_used(&memory, head, written).map_err(|e| Fault(format!("used ring: {e}")))
    }

    /// Interrupts the driver if it wants to know.
    pub fn notify(&mut self, index: usize) -> Result<(), Fault> {
        let memory = self.memory.clone();
        let wanted = self.queue(index)?.needs_notification(&memory);
        if wanted.map_err(|e| Fault(format!("used ring: {e}")))? {
            self.interrupt.used();
        }
        Ok(())
    }

    /// Asks to be kicked again; true if something came meanwhile.
    fn rearm(&mut self, index: usize) -> Result<bool, Fault> {
        let memory = self.memory.clone();
        let queue = self.queue(index)?;
        Ok(queue.ready() && queue.enable_notification(&memory).map_err(|e| Fault(format!("available ring: {e}")))?)
    }
}

type Returned = (Box<dyn Device>, Vec<Queue>);

pub struct Worker {
    stop: Signal,
    thread: JoinHandle<Returned>,
}

const STOP: u64 = u64::MAX;
const SOURCE: u64 = u64::MAX - 1;

/// Starts the device's thread. All its queues count as kicked once.
pub fn start(device: Box<dyn Device>, io: Io, kicks: &[Signal], ending: Ending) -> io::Result<Worker> {
    let stop = Signal::new()?;
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let add = |fd: std::os::fd::BorrowedFd<'_>, token: u64| {
        epoll::add(&poll, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN)
    };
    add(std::os::fd::AsFd::as_fd(&stop), STOP)?;
    for (index, kick) in kicks.iter().enumerate() {
        add(std::os::fd::AsFd::as_fd(kick), index as u64)?;
        kick.raise()?;
    }
    let kicks = kicks.iter().map(Signal::try_clone).collect::<io::Result<Vec<_>>>()?;
    let thread = std::thread::Builder::new().name(device.name().into()).stack_size(256 << 10);
    let mut running = Running { device, io, poll, kicks, listening: false };
    let thread = thread.spawn(move || {
        seccomp::enter(Role::Device);
        if let Err(Fault(why)) = running.run() {
            ending.end(End::Broken(format!("{}: {why}", running.device.name())));
        }
        (running.device, running.io.queues)
    })?;
    Ok(Worker { stop, thread })
}

impl Worker {
    /// The device and its queues, when its thread has let go of them. `None` if the thread died.
    pub fn stop(self) -> Option<Returned> {
        let _ = self.stop.raise();
        self.thread.join().ok()
    }
}

struct Running {
    device: Box<dyn Device>,
    io: Io,
    poll: OwnedFd,
    kicks: Vec<Signal>,
    listening: bool,
}

impl Running {
    fn run(&mut self) -> Result<(), Fault> {
        let mut events = Vec::with_capacity(16);
        loop {
            self.listen()?;
            events.clear();
            let held = self.device.held();
            let rest = held.and_then(|wait| wait.try_into().ok());
            match epoll::wait(&self.poll, rustix::buffer::spare_capacity(&mut events), rest.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Fault(format!("wait: {e}"))),
            }
            for event in &events {
                match event.data.u64() {
                    STOP => return Ok(()),
                    SOURCE => self.device.ready(&mut self.io)?,
                    index => self.kicked(index as usize)?,
                }
            }
            if held.is_some() && self.device.held().is_none() {
                (0..self.kicks.len()).try_for_each(|index| self.kicked(index))?;
            }
        }
    }

    /// Listens to the host's side only while the device can take something from it.
    fn listen(&mut self) -> Result<(), Fault> {
        let wanted = self.device.wants_source();
        let Some(source) = self.device.source().filter(|_| wanted != self.listening) else { return Ok(()) };
        let done = if wanted {
            epoll::add(&self.poll, source, epoll::EventData::new_u64(SOURCE), epoll::EventFlags::IN)
        } else {
            epoll::delete(&self.poll, source)
        };
        done.map_err(|e| Fault(format!("listen: {e}")))?;
        self.listening = wanted;
        Ok(())
    }

    fn kicked(&mut self, index: usize) -> Result<(), Fault> {
        if let Some(kick) = self.kicks.get(index) {
            kick.clear();
        }
        loop {
            self.device.kicked(index, &mut self.io)?;
            if self.device.held().is_some() || !self.io.rearm(index)? || !self.device.drains(index) {
                return Ok(());
            }
        }
    }
}
