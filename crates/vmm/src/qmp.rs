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
        if self.reboot_until.take().is_some() {
            self.on_power_off("poweroff")?;
        }
        self.execute("system_powerdown").map(drop)
    }
    fn reset(&mut self) -> Result<()> {
        self.execute("system_reset").map(drop)
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
        let off = self.status()? == "shutdown";
        if !off && Instant::now() < until {
            return Ok(true);
        }
        self.reboot_until = None;
        if off {
            self.execute("system_reset")?;
        }
        self.on_power_off("poweroff")?;
        if off {
            self.execute("cont")?;
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
