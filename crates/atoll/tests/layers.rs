//! The house has floors: a crate may depend only on crates of the floors below it.

use serde_json::Value;
use std::collections::BTreeMap;

const FLOORS: [(&str, &[&str]); 8] = [
    ("footing", &["clock", "jail"]),
    ("telemetry", &["spans"]),
    ("ground", &["api", "store"]),
    ("mechanism", &["container", "vmm", "function", "image", "network"]),
    ("guest", &["guest"]),
    ("node", &["node"]),
    ("control", &["server", "controllers", "gateway", "invoke", "registry"]),
    ("app", &["atoll"]),
];

fn metadata() -> Value {
    let output = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON")
}

#[test]
fn dependencies_point_down() {
    let floor: BTreeMap<&str, usize> =
        FLOORS.iter().enumerate().flat_map(|(at, (_, crates))| crates.iter().map(move |c| (*c, at))).collect();
    let metadata = metadata();
    let packages = metadata["packages"].as_array().expect("packages");
    let mut wrong = Vec::new();
    for package in packages {
        let name = package["name"].as_str().expect("name");
        let Some(&at) = floor.get(name) else {
            wrong.push(format!("{name} has no floor: name one in FLOORS"));
            continue;
        };
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let on = dependency["name"].as_str().expect("name");
            if dependency["kind"] == "dev" {
                continue;
            }
            if let Some(&below) = floor.get(on)
                && below >= at
            {
                wrong.push(format!("{name} ({}) depends on {on} ({})", FLOORS[at].0, FLOORS[below].0));
            }
        }
    }
    assert_eq!(packages.len(), floor.len(), "every crate stands on a floor and every floor's crates exist");
    assert!(wrong.is_empty(), "arrows that do not point down:\n{}", wrong.join("\n"));
}
