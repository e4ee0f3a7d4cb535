//! Token buckets, one number each: the time at which the bucket will be full again (the generic cell rate algorithm).

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const SHARDS: usize = 16;
/// Buckets kept in a shard. When there are more, the full ones go, then any.
const MOST: usize = 4096;

#[derive(Debug)]
pub struct Limiter {
    /// Nanoseconds for one request.
    every: u64,
    /// Nanoseconds that a bucket may be ahead.
    room: u64,
    start: Instant,
    hasher: RandomState,
    shards: [Mutex<HashMap<u64, u64>>; SHARDS],
}

impl Limiter {
    pub fn new(requests: u32, period: Duration, burst: u32) -> Limiter {
        let nanos = u64::try_from(period.as_nanos()).unwrap_or(u64::MAX);
        let every = (nanos / u64::from(requests.max(1))).max(1);
        Limiter {
            every,
            room: every.saturating_mul(u64::from(burst.max(1) - 1)),
            start: Instant::now(),
            hasher: RandomState::new(),
            shards: Default::default(),
        }
    }

    /// Takes one token of `key`'s bucket, or says how long it takes until there is one.
    pub fn take(&self, key: &impl Hash) -> Result<(), Duration> {
        let now = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.take_at(self.hasher.hash_one(key), now)
    }

    fn take_at(&self, key: u64, now: u64) -> Result<(), Duration> {
        let Some(shard) = self.shards.get((key >> 60) as usize % SHARDS) else { return Ok(()) };
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        let full = shard.get(&key).copied().unwrap_or(0).max(now);
        let ahead = full - now;
        if ahead > self.room {
            return Err(Duration::from_nanos(ahead - self.room));
        }
        if shard.len() >= MOST && !shard.contains_key(&key) {
            shard.retain(|_, full| *full > now);
            if shard.len() >= MOST {
                let some: Vec<u64> = shard.keys().take(MOST / 8).copied().collect();
                for key in some {
                    shard.remove(&key);
                }
            }
        }
        shard.insert(key, full.saturating_add(self.every));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_burst_and_then_the_rate() {
        let limiter = Limiter::new(10, Duration::from_secs(1), 3);
        let at = |ms: u64| limiter.take_at(1, ms * 1_000_000);
        assert!(at(0).is_ok() && at(0).is_ok() && at(0).is_ok());
        assert_eq!(at(0), Err(Duration::from_millis(100)));
        assert_eq!(at(99), Err(Duration::from_millis(1)));
        assert!(at(100).is_ok() && at(100).is_err() && at(200).is_ok());
        assert!(limiter.take_at(2, 0).is_ok(), "another key, another bucket");
    }

    #[test]
    fn memory_is_bounded() {
        let limiter = Limiter::new(1, Duration::from_secs(1000), 1);
        (0..200_000u64).for_each(|key| assert!(limiter.take(&key).is_ok()));
        let kept: usize = limiter.shards.iter().map(|shard| shard.lock().unwrap().len()).sum();
        assert!(kept <= MOST * SHARDS, "{kept}");
    }

    proptest! {
        #[test]
        fn never_more_than_rate_and_burst(
            gaps in proptest::collection::vec(0u64..50, 1..200), requests in 1u32..50, burst in 1u32..20,
        ) {
            let limiter = Limiter::new(requests, Duration::from_secs(1), burst);
            let (mut now, mut passed) = (0u64, 0u64);
            for gap in gaps {
                now += gap * 1_000_000;
                passed += u64::from(limiter.take_at(7, now).is_ok());
            }
            let every = 1_000_000_000 / u64::from(requests);
            prop_assert!(passed <= u64::from(burst) + now / every, "{passed}");
        }
    }
}
