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

#[cfg(test)]
mod tests {
    use super::*;

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
