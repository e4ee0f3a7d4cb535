//! The router's side of the relay ([`crate::relay`]): its link, the rules that lead connections to it, its process.
//!
//! ```text
//! 0.0.0.0/1, 128.0.0.0/1, ::/1, 8000::/1 dev relay      rule: what is marked is for a socket here
//! table atoll-relay, in `ip` and `ip6`:
//! prerouting -150  lead   a SYN that the relay writes: to its listener; further packets of such connections: to their
//!                         sockets
//! output        0  own    what the relay sends on a connection that was ended goes nowhere
//! ```

use crate::config::RouterConfig;
use crate::error::{Error, Result};
use crate::netlink::nft::{self, BaseChain, Family, Hook, Policy, R0, Transaction};
use crate::netlink::{Batch, Socket, route};
use crate::relay::{MARK, OWN_MARK, PORT, READY, Settings, control_path};
use crate::router::{Router, WIDE, guard};
use crate::{firewall, ns, sys};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The relay's link, a tun device.
pub(crate) const RELAY: &str = "relay";
const TABLE: &str = "atoll-relay";
/// Goes up with every change of the table's rules.
const VERSION: u32 = 2;
/// Number of the routing table for what is marked.
const ROUTES: u8 = 100;
const TCP: u8 = 6;
const INVALID: u32 = 1;
/// User and group ids of relays, one for each instance; below what `net.ipv4.ping_group_range` can name.
const FIRST_UID: u32 = 2_098_000_000;
const UIDS: u32 = 1_000_000;
const PATIENCE: Duration = Duration::from_secs(5);
const RESTART: Duration = Duration::from_millis(500);

/// The relay's process, as long as this lives: started again when it ends. Dropping it leaves the process as it is.
pub(crate) struct Relay(Arc<Shared>);

struct Shared {
    settings: Settings,
    command: Vec<String>,
    host: OwnedFd,
    state: Mutex<State>,
}

struct State {
    control: UnixStream,
    /// What it was told last.
    sources: Vec<u8>,
    ending: bool,
}

impl Router {
    /// Makes the relay's link and starts its process, or finds what an earlier process left. Without `v4` only IPv6 is
    /// led to it.
    pub(super) fn make_relay(&self, host: BorrowedFd<'_>, v4: bool) -> Result<Relay> {
        let command = self.config.relay.clone();
        let settings = self.settings(host)?;
        let found = self.relay_link()?.and_then(|_| connect(&settings).ok());
        let started = match found {
            Some(control) => (control, None),
            None => {
                self.remove_relay()?;
                self.run(|| sys::tap_persist(tun()?.as_fd()).map_err(Error::system("keep the relay's link")))??;
                self.relay_routes(v4)?;
                launch(&command, &settings, host)?
            }
        };
        self.relay_routes(v4)?;
        self.relay_rules()?;
        let host = host.try_clone_to_owned().map_err(Error::system("keep the host's namespace"))?;
        Relay::watch(
            Shared {
                settings,
                command,
                host,
                state: Mutex::new(State { control: started.0, sources: Vec::new(), ending: false }),
            },
            started.1,
        )
    }

    /// Removes the link, which ends the process, and waits for that.
    pub(super) fn remove_relay(&self) -> Result<()> {
        if self.relay_link()?.is_none() {
            return Ok(());
        }
        let control = UnixStream::connect(control_path(&self.config.run_dir));
        let mut batch = Batch::new();
        batch.delete_link(RELAY);
        guard(&self.route).send(batch)?;
        self.run(|| {
            let mut socket = Socket::netfilter()?;
            let mut t = Transaction::new(TABLE);
            for family in Family::INET {
                if nft::table_comment(&mut socket, TABLE, family)?.is_some() {
                    t.family(family);
                    t.delete_table();
                }
            }
            t.commit(&mut socket)
        })??;
        if let Ok(mut control) = control {
            let _ = control.set_read_timeout(Some(PATIENCE));
            let _ = std::io::copy(&mut control, &mut std::io::sink());
        }
        Ok(())
    }

    fn relay_link(&self) -> Result<Option<route::Link>> {
        route::find_link(&mut guard(&self.route), RELAY)
    }

    fn settings(&self, host: BorrowedFd<'_>) -> Result<Settings> {
        let inode = rustix::fs::fstat(host).map_err(Error::errno("look at the host's namespace"))?.st_ino;
        let run_dir = self.config.run_dir.clone();
        // FNV-1a: any spread will do.
        let spread = |hash: u32, byte: &u8| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
        let number = run_dir.as_os_str().as_encoded_bytes().iter().fold(0x811c_9dc5, spread);
        let inside = firewall::inside(&self.config);
        Ok(Settings {
            netns: self.netns_path(),
            host: inode,
            uid: FIRST_UID + number % UIDS,
            inside4: inside.v4,
            inside6: inside.v6,
            run_dir,
        })
    }

    fn relay_routes(&self, v4: bool) -> Result<()> {
        // The relay writes workloads' own packets back, whose source is behind another link: reverse-path checks ask
        // only whether it has a route. Of a link without an address they want more.
        self.run(|| ns::sysctl(&format!("ipv4/conf/{RELAY}/rp_filter"), "2"))??;
        let mut route = guard(&self.route);
        let index = route::link_index(&mut route, RELAY)?;
        let mut batch = Batch::new();
        batch.set_up(index);
        batch.add_address(index, self.config.router_address());
        batch.deliver_marked(false, MARK, ROUTES, Some(WIDE));
        if v4 {
            for half in [Ipv4Addr::UNSPECIFIED, Ipv4Addr::new(128, 0, 0, 0)] {
                batch.add_link_route(half, 1, index, self.config.router_address());
            }
        }
        if self.ipv6 {
            batch.deliver_marked(true, MARK, ROUTES, Some(WIDE));
            for half in [Ipv6Addr::UNSPECIFIED, Ipv6Addr::new(0x8000, 0, 0, 0, 0, 0, 0, 0)] {
                batch.add_link_route6(half, 1, index, self.config.router_address6());
            }
        }
        route.send(batch)
    }

    fn relay_rules(&self) -> Result<()> {
        self.run(|| ensure_rules(&self.config))?
    }
}

/// Makes the link and the rules in the thread's namespace.
pub(crate) fn probe(config: &RouterConfig) -> Result<()> {
    let _tun = tun()?;
    ensure_rules(config)
}

/// In the thread's namespace.
fn tun() -> Result<OwnedFd> {
    let tun = sys::tap_open().map_err(Error::file("open", "/dev/net/tun"))?;
    sys::tun_bind(tun.as_fd(), RELAY).map_err(Error::system("make the relay's link"))?;
    Ok(tun)
}

/// In the thread's namespace.
fn ensure_rules(config: &RouterConfig) -> Result<()> {
    let mut socket = Socket::netfilter()?;
    let mut t = Transaction::new(TABLE);
    for family in Family::INET {
        let comment = {
            let RouterConfig { pod_cidr, pod_cidr6, subnet_cidr, subnet_cidr6, .. } = config;
            format!("relay {VERSION}: {pod_cidr} {pod_cidr6} {subnet_cidr} {subnet_cidr6}")
        };
        let found = nft::table_comment(&mut socket, TABLE, family)?;
        if found.as_ref() != Some(&comment) {
            t.family(family);
            if found.is_some() {
                t.delete_table();
            }
            t.add_table(&comment);
            rules(&mut t, family, config);
        }
    }
    t.commit(&mut socket)
}

fn rules(t: &mut Transaction, family: Family, config: &RouterConfig) {
    let pods: [(IpAddr, u8); 2] = match family {
        Family::Ip | Family::Arp => {
            [config.pod_cidr, config.subnet_cidr].map(|pods| (pods.base().into(), pods.prefix()))
        }
        Family::Ip6 => [config.pod_cidr6, config.subnet_cidr6].map(|pods| (pods.base().into(), pods.prefix())),
    };
    let base = |name, hook, priority| BaseChain { name, kind: "filter", hook, priority, policy: Policy::Accept };
    t.add_base_chain(&base("lead", Hook::Prerouting, -150));
    t.add_base_chain(&base("own", Hook::Output, 0));
    for (base, prefix) in pods {
        let written = || t.rule().if_input(RELAY).load_source(R0).if_within(R0, base, prefix);
        let led = written().if_opening(TCP).to_transparent(PORT).mark(MARK).accept();
        let stray = written().drop();
        t.add_rule("lead", led);
        t.add_rule("lead", stray);
    }
    t.add_rule("lead", t.rule().if_input(RELAY).accept());
    t.add_rule("lead", t.rule().unless_connection_mark(MARK).accept());
    t.add_rule("lead", t.rule().if_opening(TCP).accept());
    t.add_rule("lead", t.rule().mark(MARK));
    t.add_rule("own", t.rule().if_mark(OWN_MARK).if_state(INVALID).drop());
}

impl Relay {
    fn watch(shared: Shared, child: Option<Child>) -> Result<Relay> {
        let shared = Arc::new(shared);
        let watched = shared.clone();
        let control = guard(&shared.state).control.try_clone().map_err(Error::system("watch the relay"))?;
        std::thread::Builder::new()
            .name("atoll-relay".into())
            .spawn(move || watched.keep(control, child))
            .map_err(Error::system("start a thread"))?;
        Ok(Relay(shared))
    }

    /// Workloads' sources outside; all others follow the host.
    pub fn sync_sources(&self, sources: &BTreeMap<IpAddr, IpAddr>) -> Result<()> {
        let mut line = serde_json::to_vec(sources).map_err(|_| Error::Protocol("addresses are no JSON"))?;
        line.push(b'\n');
        let mut state = guard(&self.0.state);
        if state.sources != line {
            state.control.write_all(&line).map_err(Error::system("tell the relay the addresses"))?;
            state.sources = line;
        }
        Ok(())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let mut state = guard(&self.0.state);
        state.ending = true;
        let _ = state.control.shutdown(Shutdown::Both);
    }
}

impl Shared {
    /// Starts the process again whenever it ends.
    fn keep(&self, mut control: UnixStream, mut child: Option<Child>) {
        loop {
            let _ = control.set_read_timeout(None);
            let _ = std::io::copy(&mut control, &mut std::io::sink());
            if let Some(mut child) = child.take() {
                let _ = child.wait();
            }
            (control, child) = loop {
                if guard(&self.state).ending {
                    return;
                }
                match launch(&self.command, &self.settings, self.host.as_fd()).and_then(|new| self.take(new)) {
                    Ok(new) => break new,
                    Err(error) => tracing::warn!("the relay for workloads' way out does not start: {error}"),
                }
                std::thread::sleep(RESTART);
            };
            tracing::warn!("the relay for workloads' way out had ended and was started again");
        }
    }

    fn take(&self, (control, child): (UnixStream, Option<Child>)) -> Result<(UnixStream, Option<Child>)> {
        let mut state = guard(&self.state);
        state.control = control.try_clone().map_err(Error::system("watch the relay"))?;
        let sources = state.sources.clone();
        state.control.write_all(&sources).map_err(Error::system("tell the relay the addresses"))?;
        Ok((control, child))
    }
}

/// To a process that runs with just these settings.
fn connect(settings: &Settings) -> Result<UnixStream> {
    let open = || -> std::io::Result<(UnixStream, String)> {
        let stream = UnixStream::connect(control_path(&settings.run_dir))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut said = String::new();
        BufReader::new(stream.try_clone()?.take(1 << 20)).read_line(&mut said)?;
        Ok((stream, said))
    };
    let (stream, said) = open().map_err(Error::system("talk to the relay"))?;
    if said.trim_end() == settings.hello() { Ok(stream) } else { Err(Error::Protocol("another relay is running")) }
}

/// Starts the role; answers when it serves.
fn launch(command: &[String], settings: &Settings, host: BorrowedFd<'_>) -> Result<(UnixStream, Option<Child>)> {
    let Some((program, args)) = command.split_first() else { return Err(Error::Protocol("no command is the relay's")) };
    let log_path = settings.run_dir.join("relay.log");
    let log = std::fs::File::create(&log_path).map_err(Error::file("create", &log_path))?;
    let text = serde_json::to_string(settings).map_err(|_| Error::Protocol("settings are no JSON"))?;
    let host = host.try_clone_to_owned().map_err(Error::system("hand over the host's namespace"))?;
    let mut child = Command::new(program)
        .args(args)
        .arg(text)
        .stdin(Stdio::from(host))
        .stdout(Stdio::piped())
        .stderr(log)
        .process_group(0)
        .spawn()
        .map_err(Error::file("run", program))?;
    let mut report = String::new();
    if let Some(stdout) = child.stdout.take() {
        let mut lines = BufReader::new(stdout.take(1 << 16));
        while !report.as_bytes().ends_with(READY) && lines.read_line(&mut report).is_ok_and(|length| length > 0) {}
    }
    if !report.as_bytes().ends_with(READY) {
        let _ = child.kill();
        let _ = child.wait();
        let said = std::fs::read_to_string(&log_path).unwrap_or_default();
        let why = std::io::Error::other(said.trim().to_owned());
        return Err(Error::System { operation: "start the relay", source: why });
    }
    Ok((connect(settings)?, Some(child)))
}
