//! A container's file system tree. Two halves, on either side of entering the container's namespaces:
//! [`prepare`] runs with the host's rights and turns every source (layers, bind sources, device nodes, `/sys`) into a
//! detached mount; [`attach`] runs as root of the container's user namespace and puts them in their places, then
//! makes the tree the root. No mount ever appears in the host's mount namespace, so none can be left behind.

pub mod attach;
mod cgroups;
mod copy_up;
mod devices;
pub mod options;
pub mod prepare;
mod shift;
