//! QEMU's machine protocol over an inherited socket (<https://www.qemu.org/docs/master/interop/qmp-spec.html>). The other
//! end may be a taken-over QEMU: lines are bounded and nothing it says is trusted.

use crate::channel;
use crate::engine::{Control, REBOOT_GRACE, SNAPSHOT_DEADLINE, SnapshotFiles};
use crate::kvm::snapshot::{self, Outline};
use crate::machine::{Error, Result};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const LONGEST_LINE: u64 = 64 << 10;
/// Replies and events read before a command's answer is given up.
const MOST_LINES: usize = 1000;

pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    /// Written beside a snapshot.
    outline: Option<Outline>,
    /// It has a screen.
    screen: bool,
    /// A power-off before this is a reset.
    reboot_until: Option<Instant>,
}

impl Qmp {
    pub fn greet(stream: UnixStream) -> Result<Self> {
        let fail = |e: std::io::Error| Error::Monitor(format!("control channel: {e}"));
        stream.set_read_timeout(Some(Duration::from_secs(30))).map_err(fail)?;
        stream.set_write_timeout(Some(Duration::from_secs(5))).map_err(fail)?;
        let writer = stream.try_clone().map_err(fail)?;
        let mut qmp = Qmp { reader: BufReader::new(stream), writer, outline: None, screen: false, reboot_until: None };
        qmp.read()?;
        qmp.execute("qmp_capabilities")?;
        Ok(qmp)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = Vec::new();
        let read = (&mut self.reader).take(LONGEST_LINE).read_until(b'\n', &mut line);
        match read {
            Ok(n) if n > 0 && line.ends_with(b"\n") => {
                serde_json::from_slice(&line).map_err(|e| Error::Monitor(format!("control channel: {e}")))
            }
            Ok(0) => Err(Error::NotRunning),
            Ok(_) => Err(Error::Monitor("control channel: line too long".into())),
            Err(e) => Err(Error::Monitor(format!("control channel: {e}"))),
        }
    }

    fn execute(&mut self, command: &str) -> Result<Value> {
        self.execute_with(command, json!({}), &[])
    }

    fn execute_with(&mut self, command: &str, arguments: Value, files: &[BorrowedFd<'_>]) -> Result<Value> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        channel::send(&self.writer, line.as_bytes(), files).map_err(|_| Error::NotRunning)?;
        for _ in 0..MOST_LINES {
            let mut reply = self.read()?;
            if let Some(value) = reply.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = reply.pointer("/error/desc").and_then(Value::as_str) {
                return Err(Error::Monitor(format!("{command}: {error}")));
            }
        }
        Err(Error::Monitor(format!("{command}: no answer")))
    }
}

/// A guest that powered off, of a machine that waits.
const OFF: &str = "shutdown";
const LOOK: Duration = Duration::from_millis(5);

/// Snapshots are QEMU's migration to a file and back.
impl Qmp {
    /// For a machine that goes on from a snapshot: returns when it runs.
    pub fn arrive(&mut self) -> Result<()> {
        let until = Instant::now() + SNAPSHOT_DEADLINE;
        while self.status()? == "inmigrate" {
            self.past(until)?;
        }
        // it was stopped when it was saved
        self.execute("cont").map(drop)
    }

    pub fn describe(&mut self, outline: Outline, screen: bool) {
        (self.outline, self.screen) = (Some(outline), screen);
    }

    fn status(&mut self) -> Result<String> {
        let status = self.execute("query-status")?;
        Ok(status.get("status").and_then(Value::as_str).unwrap_or_default().to_owned())
    }

    /// `poweroff`: QEMU ends; `pause`: it waits.
    fn on_power_off(&mut self, action: &str) -> Result<()> {
        self.execute_with("set-action", json!({ "shutdown": action }), &[]).map(drop)
    }

    /// From here on a power-off is one again. Whether the guest is off already and waits for what comes.
    fn end_reboot(&mut self) -> Result<bool> {
        if self.reboot_until.take().is_none() {
            return Ok(false);
        }
        self.on_power_off("poweroff")?;
        Ok(self.status()? == OFF)
    }

    fn past(&self, until: Instant) -> Result<()> {
        if Instant::now() > until {
            return Err(Error::Monitor("the snapshot took too long".into()));
        }
        std::thread::sleep(LOOK);
        Ok(())
    }

    fn migrate(&mut self, memory: &File) -> Result<()> {
        self.execute_with("migrate-set-parameters", json!({ "max-bandwidth": i64::MAX >> 20 << 20 }), &[])?;
        self.execute_with("getfd", json!({ "fdname": "snapshot" }), &[memory.as_fd()])?;
        self.execute_with("migrate", json!({ "uri": "fd:snapshot" }), &[])?;
        let until = Instant::now() + SNAPSHOT_DEADLINE;
        loop {
            let state = self.execute("query-migrate")?;
            match state.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    let why = state.get("error-desc").and_then(Value::as_str).unwrap_or("is the disk full?");
                    return Err(Error::Monitor(format!("the snapshot failed: {why}")));
                }
                _ => {
                    if let Err(error) = self.past(until) {
                        let _ = self.execute("migrate_cancel");
                        return Err(error);
                    }
                }
            }
        }
    }
}

impl Control for Qmp {
    fn power_button(&mut self) -> Result<()> {
        let command = if self.end_reboot()? { "quit" } else { "system_powerdown" };
        self.execute(command).map(drop)
    }
    fn reset(&mut self) -> Result<()> {
        let off = self.end_reboot()?;
        self.execute("system_reset")?;
        if off { self.resume() } else { Ok(()) }
    }
    fn pause(&mut self) -> Result<()> {
        self.execute("stop").map(drop)
    }
    fn resume(&mut self) -> Result<()> {
        self.execute("cont").map(drop)
    }
    fn balloon(&mut self, _pages: u32) -> Result<()> {
        Err(Error::Monitor("machines in QEMU have no balloon".into()))
    }
    fn soft_reboot(&mut self) -> Result<()> {
        self.on_power_off("pause")?;
        self.reboot_until = Some(Instant::now() + REBOOT_GRACE);
        self.execute("system_powerdown").map(drop)
    }
    fn rebooting(&mut self) -> Result<bool> {
        let Some(until) = self.reboot_until else { return Ok(false) };
        if self.status()? != OFF && Instant::now() < until {
            return Ok(true);
        }
        if self.end_reboot()? {
            self.execute("system_reset")?;
            self.resume()?;
        }
        Ok(false)
    }
    fn display(&mut self, client: OwnedFd) -> Result<()> {
        if !self.screen {
            return Err(Error::Monitor("has no screen (spec.domain.devices.autoattachGraphicsDevice)".into()));
        }
        self.execute_with("getfd", json!({ "fdname": "display" }), &[client.as_fd()])?;
        let arguments = json!({ "protocol": "vnc", "fdname": "display", "skipauth": true });
        self.execute_with("add_client", arguments, &[]).map(drop)
    }
    fn snapshot(&mut self, files: &SnapshotFiles) -> Result<()> {
        if files.base.is_some() {
            return Err(Error::Monitor("machines in QEMU have no differential snapshots; take a full one".into()));
        }
        let outline = self.outline.as_ref().ok_or(Error::NotRunning)?;
        let state = snapshot::seal(outline).map_err(|e| Error::Monitor(e.to_string()))?;
        let runs = self.status()? == "running";
        if runs {
            self.execute("stop")?;
        }
        let done = self.migrate(&files.memory).and_then(|()| {
            let written = files.state.write_all_at(&state, 0);
            let synced = written.and_then(|()| files.state.sync_data()).and_then(|()| files.memory.sync_data());
            synced.map_err(Error::io("write", "the snapshot"))
        });
        if runs {
            self.execute("cont")?;
        }
        done
    }
}

/// For `fuzz/`: a machine that says anything at all.
#[doc(hidden)]
pub fn fuzz(bytes: &[u8]) {
    let Ok((ours, mut theirs)) = UnixStream::pair() else { return };
    let all = bytes.get(..60_000).unwrap_or(bytes);
    if theirs.write_all(all).and_then(|()| theirs.shutdown(std::net::Shutdown::Write)).is_err() {
        return;
    }
    if let Ok(mut control) = Qmp::greet(ours) {
        while control.pause().is_ok() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a machine is told that stands at `status`.
    fn told(status: &'static str, by: impl FnOnce(&mut Qmp)) -> Vec<String> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qemu = std::thread::spawn(move || {
            let mut writer = theirs.try_clone().unwrap();
            writer.write_all(b"{\"QMP\":{}}\n").unwrap();
            let mut commands = Vec::new();
            for line in BufReader::new(theirs).lines() {
                let line: Value = serde_json::from_str(&line.unwrap()).unwrap();
                let command = line["execute"].as_str().unwrap().to_owned();
                writeln!(writer, "{}", json!({ "return": { "status": status } })).unwrap();
                commands.push(match line["arguments"]["shutdown"].as_str() {
                    Some(action) => format!("on power off {action}"),
                    None => command,
                });
            }
            commands.retain(|c| !c.starts_with("q") || c == "quit");
            commands
        });
        let mut qmp = Qmp::greet(ours).unwrap();
        by(&mut qmp);
        drop(qmp);
        qemu.join().unwrap()
    }

    const BEGUN: [&str; 2] = ["on power off pause", "system_powerdown"];

    #[test]
    fn a_button_or_a_reset_in_a_reboot_finds_a_guest_that_is_off_already() {
        let after = |status, by: fn(&mut Qmp)| {
            let told = told(status, |qmp| {
                qmp.soft_reboot().unwrap();
                by(qmp);
            });
            assert_eq!(told[..2], BEGUN);
            told[2..].join(", ")
        };
        let button = |qmp: &mut Qmp| qmp.power_button().unwrap();
        let reset = |qmp: &mut Qmp| qmp.reset().unwrap();
        assert_eq!(after("running", button), "on power off poweroff, system_powerdown");
        assert_eq!(after("shutdown", button), "on power off poweroff, quit");
        assert_eq!(after("running", reset), "on power off poweroff, system_reset");
        assert_eq!(after("shutdown", reset), "on power off poweroff, system_reset, cont");
        let see = |qmp: &mut Qmp| while qmp.rebooting().unwrap() {};
        assert_eq!(after("shutdown", see), "on power off poweroff, system_reset, cont");
        assert_eq!(told("running", button).join(", "), "system_powerdown");
    }
}
