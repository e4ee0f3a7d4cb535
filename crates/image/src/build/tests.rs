use super::*;
use crate::import::ImportOptions;
use crate::resolve::Kind;
use crate::store::silent;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::Command;
use std::sync::atomic::AtomicUsize;

/// Runs in a plain overlay and chroot: what a `RUN` leaves is real, what holds it is not tested here.
#[derive(Default)]
struct Chroot {
    runs: AtomicUsize,
    cancelled: AtomicBool,
}

impl Executor for Chroot {
    fn run(
        &self,
        run: &RunSpec,
        output: &mut dyn FnMut(&str),
        finished: &mut dyn FnMut(&Path, u32) -> Result<()>,
    ) -> Result<RunEnd> {
        self.runs.fetch_add(1, Ordering::Relaxed);
        let at = |name: &str| run.work.join(name);
        for name in ["upper", "work", "root", "empty"] {
            fs::create_dir(at(name)).unwrap();
        }
        let lower: Vec<String> = run.layers.iter().rev().map(|l| l.display().to_string()).collect();
        let lower = if lower.is_empty() { at("empty").display().to_string() } else { lower.join(":") };
        let mut script = format!(
            "set -e; mount -t overlay o -o lowerdir={lower},upperdir={},workdir={} {root}; mkdir -p {root}{}\n",
            at("upper").display(),
            at("work").display(),
            run.cwd,
            root = at("root").display()
        );
        for (n, mount) in run.mounts.iter().enumerate() {
            let target = format!("{}{}", at("root").display(), mount.target.display());
            script += &format!("mkdir -p $(dirname {target})\n");
            script += &match &mount.source {
                MountSource::Path(path) if path.is_dir() => {
                    format!("mkdir -p {target}; mount --bind {} {target}\n", path.display())
                }
                MountSource::Path(path) => format!("touch {target}; mount --bind {} {target}\n", path.display()),
                MountSource::Tmpfs { .. } => format!("mkdir -p {target}; mount -t tmpfs t {target}\n"),
                MountSource::File { content, mode, .. } => {
                    let file = at(&format!("file{n}"));
                    fs::write(&file, content).unwrap();
                    fs::set_permissions(&file, fs::Permissions::from_mode(*mode)).unwrap();
                    format!("touch {target}; mount --bind {} {target}\n", file.display())
                }
            };
        }
        script += &format!(
            "cd {root}{}; exec chroot {root} /bin/busybox env -i \"$@\"",
            run.cwd,
            root = at("root").display()
        );
        let enter = ["/bin/busybox", "sh", "-c", r#"cd "$0" && exec "$@""#, &run.cwd].map(str::to_owned);
        let result = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", &script, "sh"])
            .args(&run.env)
            .args(enter)
            .args(&run.args)
            .output()
            .unwrap();
        for line in String::from_utf8_lossy(&[result.stdout, result.stderr].concat()).lines() {
            output(line);
        }
        if !result.status.success() {
            return Ok(RunEnd::Failed(format!("{}", result.status)));
        }
        finished(&at("upper"), 0)?;
        Ok(RunEnd::Succeeded)
    }

    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

struct Bench {
    dir: tempfile::TempDir,
    store: Store,
    executor: Chroot,
    said: Mutex<Vec<String>>,
}

/// A store with `base:1`, busybox; `None` where it cannot be.
fn bench() -> Option<Bench> {
    if !rustix::process::geteuid().is_root() || !Path::new("/bin/busybox").exists() {
        println!("SKIPPED: building needs root and busybox-static");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    for name in ["bin", "etc", "tmp", "usr/lib"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    symlink("usr/lib", root.join("lib")).unwrap();
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in ["sh", "ls", "cat", "mkdir", "rm", "ln", "id", "chmod", "echo", "touch", "mv", "test"] {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nweb:x:1000:1001::/:/bin/sh\n").unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nweb:x:1001:\nextra:x:77:web\n").unwrap();
    fs::write(root.join("etc/motd"), "old").unwrap();
    let tar = dir.path().join("base.tar");
    assert!(Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&tar).arg(".").status().unwrap().success());
    let store = Store::open(dir.path().join("images")).unwrap();
    let options = ImportOptions { tag: Some("base:1".into()), cmd: vec!["sh".into()], ..Default::default() };
    store.import(&tar, &options, &silent).unwrap();
    fs::create_dir(dir.path().join("context")).unwrap();
    Some(Bench { dir, store, executor: Chroot::default(), said: Mutex::default() })
}

impl Bench {
    fn context(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join("context").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    fn file(&self, name: &str, content: &str) {
        fs::write(self.context(name), content).unwrap();
    }

    fn options(&self, containerfile: &str) -> BuildOptions {
        let file = self.dir.path().join("Containerfile");
        fs::write(&file, containerfile).unwrap();
        BuildOptions {
            context: self.dir.path().join("context"),
            file: Some(file),
            names: vec!["app:1".into()],
            ..BuildOptions::default()
        }
    }

    fn build_with(&self, options: &BuildOptions) -> Result<Digest> {
        lock(&self.said).clear();
        let progress = |p: Progress| {
            if let Progress::Step(text) = p {
                lock(&self.said).push(text);
            }
        };
        let result = self.store.build(options, &self.executor, &progress).map(|b| b.digest);
        assert_eq!(fs::read_dir(self.store.root().join("tmp")).unwrap().count(), 0, "something was left");
        result
    }

    #[track_caller]
    fn build(&self, containerfile: &str) -> Digest {
        self.build_with(&self.options(containerfile)).unwrap_or_else(|e| panic!("{}", e.chain()))
    }

    #[track_caller]
    fn refusal(&self, containerfile: &str) -> String {
        self.build_with(&self.options(containerfile)).unwrap_err().chain()
    }

    fn image(&self) -> (ImageConfig, Vec<PathBuf>) {
        match self.store.resolve("app:1").unwrap().kind {
            Kind::Container { config, layers } => (*config, layers),
            other => panic!("{other:?}"),
        }
    }

    fn view(&self) -> View {
        View::open(&self.image().1).unwrap()
    }

    #[track_caller]
    fn text(&self, path: &str) -> String {
        self.view().text(path, 1 << 20).unwrap_or_else(|| panic!("no {path}"))
    }

    fn stat(&self, path: &str) -> Option<rustix::fs::Stat> {
        self.view().node(Path::new(path)).map(|n| n.stat)
    }

    fn runs(&self) -> usize {
        self.executor.runs.load(Ordering::Relaxed)
    }

    fn said(&self) -> String {
        lock(&self.said).join("\n")
    }
}

#[test]
fn stages_copy_and_run() {
    let Some(b) = bench() else { return };
    b.file("src/main.c", "int main");
    b.file("src/sub/x", "x");
    b.file("run.sh", "#!/bin/sh\n");
    b.build(
        r#"ARG TAG=1
FROM base:$TAG AS build
ARG WHO=you
ENV GREETING="hello ${WHO}" UNUSED=1
WORKDIR /work
COPY src/ ./src/
RUN mkdir out && echo "$GREETING $WHO" > out/app && rm /etc/motd && ln out/app out/linked
FROM base:1
COPY --from=build --chown=web:77 --chmod=750 /work/out/app /srv/app
COPY --from=0 /work /copied
COPY run.sh /usr/local/bin/
USER web
EXPOSE 80 9000-9001/udp
LABEL a=b "c d"='e f'
VOLUME ["/data"]
STOPSIGNAL SIGINT
HEALTHCHECK --interval=5s CMD true
ENTRYPOINT ["/srv/app"]
CMD arg $HOME
"#,
    );
    let (config, layers) = b.image();
    assert_eq!(layers.len(), 4, "the base's and three of its own");
    assert_eq!(b.text("srv/app"), "hello you you\n");
    let app = b.stat("srv/app").unwrap();
    assert_eq!((app.st_uid, app.st_gid, app.st_mode & 0o7777), (1000, 77, 0o750));
    assert_eq!(b.stat("usr/local/bin/run.sh").unwrap().st_uid, 0);
    assert_eq!(b.text("copied/src/sub/x"), "x");
    let (one, two) = (b.stat("copied/out/app").unwrap(), b.stat("copied/out/linked").unwrap());
    assert_eq!(one.st_size, two.st_size);
    assert_eq!(b.text("etc/motd"), "old", "the other stage removed its own");
    assert_eq!(b.stat("tmp").unwrap().st_mode & 0o7777, 0o1777);
    let run = &config.config;
    assert_eq!(run.entrypoint, ["/srv/app"]);
    assert_eq!(run.cmd, ["/bin/sh", "-c", "arg $HOME"]);
    assert_eq!(run.exposed_ports.keys().collect::<Vec<_>>(), ["80/tcp", "9000/udp", "9001/udp"]);
    assert_eq!((run.labels["a"].as_str(), run.labels["c d"].as_str()), ("b", "e f"));
    assert_eq!((run.user.as_str(), run.stop_signal.as_str()), ("web", "SIGINT"));
    assert!(run.healthcheck.is_some() && run.volumes.contains_key("/data"));
    assert!(run.env.iter().all(|e| !e.starts_with("GREETING")));
    assert_eq!(config.history.iter().filter(|h| !h.empty_layer).count(), layers.len());
}

#[test]
fn run_leaves_what_it_changed_and_no_more() {
    let Some(b) = bench() else { return };
    b.build(
        "FROM base:1\nRUN rm /etc/motd && mkdir -m 700 /new && echo 1 > /new/a && ln /new/a /new/b && ln -s a /new/c\n\
         RUN rm -r /usr/lib && mkdir /usr/lib && touch /usr/lib/z\nRUN true\n",
    );
    let (_, layers) = b.image();
    assert_eq!(layers.len(), 3, "what changes nothing makes no layer");
    let first = crate::build::view::Tree::open(&layers[1]).unwrap();
    let names = |path: &str| first.names(Path::new(path)).unwrap();
    assert_eq!(names(""), ["etc", "new"], "no stubs of mounts, no unchanged directories");
    assert_eq!(names("etc"), ["motd"], "a whiteout");
    let new = b.stat("new/a").unwrap();
    assert_eq!((new.st_nlink, b.stat("new").unwrap().st_mode & 0o777), (2, 0o700));
    assert!(b.stat("etc/motd").is_none());
    assert!(b.view().names(Path::new("usr/lib")).unwrap() == ["z"]);
}

#[test]
fn what_was_done_is_not_done_again() {
    let Some(b) = bench() else { return };
    b.file("a", "1");
    b.file("b", "1");
    let text = "FROM base:1\nCOPY a /a\nRUN cat /a > /c\nCOPY b /b\nRUN cat /c > /d\n";
    let first = b.build(text);
    assert_eq!(b.runs(), 2);
    assert_eq!(b.build(text), first, "built again it is the same image");
    assert_eq!(b.runs(), 2);
    assert!(b.said().contains("(cached)"));
    // A comment, a label, another name of the stage: nothing that a command could see.
    b.build(&format!("# hi\n{}LABEL x=y\n", text.replace("base:1", "base:1 AS x")));
    assert_eq!(b.runs(), 2);
    // Times are no content.
    fs::write(b.context("a"), "1").unwrap();
    b.build(text);
    assert_eq!(b.runs(), 2);
    b.file("b", "2");
    b.build(text);
    assert_eq!((b.runs(), b.text("b")), (3, "2".into()));
    b.file("a", "2");
    b.build(text);
    assert_eq!((b.runs(), b.text("d")), (5, "2".into()));
    let again = BuildOptions { no_cache: true, ..b.options(text) };
    b.build_with(&again).unwrap();
    assert_eq!(b.runs(), 7);
}

#[test]
fn the_same_input_gives_the_same_image_anywhere() {
    let digest = || {
        let b = bench()?;
        b.file("a", "1");
        let text = "FROM scratch\nCOPY a /x/\nCOPY <<EOF /y\nhello\nEOF\nENV A=1\n";
        let options = BuildOptions { epoch: Some(1_000_000_000), ..b.options(text) };
        let digest = b.build_with(&options).unwrap();
        assert_eq!(b.stat("x/a").unwrap().st_mtime, 1_000_000_000);
        assert_eq!(b.image().0.created.as_deref(), Some("2001-09-09T01:46:40Z"));
        Some(digest)
    };
    assert_eq!(digest(), digest());
}

#[test]
fn ignore_files_wildcards_and_links() {
    let Some(b) = bench() else { return };
    for name in ["a.txt", "b.txt", "c.log", "keep.log", "node_modules/x", "d/e/deep.txt"] {
        b.file(name, name);
    }
    b.file(".dockerignore", "*.log\n!keep.log\nnode_modules\n");
    symlink("../../../../etc/passwd", b.context("out")).unwrap();
    symlink("d", b.context("alias")).unwrap();
    b.build(
        "FROM base:1\nCOPY . /all/\nCOPY *.txt alias/e/deep.t?t /some/\nCOPY d /lib/\nCOPY --exclude=e* d /part/\n",
    );
    assert_eq!(
        b.view().names(Path::new("all")).unwrap(),
        [".dockerignore", "a.txt", "alias", "b.txt", "d", "keep.log", "out"]
    );
    assert_eq!(b.view().names(Path::new("some")).unwrap(), ["a.txt", "b.txt", "deep.txt"]);
    assert_eq!(b.text("usr/lib/e/deep.txt"), "d/e/deep.txt", "the image's own link is followed");
    assert!(b.stat("part/e").is_none());
    // A link that leads out of the context leads to the context's own root.
    assert!(b.refusal("FROM base:1\nCOPY out /x\n").contains("Containerfile:2: out: no such file"));
    assert!(b.refusal("FROM base:1\nCOPY c.log /x\n").contains(".dockerignore"));
    assert!(b.refusal("FROM base:1\nCOPY a.txt b.txt /etc/motd/\n").contains("no directory"));
    assert!(b.refusal("FROM base:1\nCOPY *.txt /x\n").contains("several sources"));
}

#[test]
fn add_unpacks_archives() {
    let Some(b) = bench() else { return };
    b.file("in/f", "content");
    fs::hard_link(b.context("in/f"), b.context("in/g")).unwrap();
    for (flag, name) in [("-cf", "plain.tar"), ("-czf", "zipped.tgz")] {
        let tar = Command::new("tar").arg("-C").arg(b.context("in")).arg(flag).arg(b.context(name)).arg(".").status();
        assert!(tar.unwrap().success());
    }
    b.build("FROM base:1\nADD plain.tar /one/\nADD zipped.tgz /two\nADD in/f /three/\nCOPY plain.tar /four/\n");
    assert_eq!(
        (b.text("one/f"), b.text("two/g"), b.text("three/f")),
        ("content".into(), "content".into(), "content".into())
    );
    assert!(b.stat("four/plain.tar").is_some());
    let mut evil = crate::tar::header(b"../../evil", b'0', 0, 0o644, b"").unwrap().to_vec();
    evil.extend([0u8; 1024]);
    fs::write(b.context("evil.tar"), evil).unwrap();
    assert!(b.refusal("FROM base:1\nADD evil.tar /x/\n").contains("climbs out"));
}

#[test]
fn mounts_and_secrets() {
    let Some(b) = bench() else { return };
    b.file("go.sum", "sum");
    fs::write(b.dir.path().join("key"), "s3cret").unwrap();
    let text = "FROM base:1 AS tools\nRUN echo tool > /tool\nFROM base:1\n\
        RUN --mount=type=bind,source=go.sum,target=/deps/go.sum --mount=from=tools,source=/tool,target=/t cat /deps/go.sum /t > /seen\n\
        RUN --mount=type=cache,target=/cache echo x >> /cache/log && cat /cache/log > /count\n\
        RUN --mount=type=tmpfs,target=/scratch touch /scratch/gone\n\
        RUN --mount=type=secret,id=key,required --mount=type=secret,id=key,env=KEY test \"$KEY\" = \"$(cat /run/secrets/key)\"\n";
    let secrets = vec![Secret::parse(&format!("id=key,src={}", b.dir.path().join("key").display())).unwrap()];
    let options = BuildOptions { secrets, ..b.options(text) };
    b.build_with(&options).unwrap();
    assert_eq!((b.text("seen"), b.text("count")), ("sumtool\n".into(), "x\n".into()));
    for stub in ["deps", "t", "cache", "scratch", "run"] {
        assert!(b.stat(stub).is_none(), "{stub}");
    }
    b.build_with(&BuildOptions { no_cache: true, ..options.clone() }).unwrap();
    assert_eq!(b.text("count"), "x\nx\n", "the cache stays from build to build");
    let said = Command::new("grep").args(["-r", "-l", "s3cret"]).arg(b.store.root()).output().unwrap();
    assert!(said.stdout.is_empty(), "{}", String::from_utf8_lossy(&said.stdout));
    let refused = b.refusal("FROM base:1\nRUN --mount=type=secret,id=key,required true\n");
    assert!(refused.contains("Containerfile:2: secret \"key\" is required"), "{refused}");
}

#[test]
fn triggers_scripts_and_users() {
    let Some(b) = bench() else { return };
    b.file("x", "x");
    let base =
        BuildOptions { names: vec!["onbuild:1".into()], ..b.options("FROM base:1\nONBUILD COPY x /triggered\n") };
    b.build_with(&base).unwrap();
    b.build(
        "FROM onbuild:1\nRUN <<EOF\nset -e\necho one > /s\necho $((1<<2)) >> /s\nEOF\nUSER web\nRUN id > /tmp/id\n",
    );
    assert_eq!((b.text("triggered"), b.text("s")), ("x".into(), "one\n4\n".into()));
    assert!(b.image().0.config.on_build.is_empty());
    assert!(b.refusal("FROM base:1\nUSER nobody-here\n").contains("Containerfile:2: user \"nobody-here\""));
}

#[test]
fn what_fails_says_where_and_leaves_nothing() {
    let Some(b) = bench() else { return };
    let said = b.refusal("FROM base:1\n\nRUN echo before && \\\n  echo wrong >&2 && false\n");
    assert!(said.contains("Containerfile:3: RUN /bin/sh -c echo before") && said.contains("wrong"), "{said}");
    assert!(b.store.resolve("app:1").is_err());
    assert!(b.refusal("FROM nowhere.invalid/x:1\n").contains("Containerfile:1: "));
    assert!(b.refusal("FROM base:1\nRUN --network=host true\n").contains("--network host"));
    let target = BuildOptions { target: Some("nope".into()), ..b.options("FROM base:1 AS a\n") };
    assert!(b.build_with(&target).unwrap_err().to_string().contains("there are: a"));
    // One stage's failure ends those that wait for it and those that do not.
    let text =
        "FROM base:1 AS a\nRUN false\nFROM base:1 AS b\nCOPY --from=a /etc/motd /x\nFROM base:1\nCOPY --from=b /x /x\n";
    assert!(b.refusal(text).contains("Containerfile:2: "));
    b.executor.cancelled.store(true, Ordering::Relaxed);
    assert!(b.refusal("FROM base:1\nRUN true\n").contains("stopped"));
}

#[test]
fn stages_that_are_not_needed_are_not_built() {
    let Some(b) = bench() else { return };
    b.build("FROM base:1 AS a\nRUN false\nFROM base:1 AS b\nRUN touch /b\nFROM b\nRUN touch /c\n");
    assert_eq!(b.runs(), 2);
    let stat = b.stat("c").unwrap();
    assert_eq!(stat.st_uid, fs::metadata("/").unwrap().uid());
}

#[path = "remote_tests.rs"]
mod remote;
