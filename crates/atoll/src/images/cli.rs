//! What `atoll image` takes.

use crate::cli::DataDir;
use crate::output::Format;
use clap::{Args, Subcommand, ValueEnum};
use std::path::PathBuf;

#[derive(Subcommand)]
pub enum Image {
    /// Build an image from a Containerfile (Dockerfile)
    #[command(
        after_help = "Examples:\n  atoll image build -t shop/web:1 .\n  atoll image build -t app -f Dockerfile.prod --target release --build-arg V=2 --secret id=key,src=key.pem ."
    )]
    Build(Build),
    /// Take a file into the store: docker-archive, OCI layout, rootfs tar, .wasm component, raw or qcow2 disk
    #[command(
        after_help = "Examples:\n  atoll image import app.tar\n  atoll image import rootfs.tar --tag shop/web:1 --cmd /srv/web --env PORT=8000\n  atoll image import disk.qcow2 --tag debian:12"
    )]
    Import(Import),
    /// List images
    Ls {
        #[command(flatten)]
        data: DataDir,
        #[arg(short, long, default_value = "table")]
        output: Format,
    },
    /// Remove images by name; what nothing else uses is freed
    Rm {
        #[command(flatten)]
        data: DataDir,
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Give an image another name
    #[command(after_help = "Example:\n  atoll image tag shop/web:1 registry.example.com/shop/web:1")]
    Tag {
        #[command(flatten)]
        data: DataDir,
        image: String,
        name: String,
    },
    /// Show an image's digest, platform, configuration and layers
    Inspect {
        #[command(flatten)]
        data: DataDir,
        name: String,
        #[arg(short, long, default_value = "json")]
        output: Format,
    },
    /// Write an image to a file as an OCI layout tar
    #[command(
        visible_alias = "save",
        after_help = "Example:\n  atoll image export shop/web:1 web.tar && skopeo inspect oci-archive:web.tar"
    )]
    Export {
        #[command(flatten)]
        data: DataDir,
        name: String,
        file: PathBuf,
    },
    /// Fetch an image from a registry
    #[command(after_help = "Example:\n  atoll image pull registry.example.com/team/app:2")]
    Pull {
        #[command(flatten)]
        data: DataDir,
        reference: String,
        /// Platform to choose from a multi-platform image
        #[arg(long, value_name = "OS/ARCH")]
        platform: Option<String>,
        #[command(flatten)]
        registry: Registry,
    },
}

/// How registries are spoken to.
#[derive(Args, Clone, Default)]
pub struct Registry {
    /// Credentials as docker and podman keep them; default: ~/.docker/config.json
    #[arg(long, value_name = "FILE")]
    pub authfile: Option<PathBuf>,
    /// A registry to speak to without TLS; loopback needs no mention; may be repeated
    #[arg(long, value_name = "HOST[:PORT]")]
    pub insecure: Vec<String>,
    /// PEM certificates trusted besides the system's
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
}

#[derive(Args)]
pub struct Build {
    #[command(flatten)]
    pub data: DataDir,
    /// Name to give it; may be repeated
    #[arg(short, long, required = true, value_name = "NAME[:TAG]")]
    pub tag: Vec<String>,
    /// Containerfile; default: Containerfile or Dockerfile in the context; - for standard input
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Value for an ARG; without a value, the environment's; may be repeated
    #[arg(long, value_name = "NAME[=VALUE]")]
    pub build_arg: Vec<String>,
    /// Stage to build; default: the last
    #[arg(long, value_name = "STAGE")]
    pub target: Option<String>,
    /// For RUN --mount=type=secret: id=NAME,src=FILE or id=NAME,env=VARIABLE; may be repeated
    #[arg(long, value_name = "SECRET")]
    pub secret: Vec<String>,
    /// Do every step anew
    #[arg(long)]
    pub no_cache: bool,
    /// Platform of the image and of those it is built on
    #[arg(long, value_name = "OS/ARCH")]
    pub platform: Option<String>,
    /// What RUN reaches
    #[arg(long, value_enum, default_value = "none")]
    pub network: BuildNetwork,
    #[command(flatten)]
    pub registry: Registry,
    /// Directory that COPY and ADD take files from
    pub context: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BuildNetwork {
    /// Nothing
    None,
    /// What this machine reaches
    Host,
}

#[derive(Args)]
pub struct Import {
    #[command(flatten)]
    pub data: DataDir,
    pub file: PathBuf,
    /// Name to give it; needed where the file carries none
    #[arg(long, value_name = "NAME[:TAG]")]
    pub tag: Option<String>,
    /// Default arguments; once for each (rootfs tar only)
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub cmd: Vec<String>,
    /// Entry point; once for each word (rootfs tar only)
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub entrypoint: Vec<String>,
    /// Environment, NAME=VALUE (rootfs tar only)
    #[arg(long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// User or uid[:gid] to run as (rootfs tar only)
    #[arg(long)]
    pub user: Option<String>,
    /// Working directory (rootfs tar only)
    #[arg(long, value_name = "DIR")]
    pub workdir: Option<String>,
}
