//! Logs of a Knative Service's pods that are gone: appended to one file of the Service, with one more put aside, so that
//! [`crate::logs`] reads them like a container's.
//!
//! Bounded: each Service's two files, each namespace's sum, and the time since a Service's last pod went.

use crate::config::is_plain_name;
use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

/// Bytes of one file; what one pod leaves is cut to it, the newest stays.
const FILE: u64 = 4 << 20;
/// Bytes of a namespace; the oldest go.
const NAMESPACE: u64 = 64 << 20;
/// What a file counts for at least.
const LEAST: u64 = 4 << 10;
const AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// The Service that a pod belongs to, by the label that Knative gives its pods.
pub(crate) const OWNER: &str = "serving.knative.dev/serviceUID";

/// Pods of one Service may go at once.
static ONE: Mutex<()> = Mutex::new(());

fn dir(data_dir: &Path) -> PathBuf {
    data_dir.join("functions").join("logs")
}

/// Where the logs of a Service's former pods are. `None` if the names are none.
pub(crate) fn path(data_dir: &Path, namespace: &str, uid: &str) -> Option<PathBuf> {
    let fine = is_plain_name(namespace) && is_plain_name(uid) && !namespace.contains('_');
    fine.then(|| dir(data_dir).join(format!("{namespace}_{uid}.log")))
}

/// Keeps the logs in a pod's directory, which is about to go; those of attempts up to `upto`, if that is given.
pub(crate) fn keep(data_dir: &Path, namespace: &str, owner: Option<&str>, pod_dir: &Path, upto: Option<u32>) {
    let Some(kept) = owner.and_then(|uid| path(data_dir, namespace, uid)) else { return };
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let kept = append_all(&kept, pod_dir, upto).and_then(|()| sweep(&dir(data_dir), SystemTime::now()));
    if let Err(error) = kept {
        tracing::warn!(pod = %pod_dir.display(), "its logs are not kept: {error}");
    }
}

fn append_all(kept: &Path, pod_dir: &Path, upto: Option<u32>) -> io::Result<()> {
    for container in entries(&pod_dir.join("logs"))? {
        let mut attempts: Vec<(u32, bool, PathBuf)> = Vec::new();
        for file in entries(&container)? {
            let Some(name) = file.file_name().and_then(|name| name.to_str()) else { continue };
            let aside = name.ends_with(".log.1");
            let number = name.split('.').next().and_then(|number| number.parse().ok());
            let Some(number) = number.filter(|number| upto.is_none_or(|most| *number <= most)) else { continue };
            attempts.push((number, !aside, file));
        }
        attempts.sort();
        for (_, _, file) in attempts {
            append(kept, &file)?;
        }
    }
    Ok(())
}

fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn append(kept: &Path, log: &Path) -> io::Result<()> {
    let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits().cast_signed();
    let mut log = File::options().read(true).custom_flags(flags).open(log)?;
    let length = log.metadata()?.len();
    if !log.metadata()?.is_file() || length == 0 {
        return Ok(());
    }
    if let Some(parent) = kept.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    }
    let mut bytes = Vec::new();
    log.seek(SeekFrom::Start(length.saturating_sub(FILE)))?;
    log.take(FILE).read_to_end(&mut bytes)?;
    // Whole lines only, at either end.
    let from = if length > FILE { bytes.iter().position(|b| *b == b'\n').map_or(bytes.len(), |at| at + 1) } else { 0 };
    let upto = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
    let whole = bytes.get(from..upto).unwrap_or_default();
    if fs::metadata(kept).is_ok_and(|m| m.len() + whole.len() as u64 > FILE) {
        fs::rename(kept, aside(kept))?;
    }
    let mut out = File::options().create(true).append(true).mode(0o600).open(kept)?;
    out.write_all(whole)
}

fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

/// What is too old goes, and the oldest of a namespace that has too much.
fn sweep(dir: &Path, now: SystemTime) -> io::Result<()> {
    let mut files: Vec<(String, SystemTime, u64, PathBuf)> = Vec::new();
    for path in entries(dir)? {
        let Ok(about) = fs::symlink_metadata(&path) else { continue };
        let Some((namespace, _)) = path.file_name().and_then(|name| name.to_str()?.split_once('_')) else { continue };
        files.push((namespace.to_owned(), about.modified()?, about.len(), path));
    }
    // By namespace, the newest first.
    files.sort_by(|a, b| (&a.0, b.1).cmp(&(&b.0, a.1)));
    let (mut current, mut sum) = (String::new(), 0);
    for (namespace, changed, length, path) in files {
        if namespace != current {
            (current, sum) = (namespace, 0);
        }
        // a file costs more than what is in it
        sum += length.max(LEAST);
        if sum > NAMESPACE || now.duration_since(changed).is_ok_and(|age| age > AGE) {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(dir: &Path, logs: &[(&str, &str)]) -> PathBuf {
        let pod = dir.join("pod");
        let _ = fs::remove_dir_all(&pod);
        fs::create_dir_all(pod.join("logs/app")).unwrap();
        for (name, text) in logs {
            fs::write(pod.join("logs/app").join(name), text).unwrap();
        }
        pod
    }

    fn kept(dir: &Path) -> String {
        let path = path(dir, "shop", "u-1").unwrap();
        fs::read_to_string(aside(&path)).unwrap_or_default() + &fs::read_to_string(&path).unwrap_or_default()
    }

    #[test]
    fn logs_of_pods_that_are_gone_follow_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path();
        let logs = [("10.log", "e\n"), ("2.log", "d\n"), ("2.log.1", "c\n"), ("1.log", "b\nhalf")];
        keep(data, "shop", Some("u-1"), &pod(data, &logs), None);
        assert_eq!(kept(data), "b\nc\nd\ne\n");
        keep(data, "shop", Some("u-1"), &pod(data, &[("0.log", "f\n"), ("1.log", "g\n")]), Some(0));
        assert_eq!(kept(data), "b\nc\nd\ne\nf\n");
        for nothing in [None, Some(""), Some("../../x"), Some("..")] {
            keep(data, "shop", nothing, &pod(data, &[("0.log", "x\n")]), None);
        }
        keep(data, "../shop", Some("u-1"), &pod(data, &[("0.log", "x\n")]), None);
        assert_eq!(fs::read_dir(super::dir(data)).unwrap().count(), 1);
        assert!(path(data, "sh_op", "u").is_none(), "namespaces and Services do not mix");
    }

    #[test]
    fn a_flood_costs_its_own_function_its_oldest_lines() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path();
        let line = format!("{}\n", "x".repeat(99));
        for round in 0..4 {
            let text = format!("round {round}\n{}last {round}\n", line.repeat(60_000));
            keep(data, "shop", Some("u-1"), &pod(data, &[("0.log", &text)]), None);
        }
        let text = kept(data);
        assert!(text.len() as u64 <= 2 * FILE && text.ends_with("last 3\n") && text.contains("last 2\n"));
        assert!(text.lines().all(|line| line.len() == 99 || line.starts_with("last")), "whole lines");
    }

    #[test]
    fn old_logs_go_and_a_namespace_has_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path();
        let logs = super::dir(data);
        fs::create_dir_all(&logs).unwrap();
        let sized = |name: &str, length: u64, age: u64| {
            let file = File::create(logs.join(name)).unwrap();
            file.set_len(length).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
        };
        sized("loud_a.log", NAMESPACE / 2, 30);
        sized("loud_b.log", NAMESPACE / 2, 20);
        sized("loud_c.log", 1, 10);
        sized("quiet_a.log", 1, 40);
        sized("old_a.log", 1, AGE.as_secs() + 10);
        sweep(&logs, SystemTime::now()).unwrap();
        let mut left: Vec<String> =
            fs::read_dir(&logs).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(left, ["loud_b.log", "loud_c.log", "quiet_a.log"]);
    }
}
