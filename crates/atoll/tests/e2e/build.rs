//! Images built from Containerfiles in the real sandbox, and what the sandbox withstands.

use crate::cluster::{Cluster, Said};
use crate::{Outcome, Test};
use std::fs;
use std::path::PathBuf;

pub const TESTS: &[Test] = &[
    ("build_an_image_and_run_it", build_and_run),
    ("build_sandbox_holds", sandbox_holds),
    ("build_mounts_secrets_and_cache", mounts),
    ("build_memory_is_bounded", memory),
    ("build_reaches_the_callers_ssh_agent", agent),
    ("build_killed_leaves_nothing", killed),
];

struct Bench<'a> {
    cluster: &'a Cluster,
    context: PathBuf,
}

impl Bench<'_> {
    fn new<'a>(cluster: &'a Cluster, name: &str) -> Bench<'a> {
        let context = cluster.scratch(&format!("context-{name}"));
        fs::create_dir_all(&context).unwrap();
        Bench { cluster, context }
    }

    fn file(&self, name: &str, content: &str) {
        fs::write(self.context.join(name), content).unwrap();
    }

    fn build(&self, tag: &str, containerfile: &str, more: &[&str]) -> Said {
        self.file("Containerfile", &format!("FROM 127.0.0.1:5000/test/busybox:1\n{containerfile}"));
        let data = self.cluster.data().to_string_lossy().into_owned();
        let context = self.context.to_string_lossy().into_owned();
        let args = [&["image", "build", "--data-dir", &data, "-t", tag], more, &[&context]].concat();
        self.cluster.atoll(&args)
    }

    /// What a pod of the image says.
    fn says(&self, name: &str, image: &str) -> String {
        let ns = self.cluster.namespace(&format!("t-{name}"));
        self.cluster.apply(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: {ns}}}\nspec:\n  restartPolicy: Never\n  \
             containers:\n  - name: main\n    image: 127.0.0.1:5000/{image}\n"
        ));
        self.cluster
            .kubectl(&["wait", "-n", &ns, "pod/p", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s"])
            .good();
        self.cluster.kubectl(&["logs", "-n", &ns, "p"]).good()
    }

    fn nothing_is_left(&self) {
        let left = |dir: &str, prefix: &str| -> Vec<String> {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            entries.filter_map(|e| e.file_name().into_string().ok()).filter(|n| n.starts_with(prefix)).collect()
        };
        assert_eq!(left("/dev/shm", "atoll-build"), [""; 0]);
        assert_eq!(left(&run_dir(self.cluster).to_string_lossy(), "build-"), [""; 0]);
        let tmp = self.cluster.data().join("images/tmp");
        assert_eq!(fs::read_dir(tmp).unwrap().count(), 0);
    }
}

/// Of this instance: other ones on this machine may be building.
pub fn run_dir(c: &Cluster) -> PathBuf {
    use sha2::Digest;
    let real = c.data().canonicalize().unwrap();
    let hash = sha2::Sha256::digest(real.as_os_str().as_encoded_bytes());
    let id: String = hash.iter().take(4).map(|b| format!("{b:02x}")).collect();
    PathBuf::from("/run/atoll").join(id)
}

fn build_and_run(c: &Cluster) -> Outcome {
    let b = Bench::new(c, "run");
    b.file("hello.sh", "#!/bin/sh\ncat /greeting; id -u; stat -c '%u:%g %a %n' /greeting /srv/data\n");
    let text = "ARG WHO=nobody\nENV GREETING=hello\nWORKDIR /srv\nCOPY --chmod=755 hello.sh /bin/hello\n\
        RUN echo \"$GREETING $WHO from $(id -u) in $(pwd)\" > /greeting && mkdir data && chown 1000:1000 data && chmod 750 data\n\
        USER web\nENTRYPOINT [\"/bin/hello\"]\n";
    let said = b.build("built/hello:1", text, &["--build-arg", "WHO=world"]);
    assert!(said.ok, "{}", said.err);
    assert_eq!(
        b.says("built", "built/hello:1"),
        "hello world from 0 in /srv\n1000\n0:0 644 /greeting\n1000:1000 750 /srv/data\n"
    );
    let again = b.build("built/hello:1", text, &["--build-arg", "WHO=world"]);
    assert!(again.err.contains("(cached)"), "{}", again.err);
    assert_eq!(said.out, again.out, "built again it is the same image");
    let failed = b.build("built/bad:1", "RUN echo about to fail; exit 7\n", &[]).bad();
    assert!(failed.contains("Containerfile:2: RUN") && failed.contains("exit code 7"), "{failed}");
    assert!(failed.contains("about to fail"), "{failed}");
    let missing = b.build("built/bad:1", "RUN [\"/no/such\"]\n", &[]).bad();
    assert!(missing.contains("/no/such"), "{missing}");
    b.nothing_is_left();
    Outcome::Passed
}

/// Each line is tried in a `RUN` and must fail there.
fn sandbox_holds(c: &Cluster) -> Outcome {
    let b = Bench::new(c, "holds");
    let attacks = [
        "mount -t tmpfs t /tmp",
        "mknod /tmp/sda b 8 0 && cat /tmp/sda",
        "echo 1 > /proc/sys/kernel/panic",
        "echo x > /proc/sysrq-trigger",
        "mkdir /sys/fs/cgroup/x",
        "dmesg -n 1",
        "chroot /proc/1/root ls /data",
        "hostname other",
        "wget -T 2 -O - http://127.0.0.1:5000/v2/",
        "unshare -r true && mount -t proc p /proc",
    ];
    let script: String = attacks
        .iter()
        .map(|a| format!("if ( {a} ) >/dev/null 2>&1; then echo \"succeeded: {a}\" >> /held; fi\n"))
        .collect();
    let text = format!(
        "RUN <<'EOF'\n{script}id -u >> /held; cat /proc/self/uid_map >> /held\nEOF\nCMD [\"cat\", \"/held\"]\n"
    );
    let said = b.build("built/held:1", &text, &[]);
    assert!(said.ok, "{}", said.err);
    let held = b.says("held", "built/held:1");
    assert!(!held.contains("succeeded"), "{held}");
    let map: Vec<&str> = held.lines().last().unwrap().split_whitespace().collect();
    assert_eq!(map, ["0", "4294836224", "65536"]);
    Outcome::Passed
}

fn mounts(c: &Cluster) -> Outcome {
    let b = Bench::new(c, "mounts");
    b.file("list", "from the context");
    b.file("key", "t0p-s3cret");
    let key = format!("id=key,src={}", b.context.join("key").display());
    b.file(".dockerignore", "key\n");
    let text = "RUN --mount=target=/list,source=list cat /list > /seen\n\
        RUN --mount=type=cache,target=/cache,uid=1000 echo x >> /cache/log && wc -l < /cache/log >> /seen && stat -c %u /cache >> /seen\n\
        RUN --mount=type=secret,id=key,mode=0440 sha256sum < /run/secrets/key > /sum && stat -c '%a %u' /run/secrets/key >> /seen\n\
        RUN --mount=type=tmpfs,target=/scratch,size=64k dd if=/dev/zero of=/scratch/x bs=1k count=100 2>/dev/null; ls -d /list /cache /run /scratch >> /seen 2>&1; true\n\
        CMD [\"cat\", \"/seen\"]\n";
    let said = b.build("built/mounts:1", text, &["--secret", &key]);
    assert!(said.ok, "{}", said.err);
    let seen = b.says("mounts", "built/mounts:1");
    assert!(seen.starts_with("from the context1\n1000\n440 0\n"), "{seen}");
    assert!(!seen.lines().any(|l| l == "/list" || l == "/cache"), "stubs of mounts are no part of the image: {seen}");
    let found = std::process::Command::new("grep").args(["-rl", "t0p-s3cret"]).arg(c.data()).output().unwrap();
    assert!(found.stdout.is_empty(), "{}", String::from_utf8_lossy(&found.stdout));
    b.nothing_is_left();
    Outcome::Passed
}

/// A build that is killed leaves a sandbox; the next build takes it away. One that is interrupted leaves none.
fn killed(c: &Cluster) -> Outcome {
    use rustix::process::{Pid, Signal, kill_process};
    let b = Bench::new(c, "killed");
    b.file("Containerfile", "FROM 127.0.0.1:5000/test/busybox:1\nRUN echo begun && sleep 1000000\n");
    for signal in [Signal::INT, Signal::KILL] {
        let log = c.scratch("killed.log");
        let mut child = c
            .inside(env!("CARGO_BIN_EXE_atoll"))
            .args(["image", "build", "-t", "built/never:1", "--data-dir"])
            .arg(c.data())
            .arg(&b.context)
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        c.until("the command runs", || fs::read_to_string(&log).unwrap_or_default().contains("] begun"));
        kill_process(Pid::from_child(&child), signal).unwrap();
        assert!(!child.wait().unwrap().success());
        if signal == Signal::INT {
            b.nothing_is_left();
        }
    }
    let said = b.build("built/next:1", "RUN true\n", &[]);
    assert!(said.ok, "{}", said.err);
    let left =
        fs::read_dir(run_dir(c)).unwrap().flatten().filter(|e| e.file_name().to_string_lossy().starts_with("build-"));
    assert_eq!(left.count(), 0);
    Outcome::Passed
}

fn memory(c: &Cluster) -> Outcome {
    let b = Bench::new(c, "memory");
    let text = "RUN dd if=/dev/zero of=/dev/null bs=64M count=1 2>/dev/null && echo fits > /seen\n";
    b.build("built/memory:1", text, &["--no-cache"]).good();
    let why = b.build("built/memory:2", text, &["--no-cache", "--memory", "24Mi"]).bad();
    assert!(why.contains("Containerfile:2"), "{why}");
    assert!(b.build("built/memory:2", text, &["--memory", "1Mi"]).bad().contains("--memory"));
    b.nothing_is_left();
    Outcome::Passed
}

/// The agent checks who asks: a user of the sandbox must come through, and only to use keys.
fn agent(c: &Cluster) -> Outcome {
    let ssh_add = std::path::Path::new("/usr/bin/ssh-add");
    if !ssh_add.exists() || !std::path::Path::new("/usr/bin/ssh-keygen").exists() {
        return Outcome::Skipped("openssh-client is not here".into());
    }
    let b = Bench::new(c, "agent");
    // The program and what it is linked with.
    let linked = std::process::Command::new("ldd").arg(ssh_add).output().unwrap();
    let linked = String::from_utf8(linked.stdout).unwrap();
    for path in linked.split_whitespace().filter(|w| w.starts_with('/')).chain(["/usr/bin/ssh-add"]) {
        let to = b.context.join("root").join(&path[1..]);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(path, to).unwrap();
    }
    let (socket, key) = (b.context.join("agent"), b.context.join("key"));
    let mut agent = std::process::Command::new("ssh-agent")
        .arg("-D")
        .arg("-a")
        .arg(&socket)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    while !socket.exists() {
        assert!(agent.try_wait().unwrap().is_none(), "ssh-agent ended");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let run = |program: &str, args: &[&str]| {
        let out = std::process::Command::new(program).args(args).env("SSH_AUTH_SOCK", &socket).output().unwrap();
        assert!(out.status.success(), "{program}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let key = key.to_string_lossy();
    run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-C", "build", "-f", &key]);
    run("ssh-add", &["-q", &key]);
    b.file(".dockerignore", "key*\nagent\n");
    let text = "COPY root/ /\n\
        RUN echo 'web:x:1000:1000::/:/bin/sh' > /etc/passwd\nUSER web\n\
        RUN --mount=type=ssh,uid=1000,required /usr/bin/ssh-add -l > /tmp/seen; if /usr/bin/ssh-add -D; then exit 1; fi\n\
        CMD [\"cat\", \"/tmp/seen\"]\n";
    let text = format!("RUN mkdir -p /tmp && chmod 1777 /tmp\n{text}");
    let said = b.build("built/agent:1", &text, &["--ssh", &format!("default={}", socket.display())]);
    let listed = run("ssh-add", &["-l"]);
    agent.kill().unwrap();
    agent.wait().unwrap();
    said.good();
    assert!(listed.contains("build"), "a build emptied the agent: {listed}");
    assert_eq!(b.says("agent", "built/agent:1").trim(), listed.trim());
    assert!(
        b.build("built/agent:1", &text, &["--ssh", "default=/nothing", "--no-cache"])
            .bad()
            .contains("no agent answers")
    );
    b.nothing_is_left();
    Outcome::Passed
}
