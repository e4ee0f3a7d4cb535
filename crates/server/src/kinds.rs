//! The kinds served at this moment: the built-in ones and those of CustomResourceDefinitions.

use api::kind::{Kind, Resource, Scope};
use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, RwLock};

/// What a CustomResourceDefinition serves.
#[derive(Clone)]
pub struct Custom {
    pub kinds: Vec<Arc<Kind>>,
    /// Revision of the definition.
    pub revision: i64,
    /// It is being deleted: what is there may go, nothing new may come.
    pub ending: bool,
}

/// One consistent view; requests hold the one they began with.
pub struct Set {
    kinds: BTreeMap<Resource, Arc<Kind>>,
    /// By the definition's name.
    custom: BTreeMap<String, Custom>,
    /// Group and plural.
    builtin: HashSet<(Arc<str>, Arc<str>)>,
    /// Goes up with every change; caches of derived documents are keyed by it.
    pub generation: u64,
}

pub struct Kinds {
    builtin: Vec<Arc<Kind>>,
    current: RwLock<Arc<Set>>,
}

impl Kinds {
    pub fn new(builtin: Vec<Arc<Kind>>) -> Self {
        let set = Set::build(&builtin, BTreeMap::new(), 0);
        Kinds { builtin, current: RwLock::new(Arc::new(set)) }
    }

    pub fn current(&self) -> Arc<Set> {
        self.current.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Serves `change` for the custom definition `name` from now on, `None` = nothing any more; unless something newer
    /// than `revision` is known already.
    pub fn set_custom(&self, name: &str, revision: i64, change: Option<Custom>) {
        let mut current = self.current.write().unwrap_or_else(|e| e.into_inner());
        if current.custom.get(name).is_some_and(|known| known.revision >= revision) {
            return;
        }
        let mut custom = current.custom.clone();
        match change {
            Some(change) => drop(custom.insert(name.to_owned(), change)),
            None if !custom.contains_key(name) => return,
            None => drop(custom.remove(name)),
        }
        *current = Arc::new(Set::build(&self.builtin, custom, current.generation + 1));
    }
}

impl Set {
    fn build(builtin: &[Arc<Kind>], custom: BTreeMap<String, Custom>, generation: u64) -> Self {
        let mut kinds = BTreeMap::new();
        // What is built in cannot be redefined.
        for kind in custom.values().flat_map(|c| &c.kinds).chain(builtin) {
            kinds.insert(kind.resource.clone(), kind.clone());
        }
        let builtin = builtin.iter().map(|k| (k.resource.group.clone(), k.resource.plural.clone())).collect();
        Set { kinds, custom, builtin, generation }
    }

    pub fn get(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Kind>> {
        self.kinds.get(&Resource::new(group, version, plural))
    }

    pub fn find(&self, resource: &Resource) -> Option<&Arc<Kind>> {
        self.kinds.get(resource)
    }

    /// A kind by group and plural, whatever version it is served in.
    pub fn any_version(&self, group: &str, plural: &str) -> Option<&Arc<Kind>> {
        self.kinds.values().find(|k| *k.resource.group == *group && *k.resource.plural == *plural)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Kind>> {
        self.kinds.values()
    }

    pub fn custom(&self, name: &str) -> Option<&Custom> {
        self.custom.get(name)
    }

    /// Changes whenever what is served of `group` (`None` = at all) changes.
    pub fn stamp(&self, group: Option<&str>) -> u64 {
        use std::hash::{Hash, Hasher};
        let Some(group) = group else { return self.generation };
        let mut hasher = std::hash::DefaultHasher::new();
        for (name, custom) in &self.custom {
            if custom.kinds.first().is_some_and(|k| *k.resource.group == *group) {
                (name, custom.revision, custom.ending).hash(&mut hasher);
            }
        }
        hasher.finish()
    }

    fn definition_of(&self, kind: &Kind) -> Option<&Custom> {
        let name = format!("{}.{}", kind.resource.plural, kind.resource.group);
        self.custom.get(&name).filter(|c| c.kinds.iter().any(|k| k.resource == kind.resource))
    }

    pub fn is_custom(&self, kind: &Kind) -> bool {
        !self.is_builtin(kind) && self.definition_of(kind).is_some()
    }

    /// Whether a resource is served whatever definitions there are; one of the same name then changes nothing.
    pub fn is_builtin(&self, kind: &Kind) -> bool {
        self.builtin.contains(&(kind.resource.group.clone(), kind.resource.plural.clone()))
    }

    /// Whether the kind's definition is being deleted.
    pub fn is_ending(&self, kind: &Kind) -> bool {
        !self.is_builtin(kind) && self.definition_of(kind).is_some_and(|c| c.ending)
    }

    /// Whether another definition than `name` serves this plural, singular or short name in `group` already.
    pub fn taken(&self, name: &str, group: &str, word: &str) -> bool {
        self.others(name, group)
            .any(|k| *k.resource.plural == *word || k.singular == word || k.short_names.iter().any(|s| s == word))
    }

    /// The same for the names of kinds and their lists.
    pub fn kind_taken(&self, name: &str, group: &str, word: &str) -> bool {
        self.others(name, group).any(|k| k.kind == word || k.list_kind == word)
    }

    fn others<'a>(&'a self, name: &str, group: &'a str) -> impl Iterator<Item = &'a Arc<Kind>> {
        let own = name.to_owned();
        self.iter().filter(move |k| {
            *k.resource.group == *group && format!("{}.{}", k.resource.plural, k.resource.group) != own
        })
    }

    /// Groups in the order they are shown, each with its versions, preferred first.
    pub fn groups(&self) -> Vec<(String, Vec<String>)> {
        let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for resource in self.kinds.keys() {
            let versions = groups.entry(resource.group.to_string()).or_default();
            if !versions.iter().any(|v| **v == *resource.version) {
                versions.push(resource.version.to_string());
            }
        }
        for versions in groups.values_mut() {
            versions.sort_by_key(|v| std::cmp::Reverse(version_rank(v)));
        }
        groups.into_iter().collect()
    }

    pub fn in_version<'a>(&'a self, group: &'a str, version: &'a str) -> impl Iterator<Item = &'a Arc<Kind>> {
        self.iter().filter(move |k| *k.resource.group == *group && *k.resource.version == *version)
    }

    pub fn scope_list(&self) -> Vec<(Resource, Scope, String)> {
        self.iter().map(|k| (k.resource.clone(), k.scope, k.kind.clone())).collect()
    }
}

/// Kubernetes' order of versions: v2 > v1 > v1beta2 > v1beta1 > v1alpha1 > anything else.
pub fn version_rank(version: &str) -> (u8, u64, u64) {
    let Some(rest) = version.strip_prefix('v') else { return (0, 0, 0) };
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (major, tail) = rest.split_at(digits);
    let Ok(major) = major.parse::<u64>() else { return (0, 0, 0) };
    if tail.is_empty() {
        return (3, major, 0);
    }
    for (rank, word) in [(2, "beta"), (1, "alpha")] {
        if let Some(minor) = tail.strip_prefix(word) {
            return minor.parse().map(|minor| (rank, major, minor)).unwrap_or((0, 0, 0));
        }
    }
    (0, 0, 0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn versions_are_ordered_as_kubernetes_does() {
        let mut versions = ["v1alpha1", "v10", "v2", "foo1", "v1beta2", "v1", "v1beta10", "v11alpha2"];
        versions.sort_by_key(|v| std::cmp::Reverse(super::version_rank(v)));
        assert_eq!(versions, ["v10", "v2", "v1", "v1beta10", "v1beta2", "v11alpha2", "v1alpha1", "foo1"]);
    }
}
