use super::*;
use futures_util::StreamExt;
use proptest::prelude::*;
use std::io::Write;

fn entry(second: u32, stream: &str, tag: &str, text: &str) -> String {
    format!("2025-01-31T12:00:{second:02}.000000001Z {stream} {tag} {text}\n")
}

async fn read(path: &Path, options: LogOptions) -> String {
    let mut stream = stream(path.to_owned(), options, || false);
    let mut out = Vec::new();
    while let Some(piece) = stream.next().await {
        out.extend(piece.unwrap());
    }
    String::from_utf8(out).unwrap()
}

fn sample() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.log");
    let old = [entry(1, "stdout", "F", "one"), entry(2, "stderr", "F", "two")].concat();
    std::fs::write(dir.path().join("0.log.1"), old).unwrap();
    let new = [
        entry(3, "stdout", "P", "thr"),
        entry(4, "stdout", "F", "ee"),
        "garbage\n".into(),
        entry(5, "stdout", "F", ""),
        entry(6, "stdout", "F", "six"),
    ]
    .concat();
    std::fs::write(&path, new + "2025-01-31T12:00:07Z stdout F half").unwrap();
    (dir, path)
}

#[tokio::test]
async fn options() {
    let (_dir, path) = sample();
    let go = |o: LogOptions| read(&path, o);
    let all = LogOptions::default();
    assert_eq!(go(all.clone()).await, "one\ntwo\nthree\n\nsix\n");
    let tail = |n| LogOptions { tail_lines: Some(n), ..LogOptions::default() };
    for (n, want) in [
        (0, ""),
        (1, "six\n"),
        (2, "\nsix\n"),
        (3, "three\n\nsix\n"),
        (4, "two\nthree\n\nsix\n"),
        (99, "one\ntwo\nthree\n\nsix\n"),
    ] {
        assert_eq!(go(tail(n)).await, want, "tail {n}");
    }
    assert_eq!(go(LogOptions { limit_bytes: Some(5), ..all.clone() }).await, "one\nt");
    assert_eq!(go(LogOptions { stream: "Stderr".into(), ..all.clone() }).await, "two\n");
    let since = nanos(b"2025-01-31T12:00:05Z");
    assert_eq!(go(LogOptions { since_nanos: since, ..all.clone() }).await, "\nsix\n");
    let stamped = go(LogOptions { timestamps: true, tail_lines: Some(3), ..all }).await;
    assert!(stamped.starts_with("2025-01-31T12:00:03.000000001Z three\n2025-01-31T12:00:05"), "{stamped}");
    assert_eq!(tail_text(&path, 6, 80), "e\n\nsix\n"[1..].to_owned());
}

#[tokio::test]
async fn a_missing_log_is_empty() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(read(&dir.path().join("0.log"), LogOptions { tail_lines: Some(3), ..LogOptions::default() }).await, "");
}

#[tokio::test]
async fn follows_through_rotation_to_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.log");
    let alive = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let asked = alive.clone();
    let options = LogOptions { follow: true, ..LogOptions::default() };
    let mut stream = stream(path.clone(), options, move || asked.load(std::sync::atomic::Ordering::SeqCst));
    let mut seen = String::new();
    let mut file = File::create(&path).unwrap();
    for index in 0..6 {
        file.write_all(entry(index, "stdout", "F", &format!("line {index}")).as_bytes()).unwrap();
        if index == 3 {
            std::fs::rename(&path, rotated(&path)).unwrap();
            file = File::create(&path).unwrap();
        }
        while !seen.contains(&format!("line {index}\n")) {
            seen.push_str(std::str::from_utf8(&stream.next().await.unwrap().unwrap()).unwrap());
        }
    }
    file.write_all(entry(9, "stdout", "F", "last").as_bytes()).unwrap();
    alive.store(false, std::sync::atomic::Ordering::SeqCst);
    while let Some(piece) = stream.next().await {
        seen.push_str(std::str::from_utf8(&piece.unwrap()).unwrap());
    }
    let want: String = (0..6).map(|i| format!("line {i}\n")).collect::<String>() + "last\n";
    assert_eq!(seen, want);
}

fn lines() -> impl Strategy<Value = Vec<(bool, String)>> {
    prop::collection::vec((any::<bool>(), "[a-z ]{0,40}"), 0..60)
}

proptest! {
    #[test]
    fn tail_is_the_end_of_all(entries in lines(), split in 0usize..60, n in 0u64..70) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        // The last entry ends its line, and so does the one before rotation: rotation happens between lines.
        let split = split.min(entries.len());
        let mut text = [String::new(), String::new()];
        for (index, (partial, words)) in entries.iter().enumerate() {
            let partial = *partial && index + 1 != split && index + 1 != entries.len();
            let tag = if partial { "P" } else { "F" };
            text[usize::from(index >= split)].push_str(&entry(0, "stdout", tag, words));
        }
        std::fs::write(rotated(&path), &text[0]).unwrap();
        std::fs::write(&path, &text[1]).unwrap();
        let all = runtime.block_on(read(&path, LogOptions::default()));
        let tail = runtime.block_on(read(&path, LogOptions { tail_lines: Some(n), ..LogOptions::default() }));
        let whole: Vec<&str> = all.split_inclusive('\n').collect();
        let from = whole.len().saturating_sub(usize::try_from(n).unwrap());
        prop_assert_eq!(tail, whole[from..].concat());
    }

    #[test]
    fn foreign_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000), n in 0u64..5) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        std::fs::write(&path, &bytes).unwrap();
        let _ = tail_offset(&path, n).unwrap();
        let _ = tail_text(&path, 100, 10);
    }
}

#[tokio::test]
async fn nothing_is_lost_at_rotation() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.log");
    let alive = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let (asked, done, at) = (alive.clone(), alive.clone(), path.clone());
    let (tell, mut lines_seen) = tokio::sync::watch::channel(0usize);
    let writer = tokio::spawn(async move {
        let mut file = File::create(&at).unwrap();
        let mut rotated_at = 0;
        for index in 0..60usize {
            file.write_all(entry(0, "stdout", "F", &format!("line {index}")).as_bytes()).unwrap();
            if index % 7 == 6 {
                // One rotation at a time: only `.1` is kept.
                lines_seen.wait_for(|seen| *seen >= rotated_at).await.unwrap();
                std::fs::rename(&at, rotated(&at)).unwrap();
                file = File::create(&at).unwrap();
                rotated_at = index + 1;
            }
        }
        done.store(false, std::sync::atomic::Ordering::SeqCst);
    });
    while !path.exists() {
        tokio::task::yield_now().await;
    }
    let options = LogOptions { follow: true, ..LogOptions::default() };
    let mut stream = stream(path, options, move || asked.load(std::sync::atomic::Ordering::SeqCst));
    let mut seen = String::new();
    while let Some(piece) = stream.next().await {
        seen.push_str(std::str::from_utf8(&piece.unwrap()).unwrap());
        tell.send_replace(seen.lines().count());
    }
    writer.await.unwrap();
    let want: String = (0..60).map(|i| format!("line {i}\n")).collect();
    assert_eq!(seen, want);
}
