//! `atoll image`: the local store from the command line. Works whether `atoll up` runs or not.

mod build;
mod cli;
mod machine;
mod sandbox;

pub use cli::{Budget, Image};

use crate::cli::{DataDir, Failure, Outcome, explain};
use crate::instance::Instance;
use crate::output::{self, Format};
use cli::{Import, Prune, Registry};
use image::{GcOptions, ImportOptions, Platform, Progress, PullOptions, Store};
use serde_json::json;
use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

pub fn run(command: Image) -> Outcome {
    match command {
        Image::Build(options) => build::run(&options),
        Image::Import(options) => import(&options),
        Image::Tag { data, image, name } => open(&data)?.tag(&image, &name).map_err(explain),
        Image::Ls { data, output } => list(&data, output),
        Image::Rm { data, names } => remove(&data, &names),
        Image::Inspect { data, name, output } => {
            let inspected = open(&data)?.inspect(&name).map_err(explain)?;
            output::value(output, &serde_json::to_value(inspected).map_err(explain)?);
            Ok(())
        }
        Image::Export { data, name, file } => {
            let digest = open(&data)?.export(&name, &file, &|p| show(p)).map_err(explain)?;
            println!("{name} ({digest}) written to {}", file.display());
            Ok(())
        }
        Image::Push { data, image, target, registry } => push(&data, &image, target.as_deref(), &registry),
        Image::Prune(options) => prune(&options),
        Image::Pull { data, reference, platform, registry } => pull(&data, &reference, platform.as_deref(), &registry),
    }
}

fn open(data: &DataDir) -> Result<Store, Failure> {
    open_with(&Instance::open(&data.data_dir)?)
}

/// The image store of an instance; foreign bytes are unpacked in roles of this very program.
pub fn open_with(instance: &Instance) -> Result<Store, Failure> {
    let store = Store::open(instance.data_dir.join("images")).map_err(explain)?;
    Ok(store.with_roles("/proc/self/exe".into()))
}

fn import(options: &Import) -> Outcome {
    let imported = open(&options.data)?
        .import(
            &options.file,
            &ImportOptions {
                tag: options.tag.clone(),
                cmd: options.cmd.clone(),
                entrypoint: options.entrypoint.clone(),
                env: options.env.clone(),
                user: options.user.clone(),
                workdir: options.workdir.clone(),
                platform: None,
                machine: options.manifest.is_some(),
            },
            &|p| show(p),
        )
        .map_err(explain)?;
    let line = format!("{} {} ({})", imported.kind.as_str(), imported.names.join(", "), imported.digest);
    match (&imported.machine, &options.manifest) {
        (Some(machine), Some(to)) => {
            // Standard output may be the manifest's.
            eprintln!("{line}");
            machine::remarks(machine).iter().for_each(|remark| eprintln!("note: {remark}"));
            machine::write(machine, to)
        }
        (Some(_), None) => {
            println!("{line}");
            eprintln!("note: --manifest FILE writes the machine that it describes as a VirtualMachine");
            Ok(())
        }
        (None, _) => {
            println!("{line}");
            Ok(())
        }
    }
}

fn list(data: &DataDir, format: Format) -> Outcome {
    let images = open(data)?.list().map_err(explain)?;
    if format != Format::Table {
        output::value(format, &json!({ "images": serde_json::to_value(images).map_err(explain)? }));
        return Ok(());
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let rows: Vec<Vec<String>> = images
        .iter()
        .map(|i| {
            let digest = i.digest.to_string();
            let short = digest.strip_prefix("sha256:").unwrap_or(&digest).chars().take(12).collect();
            let age = Duration::from_secs(now.saturating_sub(i.created));
            vec![i.name.clone(), short, i.kind.as_str().into(), i.platforms.join(","), size(i.size), ago(age)]
        })
        .collect();
    output::table(&["NAME", "DIGEST", "KIND", "PLATFORM", "SIZE", "AGE"], &rows);
    Ok(())
}

fn remove(data: &DataDir, names: &[String]) -> Outcome {
    let store = open(data)?;
    for name in names {
        let removed = store.remove(name).map_err(explain)?;
        for gone in removed.untagged {
            println!("untagged {gone}");
        }
        if let Some(digest) = removed.deleted {
            println!("deleted  {digest}");
        }
    }
    store.gc(&Default::default()).map_err(explain)?;
    Ok(())
}

fn pull_options(registry: &Registry) -> Result<PullOptions, Failure> {
    Ok(PullOptions {
        docker_config: registry.authfile.clone(),
        insecure_hosts: registry.insecure.clone(),
        ca_certificates: registry.ca.clone(),
        mirrors: registry.mirror.iter().map(|text| mirror("--mirror", text)).collect::<Result<_, _>>()?,
        ..PullOptions::default()
    })
}

/// How pods' images are pulled. Files are looked at now: a daemon that cannot read them should say so when it starts.
pub fn pods_pull(options: &crate::cli::Up) -> Result<PullOptions, Failure> {
    for (flag, file) in [("--pull-authfile", &options.pull_authfile), ("--pull-ca", &options.pull_ca)] {
        if let Some(path) = file {
            std::fs::File::open(path).map_err(|e| Failure(format!("{flag} {}: {e}", path.display())))?;
        }
    }
    Ok(PullOptions {
        docker_config: options.pull_authfile.clone(),
        insecure_hosts: options.pull_insecure.clone(),
        ca_certificates: options.pull_ca.clone(),
        mirrors: options.pull_mirror.iter().map(|text| mirror("--pull-mirror", text)).collect::<Result<_, _>>()?,
        ..PullOptions::default()
    })
}

fn mirror(flag: &str, text: &str) -> Result<(String, String), Failure> {
    match text.split_once('=') {
        Some((host, mirror)) if !host.is_empty() && !mirror.is_empty() => Ok((host.to_owned(), mirror.to_owned())),
        _ => Err(Failure(format!("{flag} {text:?}: write it as HOST=MIRROR, such as docker.io=mirror.example"))),
    }
}

fn push(data: &DataDir, image: &str, target: Option<&str>, registry: &Registry) -> Outcome {
    let digest = open(data)?.push(image, target, &pull_options(registry)?, &|p| show(p)).map_err(explain)?;
    println!("{} ({digest})", target.unwrap_or(image));
    Ok(())
}

fn prune(options: &Prune) -> Outcome {
    let collection = GcOptions {
        grace: duration("--grace", &options.grace)?,
        untagged: duration("--untagged", &options.untagged)?,
        ..options.budget.collection()?
    };
    let report = open(&options.data)?.gc(&collection).map_err(explain)?;
    if options.output != Format::Table {
        output::value(options.output, &serde_json::to_value(&report).map_err(explain)?);
        return Ok(());
    }
    println!(
        "freed {}: {} blobs, {} layers, {} manifests; {} images and {} build steps over the budget",
        size(report.bytes),
        report.blobs,
        report.layers,
        report.manifests,
        report.images,
        report.steps
    );
    Ok(())
}

impl Budget {
    pub fn collection(&self) -> Result<GcOptions, Failure> {
        Ok(GcOptions {
            build_age: duration("--build-cache-age", &self.build_cache_age)?,
            build_bytes: bytes("--build-cache-size", &self.build_cache_size)?,
            image_age: self.image_age.as_ref().map(|text| duration("--image-age", text)).transpose()?,
            image_bytes: self.image_size.as_ref().map(|text| bytes("--image-size", text)).transpose()?,
            ..GcOptions::default()
        })
    }
}

/// Bytes of an option such as `20Gi`.
pub(crate) fn bytes(flag: &str, text: &str) -> Result<u64, Failure> {
    let parsed = api::quantity::Quantity::parse(text).ok().and_then(|q| u64::try_from(q.value()).ok());
    parsed.ok_or_else(|| Failure(format!("{flag} {text:?}: write it as 20Gi or 500M")))
}

/// `90s`, `30m`, `12h`, `14d`.
fn duration(flag: &str, text: &str) -> Result<Duration, Failure> {
    let wrong = || Failure(format!("{flag} {text:?}: write it as 30m, 12h or 14d"));
    let scale = match text.bytes().last() {
        Some(b's') => 1,
        Some(b'm') => 60,
        Some(b'h') => 3600,
        Some(b'd') => 86_400,
        _ => return Err(wrong()),
    };
    let number = text.get(..text.len() - 1).and_then(|n| n.parse::<u32>().ok()).ok_or_else(wrong)?;
    Ok(Duration::from_secs(u64::from(number) * scale))
}

fn pull(data: &DataDir, reference: &str, platform: Option<&str>, registry: &Registry) -> Outcome {
    let platform = platform.map(Platform::parse).transpose().map_err(explain)?;
    let options = PullOptions { platform, ..pull_options(registry)? };
    let digest = open(data)?.pull(reference, &options, &|p| show(p)).map_err(explain)?;
    println!("{reference} ({digest})");
    Ok(())
}

/// Progress: one line rewritten on a terminal, plain lines (one each two seconds at most) elsewhere. On stderr.
fn show(progress: Progress) {
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    let terminal = std::io::stderr().is_terminal();
    let mut last = LAST.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let pause = Duration::from_millis(if terminal { 100 } else { 2000 });
    match progress {
        Progress::Step(text) => {
            eprintln!("{}{text}", if terminal { "\r\x1b[K" } else { "" });
        }
        Progress::Bytes { what, done, total } => {
            if last.is_some_and(|at| at.elapsed() < pause) && total != Some(done) {
                return;
            }
            *last = Some(Instant::now());
            let text = match total {
                Some(total) if total > 0 => {
                    format!("{what}: {} of {} {}", size(done), size(total), bar(done as f64 / total as f64, terminal))
                }
                _ => format!("{what}: {}", size(done)),
            };
            if terminal {
                eprint!("\r\x1b[K{text}");
                let _ = std::io::stderr().flush();
            } else {
                eprintln!("{text}");
            }
        }
    }
}

fn bar(part: f64, terminal: bool) -> String {
    if !terminal {
        return format!("({:.0}%)", part * 100.0);
    }
    let full = (part.clamp(0.0, 1.0) * 30.0).round() as usize;
    format!("[{}{}]", "=".repeat(full), " ".repeat(30 - full))
}

pub(crate) fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit < units.len() - 1 {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    let name = units.get(unit).copied().unwrap_or("TiB");
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {name}") }
}

fn ago(age: Duration) -> String {
    match age.as_secs() {
        s if s < 120 => format!("{s}s"),
        s if s < 7200 => format!("{}m", s / 60),
        s if s < 172_800 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_say_what_they_are_for() {
        assert_eq!(duration("--x", "14d").unwrap(), Duration::from_secs(14 * 86_400));
        assert_eq!(duration("--x", "0s").unwrap(), Duration::ZERO);
        for bad in ["", "d", "-1d", "5", "1.5h", "5é"] {
            assert!(duration("--x", bad).unwrap_err().0.starts_with("--x"), "{bad}");
        }
    }

    #[test]
    fn sizes_and_ages_read_well() {
        assert_eq!([size(0), size(1023), size(1536), size(3 << 30)], ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]);
        assert_eq!([ago(Duration::from_secs(5)), ago(Duration::from_secs(7300))], ["5s", "2h"]);
    }
}
