//! The host's line: frames in, each to the thread of its channel.

use super::channel::{Channel, Input, Out, lock};
use super::pod::Agent;
use crate::frame::{Decoder, Frame, Hello, Kind, MAX_MESSAGE};
use crate::protocol::{Failure, MOST_CHANNELS, Request, VERSION};
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, mpsc};

const STACK: usize = 256 << 10;

struct Line {
    agent: Arc<Agent>,
    out: Arc<Mutex<Out>>,
    channels: Arc<Mutex<HashMap<u32, Arc<Channel>>>>,
    partial: HashMap<u32, Vec<u8>>,
}

/// Until the line ends.
pub fn serve(agent: &Arc<Agent>, mut input: impl Read, sink: Box<dyn Write + Send>) -> io::Result<()> {
    let out = Arc::new(Mutex::new(Out { sink, life: 0 }));
    let mut line = Line { agent: agent.clone(), out, channels: Arc::default(), partial: HashMap::new() };
    let mut decoder = Decoder::default();
    let mut buffer = vec![0; 32 << 10];
    let outcome = loop {
        match input.read(&mut buffer) {
            Ok(0) => break Ok(()),
            Ok(read) => decoder.push(buffer.get(..read).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => break Err(e),
        }
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => line.take(frame),
                Ok(None) => break,
                // what a host that was cut off had begun to say
                Err(_) => {}
            }
        }
    };
    line.begin_anew();
    outcome
}

impl Line {
    fn begin_anew(&mut self) {
        self.partial.clear();
        for (_, channel) in lock(&self.channels).drain() {
            channel.cancel();
        }
    }

    fn take(&mut self, frame: Frame) {
        let known = |line: &Self| lock(&line.channels).get(&frame.channel).cloned();
        match frame.kind {
            Kind::Hello => {
                let Some(hello) = Hello::parse(&frame) else { return };
                self.begin_anew();
                let answer = Hello { version: VERSION, set_up: self.agent.is_set_up(), ..hello };
                let mut bytes = Vec::new();
                answer.frame().encode(&mut bytes);
                let mut out = lock(&self.out);
                out.life += 1;
                let _ = out.sink.write_all(&bytes);
            }
            Kind::More => self.gather(frame.channel, &frame.payload),
            Kind::Message => {
                self.gather(frame.channel, &frame.payload);
                let text = self.partial.remove(&frame.channel).unwrap_or_default();
                match known(self) {
                    Some(channel) => channel.deliver(Input::Message(text)),
                    None => self.open(frame.channel, &text),
                }
            }
            Kind::Data => {
                if let (Some(channel), Ok((stream, bytes))) = (known(self), frame.stream()) {
                    channel.deliver(Input::Data(stream, bytes.to_vec()));
                }
            }
            Kind::End => {
                if let (Some(channel), Ok((stream, _))) = (known(self), frame.stream()) {
                    channel.deliver(Input::End(stream));
                }
            }
            Kind::Credit => {
                if let (Some(channel), Ok((stream, bytes))) = (known(self), frame.granted()) {
                    channel.grant(stream, bytes);
                }
            }
            Kind::Close => {
                self.partial.remove(&frame.channel);
                let channel = lock(&self.channels).remove(&frame.channel);
                if let Some(channel) = channel {
                    channel.cancel();
                }
            }
        }
    }

    fn gather(&mut self, channel: u32, bytes: &[u8]) {
        let gathered = self.partial.entry(channel).or_default();
        if gathered.len() + bytes.len() <= MAX_MESSAGE {
            gathered.extend_from_slice(bytes);
        }
    }

    /// A thread for each conversation.
    fn open(&mut self, number: u32, text: &[u8]) {
        let life = lock(&self.out).life;
        let (inbox, messages) = mpsc::channel();
        let Ok(channel) = Channel::new(number, life, self.out.clone(), inbox) else { return };
        let channel = Arc::new(channel);
        let request = match serde_json::from_slice::<Request>(text) {
            Ok(request) => request,
            Err(e) => {
                channel.fail(Failure::Refused, format!("the guest does not know this request: {e}"));
                return channel.close();
            }
        };
        if lock(&self.channels).len() >= MOST_CHANNELS {
            channel.fail(Failure::Failed, format!("{MOST_CHANNELS} requests are under way already"));
            return channel.close();
        }
        lock(&self.channels).insert(number, channel.clone());
        let (agent, channels, own) = (self.agent.clone(), self.channels.clone(), channel.clone());
        let spawned = std::thread::Builder::new().name("channel".into()).stack_size(STACK).spawn(move || {
            agent.lead(&own, &messages, request);
            own.close();
            own.cancel();
            lock(&channels).remove(&number);
        });
        if let Err(e) = spawned {
            channel.fail(Failure::Failed, format!("starting a thread: {e}"));
            lock(&self.channels).remove(&number);
        }
    }
}
