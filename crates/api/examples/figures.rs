//! What the table of kinds costs: `cargo run -p api --release --example figures`.

use std::time::Instant;

fn rss() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * 4
}

fn main() {
    let before = rss();
    let start = Instant::now();
    let types = api::schema::builtin::types();
    println!("types: {} in {:?}, {} KiB", types.by_name.len(), start.elapsed(), rss() - before);
    let start = Instant::now();
    let kinds = api::kinds::builtin();
    println!("kinds: {} in {:?}", kinds.len(), start.elapsed());
    let start = Instant::now();
    let text = api::openapi::v2(&kinds).to_string();
    println!("openapi v2: {} KiB in {:?}, {} KiB resident", text.len() / 1024, start.elapsed(), rss());
    for path in api::openapi::v3_paths(&kinds) {
        let parts: Vec<&str> = path.split('/').collect();
        let (group, version) = if parts.len() == 2 { ("", parts[1]) } else { (parts[1], parts[2]) };
        let start = Instant::now();
        let text = api::openapi::v3(group, version, &kinds).map(|v| v.to_string()).unwrap_or_default();
        println!("openapi v3 {path}: {} KiB in {:?}", text.len() / 1024, start.elapsed());
        if let Some(directory) = std::env::args().nth(1) {
            let _ = std::fs::write(format!("{directory}/{}.json", path.replace('/', "_")), text);
        }
    }
}
