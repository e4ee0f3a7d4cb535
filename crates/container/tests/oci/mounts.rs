//! Mounts, with all that their options can say.

use crate::support::*;
use serde_json::{Value, json};
use std::fs;

pub const TESTS: &[(&str, fn())] = &[
    ("mounts::bind", bind),
    ("mounts::recursive_attributes", recursive),
    ("mounts::tmpfs", tmpfs),
    ("mounts::id_mapped", id_mapped),
    ("mounts::propagation", propagation),
    ("mounts::masked_and_read_only", masked),
];

fn mounts(config: &mut Value) -> &mut Vec<Value> {
    config["mounts"].as_array_mut().expect("list")
}

fn bind() {
    let b = Bundle::new(
        "cat /etc/name /a/b/c/file; touch /a/b/c/new 2>&1; mount | grep ' /a/b/c ' | grep -o 'nosuid,nodev,noexec'",
    );
    let dir = b.path.join("source");
    fs::create_dir(&dir).expect("made");
    fs::write(dir.join("file"), "file\n").expect("written");
    let mut b = b;
    mounts(&mut b.config).extend([
        json!({"destination": "/etc/name", "source": dir.join("file"), "options": ["bind"]}),
        json!({"destination": "/a/b/c", "type": "none", "source": dir, "options": ["bind", "ro", "nosuid", "nodev", "noexec"]}),
    ]);
    let (_, out, err) = b.run();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..2], ["file", "file"], "{err}");
    assert!(lines[2].contains("Read-only") && lines[3] == "nosuid,nodev,noexec", "{out}");
    assert!(!dir.join("new").exists());
    let missing = |c: &mut Value, mount: Value| mounts(c).push(mount);
    Bundle::with("", |c| missing(c, json!({"destination": "/x", "type": "bind", "source": "/no/such"})))
        .refused("/no/such");
    Bundle::with("", |c| missing(c, json!({"destination": "/x", "type": "bind"}))).refused("needs a source");
    Bundle::with("", |c| missing(c, json!({"destination": "/x", "type": "tmpfs", "options": ["remount"]})))
        .refused("remount");
}

/// `ro` is of the mount itself, `rro` of all below.
fn recursive() {
    let script = "for d in plain recursive; do for p in $d $d/inner; do touch /$p/x 2>/dev/null && echo $p rw || echo $p ro; done; done; \
        mount | grep -c 'recursive.*noexec'; mount | grep -c 'plain.*noexec'";
    let b = Bundle::new(script);
    let dir = b.path.join("tree");
    fs::create_dir_all(dir.join("inner")).expect("made");
    let mut b = b;
    mounts(&mut b.config).extend([
        json!({"destination": "/plain", "source": dir, "options": ["rbind", "ro", "noexec"]}),
        json!({"destination": "/recursive", "source": dir, "options": ["rbind", "rro", "rnoexec", "rnosuid"]}),
    ]);
    b.save();
    // The tree has a mount in it, in a mount namespace of the test's own.
    let run = format!(
        "mount --make-rprivate / && mount -t tmpfs none {0}/inner && exec {1} oci --root {2} run {3}",
        dir.display(),
        executable().display(),
        base().join("state").display(),
        b.id
    );
    let output = std::process::Command::new("unshare")
        .args(["-m", "/bin/sh", "-c", &run])
        .current_dir(&b.path)
        .output()
        .expect("unshare");
    let out = text(&output.stdout);
    assert_eq!(out, "plain ro\nplain/inner rw\nrecursive ro\nrecursive/inner ro\n2\n1\n", "{}", text(&output.stderr));
}

fn tmpfs() {
    let b = Bundle::with(
        "ls /kept; cat /kept/deep/file; touch /kept/new; stat -c '%a %u' /kept/deep; df /sized | tail -n1 | awk '{print $2}'; stat -c %a /sized; touch /closed/x 2>&1",
        |c| {
            mounts(c).extend([
            json!({"destination": "/kept", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "tmpcopyup"]}),
            json!({"destination": "/sized", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m", "mode=1777"]}),
            json!({"destination": "/closed", "type": "tmpfs", "source": "tmpfs", "options": ["ro"]}),
        ]);
        },
    );
    let kept = b.root().join("kept/deep");
    fs::create_dir_all(&kept).expect("made");
    fs::write(kept.join("file"), "text\n").expect("written");
    std::os::unix::fs::chown(&kept, Some(9), Some(9)).expect("chown");
    let (_, out, err) = b.run();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..5], ["deep", "text", "755 9", "1024", "1777"], "{err}");
    assert!(lines[5].contains("Read-only"), "{out}");
    assert!(!b.root().join("kept/new").exists(), "the image is not written to");
}

fn id_mapped() {
    let b = Bundle::new("stat -c %u /mapped/file; touch /mapped/new");
    let dir = b.path.join("owned");
    fs::create_dir(&dir).expect("made");
    fs::write(dir.join("file"), "").expect("written");
    for path in [dir.clone(), dir.join("file")] {
        std::os::unix::fs::chown(path, Some(5000), Some(5000)).expect("chown");
    }
    let mut b = b;
    let map = json!([{"containerID": 5000, "hostID": 0, "size": 1}]);
    mounts(&mut b.config)
        .push(json!({"destination": "/mapped", "type": "bind", "source": dir, "options": ["bind", "idmap"],
        "uidMappings": map, "gidMappings": map}));
    b.says("0\n");
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(dir.join("new")).expect("made").uid(), 5000);
    Bundle::with("", |c| {
        mounts(c).push(json!({"destination": "/x", "type": "bind", "source": "/etc", "options": ["bind", "idmap"]}))
    })
    .refused("idmap");
    Bundle::with("", |c| {
        mounts(c).push(json!({"destination": "/x", "type": "bind", "source": "/etc", "uidMappings": map}))
    })
    .refused("gidMappings");
}

fn propagation() {
    let show = "awk '$5 ~ /^.[spu]?$/ {print $5, $7, $8}' /proc/self/mountinfo";
    let b = Bundle::with(show, |c| {
        c["linux"]["rootfsPropagation"] = json!("shared");
        for (destination, option) in [("/s", "shared"), ("/p", "rprivate"), ("/u", "unbindable")] {
            mounts(c)
                .push(json!({"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": [option]}));
        }
    });
    let (_, out, err) = b.run();
    let of = |point: &str| out.lines().find(|l| l.split(' ').next() == Some(point)).unwrap_or_default().to_owned();
    assert!(of("/").contains("shared:") && of("/s").contains("shared:"), "{out} {err}");
    assert!(of("/p").ends_with("- tmpfs") && of("/u").contains("unbindable"), "{out}");
    // Nothing that happens inside reaches the host.
    let own = || {
        let text = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        text.lines().filter(|l| l.contains(&*base().to_string_lossy())).count()
    };
    let b = Bundle::with("mount -t tmpfs none /data && echo mounted", |_| {}).all_capabilities();
    b.says("mounted\n");
    assert_eq!(own(), 0);
}

fn masked() {
    let b = Bundle::with(
        "cat /secret | wc -c; ls -A /hidden | wc -l; echo x > /shown/file 2>&1; echo x > /proc/sys/kernel/shmmni 2>&1",
        |c| {
            c["linux"]["maskedPaths"] = json!(["/secret", "/hidden", "/no/such"]);
            c["linux"]["readonlyPaths"] = json!(["/shown", "/proc/sys", "/no/such"]);
        },
    );
    fs::write(b.root().join("secret"), "secret").expect("written");
    fs::create_dir_all(b.root().join("hidden/x")).expect("made");
    fs::create_dir_all(b.root().join("shown")).expect("made");
    let (_, out, err) = b.run();
    assert!(out.starts_with("0\n0\n"), "{out} {err}");
    assert_eq!((out.clone() + &err).matches("Read-only file system").count(), 2, "{out} {err}");
}
