//! The command line of other engines: `atoll oci`, or the binary called `atoll-oci`, takes runc's commands and flags,
//! so that podman, containerd and docker can use it. No process of its own stays behind: a container is its processes,
//! its control group and a directory with what it was made from.
//!
//! ```text
//! (create) -> creating -> created -> (start) -> running -> stopped -> (delete)
//!                                                 ^  '-> (pause) paused (resume) -'
//! ```

mod args;
mod create;
mod describe;
mod events;
mod exec;
mod foreground;
mod lifecycle;
mod notices;
mod record;
mod run;
mod seal;
mod update;
mod validate;

use crate::error::{Error, Result};
use args::Args;
use notices::Notices;
use std::io::{self, Write};
use std::path::PathBuf;

/// The name under which the binary plays this role by itself.
pub const NAME: &str = "atoll-oci";

const VALUES: &[&str] = &["root", "log", "log-format", "criu", "rootless"];
const SWITCHES: &[&str] = &["systemd-cgroup", "debug", "help", "h", "version", "v"];

const HELP: &str =
    "usage: atoll oci [--root DIR] [--log FILE] [--log-format text|json] [--systemd-cgroup] [--debug] COMMAND

COMMANDS
  create   [--bundle DIR] [--console-socket S] [--pid-file F] [--no-pivot] [--no-new-keyring] [--preserve-fds N] ID
  run      the same, and [--detach] [--keep] ID
  start    ID
  exec     [--process F] [--tty] [--detach] [--user U[:G]] [--cwd D] [--env E] [--cap C] [--pid-file F]
           [--console-socket S] [--preserve-fds N] [--ignore-paused] ID [COMMAND ARG...]
  state    ID
  kill     [--all] ID [SIGNAL]
  delete   [--force] ID
  list     [--format table|json] [--quiet]
  ps       [--format table|json] ID [ps options]
  pause    ID
  resume   ID
  update   [--resources F] [--memory N] [--cpu-quota N] [--pids-limit N] ... ID
  events   [--stats] [--interval DURATION] ID
  features
  spec     [--bundle DIR] [--rootless]

Takes runc's commands and flags: podman --runtime /path/to/atoll-oci, a link to this binary.
";

/// What every command knows.
struct Context {
    root: PathBuf,
    notices: Notices,
    systemd_cgroup: bool,
}

/// The role `oci` of the binary. `args` are those after the role's name.
pub fn main(args: &[String]) -> i32 {
    let (globals, rest) = match Args::parse(args, VALUES, SWITCHES) {
        Ok(parsed) => parsed,
        Err(e) => {
            Notices::default().error(&e.to_string());
            return 1;
        }
    };
    if globals.has("version") || globals.has("v") {
        return print(&format!(
            "atoll-oci version {}\nspec: {}\n",
            env!("CARGO_PKG_VERSION"),
            crate::hooks::OCI_VERSION
        ));
    }
    let Some((command, rest)) = rest.split_first().filter(|_| !globals.has("help") && !globals.has("h")) else {
        return print(HELP);
    };
    let notices = match Notices::open(globals.get("log"), globals.get("log-format")) {
        Ok(notices) => notices,
        Err(e) => {
            Notices::default().error(&e.to_string());
            return 1;
        }
    };
    let root = globals.get("root").map_or_else(record::default_root, PathBuf::from);
    let context = Context { root, notices, systemd_cgroup: globals.has("systemd-cgroup") };
    match dispatch(&context, command, rest) {
        Ok(code) => code,
        Err(e) => {
            context.notices.error(&e.to_string());
            // As runc: the exit codes of processes end at 254.
            if command == "exec" { 255 } else { 1 }
        }
    }
}

fn dispatch(context: &Context, command: &str, args: &[String]) -> Result<i32> {
    if matches!(command, "create" | "run" | "exec") {
        seal::executable()?;
    }
    match command {
        "create" => create::create(context, args),
        "run" => create::run(context, args),
        "start" => lifecycle::start(context, args),
        "exec" => exec::exec(context, args),
        "state" => lifecycle::state(context, args),
        "kill" => lifecycle::kill(context, args),
        "delete" => lifecycle::delete(context, args),
        "list" => lifecycle::list(context, args),
        "ps" => lifecycle::ps(context, args),
        "pause" => lifecycle::pause(context, args),
        "resume" => lifecycle::resume(context, args),
        "update" => update::update(context, args),
        "events" => events::events(context, args),
        "features" => describe::features(),
        "spec" => describe::spec(args),
        "help" => Ok(print(HELP)),
        other => Err(Error::Refused(format!("{other:?}: no such command; atoll oci help lists them"))),
    }
}

/// Standard output may be gone: that is nobody's error.
fn print(text: &str) -> i32 {
    let _ = io::stdout().write_all(text.as_bytes());
    0
}
