//! Errors and warnings: to the file that `--log` names, as engines read them, and errors to standard error.

use crate::error::{During, Result};
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Default)]
pub struct Notices {
    file: Option<File>,
    json: bool,
}

#[derive(Serialize)]
struct Entry<'a> {
    level: &'a str,
    msg: &'a str,
    time: String,
}

impl Notices {
    pub fn open(path: Option<&str>, format: Option<&str>) -> Result<Self> {
        let json = match format {
            Some("json") => true,
            None | Some("text") => false,
            Some(other) => {
                return Err(crate::Error::Refused(format!("--log-format: {other:?}: text or json")));
            }
        };
        let file = path.map(|path| {
            OpenOptions::new().create(true).append(true).open(path).during(|| format!("opening the log {path}"))
        });
        Ok(Self { file: file.transpose()?, json })
    }

    pub fn error(&self, text: &str) {
        self.write("error", text);
        let _ = writeln!(std::io::stderr(), "{}", line("error", text));
    }

    /// Not worth a failure: what could not be had here.
    pub fn warning(&self, text: &str) {
        if self.file.is_some() {
            self.write("warning", text);
        } else {
            let _ = writeln!(std::io::stderr(), "{}", line("warning", text));
        }
    }

    fn write(&self, level: &str, text: &str) {
        let Some(mut file) = self.file.as_ref() else { return };
        let entry = if self.json {
            serde_json::to_string(&Entry { level, msg: text, time: rfc3339(SystemTime::now()) }).unwrap_or_default()
        } else {
            line(level, text)
        };
        let _ = file.write_all(format!("{entry}\n").as_bytes());
    }
}

fn line(level: &str, text: &str) -> String {
    format!("time=\"{}\" level={level} msg={text:?}", rfc3339(SystemTime::now()))
}

/// UTC, with nanoseconds.
pub fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let stamp = clock::stamp(i64::try_from(since.as_nanos()).unwrap_or(i64::MAX));
    String::from_utf8_lossy(&stamp).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_rfc_3339() {
        let at = |s, n| rfc3339(UNIX_EPOCH + Duration::new(s, n));
        assert_eq!(at(0, 0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(at(951_827_696, 5), "2000-02-29T12:34:56.000000005Z");
        assert_eq!(at(1_735_689_599, 0), "2024-12-31T23:59:59.000000000Z");
    }

    #[test]
    fn engines_read_json() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("log");
        let notices = Notices::open(path.to_str(), Some("json")).expect("opened");
        notices.warning("a \"quoted\" word");
        let text = std::fs::read_to_string(path).expect("read");
        let entry: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(entry["level"], "warning");
        assert_eq!(entry["msg"], "a \"quoted\" word");
        assert!(Notices::open(None, Some("xml")).is_err());
    }
}
