//! Which addresses of the host are opened for Services.

use crate::cli::Failure;
use network::policy::Network;
use node::Exposing;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

#[derive(clap::Args, Clone, Debug)]
pub struct Exposed {
    /// Where node ports of Services listen; 0.0.0.0 and :: stand for all addresses of the host
    #[arg(long, value_delimiter = ',', default_value = "127.0.0.1,::1", value_name = "ADDR,...")]
    pub node_port_addr: Vec<IpAddr>,
    /// Addresses of the host that Services of type LoadBalancer get [default: the gateway's]
    #[arg(long, value_delimiter = ',', value_name = "ADDR,...")]
    pub load_balancer_addr: Vec<IpAddr>,
    /// Networks of which Services may name addresses of the host in `externalIPs` [default: none]
    #[arg(long, value_delimiter = ',', value_parser = network, value_name = "CIDR,...")]
    pub external_ips: Vec<Network>,
}

fn network(text: &str) -> Result<Network, String> {
    text.parse().map_err(|()| "not a network; write it like 192.0.2.0/24".to_owned())
}

impl Exposed {
    /// In the host's network namespace.
    pub fn exposing(&self, gateway: SocketAddr) -> Result<Exposing, Failure> {
        if let Some(address) = self.load_balancer_addr.iter().find(|address| address.is_unspecified()) {
            return Err(Failure(format!(
                "--load-balancer-addr {address}: clients are told this address, so name those of the host that they reach"
            )));
        }
        let load_balancers = match self.load_balancer_addr.as_slice() {
            [] if gateway.ip().is_unspecified() => outward(gateway.is_ipv6()),
            [] => vec![gateway.ip()],
            named => named.to_vec(),
        };
        let (node_ports, external_ips) = (self.node_port_addr.clone(), self.external_ips.clone());
        Ok(Exposing { node_ports, load_balancers, external_ips })
    }
}

/// The addresses that this host speaks to the world with, loopback where it does not. Nothing is sent.
fn outward(v6: bool) -> Vec<IpAddr> {
    let towards = |any: IpAddr, world: IpAddr, otherwise: IpAddr| {
        let socket = UdpSocket::bind((any, 0)).and_then(|socket| {
            socket.connect((world, 9))?;
            socket.local_addr()
        });
        socket.map_or(otherwise, |own| own.ip())
    };
    // Addresses of documentation (RFC 5737, RFC 3849): no better than others, but nobody's.
    let world = Ipv4Addr::new(192, 0, 2, 1);
    let mut all = vec![towards(Ipv4Addr::UNSPECIFIED.into(), world.into(), Ipv4Addr::LOCALHOST.into())];
    if v6 {
        let world = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
        all.push(towards(Ipv6Addr::UNSPECIFIED.into(), world.into(), Ipv6Addr::LOCALHOST.into()));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exposed(addresses: &[&str]) -> Exposed {
        Exposed {
            node_port_addr: vec![Ipv4Addr::LOCALHOST.into()],
            load_balancer_addr: addresses.iter().map(|text| text.parse().unwrap()).collect(),
            external_ips: Vec::new(),
        }
    }

    #[test]
    fn load_balancers_are_where_the_gateway_is_unless_said() {
        let gateway: SocketAddr = "192.0.2.7:8080".parse().unwrap();
        assert_eq!(exposed(&[]).exposing(gateway).unwrap().load_balancers, [gateway.ip()]);
        let named = exposed(&["192.0.2.8", "2001:db8::8"]).exposing(gateway).unwrap();
        assert_eq!(named.load_balancers.len(), 2);
        assert!(exposed(&["0.0.0.0"]).exposing(gateway).err().unwrap().0.contains("--load-balancer-addr 0.0.0.0: "));
        let any = exposed(&[]).exposing("0.0.0.0:8080".parse().unwrap()).unwrap().load_balancers;
        assert!(any.len() == 1 && !any[0].is_unspecified(), "{any:?}");
        assert!(network("192.0.2.0/33").unwrap_err().contains("192.0.2.0/24"));
    }
}
