//! `atoll kernel`: what pods with a machine of their own boot.

use crate::cli::{DataDir, Failure, Outcome, explain};
use crate::output::{self, Format};
use clap::{Args, Subcommand};
use image::jailed::Roles;
use image::kernels::{Kernel as Stored, Kernels};
use serde_json::json;
use std::path::PathBuf;

#[derive(Subcommand)]
pub enum Kernel {
    /// Take a kernel and its modules from a Debian package, or from files; the first becomes the default
    #[command(
        after_help = "Examples:\n  apt-get download linux-image-6.1.0-40-cloud-amd64\n  atoll kernel add --from-deb linux-image-6.1.0-40-cloud-amd64_*.deb\n  atoll kernel add --name mine bzImage virtio_blk.ko erofs.ko overlay.ko"
    )]
    Add(Add),
    /// List kernels
    Ls {
        #[command(flatten)]
        data: DataDir,
        #[arg(short, long, default_value = "table")]
        output: Format,
    },
    /// Choose the kernel that pods started from now on boot
    Default {
        #[command(flatten)]
        data: DataDir,
        name: String,
    },
    /// Remove kernels; what runs goes on
    Rm {
        #[command(flatten)]
        data: DataDir,
        #[arg(required = true)]
        names: Vec<String>,
    },
}

#[derive(Args)]
pub struct Add {
    #[command(flatten)]
    data: DataDir,
    /// The kernel's name here; its version if left out
    #[arg(long)]
    name: Option<String>,
    /// A Debian package linux-image-*, as apt-get download gets it
    #[arg(long, value_name = "FILE", conflicts_with = "files", required_unless_present = "files")]
    from_deb: Option<PathBuf>,
    /// A kernel (bzImage or ELF) and its modules (.ko, compressed or not)
    files: Vec<PathBuf>,
}

fn open(data: &DataDir) -> Kernels {
    Kernels::new(&data.data_dir, Some(Roles { exe: "/proc/self/exe".into() }))
}

fn failed(error: image::Error) -> Failure {
    explain(error)
}

pub fn run(command: Kernel) -> Outcome {
    match command {
        Kernel::Add(add) => {
            let kernels = open(&add.data);
            let added = match &add.from_deb {
                Some(package) => kernels.add_deb(add.name.as_deref(), package),
                None => kernels.add_files(add.name.as_deref(), &add.files),
            };
            let kernel = added.map_err(failed)?;
            println!("{}{}", kernel.name, if kernel.default { " (default)" } else { "" });
            Ok(())
        }
        Kernel::Ls { data, output } => {
            list(&open(&data).list().map_err(failed)?, output);
            Ok(())
        }
        Kernel::Default { data, name } => open(&data).set_default(&name).map_err(failed),
        Kernel::Rm { data, names } => names.iter().try_for_each(|name| open(&data).remove(name).map_err(failed)),
    }
}

fn list(kernels: &[Stored], format: Format) {
    if format != Format::Table {
        let row = |k: &Stored| json!({"name": k.name, "default": k.default, "bytes": k.bytes, "modules": k.modules});
        return output::value(format, &kernels.iter().map(row).collect());
    }
    let mebibytes = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let row = |k: &Stored| {
        let default = if k.default { "yes" } else { "" };
        vec![k.name.clone(), default.to_owned(), mebibytes(k.bytes), k.modules.len().to_string()]
    };
    output::table(&["NAME", "DEFAULT", "SIZE", "MODULES"], &kernels.iter().map(row).collect::<Vec<_>>());
}
