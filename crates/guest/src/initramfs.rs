//! The archive that a kernel unpacks before it starts process 1: "newc" of cpio(5), with the agent as `/init` and the
//! modules that it loads, in that order.

/// Modules in the order in which they can be loaded, each with its file's bytes.
pub fn build(agent: &[u8], modules: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut out =
        Vec::with_capacity(agent.len() + modules.iter().map(|(_, bytes)| bytes.len() + 256).sum::<usize>() + 1024);
    let mut number = 1;
    let mut add = |name: &str, mode: u32, bytes: &[u8]| {
        entry(&mut out, number, name, mode, (0, 0), bytes);
        number += 1;
    };
    for directory in ["dev", "proc", "sys", "root", "modules"] {
        add(directory, 0o040_755, &[]);
    }
    add("init", 0o100_755, agent);
    for (at, (name, bytes)) in modules.iter().enumerate() {
        add(&format!("modules/{at:03}-{name}"), 0o100_644, bytes);
    }
    // what the kernel opens for process 1's standard streams
    entry(&mut out, number, "dev/console", 0o020_600, (5, 1), &[]);
    entry(&mut out, 0, "TRAILER!!!", 0, (0, 0), &[]);
    out
}

fn entry(out: &mut Vec<u8>, inode: u32, name: &str, mode: u32, device: (u32, u32), bytes: &[u8]) {
    let size = bytes.len() as u32;
    let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name.len() as u32 + 1, 0];
    out.extend_from_slice(b"070701");
    for field in fields {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    pad(out);
    out.extend_from_slice(bytes);
    pad(out);
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpio_reads_it() {
        let archive = build(b"agent", &[("virtio.ko".into(), vec![1; 5]), ("overlay.ko".into(), vec![2; 7])]);
        assert_eq!(archive.len() % 4, 0);
        let mut child = match std::process::Command::new("cpio")
            .args(["-t", "--quiet"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
        {
            Ok(child) => child,
            Err(e) => return println!("SKIPPED: cpio: {e}"),
        };
        std::io::Write::write_all(child.stdin.as_mut().expect("stdin"), &archive).expect("written");
        let output = child.wait_with_output().expect("output");
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(
            text.lines().collect::<Vec<_>>(),
            [
                "dev",
                "proc",
                "sys",
                "root",
                "modules",
                "init",
                "modules/000-virtio.ko",
                "modules/001-overlay.ko",
                "dev/console"
            ]
        );
    }
}
