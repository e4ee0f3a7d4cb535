//! A transport's registers and queues, out of a machine and into another. What comes in was written by an engine that a
//! guest may have taken over: it is checked as if a driver had written it.

use super::{DRIVER_OK, FEATURES_OK, Stage, Transport, fresh};
use crate::kvm::Fault;
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;
use virtio_queue::{Queue, QueueState, QueueT};

const NET: u32 = 1;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    id: u32,
    status: u32,
    feature_page: u32,
    driver_page: u32,
    driver_features: u64,
    selected: u32,
    interrupt: u32,
    generation: u32,
    config: Vec<u8>,
    queues: Vec<SavedQueue>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedQueue {
    size: u16,
    ready: bool,
    next_avail: u16,
    next_used: u16,
    event_idx: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl SavedQueue {
    fn of(queue: &Queue) -> Self {
        let s = queue.state();
        SavedQueue {
            size: s.size,
            ready: s.ready,
            next_avail: s.next_avail,
            next_used: s.next_used,
            event_idx: s.event_idx_enabled,
            desc_table: s.desc_table,
            avail_ring: s.avail_ring,
            used_ring: s.used_ring,
        }
    }

    fn queue(&self, max_size: u16) -> Result<Queue, Fault> {
        let state = QueueState {
            max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        };
        Queue::try_from(state).map_err(|e| Fault(format!("queue: {e}")))
    }
}

impl Transport {
    /// Of a device that is held.
    pub fn save(&self) -> Result<Saved, Fault> {
        let queues = match &self.stage {
            Stage::Setup(_) => &self.queues,
            Stage::Held(_, queues) => queues,
            Stage::Running(_) | Stage::Lost => return self.fault("runs, or is gone"),
        };
        Ok(Saved {
            id: self.id,
            status: self.status,
            feature_page: self.feature_page,
            driver_page: self.driver_page,
            driver_features: self.driver_features,
            selected: self.selected,
            interrupt: self.interrupt.status.load(Ordering::SeqCst),
            generation: self.config.generation.load(Ordering::SeqCst),
            config: self.config.lock().clone(),
            queues: queues.iter().map(SavedQueue::of).collect(),
        })
    }

    /// Of a device that is new. It is held then.
    pub fn load(&mut self, saved: &Saved) -> Result<(), Fault> {
        let mut config = self.config_at_reset.clone();
        if saved.id != self.id || saved.queues.len() != self.sizes.len() || saved.config.len() != config.len() {
            return self.fault(format_args!("saved as a device {} of another kind", saved.id));
        }
        // a link is what it is now, with its own address
        if self.id != NET {
            config.clone_from(&saved.config);
        }
        let sizes = self.sizes.iter();
        let queues =
            saved.queues.iter().zip(sizes).map(|(queue, size)| queue.queue(*size)).collect::<Result<Vec<_>, _>>();
        let queues = queues.or_else(|Fault(why)| self.fault(why))?;
        let agreed = saved.status & FEATURES_OK != 0;
        if agreed && saved.driver_features & !self.features != 0 {
            return self.fault(format_args!("features {:#x}, of which not all are there", saved.driver_features));
        }
        *self.config.lock() = config;
        self.config.generation.store(saved.generation.wrapping_add(1), Ordering::SeqCst);
        self.interrupt.status.store(saved.interrupt, Ordering::SeqCst);
        (self.status, self.driver_features, self.selected) = (saved.status, saved.driver_features, saved.selected);
        (self.feature_page, self.driver_page) = (saved.feature_page, saved.driver_page);
        if saved.status & DRIVER_OK == 0 {
            self.queues = queues;
            return Ok(());
        }
        if !agreed {
            return self.fault("saved as ready without agreeing on features");
        }
        if let Some(index) = queues.iter().position(|queue| queue.ready() && !queue.is_valid(&self.memory)) {
            return self.fault(format_args!("queue {index} does not lie in memory"));
        }
        let Stage::Setup(mut device) = std::mem::replace(&mut self.stage, Stage::Lost) else { return Ok(()) };
        device.begin(self.driver_features).or_else(|e| self.fault(e))?;
        device.restored();
        self.queues = fresh(self.sizes).or_else(|e| self.fault(e))?;
        self.stage = Stage::Held(device, queues);
        Ok(())
    }

    /// What was raised while nobody could take it is raised again; a driver finds nothing to do at worst.
    pub fn remind(&self) {
        let _ = self.interrupt.line.raise();
    }
}

impl Saved {
    /// For fuzzing: into a new entropy device.
    pub fn fuzz(&self) {
        let Ok(memory) = crate::kvm::memory::allocate(1 << 20) else { return };
        let (sender, _events) = std::sync::mpsc::sync_channel(16);
        let device = Box::new(crate::kvm::virtio::rng::Rng);
        let Ok(mut transport) = Transport::new(device, memory, crate::kvm::Ending(sender)) else { return };
        if transport.load(self).is_ok() && transport.go_on().is_ok() {
            transport.hold();
            let _ = transport.save();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::virtio::rng::Rng;
    use crate::kvm::{Ending, memory};

    fn transport() -> Transport {
        let (sender, _receiver) = std::sync::mpsc::sync_channel(16);
        Transport::new(Box::new(Rng), memory::allocate(1 << 20).unwrap(), Ending(sender)).unwrap()
    }

    fn running() -> Saved {
        let mut t = transport();
        let writes =
            [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x38, 8), (0x80, 0x1000), (0x90, 0x2000)];
        for (offset, value) in writes.into_iter().chain([(0xa0, 0x3000), (0x44, 1), (0x70, 15)]) {
            t.write(offset, &u32::to_le_bytes(value)).unwrap();
        }
        assert!(t.save().is_err(), "while its thread runs");
        t.hold();
        let saved = t.save().unwrap();
        t.go_on().unwrap();
        t.stop();
        saved
    }

    #[test]
    fn a_device_goes_on_as_it_was() {
        let saved = running();
        let mut t = transport();
        t.load(&saved).unwrap();
        let generation = saved.generation + 1;
        assert_eq!(t.save().unwrap(), Saved { generation, ..running() });
        t.go_on().unwrap();
        t.stop();
        assert!(matches!(t.stage, Stage::Setup(_)));
    }

    #[test]
    fn states_that_no_driver_could_have_made_are_refused() {
        type Spoil = fn(&mut Saved);
        let spoils: [(Spoil, &str); 6] = [
            (|s| s.id = 2, "another kind"),
            (|s| s.queues.clear(), "another kind"),
            (|s| s.driver_features = u64::MAX, "not all are there"),
            (|s| s.status = 4, "without agreeing"),
            (|s| s.queues[0].avail_ring = 0xffff_f000, "does not lie in memory"),
            (|s| s.queues[0].size = 3, "queue"),
        ];
        for (spoil, expected) in spoils {
            let mut saved = running();
            spoil(&mut saved);
            let Fault(why) = transport().load(&saved).unwrap_err();
            assert!(why.contains(expected), "{why}");
        }
    }
}
