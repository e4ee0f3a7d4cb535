//! What the reactor waits for, by token. A token is used once: one of something that is gone names nothing.

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(u64);

impl Token {
    /// As the kernel keeps it, with which of two descriptors it is about.
    pub fn event(self, second: bool) -> u64 {
        self.0 << 1 | u64::from(second)
    }
    pub fn of_event(event: u64) -> (Token, bool) {
        (Token(event >> 1), event & 1 == 1)
    }
    fn index(self) -> usize {
        (self.0 & 0xffff_ffff) as usize
    }
}

struct Slot<T> {
    /// 31 bits, so that an event's token has 64.
    generation: u64,
    entry: Option<T>,
}

pub struct Slots<T> {
    slots: Vec<Slot<T>>,
    free: Vec<usize>,
}

impl<T> Slots<T> {
    pub fn new() -> Slots<T> {
        Slots { slots: Vec::new(), free: Vec::new() }
    }
    /// A place for an entry that [`Slots::put`] brings.
    pub fn reserve(&mut self) -> Token {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, entry: None });
            self.slots.len() - 1
        });
        let generation = self.slots.get(index).map_or(0, |slot| slot.generation);
        Token(generation << 32 | index as u64)
    }
    fn slot(&mut self, token: Token) -> Option<&mut Slot<T>> {
        self.slots.get_mut(token.index()).filter(|slot| slot.generation == token.0 >> 32)
    }
    pub fn put(&mut self, token: Token, entry: T) {
        if let Some(slot) = self.slot(token) {
            slot.entry = Some(entry);
        }
    }
    /// Takes the entry out for a while; the token stays valid.
    pub fn take(&mut self, token: Token) -> Option<T> {
        self.slot(token)?.entry.take()
    }
    pub fn get(&mut self, token: Token) -> Option<&mut T> {
        self.slot(token)?.entry.as_mut()
    }
    /// Ends a token, and answers its entry if there is one.
    pub fn remove(&mut self, token: Token) -> Option<T> {
        let slot = self.slot(token)?;
        slot.generation = (slot.generation + 1) & 0x7fff_ffff;
        let entry = slot.entry.take();
        self.free.push(token.index());
        entry
    }
    /// Those for which `of` says so.
    pub fn tokens(&self, of: impl Fn(&T) -> bool) -> Vec<Token> {
        let all = self.slots.iter().enumerate();
        all.filter(|(_, slot)| slot.entry.as_ref().is_some_and(&of))
            .map(|(index, slot)| Token(slot.generation << 32 | index as u64))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_of_the_past_names_nothing() {
        let mut slots = Slots::new();
        let first = slots.reserve();
        slots.put(first, "first");
        assert_eq!(Token::of_event(first.event(true)), (first, true));
        assert_eq!(slots.remove(first), Some("first"));
        let second = slots.reserve();
        slots.put(second, "second");
        assert_ne!(first, second);
        assert!(slots.get(first).is_none() && slots.remove(first).is_none());
        assert_eq!(slots.take(second), Some("second"));
        assert!(slots.take(second).is_none());
        slots.put(second, "again");
        assert_eq!(slots.tokens(|_| true), [second]);
        assert_eq!(slots.get(second), Some(&mut "again"));
    }
}
