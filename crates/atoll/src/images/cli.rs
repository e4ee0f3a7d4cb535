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
    /// Take a file into the store: docker-archive, OCI layout, rootfs tar, .wasm component, disk, OVA
    #[command(
        after_help = "Examples:\n  atoll image import app.tar\n  atoll image import rootfs.tar --tag shop/web:1 --cmd /srv/web --env PORT=8000\n  atoll image import disk.qcow2 --tag debian:12\n  atoll image import db.ova --tag db:1 --manifest db.yaml"
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
    /// Send an image to a registry; what is there already is not sent again
    #[command(
        after_help = "Examples:\n  atoll image push registry.example.com/team/app:2\n  atoll image push shop/web:1 registry.example.com/team/web:1"
    )]
    Push {
        #[command(flatten)]
        data: DataDir,
        image: String,
        /// Name to push it as; default: its own
        target: Option<String>,
        #[command(flatten)]
        registry: Registry,
    },
    /// Free what no image, pod or recent build needs
    #[command(
        visible_alias = "gc",
        after_help = "Example:\n  atoll image prune --build-cache-size 5Gi --build-cache-age 7d"
    )]
    Prune(Prune),
}

#[derive(Args)]
pub struct Prune {
    #[command(flatten)]
    pub data: DataDir,
    /// Blobs and layers that nothing names stay this long: a push sends them before the manifest
    #[arg(long, default_value = "1h", value_name = "DURATION")]
    pub grace: String,
    /// Manifests without a tag stay this long
    #[arg(long, default_value = "14d", value_name = "DURATION")]
    pub untagged: String,
    #[command(flatten)]
    pub budget: Budget,
    #[arg(short, long, default_value = "table")]
    pub output: Format,
}

/// What images and build cache may take.
#[derive(Args, Clone)]
pub struct Budget {
    /// Build steps and cache directories unused for so long go
    #[arg(long, default_value = "14d", value_name = "DURATION")]
    pub build_cache_age: String,
    /// What the build cache alone keeps alive may take so much; the longest unused goes first
    #[arg(long, default_value = "20Gi", value_name = "SIZE")]
    pub build_cache_size: String,
    /// Images pulled and not used by a pod or command for so long go; without it they stay
    #[arg(long, value_name = "DURATION")]
    pub image_age: Option<String>,
    /// Blobs of images may take so much: pulled images that no pod uses go, the longest unused first
    #[arg(long, value_name = "SIZE")]
    pub image_size: Option<String>,
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
    /// Ask this registry before another: HOST=MIRROR[/PREFIX]; may be repeated
    #[arg(long, value_name = "HOST=MIRROR")]
    pub mirror: Vec<String>,
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
    /// For RUN --mount=type=ssh: default (the agent of SSH_AUTH_SOCK), or NAME=SOCKET; may be repeated
    #[arg(long, value_name = "NAME[=SOCKET]")]
    pub ssh: Vec<String>,
    /// What one RUN may use of memory, such as 4Gi; without it there is no bound
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
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
    /// Where to write the machine that an OVA describes, as a VirtualMachine; - is standard output
    #[arg(long, value_name = "FILE")]
    pub manifest: Option<PathBuf>,
}
