//! What pods are given and how they are watched: volumes, environment, probes, hooks, limits.

use crate::cluster::{Cluster, json, lines};
use crate::{Outcome, Test};
use serde_json::Value;

pub const TESTS: &[Test] = &[
    ("pod_volumes_and_environment", volumes),
    ("pod_volumes_follow_their_sources", follow),
    ("pod_service_account_token", token),
    ("pod_probes", probes),
    ("pod_init_hooks_and_termination", life),
    ("pod_limits", limits),
];

const IMAGE: &str = "127.0.0.1:5000/test/busybox:1";

fn pod(c: &Cluster, ns: &str, name: &str) -> Value {
    json(&c.kubectl(&["get", "pod", "-n", ns, name, "-o", "json"]).good())
}

fn inside(c: &Cluster, ns: &str, name: &str, script: &str) -> String {
    c.kubectl(&["exec", "-n", ns, name, "--", "sh", "-c", script]).good().trim().to_owned()
}

/// Every kind of volume and source of environment in one pod.
fn volumes(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-volumes");
    let host = c.scratch("host-volume");
    std::fs::create_dir_all(&host).unwrap();
    std::fs::write(host.join("from-host"), "host\n").unwrap();
    c.kubectl(&["create", "-n", &ns, "configmap", "settings", "--from-literal=colour=blue", "--from-literal=size=9"])
        .good();
    c.kubectl(&["create", "-n", &ns, "secret", "generic", "login", "--from-literal=password=s3cret"]).good();
    c.apply(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: all, namespace: {ns}, labels: {{tier: front}}, annotations: {{note: kept}}}}
spec:
  terminationGracePeriodSeconds: 0
  securityContext: {{fsGroup: 2000, runAsUser: 1000}}
  volumes:
  - {{name: settings, configMap: {{name: settings, items: [{{key: colour, path: sub/colour, mode: 0440}}]}}}}
  - {{name: login, secret: {{secretName: login, defaultMode: 0440}}}}
  - {{name: scratch, emptyDir: {{}}}}
  - {{name: memory, emptyDir: {{medium: Memory, sizeLimit: 1Mi}}}}
  - {{name: host, hostPath: {{path: {host}, type: Directory}}}}
  - {{name: me, downwardAPI: {{items: [{{path: labels, fieldRef: {{fieldPath: metadata.labels}}}}]}}}}
  - name: mixed
    projected:
      sources:
      - configMap: {{name: settings}}
      - secret: {{name: login}}
      - downwardAPI: {{items: [{{path: note, fieldRef: {{fieldPath: \"metadata.annotations['note']\"}}}}]}}
  containers:
  - name: main
    image: {IMAGE}
    command: [sleep, '1000000']
    resources: {{limits: {{memory: 64Mi}}}}
    env:
    - {{name: COLOUR, valueFrom: {{configMapKeyRef: {{name: settings, key: colour}}}}}}
    - {{name: PASSWORD, valueFrom: {{secretKeyRef: {{name: login, key: password}}}}}}
    - {{name: NODE, valueFrom: {{fieldRef: {{fieldPath: spec.nodeName}}}}}}
    - {{name: MEMORY, valueFrom: {{resourceFieldRef: {{resource: limits.memory}}}}}}
    - {{name: BOTH, value: $(COLOUR)-$(PASSWORD)}}
    envFrom: [{{prefix: S_, configMapRef: {{name: settings}}}}]
    volumeMounts:
    - {{name: settings, mountPath: /settings}}
    - {{name: login, mountPath: /login, readOnly: true}}
    - {{name: scratch, mountPath: /scratch}}
    - {{name: scratch, mountPath: /sub, subPath: a/b}}
    - {{name: memory, mountPath: /memory}}
    - {{name: host, mountPath: /host}}
    - {{name: me, mountPath: /me}}
    - {{name: mixed, mountPath: /mixed}}
",
        host = host.display()
    ));
    c.wait_ready(&ns, "pod/all");
    let sh = |script: &str| inside(c, &ns, "all", script);
    assert_eq!(sh("cat /settings/sub/colour; echo; ls /settings"), "blue\nsub");
    assert_eq!(sh("cat /login/password; stat -L -c ' %a' /login/password"), "s3cret 440");
    assert!(!c.kubectl(&["exec", "-n", &ns, "all", "--", "sh", "-c", "echo x > /login/password"]).ok);
    assert_eq!(sh("echo kept > /scratch/f; echo below > /sub/g; cat /scratch/f /scratch/a/b/g"), "kept\nbelow");
    assert_eq!(sh("grep -c ' /memory tmpfs ' /proc/mounts"), "1");
    let full = c.kubectl(&["exec", "-n", &ns, "all", "--", "sh", "-c", "dd if=/dev/zero of=/memory/f bs=1M count=2"]);
    assert!(full.bad().contains("No space left"));
    assert_eq!(sh("cat /host/from-host"), "host");
    assert_eq!(sh("cat /me/labels"), "tier=\"front\"");
    assert_eq!(sh("cat /mixed/colour /mixed/password /mixed/note"), "blues3cretkept");
    assert_eq!(sh("id -u; id -G"), "1000\n1000 2000");
    let node = pod(c, &ns, "all")["spec"]["nodeName"].as_str().unwrap().to_owned();
    let env = sh("echo $COLOUR $PASSWORD $NODE $MEMORY $BOTH $S_size");
    assert_eq!(env, format!("blue s3cret {node} 67108864 blue-s3cret 9"));
    Outcome::Passed
}

/// A changed ConfigMap reaches the files of a running pod at once as a whole; a missing one holds a pod back.
fn follow(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-follow");
    c.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: {ns}}}\nspec:\n  terminationGracePeriodSeconds: 0\n  \
         volumes: [{{name: v, configMap: {{name: late}}}}]\n  containers:\n  - {{name: main, image: '{IMAGE}', \
         command: [sleep, '1000000'], volumeMounts: [{{name: v, mountPath: /v}}]}}\n"
    ));
    c.until("an event says what is missing", || {
        c.kubectl(&["events", "-n", &ns]).out.contains("configmap \"late\" not found")
    });
    c.kubectl(&["create", "-n", &ns, "configmap", "late", "--from-literal=a=1"]).good();
    c.wait_ready(&ns, "pod/p");
    assert_eq!(inside(c, &ns, "p", "cat /v/a"), "1");
    c.kubectl(&["patch", "-n", &ns, "configmap", "late", "-p", r#"{"data": {"a": "2", "b": "3"}}"#]).good();
    c.until("the files follow", || inside(c, &ns, "p", "cat /v/*") == "23");
    assert_eq!(pod(c, &ns, "p")["status"]["containerStatuses"][0]["restartCount"], 0);
    Outcome::Passed
}

/// A projected token is signed for the pod, and the API knows whose it is for as long as the pod is there.
fn token(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-token");
    c.kubectl(&["create", "-n", &ns, "serviceaccount", "robot"]).good();
    let yaml = |name: &str, account: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {ns}}}\nspec:\n  serviceAccountName: {account}\n  \
             terminationGracePeriodSeconds: 0\n  volumes: [{{name: t, projected: {{sources: \
             [{{serviceAccountToken: {{path: token, expirationSeconds: 1200}}}}]}}}}]\n  containers:\n  - {{name: main, \
             image: '{IMAGE}', command: [sleep, '1000000'], volumeMounts: [{{name: t, mountPath: /t}}]}}\n"
        )
    };
    c.apply(&yaml("holder", "robot"));
    c.wait_ready(&ns, "pod/holder");
    let read = || inside(c, &ns, "holder", "cat /t/token");
    let first = read();
    assert_eq!(first.split('.').count(), 3, "{first}");
    let who = |token: &str| {
        let server = json(&c.kubectl(&["config", "view", "--raw", "-o", "json"]).good());
        let address = server["clusters"][0]["cluster"]["server"].as_str().unwrap().to_owned();
        c.kubectl(&[
            "--kubeconfig=/dev/null",
            "--insecure-skip-tls-verify",
            "-s",
            &address,
            "--token",
            token,
            "auth",
            "whoami",
        ])
    };
    assert!(who(&first).good().contains(&format!("system:serviceaccount:{ns}:robot")));
    // an instance that is started anew keeps the token and goes on renewing it
    c.stop(rustix::process::Signal::KILL);
    c.up();
    c.wait_ready(&ns, "pod/holder");
    assert!(who(&read()).good().contains("robot"));
    c.kubectl(&["delete", "-n", &ns, "pod", "holder", "--wait"]).good();
    assert!(!who(&first).ok, "a token of a deleted pod still works");
    Outcome::Passed
}

fn probes(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-probes");
    let one = |name: &str, script: &str, probes: &str| {
        c.apply(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {ns}}}\nspec:\n  terminationGracePeriodSeconds: 0\n  \
             containers:\n  - name: main\n    image: {IMAGE}\n    command: [sh, -c, \"{script}\"]\n{probes}"
        ));
    };
    one(
        "http",
        "mkdir /tmp/w; touch /tmp/w/ok; exec httpd -f -p 8000 -h /tmp/w",
        "    startupProbe: {tcpSocket: {port: 8000}, periodSeconds: 1, failureThreshold: 30}\n    \
             readinessProbe: {httpGet: {path: /ok, port: 8000}, periodSeconds: 1, failureThreshold: 1}\n",
    );
    one("tcp", "exec httpd -f -p 9000", "    readinessProbe: {tcpSocket: {port: 9000}, periodSeconds: 1}\n");
    one("shut", "exec sleep 1000000", "    readinessProbe: {tcpSocket: {port: 9000}, periodSeconds: 1}\n");
    one(
        "sick",
        "touch /tmp/well; exec sleep 1000000",
        "    livenessProbe: {exec: {command: [cat, /tmp/well]}, periodSeconds: 1, failureThreshold: 1}\n",
    );
    let ready = |name: &str| {
        let conditions = pod(c, &ns, name)["status"]["conditions"].clone();
        conditions.as_array().is_some_and(|l| l.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"))
    };
    for name in ["http", "tcp", "sick"] {
        c.wait_ready(&ns, &format!("pod/{name}"));
    }
    inside(c, &ns, "http", "mv /tmp/w/ok /tmp/w/away");
    c.until("a failing probe takes readiness away", || !ready("http"));
    inside(c, &ns, "http", "mv /tmp/w/away /tmp/w/ok");
    c.until("and a passing one gives it back", || ready("http"));
    assert!(!ready("shut"));
    inside(c, &ns, "sick", "rm /tmp/well");
    c.until("a failing liveness probe restarts the container", || {
        pod(c, &ns, "sick")["status"]["containerStatuses"][0]["restartCount"] == 1
    });
    let events = c.kubectl(&["get", "events", "-n", &ns]).good();
    for part in ["Liveness probe failed", "Readiness probe failed", "HTTP probe failed with statuscode: 404"] {
        assert!(events.contains(part), "{part}: {events}");
    }
    Outcome::Passed
}

/// Init containers in order, postStart and preStop, exit codes and reasons, the time to end.
fn life(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-hooks");
    let host = c.scratch("hooks");
    std::fs::create_dir_all(&host).unwrap();
    std::fs::set_permissions(&host, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    c.apply(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: hooked, namespace: {ns}}}
spec:
  terminationGracePeriodSeconds: 20
  volumes: [{{name: h, hostPath: {{path: {}}}}}]
  initContainers:
  - {{name: one, image: '{IMAGE}', command: [sh, -c, 'echo one >> /h/told'], volumeMounts: [{{name: h, mountPath: /h}}]}}
  - {{name: two, image: '{IMAGE}', command: [sh, -c, 'echo two >> /h/told'], volumeMounts: [{{name: h, mountPath: /h}}]}}
  containers:
  - name: main
    image: {IMAGE}
    command: [sh, -c, 'trap \"echo term >> /h/told; exit 0\" TERM; while :; do sleep 1; done']
    volumeMounts: [{{name: h, mountPath: /h}}]
    lifecycle:
      postStart: {{exec: {{command: [sh, -c, 'echo post >> /h/told']}}}}
      preStop: {{exec: {{command: [sh, -c, 'echo pre >> /h/told']}}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: fails, namespace: {ns}}}
spec:
  restartPolicy: Never
  containers: [{{name: main, image: '{IMAGE}', command: [sh, -c, 'echo why > /dev/termination-log; exit 7']}}]
",
        host.display()
    ));
    c.wait_ready(&ns, "pod/hooked");
    c.kubectl(&["delete", "-n", &ns, "pod", "hooked", "--wait"]).good();
    let told = std::fs::read_to_string(host.join("told")).unwrap();
    assert_eq!(lines(&told), ["one", "two", "post", "pre", "term"]);
    c.kubectl(&["wait", "-n", &ns, "pod/fails", "--for=jsonpath={.status.phase}=Failed", "--timeout=60s"]).good();
    let ended = &pod(c, &ns, "fails")["status"]["containerStatuses"][0]["state"]["terminated"];
    assert_eq!(
        (&ended["exitCode"], &ended["reason"], &ended["message"]),
        (&7.into(), &"Error".into(), &"why\n".into())
    );
    Outcome::Passed
}

/// Limits hold where this machine has the controllers for them.
fn limits(c: &Cluster) -> Outcome {
    let doctor = c.atoll(&["doctor", "-o", "json"]).good();
    if !doctor.contains("memory") {
        return Outcome::Skipped("no memory controller in this machine's cgroups".into());
    }
    let ns = c.namespace("t-limits");
    c.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: greedy, namespace: {ns}}}\nspec:\n  restartPolicy: Never\n  containers:\n  \
         - name: main\n    image: {IMAGE}\n    command: [sh, -c, 'tail /dev/zero']\n    resources: {{limits: {{memory: 16Mi, cpu: 500m}}}}\n"
    ));
    c.kubectl(&["wait", "-n", &ns, "pod/greedy", "--for=jsonpath={.status.phase}=Failed", "--timeout=60s"]).good();
    let ended = &pod(c, &ns, "greedy")["status"]["containerStatuses"][0]["state"]["terminated"];
    assert_eq!((&ended["reason"], &ended["exitCode"]), (&"OOMKilled".into(), &137.into()));
    Outcome::Passed
}
