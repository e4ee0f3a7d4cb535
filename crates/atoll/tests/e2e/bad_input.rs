//! Bad input gets a clear message that names the field, the value and the way out, and nothing half done stays behind.

use crate::cluster::{Cluster, sleeper};
use crate::{Outcome, Test};

pub const TESTS: &[Test] = &[
    ("bad_fields_are_named", fields),
    ("bad_image_names_are_told", missing_image),
    ("bad_archives_are_refused", archives),
    ("bad_bodies_are_refused", bodies),
    ("bad_starts_are_refused", starts),
];

fn fields(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-bad");
    let refused = |yaml: &str, parts: &[&str]| {
        let said = c.kubectl_with(&["apply", "-f", "-"], yaml).bad();
        assert!(parts.iter().all(|p| said.contains(p)), "{parts:?} not in: {said}");
    };
    let pod = |spec: &str| format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: {ns}}}\nspec: {spec}\n");
    refused(&pod("{containers: [{name: a, image: x, colour: red}]}"), &["unknown field \"spec.containers[0].colour\""]);
    refused(&pod("{containers: []}"), &["spec.containers", "Required value"]);
    refused(&pod("{containers: [{name: Bad_Name, image: x}]}"), &["spec.containers[0].name"]);
    refused(&pod("{containers: [{name: a, image: x, ports: [{containerPort: 70000}]}]}"), &["containerPort", "1"]);
    refused(&pod("{containers: [{name: a, image: x, resources: {limits: {memory: lots}}}]}"), &["memory"]);
    refused(&pod("{runtimeClassName: nope, containers: [{name: a, image: x}]}"), &["nope"]);
    let said = c.kubectl_with(&["apply", "-f", "-"], &pod("{containers: notalist}")).bad();
    assert!(said.contains("spec.containers"), "{said}");
    assert_eq!(c.kubectl(&["get", "pods", "-n", &ns, "-o", "name"]).good(), "");
    Outcome::Passed
}

fn missing_image(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-noimage");
    c.apply(&sleeper("p", &ns).replace("test/busybox:1", "test/ngnix:1"));
    c.until("the pod says which image is missing", || {
        let path = "jsonpath={.status.containerStatuses[0].state.waiting}";
        let text = c.kubectl(&["get", "pod", "-n", &ns, "p", "-o", path]).good();
        text.contains("ImagePull") && text.contains("ngnix")
    });
    c.kubectl(&["delete", "pod", "-n", &ns, "p", "--timeout=60s"]).good();
    Outcome::Passed
}

fn archives(c: &Cluster) -> Outcome {
    let data = c.data().to_string_lossy().into_owned();
    let import = |file: &std::path::Path| {
        c.atoll(&["image", "import", "--data-dir", &data, &file.to_string_lossy(), "--tag", "test/evil:1"])
    };
    let whole = std::fs::read(c.scratch("busybox.tar")).unwrap();
    let short = c.scratch("short.tar");
    std::fs::write(&short, &whole[..whole.len() / 2]).unwrap();
    let said = import(&short).bad();
    assert!(said.contains("truncated") || said.contains("ends"), "{said}");
    for (name, flag) in [("up", "s,^,../../../evil/,"), ("abs", "s,^,/evil/,")] {
        let tar = c.scratch(&format!("{name}.tar"));
        std::fs::write(c.scratch("payload"), "x").unwrap();
        let made = std::process::Command::new("tar")
            .args(["-P", "--transform", flag, "-C"])
            .arg(c.scratch(""))
            .arg("-cf")
            .arg(&tar)
            .arg("payload")
            .status();
        assert!(made.unwrap().success());
        let said = import(&tar);
        assert!(!std::path::Path::new("/evil").exists(), "a layer climbed out");
        if name == "up" {
            assert!(said.bad().contains(".."));
        }
    }
    let _ = c.atoll(&["image", "rm", "--data-dir", &data, "test/evil:1"]);
    Outcome::Passed
}

fn bodies(c: &Cluster) -> Outcome {
    let key = c.data();
    let kubeconfig = std::fs::read_to_string(key.join("kubeconfig")).unwrap();
    assert!(kubeconfig.contains("client-certificate-data"));
    let post = |body: &[u8], kind: &str| {
        let file = c.scratch("body");
        std::fs::write(&file, body).unwrap();
        let said = c.inside("kubectl").args(["config", "view", "--raw", "-o", "json"]).output().unwrap();
        let config: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
        for (name, pointer) in
            [("crt", "/users/0/user/client-certificate-data"), ("key", "/users/0/user/client-key-data")]
        {
            let text = config.pointer(pointer).and_then(|v| v.as_str()).unwrap();
            let decoded = c.inside("sh").args(["-c", &format!("echo {text} | base64 -d")]).output().unwrap().stdout;
            std::fs::write(c.scratch(name), decoded).unwrap();
        }
        let output = c
            .inside("curl")
            .args(["-sk", "-m", "20", "-o", "/dev/null", "-w", "%{http_code}", "-H", &format!("content-type: {kind}")])
            .arg("--cert")
            .arg(c.scratch("crt"))
            .arg("--key")
            .arg(c.scratch("key"))
            .arg("--data-binary")
            .arg(format!("@{}", file.display()))
            .arg("https://127.0.0.1:7443/api/v1/namespaces/default/configmaps")
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let huge =
        format!("{{\"apiVersion\":\"v1\",\"kind\":\"ConfigMap\",\"data\":{{\"a\":\"{}\"}}}}", "x".repeat(4 << 20));
    assert_eq!(post(huge.as_bytes(), "application/json"), "413");
    let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x]\n");
    for i in 1..12 {
        bomb.push_str(&format!("a{i}: &a{i} [*a{0},*a{0},*a{0},*a{0},*a{0},*a{0},*a{0},*a{0},*a{0}]\n", i - 1));
    }
    assert_eq!(post(bomb.as_bytes(), "application/yaml"), "400");
    let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(post(deep.as_bytes(), "application/json"), "400");
    assert_eq!(post(b"not json", "application/json"), "400");
    assert_eq!(post(b"{}", "text/plain"), "415");
    Outcome::Passed
}

fn starts(c: &Cluster) -> Outcome {
    let data = c.data().to_string_lossy().into_owned();
    let said = c.atoll(&["up", "--data-dir", &data]).bad();
    assert!(said.contains("in use by `atoll up`"), "{said}");
    let other = c.scratch("other").to_string_lossy().into_owned();
    let said = c.atoll(&["up", "--data-dir", &other]).bad();
    assert!(said.contains("--api-addr 127.0.0.1:7443") && said.contains("choose another"), "{said}");
    let said = c.atoll(&["up", "--data-dir", &other, "--events-addr", "0.0.0.0:9010"]).bad();
    assert!(said.contains("--events-addr 0.0.0.0:9010") && said.contains("--events-token FILE"), "{said}");
    let short = c.scratch("short.token");
    std::fs::write(&short, "secret\n").unwrap();
    let short = short.to_string_lossy().into_owned();
    let said =
        c.atoll(&["up", "--data-dir", &other, "--events-addr", "127.0.0.1:9010", "--events-token", &short]).bad();
    assert!(said.contains("short.token: a token has 16 to 4096"), "{said}");
    std::fs::create_dir_all(c.scratch("newer")).unwrap();
    std::fs::write(c.scratch("newer/version"), "atoll-data 99\n").unwrap();
    let newer = c.scratch("newer").to_string_lossy().into_owned();
    assert!(c.atoll(&["up", "--data-dir", &newer]).bad().contains("version 99"));
    let mut user = c.inside("setpriv");
    user.args([
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        env!("CARGO_BIN_EXE_atoll"),
        "up",
        "--data-dir",
        "/tmp/none",
    ]);
    if let Ok(output) = user.output() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && (said.contains("needs root") || said.contains("Permission denied")),
            "{said}"
        );
    }
    assert!(!std::path::Path::new("/tmp/none").exists());
    Outcome::Passed
}
