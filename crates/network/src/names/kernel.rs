//! The kernel's sets, kept like what is pinned.

use super::NameSet;
use super::pins::{self, Gone, PER_SET, Pins};
use crate::config::RouterConfig;
use crate::error::Result;
use crate::firewall::{self, TABLE};
use crate::netlink::nft::{self, Family, Timed, Transaction, octets};
use crate::netlink::{Socket, conntrack};
use crate::policy::{Policies, Ranges, pod_address};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub(crate) const PREFIX: &str = "names/";
/// How much longer the kernel holds an address than we do: time to see whether a connection to it lives.
const GRACE: Duration = Duration::from_secs(60);
/// Between two looks at connections.
const PAUSE: Duration = Duration::from_secs(5);
/// Elements that fit into a set; those that have ended count until the kernel has collected them.
const SET_LIMIT: u32 = 4 * PER_SET as u32;

/// What is pinned, shared by the router, which knows the policies, and the DNS server, which gets the answers.
pub struct Names {
    state: Mutex<State>,
    changed: Condvar,
}

pub(crate) struct State {
    socket: Socket,
    config: RouterConfig,
    inside: Ranges,
    /// By namespace.
    sets: HashMap<Arc<str>, Vec<Set>>,
    pins: Pins,
    /// Namespaces of workloads, where those have sets.
    members: HashMap<Ipv4Addr, Arc<str>>,
    nodes: HashSet<IpAddr>,
    stopping: bool,
}

struct Set {
    key: Arc<str>,
    /// In the kernel.
    name: String,
    names: NameSet,
    /// What the kernel holds, and until when.
    held: HashMap<IpAddr, Instant>,
}

/// Addresses that are pinned at one moment, by key in [`Policies::names`].
pub(crate) struct Pinned(HashMap<Arc<str>, HashSet<IpAddr>>);

impl Pinned {
    pub fn has(&self, key: &str, address: IpAddr) -> bool {
        self.0.get(key).is_some_and(|addresses| addresses.contains(&address))
    }
}

impl Names {
    /// `socket` is one of the router's namespace.
    pub(crate) fn new(socket: Socket, config: &RouterConfig) -> Names {
        let state = State {
            socket,
            config: config.clone(),
            inside: firewall::inside(config),
            sets: HashMap::new(),
            pins: Pins::default(),
            members: HashMap::new(),
            nodes: HashSet::new(),
            stopping: false,
        };
        Names { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Nobody pins while the answer lives.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pins the answers, with their TTLs in seconds, to a question of a workload of the namespace. When this returns the
    /// kernel lets workloads reach them that may reach the name. Answers how many addresses it was about.
    pub fn pin(&self, namespace: &str, name: &str, answers: &[(IpAddr, u32)]) -> Result<usize> {
        let mut state = self.lock();
        let pinned = state.pin(namespace, name, answers, Instant::now())?;
        if pinned > 0 {
            self.changed.notify_all();
        }
        Ok(pinned)
    }

    /// Number of pins of each namespace.
    pub fn count(&self) -> BTreeMap<Arc<str>, usize> {
        self.lock().pins.count()
    }

    /// Whether an address is pinned for the names of this key in [`Policies::names`].
    pub fn has(&self, key: &str, address: IpAddr) -> bool {
        let state = self.lock();
        state.sets.values().flatten().any(|set| *set.key == *key && state.pins.holds(&set.names, address))
    }

    /// Ends pins whose time is up at `now`, unless a connection to their address lives: those go on for a while.
    pub fn end(&self, now: Instant) -> Result<()> {
        self.lock().end(now)
    }

    /// Does so when it is time, until [`Names::stop`].
    pub(crate) fn sweep(&self) {
        let mut state = self.lock();
        while !state.stopping {
            let Some(end) = state.pins.next_end() else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let wait = end.saturating_duration_since(Instant::now());
            if wait.is_zero()
                && let Err(error) = state.end(Instant::now())
            {
                tracing::warn!("addresses of names are not looked after, trying again: {error}");
            }
            // New pins end later than old ones do, or within what the kernel's grace covers.
            let wait = wait.max(PAUSE).min(GRACE / 2);
            state = self
                .changed
                .wait_timeout_while(state, wait, |state| !state.stopping)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Lets [`Names::sweep`] begin again after [`Names::stop`].
    pub(crate) fn start(&self) {
        self.lock().stopping = false;
    }

    pub(crate) fn stop(&self) {
        self.lock().stopping = true;
        self.changed.notify_all();
    }
}

impl State {
    fn pin(&mut self, namespace: &str, name: &str, answers: &[(IpAddr, u32)], now: Instant) -> Result<usize> {
        let Some((namespace, sets)) = self.sets.get_key_value(namespace) else { return Ok(0) };
        let of_name: Vec<usize> = (0..sets.len()).filter(|n| sets[*n].names.matches(name)).collect();
        if of_name.is_empty() {
            return Ok(0);
        }
        let (namespace, name): (Arc<str>, Arc<str>) = (namespace.clone(), name.into());
        let outside: BTreeMap<IpAddr, u32> =
            answers.iter().filter(|(address, _)| self.is_outside(*address)).take(PER_SET).copied().collect();
        for (address, ttl) in &outside {
            self.pins.pin(&namespace, &name, *address, pins::end_of(now, *ttl));
        }
        let mut t = Transaction::new(TABLE);
        let State { sets, pins, .. } = self;
        let sets = sets.get_mut(&namespace).map(Vec::as_mut_slice).unwrap_or_default();
        let gone: Vec<Gone> =
            of_name.iter().filter_map(|n| sets.get(*n)).flat_map(|set| pins.prune(&set.names)).collect();
        for set in sets.iter_mut() {
            set.drop_gone(&mut t, pins, &gone);
            if set.names.matches(&name) {
                let kept = outside.iter().filter(|(address, _)| pins.holds(&set.names, **address));
                let ends = kept.map(|(address, ttl)| (*address, pins::end_of(now, *ttl)));
                set.hold(&mut t, &name, ends.collect(), now);
            }
        }
        self.commit(t, &namespace)?;
        Ok(outside.len())
    }

    /// Should it fail, what the namespace's sets hold is unknown, and everything is written again.
    fn commit(&mut self, t: Transaction, namespace: &Arc<str>) -> Result<()> {
        let committed = t.commit(&mut self.socket);
        if committed.is_err() {
            for set in self.sets.get_mut(namespace).into_iter().flatten() {
                set.held.clear();
            }
        }
        committed
    }

    /// Prolongs pins whose time is up where a connection lives, and forgets the others.
    fn end(&mut self, now: Instant) -> Result<()> {
        let ended = self.pins.ended(now);
        if ended.is_empty() {
            return Ok(());
        }
        let addresses: HashSet<IpAddr> = ended.iter().map(|gone| gone.address).collect();
        let (config, members) = (&self.config, &self.members);
        let mut live: HashSet<(Arc<str>, IpAddr)> = HashSet::new();
        conntrack::find(&mut self.socket, |entry| {
            let destination = entry.reply.source;
            let source = pod_address(config, entry.original.source).and_then(|pod| members.get(&pod));
            if let Some(namespace) = source.filter(|_| addresses.contains(&destination)) {
                live.insert((namespace.clone(), destination));
            }
            false
        })?;
        let by_namespace: BTreeSet<Arc<str>> = ended.iter().map(|gone| gone.namespace.clone()).collect();
        for namespace in by_namespace {
            let of = ended.iter().filter(|gone| gone.namespace == namespace);
            let (alive, gone): (Vec<Gone>, Vec<Gone>) =
                of.cloned().partition(|gone| live.contains(&(namespace.clone(), gone.address)));
            let mut t = Transaction::new(TABLE);
            let State { sets, pins, .. } = self;
            gone.iter().for_each(|gone| pins.forget(gone));
            for one in &alive {
                pins.pin(&namespace, &one.name, one.address, now + pins::FLOOR);
            }
            for set in sets.get_mut(&namespace).map(Vec::as_mut_slice).unwrap_or_default() {
                set.drop_gone(&mut t, pins, &gone);
                for one in &alive {
                    if set.names.matches(&one.name) {
                        set.hold(&mut t, &one.name, vec![(one.address, now + pins::FLOOR)], now);
                    }
                }
            }
            self.commit(t, &namespace)?;
        }
        Ok(())
    }

    /// Whether a name may lead there.
    fn is_outside(&self, address: IpAddr) -> bool {
        let odd = match address {
            IpAddr::V4(_) => false,
            IpAddr::V6(v6) => {
                let local = v6.is_loopback() || v6.is_unique_local() || v6.is_unicast_link_local();
                local || v6.is_unspecified() || v6.is_multicast() || v6.to_ipv4().is_some()
            }
        };
        let outside = !odd && !self.inside.contains(address);
        outside && !self.config.networks().contains(address) && !self.nodes.contains(&address)
    }

    pub(crate) fn pinned(&self) -> Pinned {
        let of = |set: &Set| (set.key.clone(), self.pins.of_set(&set.names).into_keys().collect());
        Pinned(self.sets.values().flatten().map(of).collect())
    }

    /// Makes a set of these names with what is pinned already.
    pub(crate) fn make(&self, t: &mut Transaction, name: &str, names: &NameSet) {
        let now = Instant::now();
        let pinned = self.pins.of_set(names);
        for family in Family::INET {
            t.family(family);
            t.add_timed_set(name, family.address(), &names.namespace, SET_LIMIT);
            let of_family = pinned.iter().filter(|(address, _)| Family::of(**address) == family);
            let elements: Vec<Timed> =
                of_family.map(|(address, (until, name))| element(*address, name, *until + GRACE, now)).collect();
            t.add_timed(name, &elements);
        }
        t.family(Family::Ip);
    }

    /// The kernel has these sets now, and no others. `name` says what the kernel calls the set of a key.
    pub(crate) fn install(&mut self, policies: &Policies, mut name: impl FnMut(&Arc<str>) -> String) {
        let mut before: HashMap<Arc<str>, Set> =
            self.sets.drain().flat_map(|(_, sets)| sets).map(|set| (set.key.clone(), set)).collect();
        for (key, names) in &policies.names {
            let kernel = name(key);
            let known = before.remove(key).filter(|set| set.name == kernel);
            let made = || {
                let held = self.pins.of_set(names).into_iter();
                let held = held.map(|(address, (until, _))| (address, until + GRACE)).collect();
                Set { key: key.clone(), name: kernel, names: names.clone(), held }
            };
            let set = known.unwrap_or_else(made);
            self.sets.entry(names.namespace.clone()).or_default().push(set);
        }
        self.pins.keep_namespaces(|namespace| self.sets.contains_key(namespace));
        self.nodes = policies.nodes.iter().copied().collect();
        let workloads = policies.workloads.iter();
        let members = workloads.filter(|(_, workload)| self.sets.contains_key(&workload.namespace));
        self.members = members.map(|(address, workload)| (*address, workload.namespace.clone())).collect();
    }

    /// Reads what an earlier process pinned.
    pub(crate) fn recover(&mut self) -> Result<()> {
        let now = Instant::now();
        for family in Family::INET {
            let sets = nft::set_comments(&mut self.socket, TABLE, family)?;
            for (set, namespace) in sets.into_iter().filter(|(set, _)| set.starts_with(PREFIX)) {
                let namespace: Arc<str> = namespace.into();
                for one in nft::timed(&mut self.socket, TABLE, family, &set)? {
                    if let Some(address) = address_of(&one.key) {
                        let until = now + one.left.saturating_sub(GRACE).min(pins::MOST);
                        self.pins.pin(&namespace, &one.comment.as_str().into(), address, until);
                    }
                }
            }
        }
        Ok(())
    }
}

impl Set {
    /// Takes out what no pin of the set speaks for any more.
    fn drop_gone(&mut self, t: &mut Transaction, pins: &Pins, gone: &[Gone]) {
        for family in Family::INET {
            let gone = gone.iter().filter(|gone| Family::of(gone.address) == family && self.names.matches(&gone.name));
            let dropped: BTreeSet<IpAddr> =
                gone.map(|gone| gone.address).filter(|address| !pins.holds(&self.names, *address)).collect();
            self.held.retain(|address, _| !dropped.contains(address));
            let keys: Vec<Vec<u8>> = dropped.into_iter().map(octets).collect();
            t.family(family);
            t.remove_timed(&self.name, &keys);
        }
        t.family(Family::Ip);
    }

    /// Puts in what is not held for long enough.
    fn hold(&mut self, t: &mut Transaction, name: &str, ends: Vec<(IpAddr, Instant)>, now: Instant) {
        for family in Family::INET {
            let mut elements = Vec::new();
            for (address, until) in ends.iter().filter(|(address, _)| Family::of(*address) == family) {
                if self.held.get(address).is_none_or(|held| *held < *until + GRACE / 2) {
                    self.held.insert(*address, *until + GRACE);
                    elements.push(element(*address, name, *until + GRACE, now));
                }
            }
            t.family(family);
            if !elements.is_empty() {
                t.put_timed(&self.name, &elements);
            }
        }
        t.family(Family::Ip);
    }
}

fn element(address: IpAddr, name: &str, end: Instant, now: Instant) -> Timed {
    Timed { key: octets(address), comment: name.to_owned(), left: end.saturating_duration_since(now) }
}

fn address_of(key: &[u8]) -> Option<IpAddr> {
    match key.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(key).ok()?)),
        16 => Some(IpAddr::from(<[u8; 16]>::try_from(key).ok()?)),
        _ => None,
    }
}
