//! Who has which address. One owner of the book (behind the router's lock); the journal is its memory.

use crate::attach::Place;
use crate::config::{Cidr, Cidr6, RouterConfig};
use crate::error::{Error, Result};
use crate::journal::{Journal, Kind, Record};
use crate::subnets::{Subnet, SubnetUse};
use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;
use std::path::Path;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub namespace: String,
    pub key: Option<String>,
    pub address: Ipv4Addr,
    pub kind: Kind,
}

pub struct Addresses {
    journal: Journal,
    book: Book,
}

/// One network's addresses.
struct Pool {
    cidr: Cidr,
    /// Address -> uid of its workload, or `None` while only a key holds it.
    used: HashMap<Ipv4Addr, Option<String>>,
    /// Where the search for a free address goes on: an address that was given back is not given out again at once.
    next: u32,
}

/// The network's own address, the router's (or one more), and the last are not given out.
const FIRST: u32 = 2;
const LAST: u32 = 1;

impl Pool {
    fn new(cidr: Cidr) -> Pool {
        Pool { cidr, used: HashMap::new(), next: FIRST }
    }
    fn take(&mut self, address: Ipv4Addr, uid: Option<String>) {
        if self.used.insert(address, uid).is_none() {
            self.next = address.to_bits().wrapping_sub(self.cidr.base().to_bits()).wrapping_add(1);
        }
    }
    /// Only a key holds it.
    fn is_idle(&self, address: Ipv4Addr) -> bool {
        self.used.get(&address) == Some(&None)
    }
    fn capacity(&self) -> usize {
        (self.cidr.size() - FIRST - LAST) as usize
    }
    fn free(&self) -> Option<Ipv4Addr> {
        let size = self.cidr.size();
        if self.used.len() >= self.capacity() {
            return None;
        }
        (0..size)
            .map(|n| self.next.wrapping_add(n) % size)
            .filter(|n| (FIRST..size - LAST).contains(n))
            .map(|n| self.cidr.nth(n))
            .find(|address| !self.used.contains_key(address))
    }
}

/// The journal's records, summed up.
struct Book {
    leases: BTreeMap<String, Lease>,
    /// Key -> its address, for life.
    keys: BTreeMap<String, Ipv4Addr>,
    pods: Pool,
    subnets: BTreeMap<String, (Subnet, Pool)>,
}

impl Book {
    fn new(cidr: Cidr) -> Book {
        Book { leases: BTreeMap::new(), keys: BTreeMap::new(), pods: Pool::new(cidr), subnets: BTreeMap::new() }
    }
    /// The subnet that an address is of.
    fn subnet_of(&self, address: Ipv4Addr) -> Option<&str> {
        self.subnets.iter().find(|(_, (_, pool))| pool.cidr.contains(address)).map(|(name, _)| name.as_str())
    }
    /// The pool that an address is of; what is nobody's (networks were changed) is with the pods'.
    fn pool(&self, address: Ipv4Addr) -> &Pool {
        let mut pools = self.subnets.values().map(|(_, pool)| pool);
        pools.find(|pool| pool.cidr.contains(address)).unwrap_or(&self.pods)
    }
    fn pool_mut(&mut self, address: Ipv4Addr) -> &mut Pool {
        let mut pools = self.subnets.values_mut().map(|(_, pool)| pool);
        pools.find(|pool| pool.cidr.contains(address)).unwrap_or(&mut self.pods)
    }
    fn apply(&mut self, record: Record) {
        match record {
            Record::Attach { uid, namespace, key, address, kind } => {
                let held = self.pool(address).used.contains_key(&address);
                self.apply(Record::Detach { uid: uid.clone() });
                if let Some(key) = &key {
                    self.apply(Record::Reserve { key: key.clone(), address });
                }
                let pool = self.pool_mut(address);
                if held {
                    pool.used.insert(address, Some(uid.clone()));
                } else {
                    pool.used.remove(&address);
                    pool.take(address, Some(uid.clone()));
                }
                self.leases.insert(uid, Lease { namespace, key, address, kind });
            }
            Record::Detach { uid } => {
                if let Some(lease) = self.leases.remove(&uid) {
                    let kept = self.keys.values().any(|address| *address == lease.address);
                    let pool = self.pool_mut(lease.address);
                    match kept {
                        true => drop(pool.used.insert(lease.address, None)),
                        false => drop(pool.used.remove(&lease.address)),
                    }
                }
            }
            Record::Reserve { key, address } => {
                if let Some(before) = self.keys.insert(key, address)
                    && before != address
                    && self.pool(before).is_idle(before)
                {
                    self.pool_mut(before).used.remove(&before);
                }
                self.pool_mut(address).used.entry(address).or_insert(None);
            }
            Record::Forget { key } => {
                if let Some(address) = self.keys.remove(&key)
                    && self.pool(address).is_idle(address)
                {
                    self.pool_mut(address).used.remove(&address);
                }
            }
            Record::Subnet { name, cidr, cidr6 } => {
                let pool = Pool::new(cidr);
                self.subnets.insert(name.clone(), (Subnet { name, cidr, cidr6 }, pool));
            }
            Record::NoSubnet { name } => {
                if let Some((_, pool)) = self.subnets.remove(&name) {
                    self.pods.used.extend(pool.used);
                }
            }
        }
    }
    fn records(&self) -> Vec<Record> {
        let subnets = self.subnets.values().map(|(subnet, _)| subnet_record(subnet));
        let keys = self.keys.iter().map(|(key, address)| Record::Reserve { key: key.clone(), address: *address });
        let leases = self.leases.iter().map(|(uid, lease)| attach_record(uid, lease));
        subnets.chain(keys).chain(leases).collect()
    }
}

fn subnet_record(subnet: &Subnet) -> Record {
    Record::Subnet { name: subnet.name.clone(), cidr: subnet.cidr, cidr6: subnet.cidr6 }
}

fn attach_record(uid: &str, lease: &Lease) -> Record {
    Record::Attach {
        uid: uid.to_owned(),
        namespace: lease.namespace.clone(),
        key: lease.key.clone(),
        address: lease.address,
        kind: lease.kind,
    }
}

/// With so few free addresses none is set aside.
const FEW: usize = 256;

impl Addresses {
    pub fn open(config: &RouterConfig, path: &Path) -> Result<Addresses> {
        let mut book = Book::new(config.pod_cidr);
        let journal = Journal::open(path, |record| book.apply(record))?;
        let mut addresses = Addresses { journal, book };
        addresses.drop_foreign(config)?;
        addresses.tidy()?;
        Ok(addresses)
    }

    /// What is outside the networks (they were changed) can never be used again.
    fn drop_foreign(&mut self, config: &RouterConfig) -> Result<()> {
        let strays = self.book.subnets.values().map(|(subnet, _)| subnet);
        let strays = strays.filter(|subnet| config.check_subnet(subnet.cidr, subnet.cidr6).is_err());
        let strays: Vec<String> = strays.map(|subnet| subnet.name.clone()).collect();
        for name in strays {
            self.write(Record::NoSubnet { name }, false)?;
        }
        let book = &self.book;
        let foreign = |address: &Ipv4Addr| !book.pool(*address).cidr.contains(*address);
        let uids = book.leases.iter().filter(|(_, lease)| foreign(&lease.address));
        let keys = book.keys.iter().filter(|(_, address)| foreign(address));
        let detach = uids.map(|(uid, _)| Record::Detach { uid: uid.clone() });
        let records: Vec<Record> = detach.chain(keys.map(|(key, _)| Record::Forget { key: key.clone() })).collect();
        for record in records {
            self.write(record, false)?;
        }
        Ok(())
    }

    /// An address of `pod_cidr` for a workload to come, in memory only; `None`: few are left.
    pub fn set_aside(&mut self) -> Option<Ipv4Addr> {
        let pods = &mut self.book.pods;
        if (pods.used.len() + FEW) as u32 >= pods.cidr.size() {
            return None;
        }
        let address = pods.free()?;
        pods.take(address, None);
        Some(address)
    }
    /// Nobody has taken the address that was set aside.
    pub fn give_back(&mut self, address: Ipv4Addr) {
        if self.book.pods.is_idle(address) && !self.book.keys.values().any(|own| *own == address) {
            self.book.pods.used.remove(&address);
        }
    }

    /// The address of this workload: what it has, what its key has, what was set aside for it, or a free one.
    pub fn lease(
        &mut self,
        uid: &str,
        namespace: &str,
        key: Option<&str>,
        kind: Kind,
        place: &Place,
        set_aside: Option<Ipv4Addr>,
    ) -> Result<Lease> {
        if let Some(lease) = self.book.leases.get(uid)
            && lease.key.as_deref() == key
            && lease.kind == kind
        {
            return Ok(lease.clone());
        }
        let own = self.book.leases.get(uid).map(|lease| lease.address);
        let kept = key.and_then(|key| self.book.keys.get(key).copied());
        if let Some(address) = kept
            && let Some(Some(other)) = self.book.pool(address).used.get(&address)
            && other != uid
        {
            return Err(Error::KeyInUse { key: key.unwrap_or_default().to_owned(), address, uid: other.clone() });
        }
        let stays = |address: &Ipv4Addr| !place.moves || self.book.subnet_of(*address) == place.subnet.as_deref();
        let address = match kept.filter(stays).or(own).or(set_aside) {
            Some(address) => address,
            None => self.free(place.subnet.as_deref())?,
        };
        let lease = Lease { namespace: namespace.to_owned(), key: key.map(str::to_owned), address, kind };
        self.write(attach_record(uid, &lease), key.is_some())?;
        Ok(lease)
    }

    pub fn get(&self, uid: &str) -> Option<&Lease> {
        self.book.leases.get(uid)
    }
    pub fn release(&mut self, uid: &str) -> Result<()> {
        if self.book.leases.contains_key(uid) {
            self.write(Record::Detach { uid: uid.to_owned() }, false)?;
        }
        self.tidy()
    }
    /// Keys whose address no workload has.
    pub fn idle(&self) -> Vec<String> {
        let idle = |address: &Ipv4Addr| self.book.pool(*address).is_idle(*address);
        self.book.keys.iter().filter(|(_, address)| idle(address)).map(|(key, _)| key.clone()).collect()
    }
    /// Ends a key's reservation, unless a workload has the address.
    pub fn forget(&mut self, key: &str) -> Result<()> {
        if self.book.keys.get(key).is_some_and(|address| self.book.pool(*address).is_idle(*address)) {
            self.write(Record::Forget { key: key.to_owned() }, true)?;
        }
        Ok(())
    }
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Lease)> {
        self.book.leases.iter()
    }

    pub fn subnets(&self) -> impl Iterator<Item = &Subnet> {
        self.book.subnets.values().map(|(subnet, _)| subnet)
    }
    /// Those with an IPv6 network of their own.
    pub fn pairs(&self) -> Vec<(Cidr, Cidr6)> {
        self.subnets().filter_map(|subnet| Some((subnet.cidr, subnet.cidr6?))).collect()
    }
    pub fn add_subnet(&mut self, subnet: &Subnet) -> Result<()> {
        self.write(subnet_record(subnet), true)
    }
    /// Whether it has ended: nobody has an address of it.
    pub fn remove_subnet(&mut self, name: &str) -> Result<bool> {
        match self.book.subnets.get(name) {
            None => Ok(true),
            Some((_, pool)) if !pool.used.is_empty() => Ok(false),
            Some(_) => self.write(Record::NoSubnet { name: name.to_owned() }, true).map(|()| true),
        }
    }
    pub fn uses(&self) -> Vec<SubnetUse> {
        let one = |(subnet, pool): &(Subnet, Pool)| SubnetUse {
            subnet: subnet.clone(),
            used: pool.used.len(),
            free: pool.capacity().saturating_sub(pool.used.len()),
            workloads: pool.used.values().flatten().cloned().collect(),
            kept: self.keys_of(pool),
        };
        self.book.subnets.values().map(one).collect()
    }
    fn keys_of(&self, pool: &Pool) -> Vec<String> {
        let idle = self.book.keys.iter().filter(|(_, address)| pool.is_idle(**address));
        idle.map(|(key, _)| key.clone()).collect()
    }

    fn write(&mut self, record: Record, sync: bool) -> Result<()> {
        self.journal.append(&record, sync)?;
        self.book.apply(record);
        Ok(())
    }

    fn tidy(&mut self) -> Result<()> {
        let live = self.book.leases.len() + self.book.keys.len() + self.book.subnets.len();
        if self.journal.is_long(live) { self.journal.rewrite(&self.book.records()) } else { Ok(()) }
    }

    /// The next free address of a subnet, or of `pod_cidr`.
    fn free(&self, subnet: Option<&str>) -> Result<Ipv4Addr> {
        let (network, larger, pool) = match subnet {
            None => (self.book.pods.cidr.to_string(), "pod CIDR", &self.book.pods),
            Some(name) => match self.book.subnets.get(name) {
                Some((subnet, pool)) => (format!("Network {name}, {}", subnet.cidr), "Network", pool),
                None => return Err(Error::NoSubnet(name.to_owned())),
            },
        };
        pool.free().ok_or(Error::Exhausted { network, used: pool.used.len(), larger })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config(dir: &Path) -> RouterConfig {
        RouterConfig { pod_cidr: "10.42.0.0/28".parse().unwrap(), ..RouterConfig::new(dir, dir) }
    }

    #[test]
    fn a_key_keeps_its_address_and_the_rest_goes_round() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("addresses");
        let open = || Addresses::open(&config(dir.path()), &path).unwrap();
        let mut book = open();
        let vm = book.lease("vm-1", "a", Some("a/vm"), Kind::Tap, &Place::default(), None).unwrap().address;
        let pod = book.lease("pod-1", "a", None, Kind::Namespace, &Place::default(), None).unwrap().address;
        assert_eq!(book.lease("pod-1", "a", None, Kind::Namespace, &Place::default(), None).unwrap().address, pod);
        assert!(matches!(
            book.lease("vm-2", "a", Some("a/vm"), Kind::Tap, &Place::default(), None),
            Err(Error::KeyInUse { .. })
        ));
        book.release("vm-1").unwrap();
        drop(book);
        let mut book = open();
        assert_eq!(book.lease("vm-2", "a", Some("a/vm"), Kind::Tap, &Place::default(), None).unwrap().address, vm);
        book.release("pod-1").unwrap();
        assert_ne!(book.lease("pod-2", "a", None, Kind::Namespace, &Place::default(), None).unwrap().address, pod);
        book.forget("a/vm").unwrap();
        assert!(book.idle().is_empty());
        book.release("vm-2").unwrap();
        assert_eq!(book.idle(), ["a/vm"]);
        book.forget("a/vm").unwrap();
        assert!(book.idle().is_empty());
        assert_eq!(book.iter().count(), 1);
        assert_eq!(book.book.pods.used.len(), 1);
    }

    #[test]
    fn a_subnet_is_remembered_with_its_addresses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("addresses");
        let edge = Subnet { name: "a/edge".into(), cidr: "10.44.0.16/28".parse().unwrap(), cidr6: None };
        let place = Place { subnet: Some("a/edge".into()), moves: true };
        let mut book = Addresses::open(&config(dir.path()), &path).unwrap();
        assert!(matches!(book.lease("u", "a", None, Kind::Tap, &place, None), Err(Error::NoSubnet(_))));
        book.add_subnet(&edge).unwrap();
        let address = book.lease("u", "a", None, Kind::Tap, &place, None).unwrap().address;
        assert_eq!(address, Ipv4Addr::new(10, 44, 0, 18));
        book.journal.rewrite(&book.book.records()).unwrap();
        drop(book);
        let mut book = Addresses::open(&config(dir.path()), &path).unwrap();
        assert_eq!(book.get("u").unwrap().address, address);
        assert_eq!((book.uses()[0].used, book.book.pods.used.len()), (1, 0));
        assert!(!book.remove_subnet("a/edge").unwrap());
        drop(book);
        // Subnets may be elsewhere now: this one and its addresses are gone.
        let moved = RouterConfig { subnet_cidr: "10.45.0.0/16".parse().unwrap(), ..config(dir.path()) };
        let book = Addresses::open(&moved, &path).unwrap();
        assert!(book.subnets().next().is_none() && book.get("u").is_none() && book.book.pods.used.is_empty());
    }

    #[test]
    fn the_last_address_is_followed_by_a_clear_refusal() {
        let dir = tempfile::tempdir().unwrap();
        let mut book = Addresses::open(&config(dir.path()), &dir.path().join("addresses")).unwrap();
        for n in 0..13 {
            let address =
                book.lease(&format!("u{n}"), "a", None, Kind::Namespace, &Place::default(), None).unwrap().address;
            assert!((2..15).contains(&address.octets()[3]));
        }
        assert!(matches!(
            book.lease("more", "a", None, Kind::Namespace, &Place::default(), None),
            Err(Error::Exhausted { .. })
        ));
        book.release("u5").unwrap();
        assert!(book.lease("more", "a", None, Kind::Namespace, &Place::default(), None).is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_address_is_given_twice(steps in proptest::collection::vec((0u8..8, 0u8..6, 0u8..4), 1..60)) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("addresses");
            let mut book = Addresses::open(&config(dir.path()), &path).unwrap();
            let edge = Subnet { name: "edge".into(), cidr: "10.44.0.0/28".parse().unwrap(), cidr6: None };
            book.add_subnet(&edge).unwrap();
            let mut keys: BTreeMap<u8, Ipv4Addr> = BTreeMap::new();
            for (uid, key, what) in steps {
                let name = format!("u{uid}");
                if what > 0 {
                    let place = Place { subnet: (what == 1).then(|| "edge".into()), moves: false };
                    let text = (key < 3).then(|| format!("k{key}"));
                    if let Ok(lease) = book.lease(&name, "n", text.as_deref(), Kind::Namespace, &place, None) && key < 3 {
                        prop_assert_eq!(*keys.entry(key).or_insert(lease.address), lease.address);
                    }
                } else {
                    book.release(&name).unwrap();
                }
                let mut seen: Vec<Ipv4Addr> = book.iter().map(|(_, lease)| lease.address).collect();
                let count = seen.len();
                seen.sort();
                seen.dedup();
                prop_assert_eq!(seen.len(), count);
            }
            let before: Vec<_> = book.iter().map(|(u, l)| (u.clone(), l.clone())).collect();
            drop(book);
            let again = Addresses::open(&config(dir.path()), &path).unwrap();
            prop_assert_eq!(before, again.iter().map(|(u, l)| (u.clone(), l.clone())).collect::<Vec<_>>());
        }
    }
}
