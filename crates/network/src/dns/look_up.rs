//! What the router's own DNS server answers, for explanations: the router sees all names, and pins none.

use super::answers;
use super::codec::{self, TYPE_A, TYPE_AAAA};
use crate::error::{Error, Result};
use crate::router::Router;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(5);

/// Addresses of a name, sorted; none if it does not exist, or too many for a datagram.
pub fn look_up(router: &Router, name: &str) -> Result<Vec<IpAddr>> {
    let server = SocketAddr::new(router.config().dns_address.into(), 53);
    let ask = |kind| -> std::io::Result<Vec<IpAddr>> {
        let socket = UdpSocket::bind((router.config().router_address(), 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect(server)?;
        socket.send(&codec::question(1, name, kind, Some(1232)))?;
        let mut buffer = [0; 2048];
        let length = socket.recv(&mut buffer)?;
        let answers = answers::resolved(buffer.get(..length).unwrap_or_default(), name).unwrap_or_default();
        Ok(answers.into_iter().map(|(address, _)| address).collect())
    };
    let both = router.run(|| Ok::<_, std::io::Error>([ask(TYPE_A)?, ask(TYPE_AAAA)?].concat()))?;
    let mut all = both.map_err(Error::system("ask the DNS server"))?;
    all.sort_unstable();
    all.dedup();
    Ok(all)
}
