//! `ADD` of what is elsewhere, `COPY --parents`, `RUN --mount=type=ssh`.

use super::*;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;

/// Answers each path with a status line, headers and a body, until the test ends.
fn serve(answers: Vec<(&'static str, &'static str, Vec<u8>)>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answers = answers.clone();
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream);
                let mut first = String::new();
                let _ = reader.read_line(&mut first);
                let path = first.split_whitespace().nth(1).unwrap_or_default().to_owned();
                let mut line = String::from("x");
                while !line.trim().is_empty() {
                    line.clear();
                    if reader.read_line(&mut line).unwrap_or(0) == 0 {
                        return;
                    }
                }
                let found = answers.iter().find(|(of, ..)| *of == path.split('?').next().unwrap_or_default());
                let (head, body) = found.map_or(("404 Not Found", &[][..]), |(_, head, body)| (head, body));
                let stream = reader.get_mut();
                let _ = write!(stream, "HTTP/1.1 {head}\r\nConnection: close\r\n\r\n");
                let _ = stream.write_all(body);
            });
        }
    });
    format!("http://{address}")
}

fn gzipped_tar(name: &str, content: &str) -> Vec<u8> {
    let mut plain = crate::tar::header(name.as_bytes(), b'0', content.len() as u64, 0o644, b"").unwrap().to_vec();
    plain.extend(content.as_bytes());
    plain.resize(plain.len().next_multiple_of(512) + 1024, 0);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    gzip.finish().unwrap()
}

#[test]
fn files_are_fetched_and_checked() {
    let Some(b) = bench() else { return };
    let archive = gzipped_tar("in/side", "unpacked");
    let url = serve(vec![
        (
            "/f/a%20b.txt",
            "200 OK\r\nLast-Modified: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Length: 5",
            b"hello".to_vec(),
        ),
        ("/moved", "302 Found\r\nLocation: /f/a%20b.txt", Vec::new()),
        ("/loop", "302 Found\r\nLocation: /loop", Vec::new()),
        ("/a.tgz", "200 OK", archive.clone()),
        ("/", "200 OK\r\nContent-Length: 1", b"x".to_vec()),
        ("/secret", "403 Forbidden\r\nContent-Length: 2", b"no".to_vec()),
    ]);
    let digest = Digest::of(b"hello");
    b.build(&format!(
        "FROM base:1\nADD --checksum={digest} {url}/f/a%20b.txt /one/\nADD --chmod=u+x {url}/moved /two\nADD {url}/a.tgz /three.tgz\n\
         ADD --unpack --chown=web {url}/a.tgz /four/\n"
    ));
    assert_eq!(
        (b.text("one/a b.txt"), b.text("two"), b.text("four/in/side")),
        ("hello".into(), "hello".into(), "unpacked".into())
    );
    let one = b.stat("one/a b.txt").unwrap();
    assert_eq!((one.st_mode & 0o7777, one.st_mtime, one.st_uid), (0o600, 784_111_777, 0));
    assert_eq!(b.stat("two").unwrap().st_mode & 0o7777, 0o700);
    assert_eq!(b.stat("four/in/side").unwrap().st_uid, 1000);
    assert_eq!(b.stat("three.tgz").unwrap().st_size as usize, archive.len());

    let wrong = Digest::of(b"other");
    for (line, words) in [
        (format!("ADD --checksum={wrong} {url}/moved /x"), "expected digest"),
        (format!("ADD {url}/none /x"), "404"),
        (format!("ADD {url}/loop /x"), "redirects"),
        (format!("ADD {url}/secret /x"), "refused (403)"),
        (format!("ADD {url}/ /x/"), "names no file"),
        ("ADD ftp://x/y /x".to_owned(), "it is http, https, git or ssh"),
        (format!("ADD --checksum=md5:1 {url}/moved /x"), "digest"),
        (format!("COPY --checksum={digest} a /x"), "no flag --checksum"),
        (format!("ADD http://user:pass@{} /x", &url[7..]), "no user"),
    ] {
        let why = b.refusal(&format!("FROM base:1\n{line}\n"));
        assert!(why.contains(words) && why.contains(":2:"), "{line}: {why}");
    }
    // Local archives are not unpacked where that is asked for.
    fs::write(b.context("a.tgz"), &archive).unwrap();
    b.build("FROM base:1\nADD --unpack=false a.tgz /five.tgz\n");
    assert_eq!(b.stat("five.tgz").unwrap().st_size as usize, archive.len());
}

#[test]
fn a_fetched_file_with_a_known_digest_is_not_fetched_again() {
    let Some(b) = bench() else { return };
    let url = serve(vec![("/f", "200 OK\r\nContent-Length: 5", b"hello".to_vec())]);
    let text = format!("FROM base:1\nADD --checksum={} {url}/f /f\n", Digest::of(b"hello"));
    let first = b.build(&text);
    let gone = text.replace(&url, "http://127.0.0.1:1");
    b.build(&gone);
    assert_eq!(b.text("f"), "hello");
    assert_eq!(b.build(&text), first);
}

fn git(dir: &Path, args: &[&str]) -> String {
    let output = Command::new("git")
        .args(["-c", "user.name=x", "-c", "user.email=x@x", "-c", "init.defaultBranch=main", "-c", "safe.directory=*"])
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn repositories_are_fetched() {
    let Some(b) = bench() else { return };
    if !Command::new("git").arg("--version").output().is_ok_and(|o| o.status.success()) {
        println!("SKIPPED: git is not here");
        return;
    }
    let source = b.dir.path().join("source");
    fs::create_dir_all(source.join("docs")).unwrap();
    git(&source, &["init", "-q"]);
    fs::write(source.join("docs/a"), "one").unwrap();
    git(&source, &["add", "."]);
    git(&source, &["commit", "-qm", "1"]);
    git(&source, &["tag", "v1"]);
    let first = git(&source, &["rev-parse", "HEAD"]);
    fs::write(source.join("docs/a"), "two").unwrap();
    git(&source, &["commit", "-qam", "2"]);
    // A file server is all that git's oldest protocol over HTTP needs.
    git(&source, &["clone", "-q", "--bare", ".", "../bare.git"]);
    let bare = b.dir.path().join("bare.git");
    git(&bare, &["repack", "-qad"]);
    git(&bare, &["update-server-info"]);
    let mut answers = Vec::new();
    let mut todo = vec![bare.clone()];
    while let Some(path) = todo.pop() {
        if path.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            continue;
        }
        let name = format!("/bare.git/{}", path.strip_prefix(&bare).unwrap().display());
        answers.push((&*name.leak(), "200 OK", fs::read(&path).unwrap()));
    }
    let url = format!("{}/bare.git", serve(answers));
    b.build(&format!(
        "FROM base:1\nADD {url} /src\nADD --checksum={first} {url}#v1:docs /old/\nADD --keep-git-dir {url} /all\n"
    ));
    assert_eq!((b.text("src/docs/a"), b.text("old/a")), ("two".into(), "one".into()));
    assert!(b.stat("src/.git").is_none() && b.stat("all/.git/HEAD").is_some());
    for (line, words) in [
        (format!("ADD {url}#none /x"), "git:"),
        (format!("ADD --checksum={first} {url} /x"), "is commit"),
        (format!("ADD {url} etc /x/"), "no other source"),
        (format!("ADD {url}#v1:nowhere /x"), "no such file"),
    ] {
        let why = b.refusal(&format!("FROM base:1\n{line}\n"));
        assert!(why.contains(words), "{line}: {why}");
    }
    let left = fs::read_dir(std::env::temp_dir()).unwrap().flatten();
    let own = format!("atoll-git-{}-", std::process::id());
    assert_eq!(left.filter(|e| e.file_name().to_string_lossy().starts_with(&own)).count(), 0, "a checkout was left");
}

#[test]
fn parents_are_kept() {
    let Some(b) = bench() else { return };
    for name in ["x/a/one.txt", "x/b/two.txt", "x/b/deep/three.txt", "x/b/four.md", "y/five.txt"] {
        b.file(name, name);
    }
    fs::set_permissions(b.context("x/b/deep"), fs::Permissions::from_mode(0o711)).unwrap_or_default();
    b.build("FROM base:1\nCOPY --parents x/a/one.txt y /all/\nCOPY --parents x/./b/two.txt /pivot/\nCOPY --parents ./x/**/*.txt /wild/\n");
    for path in ["all/x/a/one.txt", "all/y/five.txt", "pivot/b/two.txt", "wild/x/a/one.txt", "wild/x/b/deep/three.txt"]
    {
        assert!(b.stat(path).is_some(), "{path}");
    }
    for path in ["all/x/b", "pivot/x", "wild/x/b/four.md", "wild/y"] {
        assert!(b.stat(path).is_none(), "{path}");
    }
    assert!(b.refusal("FROM base:1\nCOPY --parents=perhaps x /y/\n").contains("true or false"));
}

#[test]
fn an_agent_is_there_while_it_runs() {
    let Some(b) = bench() else { return };
    let socket = b.dir.path().join("agent");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let text = "FROM base:1\nRUN --mount=type=ssh test -S $SSH_AUTH_SOCK && echo yes > /seen\n";
    let options = BuildOptions { ssh: vec![("default".into(), socket)], ..b.options(text) };
    b.build_with(&options).unwrap();
    assert_eq!(b.text("seen"), "yes\n");
    assert!(b.stat("run/buildkit/ssh_agent.0").is_none());
    let why = b.refusal("FROM base:1\nRUN --mount=type=ssh,id=other,required true\n");
    assert!(why.contains("--ssh other"), "{why}");
    b.build("FROM base:1\nRUN --mount=type=ssh test -z \"$SSH_AUTH_SOCK\" && echo no > /seen\n");
    assert_eq!(b.text("seen"), "no\n");
}
