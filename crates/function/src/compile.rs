//! From a component to machine code: the role `atoll function-compile`, and the daemon's cache of what it made.
//!
//! The role reads a component on its standard input and writes code on its standard output, jailed: a bug in the compiler
//! that a hostile component reaches gives its author a process that can do nothing.

use crate::error::{Error, Result, chain, io};
use crate::{engine, jail};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

/// Bytes of a component.
const COMPONENT_LIMIT: u64 = 256 << 20;
/// Code goes when it was not asked for so long; it can be made again.
const UNUSED: Duration = Duration::from_secs(30 * 24 * 3600);
const ABANDONED: Duration = Duration::from_secs(3600);
const COMPLAINT_LIMIT: u64 = 16 << 10;
const LIMITS: jail::Limits = jail::Limits {
    processes: Some(256),
    descriptors: Some(64),
    address_space: Some(16 << 30),
    cpu: Some(600),
    file: None,
};

/// Entry of `atoll function-compile UID MOUNT_POINT`.
pub fn main(args: &[String]) -> i32 {
    let [uid, mount_point] = args else {
        eprintln!("usage: atoll function-compile UID MOUNT_POINT <component >code (started by the node agent)");
        return 2;
    };
    let Ok(uid) = uid.parse::<u32>() else {
        eprintln!("{uid:?} is not a user id");
        return 2;
    };
    match run(uid, Path::new(mount_point)) {
        Ok(()) => 0,
        Err(Error::Component(why)) => {
            eprintln!("{why}");
            3
        }
        Err(error) => {
            eprintln!("{}", chain(&error));
            1
        }
    }
}

fn run(uid: u32, mount_point: &Path) -> Result<()> {
    jail::leave_the_host(mount_point)?;
    jail::drop_privilege(uid, &LIMITS)?;
    let mut component = Vec::new();
    std::io::stdin()
        .lock()
        .take(COMPONENT_LIMIT + 1)
        .read_to_end(&mut component)
        .map_err(io("read", "the component"))?;
    if component.len() as u64 > COMPONENT_LIMIT {
        return Err(Error::Component(format!("a component may have {COMPONENT_LIMIT} bytes, this one has more")));
    }
    let engine = engine::compiling().map_err(|e| Error::Start(format!("{e:#}")))?;
    let code = engine.precompile_component(&component).map_err(|e| Error::Component(format!("{e:#}")))?;
    std::io::stdout().lock().write_all(&code).map_err(io("write", "the code"))
}

/// Compiled code, by engine and component: `DIR/<engine>-<digest>.cwasm` and its digest in `.sha256` beside it.
pub struct Cache {
    exe: PathBuf,
    dir: PathBuf,
    uid: u32,
}

/// Code ready to be handed to a host.
#[derive(Debug)]
pub struct Code {
    pub file: File,
    /// Unique for the code.
    pub name: String,
}

impl Cache {
    /// `exe` is this program; `dir` will be root's alone; `uid` is who compiles.
    pub fn open(exe: PathBuf, dir: PathBuf, uid: u32) -> Result<Cache> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(io("create", &dir))?;
        fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).map_err(io("chmod", &dir))?;
        Ok(Cache { exe, dir, uid })
    }

    /// The code of a component, compiled if it is not here. `digest` is the component's, 64 hexadecimal digits.
    pub fn get(&self, component: &Path, digest: &str) -> Result<Code> {
        let digest = digest.strip_prefix("sha256:").unwrap_or(digest);
        if digest.len() != 64 || !digest.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(Error::Component(format!("{digest:?} is not a component's digest")));
        }
        let name = format!("{}-{digest}", key()?);
        if let Some(file) = self.look_up(&name)? {
            return Ok(Code { file, name });
        }
        // Two at once would both compile: wasteful, not wrong. One lock for all keeps memory in bounds, too.
        let lock = self.dir.join("lock");
        let lock_file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock)
            .map_err(io("open", &lock))?;
        rustix::fs::flock(&lock_file, rustix::fs::FlockOperation::LockExclusive).map_err(io("lock", &lock))?;
        if let Some(file) = self.look_up(&name)? {
            return Ok(Code { file, name });
        }
        self.evict();
        self.compile(component, &name)?;
        let made = self.look_up(&name)?;
        made.map(|file| Code { file, name }).ok_or_else(|| Error::Start("compiled code vanished".into()))
    }

    fn paths(&self, name: &str) -> (PathBuf, PathBuf) {
        (self.dir.join(format!("{name}.cwasm")), self.dir.join(format!("{name}.sha256")))
    }

    /// Opens code and checks it against the digest recorded when it was made. Damage means it is made again.
    fn look_up(&self, name: &str) -> Result<Option<File>> {
        let (code, record) = self.paths(name);
        let (Ok(mut file), Ok(recorded)) = (File::open(&code), fs::read_to_string(&record)) else { return Ok(None) };
        if hash(&mut file).map_err(io("read", &code))? != recorded.trim() {
            let _ = fs::remove_file(&record);
            return Ok(None);
        }
        // Its age is what decides when it goes.
        let _ = file.set_modified(SystemTime::now());
        Ok(Some(file))
    }

    /// Removes code that was not used for long, and what a crash left. Hosts that have it mapped keep it.
    fn evict(&self) {
        let Ok(entries) = fs::read_dir(&self.dir) else { return };
        for entry in entries.flatten() {
            let path = entry.path();
            let modified = entry.metadata().and_then(|m| m.modified());
            let age = modified.ok().and_then(|m| m.elapsed().ok()).unwrap_or_default();
            let code = path.extension().is_some_and(|e| e == "cwasm");
            if code && age > UNUSED {
                let _ = fs::remove_file(path.with_extension("sha256"));
                let _ = fs::remove_file(&path);
            } else if entry.file_name().to_string_lossy().starts_with("tmp-") && age > ABANDONED {
                let _ = fs::remove_file(&path);
            }
        }
    }

    fn compile(&self, component: &Path, name: &str) -> Result<()> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let n = COUNTER.fetch_add(1, Ordering::Relaxed);
        let temporary = self.dir.join(format!("tmp-{}-{n}", std::process::id()));
        let result = self.compile_into(component, name, &temporary);
        let _ = fs::remove_file(&temporary);
        result
    }

    fn compile_into(&self, component: &Path, name: &str, temporary: &Path) -> Result<()> {
        let input = File::open(component).map_err(io("open", component))?;
        let output = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(temporary)
            .map_err(io("create", temporary))?;
        let mut child = Command::new(&self.exe)
            .arg("function-compile")
            .arg(self.uid.to_string())
            .arg(&self.dir)
            .env_clear()
            .stdin(input)
            .stdout(output.try_clone().map_err(io("clone", temporary))?)
            .stderr(Stdio::piped())
            .spawn()
            .map_err(io("run", &self.exe))?;
        let mut complaint = String::new();
        if let Some(stderr) = child.stderr.take() {
            let mut bytes = Vec::new();
            let _ = stderr.take(COMPLAINT_LIMIT).read_to_end(&mut bytes);
            complaint = String::from_utf8_lossy(&bytes).trim().to_owned();
        }
        let status = child.wait().map_err(io("wait for", &self.exe))?;
        match status.code() {
            Some(0) => {}
            Some(3) => return Err(Error::Component(format!("the component does not compile: {complaint}"))),
            // A signal: it ran out of what it may use, or the compiler broke. Either way the component's doing.
            None => {
                return Err(Error::Component(format!("compiling the component was ended ({status}); it is too large")));
            }
            Some(_) => return Err(Error::Start(format!("compiler: {complaint}"))),
        }
        output.sync_all().map_err(io("sync", temporary))?;
        let mut reader = output;
        let digest = hash(&mut reader).map_err(io("read", temporary))?;
        let (code, record) = self.paths(name);
        // Code first: a record without its code, or with older code, is found out when it is looked up.
        fs::rename(temporary, &code).map_err(io("rename", &code))?;
        fs::write(temporary, format!("{digest}\n")).map_err(io("write", temporary))?;
        File::open(temporary).and_then(|f| f.sync_all()).map_err(io("sync", temporary))?;
        fs::rename(temporary, &record).map_err(io("rename", &record))?;
        File::open(&self.dir).and_then(|f| f.sync_all()).map_err(io("sync", &self.dir))
    }
}

/// Engines are the same for the life of the program.
fn key() -> Result<&'static str> {
    static KEY: OnceLock<std::result::Result<String, String>> = OnceLock::new();
    let made = KEY.get_or_init(|| engine::compiling().map(|e| engine::key(&e)).map_err(|e| format!("{e:#}")));
    made.as_deref().map_err(|why| Error::Start(why.clone()))
}

fn hash(file: &mut File) -> std::io::Result<String> {
    file.seek(SeekFrom::Start(0))?;
    let mut hasher = Sha256::new();
    std::io::copy(file, &mut hasher)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect())
}
