//! `--systemd-cgroup` against a real systemd: the manager of a PID, mount, control group and network namespace of this
//! test's own, where version 2 is all there is. It sees this machine's files read-only.

use super::support::{Bundle, eventually, executable, text};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

pub const TESTS: &[(&str, fn())] = &[
    ("systemd::a_container_is_a_scope", a_container_is_a_scope),
    ("systemd::limits_hold_in_systemd_too", limits_hold_in_systemd_too),
    ("systemd::what_is_no_scope_is_refused", what_is_no_scope_is_refused),
    ("systemd::nothing_stays_of_a_failed_start", nothing_stays_of_a_failed_start),
    ("systemd::without_systemd_it_says_so", without_systemd_it_says_so),
];

const SYSTEMD: &str = "/usr/lib/systemd/systemd";

const START: &str = r#"
mount --make-rprivate / && mount -o remount,bind,ro / &&
mount -t proc proc /proc && mount -t cgroup2 none /sys/fs/cgroup && mount -t tmpfs tmpfs /run &&
mount -t tmpfs tmpfs /etc/systemd/system && mount --bind "$1" "$1" && mount -o remount,bind,rw "$1" &&
printf '[Unit]\nDefaultDependencies=no\n' > /etc/systemd/system/test.target &&
exec env -i container=test PATH=/usr/bin:/bin "$0" --system --unit=test.target --show-status=0 --log-target=null
"#;

/// Ends with the test; so do all that it started.
struct Systemd {
    starter: Child,
    pid: String,
    cgroup: PathBuf,
}

impl Systemd {
    fn start() -> Option<Self> {
        let tree = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .into_iter()
            .map(Path::new)
            .find(|tree| tree.join("cgroup.controllers").exists());
        let (Some(tree), true) = (tree, Path::new(SYSTEMD).exists()) else {
            println!("SKIPPED: no {SYSTEMD}, or no version 2 control groups");
            return None;
        };
        let cgroup = tree.join(format!("atoll-oci-systemd-{}-{}", std::process::id(), super::support::number()));
        fs::create_dir(&cgroup).expect("made");
        let script = r#"echo 0 > "$0/cgroup.procs" && exec "$@""#;
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(&cgroup);
        command.args(["unshare", "--mount", "--pid", "--cgroup", "--uts", "--ipc", "--net", "--fork", "--kill-child"]);
        command.args(["sh", "-c", START, SYSTEMD]).arg(super::support::base()).stdin(Stdio::null());
        let starter = command.spawn().expect("unshare");
        let first = cgroup.join("init.scope/cgroup.procs");
        let pid = eventually("systemd is there", || {
            let pid = fs::read_to_string(&first).ok()?.lines().next()?.to_owned();
            Path::new(&format!("/proc/{pid}/root/run/systemd/private")).exists().then_some(pid)
        });
        Some(Self { starter, pid, cgroup })
    }

    fn inside(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--pid", "--cgroup", "--uts", "--ipc", "--net", "--target", &self.pid, "--"]);
        command.arg(program).stdin(Stdio::null());
        command
    }

    fn command(&self, bundle: &Bundle, args: &[&str]) -> Command {
        bundle.save();
        let mut command = self.inside("env");
        command.arg("-C").arg(&bundle.path).arg(executable()).arg("oci");
        command.arg("--root").arg(super::support::base().join("state")).arg("--systemd-cgroup").args(args);
        command
    }

    fn oci(&self, bundle: &Bundle, args: &[&str]) -> Output {
        self.command(bundle, args).output().expect("nsenter")
    }

    /// What leaves a process behind, which keeps standard output open.
    #[track_caller]
    fn leaves(&self, bundle: &Bundle, args: &[&str]) {
        let status = self.command(bundle, args).stdout(Stdio::null()).status();
        assert!(status.expect("nsenter").success(), "{args:?}");
    }

    #[track_caller]
    fn good(&self, bundle: &Bundle, args: &[&str]) -> String {
        let output = self.oci(bundle, args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    fn show(&self, unit: &str, property: &str) -> String {
        let output = self.inside("systemctl").args(["show", "--value", "--property", property, unit]).output();
        text(&output.expect("systemctl").stdout).trim().to_owned()
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        let _ = self.starter.kill();
        let _ = self.starter.wait();
        eventually("its groups are gone", || {
            let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
            remove(&self.cgroup).ok()
        });
    }
}

fn remove(directory: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)?.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(directory)
}

fn scoped(script: &str) -> (Bundle, String) {
    let bundle = Bundle::with(script, |_| {});
    let unit = format!("p-{}.scope", bundle.id);
    let path = json!(format!("some-thing.slice:p:{}", bundle.id));
    let mut bundle = bundle;
    bundle.config["linux"]["cgroupsPath"] = path;
    (bundle, unit)
}

fn a_container_is_a_scope() {
    let Some(systemd) = Systemd::start() else { return };
    let (bundle, unit) = scoped("cat /proc/self/cgroup; exec sleep 1000");
    systemd.leaves(&bundle, &["create", &bundle.id]);
    assert_eq!(systemd.show(&unit, "ActiveState"), "active");
    assert_eq!(systemd.show(&unit, "Slice"), "some-thing.slice");
    assert_eq!(systemd.show(&unit, "Delegate"), "yes");
    let group = format!("/some.slice/some-thing.slice/{unit}");
    assert_eq!(systemd.show(&unit, "ControlGroup"), group);
    let processes = || fs::read_to_string(format!("{}{group}/cgroup.procs", systemd.cgroup.display()));
    // The container's own process, and not the one that held the scope open.
    assert_eq!(processes().expect("the group").lines().count(), 1);
    systemd.good(&bundle, &["start", &bundle.id]);
    let out = systemd.good(&bundle, &["exec", &bundle.id, "sh", "-c", "cat /proc/self/cgroup"]);
    assert!(out.lines().any(|line| line == "0::/"), "a control group namespace of its own: {out}");
    systemd.good(&bundle, &["pause", &bundle.id]);
    assert!(systemd.good(&bundle, &["state", &bundle.id]).contains("paused"));
    systemd.good(&bundle, &["resume", &bundle.id]);
    systemd.good(&bundle, &["delete", "--force", &bundle.id]);
    assert_eq!(systemd.show(&unit, "LoadState"), "not-found");
    assert!(processes().is_err());
    // The same name again, in front this time.
    let (mut again, _) = scoped("echo here");
    again.config["linux"]["cgroupsPath"] = bundle.config["linux"]["cgroupsPath"].clone();
    assert_eq!(systemd.good(&again, &["run", &again.id]), "here\n");
    assert_eq!(systemd.show(&unit, "LoadState"), "not-found");
}

fn limits_hold_in_systemd_too() {
    let Some(systemd) = Systemd::start() else { return };
    let (mut bundle, unit) = scoped("exec sleep 1000");
    bundle.config["linux"]["resources"] = json!({"memory": {"limit": 64 << 20, "swap": 96 << 20},
        "cpu": {"shares": 1024, "quota": 50_000, "period": 100_000}, "pids": {"limit": 77}});
    systemd.leaves(&bundle, &["run", "--detach", &bundle.id]);
    let shown = |property: &str| systemd.show(&unit, property);
    assert_eq!(shown("MemoryMax"), (64 << 20).to_string());
    assert_eq!(shown("MemorySwapMax"), (32 << 20).to_string());
    assert_eq!(shown("CPUWeight"), "39");
    assert_eq!(shown("CPUQuotaPerSecUSec"), "500ms");
    assert_eq!(shown("TasksMax"), "77");
    // Where the test's own tree has no controllers, systemd alone knows.
    let _ = systemd.oci(&bundle, &["update", "--pids-limit", "55", "--memory", "128m", &bundle.id]);
    assert_eq!((shown("TasksMax"), shown("MemoryMax")), ("55".into(), (128 << 20).to_string()));
    systemd.good(&bundle, &["kill", &bundle.id, "KILL"]);
    eventually("it has ended", || systemd.good(&bundle, &["state", &bundle.id]).contains("stopped").then_some(()));
    systemd.good(&bundle, &["delete", &bundle.id]);
    assert_eq!(shown("LoadState"), "not-found");
}

fn what_is_no_scope_is_refused() {
    let Some(systemd) = Systemd::start() else { return };
    for path in ["/plain/path", "a:b", "noslice:p:n", "a.slice:p:n/../m", "a.slice:p:n.slice"] {
        let mut bundle = Bundle::new("true");
        bundle.config["linux"]["cgroupsPath"] = json!(path);
        let output = systemd.oci(&bundle, &["run", &bundle.id]);
        let said = text(&output.stderr);
        assert!(!output.status.success() && said.contains("linux.cgroupsPath"), "{path}: {said}");
        assert!(bundle.bad(&["state", &bundle.id]).contains("does not exist"));
    }
}

fn nothing_stays_of_a_failed_start() {
    let Some(systemd) = Systemd::start() else { return };
    let (mut bundle, unit) = scoped("true");
    bundle.config["process"]["args"] = json!(["/no/such/program"]);
    let output = systemd.oci(&bundle, &["run", &bundle.id]);
    assert!(!output.status.success());
    assert_eq!(systemd.show(&unit, "LoadState"), "not-found");
    let (mut other, unit) = scoped("true");
    other.config["root"]["path"] = json!("missing");
    assert!(!systemd.oci(&other, &["run", &other.id]).status.success());
    assert_eq!(systemd.show(&unit, "LoadState"), "not-found");
}

fn without_systemd_it_says_so() {
    if Path::new("/run/systemd/private").exists() || Path::new("/run/dbus/system_bus_socket").exists() {
        println!("SKIPPED: systemd runs here");
        return;
    }
    let (bundle, _) = scoped("true");
    bundle.save();
    let output = bundle.command(&["--systemd-cgroup", "run", &bundle.id]).output().expect("executed");
    let said = text(&output.stderr);
    assert!(!output.status.success() && said.contains("systemd does not answer"), "{said}");
    assert!(bundle.bad(&["state", &bundle.id]).contains("does not exist"));
}
