//! `atoll function new`: a project in one of four languages, built by that language's own tools into `function.wasm`.

use crate::cli::{Failure, Outcome};
use clap::ValueEnum;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Language {
    Js,
    Python,
    Rust,
    C,
}

type Files = &'static [(&'static str, &'static str)];

macro_rules! template {
    ($path:literal) => {
        include_str!(concat!("templates/", $path))
    };
}

const WIT: Files = &[
    ("wit/world.wit", template!("wit/world.wit")),
    ("wit/deps/io.wit", template!("wit/io.wit")),
    ("wit/deps/http.wit", template!("wit/http.wit")),
];

impl Language {
    fn files(self) -> Vec<(&'static str, &'static str)> {
        let own: Files = match self {
            Language::Js => &[
                ("app.js", template!("js/app.js")),
                ("build.js", template!("js/build.js")),
                ("build.sh", template!("js/build.sh")),
                ("left-out.cjs", template!("js/left-out.cjs")),
                ("package.json", template!("js/package.json")),
                ("wit/world.wit", template!("js/world.wit")),
                (".gitignore", template!("js/gitignore")),
            ],
            Language::Python => &[
                ("app.py", template!("python/app.py")),
                ("outbound.py", template!("python/outbound.py")),
                ("build.sh", template!("python/build.sh")),
                (".gitignore", template!("python/gitignore")),
            ],
            Language::Rust => &[
                ("src/lib.rs", template!("rust/lib.rs")),
                ("Cargo.toml", template!("rust/Cargo.toml")),
                ("build.sh", template!("rust/build.sh")),
                (".gitignore", template!("rust/gitignore")),
            ],
            Language::C => &[
                ("handler.c", template!("c/handler.c")),
                ("wasi_http.h", template!("c/wasi_http.h")),
                ("component.mjs", template!("c/component.mjs")),
                ("package.json", template!("c/package.json")),
                ("build.sh", template!("c/build.sh")),
                (".gitignore", template!("c/gitignore")),
            ],
        };
        match self {
            Language::Python | Language::C => own.iter().chain(WIT).copied().collect(),
            Language::Js | Language::Rust => own.to_vec(),
        }
    }
}

/// Makes the directory; one that holds anything is left alone.
pub fn write(directory: &Path, language: Language) -> Outcome {
    let failed = |what: &Path| {
        let what = what.display().to_string();
        move |error: std::io::Error| Failure(format!("{what}: {error}"))
    };
    if fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Failure(format!("{}: it is not empty; name a new directory", directory.display())));
    }
    for (name, content) in language.files() {
        let path = directory.join(name);
        let parent = path.parent().unwrap_or(directory);
        fs::create_dir_all(parent).map_err(failed(parent))?;
        fs::write(&path, content).map_err(failed(&path))?;
        if name.ends_with(".sh") {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).map_err(failed(&path))?;
        }
    }
    let shown = directory.display();
    println!("{shown}: build it with {shown}/build.sh, serve it with: atoll function deploy NAME {shown}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_project_is_whole_and_overwrites_nothing() {
        for language in Language::value_variants() {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("project");
            write(&path, *language).unwrap();
            assert!(path.join("build.sh").metadata().unwrap().permissions().mode() & 0o111 != 0);
            assert!(path.join(".gitignore").exists());
            assert!(write(&path, *language).unwrap_err().0.contains("not empty"));
        }
    }
}
