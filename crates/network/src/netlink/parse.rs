//! Reads netlink messages and attributes. Lengths are checked; whatever does not fit ends the iteration.

const HEADER: usize = 16;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const ACK_TLVS: u16 = 0x200;
const TYPE_MASK: u16 = 0x3fff;

/// One message as it came.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    pub payload: &'a [u8],
}

/// What a message means to the one who asked.
#[derive(Debug)]
pub enum Answer<'a> {
    Acknowledged,
    /// `code` is a positive errno.
    Error {
        code: i32,
        detail: &'a str,
    },
    Message {
        kind: u16,
        payload: &'a [u8],
    },
}

/// Iterates over the messages of one datagram.
pub struct Messages<'a>(&'a [u8]);

impl<'a> Messages<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Messages(bytes)
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;
    fn next(&mut self) -> Option<Message<'a>> {
        let length = u32_at(self.0, 0)? as usize;
        let message = Message {
            kind: u16_at(self.0, 4)?,
            flags: u16_at(self.0, 6)?,
            sequence: u32_at(self.0, 8)?,
            payload: self.0.get(HEADER..length)?,
        };
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    }
}

impl<'a> Message<'a> {
    /// `None` for what answers nothing (end of a dump, no-ops).
    pub fn answer(self) -> Option<Answer<'a>> {
        match self.kind {
            ERROR => {
                let code = u32_at(self.payload, 0)? as i32;
                if code == 0 {
                    return Some(Answer::Acknowledged);
                }
                // With NETLINK_CAP_ACK only the header of the request is echoed (4 + 16 bytes) before attributes.
                let attributes = if self.flags & ACK_TLVS != 0 { self.payload.get(20..) } else { None };
                let detail = attributes.and_then(|bytes| Attributes::new(bytes).find(|(kind, _)| *kind == 1));
                Some(Answer::Error { code: code.wrapping_neg(), detail: detail.map_or("", |(_, bytes)| text(bytes)) })
            }
            DONE => match u32_at(self.payload, 0).map(|code| code as i32) {
                Some(code) if code < 0 => Some(Answer::Error { code: code.wrapping_neg(), detail: "" }),
                _ => None,
            },
            0..=15 => None,
            kind => Some(Answer::Message { kind, payload: self.payload }),
        }
    }
}

/// Iterates over attributes: type without flags, payload.
pub struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Attributes(bytes)
    }
    /// The payload of the first attribute of this type.
    pub fn get(bytes: &'a [u8], kind: u16) -> Option<&'a [u8]> {
        Attributes(bytes).find(|(k, _)| *k == kind).map(|(_, payload)| payload)
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);
    fn next(&mut self) -> Option<(u16, &'a [u8])> {
        let length = usize::from(u16_at(self.0, 0)?);
        let kind = u16_at(self.0, 2)? & TYPE_MASK;
        let payload = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    }
}

/// A string up to its terminating zero; not UTF-8 reads as empty.
pub fn text(bytes: &[u8]) -> &str {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    bytes.get(..end).and_then(|bytes| std::str::from_utf8(bytes).ok()).unwrap_or_default()
}

pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::super::Writer;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_reads_back() {
        let mut writer = Writer::default();
        writer.message(20, 5, 7, |w| {
            w.raw(&[1, 2, 3, 4]);
            w.string(1, "eth0");
            w.nest(2, |w| w.u32(3, 99));
        });
        writer.message(21, 0, 8, |_| {});
        let messages: Vec<_> = Messages::new(writer.bytes()).collect();
        assert_eq!(messages.len(), 2);
        assert_eq!((messages[0].kind, messages[0].sequence), (20, 7));
        let attributes = &messages[0].payload[4..];
        assert_eq!(text(Attributes::get(attributes, 1).unwrap()), "eth0");
        let inner = Attributes::get(Attributes::get(attributes, 2).unwrap(), 3).unwrap();
        assert_eq!(u32_at(inner, 0), Some(99));
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            for message in Messages::new(&bytes) {
                let _ = format!("{:?}", message.answer());
                let _ = Attributes::new(message.payload).map(|(_, p)| Attributes::new(p).count()).sum::<usize>();
            }
            let _ = Attributes::new(&bytes).map(|(_, p)| text(p).len()).sum::<usize>();
        }
        #[test]
        fn iteration_ends(length in 0u32..40, rest in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut bytes = length.to_ne_bytes().to_vec();
            bytes.extend(rest);
            prop_assert!(Messages::new(&bytes).count() <= bytes.len() / 16 + 1);
            prop_assert!(Attributes::new(&bytes).count() <= bytes.len() / 4 + 1);
        }
    }
}
