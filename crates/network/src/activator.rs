//! Services that sleep: their own namespace's workloads are led to the activator, a listener in the router's namespace, which
//! wakes somebody and hands the connection on. To workloads of other namespaces, which wake nobody, such a Service has the
//! endpoints that it has.
//!
//! ```text
//! client ---> ClusterIP (services.rs) ---> [listener]  activator  [socket with the client's address] ---> endpoint
//! ```
//!
//! Policies are asked where the second connection begins, as for one that the client made itself: it has the client's
//! address, and its packets a mark that leads them through `egress` and `ingress`, and answers back (`firewall.rs`).

use crate::error::{Error, Result};
use crate::firewall::ACTIVATOR;
use crate::policy::pod_address;
use crate::router::Router;
use crate::sys;
use rustix::fd::AsFd;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};

/// Who is led to the activator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// Every workload.
    Anyone,
    /// Those of the namespace with this number.
    Namespace(u32),
}

/// What a Service that sleeps is told.
pub(crate) struct Activation<'a> {
    /// Of one or both families.
    pub listeners: &'a [SocketAddr],
    /// `None`: the namespace has no workloads.
    pub who: &'a dyn Fn(&str) -> Option<Who>,
}

impl Activation<'_> {
    /// Who of a namespace goes where, at addresses of that family.
    pub fn of(&self, namespace: &str, v4: bool) -> Option<(Who, (IpAddr, u16))> {
        let to = self.listeners.iter().find(|listener| listener.is_ipv4() == v4)?;
        Some(((self.who)(namespace)?, (to.ip(), to.port())))
    }
}

impl Router {
    /// Opens the activator's listeners, one for each family. Connections come to them once Services are
    /// [`crate::ServiceRule::activated`]; the socket knows which by its original destination (`SO_ORIGINAL_DST`).
    pub fn open_activator(&self) -> Result<Vec<TcpListener>> {
        let mut addresses = vec![IpAddr::from(self.config.router_address())];
        if self.has_ipv6() {
            addresses.push(self.config.router_address6().into());
        }
        let listeners = self.run(|| {
            let open = |address: &IpAddr| TcpListener::bind((*address, 0));
            addresses.iter().map(open).collect::<io::Result<Vec<_>>>()
        })?;
        let listeners = listeners.map_err(Error::system("open the activator's listeners"))?;
        let own = listeners.iter().map(TcpListener::local_addr).collect::<io::Result<Vec<_>>>();
        *crate::router::guard(&self.activator) = own.map_err(Error::system("name the activator's listeners"))?;
        Ok(listeners)
    }

    /// A connection to an endpoint, about to be made, in the name of the workload that came to the activator. The calling
    /// thread is in the router's namespace. The stream is not blocking: it can be written to when it is connected.
    pub fn connect_as(&self, client: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
        // Both addresses of a workload are its own.
        let own = pod_address(&self.config, client).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let (family, own) = match to.is_ipv6() {
            true => (AddressFamily::INET6, self.config.v6_of(own).into()),
            false => (AddressFamily::INET, IpAddr::from(own)),
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        sys::speak_for_others(socket.as_fd(), to.is_ipv6(), ACTIVATOR)?;
        rustix::net::bind(&socket, &SocketAddr::new(own, 0))?;
        match rustix::net::connect(&socket, &to) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(socket.into()),
            Err(errno) => Err(errno.into()),
        }
    }
}
