//! Bandwidth limits of a pod's annotations, as Kubernetes knows them
//! (<https://kubernetes.io/docs/concepts/extend-kubernetes/compute-storage-net/network-plugins/#support-traffic-shaping>).

use crate::quantity::Quantity;

/// To the pod.
pub const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
/// From it.
pub const EGRESS: &str = "kubernetes.io/egress-bandwidth";
const LEAST: i64 = 1_000;
const MOST: i64 = 1_000_000_000_000_000;

/// Bits a second, or what is wrong with the annotation's value.
pub fn parse(text: &str) -> Result<u64, String> {
    let quantity = Quantity::parse(text).map_err(|error| format!("{error}; write bits a second, as in 10M"))?;
    match quantity.value() {
        bits if bits < LEAST => Err("resource is unreasonably small (< 1kbit)".to_owned()),
        bits if bits > MOST => Err("resource is unreasonably large (> 1Pbit)".to_owned()),
        bits => Ok(bits.unsigned_abs()),
    }
}

/// Bytes a second that each disk of a machine may read and write, one quantity for all or `NAME=QUANTITY,...`.
pub const DISK_BANDWIDTH: &str = "atoll.dev/disk-bandwidth";
/// The same of operations.
pub const DISK_OPERATIONS: &str = "atoll.dev/disk-iops";
const LEAST_BYTES: i64 = 1_000;

/// Limits of disks, by annotation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskLimits {
    /// Of every disk that is not named.
    pub all: Option<u64>,
    pub named: Vec<(String, u64)>,
}

impl DiskLimits {
    pub fn of(&self, disk: &str) -> Option<u64> {
        self.named.iter().find(|(name, _)| name == disk).map(|(_, limit)| *limit).or(self.all)
    }
}

/// `key` is [`DISK_BANDWIDTH`] or [`DISK_OPERATIONS`].
pub fn parse_disks(key: &str, text: &str) -> Result<DiskLimits, String> {
    let (least, example) = if key == DISK_BANDWIDTH {
        (LEAST_BYTES, "bytes a second, as in 50Mi or root=50Mi,data=10Mi")
    } else {
        (1, "operations a second, as in 500 or root=500,data=100")
    };
    let mut limits = DiskLimits::default();
    for part in text.split(',').map(str::trim) {
        let (name, amount) = part.split_once('=').map_or((None, part), |(name, amount)| (Some(name), amount));
        let quantity = Quantity::parse(amount).map_err(|error| format!("{error}; write {example}"))?;
        let limit = match quantity.value() {
            limit if limit < least => return Err(format!("{amount} is less than {least}; write {example}")),
            limit if limit > MOST => return Err(format!("{amount} is unreasonably large; write {example}")),
            limit => limit.unsigned_abs(),
        };
        match name {
            Some("") => return Err(format!("{part:?} names no disk; write {example}")),
            Some(name) if limits.named.iter().any(|(known, _)| known == name) => {
                return Err(format!("disk {name:?} is named twice"));
            }
            Some(name) => limits.named.push((name.to_owned(), limit)),
            None if limits.all.is_some() => return Err(format!("two limits for all disks; write {example}")),
            None => limits.all = Some(limit),
        }
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_disks_are_for_all_or_by_name() {
        let limits = parse_disks(DISK_BANDWIDTH, "10M, root=50Mi").unwrap();
        assert_eq!((limits.of("root"), limits.of("data")), (Some(50 << 20), Some(10_000_000)));
        let limits = parse_disks(DISK_OPERATIONS, "root=5").unwrap();
        assert_eq!((limits.of("root"), limits.of("data")), (Some(5), None));
        for text in ["", "fast", "1,2", "=5M", "a=5M,a=6M", "a=", "-5", "0", "5M,", "9999999999999E"] {
            assert!(parse_disks(DISK_BANDWIDTH, text).is_err(), "{text}");
        }
    }

    #[test]
    fn limits_are_quantities_between_a_kilobit_and_a_petabit() {
        for (text, bits) in [("1k", 1000), ("10M", 10_000_000), ("1Gi", 1 << 30), ("1P", 1_000_000_000_000_000)] {
            assert_eq!(parse(text), Ok(bits));
        }
        for text in ["", "fast", "10 M", "999", "-5M", "0", "2P", "1001T", "9999999999999999999999E", "1e", "10Mbit"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
