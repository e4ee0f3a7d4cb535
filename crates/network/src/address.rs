//! Who has which address. One owner of the book (behind the router's lock); the journal is its memory.

use crate::config::{Cidr, RouterConfig};
use crate::error::{Error, Result};
use crate::journal::{Journal, Kind, Record};
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
    cidr: Cidr,
    journal: Journal,
    book: Book,
}

/// The journal's records, summed up.
#[derive(Default)]
struct Book {
    leases: BTreeMap<String, Lease>,
    /// Key -> its address, for life.
    keys: BTreeMap<String, Ipv4Addr>,
    /// Address -> uid of its workload, or `None` while only a key holds it.
    used: HashMap<Ipv4Addr, Option<String>>,
    /// Where the search for a free address goes on: an address that was given back is not given out again at once.
    next: u32,
}

impl Book {
    fn apply(&mut self, cidr: Cidr, record: Record) {
        match record {
            Record::Attach { uid, namespace, key, address, kind } => {
                let fresh = !self.used.contains_key(&address);
                self.apply(cidr, Record::Detach { uid: uid.clone() });
                if let Some(key) = &key {
                    self.apply(cidr, Record::Reserve { key: key.clone(), address });
                }
                self.used.insert(address, Some(uid.clone()));
                if fresh {
                    self.next = address.to_bits().wrapping_sub(cidr.base().to_bits()).wrapping_add(1);
                }
                self.leases.insert(uid, Lease { namespace, key, address, kind });
            }
            Record::Detach { uid } => {
                if let Some(lease) = self.leases.remove(&uid) {
                    if self.keys.values().any(|address| *address == lease.address) {
                        self.used.insert(lease.address, None);
                    } else {
                        self.used.remove(&lease.address);
                    }
                }
            }
            Record::Reserve { key, address } => {
                if let Some(before) = self.keys.insert(key, address)
                    && before != address
                    && self.used.get(&before) == Some(&None)
                {
                    self.used.remove(&before);
                }
                self.used.entry(address).or_insert(None);
            }
            Record::Forget { key } => {
                if let Some(address) = self.keys.remove(&key)
                    && self.used.get(&address) == Some(&None)
                {
                    self.used.remove(&address);
                }
            }
        }
    }
    fn records(&self) -> Vec<Record> {
        let keys = self.keys.iter().map(|(key, address)| Record::Reserve { key: key.clone(), address: *address });
        let leases = self.leases.iter().map(|(uid, lease)| attach_record(uid, lease));
        keys.chain(leases).collect()
    }
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
        let cidr = config.pod_cidr;
        let mut book = Book { next: 2, ..Book::default() };
        let journal = Journal::open(path, |record| book.apply(cidr, record))?;
        let mut addresses = Addresses { cidr, journal, book };
        addresses.drop_foreign()?;
        addresses.tidy()?;
        Ok(addresses)
    }

    /// Reservations outside the CIDR (it was changed) can never be used again.
    fn drop_foreign(&mut self) -> Result<()> {
        let cidr = self.cidr;
        let keys: Vec<String> =
            self.book.keys.iter().filter(|(_, a)| !cidr.contains(**a)).map(|(key, _)| key.clone()).collect();
        let uids: Vec<String> =
            self.book.leases.iter().filter(|(_, l)| !cidr.contains(l.address)).map(|(uid, _)| uid.clone()).collect();
        let forget = keys.into_iter().map(|key| Record::Forget { key });
        for record in uids.into_iter().map(|uid| Record::Detach { uid }).chain(forget) {
            self.write(record, false)?;
        }
        Ok(())
    }

    /// An address for a workload to come, in memory only; `None`: few are left.
    pub fn set_aside(&mut self) -> Option<Ipv4Addr> {
        if (self.book.used.len() + FEW) as u32 >= self.cidr.size() {
            return None;
        }
        let address = self.free().ok()?;
        self.book.used.insert(address, None);
        self.book.next = address.to_bits().wrapping_sub(self.cidr.base().to_bits()).wrapping_add(1);
        Some(address)
    }
    /// Nobody has taken the address that was set aside.
    pub fn give_back(&mut self, address: Ipv4Addr) {
        if self.book.used.get(&address) == Some(&None) && !self.book.keys.values().any(|own| *own == address) {
            self.book.used.remove(&address);
        }
    }

    /// The address of this workload: what it has, what its key has, what was set aside for it, or a free one.
    pub fn lease(
        &mut self,
        uid: &str,
        namespace: &str,
        key: Option<&str>,
        kind: Kind,
        set_aside: Option<Ipv4Addr>,
    ) -> Result<Lease> {
        if let Some(lease) = self.book.leases.get(uid)
            && lease.key.as_deref() == key
            && lease.kind == kind
        {
            return Ok(lease.clone());
        }
        let own = self.book.leases.get(uid).map(|lease| lease.address);
        let address = match (key.and_then(|key| self.book.keys.get(key).copied()), own) {
            (Some(address), _) => {
                if let Some(Some(other)) = self.book.used.get(&address)
                    && other != uid
                {
                    let key = key.unwrap_or_default().to_owned();
                    return Err(Error::KeyInUse { key, address, uid: other.clone() });
                }
                address
            }
            (None, Some(address)) => address,
            (None, None) => match set_aside {
                Some(address) => address,
                None => self.free()?,
            },
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
        let idle = |address: &Ipv4Addr| self.book.used.get(address) == Some(&None);
        self.book.keys.iter().filter(|(_, address)| idle(address)).map(|(key, _)| key.clone()).collect()
    }
    /// Ends a key's reservation, unless a workload has the address.
    pub fn forget(&mut self, key: &str) -> Result<()> {
        if self.book.keys.get(key).is_some_and(|address| self.book.used.get(address) == Some(&None)) {
            self.write(Record::Forget { key: key.to_owned() }, true)?;
        }
        Ok(())
    }
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Lease)> {
        self.book.leases.iter()
    }

    fn write(&mut self, record: Record, sync: bool) -> Result<()> {
        self.journal.append(&record, sync)?;
        self.book.apply(self.cidr, record);
        Ok(())
    }

    fn tidy(&mut self) -> Result<()> {
        let live = self.book.leases.len() + self.book.keys.len();
        if self.journal.is_long(live) { self.journal.rewrite(&self.book.records()) } else { Ok(()) }
    }

    /// The next free address; not the network's own, the router's, or the last.
    fn free(&self) -> Result<Ipv4Addr> {
        let size = self.cidr.size();
        let exhausted = || Error::Exhausted { cidr: self.cidr.to_string(), used: self.book.used.len() };
        if self.book.used.len() as u32 >= size - 3 {
            return Err(exhausted());
        }
        (0..size)
            .map(|n| self.book.next.wrapping_add(n) % size)
            .filter(|n| (2..size - 1).contains(n))
            .map(|n| self.cidr.nth(n))
            .find(|address| !self.book.used.contains_key(address))
            .ok_or_else(exhausted)
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
        let vm = book.lease("vm-1", "a", Some("a/vm"), Kind::Tap, None).unwrap().address;
        let pod = book.lease("pod-1", "a", None, Kind::Namespace, None).unwrap().address;
        assert_eq!(book.lease("pod-1", "a", None, Kind::Namespace, None).unwrap().address, pod);
        assert!(matches!(book.lease("vm-2", "a", Some("a/vm"), Kind::Tap, None), Err(Error::KeyInUse { .. })));
        book.release("vm-1").unwrap();
        drop(book);
        let mut book = open();
        assert_eq!(book.lease("vm-2", "a", Some("a/vm"), Kind::Tap, None).unwrap().address, vm);
        book.release("pod-1").unwrap();
        assert_ne!(book.lease("pod-2", "a", None, Kind::Namespace, None).unwrap().address, pod);
        book.forget("a/vm").unwrap();
        assert!(book.idle().is_empty());
        book.release("vm-2").unwrap();
        assert_eq!(book.idle(), ["a/vm"]);
        book.forget("a/vm").unwrap();
        assert!(book.idle().is_empty());
        assert_eq!(book.iter().count(), 1);
        assert_eq!(book.book.used.len(), 1);
    }

    #[test]
    fn the_last_address_is_followed_by_a_clear_refusal() {
        let dir = tempfile::tempdir().unwrap();
        let mut book = Addresses::open(&config(dir.path()), &dir.path().join("addresses")).unwrap();
        for n in 0..13 {
            let address = book.lease(&format!("u{n}"), "a", None, Kind::Namespace, None).unwrap().address;
            assert!((2..15).contains(&address.octets()[3]));
        }
        assert!(matches!(book.lease("more", "a", None, Kind::Namespace, None), Err(Error::Exhausted { .. })));
        book.release("u5").unwrap();
        assert!(book.lease("more", "a", None, Kind::Namespace, None).is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_address_is_given_twice(steps in proptest::collection::vec((0u8..8, 0u8..6, any::<bool>()), 1..60)) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("addresses");
            let mut book = Addresses::open(&config(dir.path()), &path).unwrap();
            let mut keys: BTreeMap<u8, Ipv4Addr> = BTreeMap::new();
            for (uid, key, attach) in steps {
                let name = format!("u{uid}");
                if attach {
                    let text = (key < 3).then(|| format!("k{key}"));
                    if let Ok(lease) = book.lease(&name, "n", text.as_deref(), Kind::Namespace, None) && key < 3 {
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
