//! `ADD` of what is elsewhere: a file by http or https, a repository by `git`.

use super::view::View;
use crate::digest::Digest;
use crate::error::{Error, Result, io};
use crate::pull::client::{self, Client};
use crate::pull::{PullOptions, retried};
use crate::store::{Progress, ProgressFn, Store};
use http::Uri;
use http_body_util::BodyExt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Whom git runs as where it needs nobody's keys; no pod, build or function has this id.
const GIT_USER: u32 = 0xfffc_fffe;
const GIT_TIME: Duration = Duration::from_secs(1800);
const GIT_POLL: Duration = Duration::from_millis(50);

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Remote {
    File(String),
    Git(Repository),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Repository {
    pub url: String,
    /// Branch, tag or commit; default: the remote's `HEAD`.
    pub reference: Option<String>,
    pub subdirectory: String,
    ssh: bool,
}

/// What a source of `ADD` is, if it is elsewhere.
pub(crate) fn parse(source: &str) -> Option<std::result::Result<Remote, String>> {
    let (before, fragment) = source.split_once('#').map_or((source, None), |(url, f)| (url, Some(f)));
    let scheme = before.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
    let plain = before.split('?').next().unwrap_or(before);
    let ssh = scheme.as_deref() == Some("ssh") || scheme.is_none() && is_scp(before);
    let git = ssh || scheme.as_deref() == Some("git") || plain.trim_end_matches('/').ends_with(".git");
    match scheme.as_deref() {
        Some("http" | "https") if !git => Some(Ok(Remote::File(source.to_owned()))),
        Some("http" | "https" | "git" | "ssh") => Some(repository(plain, fragment, ssh).map(Remote::Git)),
        Some(other) => Some(Err(format!("{source}: {other} is not known here; it is http, https, git or ssh"))),
        None if ssh => Some(repository(plain, fragment, ssh).map(Remote::Git)),
        None => None,
    }
}

/// `git@host:path`.
fn is_scp(text: &str) -> bool {
    text.strip_prefix("git@").is_some_and(|rest| rest.contains(':'))
}

fn repository(url: &str, fragment: Option<&str>, ssh: bool) -> std::result::Result<Repository, String> {
    let (reference, subdirectory) =
        fragment.unwrap_or_default().split_once(':').unwrap_or((fragment.unwrap_or(""), ""));
    let fits = |text: &str| !text.starts_with('-') && !text.chars().any(|c| c.is_control() || c.is_whitespace());
    if !fits(url) || !fits(reference) || subdirectory.split('/').any(|p| p == "..") {
        return Err(format!("{url}: neither it, its reference nor its directory may lead elsewhere"));
    }
    Ok(Repository {
        url: url.to_owned(),
        reference: Some(reference.to_owned()).filter(|r| !r.is_empty()),
        subdirectory: subdirectory.trim_matches('/').to_owned(),
        ssh,
    })
}

/// A file that was fetched.
pub(crate) struct Fetched {
    /// The last part of its URL.
    pub name: String,
    pub file: Arc<File>,
    pub size: u64,
    /// Unix seconds.
    pub mtime: i64,
}

impl Store {
    /// Fetches a file, unless one with its digest was fetched lately.
    pub(super) fn fetch(
        &self,
        url: &str,
        checksum: Option<Digest>,
        options: &PullOptions,
        progress: ProgressFn,
    ) -> Result<Fetched> {
        let uri: Uri = url.split('#').next().unwrap_or(url).parse().map_err(|e| Error::invalid(url, e))?;
        let there = match checksum {
            Some(digest) => self.blob_claim(&digest)?.map(|_| (digest, 0)),
            None => None,
        };
        let (digest, mtime) = match there {
            Some(there) => there,
            None => {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .map_err(io("start a runtime for", url))?;
                let client = Client::for_url(&uri, options)?;
                let download = || self.download(&client, &uri, url, checksum, progress);
                runtime.block_on(retried(client.tries, url, progress, download)).map_err(|e| plain_words(e, url))?
            }
        };
        let blob = self.blob_open(&digest)?.ok_or(Error::BlobUnknown(digest))?;
        let size = blob.file.metadata().map_err(io("stat", url))?.len();
        let name = uri.path().rsplit('/').next().map(decode).unwrap_or_default();
        Ok(Fetched { name, file: Arc::new(blob.file), size, mtime })
    }

    async fn download(
        &self,
        client: &Client,
        uri: &Uri,
        url: &str,
        checksum: Option<Digest>,
        progress: ProgressFn<'_>,
    ) -> Result<(Digest, i64)> {
        let response = client.download(uri, url).await?;
        let mtime = client::header(&response, "last-modified").and_then(|d| http_date(&d)).unwrap_or(0);
        let total = client::header(&response, "content-length").and_then(|l| l.parse().ok());
        let mut writer = self.blob_writer()?;
        let mut body = response.into_body();
        while let Some(frame) = client.timed(body.frame(), url).await? {
            let frame = frame.map_err(|e| client.failed(e.to_string()))?;
            let Ok(data) = frame.into_data() else { continue };
            writer.write(&data)?;
            progress(Progress::Bytes { what: url.to_owned(), done: writer.length(), total });
        }
        let (digest, _) = writer.commit(checksum)?;
        Ok((digest, mtime))
    }
}

/// The client's errors speak of registries.
fn plain_words(error: Error, url: &str) -> Error {
    match error {
        Error::Registry { why, .. } => Error::invalid(url, why),
        Error::RegistryNotFound { .. } => Error::invalid(url, "it is not there (404)"),
        Error::Refused { status, said, .. } => Error::invalid(url, format!("refused ({status}): {said}")),
        Error::Unauthorized { status, .. } => {
            Error::invalid(url, format!("refused ({status}); builds have no credentials for it: fetch it beforehand"))
        }
        other => other,
    }
}

fn decode(name: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = name.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let hex = after.get(..2).and_then(|h| std::str::from_utf8(h).ok()).and_then(|h| u8::from_str_radix(h, 16).ok());
        (rest, _) = match (first, hex) {
            (b'%', Some(byte)) => (after.get(2..).unwrap_or_default(), bytes.push(byte)),
            _ => (after, bytes.push(*first)),
        };
    }
    let name = String::from_utf8_lossy(&bytes).into_owned();
    if matches!(name.as_str(), "." | "..") || name.contains(['/', '\0']) { String::new() } else { name }
}

/// `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, IMF-fixdate) as Unix seconds.
fn http_date(text: &str) -> Option<i64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let words: Vec<&str> = text.split([' ', ':']).filter(|w| !w.is_empty()).collect();
    let [_, day, month, year, hour, minute, second, "GMT"] = words[..] else { return None };
    let month = MONTHS.iter().position(|m| *m == month)? as i64 + 1;
    let number = |text: &str| text.parse::<u16>().ok().map(i64::from);
    let (day, year) = (number(day)?, number(year)?);
    // Days from civil, https://howardhinnant.github.io/date_algorithms.html
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let era = y.div_euclid(400);
    let of_era = y.rem_euclid(400);
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + (153 * m + 2) / 5 + day - 1 - 719_468;
    Some(((days * 24 + number(hour)?) * 60 + number(minute)?) * 60 + number(second)?)
}

/// A repository's files, for as long as they are needed.
pub(crate) struct Checkout {
    path: PathBuf,
    pub view: View,
}

impl Drop for Checkout {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

impl Repository {
    /// Fetches one commit and what it includes. `go_on` is asked whether to.
    pub fn checkout(&self, checksum: Option<&str>, go_on: &dyn Fn() -> Result<()>) -> Result<Checkout> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("atoll-git-{}-{number}", std::process::id()));
        std::fs::DirBuilder::new().mode(0o700).create(&path).map_err(io("create", &path))?;
        let made = self.fill(&path, checksum, go_on).and_then(|()| View::open(&[path.join("tree")]));
        match made {
            Ok(view) => Ok(Checkout { path, view }),
            Err(error) => {
                let _ = std::fs::remove_dir_all(&path);
                Err(error)
            }
        }
    }

    fn fill(&self, path: &Path, checksum: Option<&str>, go_on: &dyn Fn() -> Result<()>) -> Result<()> {
        let git = Git { home: path, as_caller: self.ssh || !rustix::process::geteuid().is_root(), go_on };
        let tree = path.join("tree");
        std::fs::create_dir(&tree).map_err(io("create", &tree))?;
        if !git.as_caller {
            for directory in [path, &tree] {
                chown(directory, Some(GIT_USER), Some(GIT_USER)).map_err(io("give away", directory))?;
            }
        }
        let told = |why: String| Error::invalid(&self.url, why);
        git.run(&["init", "--quiet"]).map_err(told)?;
        git.run(&["remote", "add", "origin", &self.url]).map_err(told)?;
        let wanted = self.reference.as_deref().unwrap_or("HEAD");
        let fetch = ["fetch", "--quiet", "--no-tags"];
        // Not every server gives a part of the history, or a commit by its name.
        let tries = [&["--depth=1", "origin", wanted][..], &["origin", wanted]];
        let found = if tries.iter().any(|what| git.run(&[&fetch[..], what].concat()).is_ok()) {
            "FETCH_HEAD"
        } else {
            (go_on)()?;
            let all = ["fetch", "--quiet", "--tags", "origin", "+refs/heads/*:refs/remotes/origin/*"];
            git.run(&all).map_err(told)?;
            wanted
        };
        git.run(&["checkout", "--quiet", "--detach", found]).map_err(told)?;
        git.run(&["submodule", "--quiet", "update", "--init", "--recursive", "--depth=1"]).map_err(told)?;
        let commit = git.run(&["rev-parse", "HEAD"]).map_err(told)?;
        match checksum {
            Some(expected) if !commit.trim().starts_with(expected) || expected.len() < 7 => {
                Err(told(format!("--checksum={expected}: {wanted} is commit {}", commit.trim())))
            }
            _ => Ok(()),
        }
    }
}

struct Git<'a> {
    home: &'a Path,
    /// For the caller's keys; else as nobody.
    as_caller: bool,
    go_on: &'a dyn Fn() -> Result<()>,
}

impl Git<'_> {
    /// What it says on standard output. Nothing of this machine's configuration counts, no hook runs, nobody is asked.
    fn run(&self, args: &[&str]) -> std::result::Result<String, String> {
        let said =
            |name: &str| File::options().create(true).truncate(true).read(true).write(true).open(self.home.join(name));
        let (out, err) = (said("out").map_err(|e| e.to_string())?, said("err").map_err(|e| e.to_string())?);
        let copy = |file: &File| file.try_clone().map(Stdio::from).map_err(|e| e.to_string());
        let mut command = Command::new("git");
        for setting in [
            "core.hooksPath=/dev/null",
            "core.fsmonitor=false",
            "protocol.allow=never",
            "protocol.https.allow=always",
            "protocol.http.allow=always",
            "protocol.git.allow=always",
            "protocol.ssh.allow=always",
            "advice.detachedHead=false",
            "init.defaultBranch=main",
            "safe.directory=*",
        ] {
            command.args(["-c", setting]);
        }
        command.arg("-C").arg(self.home.join("tree")).args(args).current_dir("/");
        command.stdin(Stdio::null()).stdout(copy(&out)?).stderr(copy(&err)?);
        for (name, value) in
            [("GIT_CONFIG_NOSYSTEM", "1"), ("GIT_CONFIG_GLOBAL", "/dev/null"), ("GIT_TERMINAL_PROMPT", "0")]
        {
            command.env(name, value);
        }
        if !self.as_caller {
            command.uid(GIT_USER).gid(GIT_USER).env("HOME", self.home).env_remove("SSH_AUTH_SOCK");
        }
        let child = command.process_group(0).spawn();
        let mut child = child.map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => "ADD of a repository needs git here: install the package git".to_owned(),
            _ => format!("cannot run git: {e}"),
        })?;
        let begun = Instant::now();
        let status = loop {
            match child.try_wait().map_err(|e| e.to_string())? {
                Some(status) => break status,
                None => {
                    let over = (self.go_on)().err().map(|e| e.chain());
                    let late = (begun.elapsed() > GIT_TIME).then(|| "git was not done in half an hour".to_owned());
                    if let Some(why) = over.or(late) {
                        if let Some(pid) = rustix::process::Pid::from_raw(child.id().cast_signed()) {
                            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
                        }
                        let _ = child.wait();
                        return Err(why);
                    }
                    std::thread::sleep(GIT_POLL);
                }
            }
        };
        let text = |mut file: File| {
            let mut text = String::new();
            let _ = file.seek(SeekFrom::Start(0));
            let _ = file.take(16 << 10).read_to_string(&mut text);
            text
        };
        if status.success() {
            return Ok(text(out));
        }
        let complaint: String = text(err).chars().filter(|c| !c.is_control() || *c == '\n').collect();
        Err(format!("git: {}", complaint.trim().replace('\n', "; ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_elsewhere() {
        let git = |text: &str| match parse(text).unwrap().unwrap() {
            Remote::Git(r) => (r.url, r.reference, r.subdirectory, r.ssh),
            Remote::File(f) => panic!("{f}"),
        };
        assert_eq!(parse("src/a.git"), None);
        assert_eq!(parse("http://x/a.tar?b=c"), Some(Ok(Remote::File("http://x/a.tar?b=c".into()))));
        assert_eq!(
            git("https://x/a.git#v1:sub/dir"),
            ("https://x/a.git".into(), Some("v1".into()), "sub/dir".into(), false)
        );
        assert_eq!(git("git@x:a/b.git"), ("git@x:a/b.git".into(), None, String::new(), true));
        assert_eq!(git("git://x/a#:docs"), ("git://x/a".into(), None, "docs".into(), false));
        for bad in ["ftp://x/y", "https://x/a.git#--upload-pack=x", "https://x/a.git#v1:../..", "file:///etc"] {
            assert!(parse(bad).unwrap().is_err(), "{bad}");
        }
    }

    #[test]
    fn dates_and_names() {
        assert_eq!(http_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(http_date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(http_date("yesterday"), None);
        assert_eq!([decode("a%20b"), decode("%2e%2e"), decode("a%2Fb"), decode("%zz")], ["a b", "", "", "%zz"]);
    }

    proptest! {
        #[test]
        fn never_panics(text in "(https?://|git@|ssh://|git://|#|:|%|[a-z./-]){0,10}", date in "[A-Za-z0-9,: ]{0,40}") {
            let _ = parse(&text);
            let _ = decode(&text);
            let _ = http_date(&date);
        }
    }
}
