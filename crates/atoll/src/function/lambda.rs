//! Lambda's packages: a zip becomes a layer at /var/task, over a base that its user names or over nothing at all.

use crate::cli::{Failure, explain};
use image::zip::Zip;
use image::{BuildOptions, Digest, Executor, RunEnd, RunSpec, Store};
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pod annotation, and its value for what speaks Lambda's runtime API.
pub const INTERFACE: &str = "functions.atoll.dev/interface";
pub const LAMBDA: &str = "lambda";
/// Pods of one function, unless it says otherwise.
pub const MAX_SCALE: u32 = 10;
const BOOTSTRAP: &str = "bootstrap";
/// Bytes of the archive itself.
const ZIPPED: usize = 250 << 20;
/// Enough to tell versions apart by name; the store goes by the whole.
const SHORT: usize = 16;

pub struct Package<'a> {
    pub zip: &'a [u8],
    /// Name of the image, without its tag.
    pub repository: String,
    pub base: Option<&'a str>,
    pub handler: Option<&'a str>,
}

impl Package<'_> {
    /// Makes the image and answers with its name: the same package over the same base has the same.
    pub fn into_image(self, store: &Store) -> Result<String, Failure> {
        if self.zip.len() > ZIPPED {
            return Err(Failure(format!("a package has at most {ZIPPED} bytes")));
        }
        let zip = Zip::read(self.zip).map_err(Failure)?;
        let boots = zip.entries.iter().any(|entry| entry.name == BOOTSTRAP && !entry.is_dir);
        if !boots && self.base.is_none() {
            return Err(Failure(
                "there is no `bootstrap` in it; name a base image with a runtime in it: --base IMAGE --handler NAME"
                    .into(),
            ));
        }
        let containerfile = self.containerfile(boots)?;
        let mut mark = self.zip.to_vec();
        mark.extend_from_slice(containerfile.as_bytes());
        let tag: String = Digest::of(&mark).hex().chars().take(SHORT).collect();
        let name = format!("{}:{tag}", self.repository);
        let work = Work::new()?;
        unpack(&zip, &work.0)?;
        fs::write(work.0.join("Containerfile"), containerfile).map_err(explain)?;
        let options = BuildOptions {
            context: work.0.clone(),
            file: Some(work.0.join("Containerfile")),
            names: vec![name.clone()],
            epoch: Some(0),
            ..BuildOptions::default()
        };
        store.build(&options, &Nothing, &image::silent).map_err(explain)?;
        Ok(name)
    }

    fn containerfile(&self, boots: bool) -> Result<String, Failure> {
        let base = self.base.unwrap_or("scratch");
        let plain = |c: char| c.is_ascii_alphanumeric() || "./:_-@".contains(c);
        if base.is_empty() || !base.chars().all(plain) || base.starts_with('-') {
            return Err(Failure(format!("base {base:?}: not an image's name")));
        }
        let handler = self.handler.unwrap_or("handler");
        if handler.is_empty() || handler.len() > 128 || handler.contains(char::is_whitespace) {
            return Err(Failure(format!("handler {handler:?}: a name without spaces, such as app.handler, is needed")));
        }
        let words = |word: &str| serde_json::to_string(&[word]).map_err(explain);
        let mut text = format!("FROM {base}\nWORKDIR /var/task\nCOPY root/ /\n");
        if boots {
            text.push_str(&format!("ENTRYPOINT {}\n", words("/var/task/bootstrap")?));
        }
        text.push_str(&format!("CMD {}\n", words(handler)?));
        Ok(text)
    }
}

/// A directory of our own, gone with this.
struct Work(std::path::PathBuf);

impl Work {
    fn new() -> Result<Work, Failure> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("atoll-package-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        // Not there before: nobody else's.
        fs::create_dir(&path).map_err(|e| Failure(format!("{}: {e}", path.display())))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).map_err(explain)?;
        Ok(Work(path))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Below `work/root`, as the image's root sees it. Names are clean, and there are no links among them.
fn unpack(zip: &Zip, work: &Path) -> Result<(), Failure> {
    let at = |path: &Path| {
        let path = path.display().to_string();
        move |e: std::io::Error| Failure(format!("{path}: {e}"))
    };
    let task = work.join("root/var/task");
    fs::create_dir_all(&task).map_err(at(&task))?;
    let tmp = work.join("root/tmp");
    fs::create_dir_all(&tmp).map_err(at(&tmp))?;
    for dir in ["root", "root/var", "root/var/task"] {
        fs::set_permissions(work.join(dir), fs::Permissions::from_mode(0o755)).map_err(at(&task))?;
    }
    fs::set_permissions(&tmp, fs::Permissions::from_mode(0o1777)).map_err(at(&tmp))?;
    for entry in &zip.entries {
        let path = task.join(&entry.name);
        let parent = if entry.is_dir { path.as_path() } else { path.parent().unwrap_or(&task) };
        fs::create_dir_all(parent).map_err(at(parent))?;
        if entry.is_dir {
            continue;
        }
        let mut file = File::create_new(&path).map_err(at(&path))?;
        zip.copy(entry, &mut file).map_err(Failure)?;
        let mode = if entry.executable || entry.name == BOOTSTRAP { 0o755 } else { 0o644 };
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(at(&path))?;
    }
    Ok(())
}

/// Packages run nothing while they are built; a base that asks for it (ONBUILD) is refused.
struct Nothing;

impl Executor for Nothing {
    fn run(
        &self,
        _: &RunSpec,
        _: &mut dyn FnMut(&str),
        _: &mut dyn FnMut(&Path, u32) -> image::Result<()>,
    ) -> image::Result<RunEnd> {
        let why = "the base wants to run commands: build an image of it with `atoll image build`, and deploy that";
        Ok(RunEnd::Failed(why.into()))
    }

    fn cancelled(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine as _;

    /// Archives by Python's zipfile: an empty app.py, and a bootstrap in shell.
    const APP: &str = "UEsDBBQAAAAAAAAAIVwAAAAAAAAAAAAAAAAGAAAAYXBwLnB5UEsBAhQDFAAAAAAAAAAhXAAAAAAAAAAAAAAAAAYAAAAAAAAAAAAAAKSBAAAAAGFwcC5weVBLBQYAAAAAAQABADQAAAAkAAAAAAA=";
    const BOOT: &str = "UEsDBBQAAAAAAAAAIVyqeNEvCQAAAAkAAAAJAAAAYm9vdHN0cmFwIyEvYmluL3NoUEsBAhQDFAAAAAAAAAAhXKp40S8JAAAACQAAAAkAAAAAAAAAAAAAAO2BAAAAAGJvb3RzdHJhcFBLBQYAAAAAAQABADcAAAAwAAAAAAA=";

    #[test]
    fn packages_say_what_is_wrong_with_them() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let of = |zip: &[u8], base: Option<&str>, handler: Option<&str>| {
            let package = Package { zip, repository: "127.0.0.1:5000/f/n/a".into(), base, handler };
            package.into_image(&store)
        };
        let decoded = |text: &str| base64::engine::general_purpose::STANDARD.decode(text).unwrap();
        let empty = decoded(APP);
        let complaint = |base, handler| of(&empty, base, handler).unwrap_err().0;
        assert!(complaint(None, None).contains("--base IMAGE"));
        assert!(complaint(Some("a\nRUN evil"), None).contains("not an image's name"));
        assert!(complaint(Some("a:1"), Some("a b")).contains("without spaces"));
        assert!(of(b"x", None, None).unwrap_err().0.contains("not a zip"));
        let good = decoded(BOOT);
        let name = of(&good, None, None).unwrap();
        assert!(name.starts_with("127.0.0.1:5000/f/n/a:") && name == of(&good, None, None).unwrap());
    }
}
