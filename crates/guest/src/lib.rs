//! What runs inside the machine of a pod, and how it is spoken with.
//!
//! - [`frame`]: many channels over one byte stream; [`protocol`]: what is said on them.
//! - [`agent`]: process 1 of the machine. It mounts the images, gives the network its addresses and starts the same shim
//!   ([`container::shim`]) that supervises a container pod on the host: what a container may do is one code on both.
//! - [`tree`]: files of volumes, as they cross.
//! - [`initramfs`]: what a kernel is given beside the agent: its modules.
//!
//! Host and guest believe each other nothing: lengths, numbers of channels and bytes under way are bounded on both sides.
#![deny(unsafe_code)]

pub mod agent;
pub mod frame;
pub mod initramfs;
pub mod protocol;
#[allow(unsafe_code)]
mod sys;
pub mod tree;
