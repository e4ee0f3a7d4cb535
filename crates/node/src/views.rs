//! What streams and logs need to know of the pods here, kept up to date by their workers.

use crate::boundary::{Boundary, SandboxSpec};
use api::sleep::Sleep;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ViewState {
    Waiting { reason: String },
    Running,
    Ended,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ContainerView {
    pub name: String,
    pub init: bool,
    pub tty: bool,
    pub stdin: bool,
    pub state: ViewState,
    /// Number of the current or latest run; `None` before the first.
    pub attempt: Option<u32>,
}

#[derive(Clone)]
pub(crate) struct Live {
    pub sandbox: Arc<SandboxSpec>,
    pub boundary: Arc<dyn Boundary>,
}

#[derive(Clone)]
pub(crate) struct PodView {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub dir: PathBuf,
    pub live: Option<Live>,
    pub containers: Vec<ContainerView>,
    /// Image ids in use.
    pub images: Vec<String>,
    pub asleep: Option<Sleep>,
}

#[derive(Default)]
pub(crate) struct Views {
    by_uid: RwLock<HashMap<String, Arc<PodView>>>,
}

impl Views {
    pub fn put(&self, view: PodView) {
        self.write().insert(view.uid.clone(), Arc::new(view));
    }
    pub fn remove(&self, uid: &str) {
        self.write().remove(uid);
    }
    pub fn get(&self, uid: &str) -> Option<Arc<PodView>> {
        self.read().get(uid).cloned()
    }
    /// By uid where one is given, else by name.
    pub fn find(&self, namespace: &str, name: &str, uid: &str) -> Option<Arc<PodView>> {
        if !uid.is_empty() {
            return self.get(uid).filter(|v| v.namespace == namespace && v.name == name);
        }
        let views = self.read();
        let mut of_name = views.values().filter(|v| v.namespace == namespace && v.name == name);
        // While one is being stopped its successor may be here already: the one with a sandbox counts.
        of_name.clone().find(|v| v.live.is_some()).or_else(|| of_name.next()).cloned()
    }
    pub fn all(&self) -> Vec<Arc<PodView>> {
        self.read().values().cloned().collect()
    }
    fn read(&self) -> std::sync::RwLockReadGuard<'_, HashMap<String, Arc<PodView>>> {
        self.by_uid.read().unwrap_or_else(PoisonError::into_inner)
    }
    fn write(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<String, Arc<PodView>>> {
        self.by_uid.write().unwrap_or_else(PoisonError::into_inner)
    }
}
