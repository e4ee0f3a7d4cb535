//! Other layouts of control groups than this host's, in mount namespaces of their own.

use std::process::Command;

pub const TESTS: &[(&str, fn())] =
    &[("layouts::version_2_alone", version_2_alone), ("layouts::no_control_groups", no_control_groups)];

/// Runs some of the other tests with `/sys/fs/cgroup` made anew.
fn again(prepare: &str, tests: &[&str]) {
    let own = std::env::current_exe().expect("own path");
    let script = format!("{prepare} && exec \"$0\" \"$@\"");
    let output = Command::new("/bin/busybox")
        .args(["unshare", "-m", "--propagation", "private", "/bin/busybox", "sh", "-c", &script])
        .arg(own)
        .args(tests)
        .output()
        .expect("executed");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    assert!(said.contains(&format!("{} passed", tests.len())), "{said}");
}

fn version_2_alone() {
    again(
        "mount -t cgroup2 none /sys/fs/cgroup",
        &[
            "isolation::file_system",
            "isolation::shared_pid_namespace",
            "lifecycle::exit_codes",
            "lifecycle::shim_killed",
            "lifecycle::leaves_nothing",
            "streams::exec_abandoned",
        ],
    );
}

fn no_control_groups() {
    again(
        "mount -t tmpfs none /sys/fs/cgroup",
        &["isolation::file_system", "lifecycle::exit_codes", "streams::exec_stdin"],
    );
}
