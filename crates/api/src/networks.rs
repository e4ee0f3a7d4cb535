//! What pods, namespaces and Networks (`atoll.dev`) say to each other.

/// On a pod: the Network of its namespace that its address is from; empty: none. On a namespace: that of pods that do not say.
pub const NETWORK: &str = "atoll.dev/network";
/// Keeps a Network as long as workloads have addresses of it.
pub const FINALIZER: &str = "atoll.dev/network-in-use";
