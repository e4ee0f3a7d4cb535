//! One conversation with the host, as the thread that leads it sees it.

use crate::frame::{self, Frame, Kind, MAX_DATA, WINDOW};
use crate::protocol::{Answer, Failure, STREAMS};
use rustix::event::{PollFd, PollFlags, poll};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where frames to the host go. A host that takes over is another life: what is meant for the one before is dropped.
pub struct Out {
    pub sink: Box<dyn Write + Send>,
    pub life: u64,
}

/// What comes from the host for a channel's thread.
pub enum Input {
    Message(Vec<u8>),
    Data(u8, Vec<u8>),
    End(u8),
}

pub struct Channel {
    number: u32,
    life: u64,
    out: Arc<Mutex<Out>>,
    inbox: Mutex<Option<Sender<Input>>>,
    windows: Mutex<Windows>,
    changed: Condvar,
    closed: AtomicBool,
    /// Readable once the channel is closed.
    pub cancelled: OwnedFd,
    cancel: Mutex<Option<OwnedFd>>,
}

struct Windows {
    room: [u32; STREAMS],
    credited: [u64; STREAMS],
}

impl Channel {
    pub fn new(number: u32, life: u64, out: Arc<Mutex<Out>>, inbox: Sender<Input>) -> io::Result<Self> {
        let (cancelled, cancel) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        Ok(Channel {
            number,
            life,
            out,
            inbox: Mutex::new(Some(inbox)),
            windows: Mutex::new(Windows { room: [WINDOW; STREAMS], credited: [0; STREAMS] }),
            changed: Condvar::new(),
            closed: AtomicBool::new(false),
            cancelled,
            cancel: Mutex::new(Some(cancel)),
        })
    }

    pub fn deliver(&self, input: Input) {
        if let Some(inbox) = &*lock(&self.inbox) {
            let _ = inbox.send(input);
        }
    }

    pub fn grant(&self, stream: u8, bytes: u32) {
        let mut windows = lock(&self.windows);
        if let Some(room) = windows.room.get_mut(usize::from(stream)) {
            *room = room.saturating_add(bytes);
        }
        if let Some(credited) = windows.credited.get_mut(usize::from(stream)) {
            *credited += u64::from(bytes);
        }
        self.changed.notify_all();
    }

    /// Bytes of a stream that the host has taken in.
    pub fn credited(&self, stream: u8) -> u64 {
        lock(&self.windows).credited.get(usize::from(stream)).copied().unwrap_or_default()
    }

    /// The host has gone, or does not want it any more.
    pub fn cancel(&self) {
        self.closed.store(true, Ordering::SeqCst);
        lock(&self.inbox).take();
        lock(&self.cancel).take();
        let _held = lock(&self.windows);
        self.changed.notify_all();
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    fn send(&self, bytes: &[u8]) -> bool {
        let mut out = lock(&self.out);
        out.life == self.life && !self.is_closed() && out.sink.write_all(bytes).is_ok()
    }

    pub fn answer(&self, answer: &Answer) -> bool {
        let text = serde_json::to_vec(answer).unwrap_or_default();
        let mut bytes = Vec::with_capacity(text.len() + 16);
        frame::message(self.number, &text, &mut bytes);
        self.send(&bytes)
    }

    pub fn fail(&self, kind: Failure, message: impl std::fmt::Display) -> bool {
        self.answer(&Answer::Error { kind, message: message.to_string() })
    }

    /// Sends bytes of a stream as the host gives room for them; false once nobody wants them any more.
    pub fn data(&self, stream: u8, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let room = self.room(stream, bytes.len().min(MAX_DATA));
            if room == 0 {
                return false;
            }
            let (now, rest) = bytes.split_at(room);
            if !self.frame(&Frame::data(self.number, stream, now)) {
                return false;
            }
            bytes = rest;
        }
        true
    }

    /// Takes up to `most` of the window, waiting until there is any; 0 once the channel is closed.
    fn room(&self, stream: u8, most: usize) -> usize {
        let mut windows = lock(&self.windows);
        loop {
            if self.is_closed() {
                return 0;
            }
            let Some(room) = windows.room.get_mut(usize::from(stream)) else { return 0 };
            if *room > 0 {
                let taken = (*room as usize).min(most);
                *room -= taken as u32;
                return taken;
            }
            windows = self.changed.wait(windows).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn frame(&self, frame: &Frame) -> bool {
        let mut bytes = Vec::with_capacity(frame.payload.len() + 16);
        frame.encode(&mut bytes);
        self.send(&bytes)
    }

    pub fn end(&self, stream: u8) -> bool {
        self.frame(&Frame::new(Kind::End, self.number, [stream]))
    }

    pub fn credit(&self, stream: u8, bytes: usize) -> bool {
        self.frame(&Frame::credit(self.number, stream, bytes as u32))
    }

    pub fn close(&self) {
        self.frame(&Frame::new(Kind::Close, self.number, []));
    }

    /// Waits until `fd` is ready; false once the channel is closed.
    pub fn ready(&self, fd: impl AsFd, events: PollFlags) -> bool {
        let mut both = [PollFd::new(&fd, events), PollFd::new(&self.cancelled, PollFlags::IN)];
        loop {
            match poll(&mut both, None) {
                Ok(_) => return both[1].revents().is_empty(),
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}
