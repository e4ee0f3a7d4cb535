//! Counters for Prometheus: who has some, and their text format
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>).

use async_trait::async_trait;
use std::fmt::{Display, Write};

/// Media type of [`Text`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Who has counters beside the API server's own.
#[async_trait]
pub trait Source: Send + Sync + 'static {
    /// Whole families of metrics.
    async fn metrics(&self) -> Text;
}

/// Families of metrics as text.
#[derive(Clone, Debug, Default)]
pub struct Text(String);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    /// Its samples are named `_bucket`, `_sum` and `_count`.
    Histogram,
}

impl Text {
    /// Begins a family; its samples follow.
    pub fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    pub fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.0.push_str(name);
        for (index, (label, value)) in labels.iter().enumerate() {
            let _ = write!(self.0, "{}{label}=\"", if index == 0 { '{' } else { ',' });
            for c in value.chars() {
                match c {
                    '\\' => self.0.push_str("\\\\"),
                    '"' => self.0.push_str("\\\""),
                    '\n' => self.0.push_str("\\n"),
                    other => self.0.push(other),
                }
            }
            self.0.push('"');
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    /// A family of one sample.
    pub fn one(&mut self, name: &str, kind: Kind, help: &str, value: impl Display) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    pub fn append(&mut self, other: &Text) {
        self.0.push_str(&other.0);
    }

    pub fn into_string(self) -> String {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_prometheus_reads() {
        let mut text = Text::default();
        text.one("a_total", Kind::Counter, "Of a.", 7);
        text.family("b", Kind::Gauge, "Of b.");
        text.sample("b", &[("x", "1"), ("y", "q\"\\\n")], 0.5);
        let wanted = "# HELP a_total Of a.\n# TYPE a_total counter\na_total 7\n\
                      # HELP b Of b.\n# TYPE b gauge\nb{x=\"1\",y=\"q\\\"\\\\\\n\"} 0.5\n";
        assert_eq!(text.into_string(), wanted);
    }
}
