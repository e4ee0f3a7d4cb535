//! The short way between two workloads. A packet of a flow that the firewall has just let pass goes from one link straight
//! into the namespace behind the other, past routing, connection tracking and nftables.
//!
//! ```text
//! workload a -> a's link -> arriving ----------- known flow -----------> into b's namespace
//!                              | otherwise: mark and note                      ^
//!                              v                                               |
//!                            sources -> services -> forward (firewall.rs) -> leaving, b's link: learn the flow
//! ```
//!
//! What a flow may do is decided by the firewall alone; the short way only repeats its last answer, and for no longer than
//! two seconds, after which a packet asks again (and keeps the connection tracker's entry alive). What a side of a TCP connection
//! sends after its FIN takes the long way. [`Express::forget`], called
//! after every change that may refuse what was allowed, ends all flows at once: a flow belongs to the epoch in which its
//! packet arrived, so one that was on its way during the change is not believed either. Packets that open or end
//! connections, fragments, options and everything but TCP and UDP take the long way, as does everything from a link that
//! does not show its own MAC and address.
//!
//! Where the kernel cannot do this, packets take the long way.

mod assembler;
mod program;

use crate::netlink::Batch;
use crate::netlink::route::Mac;
use crate::sys::{
    self,
    bpf::{Map, MapKind, load_filter},
};
use assembler::Instruction;
use program::{
    FLOW, KEY, LINK, LINK_ADDRESS, LINK_ADDRESS6, LINK_BYTES, LINK_DETOUR, LINK_MAC, LINK_PACKETS, Maps, NOTE, SETTINGS,
};
use rustix::fd::{AsFd, OwnedFd};
use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Flows that are known at once; further ones push out those that were not used for longest.
const FLOWS: u32 = 16_384;
const LINKS: u32 = 65_536;

pub(crate) struct Express {
    settings: Map<4, SETTINGS>,
    links: Map<4, LINK>,
    /// The programs hold them too.
    _flows: Map<KEY, FLOW>,
    _notes: Map<4, NOTE>,
    arriving: OwnedFd,
    leaving: OwnedFd,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    epoch: u32,
    /// Nanoseconds of the monotonic clock.
    watched: u64,
    owners: HashMap<Ipv4Addr, Owner>,
}

/// Whose a link is.
#[derive(Clone, Copy)]
pub(crate) struct Owner {
    pub index: u32,
    pub mac: Mac,
    pub address: Ipv4Addr,
    pub address6: Ipv6Addr,
    /// What goes to it takes the long way: it is a tap, behind which nothing can be put.
    pub tap: bool,
    /// The same, since it is shaped there.
    pub shaped: bool,
    /// The same, since so many capture it there.
    pub captures: u32,
}

impl Express {
    pub fn load() -> io::Result<Express> {
        let settings = Map::new(MapKind::Array, 1)?;
        let links = Map::new(MapKind::Hash, LINKS)?;
        let flows = Map::new(MapKind::RecentHash, FLOWS)?;
        let notes = Map::new(MapKind::ArrayOfProcessor, 1)?;
        let maps = Maps {
            settings: settings.descriptor(),
            links: links.descriptor(),
            flows: flows.descriptor(),
            notes: notes.descriptor(),
        };
        let load = |name, code: Option<Vec<Instruction>>| {
            let code = code.ok_or_else(|| io::Error::other("the program has a jump without a target"))?;
            let code: Vec<[u8; 8]> = code.into_iter().map(Instruction::bytes).collect();
            load_filter(name, &code)
        };
        let arriving = load("atoll_arriving", program::arriving(maps))?;
        let leaving = load("atoll_leaving", program::leaving(maps))?;
        Ok(Express { settings, links, _flows: flows, _notes: notes, arriving, leaving, state: Mutex::default() })
    }

    /// Puts the programs on a link of the namespace that the batch goes to, in place of those of an earlier process.
    pub fn attach(&self, batch: &mut Batch, index: u32) {
        batch.add_hooks(index);
        batch.add_programs(index, self.arriving.as_fd(), self.leaving.as_fd());
    }

    /// From now on what the link sends in its own name may take the short way, and what goes to it.
    pub fn admit(&self, owner: Owner) -> io::Result<()> {
        let mut state = self.state();
        let mut owner = owner;
        if let Some(before) = state.owners.get(&owner.address).filter(|before| before.index == owner.index) {
            (owner.shaped, owner.captures) = (before.shaped, before.captures);
        }
        self.write_owner(&owner)?;
        state.owners.insert(owner.address, owner);
        Ok(())
    }

    /// Nothing from or to the workload's link takes the short way any more.
    pub fn expel(&self, address: Ipv4Addr) -> io::Result<()> {
        match self.state().owners.remove(&address) {
            Some(owner) => self.links.remove(&owner.index.to_ne_bytes()),
            None => Ok(()),
        }
    }

    /// What goes to the workload passes by its link's queue, or need not any more.
    pub fn shape(&self, address: Ipv4Addr, shaped: bool) -> io::Result<()> {
        self.change(address, |owner| owner.shaped = shaped)
    }

    /// What goes to the workload passes by its link, until [`Express::end_capture`] was called as often.
    pub fn capture(&self, address: Ipv4Addr) -> io::Result<()> {
        self.change(address, |owner| owner.captures = owner.captures.saturating_add(1))
    }

    pub fn end_capture(&self, address: Ipv4Addr) -> io::Result<()> {
        self.change(address, |owner| owner.captures = owner.captures.saturating_sub(1))
    }

    fn change(&self, address: Ipv4Addr, change: impl FnOnce(&mut Owner)) -> io::Result<()> {
        {
            let mut state = self.state();
            let Some(owner) = state.owners.get_mut(&address) else { return Ok(()) };
            change(owner);
            self.write_owner(owner)?;
        }
        // What was learned before is not believed any more.
        self.forget()
    }

    fn write_owner(&self, owner: &Owner) -> io::Result<()> {
        let key = owner.index.to_ne_bytes();
        let mut value = self.links.get(&key)?.unwrap_or([0; LINK]);
        let parts: [(i16, &[u8]); 4] = [
            (LINK_ADDRESS, &owner.address.octets()),
            (LINK_MAC, &owner.mac),
            (LINK_DETOUR, &[u8::from(owner.tap || owner.shaped || owner.captures > 0)]),
            (LINK_ADDRESS6, &owner.address6.octets()),
        ];
        for (place, part) in parts {
            value.iter_mut().skip(place as usize).zip(part).for_each(|(to, from)| *to = *from);
        }
        self.links.set(&key, &value)
    }

    /// Ends all flows: the next packet of each asks the firewall.
    pub fn forget(&self) -> io::Result<()> {
        let mut state = self.state();
        state.epoch = state.epoch.wrapping_add(1);
        self.write(&state)
    }

    /// For so long everything takes the long way, where the kernel counts connections.
    pub fn watch(&self, duration: Duration) -> io::Result<()> {
        let mut state = self.state();
        let until = sys::monotonic_time().saturating_add(duration);
        state.watched = u64::try_from(until.as_nanos()).unwrap_or(u64::MAX);
        self.write(&state)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, state: &State) -> io::Result<()> {
        let mut value = [0; SETTINGS];
        let bytes = state.epoch.to_ne_bytes().into_iter().chain([0; 4]).chain(state.watched.to_ne_bytes());
        value.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        self.settings.set(&[0; 4], &value)
    }

    /// Packets and bytes that went to a workload the short way, which its link's own counters do not have.
    pub fn counters(&self, address: Ipv4Addr) -> io::Result<(u64, u64)> {
        let Some(owner) = self.state().owners.get(&address).copied() else { return Ok((0, 0)) };
        let value = self.links.get(&owner.index.to_ne_bytes())?.unwrap_or([0; LINK]);
        let at = |place: i16| {
            let bytes = value.get(place as usize..place as usize + 8).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u64::from_ne_bytes)
        };
        Ok((at(LINK_PACKETS), at(LINK_BYTES)))
    }
}
