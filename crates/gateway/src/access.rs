//! The access log: one line a request, as JSON or in the common log format, written by a thread of its own. Requests never
//! wait for the disk: lines that do not fit in the queue are counted and left out.

use crate::counters::Counters;
use serde_json::json;
use std::io::{BufWriter, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

/// Lines on their way to the disk.
const QUEUE: usize = 8192;
const MAX_TARGET: usize = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    /// NCSA's common log format.
    Common,
}

pub struct AccessLog {
    format: Format,
    lines: SyncSender<String>,
    counters: Arc<Counters>,
}

/// What is told of a request.
pub struct Line<'a> {
    pub client: std::net::IpAddr,
    pub method: &'a str,
    pub host: &'a str,
    pub target: &'a str,
    pub version: http::Version,
    pub status: u16,
    /// Of the answer, where its head says it.
    pub bytes: Option<u64>,
    pub microseconds: u64,
    pub route: &'a str,
    pub trace: Option<u128>,
}

impl AccessLog {
    pub fn new(format: Format, out: Box<dyn Write + Send>, counters: Arc<Counters>) -> std::io::Result<AccessLog> {
        let (lines, receiver) = sync_channel(QUEUE);
        std::thread::Builder::new().name("gateway-access".into()).spawn(move || write(&receiver, out))?;
        Ok(AccessLog { format, lines, counters })
    }

    pub fn write(&self, line: &Line<'_>, now: i64) {
        let text = match self.format {
            Format::Json => line.json(now),
            Format::Common => line.common(now),
        };
        if let Err(TrySendError::Full(_)) = self.lines.try_send(text) {
            Counters::add(&self.counters.access_lines_left_out_total);
        }
    }
}

fn write(lines: &Receiver<String>, out: Box<dyn Write + Send>) {
    let mut out = BufWriter::new(out);
    while let Ok(line) = lines.recv() {
        let mut put = |line: &str| writeln!(out, "{line}");
        // Everything that waits already, then once to the disk.
        let written = put(&line).and_then(|()| lines.try_iter().try_for_each(|line| put(&line)));
        if let Err(error) = written.and_then(|()| out.flush()) {
            tracing::warn!("the access log cannot be written any further: {error}");
            return;
        }
    }
}

impl Line<'_> {
    fn target(&self) -> String {
        self.target.chars().take(MAX_TARGET).collect()
    }

    fn json(&self, now: i64) -> String {
        json!({
            "time": api::time::rfc3339(now), "client": self.client, "method": self.method, "host": self.host,
            "target": self.target(), "version": format!("{:?}", self.version), "status": self.status,
            "bytes": self.bytes, "microseconds": self.microseconds, "route": self.route,
            "trace": self.trace.map(|id| format!("{id:032x}")),
        })
        .to_string()
    }

    /// The time is in UTC; quotes, backslashes and what cannot be printed are escaped.
    fn common(&self, now: i64) -> String {
        const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
        let text = api::time::rfc3339(now);
        let part = |from: usize, to: usize| text.get(from..to).unwrap_or("00");
        let month = part(5, 7).parse::<usize>().ok().and_then(|month| MONTHS.get(month.wrapping_sub(1)));
        let (day, year, time) = (part(8, 10), part(0, 4), part(11, 19));
        let request = format!("{} {} {:?}", self.method, self.target(), self.version);
        let request: String = request.chars().flat_map(char::escape_default).collect();
        let bytes = self.bytes.map_or_else(|| "-".to_owned(), |bytes| bytes.to_string());
        let month = month.copied().unwrap_or("Jan");
        format!("{} - - [{day}/{month}/{year}:{time} +0000] \"{request}\" {} {bytes}", self.client, self.status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(target: &str) -> Line<'_> {
        Line {
            client: [192, 0, 2, 1].into(),
            method: "GET",
            host: "a.test",
            target,
            version: http::Version::HTTP_11,
            status: 200,
            bytes: Some(13),
            microseconds: 42,
            route: "shop/web",
            trace: Some(7),
        }
    }

    #[test]
    fn both_formats_stay_one_line() {
        let evil = line("/a\"\n\\\u{1b}[0m?q=1");
        assert_eq!(
            evil.common(0),
            r#"192.0.2.1 - - [01/Jan/1970:00:00:00 +0000] "GET /a\"\n\\\u{1b}[0m?q=1 HTTP/1.1" 200 13"#
        );
        let json = evil.json(0);
        assert!(!json.contains('\n'));
        let read: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(read["target"], evil.target);
        assert_eq!((&read["status"], &read["route"]), (&200.into(), &"shop/web".into()));
        assert_eq!(read["trace"], "00000000000000000000000000000007");
    }
}
