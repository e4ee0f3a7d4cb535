//! Writes netlink messages and attributes, padded and with lengths filled in.

/// A growing run of netlink messages.
#[derive(Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

const NESTED: u16 = 0x8000;

impl Writer {
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
    pub fn len(&self) -> usize {
        self.bytes.len()
    }
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
    /// A whole message with its header.
    pub fn message(&mut self, kind: u16, flags: u16, sequence: u32, fill: impl FnOnce(&mut Writer)) {
        let start = self.bytes.len();
        self.raw(&[0; 4]);
        self.raw(&kind.to_ne_bytes());
        self.raw(&flags.to_ne_bytes());
        self.raw(&sequence.to_ne_bytes());
        self.raw(&[0; 4]);
        fill(self);
        let length = (self.bytes.len() - start) as u32;
        if let Some(place) = self.bytes.get_mut(start..start + 4) {
            place.copy_from_slice(&length.to_ne_bytes());
        }
        self.pad();
    }
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }
    pub fn attr(&mut self, kind: u16, payload: &[u8]) {
        self.sized(kind, |w| w.raw(payload));
    }
    /// A zero-terminated string.
    pub fn string(&mut self, kind: u16, text: &str) {
        self.sized(kind, |w| {
            w.raw(text.as_bytes());
            w.raw(&[0]);
        });
    }
    pub fn u8(&mut self, kind: u16, value: u8) {
        self.attr(kind, &[value]);
    }
    pub fn u32(&mut self, kind: u16, value: u32) {
        self.attr(kind, &value.to_ne_bytes());
    }
    pub fn be32(&mut self, kind: u16, value: u32) {
        self.attr(kind, &value.to_be_bytes());
    }
    pub fn be64(&mut self, kind: u16, value: u64) {
        self.attr(kind, &value.to_be_bytes());
    }
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Writer)) {
        self.sized(kind | NESTED, fill);
    }
    /// An attribute's length is 16 bits; callers split what is larger. What overflows anyway is written with the largest
    /// length, which the kernel refuses as malformed rather than misreads.
    fn sized(&mut self, kind: u16, fill: impl FnOnce(&mut Writer)) {
        let start = self.bytes.len();
        self.raw(&[0; 2]);
        self.raw(&kind.to_ne_bytes());
        fill(self);
        let length = u16::try_from(self.bytes.len() - start).unwrap_or(u16::MAX);
        if let Some(place) = self.bytes.get_mut(start..start + 2) {
            place.copy_from_slice(&length.to_ne_bytes());
        }
        self.pad();
    }
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
