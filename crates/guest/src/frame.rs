//! Frames on a byte stream: `kind u8, channel u32, length u32, payload, END`, numbers little-endian. Zero bytes between
//! frames are padding.
//!
//! The stream may be taken over in the middle of a frame: the host's program was killed, and another one goes on where it
//! was. A new host therefore pads as much as the longest frame has; the frame that was cut off is filled up with it, lacks
//! its [`END`] and is dropped. A [`Kind::Hello`] follows, with a nonce; what comes before the answer with the same nonce
//! was meant for the one before.

/// Bytes of a payload.
pub const MAX_PAYLOAD: usize = 16 << 10;
/// Bytes of a message, which may take many frames.
pub const MAX_MESSAGE: usize = 24 << 20;
/// Bytes of one stream that may be under way before the receiver has given [`Kind::Credit`].
pub const WINDOW: u32 = 64 << 10;
pub const HEADER: usize = 9;
const END: u8 = 0xa5;
/// What a new host begins with.
pub const PADDING: usize = HEADER + MAX_PAYLOAD + 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Hello = 1,
    /// A piece of a message; [`Kind::Message`] is its last.
    More = 2,
    Message = 3,
    /// The stream's number, then its bytes.
    Data = 4,
    /// A stream has ended: its number.
    End = 5,
    /// The stream's number and how many bytes more may come (u32).
    Credit = 6,
    /// Nothing more comes on this channel, and nothing is expected.
    Close = 7,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Hello,
            2 => Self::More,
            3 => Self::Message,
            4 => Self::Data,
            5 => Self::End,
            6 => Self::Credit,
            7 => Self::Close,
            _ => return None,
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: Kind,
    pub channel: u32,
    pub payload: Vec<u8>,
}

/// Bytes that are no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    Kind(u8),
    Length(u32),
    End(u8),
    Stream,
}

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Malformed::Kind(kind) => write!(f, "a frame of the unknown kind {kind}"),
            Malformed::Length(length) => write!(f, "a frame of {length} bytes, limit {MAX_PAYLOAD}"),
            Malformed::End(byte) => write!(f, "a frame that ends with {byte:#x}"),
            Malformed::Stream => f.write_str("a frame without what its kind has to say"),
        }
    }
}

impl std::error::Error for Malformed {}

impl Frame {
    pub fn new(kind: Kind, channel: u32, payload: impl Into<Vec<u8>>) -> Self {
        Frame { kind, channel, payload: payload.into() }
    }

    /// `bytes` at most [`MAX_DATA`].
    pub fn data(channel: u32, stream: u8, bytes: &[u8]) -> Self {
        let mut payload = Vec::with_capacity(bytes.len() + 1);
        payload.push(stream);
        payload.extend_from_slice(bytes);
        Frame { kind: Kind::Data, channel, payload }
    }

    pub fn credit(channel: u32, stream: u8, bytes: u32) -> Self {
        let [a, b, c, d] = bytes.to_le_bytes();
        Frame { kind: Kind::Credit, channel, payload: vec![stream, a, b, c, d] }
    }

    /// Stream and bytes of [`Kind::Data`], stream of [`Kind::End`].
    pub fn stream(&self) -> Result<(u8, &[u8]), Malformed> {
        self.payload.split_first().map(|(stream, rest)| (*stream, rest)).ok_or(Malformed::Stream)
    }

    /// Of [`Kind::Credit`].
    pub fn granted(&self) -> Result<(u8, u32), Malformed> {
        let (stream, rest) = self.stream()?;
        let bytes: [u8; 4] = rest.try_into().map_err(|_| Malformed::Stream)?;
        Ok((stream, u32::from_le_bytes(bytes)))
    }

    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(self.kind as u8);
        out.extend_from_slice(&self.channel.to_le_bytes());
        out.extend_from_slice(&(self.payload.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.payload);
        out.push(END);
    }
}

/// Bytes of a stream in one frame.
pub const MAX_DATA: usize = MAX_PAYLOAD - 1;

/// A message in as many frames as it takes.
pub fn message(channel: u32, text: &[u8], out: &mut Vec<u8>) {
    let mut rest = text;
    while rest.len() > MAX_PAYLOAD {
        let (piece, after) = rest.split_at(MAX_PAYLOAD);
        Frame::new(Kind::More, channel, piece).encode(out);
        rest = after;
    }
    Frame::new(Kind::Message, channel, rest).encode(out);
}

/// Who says hello: a nonce of the host's, the guest's answer the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    pub nonce: [u8; 16],
    pub version: u32,
    /// The guest has been told what its pod is.
    pub set_up: bool,
}

impl Hello {
    pub fn frame(&self) -> Frame {
        let mut payload = self.nonce.to_vec();
        payload.extend_from_slice(&self.version.to_le_bytes());
        payload.push(u8::from(self.set_up));
        Frame::new(Kind::Hello, 0, payload)
    }

    pub fn parse(frame: &Frame) -> Option<Self> {
        let (nonce, rest) = frame.payload.split_first_chunk::<16>()?;
        let (version, rest) = rest.split_first_chunk::<4>()?;
        let set_up = matches!(rest, [1]);
        (frame.kind == Kind::Hello && rest.len() == 1).then_some(Hello {
            nonce: *nonce,
            version: u32::from_le_bytes(*version),
            set_up,
        })
    }
}

/// Collects frames from what was read. After [`Malformed`] it goes on behind what it could not read.
#[derive(Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    at: usize,
}

impl Decoder {
    pub fn push(&mut self, bytes: &[u8]) {
        if self.at > 0 {
            self.bytes.drain(..self.at);
            self.at = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    pub fn next_frame(&mut self) -> Result<Option<Frame>, Malformed> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let padding = rest.iter().take_while(|b| **b == 0).count();
        self.at += padding;
        let rest = rest.get(padding..).unwrap_or_default();
        let Some(first) = rest.first() else { return Ok(None) };
        let Some(kind) = Kind::of(*first) else {
            self.at += 1;
            return Err(Malformed::Kind(*first));
        };
        let Some(header) = rest.first_chunk::<HEADER>() else { return Ok(None) };
        let [_, a, b, c, d, e, f, g, h] = *header;
        let (channel, length) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        if length as usize > MAX_PAYLOAD {
            self.at += 1;
            return Err(Malformed::Length(length));
        }
        let whole = HEADER + length as usize;
        let (Some(payload), Some(end)) = (rest.get(HEADER..whole), rest.get(whole)) else { return Ok(None) };
        let frame = Frame { kind, channel, payload: payload.to_vec() };
        let end = *end;
        self.at += whole + 1;
        if end == END { Ok(Some(frame)) } else { Err(Malformed::End(end)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(decoder: &mut Decoder) -> Vec<Frame> {
        let mut out = Vec::new();
        while let Ok(Some(frame)) = decoder.next_frame() {
            out.push(frame);
        }
        out
    }

    fn frames() -> impl Strategy<Value = Vec<Frame>> {
        let one = (1u8..8, any::<u32>(), proptest::collection::vec(any::<u8>(), 0..300));
        let one =
            one.prop_map(|(kind, channel, payload)| Frame { kind: Kind::of(kind).expect("known"), channel, payload });
        proptest::collection::vec(one, 0..8)
    }

    proptest! {
        #[test]
        fn frames_survive_any_cut_and_padding(frames in frames(), cut in 1usize..64, padding in 0usize..20) {
            let mut bytes = Vec::new();
            for frame in &frames {
                frame.encode(&mut bytes);
                bytes.extend(std::iter::repeat_n(0, padding));
            }
            let mut decoder = Decoder::default();
            let mut got = Vec::new();
            for piece in bytes.chunks(cut) {
                decoder.push(piece);
                got.extend(all(&mut decoder));
            }
            prop_assert_eq!(got, frames);
        }

        #[test]
        fn any_bytes_end(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            let mut steps = 0;
            while !matches!(decoder.next_frame(), Ok(None)) {
                steps += 1;
                prop_assert!(steps <= bytes.len());
            }
        }

        #[test]
        fn who_takes_over_in_the_middle_of_a_frame_is_understood(length in 0usize..MAX_PAYLOAD, cut in 0usize..MAX_PAYLOAD) {
            let mut bytes = Vec::new();
            Frame::data(7, 0, &vec![0xa5; length.min(MAX_DATA)]).encode(&mut bytes);
            bytes.truncate(cut.min(bytes.len() - 1));
            bytes.extend(std::iter::repeat_n(0, PADDING));
            let hello = Hello { nonce: [9; 16], version: 1, set_up: false };
            hello.frame().encode(&mut bytes);
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            let mut heard = Vec::new();
            loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) => heard.push(frame),
                    Ok(None) => break,
                    Err(_) => {}
                }
            }
            prop_assert_eq!(heard.len(), 1);
            prop_assert_eq!(Hello::parse(&heard[0]), Some(hello));
        }
    }

    #[test]
    fn long_messages_take_many_frames() {
        let text = vec![b'x'; 3 * MAX_PAYLOAD + 1];
        let mut bytes = Vec::new();
        message(3, &text, &mut bytes);
        let mut decoder = Decoder::default();
        decoder.push(&bytes);
        let got = all(&mut decoder);
        assert_eq!(got.iter().map(|f| f.kind).collect::<Vec<_>>(), [Kind::More, Kind::More, Kind::More, Kind::Message]);
        assert_eq!(got.iter().flat_map(|f| f.payload.clone()).collect::<Vec<_>>(), text);
    }
}
