//! Who owns what, by uid. Pure; every change answers with the objects that have to be looked at because of it.

use api::kind::Resource;
use api::object::{Meta, Object, SharedObject};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

pub(super) type Uid = Arc<str>;

pub(super) const FOREGROUND: &str = "foregroundDeletion";
pub(super) const ORPHAN: &str = "orphan";

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub group: Arc<str>,
    pub kind: String,
    pub name: String,
    pub uid: Uid,
    pub blocks: bool,
}

struct Node {
    resource: Resource,
    namespace: Arc<str>,
    name: Arc<str>,
    owners: Vec<Owner>,
    deleting: bool,
    foreground: bool,
    orphan: bool,
}

/// Resource, namespace, name.
pub(super) type Address = (Resource, Arc<str>, Arc<str>);

#[derive(Default)]
pub(super) struct Graph {
    nodes: HashMap<Uid, Node>,
    /// Owner to dependents; owners need not be there.
    dependents: HashMap<Uid, BTreeSet<Uid>>,
}

pub(super) fn owners(object: &Object) -> Vec<Owner> {
    crate::objects::list(object, "/metadata/ownerReferences")
        .iter()
        .map(|owner| Owner {
            group: owner.str_at("/apiVersion").rsplit_once('/').map_or("", |(group, _)| group).into(),
            kind: owner.str_at("/kind").to_owned(),
            name: owner.str_at("/name").to_owned(),
            uid: owner.str_at("/uid").into(),
            blocks: crate::objects::flag(owner, "/blockOwnerDeletion"),
        })
        .collect()
}

impl Graph {
    pub fn put(&mut self, resource: &Resource, object: &SharedObject) -> Vec<Uid> {
        let uid: Uid = object.uid().into();
        let finalizers = object.finalizers();
        let node = Node {
            resource: resource.clone(),
            namespace: object.namespace().into(),
            name: object.name().into(),
            owners: owners(object),
            deleting: object.is_deleting(),
            foreground: finalizers.contains(&FOREGROUND),
            orphan: finalizers.contains(&ORPHAN),
        };
        let mut touched = Vec::new();
        let before = self.nodes.remove(&uid);
        for owner in before.iter().flat_map(|before| &before.owners) {
            let still = node.owners.iter().any(|new| new.uid == owner.uid);
            if !still {
                self.unlink(&owner.uid, &uid);
            }
            let blocked = owner.blocks && !node.owners.iter().any(|new| new.uid == owner.uid && new.blocks);
            if (!still || blocked) && self.waits_for_dependents(&owner.uid) == Some(true) {
                touched.push(Uid::clone(&owner.uid));
            }
        }
        for owner in &node.owners {
            self.dependents.entry(Uid::clone(&owner.uid)).or_default().insert(Uid::clone(&uid));
        }
        let owner_missing = node.owners.iter().any(|owner| !self.nodes.contains_key(&owner.uid));
        let owner_waits = node.owners.iter().any(|owner| self.waits_for_dependents(&owner.uid) == Some(true));
        let acts = node.deleting && (node.foreground || node.orphan);
        if acts || (!node.deleting && (owner_missing || owner_waits)) {
            touched.push(Uid::clone(&uid));
        }
        // Its owner waits for it to begin going, too.
        self.nodes.insert(uid, node);
        touched
    }

    pub fn remove(&mut self, uid: &str) -> Vec<Uid> {
        let Some(node) = self.nodes.remove(uid) else { return Vec::new() };
        let mut touched: Vec<Uid> = self.dependents.get(uid).into_iter().flatten().cloned().collect();
        for owner in node.owners {
            self.unlink(&owner.uid, uid);
            if self.waits_for_dependents(&owner.uid) == Some(true) {
                touched.push(owner.uid);
            }
        }
        touched
    }

    fn unlink(&mut self, owner: &Uid, dependent: &str) {
        if let Some(all) = self.dependents.get_mut(owner) {
            all.remove(dependent);
            if all.is_empty() {
                self.dependents.remove(owner);
            }
        }
    }

    /// Removes what is not among `objects`, the whole list of its resource.
    pub fn remove_absent(&mut self, resource: &Resource, objects: &[SharedObject]) -> Vec<Uid> {
        let there: HashSet<&str> = objects.iter().map(|object| object.uid()).collect();
        let absent = |(uid, node): &(&Uid, &Node)| node.resource == *resource && !there.contains(&***uid);
        let absent: Vec<Uid> = self.nodes.iter().filter(absent).map(|(uid, _)| Uid::clone(uid)).collect();
        absent.iter().flat_map(|uid| self.remove(uid)).collect()
    }

    pub fn remove_resource(&mut self, resource: &Resource) -> Vec<Uid> {
        self.remove_absent(resource, &[])
    }

    pub fn address(&self, uid: &str) -> Option<Address> {
        let node = self.nodes.get(uid)?;
        Some((node.resource.clone(), Arc::clone(&node.namespace), Arc::clone(&node.name)))
    }

    /// Whether the object is in foreground deletion; `None` if it is not there.
    pub fn waits_for_dependents(&self, uid: &str) -> Option<bool> {
        self.nodes.get(uid).map(|node| node.deleting && node.foreground)
    }

    pub fn has_dependents(&self, uid: &str) -> bool {
        self.dependents.contains_key(uid)
    }

    pub fn dependents(&self, uid: &str) -> Vec<Address> {
        self.dependents.get(uid).into_iter().flatten().filter_map(|uid| self.address(uid)).collect()
    }

    /// Dependents that block the deletion of `uid`, each with whether it is being deleted itself.
    pub fn blocking(&self, uid: &str) -> Vec<(Uid, bool)> {
        let dependents = self.dependents.get(uid).into_iter().flatten();
        dependents
            .filter_map(|dependent| {
                let node = self.nodes.get(dependent)?;
                let blocks = node.owners.iter().any(|owner| &*owner.uid == uid && owner.blocks);
                blocks.then(|| (Uid::clone(dependent), node.deleting))
            })
            .collect()
    }

    /// All that have owners, or something to do about their own.
    pub fn owned(&self) -> Vec<Uid> {
        let of_interest = |node: &Node| !node.owners.is_empty() || (node.deleting && (node.foreground || node.orphan));
        self.nodes.iter().filter(|(_, node)| of_interest(node)).map(|(uid, _)| Uid::clone(uid)).collect()
    }
}
