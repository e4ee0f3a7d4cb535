//! What runtimes have fallen to, tried on this one. Each test does what the attack does and sees it fail.

use crate::support::*;
use rustix::fs::{Mode, OFlags, StatVfsMountFlags};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Stdio;

pub const TESTS: &[(&str, fn())] = &[
    ("attacks::runtime_binary", runtime_binary),
    ("attacks::sealed_executable", sealed_executable),
    ("attacks::leaked_working_directory", leaked_working_directory),
    ("attacks::leaked_descriptors", leaked_descriptors),
    ("attacks::mount_through_symlinks", mount_through_symlinks),
    ("attacks::mount_races", mount_races),
    ("attacks::masked_paths", masked_paths),
    ("attacks::procfs_redirects", procfs_redirects),
    ("attacks::release_agent", release_agent),
    ("attacks::device_cgroup", device_cgroup),
    ("attacks::setgroups", setgroups),
    ("attacks::keyring", keyring),
    ("attacks::core_pattern", core_pattern),
    ("attacks::ptrace", ptrace),
    ("attacks::cgroup_writes", cgroup_writes),
    ("attacks::raw_sockets", raw_sockets),
];

fn mounts(config: &mut Value) -> &mut Vec<Value> {
    config["mounts"].as_array_mut().expect("list")
}

/// CVE-2019-5736: the program is `/proc/self/exe`, by itself and as an interpreter; and processes inside that write to
/// the executable of every process that joins.
fn runtime_binary() {
    let own = executable();
    let before = fs::read(&own).expect("read");
    let itself = Bundle::with("", |c| c["process"]["args"] = json!(["/proc/self/exe"])).all_capabilities();
    let evil = Bundle::with("", |c| c["process"]["args"] = json!(["/bin/evil"])).all_capabilities();
    fs::write(evil.root().join("bin/evil"), "#!/proc/self/exe\n").expect("written");
    fs::set_permissions(evil.root().join("bin/evil"), PermissionsExt::from_mode(0o755)).expect("mode");
    for b in [itself, evil] {
        b.run();
        let _ = b.command(&["run", &b.id]).env(EXECUTE_AGAIN, "1").output().expect("executed");
    }
    let hunt = "while true; do for p in /proc/[0-9]*; do case $p in /proc/1|/proc/$$) ;; \
        *) (echo broken > $p/exe) 2>/dev/null && echo $p >> /tmp/written;; esac; done; done";
    let hunter = Bundle::new(hunt).all_capabilities();
    hunter.detached();
    for _ in 0..40 {
        hunter.good(&["exec", &hunter.id, "true"]);
    }
    assert!(fs::read(&own).expect("read") == before, "the binary was changed");
    // Seen from inside, what is on its way in runs from a mount that cannot be written to.
    let b = Bundle::new("exec sleep 1000");
    b.detached();
    assert!(!hunter.root().join("tmp/written").exists() || fs::read(&own).expect("read") == before);
}

const EXECUTE_AGAIN: &str = "_ATOLL_OCI_EXECUTE_AGAIN";

/// Both ways to a read-only mount lead there: the program moves over to it, or is executed again through it.
fn sealed_executable() {
    for again in [false, true] {
        let b = Bundle::new("exec sleep 1000");
        b.save();
        let mut command = b.command(&["run", &b.id]);
        if again {
            command.env(EXECUTE_AGAIN, "1");
        }
        let mut runtime = command.stdout(Stdio::null()).spawn().expect("executed");
        eventually("it runs", || (text(&b.call(&["state", &b.id]).stdout).contains("running")).then_some(()));
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let exe = rustix::fs::open(format!("/proc/{}/exe", runtime.id()), flags, Mode::empty()).expect("opened");
        let mount = rustix::fs::fstatvfs(&exe).expect("statvfs").f_flag;
        assert!(mount.contains(StatVfsMountFlags::RDONLY), "executed again: {again}");
        let maps = fs::read_to_string(format!("/proc/{}/maps", runtime.id())).expect("maps");
        let own = executable();
        assert!(!maps.contains(own.to_str().expect("text")), "still mapped from the host's mount: {maps}");
        let environ = fs::read(format!("/proc/{}/environ", runtime.id())).expect("environ");
        let executed_twice = text(&environ).contains("_ATOLL_OCI_SEALED=1");
        if !again && executed_twice {
            println!("SKIPPED: this kernel does not let a program change its executable (CONFIG_CHECKPOINT_RESTORE)");
        }
        assert!(executed_twice || !again);
        b.good(&["kill", &b.id, "KILL"]);
        assert_eq!(runtime.wait().expect("ended").code(), Some(137));
    }
}

/// CVE-2024-21626: a working directory through a descriptor of the host's.
fn leaked_working_directory() {
    for n in 3..20 {
        for path in [format!("/proc/self/fd/{n}"), format!("/proc/self/fd/{n}/../../../..")] {
            let b = Bundle::with("cat /etc/hostname 2>/dev/null; ls; cat ../../../../../etc/shadow", |c| {
                c["process"]["cwd"] = json!(path);
            });
            let (_, out, _) = b.run();
            assert!(!out.contains("root:") && !out.contains("usr"), "{path}: {out}");
        }
    }
    let b = Bundle::new("exec sleep 1000");
    b.detached();
    // The container's own links lead to descriptors too.
    for n in 3..12 {
        let _ = fs::remove_file(b.root().join("data/cwd"));
        symlink(format!("/proc/self/fd/{n}"), b.root().join("data/cwd")).expect("link");
        let output = b.call(&["exec", "--cwd", "/data/cwd", &b.id, "sh", "-c", "ls; cat ../../../../etc/shadow"]);
        let out = text(&output.stdout);
        assert!(!out.contains("root:") && !out.contains("usr"), "{n}: {out}");
    }
}

fn leaked_descriptors() {
    let b = Bundle::new("exec sleep 1000");
    b.save();
    let run = format!(
        "exec 5< / 7< /etc/passwd; exec \"$0\" oci --root {} run --detach {}",
        base().join("state").display(),
        b.id
    );
    let log = fs::File::create(b.path.join("out")).expect("made");
    let status = std::process::Command::new("/bin/sh")
        .args(["-c", &run])
        .arg(executable())
        .current_dir(&b.path)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(Stdio::null())
        .status()
        .expect("executed");
    assert!(status.success());
    let count = || fs::read_dir(format!("/proc/{}/fd", b.pid())).expect("descriptors").count();
    assert_eq!(count(), 3, "standard streams and nothing else");
    let listed = b.good(&["exec", &b.id, "ls", "/proc/self/fd"]);
    assert_eq!(words(&listed), ["0", "1", "2", "3"], "3 is the directory itself");
}

/// CVE-2021-30465, CVE-2019-19921: targets of mounts that the image has made links.
fn mount_through_symlinks() {
    let outside = base().join("outside");
    fs::create_dir_all(&outside).expect("made");
    for (target, link) in [
        ("/data/link", outside.to_str().expect("text")),
        ("/data/link", "../../../../../../../../var/tmp"),
        ("/data/link/deep", "/"),
    ] {
        let b = Bundle::with("true", |c| {
            mounts(c).push(json!({"destination": target, "type": "tmpfs", "source": "tmpfs"}));
        });
        symlink(link, b.root().join("data/link")).expect("link");
        b.run();
        assert_eq!(fs::read_dir(&outside).expect("read").count(), 0);
        assert!(!fs::read_to_string("/proc/self/mountinfo").expect("mounts").contains("outside"));
    }
    // `/proc` and `/sys` must be what they are called.
    for system in ["proc", "sys"] {
        let b = Bundle::new("true");
        fs::remove_dir(b.root().join(system)).expect("removed");
        fs::create_dir(b.root().join("elsewhere")).expect("made");
        symlink("/elsewhere", b.root().join(system)).expect("link");
        b.refused("no plain directory");
    }
    // Nothing is mounted over parts of /proc.
    Bundle::with("", |c| mounts(c).push(json!({"destination": "/proc/self/attr", "type": "tmpfs", "source": "x"})))
        .refused("/proc");
}

/// Somebody who shares the tree swaps a directory for a link as fast as possible while containers start.
fn mount_races() {
    let outside = base().join("race-outside");
    fs::create_dir_all(&outside).expect("made");
    let shared = base().join("race-shared");
    fs::create_dir_all(shared.join("target")).expect("made");
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let swapper = {
        let (stop, shared, outside) = (stop.clone(), shared.clone(), outside.clone());
        std::thread::spawn(move || {
            let _ = symlink(&outside, shared.join("link"));
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let _ = rustix::fs::renameat_with(
                    rustix::fs::CWD,
                    shared.join("target"),
                    rustix::fs::CWD,
                    shared.join("link"),
                    rustix::fs::RenameFlags::EXCHANGE,
                );
            }
        })
    };
    let b = Bundle::with("true", |c| {
        mounts(c).push(json!({"destination": "/shared", "type": "bind", "source": shared, "options": ["bind"]}));
        mounts(c).push(json!({"destination": "/shared/target/made", "type": "tmpfs", "source": "tmpfs"}));
    });
    for _ in 0..60 {
        b.run();
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    swapper.join().expect("swapper");
    assert_eq!(fs::read_dir(&outside).expect("read").count(), 0, "a mount target was made outside");
}

/// CVE-2025-31133: `/dev/null` is the image's, and leads to what is to be hidden.
fn masked_paths() {
    let b = Bundle::with("cat /secret", |c| {
        mounts(c).retain(|m| m["destination"] != "/dev");
        mounts(c).push(
            json!({"destination": "/dev", "type": "bind", "source": base().join("fake-dev"), "options": ["rbind"]}),
        );
        c["linux"]["maskedPaths"] = json!(["/secret"]);
        mounts(c).retain(|m| !m["destination"].as_str().unwrap_or_default().starts_with("/dev/"));
    });
    let fake = base().join("fake-dev");
    fs::create_dir_all(&fake).expect("made");
    fs::write(b.root().join("secret"), "secret").expect("written");
    for make in [
        |p: &std::path::Path| symlink("/secret", p).expect("link"),
        |p: &std::path::Path| fs::write(p, "x").expect("file"),
    ] {
        let _ = fs::remove_file(fake.join("null"));
        make(&fake.join("null"));
        b.refused("/dev/null");
    }
    // And a masked path that is a link stays inside.
    let b = Bundle::new("cat /proc/timer_list | wc -c; cat /proc/keys | wc -c");
    b.says("0\n0\n");
}

/// CVE-2019-16884 and its like: a fake `/proc` that takes what the runtime writes there.
fn procfs_redirects() {
    let b = Bundle::with("cat /proc/sys/net/core/somaxconn; cat /proc/self/oom_score_adj", |c| {
        c["linux"]["sysctl"] = json!({"net.core.somaxconn": "55"});
        c["process"]["oomScoreAdj"] = json!(7);
        mounts(c).retain(|m| m["destination"] != "/proc");
    });
    let fake = b.root().join("proc");
    for file in ["sys/net/core/somaxconn", "self/oom_score_adj", "self/attr/exec", "self/attr/apparmor/exec"] {
        fs::create_dir_all(fake.join(file).parent().expect("parent")).expect("made");
        fs::write(fake.join(file), "untouched\n").expect("written");
    }
    let (_, out, err) = b.run();
    assert_eq!(out, "untouched\nuntouched\n", "{err}");
    // The real ones were written all the same.
    let b = Bundle::with("exec sleep 1000", |c| {
        c["linux"]["sysctl"] = json!({"net.core.somaxconn": "55"});
        c["process"]["oomScoreAdj"] = json!(7);
        mounts(c).retain(|m| m["destination"] != "/proc");
    });
    b.detached();
    assert_eq!(fs::read_to_string(format!("/proc/{}/oom_score_adj", b.pid())).expect("read"), "7\n");
}

/// CVE-2022-0492: a control group's helper program runs on the host.
fn release_agent() {
    let script = "for d in /sys/fs/cgroup /sys/fs/cgroup/*; do echo /x 2>/dev/null > $d/release_agent && echo WRITTEN; \
        echo 1 2>/dev/null > $d/notify_on_release && echo WRITTEN; done; \
        mkdir /tmp/c; mount -t cgroup -o memory none /tmp/c 2>/dev/null && echo MOUNTED; echo done";
    Bundle::new(script).says("done\n");
    // With a user namespace and every capability in it there is still no way to the helper.
    let b = Bundle::with(&format!("{script}; echo /x 2>/dev/null > /tmp/c/release_agent && echo WRITTEN; true"), |c| {
        c["linux"]["namespaces"].as_array_mut().expect("list").push(json!({"type": "user"}));
        let map = json!([{"containerID": 0, "hostID": 700000, "size": 65536}]);
        (c["linux"]["uidMappings"], c["linux"]["gidMappings"]) = (map.clone(), map);
        mounts(c).push(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}));
    })
    .all_capabilities();
    let (_, out, _) = b.run();
    assert!(!out.contains("WRITTEN"), "{out}");
}

/// Device nodes can be made, and are dead.
fn device_cgroup() {
    let b = Bundle::new("mknod /tmp/disk b 254 0; mknod /tmp/mem c 1 1; cat /tmp/disk 2>&1 | head -c 200; cat /tmp/mem 2>&1 | head -c 200; \
        echo a 2>/dev/null > /sys/fs/cgroup/devices/devices.allow && echo ALLOWED; head -c 1 /dev/zero | wc -c")
    .all_capabilities();
    let (_, out, err) = b.run();
    assert_eq!(out.matches("Operation not permitted").count(), 2, "{out} {err}");
    assert!(!out.contains("ALLOWED") && out.ends_with("1\n"), "{out}");
}

/// CVE-2018-7169: groups that deny access must not be dropped.
fn setgroups() {
    let b = Bundle::with("grep Groups /proc/self/status; cat /proc/self/setgroups", |c| {
        c["process"]["user"] = json!({"uid": 0, "gid": 0, "additionalGids": [10, 20]});
    });
    assert_eq!(words(&b.run().1), ["Groups:", "10", "20", "allow"]);
    // The caller's own groups do not come along.
    let b = Bundle::new("grep Groups /proc/self/status");
    b.save();
    let mut command = std::process::Command::new("setpriv");
    command.args(["--groups", "4,27"]).arg(executable()).args(["oci", "--root"]).arg(base().join("state"));
    match command.args(["run", &b.id]).current_dir(&b.path).output() {
        Ok(output) => assert_eq!(words(&text(&output.stdout)), ["Groups:"], "{}", text(&output.stderr)),
        Err(_) => println!("SKIPPED: no setpriv (package util-linux)"),
    }
}

/// Keys of the caller's session are not the container's: it has a session of its own.
fn keyring() {
    let unmasked = || Bundle::with("cat /proc/keys; true", |c| c["linux"]["maskedPaths"] = json!([]));
    let new = unmasked();
    let (_, said, err) = new.run();
    if said.is_empty() {
        println!("SKIPPED: this kernel has no /proc/keys");
        return;
    }
    assert!(said.contains(&format!("_ses.{}", new.id)), "{said} {err}");
    let kept = unmasked();
    kept.save();
    let said = kept.good(&["run", "--no-new-keyring", &kept.id]);
    assert!(!said.contains(&format!("_ses.{}", kept.id)), "{said}");
}

fn core_pattern() {
    let before = fs::read_to_string("/proc/sys/kernel/core_pattern").expect("read");
    let b = Bundle::new(
        "for f in core_pattern modprobe hotplug; do echo '|/evil' 2>/dev/null > /proc/sys/kernel/$f && echo WRITTEN; done; \
        umount /proc/sys 2>/dev/null && echo UMOUNTED; mount -o remount,rw /proc/sys 2>/dev/null && echo REMOUNTED; echo done",
    );
    b.says("done\n");
    assert_eq!(fs::read_to_string("/proc/sys/kernel/core_pattern").expect("read"), before);
}

/// Processes of one container are out of another's reach.
fn ptrace() {
    let victim = Bundle::with("exec sleep 1000", |c| c["process"]["user"] = json!({"uid": 1000, "gid": 1000}));
    victim.detached();
    let pid = victim.pid();
    let script = format!(
        "ls /proc/{pid} 2>/dev/null && echo SEEN; kill -9 {pid} 2>/dev/null && echo KILLED; ls /proc | grep -c '^[0-9]'"
    );
    let b = Bundle::with(&script, |c| c["process"]["user"] = json!({"uid": 1000, "gid": 1000})).all_capabilities();
    let (_, out, err) = b.run();
    assert!(!out.contains("SEEN") && !out.contains("KILLED"), "{out} {err}");
    assert_eq!(victim.state()["status"], "running");
    // One that shares its processes may not look into a runtime on its way in.
    let peer = Bundle::with(
        "while true; do for p in /proc/[0-9]*; do ls $p/root/ 2>/dev/null | grep -q usr && echo $p >> /tmp/host; done; done",
        |_| {},
    );
    peer.detached();
    for _ in 0..20 {
        peer.good(&["exec", &peer.id, "true"]);
    }
    assert!(!peer.root().join("tmp/host").exists(), "the host's root was seen through a process on its way in");
}

fn cgroup_writes() {
    let b = Bundle::new(
        "find /sys/fs/cgroup -type f 2>/dev/null | while read f; do (echo 0 > $f) 2>/dev/null && echo WRITTEN $f; done; \
        find /sys/fs/cgroup -type d | while read d; do mkdir $d/x 2>/dev/null && echo MADE $d; done; \
        mount -o remount,rw /sys/fs/cgroup 2>/dev/null && echo REMOUNTED; touch /sys/x 2>/dev/null && echo MADE; echo done",
    );
    b.says("done\n");
}

/// Raw sockets need a capability that is not given.
fn raw_sockets() {
    let b = Bundle::with("ping -c 1 -W 1 127.0.0.1 2>&1; arping -c 1 127.0.0.1 2>&1; true", |c| {
        // Ping without raw sockets is for groups that this range leaves out.
        c["linux"]["sysctl"] = json!({"net.ipv4.ping_group_range": "1 0"});
    });
    let (_, out, err) = b.run();
    assert!(out.contains("permission denied") || out.contains("Operation not permitted"), "{out} {err}");
    assert!(!out.contains("bytes from"), "{out}");
}
