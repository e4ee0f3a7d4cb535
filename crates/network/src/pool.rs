//! Links that are ready before a workload asks: a namespace with its link, addresses and routes, for the next free address.
//! What is left to do for the workload that takes one is to write down whose it is, to pin it and to let it in.
//!
//! A prepared namespace lives by its descriptor alone and its address is set aside in memory only: with the process both
//! are gone.

use crate::attach::link_name;
use crate::error::Result;
use crate::journal::Kind;
use crate::ns;
use crate::router::{Router, guard};
use rustix::fd::OwnedFd;
use std::net::Ipv4Addr;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How long after one was taken the next is made, while there are more: whoever took it is busy with a start.
const REST: Duration = Duration::from_millis(20);

#[derive(Default)]
pub(crate) struct Pool {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    ready: Vec<Prepared>,
    wanted: usize,
}

pub(crate) struct Prepared {
    pub address: Ipv4Addr,
    pub netns: OwnedFd,
}

impl Pool {
    pub fn take(&self) -> Option<Prepared> {
        let taken = guard(&self.state).ready.pop();
        self.changed.notify_all();
        taken
    }
    /// What could not be prepared may be now.
    pub fn wake(&self) {
        self.changed.notify_all();
    }
}

impl Router {
    /// Keeps so many links prepared; returns after [`Router::stop_preparing`]. For a thread of its own, when the start is
    /// over.
    pub fn keep_prepared(&self, count: usize) {
        guard(&self.pool.state).wanted = count;
        loop {
            let mut state = guard(&self.pool.state);
            let was_full = state.ready.len() >= state.wanted;
            while state.wanted > 0 && state.ready.len() >= state.wanted {
                state = self.pool.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.wanted == 0 {
                return;
            }
            let rests = was_full && !state.ready.is_empty();
            drop(state);
            if rests {
                std::thread::sleep(REST);
            }
            match self.prepare() {
                Ok(Some(prepared)) => self.keep(prepared),
                Ok(None) => self.wait_for_a_change(),
                Err(error) => {
                    tracing::warn!(%error, "cannot prepare a link; workloads make their own");
                    self.wait_for_a_change();
                }
            }
        }
    }

    fn keep(&self, prepared: Prepared) {
        let mut state = guard(&self.pool.state);
        if state.wanted > 0 {
            state.ready.push(prepared);
        } else {
            drop(state);
            self.discard(prepared);
        }
    }

    /// Ends [`Router::keep_prepared`] and gives back what it keeps.
    pub fn stop_preparing(&self) {
        let unused = {
            let mut state = guard(&self.pool.state);
            state.wanted = 0;
            std::mem::take(&mut state.ready)
        };
        self.pool.changed.notify_all();
        for prepared in unused {
            self.discard(prepared);
        }
    }

    /// How many links are prepared now.
    pub fn prepared(&self) -> usize {
        guard(&self.pool.state).ready.len()
    }

    /// What cannot be made now may be when the next workload has come or gone.
    fn wait_for_a_change(&self) {
        let state = guard(&self.pool.state);
        if state.wanted > 0 {
            drop(self.pool.changed.wait(state));
        }
    }

    /// `None`: too few addresses are free to set one aside.
    fn prepare(&self) -> Result<Option<Prepared>> {
        let Some(address) = guard(&self.addresses).set_aside() else { return Ok(None) };
        match self.make_namespace(&link_name(Kind::Namespace, address), address) {
            Ok(netns) => Ok(Some(Prepared { address, netns })),
            Err(error) => {
                guard(&self.addresses).give_back(address);
                Err(error)
            }
        }
    }

    /// The namespace goes, and the link with it.
    pub(crate) fn discard(&self, prepared: Prepared) {
        if let Some(express) = &self.express
            && let Err(error) = express.expel(prepared.address)
        {
            tracing::warn!(address = %prepared.address, %error, "cannot end a prepared link's short ways");
        }
        drop(prepared.netns);
        guard(&self.addresses).give_back(prepared.address);
    }

    /// A namespace with all that a workload with this address needs in it.
    pub(crate) fn make_namespace(&self, name: &str, address: Ipv4Addr) -> Result<OwnedFd> {
        // A link of that name would belong to a namespace that nobody can find any more.
        self.remove_link(name)?;
        ns::fresh(|pod| {
            self.workload_sysctls()?;
            self.join(name, address, pod)
        })
    }
}
