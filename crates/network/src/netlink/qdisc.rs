//! Queueing disciplines and filters (`linux/pkt_sched.h`, `linux/pkt_cls.h`): what limits a link's bandwidth, and programs
//! that look at its packets.

use super::{Batch, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, Writer};
use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::io::Errno;

const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const ROOT: u32 = 0xffff_ffff;
/// Where filters see what comes in by a link and what leaves by it.
const HOOKS: u32 = 0xffff_fff1;
const HOOKS_HANDLE: u32 = 0xffff_0000;
const ARRIVING: u32 = 0xffff_fff2;
const LEAVING: u32 = 0xffff_fff3;
const SHAPER: u32 = 0x1_0000;
/// The shaper's only class.
const SHAPED: u32 = 0x1_0001;
const FAIR: u32 = 0x2_0000;

const TBF_PARMS: u16 = 1;
const TBF_RATE64: u16 = 4;
const TBF_BURST: u16 = 6;
/// The kernel needs no table of transmission times for it.
const LINKLAYER_ETHERNET: u8 = 1;

const U32_SELECTOR: u16 = 5;
const U32_ACTIONS: u16 = 7;
const U32_TERMINAL: u8 = 1;
/// The first node of the first table.
const U32_FIRST: u32 = 0x8000_0801;
const ACTION_KIND: u16 = 1;
const ACTION_OPTIONS: u16 = 2;
const MIRRED_PARMS: u16 = 2;
const ACTION_STOLEN: u32 = 4;
const REDIRECT_OUT: u32 = 1;
/// Priority 1, every protocol (`ETH_P_ALL` in network order).
const FIRST_OF_ALL: u32 = 1 << 16 | (0x0003u16.to_be() as u32);

/// Priority 10.
const AFTER_DETOURS: u32 = 10 << 16 | (0x0003u16.to_be() as u32);

const BPF_FD: u16 = 6;
const BPF_NAME: u16 = 7;
const BPF_FLAGS: u16 = 8;
/// What the program returns is the verdict.
const BPF_DIRECT: u32 = 1;

/// A token bucket: what it lets out, and how much waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Bytes a second.
    pub rate: u64,
    /// Bytes that may leave at once.
    pub burst: u32,
    /// Bytes that wait; further ones are dropped.
    pub queue: u32,
}

fn traffic(w: &mut Writer, index: u32, handle: u32, parent: u32, info: u32) {
    w.raw(&[0; 4]);
    for value in [index, handle, parent, info] {
        w.raw(&value.to_ne_bytes());
    }
}

impl Batch {
    /// Limits what leaves by a link. A limit that is there is changed; what waits goes on waiting.
    pub fn shape(&mut self, index: u32, shape: Shape) {
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        self.request("limit the link's bandwidth", RTM_NEWQDISC, flags, &[], |w| {
            traffic(w, index, SHAPER, ROOT, 0);
            w.string(TCA_KIND, "tbf");
            w.nest(TCA_OPTIONS, |w| {
                let rate = u32::try_from(shape.rate).unwrap_or(u32::MAX);
                let mut parms = vec![0, LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0];
                parms.extend(rate.to_ne_bytes());
                parms.extend([0; 12]);
                parms.extend(shape.queue.to_ne_bytes());
                parms.extend([0; 8]);
                w.attr(TBF_PARMS, &parms);
                w.attr(TBF_RATE64, &shape.rate.to_ne_bytes());
                w.u32(TBF_BURST, shape.burst);
            });
        });
    }
    /// What waits for a limited link takes turns by connection. A kernel that cannot do that goes on in order of arrival.
    pub fn queue_fairly(&mut self, index: u32) {
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        self.request("queue fairly", RTM_NEWQDISC, flags, &[Errno::NOENT], |w| {
            traffic(w, index, FAIR, SHAPED, 0);
            w.string(TCA_KIND, "fq_codel");
        });
    }
    /// Ends the limit of what leaves by a link.
    pub fn unshape(&mut self, index: u32) {
        let none = &[Errno::NOENT, Errno::INVAL];
        self.request("end the link's limit", RTM_DELQDISC, NLM_F_ACK, none, |w| traffic(w, index, SHAPER, ROOT, 0));
    }
    /// Where filters can be put. A kernel that has none of it goes on without.
    pub fn add_hooks(&mut self, index: u32) {
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        self.request("look at the link's packets", RTM_NEWQDISC, flags, &[Errno::EXIST, Errno::NOENT], |w| {
            traffic(w, index, HOOKS_HANDLE, HOOKS, 0);
            w.string(TCA_KIND, "clsact");
        });
    }
    /// All that comes in by a link leaves by another first, which then hands it back as come in by the link, past all
    /// other filters.
    pub fn detour(&mut self, index: u32, by: u32) {
        self.add_hooks(index);
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        self.request("redirect what comes in", RTM_NEWTFILTER, flags, &[Errno::EXIST], |w| {
            traffic(w, index, U32_FIRST, ARRIVING, FIRST_OF_ALL);
            w.string(TCA_KIND, "u32");
            w.nest(TCA_OPTIONS, |w| {
                // One key, which everything matches.
                let mut selector = vec![U32_TERMINAL, 0, 1, 0];
                selector.resize(16 + 16, 0);
                w.attr(U32_SELECTOR, &selector);
                w.nest(U32_ACTIONS, |w| w.nest(1, |w| redirect(w, by)));
            });
        });
    }
    /// Ends [`Batch::detour`].
    pub fn end_detour(&mut self, index: u32) {
        let none = &[Errno::NOENT, Errno::INVAL];
        self.request("end the redirection", RTM_DELTFILTER, NLM_F_ACK, none, |w| {
            traffic(w, index, 0, ARRIVING, FIRST_OF_ALL);
        });
    }
    /// Programs that see what comes in by a link and what leaves by it; they replace those that are there.
    pub fn add_programs(&mut self, index: u32, arriving: BorrowedFd<'_>, leaving: BorrowedFd<'_>) {
        for (parent, program) in [(ARRIVING, arriving), (LEAVING, leaving)] {
            let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
            self.request("put a program on the link", RTM_NEWTFILTER, flags, &[], |w| {
                traffic(w, index, 1, parent, AFTER_DETOURS);
                w.string(TCA_KIND, "bpf");
                w.nest(TCA_OPTIONS, |w| {
                    w.u32(BPF_FD, program.as_raw_fd() as u32);
                    w.string(BPF_NAME, "atoll");
                    w.u32(BPF_FLAGS, BPF_DIRECT);
                });
            });
        }
    }
    pub fn remove_programs(&mut self, index: u32) {
        let none = &[Errno::NOENT, Errno::INVAL];
        for parent in [ARRIVING, LEAVING] {
            self.request("take the program off the link", RTM_DELTFILTER, NLM_F_ACK, none, |w| {
                traffic(w, index, 0, parent, AFTER_DETOURS);
            });
        }
    }
}

fn redirect(w: &mut Writer, to: u32) {
    w.string(ACTION_KIND, "mirred");
    w.nest(ACTION_OPTIONS, |w| {
        let mut parms = Vec::with_capacity(28);
        for value in [0, 0, ACTION_STOLEN, 0, 0, REDIRECT_OUT, to] {
            parms.extend(u32::to_ne_bytes(value));
        }
        w.attr(MIRRED_PARMS, &parms);
    });
}
