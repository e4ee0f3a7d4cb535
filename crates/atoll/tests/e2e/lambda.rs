//! Lambda functions: the runtime API with a `bootstrap` in shell, and with the public Python runtime interface client.

use crate::cluster::{Cluster, Said};
use crate::{Outcome, Test};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

pub const TESTS: &[Test] = &[
    ("function_lambda_bootstrap", bootstrap),
    ("function_lambda_bad_input", bad_input),
    ("function_lambda_python_client", python),
];

pub const BUSYBOX: &str = "127.0.0.1:5000/test/busybox:1";

/// A runtime in shell: what to do stands in the event.
const BOOTSTRAP: &str = r#"#!/bin/sh
api=http://$AWS_LAMBDA_RUNTIME_API/2018-06-01/runtime
field() { tr -d '\r' < /tmp/head | sed -n "s/^ *$1: *//p" | head -n 1; }
while :; do
  wget -S -O /tmp/event $api/invocation/next 2>/tmp/head || exit 1
  id=$(field lambda-runtime-aws-request-id)
  echo "working on $id"
  case "$(cat /tmp/event)" in
  *please-fail*) wget -q -O - --post-data '{"errorMessage":"as asked","errorType":"Asked"}' $api/invocation/$id/error ;;
  *please-hang*) sleep 1000 ;;
  *please-exit*) exit 3 ;;
  *please-lie*) wget -q -O - --post-data '{}' $api/invocation/no-such/response
     wget -q -O - --post-data "{\"statusCode\":200,\"body\":\"refused $?\"}" $api/invocation/$id/response ;;
  *) now=$(date +%s)000; left=$(( ($(field lambda-runtime-deadline-ms) - now) / 1000 ))
     seen="$AWS_LAMBDA_FUNCTION_NAME $_HANDLER $(field lambda-runtime-invoked-function-arn) left=$left $(field lambda-runtime-trace-id)"
     printf '{"statusCode":201,"headers":{"x-seen":"%s"},"cookies":["a=1","b=2"],"body":"%s","isBase64Encoded":true}' \
       "$seen" "$(base64 < /tmp/event | tr -d '\n')" > /tmp/result
     wget -q -O - --post-file /tmp/result $api/invocation/$id/response ;;
  esac
done
"#;

pub fn function(c: &Cluster, ns: &str, args: &[&str]) -> Said {
    let data = c.data().to_string_lossy().into_owned();
    let (command, rest) = args.split_first().unwrap();
    c.atoll(&[&["function", command, "--data-dir", &data, "-n", ns], rest].concat())
}

/// A zip of files, by Python's own writer of zips.
pub fn zip(c: &Cluster, name: &str, files: &[(&str, &str, u32)]) -> PathBuf {
    let dir = c.scratch(&format!("{name}-files"));
    fs::create_dir_all(&dir).unwrap();
    for (file, content, mode) in files {
        fs::write(dir.join(file), content).unwrap();
        fs::set_permissions(dir.join(file), fs::Permissions::from_mode(*mode)).unwrap();
    }
    let archive = c.scratch(&format!("{name}.zip"));
    let _ = fs::remove_file(&archive);
    let mut command = Command::new("python3");
    command.args(["-m", "zipfile", "-c"]).arg(&archive).args(files.iter().map(|(file, ..)| dir.join(file)));
    let made = made_from(&mut command);
    assert!(made.ok, "{}", made.err);
    archive
}

fn made_from(command: &mut Command) -> Said {
    Said::of(command.output().unwrap())
}

fn bootstrap(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-lambda");
    let package = zip(c, "shell", &[("bootstrap", BOOTSTRAP, 0o755)]);
    let file = package.to_str().unwrap();
    let deploy = ["deploy", "shell", file, "--lambda", "--base", BUSYBOX, "--handler", "my.handler", "--timeout", "3"];
    let told = function(c, &ns, &[&deploy[..], &["--max-scale", "1", "--route", "lambda.localhost/"]].concat()).good();
    assert!(told.contains("127.0.0.1:5000/functions/t-lambda/shell:"), "{told}");
    let data = ["--data", "hello"];
    let said = function(c, &ns, &[&["invoke", "shell", "-i", "--path", "/a/b?x=1&x=2"], &data[..]].concat()).good();
    let invoke = |what: &str| function(c, &ns, &["invoke", "shell", "--path", &format!("/{what}")]);
    let (head, body) = said.split_once("\n\n").unwrap();
    assert!(head.contains("201 Created") && head.contains("set-cookie: a=1\nset-cookie: b=2"), "{head}");
    let seen = "x-seen: shell my.handler arn:aws:lambda:us-east-1:000000000000:function:shell left=";
    assert!(head.contains(seen) && head.contains("Root=1-"), "{head}");
    let event = crate::cluster::json(body);
    assert_eq!((&event["version"], &event["rawPath"]), (&"2.0".into(), &"/a/b".into()));
    assert_eq!(event["queryStringParameters"]["x"], "1,2");
    assert_eq!((&event["body"], &event["isBase64Encoded"]), (&"aGVsbG8=".into(), &true.into()));
    assert_eq!(event["requestContext"]["http"]["method"], "POST");
    assert!(function(c, &ns, &["logs", "shell"]).good().contains("working on "));

    // Its errors are its own; other ids than the current one are refused.
    assert!(invoke("please-fail").bad().contains("500"));
    assert!(invoke("please-lie").good().contains("refused 1"));
    // The runtime API is on the pod's loopback alone.
    let address = ["get", "pods", "-n", &ns, "-o", "jsonpath={.items[0].status.podIP}"];
    let address = c.kubectl(&address).good();
    c.apply(&crate::cluster::sleeper("neighbour", &ns));
    c.wait_ready(&ns, "pod/neighbour");
    let reach = |port: &str| c.kubectl(&["exec", "-n", &ns, "neighbour", "--", "nc", "-w", "5", &address, port]);
    reach("8080").good();
    reach("9001").bad();

    // The daemon may be killed meanwhile; runtime and function go on.
    c.stop(rustix::process::Signal::KILL);
    c.up();
    c.until("it serves again", || invoke("again").ok);
    // A process that ends, or hangs, loses its event, and the next one finds a new process.
    let told = invoke("please-exit").bad();
    assert!(told.contains("500"), "{told}");
    c.until("it is back", || invoke("more").ok);
    // The gateway may hear of the earlier end only now, and refuse for a moment.
    c.until("one hangs", || invoke("please-hang").bad().contains("504"));
    c.until("it was restarted", || invoke("more").ok);
    let restarts = ["get", "pods", "-n", &ns, "-l", "serving.knative.dev/service=shell", "-o"];
    let restarts =
        c.kubectl(&[&restarts[..], &["jsonpath={.items[0].status.containerStatuses[0].restartCount}"]].concat());
    assert!(restarts.good().parse::<u32>().unwrap() >= 2);
    function(c, &ns, &["rm", "shell"]).good();
    c.until("its runtime is gone with it", || {
        let found = Command::new("pgrep").args(["-f", &format!("lambda-runtime.*{}", run_dir(c))]).output().unwrap();
        found.stdout.is_empty()
    });
    Outcome::Passed
}

/// This instance's directory below /run/atoll, which its processes have in their arguments.
fn run_dir(c: &Cluster) -> String {
    use sha2::Digest;
    let real = c.data().canonicalize().unwrap();
    let hash = sha2::Sha256::digest(real.as_os_str().as_encoded_bytes());
    hash.iter().take(4).map(|b| format!("{b:02x}")).collect()
}

fn bad_input(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-lambda-bad");
    let package = zip(c, "no-bootstrap", &[("app.py", "", 0o644)]);
    let file = package.to_str().unwrap();
    let refused = |args: &[&str]| function(c, &ns, &[&["deploy", "f"], args].concat()).bad();
    assert!(refused(&[file, "--lambda"]).contains("no `bootstrap` in it; name a base image"));
    assert!(refused(&[file, "--lambda", "--boundary", "wasm"]).contains("no `bootstrap`"));
    assert!(refused(&["some/image:1", "--lambda", "--boundary", "wasm"]).contains("for containers only"));
    assert!(refused(&["./missing.zip", "--lambda"]).contains("no such file"));
    assert!(refused(&[file, "--handler", "a.b"]).contains("--lambda"));
    let missing = refused(&[file, "--lambda", "--base", "127.0.0.1:5000/no/such:1"]);
    assert!(missing.contains("127.0.0.1:5000/no/such:1"), "{missing}");
    // A function that cannot begin never serves, and the reason is told.
    let broken = zip(c, "broken", &[("bootstrap", "#!/bin/sh\necho cannot begin >&2\nexit 7\n", 0o755)]);
    let told = refused(&[broken.to_str().unwrap(), "--lambda", "--base", BUSYBOX]);
    assert!(told.contains("exit code 7"), "{told}");
    function(c, &ns, &["rm", "f"]).good();
    Outcome::Passed
}

const APP: &str = r#"
import json, os
def handler(event, context):
    if event.get("rawPath") == "/raise":
        raise ValueError("as asked")
    return {"statusCode": 200, "headers": {"x-request": context.aws_request_id},
            "body": json.dumps({"path": event["rawPath"], "left": context.get_remaining_time_in_millis(),
                                "arn": context.invoked_function_arn, "name": context.function_name})}
"#;

/// Root file system with this machine's Python and the client in it; why not, if that cannot be had.
pub fn python_base(c: &Cluster) -> Result<(), String> {
    let root = c.scratch("python-root");
    if root.exists() {
        return Ok(());
    }
    let client = root.join("client");
    fs::create_dir_all(&client).unwrap();
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "-q", "--disable-pip-version-check", "--target"])
        .arg(&client)
        .arg("awslambdaric");
    let said = made_from(&mut pip);
    if !said.ok {
        let _ = fs::remove_dir_all(&root);
        return Err(format!("awslambdaric cannot be installed: {}", said.err.lines().last().unwrap_or_default()));
    }
    let script = "import sys,sysconfig,os;print(os.path.realpath(sys.executable));print(sysconfig.get_path('stdlib'))";
    let place = made_from(Command::new("python3").args(["-c", script])).good();
    let (program, library) = place.trim().split_once('\n').unwrap();
    copy_program(&root, Path::new(program), Path::new(library), &client);
    let tar = c.scratch("python.tar");
    let mut pack = Command::new("tar");
    let made = made_from(pack.arg("-C").arg(&root).arg("-cf").arg(&tar).args(["--owner=0", "--group=0", "."]));
    assert!(made.ok, "{}", made.err);
    let data = c.data().to_string_lossy().into_owned();
    let tar = tar.to_string_lossy().into_owned();
    let import = ["image", "import", "--data-dir", &data, &tar, "--tag", "127.0.0.1:5000/lambda/python:3"];
    let entry = ["--entrypoint", program, "--entrypoint", "-m", "--entrypoint", "awslambdaric"];
    let env = ["--env", "PYTHONPATH=/client:/var/task", "--env", "HOME=/tmp"];
    c.atoll(&[&import[..], &entry, &env].concat()).good();
    Ok(())
}

/// The interpreter, its library and every shared object that these name, at the same places as here.
fn copy_program(root: &Path, program: &Path, library: &Path, client: &Path) {
    let sh = r#"
        set -e
        root=$1; program=$2; library=$3; client=$4
        mkdir -p "$root/tmp" "$root/proc" "$root/dev" "$root/sys" "$root/etc" "$root$(dirname "$program")" "$root$library"
        chmod 1777 "$root/tmp"
        cp -L "$program" "$root$program"
        tar -C "$library" --exclude=./test --exclude=./site-packages --exclude='./config-*' --exclude=./ensurepip \
            --exclude=./idlelib --exclude=__pycache__ -cf - . | tar -C "$root$library" -xf -
        { echo "$program"; find "$library/lib-dynload" "$client" -name '*.so*'; } | xargs ldd 2>/dev/null |
            sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p; s/^[[:space:]]*\(\/[^ :]*\) (.*/\1/p' | sort -u |
            while read -r lib; do mkdir -p "$root$(dirname "$lib")"; cp -L "$lib" "$root$lib"; done
    "#;
    let mut copy = Command::new("sh");
    copy.args(["-c", sh, "sh"]).args([root, program, library, client]);
    let said = made_from(&mut copy);
    assert!(said.ok, "{}", said.err);
}

fn python(c: &Cluster) -> Outcome {
    if let Err(reason) = python_base(c) {
        return Outcome::Skipped(reason);
    }
    let ns = c.namespace("t-lambda-python");
    let package = zip(c, "python-app", &[("app.py", APP, 0o644)]);
    let base = ["--base", "127.0.0.1:5000/lambda/python:3", "--handler", "app.handler", "--timeout", "20"];
    let deploy = ["deploy", "py", package.to_str().unwrap(), "--lambda", "--max-scale", "1"];
    function(c, &ns, &[&deploy[..], &base].concat()).good();
    let said = function(c, &ns, &["invoke", "py", "-i", "--path", "/x"]).good();
    let (head, body) = said.split_once("\n\n").unwrap();
    assert!(head.contains("200 OK") && head.contains("x-request: "), "{said}");
    let seen = crate::cluster::json(body);
    assert_eq!((&seen["path"], &seen["name"]), (&"/x".into(), &"py".into()));
    assert!(seen["left"].as_u64().is_some_and(|left| left > 10_000 && left <= 20_000), "{seen}");
    assert!(function(c, &ns, &["invoke", "py", "--path", "/raise"]).bad().contains("500"));
    c.until("the log says why", || function(c, &ns, &["logs", "py"]).good().contains("as asked"));
    function(c, &ns, &["rm", "py"]).good();
    // One whose code cannot be loaded never serves.
    let broken = zip(c, "python-broken", &[("app.py", "import no_such_module\n", 0o644)]);
    let deploy = ["deploy", "broken", broken.to_str().unwrap(), "--lambda"];
    let told = function(c, &ns, &[&deploy[..], &base].concat()).bad();
    assert!(told.contains("exit code 1"), "{told}");
    function(c, &ns, &["rm", "broken"]).good();
    Outcome::Passed
}
