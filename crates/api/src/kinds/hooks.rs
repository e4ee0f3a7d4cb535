//! What single kinds do beyond their schemas: defaults that depend on other fields, checks across fields, and what may not
//! change. Messages are worded as Kubernetes words them, so that people find them where they look.
//!
//! Types have been checked before any of this runs; what is absent or odd all the same reads as empty.

mod admin;
mod annotations;
mod config;
mod custom;
mod egress;
mod event;
mod field;
mod gateway;
mod ingress;
mod knative;
mod machine;
mod metadata;
mod network;
mod pod;
mod pod_spec;
mod policy;
mod probe;
mod service;
mod snapshot;
mod subnet;
mod volume;
mod workload;

use crate::kind::Hooks;

pub fn pod() -> Hooks {
    Hooks {
        default: Some(pod::default),
        prepare_create: Some(pod::prepare_create),
        validate: Some(pod::validate),
        warnings: Some(pod::warnings),
    }
}

pub fn service() -> Hooks {
    Hooks { default: Some(service::default), validate: Some(service::validate), ..Default::default() }
}

pub fn deployment() -> Hooks {
    Hooks {
        default: Some(workload::default_deployment),
        validate: Some(workload::validate_deployment),
        warnings: Some(workload::warnings),
        ..Default::default()
    }
}

pub fn replica_set() -> Hooks {
    Hooks {
        default: Some(workload::default_template),
        validate: Some(workload::validate_replica_set),
        warnings: Some(workload::warnings),
        ..Default::default()
    }
}

pub fn config_map() -> Hooks {
    Hooks { validate: Some(config::validate_config_map), ..Default::default() }
}

pub fn secret() -> Hooks {
    Hooks { default: Some(config::default_secret), validate: Some(config::validate_secret), ..Default::default() }
}

pub fn namespace() -> Hooks {
    Hooks {
        default: Some(metadata::default_namespace),
        prepare_create: Some(metadata::prepare_namespace),
        ..Default::default()
    }
}

pub fn node() -> Hooks {
    Hooks { default: Some(metadata::default_node), validate: Some(metadata::validate_node), ..Default::default() }
}

pub fn event() -> Hooks {
    Hooks { validate: Some(metadata::validate_event), ..Default::default() }
}

pub fn service_account() -> Hooks {
    Hooks::default()
}

pub fn endpoint_slice() -> Hooks {
    Hooks { validate: Some(metadata::validate_endpoint_slice), ..Default::default() }
}

pub fn lease() -> Hooks {
    Hooks { validate: Some(metadata::validate_lease), ..Default::default() }
}

pub fn runtime_class() -> Hooks {
    Hooks { validate: Some(metadata::validate_runtime_class), ..Default::default() }
}

pub fn custom_resource_definition() -> Hooks {
    Hooks {
        default: Some(custom::default),
        validate: Some(custom::validate),
        warnings: Some(custom::warnings),
        ..Default::default()
    }
}

pub fn gateway_class() -> Hooks {
    Hooks { validate: Some(gateway::validate_class), ..Default::default() }
}

pub fn gateway() -> Hooks {
    Hooks { validate: Some(gateway::validate_gateway), ..Default::default() }
}

pub fn http_route() -> Hooks {
    Hooks { validate: Some(gateway::validate_route), ..Default::default() }
}

pub fn grpc_route() -> Hooks {
    Hooks { validate: Some(ingress::validate_grpc), ..Default::default() }
}

pub fn tls_route() -> Hooks {
    Hooks { validate: Some(ingress::validate_tls), ..Default::default() }
}

pub fn reference_grant() -> Hooks {
    Hooks::default()
}

pub fn traffic_policy() -> Hooks {
    Hooks { validate: Some(policy::validate), ..Default::default() }
}

pub fn backend_policy() -> Hooks {
    Hooks { validate: Some(policy::validate_backend), ..Default::default() }
}

pub fn message() -> Hooks {
    Hooks { validate: Some(event::validate_message), ..Default::default() }
}

pub fn schedule() -> Hooks {
    Hooks { validate: Some(event::validate_schedule), ..Default::default() }
}

pub fn broker() -> Hooks {
    Hooks { validate: Some(event::validate_broker), ..Default::default() }
}

pub fn trigger() -> Hooks {
    Hooks { validate: Some(event::validate_trigger), ..Default::default() }
}

pub fn ingress() -> Hooks {
    Hooks { default: Some(ingress::default_ingress), validate: Some(ingress::validate_ingress), ..Default::default() }
}

pub fn network_policy() -> Hooks {
    Hooks { default: Some(network::default_policy), validate: Some(network::validate_policy), ..Default::default() }
}

pub fn admin_network_policy() -> Hooks {
    Hooks { validate: Some(admin::validate), ..Default::default() }
}

pub fn baseline_admin_network_policy() -> Hooks {
    Hooks { validate: Some(admin::validate_baseline), ..Default::default() }
}

pub fn egress_policy() -> Hooks {
    Hooks { validate: Some(egress::validate), ..Default::default() }
}

pub fn subnet() -> Hooks {
    Hooks { validate: Some(subnet::validate), ..Default::default() }
}

pub fn ingress_class() -> Hooks {
    Hooks { validate: Some(ingress::validate_class), ..Default::default() }
}

pub fn virtual_machine() -> Hooks {
    Hooks { validate: Some(machine::validate_machine), warnings: Some(machine::warnings), ..Default::default() }
}

pub fn virtual_machine_instance() -> Hooks {
    Hooks { validate: Some(machine::validate_instance), ..Default::default() }
}

pub fn virtual_machine_snapshot() -> Hooks {
    Hooks { validate: Some(snapshot::validate_snapshot), ..Default::default() }
}

pub fn virtual_machine_snapshot_content() -> Hooks {
    Hooks { validate: Some(snapshot::validate_content), ..Default::default() }
}

pub fn virtual_machine_restore() -> Hooks {
    Hooks { validate: Some(snapshot::validate_restore), ..Default::default() }
}

pub fn virtual_machine_clone() -> Hooks {
    Hooks { validate: Some(snapshot::validate_clone), ..Default::default() }
}

pub fn knative_service() -> Hooks {
    Hooks { default: Some(knative::default_service), validate: Some(knative::validate_service), ..Default::default() }
}

pub fn configuration() -> Hooks {
    Hooks {
        default: Some(knative::default_configuration),
        validate: Some(knative::validate_configuration),
        ..Default::default()
    }
}

pub fn revision() -> Hooks {
    Hooks { default: Some(knative::default_revision), validate: Some(knative::validate_revision), ..Default::default() }
}

pub fn route() -> Hooks {
    Hooks { validate: Some(knative::validate_route), ..Default::default() }
}
