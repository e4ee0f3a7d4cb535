//! Keys by which a pod's Lambda runtime knows the daemon's own requests: one for each function, derived from one secret.

use crate::error::{Result, io};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

const SECRET: usize = 32;
const BLOCK: usize = 64;

/// The secret behind all keys, kept in `DATA/functions`.
pub struct Keys([u8; SECRET]);

impl Keys {
    /// Reads it, or makes it the first time.
    pub fn open(data_dir: &Path) -> Result<Keys> {
        let dir = data_dir.join("functions");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(io("create", &dir))?;
        let path = dir.join("invoke.key");
        if !path.exists() {
            make(&dir, &path)?;
        }
        let mut secret = [0; SECRET];
        File::open(&path).and_then(|mut file| file.read_exact(&mut secret)).map_err(io("read", &path))?;
        Ok(Keys(secret))
    }

    /// The key of a namespace's function, in hexadecimal.
    pub fn of(&self, namespace: &str, function: &str) -> String {
        // Neither name has a slash in it.
        let tag = hmac(&self.0, format!("{namespace}/{function}").as_bytes());
        tag.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Whoever comes first wins: others read what that one wrote.
fn make(dir: &Path, path: &Path) -> Result<()> {
    let mut secret = [0; SECRET];
    let random = Path::new("/dev/urandom");
    File::open(random).and_then(|mut file| file.read_exact(&mut secret)).map_err(io("read", random))?;
    let draft = dir.join(format!("invoke.key.{}", std::process::id()));
    let written = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&draft)
        .and_then(|mut file| file.write_all(&secret).and_then(|()| file.sync_all()));
    written.map_err(io("write", &draft))?;
    let linked = match fs::hard_link(&draft, path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(io("create", path)(error)),
        _ => Ok(()),
    };
    fs::remove_file(&draft).map_err(io("remove", &draft))?;
    linked
}

/// RFC 2104 with SHA-256; the key is no longer than a block.
fn hmac(key: &[u8; SECRET], message: &[u8]) -> [u8; 32] {
    let pad = |with: u8| {
        let mut block = [with; BLOCK];
        block.iter_mut().zip(key).for_each(|(byte, key)| *byte ^= key);
        block
    };
    let inner = Sha256::new().chain_update(pad(0x36)).chain_update(message).finalize();
    Sha256::new().chain_update(pad(0x5c)).chain_update(inner).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_functions_of_their_names_and_stay() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::open(dir.path()).unwrap();
        let again = Keys::open(dir.path()).unwrap();
        assert_eq!(keys.of("a", "b"), again.of("a", "b"));
        assert_ne!(keys.of("a", "b"), keys.of("a", "c"));
        assert_eq!(keys.of("a", "b").len(), 64);
        let other = tempfile::tempdir().unwrap();
        assert_ne!(Keys::open(other.path()).unwrap().of("a", "b"), keys.of("a", "b"));
    }

    /// RFC 4231, test case 1, its key filled up with zeros as HMAC does itself.
    #[test]
    fn hmac_is_rfc_4231s() {
        let mut key = [0; SECRET];
        key[..20].fill(0x0b);
        let tag: String = hmac(&key, b"Hi There").iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(tag, "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
    }
}
