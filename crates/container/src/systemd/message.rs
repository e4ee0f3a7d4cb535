//! Messages of D-Bus (its specification, "Message Protocol"), little-endian, as far as systemd's manager needs them.

/// Larger ones are nothing that was asked for.
const MOST: usize = 1 << 20;
pub const HEAD: usize = 16;

pub const CALL: u8 = 1;
pub const RETURN: u8 = 2;
pub const ERROR: u8 = 3;
pub const SIGNAL: u8 = 4;

/// A value in a variant.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Bool(bool),
    U64(u64),
    Text(String),
    U32s(Vec<u32>),
    Bytes(Vec<u8>),
    Pairs(Vec<(String, String)>),
}

impl Value {
    pub fn signature(&self) -> &'static str {
        match self {
            Self::Bool(_) => "b",
            Self::U64(_) => "t",
            Self::Text(_) => "s",
            Self::U32s(_) => "au",
            Self::Bytes(_) => "ay",
            Self::Pairs(_) => "a(ss)",
        }
    }
}

#[derive(Default)]
pub struct Writer(pub Vec<u8>);

impl Writer {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    pub fn u32(&mut self, n: u32) -> &mut Self {
        self.align(4);
        self.0.extend(n.to_le_bytes());
        self
    }

    /// Strings and object paths.
    pub fn text(&mut self, text: &str) -> &mut Self {
        self.u32(length(text.len()));
        self.0.extend(text.as_bytes());
        self.0.push(0);
        self
    }

    fn signature(&mut self, text: &str) {
        self.0.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    /// `align` is that of what it holds.
    pub fn array(&mut self, align: usize, write: impl FnOnce(&mut Self)) -> &mut Self {
        self.u32(0);
        let at = self.0.len();
        self.align(align);
        let begun = self.0.len();
        write(self);
        let bytes = length(self.0.len() - begun).to_le_bytes();
        if let Some(place) = self.0.get_mut(at - 4..at) {
            place.copy_from_slice(&bytes);
        }
        self
    }

    fn variant(&mut self, value: &Value) {
        self.signature(value.signature());
        match value {
            Value::Bool(on) => {
                self.u32(u32::from(*on));
            }
            Value::U64(n) => {
                self.align(8);
                self.0.extend(n.to_le_bytes());
            }
            Value::Text(text) => {
                self.text(text);
            }
            Value::U32s(all) => {
                self.array(4, |w| {
                    for n in all {
                        w.u32(*n);
                    }
                });
            }
            Value::Bytes(bytes) => {
                self.array(1, |w| w.0.extend(bytes));
            }
            Value::Pairs(all) => {
                self.array(8, |w| {
                    for (a, b) in all {
                        w.align(8);
                        w.text(a).text(b);
                    }
                });
            }
        }
    }

    /// `a(sv)`.
    pub fn properties(&mut self, all: &[(&str, Value)]) -> &mut Self {
        self.array(8, |w| {
            for (name, value) in all {
                w.align(8);
                w.text(name).variant(value);
            }
        })
    }
}

/// Writers hold what this process made, far below four gigabytes.
fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

pub struct Call<'a> {
    pub destination: &'a str,
    pub path: &'a str,
    pub interface: &'a str,
    pub member: &'a str,
    pub signature: &'a str,
    pub body: Writer,
}

impl Call<'_> {
    pub fn encode(&self, serial: u32) -> Vec<u8> {
        let mut out = Writer(vec![b'l', CALL, 0, 1]);
        out.u32(length(self.body.0.len())).u32(serial);
        let fields = [(1, "o", self.path), (6, "s", self.destination), (2, "s", self.interface), (3, "s", self.member)];
        out.array(8, |w| {
            for (code, kind, text) in fields {
                w.align(8);
                w.0.push(code);
                w.signature(kind);
                w.text(text);
            }
            if !self.signature.is_empty() {
                w.align(8);
                w.0.push(8);
                w.signature("g");
                w.signature(self.signature);
            }
        });
        out.align(8);
        out.0.extend(&self.body.0);
        out.0
    }
}

/// What came; nothing is believed of it but its length, which [`Message::length`] bounds.
#[derive(Debug, Default, PartialEq)]
pub struct Message {
    pub kind: u8,
    /// The call it answers.
    pub answers: u32,
    pub member: String,
    pub error: String,
    pub signature: String,
    body: Vec<u8>,
}

impl Message {
    /// Of the whole message, from its first [`HEAD`] bytes; `None`: it is none, or too large.
    pub fn length(head: &[u8; HEAD]) -> Option<usize> {
        let mut reader = Reader::new(head);
        if reader.byte()? != b'l' {
            return None;
        }
        reader.at = 4;
        let body = reader.u32()? as usize;
        reader.at = 12;
        let fields = reader.u32()? as usize;
        let whole = HEAD.checked_add(fields)?.checked_next_multiple_of(8)?.checked_add(body)?;
        (whole <= MOST).then_some(whole)
    }

    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        reader.at = 1;
        let mut message = Self { kind: reader.byte()?, ..Self::default() };
        reader.at = 12;
        let end = reader.u32()? as usize + HEAD;
        while reader.at < end {
            reader.align(8);
            let code = reader.byte()?;
            let kind = reader.signature()?;
            match (code, kind.as_str()) {
                (5, "u") => message.answers = reader.u32()?,
                (3, "s") => message.member = reader.text()?,
                (4, "s") => message.error = reader.text()?,
                (8, "g") => message.signature = reader.signature()?,
                (_, "s" | "o") => drop(reader.text()?),
                (_, "u") => drop(reader.u32()?),
                (_, "g") => drop(reader.signature()?),
                _ => return None,
            }
        }
        message.body = bytes.get(end.checked_next_multiple_of(8)?..)?.to_vec();
        Some(message)
    }

    pub fn body(&self) -> Reader<'_> {
        Reader::new(&self.body)
    }
}

pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(count)?;
        let found = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(found)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.align(4);
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    pub fn text(&mut self) -> Option<String> {
        let count = self.u32()? as usize;
        let text = std::str::from_utf8(self.take(count)?).ok()?.to_owned();
        (self.byte()? == 0).then_some(text)
    }

    pub fn signature(&mut self) -> Option<String> {
        let count = usize::from(self.byte()?);
        let text = std::str::from_utf8(self.take(count)?).ok()?.to_owned();
        (self.byte()? == 0).then_some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(bytes: &[u8]) -> Option<usize> {
        Message::length(bytes.first_chunk()?)
    }

    /// By the specification's rules: every header field at a multiple of eight.
    #[test]
    fn a_call_is_laid_out_as_specified() {
        let mut body = Writer::default();
        body.text("ab").u32(7);
        let call = Call { destination: "d", path: "/", interface: "i", member: "m", signature: "su", body };
        let bytes = call.encode(3);
        let expected: &[u8] = b"l\x01\x00\x01\x0c\x00\x00\x00\x03\x00\x00\x00\x48\x00\x00\x00\
            \x01\x01o\x00\x01\x00\x00\x00/\x00\x00\x00\x00\x00\x00\x00\
            \x06\x01s\x00\x01\x00\x00\x00d\x00\x00\x00\x00\x00\x00\x00\
            \x02\x01s\x00\x01\x00\x00\x00i\x00\x00\x00\x00\x00\x00\x00\
            \x03\x01s\x00\x01\x00\x00\x00m\x00\x00\x00\x00\x00\x00\x00\
            \x08\x01g\x00\x02su\x00";
        assert_eq!(bytes.get(..88), Some(expected));
        assert_eq!(whole(&bytes), Some(bytes.len()));
        let read = Message::decode(&bytes).expect("decoded");
        assert_eq!((read.kind, read.member.as_str(), read.signature.as_str()), (CALL, "m", "su"));
        let mut body = read.body();
        assert_eq!((body.text().as_deref(), body.u32(), body.u32()), (Some("ab"), Some(7), None));
    }

    #[test]
    fn properties_are_aligned() {
        let mut body = Writer::default();
        body.properties(&[
            ("A", Value::Bool(true)),
            ("PIDs", Value::U32s(vec![5])),
            ("T", Value::U64(9)),
            ("D", Value::Pairs(vec![("x".into(), "rw".into()), ("y".into(), "m".into())])),
            ("B", Value::Bytes(vec![3])),
        ]);
        assert_eq!(body.0.get(..4), Some(&length(body.0.len() - 8).to_le_bytes()[..]));
        let t = body.0.iter().position(|b| *b == b'T').expect("there");
        // `T\0`, signature `t`, then the number at a multiple of eight.
        let number = (t + 5).next_multiple_of(8);
        assert_eq!(body.0.get(number..number + 8), Some(&9_u64.to_le_bytes()[..]));
    }

    #[test]
    fn foreign_bytes_are_bounded() {
        let mut head = [0; HEAD];
        head[0] = b'l';
        assert_eq!(Message::length(&head), Some(HEAD));
        head[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Message::length(&head), None);
        head[0] = b'B';
        assert_eq!(Message::length(&head), None);
        let mut body = Writer::default();
        body.text("x");
        let good = Call { destination: "d", path: "/", interface: "i", member: "m", signature: "s", body }.encode(1);
        for end in 0..good.len() {
            let _ = Message::decode(good.get(..end).expect("shorter"));
        }
        for at in 0..good.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bad = good.clone();
                if let Some(byte) = bad.get_mut(at) {
                    *byte = value;
                }
                if let Some(message) = Message::decode(&bad) {
                    let _ = message.body().text();
                }
            }
        }
    }
}
