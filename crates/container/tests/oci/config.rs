//! What config.json can say besides mounts and seccomp.

use crate::support::*;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;

pub const TESTS: &[(&str, fn())] = &[
    ("config::namespaces", namespaces),
    ("config::namespaces_by_path", namespaces_by_path),
    ("config::user_namespace", user_namespace),
    ("config::time_namespace", time_namespace),
    ("config::process", process),
    ("config::capabilities", capabilities),
    ("config::rlimits", rlimits),
    ("config::scheduling", scheduling),
    ("config::devices", devices),
    ("config::hooks", hooks),
    ("config::failing_hooks", failing_hooks),
    ("config::sysctls", sysctls),
    ("config::resources", resources),
    ("config::version_2_devices", version_2_devices),
    ("config::labels", labels),
    ("config::refusals", refusals),
    ("config::rootless", rootless),
];

fn list(config: &mut Value) -> &mut Vec<Value> {
    config["linux"]["namespaces"].as_array_mut().expect("list")
}

fn namespaces() {
    let show = "for n in pid net ipc uts mnt cgroup user; do readlink /proc/self/ns/$n; done";
    let links = |b: Bundle| words(&b.run().1).iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
    let own = |name: &str| fs::read_link(format!("/proc/self/ns/{name}")).expect("link").to_string_lossy().into_owned();
    let inside = links(Bundle::new(show));
    for (n, name) in ["pid", "net", "ipc", "uts", "mnt", "cgroup"].iter().enumerate() {
        assert_ne!(inside[n], own(name), "{name}");
    }
    assert_eq!(inside[6], own("user"));
    // What is not listed is the runtime's own.
    let few = Bundle::with(show, |c| {
        c["linux"]["namespaces"] = json!([{"type": "mount"}]);
        c.as_object_mut().expect("object").remove("hostname");
        c["mounts"].as_array_mut().expect("list").retain(|m| m["type"] != "mqueue");
    });
    let inside = links(few);
    for (n, name) in ["pid", "net", "ipc", "uts"].iter().enumerate() {
        assert_eq!(inside[n], own(name), "{name}");
    }
}

fn namespaces_by_path() {
    let show = "for n in net ipc uts pid; do readlink /proc/self/ns/$n; done; hostname";
    let first = Bundle::with("exec sleep 1000", |c| c["hostname"] = json!("first"));
    first.detached();
    let at = |kind: &str, file: &str| json!({"type": kind, "path": format!("/proc/{}/ns/{file}", first.pid())});
    let second = Bundle::with(show, |c| {
        c["linux"]["namespaces"] =
            json!([{"type": "mount"}, at("network", "net"), at("ipc", "ipc"), at("uts", "uts"), at("pid", "pid")]);
        c.as_object_mut().expect("object").remove("hostname");
    });
    let (_, out, err) = second.run();
    let of = |name: &str| {
        fs::read_link(format!("/proc/{}/ns/{name}", first.pid())).expect("link").to_string_lossy().into_owned()
    };
    assert_eq!(words(&out), [&of("net"), &of("ipc"), &of("uts"), &of("pid"), "first"], "{err}");
    Bundle::with("", |c| list(c).push(json!({"type": "time", "path": "/no/such"}))).refused("/no/such");
    Bundle::with("", |c| {
        list(c).retain(|n| n["type"] != "network");
        list(c).push(json!({"type": "network", "path": "/etc/passwd"}));
    })
    .refused("entering a namespace");
}

fn map(host: u32) -> Value {
    json!([{"containerID": 0, "hostID": host, "size": 65536}])
}

fn user_namespace() {
    let b = Bundle::with(
        "id -u; cat /proc/self/uid_map; echo x > /data/file; stat -c %u /data/file; head -c 1 /dev/zero | wc -c",
        |c| {
            list(c).push(json!({"type": "user"}));
            c["linux"]["uidMappings"] = map(700_000);
            c["linux"]["gidMappings"] = map(800_000);
        },
    );
    std::os::unix::fs::chown(b.root().join("data"), Some(700_000), Some(800_000)).expect("chown");
    let (_, out, err) = b.run();
    assert_eq!(words(&out), ["0", "0", "700000", "65536", "0", "1"], "{err}");
    use std::os::unix::fs::MetadataExt;
    let file = fs::metadata(b.root().join("data/file")).expect("made");
    assert_eq!((file.uid(), file.gid()), (700_000, 800_000));
    let live = Bundle::with("exec sleep 1000", |c| {
        list(c).push(json!({"type": "user"}));
        c["linux"]["uidMappings"] = map(700_000);
        c["linux"]["gidMappings"] = map(800_000);
    });
    live.detached();
    assert_eq!(words(&live.good(&["exec", &live.id, "cat", "/proc/self/uid_map"])), ["0", "700000", "65536"]);
}

fn time_namespace() {
    let b = Bundle::with("cut -d. -f1 /proc/uptime", |c| {
        list(c).push(json!({"type": "time"}));
        c["linux"]["timeOffsets"] = json!({"boottime": {"secs": 86_400_000, "nanosecs": 5}, "monotonic": {"secs": 60}});
    });
    let (_, out, err) = b.run();
    let host: f64 = words(&fs::read_to_string("/proc/uptime").expect("uptime"))[0].parse().expect("number");
    let inside: f64 = out.trim().parse().expect(&err);
    assert!((inside - host - 86_400_000.0).abs() < 60.0, "{inside} {host}");
}

fn process() {
    let b = Bundle::with(
        "id -u; id -g; id -G; umask; pwd; echo $A; cat /proc/self/oom_score_adj; hostname; cat /proc/sys/kernel/domainname",
        |c| {
            c["process"]["user"] = json!({"uid": 11, "gid": 12, "additionalGids": [13], "umask": 0o77});
            c["process"]["cwd"] = json!("/made/for/it");
            c["process"]["env"] = json!(["PATH=/bin", "A=b c"]);
            c["process"]["oomScoreAdj"] = json!(321);
            c["hostname"] = json!("host");
            c["domainname"] = json!("domain");
        },
    );
    b.says("11\n12\n12 13\n0077\n/made/for/it\nb c\n321\nhost\ndomain\n");
    // A read-only root is one.
    let (_, out, _) = Bundle::with("touch /x 2>&1", |c| c["root"]["readonly"] = json!(true)).run();
    assert!(out.contains("Read-only file system"), "{out}");
}

fn capabilities() {
    let read = "grep ^Cap /proc/self/status | tr -d '\\n'";
    let b = Bundle::with(read, |c| {
        c["process"]["user"] = json!({"uid": 5, "gid": 5});
        c["process"]["noNewPrivileges"] = json!(false);
        c["process"]["capabilities"] = json!({"bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"], "permitted": ["CAP_CHOWN", "CAP_KILL"],
            "inheritable": ["CAP_KILL"], "effective": ["CAP_CHOWN"], "ambient": ["CAP_KILL"]});
    });
    let (_, out, err) = b.run();
    // After an exec by a user who is not root the ambient set is what is left (capabilities(7)).
    let expected = [
        "CapInh:",
        "0000000000000020",
        "CapPrm:",
        "0000000000000020",
        "CapEff:",
        "0000000000000020",
        "CapBnd:",
        "0000000000002021",
        "CapAmb:",
        "0000000000000020",
    ];
    assert_eq!(words(&out.replace("Cap", " Cap")), expected, "{err}");
    Bundle::with("", |c| c["process"]["capabilities"]["bounding"] = json!(["CAP_NONE"])).refused("CAP_NONE");
}

fn rlimits() {
    let b = Bundle::with("ulimit -n; ulimit -c; ulimit -s", |c| {
        c["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            {"type": "RLIMIT_STACK", "soft": 1048576, "hard": 1048576}]);
    });
    b.says("100\n0\n1024\n");
    // What cannot be raised is told and left out.
    let (code, _, err) = Bundle::with("true", |c| {
        c["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 1u64 << 40, "hard": 1u64 << 40}])
    })
    .run();
    assert!(code == 0 && err.contains("RLIMIT_NOFILE"), "{code} {err}");
}

fn scheduling() {
    let b = Bundle::with("ionice -p $$; cut -d' ' -f19,41 /proc/self/stat; uname -m", |c| {
        c["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
        c["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 7});
        c["linux"]["personality"] = json!({"domain": "LINUX32"});
    });
    let (_, out, err) = b.run();
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines[0].contains("idle"), "{out} {err}");
    assert_eq!(lines[1], "7 3");
    assert_eq!(lines[2], if cfg!(target_arch = "x86_64") { "i686" } else { lines[2] });
    let wrong = |change: fn(&mut Value), word: &str| Bundle::with("", change).refused(word);
    wrong(|c| c["process"]["scheduler"] = json!({"policy": "SCHED_X"}), "SCHED_X");
    wrong(|c| c["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_X"}), "IOPRIO_CLASS_X");
    wrong(|c| c["linux"]["personality"] = json!({"domain": "X"}), "LINUX32");
}

fn devices() {
    let b = Bundle::with("stat -c '%F %t:%T %a %u' /dev/fuzz /dev/pipe; ls -l /dev/null | cut -c1-10; test -L /dev/ptmx -a -L /dev/fd && echo links; echo a > /dev/fuzz 2>&1; cat /dev/kmsg 2>&1 | head -n 1", |c| {
        c["linux"]["devices"] = json!([{"path": "/dev/fuzz", "type": "c", "major": 1, "minor": 7, "fileMode": 0o640, "uid": 4, "gid": 5},
            {"path": "/dev/pipe", "type": "p", "fileMode": 0o600}, {"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11}]);
    })
    .all_capabilities();
    let (_, out, err) = b.run();
    assert!(out.starts_with("character special file 1:7 640 4\nfifo 0:0 600 0\ncrw-rw-rw-\nlinks\n"), "{out} {err}");
    let denied = |l: &str| l.contains("kmsg") && l.contains("Operation not permitted");
    assert!(out.lines().chain(err.lines()).any(denied), "{out} {err}");
    Bundle::with("", |c| c["linux"]["devices"] = json!([{"path": "/dev/x", "type": "z"}])).refused("/dev/x");
}

fn hooks() {
    let b = Bundle::new("echo program >> /log");
    let log = b.path.join("log");
    let hook = |name: &str| {
        let script = format!("echo {name} $(sed 's/.*\"status\":\"\\([a-z]*\\)\".*/\\1/') >> {}", log.display());
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "timeout": 30}])
    };
    let inside = json!([{"path": "/bin/sh", "args": ["sh", "-c", "echo startContainer $(sed 's/.*\"status\":\"\\([a-z]*\\)\".*/\\1/') $W >> /log"], "env": ["PATH=/bin", "W=word"]}]);
    let mut b = b;
    b.config["hooks"] = json!({"prestart": hook("prestart"), "createRuntime": hook("createRuntime"), "createContainer": hook("createContainer"),
        "startContainer": inside, "poststart": hook("poststart"), "poststop": hook("poststop")});
    b.save();
    let nowhere = std::process::Stdio::null;
    assert!(b.command(&["create", &b.id]).stdout(nowhere()).stderr(nowhere()).status().expect("executed").success());
    let said = || fs::read_to_string(&log).unwrap_or_default();
    assert_eq!(said(), "prestart creating\ncreateRuntime creating\ncreateContainer creating\n");
    b.good(&["start", &b.id]);
    b.wait_status("stopped");
    assert_eq!(fs::read_to_string(b.root().join("log")).expect("log"), "startContainer created word\nprogram\n");
    assert!(said().ends_with("poststart running\n"), "{}", said());
    b.good(&["delete", &b.id]);
    assert!(said().ends_with("poststop stopped\n"), "{}", said());
    // The state is the whole of it, and the pid the host's.
    let mut b = Bundle::with("true", |c| c["annotations"] = json!({"key": "value"}));
    let out = b.path.join("state");
    b.config["hooks"] = json!({"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", format!("cat > {}; kill -0 $(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/' {0})", out.display())]}]});
    assert_eq!(b.run().0, 0);
    let state: Value = serde_json::from_str(&fs::read_to_string(out).expect("state")).expect("JSON");
    assert_eq!((state["id"].as_str(), state["bundle"].as_str()), (Some(b.id.as_str()), b.path.to_str()));
    assert_eq!(state["annotations"]["key"], "value");
}

fn failing_hooks() {
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let stop = base().join(format!("stopped-{kind}"));
        let b = Bundle::with("echo ran", |c| {
            c["hooks"] = json!({kind: [{"path": "/bin/sh", "args": ["sh", "-c", "exit 3"]}],
                "poststop": [{"path": "/bin/touch", "args": ["touch", stop]}]});
        });
        b.refused(kind);
        assert!(stop.exists(), "{kind}: poststop hooks run");
    }
    let late = Bundle::with("echo ran", |c| {
        c["hooks"] = json!({"prestart": [{"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}]})
    });
    late.refused("timeout");
    // Those after the start are told of and change nothing.
    let (code, out, err) =
        Bundle::with("echo ran", |c| c["hooks"] = json!({"poststart": [{"path": "/no/such"}]})).run();
    assert!(code == 0 && out == "ran\n" && err.contains("poststart"), "{code} {out} {err}");
}

fn sysctls() {
    let b =
        Bundle::with("cat /proc/sys/net/core/somaxconn /proc/sys/kernel/shmmni /proc/sys/net/ipv4/ip_forward", |c| {
            c["linux"]["sysctl"] =
                json!({"net.core.somaxconn": "77", "kernel.shmmni": "88", "net.ipv4.ip_forward": "1"});
        });
    b.says("77\n88\n1\n");
    for (name, change) in [("kernel.core_pattern", "|/x"), ("vm.overcommit_memory", "1"), ("net/../vm", "1")] {
        Bundle::with("", |c| c["linux"]["sysctl"] = json!({name: change})).refused(name);
    }
    Bundle::with("", |c| {
        list(c).retain(|n| n["type"] != "network");
        c["linux"]["sysctl"] = json!({"net.core.somaxconn": "77"});
    })
    .refused("net.core.somaxconn");
}

fn resources() {
    if !std::path::Path::new("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists() {
        println!("SKIPPED: no version 1 memory controller");
        return;
    }
    let show = "cd /sys/fs/cgroup; cat memory/memory.limit_in_bytes memory/memory.soft_limit_in_bytes cpu/cpu.shares cpu/cpu.cfs_quota_us pids/pids.max";
    let b = Bundle::with(show, |c| {
        c["linux"]["resources"]["memory"] =
            json!({"limit": 67108864, "reservation": 33554432, "swap": -1, "swappiness": 10});
        c["linux"]["resources"]["cpu"] =
            json!({"shares": 512, "quota": 30000, "period": 60000, "cpus": "0", "mems": "0"});
        c["linux"]["resources"]["pids"] = json!({"limit": 33});
    });
    b.says("67108864\n33554432\n512\n30000\n33\n");
    // Without a cgroup namespace the container sees its own group and no other.
    let b = Bundle::with("cat /sys/fs/cgroup/pids/pids.max; ls -d /sys/fs/cgroup/pids/*/ 2>/dev/null | wc -l", |c| {
        list(c).retain(|n| n["type"] != "cgroup");
        c["linux"]["resources"]["pids"] = json!({"limit": 34});
    });
    b.says("34\n0\n");
    let (code, _, _) = Bundle::with("dd if=/dev/zero of=/dev/null bs=64M count=1 2>/dev/null", |c| {
        c["linux"]["resources"]["memory"] = json!({"limit": 16777216, "swap": 16777216});
    })
    .run();
    assert_eq!(code, 137);
}

/// In a mount namespace where version 2 is all there is: devices are held by a BPF program.
fn version_2_devices() {
    let b = Bundle::with("head -c 1 /dev/zero | wc -c; cat /proc/self/cgroup; mknod /tmp/full c 1 7; mknod /tmp/mem c 1 1; cat /tmp/mem 2>&1; echo x 2>&1 > /tmp/full", |c| {
        c["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"}]);
    })
    .all_capabilities();
    b.save();
    let run = format!(
        "mount --make-rprivate / && mount -t cgroup2 none /sys/fs/cgroup && exec {} oci --root {} run {}",
        executable().display(),
        base().join("state").display(),
        b.id
    );
    let output = std::process::Command::new("unshare")
        .args(["-m", "/bin/sh", "-c", &run])
        .current_dir(&b.path)
        .output()
        .expect("unshare");
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(out.starts_with("1\n0::/\n") || out.starts_with("1\n"), "{out} {err}");
    assert!(
        out.contains("/tmp/mem: Operation not permitted") || out.contains("/tmp/mem': Operation not permitted"),
        "{out} {err}"
    );
    assert!(!err.contains("device program"), "{err}");
}

fn labels() {
    for (field, there) in
        [("apparmorProfile", "/sys/kernel/security/apparmor"), ("selinuxLabel", "/sys/fs/selinux/enforce")]
    {
        if std::path::Path::new(there).exists() {
            println!("SKIPPED: this host has the module for {field}, the refusal cannot be seen");
            continue;
        }
        Bundle::with("", |c| c["process"][field] = json!("some")).refused(field);
        // Empty is none.
        Bundle::with("echo ran", |c| c["process"][field] = json!("")).says("ran\n");
    }
}

fn refusals() {
    let wrong = |change: fn(&mut Value), word: &str| Bundle::with("", change).refused(word);
    wrong(|c| c["linux"]["intelRdt"] = json!({"closID": "x"}), "intelRdt");
    wrong(|c| c["root"]["path"] = json!("nowhere"), "root.path");
    wrong(|c| c["ociVersion"] = json!("9.0"), "ociVersion");
    wrong(|c| c["mounts"].as_array_mut().expect("list").push(json!({"destination": "/data", "type": "nofs"})), "nofs");
    wrong(|c| c["linux"]["cgroupsPath"] = json!("../../x"), "cgroupsPath");
    wrong(|c| c["linux"]["rootfsPropagation"] = json!("odd"), "rootfsPropagation");
    wrong(|c| c["linux"]["resources"]["unified"] = json!({"../x": "1"}), "unified");
    wrong(|c| c["linux"]["resources"]["devices"] = json!([{"type": "q"}]), "linux.resources.devices");
    let b = Bundle::new("");
    fs::write(b.path.join("config.json"), "{\"ociVersion\": 3}").expect("written");
    assert!(b.bad(&["run", &b.id]).contains("config.json"));
    fs::remove_file(b.path.join("config.json")).expect("removed");
    assert!(b.bad(&["run", &b.id]).contains("config.json"));
}

/// As a plain user, with nothing but that user's own id.
fn rootless() {
    if std::process::Command::new("setpriv").arg("--version").output().is_err() {
        println!("SKIPPED: no setpriv (package util-linux)");
        return;
    }
    let mut b = Bundle::new(
        "id -u; echo $$; cat /proc/self/uid_map; touch /data/x && stat -c %u /data/x; head -c 1 /dev/zero | wc -c; mount -t tmpfs x /tmp 2>&1 || true",
    );
    list(&mut b.config).retain(|n| n["type"] != "network");
    list(&mut b.config).push(json!({"type": "user"}));
    let one = json!([{"containerID": 0, "hostID": 12345, "size": 1}]);
    (b.config["linux"]["uidMappings"], b.config["linux"]["gidMappings"]) = (one.clone(), one);
    b.config["linux"]["resources"] = json!({"pids": {"limit": 9}});
    for mount in b.config["mounts"].as_array_mut().expect("list") {
        if mount["type"] == "sysfs" {
            *mount = json!({"destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "nosuid", "noexec", "nodev", "ro"]});
        }
        if let Some(options) = mount.get_mut("options").and_then(Value::as_array_mut) {
            options.retain(|o| o != "gid=5");
        }
    }
    b.save();
    for path in [b.root().join("data"), b.path.clone(), b.root()] {
        std::os::unix::fs::chown(path, Some(12345), Some(12345)).expect("chown");
    }
    fs::set_permissions(base(), fs::Permissions::from_mode(0o755)).expect("mode");
    let binary = base().join("rootless-binary");
    fs::copy(executable(), &binary).expect("copied");
    let state = base().join("rootless");
    fs::create_dir_all(&state).expect("made");
    std::os::unix::fs::chown(&state, Some(12345), Some(12345)).expect("chown");
    let run = |args: &[&str]| {
        let mut command = std::process::Command::new("setpriv");
        command.args(["--reuid", "12345", "--regid", "12345", "--clear-groups"]).arg(&binary);
        command.args(["oci", "--root"]).arg(&state).args(args).current_dir(&b.path);
        let output = command.output().expect("executed");
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (code, out, err) = run(&["run", &b.id]);
    assert_eq!(words(&out).join(" ").get(..17), Some("0 1 0 12345 1 0 1"), "{code:?} {out} {err}");
    assert!(err.contains("no control group"), "it says what it left out: {err}");
    b.config["process"]["args"] = json!(["sleep", "1000"]);
    b.save();
    let mut command = std::process::Command::new("setpriv");
    command.args(["--reuid", "12345", "--regid", "12345", "--clear-groups"]).arg(&binary).args(["oci", "--root"]);
    let detached = command.arg(&state).args(["run", "--detach", &b.id]).current_dir(&b.path);
    assert!(
        detached
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()
            .expect("run")
            .success()
    );
    let (code, out, err) = run(&["exec", &b.id, "id", "-u"]);
    assert_eq!((code, out.as_str()), (Some(0), "0\n"), "{err}");
    assert_eq!(run(&["delete", "--force", &b.id]).0, Some(0));
    // Without a user namespace there is nothing to be had.
    list(&mut b.config).retain(|n| n["type"] != "user");
    b.config["linux"].as_object_mut().expect("object").retain(|k, _| !k.ends_with("Mappings"));
    b.save();
    assert!(run(&["run", &b.id]).2.contains("user namespace"));
}
