//! What a process list shows of a shim: it is executed before it is known which pod it will be of, so the name is written
//! over a blank argument.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

/// The longest name of a namespace and a pod's, and what is between them, is longer; its end is left out.
const ROOM: usize = 128;

/// An argument to be written over.
pub fn blank() -> String {
    " ".repeat(ROOM)
}

/// Writes `text` over the blank argument, if there is one; it only serves people.
pub fn set(text: &str) {
    let _ = write(text);
}

fn write(text: &str) -> Option<()> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // proc_pid_stat(5): `arg_start` is field 48; the first word after the name is field 3.
    let start: u64 = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(45)?.parse().ok()?;
    let line = fs::read("/proc/self/cmdline").ok()?;
    let blank = blank();
    let at = line.windows(ROOM).position(|window| window == blank.as_bytes())?;
    let mut name: Vec<u8> = text.bytes().filter(|b| *b != 0).take(ROOM).collect();
    name.resize(ROOM, 0);
    // Through the file, which checks what a pointer would not.
    OpenOptions::new().write(true).open("/proc/self/mem").ok()?.write_all_at(&name, start + at as u64).ok()
}
