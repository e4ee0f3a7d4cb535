//! Which Services of type LoadBalancer are for this cluster's own controller and agent.

use crate::object::{Meta, Object};

/// `loadBalancerClass` of Services that an address of the host is for; so are those without a class.
pub const CLASS: &str = "atoll.dev/host";

pub fn is_ours(service: &Object) -> bool {
    let class = service.str_at("/spec/loadBalancerClass");
    service.str_at("/spec/type") == "LoadBalancer" && (class.is_empty() || class == CLASS) && !service.is_deleting()
}
