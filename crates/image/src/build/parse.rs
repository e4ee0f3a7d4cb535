//! The Containerfile (Dockerfile) language: from text to stages of instructions. Variables are not replaced here.
//!
//! Reference: <https://docs.docker.com/reference/dockerfile/>.

use super::health::{self, Health};
use super::lines::{self, Heredoc, Logical};
use super::words;
use crate::error::{Error, Result};

/// Bytes of one Containerfile.
pub(crate) const TEXT_LIMIT: u64 = 4 << 20;
const STEPS: usize = 10_000;
const STAGES: usize = 500;

#[derive(Debug)]
pub(crate) struct Containerfile {
    pub escape: char,
    /// `ARG`s before the first `FROM`: for `FROM` lines only.
    pub args: Vec<(usize, Assignments)>,
    pub stages: Vec<Stage>,
}

/// Names with their values, if given.
type Assignments = Vec<(String, Option<String>)>;

#[derive(Debug)]
pub(crate) struct Stage {
    pub line: usize,
    /// As written: a former stage, `scratch`, or an image.
    pub base: String,
    pub name: Option<String>,
    pub platform: Option<String>,
    pub steps: Vec<Step>,
}

#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub line: usize,
    /// As written, on one line.
    pub text: String,
    pub instruction: Instruction,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Instruction {
    Run(Run),
    Copy(Transfer),
    Add(Transfer),
    Arg(Assignments),
    Env(Vec<(String, String)>),
    Label(Vec<(String, String)>),
    User(String),
    Workdir(String),
    Entrypoint(Command),
    Cmd(Command),
    Expose(String),
    Volume(Vec<String>),
    StopSignal(String),
    Shell(Vec<String>),
    Healthcheck(Health),
    OnBuild(String),
    Maintainer(String),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Command {
    Shell(String),
    Exec(Vec<String>),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Run {
    pub command: Command,
    /// The whole command is one heredoc: a script.
    pub script: Option<String>,
    /// Values of `--mount`.
    pub mounts: Vec<String>,
    pub network: Option<String>,
}

/// `COPY` and `ADD`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Transfer {
    pub sources: Vec<String>,
    pub heredocs: Vec<Heredoc>,
    pub destination: String,
    pub from: Option<String>,
    pub chown: Option<String>,
    pub chmod: Option<String>,
    pub exclude: Vec<String>,
    /// `COPY --parents`.
    pub parents: bool,
    /// `ADD --unpack`; without it local archives are unpacked and remote ones are not.
    pub unpack: Option<bool>,
    /// `ADD --checksum`: of a file its digest, of a repository its commit.
    pub checksum: Option<String>,
    /// `ADD --keep-git-dir`.
    pub keep_git_dir: bool,
}

pub(crate) fn at(file: &str, line: usize, why: impl Into<String>) -> Error {
    Error::Build { file: file.to_owned(), line, why: why.into() }
}

/// Parses. `file` is for errors.
pub(crate) fn parse(file: &str, text: &str) -> Result<Containerfile> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let (escape, logical) = lines::split(text).map_err(|(line, why)| at(file, line, why))?;
    let mut parsed = Containerfile { escape, args: Vec::new(), stages: Vec::new() };
    let mut count = 0;
    for line in logical {
        count += 1;
        let number = line.number;
        let failed = |why: String| at(file, number, why);
        if count > STEPS {
            return Err(failed(format!("more than {STEPS} instructions")));
        }
        if line.keyword == "FROM" {
            if parsed.stages.len() == STAGES {
                return Err(failed(format!("more than {STAGES} stages")));
            }
            let stage = from(&line, &parsed.stages).map_err(failed)?;
            parsed.stages.push(stage);
            continue;
        }
        let instruction = instruction(&line, escape).map_err(failed)?;
        match (parsed.stages.last_mut(), instruction) {
            (Some(stage), instruction) => {
                stage.steps.push(Step { line: number, text: line.shown(), instruction });
            }
            (None, Instruction::Arg(list)) => parsed.args.push((number, list)),
            (None, _) => {
                return Err(failed(format!("{} before the first FROM; only ARG may stand there", line.keyword)));
            }
        }
    }
    if parsed.stages.is_empty() {
        return Err(at(file, 1, "no FROM: it builds nothing"));
    }
    Ok(parsed)
}

/// One instruction of an image's `ONBUILD` list.
pub(crate) fn trigger(text: &str) -> std::result::Result<Instruction, String> {
    let (escape, mut logical) = lines::split(text).map_err(|(_, why)| why)?;
    let line = logical.pop().filter(|_| logical.is_empty()).ok_or("is not one instruction")?;
    match line.keyword.as_str() {
        "FROM" | "ONBUILD" | "MAINTAINER" => Err(format!("{} cannot be triggered", line.keyword)),
        _ => instruction(&line, escape),
    }
}

fn from(line: &Logical, before: &[Stage]) -> std::result::Result<Stage, String> {
    let (flags, rest) = flags(&line.rest)?;
    let mut platform = None;
    for (name, value) in flags {
        match name.as_str() {
            "platform" => platform = Some(value.ok_or("--platform needs a value")?),
            other => return Err(format!("FROM has no flag --{other}")),
        }
    }
    let words: Vec<&str> = rest.split_whitespace().collect();
    let (base, name) = match words.as_slice() {
        [base] => (*base, None),
        [base, r#as, name] if r#as.eq_ignore_ascii_case("as") => (*base, Some(name.to_ascii_lowercase())),
        _ => return Err("FROM takes an image, and perhaps AS and a name".into()),
    };
    if let Some(name) = &name {
        let first = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
        if !first || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b)) || name == "scratch" {
            return Err(format!("stage name {name:?}: a letter, then letters, digits, `_`, `.`, `-`"));
        }
        if let Some(twin) = before.iter().find(|s| s.name.as_ref() == Some(name)) {
            return Err(format!("stage {name:?} is there already, from line {}", twin.line));
        }
    }
    Ok(Stage { line: line.number, base: base.to_owned(), name, platform, steps: Vec::new() })
}

fn instruction(line: &Logical, escape: char) -> std::result::Result<Instruction, String> {
    let keyword = line.keyword.as_str();
    let needs = |text: &str, what: &str| match text.trim() {
        "" => Err(format!("{keyword} needs {what}")),
        text => Ok(text.to_owned()),
    };
    let rest = line.rest.as_str();
    Ok(match keyword {
        "RUN" => Instruction::Run(run(line)?),
        "COPY" => Instruction::Copy(transfer(line, escape)?),
        "ADD" => Instruction::Add(transfer(line, escape)?),
        "ARG" => Instruction::Arg(
            words::split(&needs(rest, "a name")?, escape)?
                .into_iter()
                .map(|word| match word.split_once('=') {
                    Some((name, value)) => Ok((variable(name)?, Some(value.to_owned()))),
                    None => Ok((variable(&word)?, None)),
                })
                .collect::<std::result::Result<_, String>>()?,
        ),
        "ENV" => Instruction::Env(pairs(&needs(rest, "NAME=value")?, escape)?),
        "LABEL" => Instruction::Label(pairs(&needs(rest, "NAME=value")?, escape)?),
        "USER" => Instruction::User(needs(rest, "a user")?),
        "WORKDIR" => Instruction::Workdir(needs(rest, "a directory")?),
        "ENTRYPOINT" => Instruction::Entrypoint(command(rest)),
        "CMD" => Instruction::Cmd(command(rest)),
        "EXPOSE" => Instruction::Expose(needs(rest, "a port")?),
        "VOLUME" => Instruction::Volume(match json(&needs(rest, "a path")?) {
            Some(list) => list,
            None => words::split(rest, escape)?,
        }),
        "STOPSIGNAL" => Instruction::StopSignal(needs(rest, "a signal")?),
        "SHELL" => match json(rest) {
            Some(list) if !list.is_empty() => Instruction::Shell(list),
            _ => return Err(r#"SHELL is written as a JSON list, such as SHELL ["/bin/sh", "-c"]"#.into()),
        },
        "HEALTHCHECK" => {
            let (flags, rest) = flags(rest)?;
            Instruction::Healthcheck(health::parse(flags, rest)?)
        }
        "ONBUILD" => {
            let text = needs(&line.whole_rest(), "an instruction")?;
            trigger(&text).map_err(|why| format!("ONBUILD: {why}"))?;
            Instruction::OnBuild(text)
        }
        "MAINTAINER" => Instruction::Maintainer(needs(rest, "a name")?),
        other => {
            let known = "FROM, RUN, COPY, ADD, ARG, ENV, LABEL, USER, WORKDIR, ENTRYPOINT, CMD, EXPOSE, VOLUME, \
                         STOPSIGNAL, SHELL, HEALTHCHECK, ONBUILD";
            return Err(format!("no instruction {other:?}; there are {known}"));
        }
    })
}

fn variable(name: &str) -> std::result::Result<String, String> {
    let name = name.trim();
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    if first && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return Ok(name.to_owned());
    }
    Err(format!("{name:?} is not a variable's name"))
}

/// `A=1 B="2 3"`, or the old form `A the rest`.
fn pairs(text: &str, escape: char) -> std::result::Result<Vec<(String, String)>, String> {
    let list = words::split(text, escape)?;
    if list.first().is_some_and(|w| !w.contains('=')) {
        let (name, value) = text.split_once(char::is_whitespace).ok_or(format!("{text:?}: write it as NAME=value"))?;
        return Ok(vec![(name.to_owned(), value.trim().to_owned())]);
    }
    list.iter()
        .map(|word| match word.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
            _ => Err(format!("{word:?}: write it as NAME=value; quote values with spaces")),
        })
        .collect()
}

fn json(text: &str) -> Option<Vec<String>> {
    let text = text.trim();
    if text.starts_with('[') { serde_json::from_str(text).ok() } else { None }
}

/// A JSON list of strings is the exec form; whatever else, a list that is not quite JSON too, goes to the shell.
fn command(text: &str) -> Command {
    json(text).map_or_else(|| Command::Shell(text.trim().to_owned()), Command::Exec)
}

fn run(line: &Logical) -> std::result::Result<Run, String> {
    let (flags, rest) = flags(&line.rest)?;
    let (mut mounts, mut network) = (Vec::new(), None);
    for (name, value) in flags {
        let value = value.ok_or(format!("--{name} needs a value"))?;
        match name.as_str() {
            "mount" => mounts.push(value),
            "network" => network = Some(value),
            "security" if value == "sandbox" => {}
            "security" => return Err(format!("--security={value}: every RUN is held in the sandbox")),
            other => return Err(format!("RUN has no flag --{other}")),
        }
    }
    let rest = rest.trim();
    if rest.is_empty() {
        return Err("RUN needs a command".into());
    }
    if let [only] = line.heredocs.as_slice()
        && lines::is_marker(rest)
    {
        return Ok(Run { command: Command::Shell(String::new()), script: Some(only.content.clone()), mounts, network });
    }
    let command = if line.heredocs.is_empty() {
        command(rest)
    } else {
        // The shell reads them itself.
        let bodies: String = line.heredocs.iter().map(|h| format!("{}{}\n", h.content, h.name)).collect();
        Command::Shell(format!("{rest}\n{bodies}"))
    };
    Ok(Run { command, script: None, mounts, network })
}

fn transfer(line: &Logical, escape: char) -> std::result::Result<Transfer, String> {
    let keyword = &line.keyword;
    let (flags, rest) = flags(&line.rest)?;
    let mut parsed = Transfer {
        sources: Vec::new(),
        heredocs: line.heredocs.clone(),
        destination: String::new(),
        from: None,
        chown: None,
        chmod: None,
        exclude: Vec::new(),
        parents: false,
        unpack: None,
        checksum: None,
        keep_git_dir: false,
    };
    for (name, given) in flags {
        let value = || given.clone().ok_or(format!("--{name} needs a value"));
        let switch = || match given.as_deref() {
            None | Some("true" | "1") => Ok(true),
            Some("false" | "0") => Ok(false),
            Some(other) => Err(format!("--{name}={other}: it is true or false")),
        };
        match name.as_str() {
            "from" if keyword == "COPY" => parsed.from = Some(value()?),
            "chown" => parsed.chown = Some(value()?),
            "chmod" => parsed.chmod = Some(value()?),
            "exclude" => parsed.exclude.push(value()?),
            // Every COPY makes a layer that depends on none below it.
            "link" => drop(switch()?),
            "parents" if keyword == "COPY" => parsed.parents = switch()?,
            "unpack" if keyword == "ADD" => parsed.unpack = Some(switch()?),
            "checksum" if keyword == "ADD" => parsed.checksum = Some(value()?),
            "keep-git-dir" if keyword == "ADD" => parsed.keep_git_dir = switch()?,
            other => return Err(format!("{keyword} has no flag --{other} here")),
        }
    }
    let mut list = match json(rest) {
        Some(list) => list,
        None => words::split(rest, escape)?,
    };
    parsed.destination = list.pop().ok_or(format!("{keyword} needs sources and a destination"))?;
    parsed.sources = list.into_iter().filter(|w| !lines::is_marker(w)).collect();
    if parsed.sources.is_empty() && parsed.heredocs.is_empty() {
        return Err(format!("{keyword} needs sources and a destination"));
    }
    if parsed.sources.len() + parsed.heredocs.len() > 1 && !parsed.destination.ends_with('/') {
        return Err(format!(
            "{keyword} of several sources needs a directory as destination; write {:?}",
            format!("{}/", parsed.destination)
        ));
    }
    Ok(parsed)
}

type Flags = Vec<(String, Option<String>)>;

/// `--name[=value]`s at the beginning, and what follows them.
fn flags(text: &str) -> std::result::Result<(Flags, &str), String> {
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    while let Some(after) = rest.strip_prefix("--") {
        let mut end = after.len();
        let mut quote = None;
        for (at, c) in after.char_indices() {
            match (quote, c) {
                (Some(q), c) if c == q => quote = None,
                (None, '"' | '\'') => quote = Some(c),
                (None, c) if c.is_whitespace() => {
                    end = at;
                    break;
                }
                _ => {}
            }
        }
        if quote.is_some() {
            return Err(format!("a quote in --{after} is not closed"));
        }
        let (flag, left) = after.split_at(end);
        rest = left.trim_start();
        if flag.is_empty() {
            break;
        }
        let flag: String = flag.chars().filter(|c| !matches!(c, '"' | '\'')).collect();
        found.push(match flag.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (flag, None),
        });
    }
    Ok((found, rest))
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
