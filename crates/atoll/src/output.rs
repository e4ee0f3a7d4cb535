//! How results are shown: aligned tables for people, JSON and YAML for programs.

use clap::ValueEnum;
use serde_json::Value;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Json,
    Yaml,
}

/// Prints rows under headings, columns aligned by their widest cell.
pub fn table(headings: &[&str], rows: &[Vec<String>]) {
    print!("{}", aligned(headings, rows));
}

fn aligned(headings: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = headings.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("{}\n", padded.join("   ").trim_end())
    };
    let mut text = line(headings.to_vec());
    for row in rows {
        text.push_str(&line(row.iter().map(String::as_str).collect()));
    }
    text
}

/// Prints a value as JSON or YAML; `Table` falls back to JSON.
pub fn value(format: Format, value: &Value) {
    print!("{}", text(format, value));
}

/// The same, not printed.
pub fn text(format: Format, value: &Value) -> String {
    match format {
        Format::Yaml => yaml(value),
        Format::Table | Format::Json => format!("{value:#}\n"),
    }
}

/// YAML in block style. Strings that could be read as something else are quoted as JSON strings, which YAML understands.
fn yaml(value: &Value) -> String {
    let mut out = String::new();
    block(value, 0, &mut out);
    out
}

fn block(value: &Value, depth: usize, out: &mut String) {
    let pad = "  ".repeat(depth);
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (key, inner) in map {
                out.push_str(&format!("{pad}{}:", scalar(&Value::String(key.clone()))));
                nested(inner, depth + 1, out);
            }
        }
        Value::Array(list) if !list.is_empty() => {
            for inner in list {
                out.push_str(&format!("{pad}-"));
                nested(inner, depth + 1, out);
            }
        }
        other => out.push_str(&format!("{pad}{}\n", scalar(other))),
    }
}

fn nested(value: &Value, depth: usize, out: &mut String) {
    let empty = value.as_object().is_some_and(serde_json::Map::is_empty) || value.as_array().is_some_and(Vec::is_empty);
    if (value.is_object() || value.is_array()) && !empty {
        out.push('\n');
        block(value, depth, out);
    } else {
        out.push_str(&format!(" {}\n", scalar(value)));
    }
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) if plain(text) => text.clone(),
        other => other.to_string(),
    }
}

fn plain(text: &str) -> bool {
    let first = text.chars().next().is_some_and(|c| c.is_ascii_alphabetic() || c == '/');
    let word = matches!(
        text.to_ascii_lowercase().as_str(),
        "true" | "false" | "null" | "yes" | "no" | "on" | "off" | "y" | "n"
    );
    first && !word && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./@".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".into(), "long cell".into()], vec!["bcd".into(), "x".into()]];
        assert_eq!(aligned(&["NAME", "WHAT"], &rows), "NAME   WHAT\na      long cell\nbcd    x\n");
    }

    #[test]
    fn yaml_quotes_what_would_change_meaning() {
        let text = yaml(&json!({"a": ["no", "x: y", 1, {}], "b": {"c": null}}));
        assert_eq!(text, "a:\n  - \"no\"\n  - \"x: y\"\n  - 1\n  - {}\nb:\n  c: null\n");
    }
}
