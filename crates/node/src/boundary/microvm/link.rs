//! The host's end of the line to a machine's agent (`guest::frame`). The guest is not believed: it may only speak on
//! channels that were opened, as much as it was given credit for; anything else is the end of the line.

use guest::frame::{self, Decoder, Frame, Hello, Kind, MAX_DATA, PADDING, WINDOW};
use guest::protocol::{Answer, MOST_CHANNELS, Request, STREAMS, VERSION};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, mpsc};

/// Of one answer.
const MAX_ANSWER: usize = 1 << 20;
/// Answers on one channel that nobody has taken yet.
const MOST_ANSWERS: usize = 8;
/// What a guest may say before it answers the greeting: what was meant for a host before this one.
const MAX_STALE: usize = 8 << 20;

#[derive(Clone, Debug, thiserror::Error)]
pub enum LinkError {
    #[error("the guest broke the protocol: {0}")]
    Broken(String),
    #[error("the line to the guest ended")]
    Ended,
    #[error("the guest did not answer within {} s", .0.as_secs())]
    Silent(Duration),
    #[error("the guest speaks version {0} of the protocol, this program {VERSION}")]
    Version(u32),
}

pub struct Link {
    out: mpsc::UnboundedSender<Vec<u8>>,
    channels: Mutex<HashMap<u32, Arc<Shared>>>,
    next: AtomicU32,
    end: OnceLock<LinkError>,
    ended: Notify,
}

/// What the reader and a channel's users share.
struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

struct State {
    answers: VecDeque<Answer>,
    partial: Vec<u8>,
    arrived: [VecDeque<u8>; STREAMS],
    over: [bool; STREAMS],
    /// What the guest may still send.
    granted: [u32; STREAMS],
    /// What may still be sent.
    room: u32,
    closed: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    /// Greets the guest, which may still be booting.
    pub async fn open(stream: UnixStream, patience: Duration) -> Result<(Arc<Link>, Hello), LinkError> {
        let (mut from, mut to) = stream.into_split();
        match tokio::time::timeout(patience, greet(&mut from, &mut to)).await {
            Err(_) => Err(LinkError::Silent(patience)),
            Ok(Err(error)) => Err(error),
            Ok(Ok((hello, rest))) if hello.version == VERSION => {
                let (out, messages) = mpsc::unbounded_channel();
                let link = Arc::new(Link {
                    out,
                    channels: Mutex::default(),
                    next: AtomicU32::new(1),
                    end: OnceLock::new(),
                    ended: Notify::new(),
                });
                tokio::spawn(write(to, messages));
                tokio::spawn(read(link.clone(), from, rest));
                Ok((link, hello))
            }
            Ok(Ok((hello, _))) => Err(LinkError::Version(hello.version)),
        }
    }

    pub fn end(&self) -> Option<&LinkError> {
        self.end.get()
    }

    /// Opens a channel with a request.
    pub fn ask(self: &Arc<Self>, request: &Request) -> Result<Arc<Channel>, LinkError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                answers: VecDeque::new(),
                partial: Vec::new(),
                arrived: Default::default(),
                over: [false; STREAMS],
                granted: [WINDOW; STREAMS],
                room: WINDOW,
                closed: false,
            }),
            changed: Notify::new(),
        });
        let mut channels = lock(&self.channels);
        if channels.len() >= MOST_CHANNELS {
            return Err(LinkError::Broken(format!("{MOST_CHANNELS} requests are under way")));
        }
        channels.insert(number, shared.clone());
        drop(channels);
        let channel = Arc::new(Channel { link: self.clone(), number, shared });
        channel.tell(request)?;
        Ok(channel)
    }

    fn send(&self, bytes: Vec<u8>) -> Result<(), LinkError> {
        match self.end.get() {
            Some(error) => Err(error.clone()),
            None => self.out.send(bytes).map_err(|_| LinkError::Ended),
        }
    }

    fn finish(&self, error: LinkError) {
        let _ = self.end.set(error);
        for (_, shared) in lock(&self.channels).drain() {
            lock(&shared.state).closed = true;
            shared.changed.notify_waiters();
        }
        self.ended.notify_waiters();
    }

    fn take(&self, frame: &Frame) -> Result<(), String> {
        let Some(shared) = lock(&self.channels).get(&frame.channel).cloned() else {
            let opened = frame.channel != 0 && frame.channel < self.next.load(Ordering::Relaxed);
            // said before the guest knew that it was closed
            return if opened { Ok(()) } else { Err(format!("channel {} was never opened", frame.channel)) };
        };
        let mut state = lock(&shared.state);
        match frame.kind {
            Kind::More | Kind::Message => {
                if state.partial.len() + frame.payload.len() > MAX_ANSWER || state.answers.len() >= MOST_ANSWERS {
                    return Err("more answers than anybody asked for".into());
                }
                state.partial.extend_from_slice(&frame.payload);
                if frame.kind == Kind::Message {
                    let text = std::mem::take(&mut state.partial);
                    state.answers.push_back(serde_json::from_slice(&text).map_err(|e| format!("an answer: {e}"))?);
                }
            }
            Kind::Data => {
                let (stream, bytes) = frame.stream().map_err(|e| e.to_string())?;
                let stream = usize::from(stream);
                let granted = state.granted.get_mut(stream).ok_or("a stream that there is not")?;
                let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                *granted = granted.checked_sub(size).ok_or("more bytes than it had credit for")?;
                if let Some(arrived) = state.arrived.get_mut(stream) {
                    arrived.extend(bytes);
                }
            }
            Kind::End => {
                let (stream, _) = frame.stream().map_err(|e| e.to_string())?;
                *state.over.get_mut(usize::from(stream)).ok_or("the end of a stream that there is not")? = true;
            }
            Kind::Credit => {
                let (_, bytes) = frame.granted().map_err(|e| e.to_string())?;
                state.room = state.room.checked_add(bytes).filter(|r| *r <= WINDOW).ok_or("credit for nothing")?;
            }
            Kind::Close => {
                state.closed = true;
                lock(&self.channels).remove(&frame.channel);
            }
            Kind::Hello => return Err("a greeting that nobody asked for".into()),
        }
        drop(state);
        shared.changed.notify_waiters();
        Ok(())
    }
}

async fn greet(from: &mut OwnedReadHalf, to: &mut OwnedWriteHalf) -> Result<(Hello, Decoder), LinkError> {
    let ended = |_| LinkError::Ended;
    let mut nonce = [0; 16];
    let random = std::fs::File::open("/dev/urandom").and_then(|mut f| std::io::Read::read_exact(&mut f, &mut nonce));
    random.map_err(ended)?;
    let hello = Hello { nonce, version: VERSION, set_up: false };
    let mut bytes = vec![0; PADDING];
    hello.frame().encode(&mut bytes);
    to.write_all(&bytes).await.map_err(ended)?;
    // the beginning of the answer, whatever is before it
    let mut wanted = Vec::new();
    hello.frame().encode(&mut wanted);
    wanted.truncate(frame::HEADER + nonce.len());
    let mut said = Vec::new();
    let mut dropped = 0;
    let mut buffer = vec![0; 32 << 10];
    loop {
        if let Some(at) = said.windows(wanted.len()).position(|w| w == wanted) {
            let mut decoder = Decoder::default();
            decoder.push(said.get(at..).unwrap_or_default());
            match decoder.next_frame() {
                Ok(Some(frame)) => {
                    let hello = Hello::parse(&frame);
                    return hello.map(|h| (h, decoder)).ok_or_else(|| LinkError::Broken("its greeting".into()));
                }
                Ok(None) => {}
                Err(e) => return Err(LinkError::Broken(e.to_string())),
            }
        } else if said.len() > wanted.len() {
            let stale = said.len() - wanted.len();
            dropped += stale;
            said.drain(..stale);
        }
        if dropped > MAX_STALE {
            return Err(LinkError::Broken("it talks on and does not greet".into()));
        }
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return Err(LinkError::Ended),
            Ok(read) => said.extend_from_slice(buffer.get(..read).unwrap_or_default()),
        }
    }
}

async fn write(mut to: OwnedWriteHalf, mut messages: mpsc::UnboundedReceiver<Vec<u8>>) {
    while let Some(bytes) = messages.recv().await {
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

async fn read(link: Arc<Link>, mut from: OwnedReadHalf, mut decoder: Decoder) {
    let mut buffer = vec![0; 32 << 10];
    loop {
        loop {
            let outcome = match decoder.next_frame() {
                Ok(Some(frame)) => link.take(&frame),
                Ok(None) => break,
                Err(e) => Err(e.to_string()),
            };
            if let Err(why) = outcome {
                return link.finish(LinkError::Broken(why));
            }
        }
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return link.finish(LinkError::Ended),
            Ok(read) => decoder.push(buffer.get(..read).unwrap_or_default()),
        }
    }
}

/// One conversation; it is closed when nobody has it any more.
pub struct Channel {
    link: Arc<Link>,
    number: u32,
    shared: Arc<Shared>,
}

impl Channel {
    /// One more message of this side's.
    pub fn tell(&self, request: &Request) -> Result<(), LinkError> {
        let text = serde_json::to_vec(request).map_err(|e| LinkError::Broken(e.to_string()))?;
        let mut bytes = Vec::with_capacity(text.len() + 64);
        frame::message(self.number, &text, &mut bytes);
        self.link.send(bytes)
    }

    /// Waits until `look` finds something.
    async fn wait<T>(&self, look: impl Fn(&mut State) -> Option<T>) -> T {
        loop {
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(found) = look(&mut lock(&self.shared.state)) {
                return found;
            }
            changed.await;
        }
    }

    fn gone(&self) -> LinkError {
        self.link.end().cloned().unwrap_or(LinkError::Ended)
    }

    pub async fn answer(&self) -> Result<Answer, LinkError> {
        let found = self.wait(|state| match state.answers.pop_front() {
            Some(answer) => Some(Some(answer)),
            None => state.closed.then_some(None),
        });
        found.await.ok_or_else(|| self.gone())
    }

    /// The next bytes of a stream, which [`Self::credit`] makes room for again; `None` at its end.
    pub async fn read(&self, stream: u8) -> Option<Vec<u8>> {
        let at = usize::from(stream);
        let take = |state: &mut State| {
            let bytes: Vec<u8> = state.arrived.get_mut(at)?.drain(..).collect();
            let over = state.closed || state.over.get(at).copied().unwrap_or(true);
            if bytes.is_empty() { over.then_some(None) } else { Some(Some(bytes)) }
        };
        self.wait(take).await
    }

    pub fn credit(&self, stream: u8, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(0);
        if let Some(granted) = lock(&self.shared.state).granted.get_mut(usize::from(stream)) {
            *granted = granted.saturating_add(bytes).min(WINDOW);
        }
        self.frame(&Frame::credit(self.number, stream, bytes));
    }

    fn frame(&self, frame: &Frame) {
        let mut bytes = Vec::with_capacity(frame.payload.len() + 16);
        frame.encode(&mut bytes);
        let _ = self.link.send(bytes);
    }

    /// Sends bytes of a stream as there is room for them; false once nobody takes them.
    pub async fn write(&self, stream: u8, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let most = bytes.len().min(MAX_DATA);
            let room = self.wait(|state| {
                if state.closed {
                    return Some(0);
                }
                let taken = (state.room as usize).min(most);
                state.room -= taken as u32;
                (taken > 0).then_some(taken)
            });
            let room = room.await;
            if room == 0 {
                return false;
            }
            let (now, rest) = bytes.split_at(room);
            self.frame(&Frame::data(self.number, stream, now));
            bytes = rest;
        }
        true
    }

    pub fn finish(&self, stream: u8) {
        self.frame(&Frame::new(Kind::End, self.number, [stream]));
    }

    pub fn close(&self) {
        let mut state = lock(&self.shared.state);
        let told = std::mem::replace(&mut state.closed, true);
        drop(state);
        self.shared.changed.notify_waiters();
        if lock(&self.link.channels).remove(&self.number).is_some() || !told {
            self.frame(&Frame::new(Kind::Close, self.number, []));
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// Answers the greeting, then says what it is told to.
    async fn guest(mut stream: UnixStream, says: Vec<u8>) {
        let mut decoder = Decoder::default();
        let mut buffer = vec![0; 64 << 10];
        let hello = loop {
            let read = stream.read(&mut buffer).await.expect("read");
            decoder.push(&buffer[..read]);
            if let Ok(Some(frame)) = decoder.next_frame() {
                break Hello::parse(&frame).expect("hello");
            }
        };
        let mut bytes = b"what the host before was told \x04\xff".to_vec();
        Hello { set_up: true, ..hello }.frame().encode(&mut bytes);
        bytes.extend(says);
        stream.write_all(&bytes).await.expect("written");
        while matches!(stream.read(&mut buffer).await, Ok(n) if n > 0) {}
    }

    async fn linked(says: Vec<u8>) -> Arc<Link> {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        tokio::spawn(guest(theirs, says));
        let (link, hello) = Link::open(ours, PATIENCE).await.expect("greeted");
        assert!(hello.set_up);
        link
    }

    fn encoded(frames: &[Frame]) -> Vec<u8> {
        let mut bytes = Vec::new();
        frames.iter().for_each(|f| f.encode(&mut bytes));
        bytes
    }

    #[tokio::test]
    async fn a_guest_that_breaks_the_protocol_loses_its_line() {
        let flood: Vec<Frame> = (0..=WINDOW as usize / MAX_DATA).map(|_| Frame::data(1, 1, &[7; MAX_DATA])).collect();
        let many: Vec<Frame> = (0..=MOST_ANSWERS).map(|_| Frame::new(Kind::Message, 1, *b"\"Done\"")).collect();
        let cases: [(Vec<u8>, &str); 9] = [
            (vec![0x77], "unknown kind"),
            ([&[4, 1, 0, 0, 0][..], &u32::MAX.to_le_bytes()].concat(), "limit"),
            (encoded(&[Frame::data(9, 1, b"x")]), "never opened"),
            (encoded(&[Frame::data(1, 200, b"x")]), "stream"),
            (encoded(&flood), "credit"),
            (encoded(&many), "answers"),
            (encoded(&[Frame::new(Kind::Message, 1, *b"{]")]), "answer"),
            (encoded(&[Frame::credit(1, 0, 1)]), "credit"),
            (encoded(&[Frame::new(Kind::Hello, 1, [0; 21])]), "greeting"),
        ];
        for (says, why) in cases {
            let (ours, theirs) = UnixStream::pair().expect("pair");
            let (link, _) = {
                tokio::spawn(guest(theirs, Vec::new()));
                Link::open(ours, PATIENCE).await.expect("greeted")
            };
            let channel = link.ask(&Request::List).expect("asked");
            // as if the guest had said it now
            let mut decoder = Decoder::default();
            decoder.push(&says);
            let outcome = loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) => {
                        if let Err(e) = link.take(&frame) {
                            break e;
                        }
                    }
                    Ok(None) => panic!("{why}: was let pass"),
                    Err(e) => break e.to_string(),
                }
            };
            assert!(outcome.contains(why), "{outcome}");
            drop(channel);
        }
        let link = linked(vec![0x77]).await;
        while link.end().is_none() {
            tokio::task::yield_now().await;
        }
        assert!(matches!(link.end(), Some(LinkError::Broken(_))));
        assert!(link.ask(&Request::List).is_err());
    }

    #[tokio::test]
    async fn streams_come_as_credit_allows_and_end() {
        let link = linked(Vec::new()).await;
        let channel = link.ask(&Request::List).expect("asked");
        link.take(&Frame::data(1, 1, b"hello")).expect("taken");
        link.take(&Frame::new(Kind::End, 1, [1])).expect("taken");
        link.take(&Frame::new(Kind::Message, 1, *b"\"Done\"")).expect("taken");
        assert_eq!(channel.read(1).await.as_deref(), Some(b"hello".as_slice()));
        assert_eq!(channel.read(1).await, None);
        assert!(matches!(channel.answer().await, Ok(Answer::Done)));
        assert!(channel.write(0, &vec![1; WINDOW as usize]).await);
        let more = tokio::spawn({
            let channel = channel.clone();
            async move { channel.write(0, b"more").await }
        });
        link.take(&Frame::new(Kind::Close, 1, [])).expect("taken");
        assert!(!more.await.expect("ended"));
        assert!(channel.answer().await.is_err());
    }
}
