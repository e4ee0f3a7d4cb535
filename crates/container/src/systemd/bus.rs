//! A connection to systemd's manager: its private socket, or a message bus.

use super::message::{Call, ERROR, HEAD, Message, RETURN, SIGNAL, Value, Writer};
use crate::error::{During, Error, Result};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// As long as runc waits for a unit.
const PATIENCE: Duration = Duration::from_secs(30);
const MANAGER: &str = "org.freedesktop.systemd1";
const OBJECT: &str = "/org/freedesktop/systemd1";
const BUS: &str = "org.freedesktop.DBus";
/// Signals that came while an answer was waited for.
const KEPT: usize = 1024;

pub struct Bus {
    stream: UnixStream,
    serial: u32,
    /// Jobs that ended, with how.
    ended: Vec<(String, String)>,
}

/// What an error message says: its name, and its text.
pub struct Refusal {
    pub name: String,
    pub text: String,
}

impl Bus {
    /// The system's manager for root, else the user's.
    pub fn connect() -> Result<Self> {
        let mut tried = Vec::new();
        for (path, is_bus) in places() {
            match UnixStream::connect(&path) {
                Ok(stream) => return Self::open(stream, is_bus).during(|| format!("systemd ({})", path.display())),
                Err(e) => tried.push(format!("{}: {e}", path.display())),
            }
        }
        Err(Error::Refused(format!(
            "--systemd-cgroup: systemd does not answer ({}); without it, use the engine's cgroupfs manager",
            tried.join("; ")
        )))
    }

    fn open(stream: UnixStream, is_bus: bool) -> io::Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut bus = Self { stream, serial: 0, ended: Vec::new() };
        bus.authenticate()?;
        if !is_bus {
            bus.ping()?;
        } else {
            let other = |refusal: Refusal| io::Error::other(format!("{}: {}", refusal.name, refusal.text));
            bus.ask(BUS, "/org/freedesktop/DBus", BUS, "Hello", "", Writer::default())?.map_err(other)?;
            let mut rule = Writer::default();
            rule.text(&format!("type='signal',interface='{MANAGER}.Manager',member='JobRemoved'"));
            bus.ask(BUS, "/org/freedesktop/DBus", BUS, "AddMatch", "s", rule)?.map_err(other)?;
            bus.ask(MANAGER, OBJECT, &format!("{MANAGER}.Manager"), "Subscribe", "", Writer::default())?
                .map_err(other)?;
        }
        Ok(bus)
    }

    /// The specification's "Authentication Protocol": the kernel tells the other side who this is.
    fn authenticate(&mut self) -> io::Result<()> {
        let uid: String = rustix::process::geteuid().as_raw().to_string().bytes().map(|b| format!("{b:02x}")).collect();
        self.stream.write_all(format!("\0AUTH EXTERNAL {uid}\r\n").as_bytes())?;
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            let mut byte = [0];
            self.stream.read_exact(&mut byte)?;
            line.extend(byte);
            if line.len() > 512 {
                return Err(io::Error::other("its answer to AUTH is too long"));
            }
        }
        if !line.starts_with(b"OK ") {
            let said = String::from_utf8_lossy(&line).trim().to_owned();
            return Err(io::Error::other(format!("refuses this user: {said:?}")));
        }
        self.stream.write_all(b"BEGIN\r\n")
    }

    /// systemd reads 256 bytes before it knows that they are over, and what it has read of a first message it looks at
    /// only when more comes. So the first one is longer, and nothing. Its answer is nobody's.
    fn ping(&mut self) -> io::Result<()> {
        let path = format!("{OBJECT}/{}", "_".repeat(256));
        let interface = format!("{BUS}.Peer");
        let body = Writer::default();
        let call =
            Call { destination: MANAGER, path: &path, interface: &interface, member: "Ping", signature: "", body };
        self.serial += 1;
        self.stream.write_all(&call.encode(self.serial))
    }

    fn receive(&mut self) -> io::Result<Message> {
        let mut bytes = vec![0; HEAD];
        self.stream.read_exact(&mut bytes)?;
        let whole = bytes.first_chunk().and_then(Message::length);
        let whole = whole.ok_or_else(|| io::Error::other("sent what is no message"))?;
        bytes.resize(whole, 0);
        self.stream.read_exact(bytes.get_mut(HEAD..).unwrap_or_default())?;
        Message::decode(&bytes).ok_or_else(|| io::Error::other("sent a damaged message"))
    }

    /// `JobRemoved`: number, job, unit, result.
    fn note(&mut self, signal: &Message) {
        if signal.kind != SIGNAL || signal.member != "JobRemoved" || self.ended.len() >= KEPT {
            return;
        }
        let mut body = signal.body();
        if let (Some(_), Some(job), Some(_), Some(result)) = (body.u32(), body.text(), body.text(), body.text()) {
            self.ended.push((job, result));
        }
    }

    fn ask(
        &mut self,
        destination: &str,
        path: &str,
        interface: &str,
        member: &str,
        signature: &str,
        body: Writer,
    ) -> io::Result<std::result::Result<Message, Refusal>> {
        self.serial += 1;
        let call = Call { destination, path, interface, member, signature, body };
        self.stream.write_all(&call.encode(self.serial))?;
        loop {
            let message = self.receive()?;
            match message.kind {
                RETURN if message.answers == self.serial => return Ok(Ok(message)),
                ERROR if message.answers == self.serial => {
                    let text = message.body().text().filter(|_| message.signature.starts_with('s'));
                    return Ok(Err(Refusal { name: message.error, text: text.unwrap_or_default() }));
                }
                _ => self.note(&message),
            }
        }
    }

    fn manager(
        &mut self,
        member: &str,
        signature: &str,
        body: Writer,
    ) -> Result<std::result::Result<Message, Refusal>> {
        self.ask(MANAGER, OBJECT, &format!("{MANAGER}.Manager"), member, signature, body)
            .during(|| format!("systemd: {member}"))
    }

    /// Starts a unit that exists only as long as it runs, and waits until it does.
    pub fn start_transient(
        &mut self,
        unit: &str,
        properties: &[(&str, Value)],
    ) -> Result<std::result::Result<(), Refusal>> {
        let mut body = Writer::default();
        body.text(unit).text("replace").properties(properties).array(8, |_| {});
        match self.manager("StartTransientUnit", "ssa(sv)a(sa(sv))", body)? {
            Ok(answer) => self.finished(&answer, unit).map(Ok),
            Err(refusal) => Ok(Err(refusal)),
        }
    }

    /// Stops it, with all that runs in it; nothing is done if it is not there.
    pub fn stop(&mut self, unit: &str) -> Result<()> {
        let mut body = Writer::default();
        body.text(unit).text("replace");
        match self.manager("StopUnit", "ss", body)? {
            Ok(answer) => self.finished(&answer, unit),
            Err(refusal) if refusal.name.ends_with(".NoSuchUnit") => Ok(()),
            Err(refusal) => Err(refused("StopUnit", unit, &refusal)),
        }
    }

    /// Forgets that it failed.
    pub fn reset_failed(&mut self, unit: &str) -> Result<()> {
        let mut body = Writer::default();
        body.text(unit);
        self.manager("ResetFailedUnit", "s", body).map(drop)
    }

    pub fn set_properties(&mut self, unit: &str, properties: &[(&str, Value)]) -> Result<()> {
        let mut body = Writer::default();
        body.text(unit).u32(1).properties(properties);
        let answer = self.manager("SetUnitProperties", "sba(sv)", body)?;
        answer.map(drop).map_err(|refusal| refused("SetUnitProperties", unit, &refusal))
    }

    /// The unit's control group, from the root of each hierarchy.
    pub fn control_group(&mut self, unit: &str) -> Result<String> {
        let mut body = Writer::default();
        body.text(unit);
        let found = self.manager("GetUnit", "s", body)?.map_err(|refusal| refused("GetUnit", unit, &refusal))?;
        let path = found.body().text().ok_or_else(|| damaged("GetUnit"))?;
        let mut body = Writer::default();
        body.text(&format!("{MANAGER}.Scope")).text("ControlGroup");
        let answer = self
            .ask(MANAGER, &path, &format!("{BUS}.Properties"), "Get", "ss", body)
            .during(|| "systemd: ControlGroup".into())?
            .map_err(|refusal| refused("ControlGroup", unit, &refusal))?;
        let mut body = answer.body();
        body.signature().filter(|s| s == "s").and_then(|_| body.text()).ok_or_else(|| damaged("ControlGroup"))
    }

    /// Waits for the job that an answer names.
    fn finished(&mut self, answer: &Message, unit: &str) -> Result<()> {
        let job = answer.body().text().ok_or_else(|| damaged("the job"))?;
        loop {
            if let Some(at) = self.ended.iter().position(|(ended, _)| *ended == job) {
                return match self.ended.swap_remove(at).1.as_str() {
                    "done" | "skipped" => Ok(()),
                    other => Err(Error::Refused(format!("systemd: {unit}: its job ended with {other:?}"))),
                };
            }
            let message = self.receive().during(|| format!("systemd: waiting for {unit}"))?;
            self.note(&message);
        }
    }
}

pub fn refused(what: &str, unit: &str, refusal: &Refusal) -> Error {
    Error::Refused(format!("systemd: {what} {unit}: {} ({})", refusal.text, refusal.name))
}

fn damaged(what: &str) -> Error {
    Error::Refused(format!("systemd: {what}: its answer makes no sense"))
}

/// Sockets, the most direct first, and whether a message bus listens there.
fn places() -> Vec<(PathBuf, bool)> {
    // The specification, "Server Addresses": several, each with keys.
    let address = |variable: &str| {
        let value = std::env::var(variable).ok()?;
        let path = value.split(';').find_map(|one| one.strip_prefix("unix:path="))?;
        path.split(',').next().map(PathBuf::from)
    };
    if rustix::process::geteuid().is_root() {
        let bus = address("DBUS_SYSTEM_BUS_ADDRESS").unwrap_or_else(|| "/run/dbus/system_bus_socket".into());
        return vec![("/run/systemd/private".into(), false), (bus, true)];
    }
    let mut places = Vec::new();
    if let Some(directory) = std::env::var_os("XDG_RUNTIME_DIR") {
        let directory = Path::new(&directory);
        places.extend([(directory.join("systemd/private"), false), (directory.join("bus"), true)]);
    }
    places.extend(address("DBUS_SESSION_BUS_ADDRESS").map(|path| (path, true)));
    places
}
