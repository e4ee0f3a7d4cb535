//! SPDY/3.1 frames (<https://www.chromium.org/spdy/spdy-protocol/spdy-protocol-draft3-1/>): bytes to values and back,
//! nothing else. Every length is checked before it is used.

use bytes::{BufMut, Bytes, BytesMut};

pub const HEAD: usize = 8;
/// Longest control frame that is read; SYN_STREAM with a few headers is the longest there is.
pub const MAX_CONTROL: usize = 16 << 10;
/// Most data put into one frame.
pub const MAX_DATA: usize = 32 << 10;
const VERSION: u16 = 3;
const FIN: u8 = 0x01;
const ID_MASK: u32 = 0x7fff_ffff;
/// Id of the setting that gives the peer's initial stream window.
pub const INITIAL_WINDOW_SIZE: u32 = 7;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpdyError {
    #[error("SPDY version {0}; 3 is spoken here")]
    Version(u16),
    #[error("SPDY control frame of type {kind} with {length} bytes; at most {MAX_CONTROL} are read")]
    TooLong { kind: u16, length: usize },
    #[error("SPDY control frame of type {kind} with {length} bytes is malformed")]
    Malformed { kind: u16, length: usize },
    #[error("SPDY headers: {0}")]
    Headers(&'static str),
    #[error("SPDY stream id {0}: ids of a client are odd and go up")]
    StreamId(u32),
    #[error("SPDY peer asks for answers and does not read them")]
    Unread,
}

/// Why a stream is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetReason {
    ProtocolError = 1,
    RefusedStream = 3,
    Cancel = 5,
}

/// The first eight bytes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    Control { kind: u16, flags: u8, length: usize },
    Data { stream: u32, fin: bool, length: usize },
}

impl Head {
    pub fn parse(bytes: [u8; HEAD]) -> Result<Head, SpdyError> {
        let [a, b, c, d, flags, l0, l1, l2] = bytes;
        let length = u32::from_be_bytes([0, l0, l1, l2]) as usize;
        if a & 0x80 == 0 {
            return Ok(Head::Data { stream: u32::from_be_bytes([a, b, c, d]), fin: flags & FIN != 0, length });
        }
        let version = u16::from_be_bytes([a & 0x7f, b]);
        let kind = u16::from_be_bytes([c, d]);
        if version != VERSION {
            return Err(SpdyError::Version(version));
        }
        if length > MAX_CONTROL {
            return Err(SpdyError::TooLong { kind, length });
        }
        Ok(Head::Control { kind, flags, length })
    }
}

/// A control frame; header blocks are still compressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control<'a> {
    SynStream {
        stream: u32,
        fin: bool,
        headers: &'a [u8],
    },
    SynReply {
        stream: u32,
        fin: bool,
        headers: &'a [u8],
    },
    Reset {
        stream: u32,
        status: u32,
    },
    /// The initial window, if that is among the settings.
    Settings {
        initial_window: Option<u32>,
    },
    Ping(u32),
    GoAway {
        last: u32,
    },
    Headers {
        stream: u32,
        fin: bool,
        headers: &'a [u8],
    },
    WindowUpdate {
        stream: u32,
        delta: u32,
    },
    /// A type that needs no answer.
    Other(u16),
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_be_bytes)
}

impl<'a> Control<'a> {
    pub fn parse(kind: u16, flags: u8, body: &'a [u8]) -> Result<Control<'a>, SpdyError> {
        Self::read(kind, flags & FIN != 0, body).ok_or(SpdyError::Malformed { kind, length: body.len() })
    }

    fn read(kind: u16, fin: bool, body: &'a [u8]) -> Option<Control<'a>> {
        let id = || u32_at(body, 0).map(|id| id & ID_MASK);
        Some(match kind {
            1 => Control::SynStream { stream: id()?, fin, headers: body.get(10..)? },
            2 => Control::SynReply { stream: id()?, fin, headers: body.get(4..)? },
            3 => Control::Reset { stream: id()?, status: u32_at(body, 4)? },
            4 => Control::Settings { initial_window: settings(body)? },
            6 => Control::Ping(u32_at(body, 0)?),
            7 => Control::GoAway { last: id()? },
            8 => Control::Headers { stream: id()?, fin, headers: body.get(4..)? },
            9 => Control::WindowUpdate { stream: id()?, delta: u32_at(body, 4)? & ID_MASK },
            other => Control::Other(other),
        })
    }
}

fn settings(body: &[u8]) -> Option<Option<u32>> {
    let count = u32_at(body, 0)? as usize;
    let entries = body.get(4..)?.chunks_exact(8);
    if entries.len() != count || !entries.remainder().is_empty() {
        return None;
    }
    let mut initial = None;
    for entry in entries {
        if u32_at(entry, 0)? & 0x00ff_ffff == INITIAL_WINDOW_SIZE {
            initial = Some(u32_at(entry, 4)? & ID_MASK);
        }
    }
    Some(initial)
}

fn control(kind: u16, flags: u8, body: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(HEAD + body.len());
    frame.put_u16(0x8000 | VERSION);
    frame.put_u16(kind);
    frame.put_u32((u32::from(flags) << 24) | (body.len() as u32 & 0x00ff_ffff));
    frame.put_slice(body);
    frame.freeze()
}

fn two(first: u32, second: u32) -> [u8; 8] {
    let mut body = [0; 8];
    body[..4].copy_from_slice(&first.to_be_bytes());
    body[4..].copy_from_slice(&second.to_be_bytes());
    body
}

/// `headers` is a compressed block.
pub fn syn_reply(stream: u32, headers: &[u8]) -> Bytes {
    let mut body = stream.to_be_bytes().to_vec();
    body.extend_from_slice(headers);
    control(2, 0, &body)
}

pub fn reset(stream: u32, reason: ResetReason) -> Bytes {
    control(3, 0, &two(stream, reason as u32))
}

pub fn ping(id: u32) -> Bytes {
    control(6, 0, &id.to_be_bytes())
}

pub fn go_away(last: u32) -> Bytes {
    control(7, 0, &two(last, 0))
}

pub fn window_update(stream: u32, delta: u32) -> Bytes {
    control(9, 0, &two(stream, delta & ID_MASK))
}

/// Appends a data frame. `data` is at most [`MAX_DATA`] long.
pub fn put_data(buffer: &mut BytesMut, stream: u32, fin: bool, data: &[u8]) {
    buffer.reserve(HEAD + data.len());
    buffer.put_u32(stream & ID_MASK);
    buffer.put_u32((u32::from(if fin { FIN } else { 0 }) << 24) | (data.len() as u32 & 0x00ff_ffff));
    buffer.put_slice(data);
}

/// What a client sends; for tests.
#[cfg(test)]
pub fn syn_stream(stream: u32, fin: bool, headers: &[u8]) -> Bytes {
    let mut body = stream.to_be_bytes().to_vec();
    body.extend_from_slice(&[0; 6]);
    body.extend_from_slice(headers);
    control(1, if fin { FIN } else { 0 }, &body)
}

#[cfg(test)]
pub fn settings_frame(entries: &[(u32, u32)]) -> Bytes {
    let mut body = (entries.len() as u32).to_be_bytes().to_vec();
    for (id, value) in entries {
        body.extend_from_slice(&two(*id, *value));
    }
    control(4, 0, &body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(frame: &[u8]) -> Control<'_> {
        let head: [u8; HEAD] = frame[..HEAD].try_into().expect("eight bytes");
        match Head::parse(head).expect("a head") {
            Head::Control { kind, flags, length } => {
                assert_eq!(length, frame.len() - HEAD);
                Control::parse(kind, flags, &frame[HEAD..]).expect("a frame")
            }
            Head::Data { .. } => panic!("not a control frame"),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(parsed(&syn_stream(1, true, b"xy")), Control::SynStream { stream: 1, fin: true, headers: b"xy" });
        assert_eq!(parsed(&syn_reply(3, b"")), Control::SynReply { stream: 3, fin: false, headers: b"" });
        assert_eq!(parsed(&reset(5, ResetReason::Cancel)), Control::Reset { stream: 5, status: 5 });
        assert_eq!(parsed(&ping(7)), Control::Ping(7));
        assert_eq!(parsed(&go_away(9)), Control::GoAway { last: 9 });
        assert_eq!(parsed(&window_update(1, 65536)), Control::WindowUpdate { stream: 1, delta: 65536 });
        assert_eq!(parsed(&settings_frame(&[(4, 1), (7, 99)])), Control::Settings { initial_window: Some(99) });
        let mut data = BytesMut::new();
        put_data(&mut data, 1, true, b"abc");
        assert_eq!(
            Head::parse(data[..8].try_into().expect("eight")),
            Ok(Head::Data { stream: 1, fin: true, length: 3 })
        );
    }

    #[test]
    fn bounds() {
        assert_eq!(Head::parse([0x80, 2, 0, 1, 0, 0, 0, 0]), Err(SpdyError::Version(2)));
        assert!(matches!(Head::parse([0x80, 3, 0, 1, 0, 255, 255, 255]), Err(SpdyError::TooLong { .. })));
        // A count of settings that is not there.
        assert!(Control::parse(4, 0, &[0xff, 0xff, 0xff, 0xff]).is_err());
        assert!(Control::parse(1, 0, &[0; 9]).is_err());
    }

    proptest! {
        #[test]
        fn never_panics(head in any::<[u8; 8]>(), kind in any::<u16>(), flags in any::<u8>(), body in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = Head::parse(head);
            let _ = Control::parse(kind % 12, flags, &body);
        }
    }
}
