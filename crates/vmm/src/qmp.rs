//! QEMU's machine protocol over an inherited socket (<https://www.qemu.org/docs/master/interop/qmp-spec.html>). The other
//! end may be a taken-over QEMU: lines are bounded and nothing it says is trusted.

use crate::engine::Control;
use crate::machine::{Error, Result};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

const LONGEST_LINE: u64 = 64 << 10;
/// Replies and events read before a command's answer is given up.
const MOST_LINES: usize = 1000;

pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Qmp {
    pub fn greet(stream: UnixStream) -> Result<Self> {
        let fail = |e: std::io::Error| Error::Monitor(format!("control channel: {e}"));
        stream.set_read_timeout(Some(Duration::from_secs(30))).map_err(fail)?;
        stream.set_write_timeout(Some(Duration::from_secs(5))).map_err(fail)?;
        let writer = stream.try_clone().map_err(fail)?;
        let mut qmp = Qmp { reader: BufReader::new(stream), writer };
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
        let line = format!("{{\"execute\":\"{command}\"}}\n");
        self.writer.write_all(line.as_bytes()).map_err(|_| Error::NotRunning)?;
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

impl Control for Qmp {
    fn power_button(&mut self) -> Result<()> {
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
