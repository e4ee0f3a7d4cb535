//! What a container can see and do.

use crate::support::*;
use container::shim::protocol::Phase;
use container::spec::{Memory, Pids};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

pub const TESTS: &[(&str, fn())] = &[
    ("isolation::identity", identity),
    ("isolation::file_system", file_system),
    ("isolation::read_only_root", read_only_root),
    ("isolation::mounts", mounts),
    ("isolation::mount_target_attacks", mount_target_attacks),
    ("isolation::privileges", privileges),
    ("isolation::seccomp", seccomp),
    ("isolation::masked_paths", masked_paths),
    ("isolation::devices", devices),
    ("isolation::descriptors", descriptors),
    ("isolation::executable_is_safe", executable_is_safe),
    ("isolation::host_users", host_users),
    ("isolation::shared_pid_namespace", shared_pid_namespace),
    ("isolation::memory_limit", memory_limit),
    ("isolation::pids_limit", pids_limit),
    ("isolation::cgroup_view", cgroup_view),
    ("isolation::sysctls", sysctls),
    ("isolation::network", network),
    ("isolation::host_network", host_network),
    ("isolation::tiny_memory", tiny_memory),
    ("isolation::ordinary_programs", ordinary_programs),
];

fn identity() {
    let pod = Pod::new();
    let mut start =
        pod.script("a", "id -u; id -g; id -G; hostname; pwd; echo $GREETING $HOME; cat /proc/self/uid_map; sleep 1000");
    start.spec.process.user.uid = 1000;
    start.spec.process.user.gid = 1000;
    start.spec.process.user.additional_gids = vec![5, 7];
    start.spec.process.env.push("GREETING=hello".into());
    start.spec.process.cwd = "/made/for/it".into();
    let log = start.log_path.clone();
    let state = pod.client().start(start).expect("started");
    let text = eventually("all said", || Some(output(&log, "stdout")).filter(|t| t.lines().count() >= 7));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..6], ["1000", "1000", "1000 5 7", "island", "/made/for/it", "hello /home/user"]);
    assert_eq!(lines[6].split_whitespace().collect::<Vec<_>>(), ["0", "1310720", "65536"]);
    let host = fs::metadata(format!("/proc/{}", state.pid.expect("pid"))).expect("process");
    assert_eq!(host.uid(), ID_BASE + 1000);
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("namespace");
        assert_ne!(of("self"), of(&state.pid.expect("pid").to_string()), "{kind}");
    }
}

fn file_system() {
    let pod = Pod::new();
    let script = "cat /etc/version; stat -c %u /bin/busybox /home/user; echo new > /etc/version; cat /etc/version; \
        chown 33 /data; stat -c %u /data; ls / | tr '\\n' ' '";
    let mut start = pod.script("a", script);
    start.spec.process = process(&["sh", "-c", script], vec!["CAP_CHOWN".into()]);
    let (_, text) = pod.run(start);
    assert_eq!(text, "upper\n0\n1000\nnew\n33\nbin data dev etc home proc sys tmp ");
    assert_eq!(fs::read_to_string(layers()[1].join("etc/version")).expect("read"), "upper\n");
    assert_eq!(fs::metadata(layers()[0].join("data")).expect("read").uid(), 0);
    // The host's files are not there, nor any way to them.
    assert_eq!(pod.output_of("cat /proc/self/mountinfo | grep -c ' / /var' || true"), "0\n");
}

fn read_only_root() {
    let pod = Pod::new();
    let mut start =
        pod.script("a", "touch /x 2>&1; touch /dev/shm/ok && echo ok; echo x > /proc/sys/kernel/hostname || echo no");
    if let Some(root) = &mut start.spec.root {
        root.readonly = true;
    }
    let (_, text) = pod.run(start);
    assert_eq!(text, "touch: /x: Read-only file system\nok\nno\n");
}

fn mounts() {
    let pod = Pod::new();
    let config = pod.base.join("config");
    fs::create_dir_all(config.join("sub")).expect("made");
    fs::write(config.join("key"), "value\n").expect("written");
    let resolv = pod.base.join("resolv.conf");
    fs::write(&resolv, "nameserver 10.43.0.10\n").expect("written");
    let data = pod.base.join("data");
    fs::create_dir_all(&data).expect("made");
    fs::set_permissions(&data, fs::Permissions::from_mode(0o777)).expect("mode");
    let host = pod.base.join("host");
    fs::create_dir_all(&host).expect("made");
    let owned = pod.base.join("owned");
    fs::create_dir_all(&owned).expect("made");
    std::os::unix::fs::chown(&owned, Some(ID_BASE + 7), Some(ID_BASE + 7)).expect("chown");

    let mut start = pod.script(
        "a",
        "cat /etc/resolv.conf /etc/config/key; touch /etc/config/x 2>&1; echo hi > /deep/er/data/file; \
         stat -c '%u %a' /etc/config/key /deep/er/data/file; stat -c %u /host /owned; touch /host/x 2>/dev/null || echo denied; \
         df /tmp | tail -n1 | awk '{print $2}'; stat -c %a /tmp; mount | grep -c ' on /deep/er/data type ext4'",
    );
    pod.mount(&mut start, "/etc/resolv.conf", &resolv, &["bind", "idmap", "ro"]);
    pod.mount(&mut start, "/etc/config", &config, &["rbind", "idmap", "ro"]);
    pod.mount(&mut start, "/deep/er/data", &data, &["rbind", "idmap", "nodev"]);
    pod.mount(&mut start, "/host", &host, &["rbind"]);
    pod.mount(&mut start, "/owned", &owned, &["rbind", "idmap"]);
    start.spec.mounts.push(container::spec::Mount::new("/tmp", "tmpfs", "tmpfs", &["size=1m", "mode=1777"]));
    let (state, text) = pod.run(start);
    assert_eq!(
        text,
        "nameserver 10.43.0.10\nvalue\ntouch: /etc/config/x: Read-only file system\n0 644\n0 644\n65534\n7\ndenied\n1024\n1777\n1\n"
    );
    assert_eq!(code(&state), 0);
    // What the container's root writes into its own volume belongs to root in it: the map works both ways.
    assert_eq!(fs::metadata(data.join("file")).expect("written").uid(), 0);
}

fn mount_target_attacks() {
    let pod = Pod::new();
    let outside = pod.base.join("outside");
    fs::create_dir_all(&outside).expect("made");
    let layer = pod.base.join("evil");
    fs::create_dir_all(layer.join("etc")).expect("made");
    symlink(&outside, layer.join("absolute")).expect("link");
    symlink("../../../../../../../../../../..", layer.join("up")).expect("link");
    symlink("/proc/1/root", layer.join("magic")).expect("link");
    symlink("/etc", layer.join("etc/link")).expect("link");
    let source = pod.base.join("source");
    fs::create_dir_all(&source).expect("made");
    fs::write(source.join("marker"), "").expect("written");
    let attempt = |name: &str, target: &str| {
        let mut start =
            pod.script(name, "find / -xdev -maxdepth 3 -name x -o -maxdepth 1 -name absolute | head; ls /up/x");
        start.layers.push(layer.clone());
        pod.mount(&mut start, target, &source, &["rbind", "idmap"]);
        pod.client().start(start).map(|_| pod.ended(name))
    };
    // Resolved inside the root, like everything that the container does itself.
    let ended = attempt("up", "/up/x").expect("started");
    assert_eq!(code(&ended), 0);
    let missing = attempt("absolute", "/absolute/x").expect_err("the link leads nowhere in the image");
    assert!(missing.to_string().contains("/absolute/x"), "{missing}");
    for (name, target) in [("magic", "/magic/tmp"), ("dots", "/a/../../x"), ("proc", "/proc/sys"), ("root", "/")] {
        let refused = attempt(name, target).expect_err(target);
        assert!(refused.to_string().contains("mount"), "{refused}");
    }
    assert_eq!(fs::read_dir(&outside).expect("read").count(), 0);

    let evil = pod.base.join("evil2");
    fs::create_dir_all(evil.join("elsewhere")).expect("made");
    symlink("/elsewhere", evil.join("proc")).expect("link");
    let mut start = pod.script("proclink", "true");
    start.layers = vec![layers()[0].clone(), evil];
    let refused = pod.client().start(start).expect_err("/proc is a link");
    assert!(refused.to_string().contains("no plain directory"), "{refused}");
}

fn privileges() {
    let pod = Pod::new();
    let text = pod.output_of("grep -E 'Cap|NoNewPrivs|Seccomp:' /proc/self/status");
    let none = "0000000000000000";
    assert_eq!(
        text.split_whitespace().collect::<Vec<_>>(),
        [
            "CapInh:",
            none,
            "CapPrm:",
            none,
            "CapEff:",
            none,
            "CapBnd:",
            none,
            "CapAmb:",
            none,
            "NoNewPrivs:",
            "1",
            "Seccomp:",
            "2"
        ]
    );
    let mut start =
        pod.script("b", "grep -E 'Cap(Prm|Eff|Bnd)|NoNew' /proc/self/status; chown 5 /data && echo chowned");
    start.spec.process = process(&["sh", "-c", &start.spec.process.args[2]], vec!["CAP_CHOWN".into()]);
    start.spec.process.no_new_privileges = false;
    let (_, text) = pod.run(start);
    let one = "0000000000000001";
    assert_eq!(
        text.split_whitespace().collect::<Vec<_>>(),
        ["CapPrm:", one, "CapEff:", one, "CapBnd:", one, "NoNewPrivs:", "0", "chowned"]
    );
    let mut start = pod.script("c", "true");
    start.spec.process.capabilities.as_mut().expect("set").bounding = vec!["CAP_NO_SUCH".into()];
    assert!(pod.client().start(start).expect_err("refused").to_string().contains("CAP_NO_SUCH"));
}

fn seccomp() {
    let pod = Pod::new();
    let text = pod.output_of("unshare -U true 2>&1 || true; mount -t tmpfs x /tmp 2>&1 || true");
    assert_eq!(
        text,
        "unshare: unshare(0x10000000): Operation not permitted\nmount: permission denied (are you root?)\n"
    );
    if !has_probe() {
        println!("SKIPPED: no C compiler for the rest of the seccomp test");
        return;
    }
    let expected = "unshare EPERM\nmount EPERM\nkeyctl EPERM\nbpf EPERM\nclone3 ENOSYS\nio_uring EPERM\nvsock EPERM\ninet ok\nicmp ok\nnew ENOSYS\n";
    assert_eq!(pod.output_of("probe"), expected);
    // Even with every capability in its user namespace the filter keeps what has no capability of its own.
    let mut start = pod.script("all", "probe | grep -E 'keyctl|io_uring|vsock'; mount -t tmpfs x /tmp && echo mounted");
    start.spec.process = process(&["sh", "-c", &start.spec.process.args[2]], container::process::all_capabilities());
    assert_eq!(pod.run(start).1, "keyctl EPERM\nio_uring EPERM\nvsock EPERM\nmounted\n");
    let mut start = pod.script("open", "probe | grep -E 'keyctl|inet'");
    start.confinement.seccomp_unconfined = true;
    assert_eq!(pod.run(start).1, "keyctl ok\ninet ok\n");
}

fn masked_paths() {
    let pod = Pod::new();
    let text = pod.output_of(
        "cat /proc/kcore 2>/dev/null | wc -c; cat /proc/keys 2>/dev/null | wc -c; ls -A /sys/firmware | wc -l; ls -A /proc/acpi 2>/dev/null | wc -l; \
         echo 1 > /proc/sysrq-trigger || echo no; echo x > /proc/sys/kernel/core_pattern || echo no; touch /sys/x 2>&1 || true",
    );
    assert_eq!(text, "0\n0\n0\n0\nno\nno\ntouch: /sys/x: Read-only file system\n");
}

fn devices() {
    let pod = Pod::new();
    let text = pod.output_of(
        "for d in null zero full random urandom tty; do test -c /dev/$d && echo -n \"$d \"; done; echo; \
         head -c 4 /dev/zero | wc -c; echo x > /dev/null; ls -l /dev/ptmx /dev/fd /dev/stdout | awk '{print $9 $10 $11}'; \
         ls /dev | tr '\\n' ' '; test -d /dev/pts -a -d /dev/mqueue; stat -c %a /dev/shm; ls /dev/pts",
    );
    assert_eq!(
        text,
        "null zero full random urandom tty \n4\n/dev/fd->/proc/self/fd\n/dev/ptmx->pts/ptmx\n/dev/stdout->/proc/self/fd/1\n\
         fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero 1777\nptmx\n"
    );
    // A device node that the container or its image makes is dead.
    let mut start = pod.script("mknod", "mknod /tmp/zero c 1 5 2>&1; cat /tmp/zero 2>&1 | head -c 20; true");
    start.spec.process = process(&["sh", "-c", &start.spec.process.args[2]], vec!["CAP_MKNOD".into()]);
    assert!(pod.run(start).1.contains("Operation not permitted"));
    // /dev/stdout can be opened again by a user who is not root.
    let mut start = pod.script("user", "echo again > /dev/stdout; echo error > /dev/stderr");
    start.spec.process.user.uid = 1000;
    assert_eq!(pod.run(start).1, "again\n");
}

fn descriptors() {
    let pod = Pod::new();
    assert_eq!(pod.output_of("exec ls /proc/self/fd | tr '\\n' ' '").trim(), "0 1 2 3");
    pod.client().start(pod.script("a", "sleep 1000")).expect("started");
    assert_eq!(pod.exec_output("a", &["ls", "/proc/self/fd"]), (0, "0\n1\n2\n3\n".into()));
    assert_eq!(pod.exec_output("a", &["ls", "/proc/1/fd"]), (0, "0\n1\n2\n".into()));
}

/// CVE-2019-5736: a container of the host's root tries to write to the binary that executes it.
fn executable_is_safe() {
    let own = std::env::current_exe().expect("own path");
    let before = fs::read(&own).expect("read");
    let pod = Pod::with(|s| s.id_map = None);
    // Looks at every process that comes by, and keeps trying to write to what it executes.
    let hunt = "i=0; while [ $i -lt 400 ]; do for p in /proc/[0-9]*; do \
        case $p in /proc/1|/proc/$$) ;; *) (echo broken > $p/exe) 2>/dev/null && echo WRITTEN $p;; esac; done; i=$((i+1)); done; echo done";
    let mut start = pod.script("hunter", hunt);
    let all = container::process::all_capabilities();
    start.spec.process = process(&["sh", "-c", hunt], all);
    let log = start.log_path.clone();
    pod.client().start(start).expect("started");
    while pod.state("hunter").is_some_and(|s| matches!(s.phase, Phase::Running { .. })) {
        let _ = pod.client().exec("hunter", command(&["true"]), Default::default()).map(|mut live| exit(&mut live));
    }
    assert_eq!(output(&log, "stdout"), "done\n");
    // The program itself is /proc/self/exe: whatever comes of that, it runs none of the host's code with rights.
    let outcome = pod.client().start(pod.command("self", &["/proc/self/exe"]));
    if let Ok(state) = outcome {
        pod.ended(&state.name);
    }
    assert!(fs::read(&own).expect("read") == before, "the binary was changed");
}

fn host_users() {
    let pod = Pod::with(|s| s.id_map = None);
    let text = pod.output_of(
        "id -u; awk '{print $2}' /proc/self/uid_map; stat -c %u /home/user; mknod /tmp/z c 1 5 2>&1 || true",
    );
    assert_eq!(text, "0\n0\n1000\nmknod: /tmp/z: Operation not permitted\n");
    let mut start = pod.script("mknod", "mknod /tmp/zero c 1 5 && head -c 1 /tmp/zero 2>&1");
    start.spec.process = process(&["sh", "-c", &start.spec.process.args[2]], vec!["CAP_MKNOD".into()]);
    assert_eq!(pod.run(start).1, "head: /tmp/zero: Permission denied\n");
}

fn shared_pid_namespace() {
    let pod = Pod::with(|s| s.share_pid = true);
    pod.client().start(pod.script("a", "sleep 1001 & wait")).expect("started");
    pod.client().start(pod.script("b", "sleep 1002 & sleep 1003")).expect("started");
    let seen = eventually("all are seen", || {
        let (_, text) = pod.exec_output("b", &["ps", "-o", "pid,args"]);
        ["sleep 1001", "sleep 1002", "sleep 1003"].iter().all(|s| text.contains(s)).then_some(text)
    });
    // The first process is the sandbox's: it does not show, and shows nothing of the host.
    assert!(!seen.lines().any(|l| l.trim().starts_with("1 ")), "{seen}");
    assert_ne!(pod.exec_output("b", &["ls", "/proc/1/root/"]).0, 0);
    // One container's end leaves the other, and nothing of itself.
    pod.client().signal("a", 9).expect("signalled");
    pod.ended("a");
    let (_, text) = pod.exec_output("b", &["ps", "-o", "args"]);
    assert!(!text.contains("1001") && text.contains("1002"), "{text}");
}

fn memory_limit() {
    let pod = Pod::new();
    let mut start = pod.script("a", "dd if=/dev/zero of=/dev/null bs=64M count=1; echo survived");
    start.spec.linux.resources.memory = Some(Memory { limit: Some(16 << 20), ..Default::default() });
    let log = start.log_path.clone();
    let (state, _) = pod.run(start);
    let text = fs::read_to_string(log).expect("log");
    if text.contains("survived") && !std::path::Path::new("/sys/fs/cgroup/memory").exists() {
        println!("SKIPPED: no memory controller");
        return;
    }
    // The shell lives on: its child was killed. The count says so, the exit code does not.
    assert!(matches!(state.phase, Phase::Exited { code: 0, oom_killed: false, .. }), "{state:?} {text}");
    let mut start = pod.command("b", &["dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"]);
    start.spec.linux.resources.memory = Some(Memory { limit: Some(16 << 20), ..Default::default() });
    let (state, _) = pod.run(start);
    assert!(matches!(state.phase, Phase::Exited { code: 137, signal: Some(9), oom_killed: true, .. }), "{state:?}");
}

fn pids_limit() {
    let pod = Pod::new();
    let mut start = pod.script("a", "for i in 1 2 3 4 5 6 7 8 9; do sleep 5 & done; echo all");
    start.spec.linux.resources.pids = Some(Pids { limit: Some(5) });
    let log = start.log_path.clone();
    let (_, text) = pod.run(start);
    let errors = output(&log, "stderr");
    assert!(errors.contains("can't fork") && !text.contains("all"), "{text} {errors}");
    let (state, _) = {
        let mut start = pod.script("b", "true");
        start.spec.linux.resources.pids = Some(Pids { limit: Some(1) });
        pod.run(start)
    };
    assert_eq!(code(&state), 0);
}

fn cgroup_view() {
    let pod = Pod::new();
    let mut start = pod.script(
        "a",
        "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null; cat /proc/self/cgroup; \
        touch /sys/fs/cgroup/x 2>/dev/null || echo ro",
    );
    start.spec.linux.resources.memory = Some(Memory { limit: Some(64 << 20), ..Default::default() });
    let (_, text) = pod.run(start);
    assert!(text.starts_with("67108864\n"), "{text}");
    assert!(!text.contains("atoll-test"), "the host's path shows: {text}");
    assert!(text.ends_with("ro\n"), "{text}");
}

fn sysctls() {
    let pod = Pod::with(|s| {
        s.sysctl.insert("net.core.somaxconn".into(), "99".into());
        s.sysctl.insert("kernel.shmmni".into(), "77".into());
    });
    let text = pod.output_of(
        "cat /proc/sys/net/core/somaxconn /proc/sys/kernel/shmmni /proc/sys/net/ipv4/ip_unprivileged_port_start",
    );
    assert_eq!(text, "99\n77\n0\n");
    assert_ne!(fs::read_to_string("/proc/sys/kernel/shmmni").expect("read"), "77\n");
}

fn network() {
    let pod = Pod::new();
    let mut start = pod.script("a", "ls /sys/class/net; probe | grep icmp || echo icmp ok; nc -l -p 80 -e echo hello");
    start.spec.process.user.uid = 1000;
    let log = start.log_path.clone();
    let state = pod.client().start(start).expect("started");
    let text = eventually("it has looked", || Some(output(&log, "stdout")).filter(|t| t.lines().count() >= 2));
    assert_eq!(text, "lo\nicmp ok\n");
    let path = std::path::PathBuf::from(format!("/proc/{}/ns/net", state.pid.expect("pid")));
    let mut stream = eventually("port 80 is open", || {
        let path = path.clone();
        std::thread::spawn(move || container::client::connect_in(Some(&path), 80)).join().expect("thread").ok()
    });
    let mut text = String::new();
    std::io::Read::read_to_string(&mut stream, &mut text).expect("read");
    assert_eq!(text, "hello\n");
}

fn host_network() {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener};
    let host = container::shim::protocol::Network::Host;
    let pod = Pod::with(|s| (s.network, s.host_network, s.scoped) = (host, true, false));
    let text = pod.output_of("ls /sys/class/net | sort | tr '\\n' ' '");
    let mut links: Vec<String> = fs::read_dir("/sys/class/net")
        .expect("links")
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into())
        .collect();
    links.sort();
    assert_eq!(text.trim(), links.join(" "));
    if !has_probe() {
        println!("SKIPPED: no C compiler for the abstract sockets");
        return;
    }
    let name = format!("atoll-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).expect("address");
    let _listener = UnixListener::bind_addr(&address).expect("bound");
    assert_eq!(pod.output_of(&format!("probe {name}")), "abstract ok\n");
    let mut start = pod.command("confined", &["probe", &name]);
    start.confinement.scope_abstract_sockets = true;
    let (_, text) = pod.run(start);
    let log = fs::read_to_string(pod.sandbox.dir.join("shim.log")).expect("log");
    if log.contains("Landlock cannot") {
        println!("SKIPPED: Landlock here knows no scopes");
    } else {
        assert_eq!(text, "abstract EPERM\n");
    }
}

/// A limit that cannot hold refuses the start; it is never left out.
fn tiny_memory() {
    let pod = Pod::new();
    let mut start = pod.script("a", "echo runs");
    start.spec.linux.resources.memory = Some(Memory { limit: Some(64 << 10), ..Default::default() });
    match pod.client().start(start) {
        Err(e) => println!("  refused: {e}"),
        Ok(_) => {
            let state = pod.ended("a");
            assert_ne!(code(&state), 0, "a program ran in 64 KiB");
        }
    }
    let mut start = pod.script("b", "echo runs");
    start.spec.linux.resources.memory = Some(Memory { limit: Some(6 << 20), ..Default::default() });
    assert_eq!(pod.run(start).1, "runs\n");
}

/// The profile lets the usual things through: threads, children, timers, sockets, locks, of a large dynamic program.
fn ordinary_programs() {
    if !std::path::Path::new("/usr/bin/python3").exists() {
        println!("SKIPPED: no /usr/bin/python3");
        return;
    }
    let program = "
import asyncio, concurrent.futures, mmap, multiprocessing, os, select, signal, socket, sqlite3, subprocess, tempfile, threading
def double(n): return n * 2
if __name__ == '__main__':
    with concurrent.futures.ThreadPoolExecutor(4) as pool: assert sum(pool.map(double, range(9))) == 72
    with multiprocessing.Pool(2) as pool: assert sum(pool.map(double, range(9))) == 72
    assert subprocess.check_output(['/bin/echo', 'x']) == b'x\\n'
    async def serve():
        async def answer(r, w): w.write(await r.readline()); await w.drain(); w.close()
        server = await asyncio.start_server(answer, '127.0.0.1', 0)
        r, w = await asyncio.open_connection(*server.sockets[0].getsockname())
        w.write(b'hello\\n'); assert await r.readline() == b'hello\\n'; await asyncio.sleep(0.01)
    asyncio.run(serve())
    d = sqlite3.connect('/data/x.db'); d.execute('create table t(a)'); d.execute('insert into t values(1)'); d.commit()
    with tempfile.TemporaryFile() as f: f.write(b'a' * 5000); f.flush(); mmap.mmap(f.fileno(), 0).close()
    os.memfd_create('x'); os.eventfd(0); os.sched_getaffinity(0); os.getrandom(8); signal.setitimer(signal.ITIMER_REAL, 100)
    a, b = socket.socketpair(); a.send(b'1'); assert select.select([b], [], [], 5)[0]
    print('all well')
";
    let pod = Pod::new();
    let mut start = pod.command("a", &["/usr/bin/python3", "/main.py"]);
    for path in ["/usr", "/lib", "/lib64"].iter().filter(|p| std::path::Path::new(p).exists()) {
        pod.mount(&mut start, path, std::path::Path::new(path), &["rbind", "ro"]);
    }
    let script = pod.base.join("main.py");
    fs::write(&script, program).expect("written");
    pod.mount(&mut start, "/main.py", &script, &["bind", "idmap", "ro"]);
    let log = start.log_path.clone();
    let (_, text) = pod.run(start);
    assert_eq!(text, "all well\n", "{}", output(&log, "stderr"));
}
