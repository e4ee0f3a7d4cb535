//! docs/oci-runtime.md names a test for every clause and attack: each of them has to be there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn crates() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("crates").to_owned()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Names in the lists of tests that a directory's files hold.
fn listed(directory: &Path) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(directory).expect("tests").flatten() {
        let text = read(&entry.path());
        names.extend(text.split("(\"").skip(1).filter_map(|rest| {
            let (name, after) = rest.split_once('"')?;
            (after.starts_with(", ") && !name.contains(' ')).then(|| name.to_owned())
        }));
    }
    names
}

/// A module of this crate that has unit tests.
fn has_unit_tests(module: &str) -> bool {
    let path = crates().join("container/src").join(module.replace("::", "/"));
    [path.with_extension("rs"), path.join("mod.rs")]
        .iter()
        .any(|file| fs::read_to_string(file).is_ok_and(|text| text.contains("#[test]")))
}

/// What stands between backticks and may be a test's name.
fn names(cell: &str) -> Vec<&str> {
    let name = |text: &&str| {
        text.split("::").all(|part| {
            !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b"_0123456789 ".contains(&b))
        })
    };
    cell.split('`').skip(1).step_by(2).filter(name).collect()
}

#[test]
fn every_named_test_is_there() {
    let tests = crates().join("container/tests");
    let bundles = listed(&tests.join("oci"));
    let pods = listed(&tests.join("runtime"));
    let ends = listed(&crates().join("atoll/tests/e2e"));
    assert!(bundles.len() > 40 && pods.len() > 40 && ends.contains("oci_podman_run"), "the lists are read");
    let text = read(&crates().parent().expect("root").join("docs/oci-runtime.md"));
    let (clauses, attacks) = text
        .split_once("## The specification")
        .and_then(|(_, rest)| rest.split_once("## Attacks"))
        .expect("both tables are there");
    let mut wrong = Vec::new();
    let mut check = |line: &str, cell: &str, also: Option<&BTreeSet<String>>| {
        let mut found = 0;
        for name in names(cell) {
            // A word that is neither a list's nor a module's is of the remark beside the name.
            let a_word = !name.contains("::") && !name.starts_with("e2e ");
            let known = match name.strip_prefix("e2e ") {
                Some(name) => ends.contains(name),
                None => bundles.contains(name) || also.is_some_and(|pods| pods.contains(name)) || has_unit_tests(name),
            };
            found += usize::from(known);
            if !known && !a_word {
                wrong.push(format!("{name}: no such test: {line}"));
            }
        }
        if found == 0 && !cell.contains("every test") && !cell.contains("no pods there") {
            wrong.push(format!("names no test: {line}"));
        }
    };
    let rows = |text: &str| -> Vec<(String, Vec<String>)> {
        let table = text
            .lines()
            .filter(|line| line.starts_with("| ") && !line.starts_with("| clause") && !line.starts_with("| attack"));
        table
            .map(|line| (line.to_owned(), line.trim_matches('|').split(" | ").map(|c| c.trim().to_owned()).collect()))
            .collect()
    };
    let (clauses, attacks) = (rows(clauses), rows(attacks));
    assert!(clauses.len() > 50 && attacks.len() > 10, "the tables are read");
    for (line, cells) in &clauses {
        check(line, cells.get(2).map_or("", String::as_str), None);
    }
    for (line, cells) in &attacks {
        check(line, cells.get(1).map_or("", String::as_str), None);
        check(line, cells.get(2).map_or("", String::as_str), Some(&pods));
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
