//! The life of pods, against fakes and in virtual time.

mod common;
use api::client::{Client, Patch};
use api::object::Meta;
use common::*;
use serde_json::{Value, json};
use std::time::Duration;

#[tokio::test(start_paused = true)]
async fn a_pod_runs_and_is_deleted() {
    let node = Node::new();
    let agent = node.start();
    let created = node.create("p", one(&["graceful"])).await;
    let pod = node.until("p", "runs", running).await;
    for (kind, want) in [
        ("PodReadyToStartContainers", "True"),
        ("Initialized", "True"),
        ("Ready", "True"),
        ("ContainersReady", "True"),
        ("PodScheduled", "True"),
    ] {
        assert_eq!(condition(&pod, kind), want, "{kind}");
    }
    let status = container(&pod, "c");
    assert_eq!(status.str_at("/imageID"), "sha256:here:1");
    assert!(status.str_at("/containerID").starts_with("atoll://"), "{status}");
    assert_eq!((pod.str_at("/status/podIP"), pod.str_at("/status/qosClass")), ("10.42.0.1", "BestEffort"));
    assert!(!pod.str_at("/status/startTime").is_empty() && !pod.str_at("/status/hostIP").is_empty());
    let spec = node.boundary.spec("c").unwrap();
    assert_eq!(spec.args, ["graceful"]);
    for part in ["FROM_IMAGE", "PATH", "HOSTNAME", "HOME"] {
        assert!(spec.env.iter().any(|(n, _)| n == part), "{part}");
    }
    for path in ["/etc/hosts", "/etc/resolv.conf", "/etc/hostname", "/dev/termination-log"] {
        assert!(spec.mounts.iter().any(|m| m.target.to_str() == Some(path)), "{path}");
    }
    let dir = node.dir.path().join("data/pods").join(created.uid());
    assert!(dir.join("sandbox.json").exists());
    node.delete("p", None).await;
    node.until_gone("p").await;
    node.until_true("the directory goes", || !dir.exists()).await;
    assert_eq!(node.boundary.sandbox_count(), 0);
    assert!(node.networks.attached.lock().unwrap().is_empty());
    for event in ["already present on machine", "Created container: c", "Started container c", "Stopping container c"] {
        node.until_event(event).await;
    }
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn restart_policies() {
    let node = Node::new();
    let _agent = node.start();
    for (policy, args, want) in [
        ("Never", ["exit", "0"], "Succeeded"),
        ("Never", ["exit", "3"], "Failed"),
        ("OnFailure", ["exit", "0"], "Succeeded"),
    ] {
        let name = format!("{}-{}", policy.to_lowercase(), args[1]);
        let mut spec = one(&args);
        spec["restartPolicy"] = policy.into();
        node.create(&name, spec).await;
        let pod = node.until(&name, want, |p| phase(p) == want).await;
        assert_eq!(exit_code(&pod, "c").map(|c| c.to_string()).as_deref(), Some(args[1]), "{name}");
        assert_eq!(condition(&pod, "Ready"), "False");
        assert_eq!(restarts(&pod, "c"), 0);
    }
    node.until_true("ended pods have no sandbox", || node.boundary.sandbox_count() == 0).await;
    for policy in ["OnFailure", "Always"] {
        let name = format!("{}-crash", policy.to_lowercase());
        let mut spec = one(&["exit", "1"]);
        spec["restartPolicy"] = policy.into();
        node.create(&name, spec).await;
        let pod =
            node.until(&name, "backs off", |p| restarts(p, "c") >= 4 && waiting(p, "c") == "CrashLoopBackOff").await;
        assert_eq!(phase(&pod), "Running");
        let status = container(&pod, "c");
        assert_eq!(status.pointer("/lastState/terminated/exitCode"), Some(&json!(1)));
        let text = status.str_at("/state/waiting/message");
        assert!(text.starts_with("back-off ") && text.contains("restarting failed container=c pod="), "{text}");
        node.delete(&name, None).await;
        node.until_gone(&name).await;
    }
    node.until_event("BackOff: Back-off restarting failed container c in pod").await;
}

#[tokio::test(start_paused = true)]
async fn crash_loops_slow_down() {
    let node = Node::new();
    let _agent = node.start();
    let begin = tokio::time::Instant::now();
    node.create("p", one(&["exit", "1"])).await;
    // At once, then after 10, 20 and 40 seconds.
    node.until("p", "four restarts", |p| restarts(p, "c") == 4).await;
    let took = begin.elapsed().as_secs();
    assert!((70..73).contains(&took), "{took}");
}

#[tokio::test(start_paused = true)]
async fn init_containers_and_sidecars_in_order() {
    let node = Node::new();
    let _agent = node.start();
    let spec = json!({
        "restartPolicy": "Never",
        "initContainers": [
            {"name": "i1", "image": "here:1", "command": ["exit", "0"]},
            {"name": "side", "image": "here:1", "command": ["graceful"], "restartPolicy": "Always",
             "startupProbe": {"exec": {"command": ["health"]}, "periodSeconds": 1}},
            {"name": "i2", "image": "here:1", "command": ["exit", "0"]}],
        "containers": [{"name": "c", "image": "here:1", "command": ["run"]}]});
    node.boundary.healthy.send_replace(false);
    node.create("p", spec).await;
    let pod =
        node.until("p", "sidecar runs", |p| !container(p, "side").str_at("/state/running/startedAt").is_empty()).await;
    assert_eq!(phase(&pod), "Pending");
    assert_eq!(condition(&pod, "Initialized"), "False");
    assert_eq!(waiting(&pod, "c"), "PodInitializing");
    assert_eq!(node.boundary.count("start i2"), 0);
    node.boundary.healthy.send_replace(true);
    let pod = node.until("p", "runs", running).await;
    let order: Vec<_> =
        ["i1", "side", "i2", "c"].iter().map(|n| node.boundary.position(&format!("start {n} 0"))).collect();
    assert!(order.windows(2).all(|w| w[0] < w[1]), "{order:?}");
    assert_eq!(container(&pod, "i1").pointer("/ready"), Some(&json!(true)));
    node.boundary.end("side", 1, Duration::from_secs(1));
    node.until("p", "the sidecar is started again", |p| restarts(p, "side") == 1 && running(p)).await;
    node.boundary.end("c", 0, Duration::from_secs(1));
    let pod = node.until("p", "ends with its main container", |p| phase(p) == "Succeeded").await;
    assert_eq!(exit_code(&pod, "side"), Some(0));
}

#[tokio::test(start_paused = true)]
async fn a_failed_init_container_ends_a_pod_that_never_restarts() {
    let node = Node::new();
    let _agent = node.start();
    let spec = json!({"restartPolicy": "Never",
        "initContainers": [{"name": "i", "image": "here:1", "command": ["exit", "4"]}],
        "containers": [{"name": "c", "image": "here:1"}]});
    node.create("p", spec).await;
    let pod = node.until("p", "fails", |p| phase(p) == "Failed").await;
    assert_eq!(exit_code(&pod, "i"), Some(4));
    assert_eq!(node.boundary.count("start c"), 0);
}

#[tokio::test(start_paused = true)]
async fn probes() {
    let node = Node::new();
    let _agent = node.start();
    let probe = json!({"exec": {"command": ["health"]}, "periodSeconds": 2, "failureThreshold": 2});
    let mut spec = one(&["run"]);
    spec["containers"][0]["readinessProbe"] = probe.clone();
    node.create("ready", spec).await;
    node.until("ready", "is ready", running).await;
    node.boundary.healthy.send_replace(false);
    let pod = node.until("ready", "is not ready", |p| condition(p, "Ready") == "False").await;
    assert_eq!((phase(&pod), restarts(&pod, "c")), ("Running", 0));
    node.until_event("Unhealthy: Readiness probe failed: unhealthy").await;
    node.boundary.healthy.send_replace(true);
    node.until("ready", "is ready again", running).await;
    node.delete("ready", Some(1)).await;
    node.until_gone("ready").await;

    let mut spec = one(&["run"]);
    spec["containers"][0]["livenessProbe"] = probe.clone();
    node.create("live", spec).await;
    node.until("live", "runs", running).await;
    node.boundary.healthy.send_replace(false);
    node.until("live", "is restarted", |p| restarts(p, "c") >= 1).await;
    node.until_event("Killing: Container c failed liveness probe, will be restarted").await;
    node.boundary.healthy.send_replace(true);
    node.delete("live", Some(1)).await;
    node.until_gone("live").await;

    node.boundary.healthy.send_replace(false);
    let mut spec = one(&["run"]);
    spec["containers"][0]["startupProbe"] = probe;
    spec["containers"][0]["livenessProbe"] = json!({"exec": {"command": ["false"]}, "periodSeconds": 1});
    node.create("start", spec).await;
    node.until("start", "startup failure restarts it", |p| restarts(p, "c") >= 1).await;
    assert_eq!(node.boundary.count("exec c false"), 0, "liveness waits for startup");
}

#[tokio::test(start_paused = true)]
async fn hooks_and_grace() {
    let node = Node::new();
    let _agent = node.start();
    let mut spec = one(&["stubborn"]);
    spec["terminationGracePeriodSeconds"] = 20.into();
    spec["containers"][0]["image"] = "here-quit:1".into();
    spec["containers"][0]["lifecycle"] =
        json!({"postStart": {"exec": {"command": ["hello"]}}, "preStop": {"exec": {"command": ["bye"]}}});
    node.create("p", spec).await;
    node.until("p", "runs", running).await;
    assert!(node.boundary.position("exec c hello").is_some());
    let begin = tokio::time::Instant::now();
    node.delete("p", None).await;
    node.until_gone("p").await;
    let took = begin.elapsed().as_secs();
    assert!((19..=22).contains(&took), "{took}");
    let order: Vec<_> = ["exec c bye", "signal c 3", "signal c 9"].iter().map(|c| node.boundary.position(c)).collect();
    assert!(order[0].is_some() && order.windows(2).all(|w| w[0] < w[1]), "{order:?}");

    let mut spec = one(&["run"]);
    spec["restartPolicy"] = "Never".into();
    spec["containers"][0]["lifecycle"] = json!({"postStart": {"exec": {"command": ["false"]}}});
    node.create("bad", spec).await;
    node.until("bad", "a failed postStart kills it", |p| phase(p) == "Failed").await;
    node.until_event("FailedPostStartHook: PostStartHook failed: no").await;
}

#[tokio::test(start_paused = true)]
async fn a_second_deletion_may_shorten_the_grace() {
    let node = Node::new();
    let _agent = node.start();
    let mut spec = one(&["stubborn"]);
    spec["terminationGracePeriodSeconds"] = 3600.into();
    node.create("p", spec).await;
    node.until("p", "runs", running).await;
    let begin = tokio::time::Instant::now();
    node.delete("p", None).await;
    node.until_true("asked to stop", || node.boundary.count("signal c 15") == 1).await;
    assert!(node.get("p").await.is_some());
    node.delete("p", Some(2)).await;
    node.until_gone("p").await;
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[tokio::test(start_paused = true)]
async fn images_that_do_not_come() {
    let node = Node::new();
    let _agent = node.start();
    let spec =
        |image: &str, policy: &str| json!({"containers": [{"name": "c", "image": image, "imagePullPolicy": policy}]});
    node.create("none", spec("nowhere:1", "IfNotPresent")).await;
    node.until("none", "error", |p| waiting(p, "c") == "ErrImagePull").await;
    let pod = node.until("none", "back-off", |p| waiting(p, "c") == "ImagePullBackOff").await;
    assert_eq!(phase(&pod), "Pending");
    node.until_event("Failed: Failed to pull image \"nowhere:1\": registry does not know nowhere:1").await;
    node.until_event("BackOff: Back-off pulling image \"nowhere:1\"").await;
    let patch = Patch::Merge(json!({"spec": {"containers": [{"name": "c", "image": "remote:1"}]}}));
    node.client.patch(&pods(), "ns", "none", "", patch).await.unwrap();
    node.until("none", "a better name is tried at once", running).await;

    node.create("never", spec("remote:2", "Never")).await;
    node.until("never", "never", |p| waiting(p, "c") == "ErrImageNeverPull").await;
    node.create("bad", spec("not!a!name", "IfNotPresent")).await;
    node.until("bad", "invalid", |p| waiting(p, "c") == "InvalidImageName").await;
    node.create("always", spec("remote:3", "Always")).await;
    node.until("always", "pulled", running).await;
    node.until_event("Pulled: Successfully pulled image \"remote:3\" in ").await;

    *node.images.broken.lock().unwrap() = true;
    node.create("later", spec("remote:4", "Always")).await;
    node.until("later", "fails first", |p| waiting(p, "c") == "ImagePullBackOff").await;
    *node.images.broken.lock().unwrap() = false;
    node.until("later", "comes with a later try", running).await;
    let uids: Vec<String> = node.images.pulls.lock().unwrap().clone();
    assert!(uids.iter().filter(|p| p.starts_with("remote:4")).count() >= 2);
    for name in ["never", "bad"] {
        node.delete(name, None).await;
        node.until_gone(name).await;
    }
}

#[tokio::test(start_paused = true)]
async fn refusals_and_configuration_errors() {
    let node = Node::new();
    let _agent = node.start();
    node.create("refused", one(&["refuse", "CreateContainerError"])).await;
    let pod = node.until("refused", "waits", |p| waiting(p, "c") == "CreateContainerError").await;
    assert_eq!(restarts(&pod, "c"), 0);
    let mut spec = one(&["refuse", "StartError"]);
    spec["restartPolicy"] = "Never".into();
    node.create("start", spec).await;
    let pod = node.until("start", "fails", |p| phase(p) == "Failed").await;
    assert_eq!(exit_code(&pod, "c"), Some(128));
    assert_eq!(container(&pod, "c").str_at("/state/terminated/reason"), "StartError");

    let mut spec = one(&["run"]);
    spec["containers"][0]["env"] =
        json!([{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "later", "key": "k"}}}]);
    node.create("env", spec).await;
    let pod = node.until("env", "waits for its source", |p| waiting(p, "c") == "CreateContainerConfigError").await;
    assert_eq!(container(&pod, "c").str_at("/state/waiting/message"), "configmap \"later\" not found");
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "later", "namespace": "ns"}, "data": {"k": "v"}});
    node.client.create(&core("configmaps"), "ns", map).await.unwrap();
    node.until("env", "goes on", running).await;

    let mut spec = one(&["run"]);
    spec["containers"][0]["securityContext"] = json!({"runAsNonRoot": true});
    node.create("root", spec).await;
    node.until("root", "refused", |p| waiting(p, "c") == "CreateContainerConfigError").await;
    let mut spec = one(&["run"]);
    spec["hostPID"] = true.into();
    node.create("host", spec).await;
    let pod = node.until("host", "refused", |p| waiting(p, "c") == "UnsupportedPod").await;
    assert!(pod.str_at("/status/message").starts_with("spec.hostPID"), "{pod}");
    node.delete("host", None).await;
    node.until_gone("host").await;
}

#[tokio::test(start_paused = true)]
async fn runtime_classes() {
    let node = Node::new();
    let _agent = node.start();
    let mut spec = one(&["run"]);
    spec["runtimeClassName"] = "vm".into();
    node.create("p", spec.clone()).await;
    let pod = node.until("p", "unknown class", |p| waiting(p, "c") == "RuntimeClassNotFound").await;
    assert!(pod.str_at("/status/message").contains("RuntimeClass \"vm\" not found"), "{pod}");
    let classes = api::kind::Resource::new("node.k8s.io", "v1", "runtimeclasses");
    node.client.register(classes.clone(), api::kind::Scope::Cluster, "RuntimeClass");
    let class = json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "vm"}, "handler": "microvm"});
    node.client.create(&classes, "", class).await.unwrap();
    node.until("p", "no block device", |p| waiting(p, "c") == "ImageInspectError").await;
    node.delete("p", None).await;
    node.until_gone("p").await;

    let machine = json!({"domain": {"memory": {"guest": "64Mi"}, "devices": {"disks": [{"name": "root", "disk": {"bus": "virtio"}}]}},
        "volumes": [{"name": "root", "containerDisk": {"image": "remote-disk:1"}},
            {"name": "ci", "cloudInitNoCloud": {"userData": "#cloud-config\n"}}]});
    let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "spec": spec, "metadata": {"name": "vm", "namespace": "ns",
        "annotations": {"atoll.dev/machine": machine.to_string()}}});
    pod["spec"]["nodeName"] = "n1".into();
    pod["spec"]["containers"] = json!([{"name": "compute", "image": "remote-disk:1"}]);
    node.client.create(&pods(), "ns", pod).await.unwrap();
    node.until("vm", "runs", running).await;
    assert!(matches!(node.machines.spec("compute").unwrap().rootfs, node::boundary::Rootfs::Machine));
    let uid = node.get("vm").await.unwrap().uid().to_owned();
    let record = std::fs::read(node.dir.path().join("data/pods").join(uid).join("sandbox.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    assert_eq!(record.pointer("/machine/disks/0/path"), Some(&json!("/disks/remote-disk:1")));
    assert!(record.str_at("/machine/cloud_init/network_config").contains("via: \"169.254.1.1\""));
    assert_eq!(record.str_at("/network/tap"), "tap0");
}

#[tokio::test(start_paused = true)]
async fn volumes_follow_their_sources() {
    let node = Node::new();
    let _agent = node.start();
    let mut spec = one(&["run"]);
    spec["volumes"] = json!([{"name": "v", "configMap": {"name": "cm"}}]);
    spec["containers"][0]["volumeMounts"] = json!([{"name": "v", "mountPath": "/v"}]);
    node.create("p", spec).await;
    node.until_event("FailedMount: MountVolume.SetUp failed for volume \"v\" : configmap \"cm\" not found").await;
    assert_eq!(node.boundary.count("prepare"), 0);
    assert!(node.networks.attached.lock().unwrap().is_empty(), "what was set up before is undone");
    let map = |v: &str| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "cm", "namespace": "ns"}, "data": {"k": v}});
    node.client.create(&core("configmaps"), "ns", map("one")).await.unwrap();
    let pod = node.until("p", "runs", running).await;
    let file = node.dir.path().join("data/pods").join(pod.uid()).join("volumes/v/k");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "one");
    node.client.update(&core("configmaps"), "ns", map("two")).await.unwrap();
    node.until_true("new content", || std::fs::read_to_string(&file).is_ok_and(|t| t == "two")).await;
}

#[tokio::test]
async fn active_deadline() {
    let node = Node::new();
    let _agent = node.start();
    let mut spec = one(&["run"]);
    spec["activeDeadlineSeconds"] = 1.into();
    node.create("p", spec).await;
    let pod = node.until("p", "fails", |p| phase(p) == "Failed").await;
    assert_eq!(pod.str_at("/status/reason"), "DeadlineExceeded");
}

#[tokio::test(start_paused = true)]
async fn a_restarted_agent_takes_over_what_runs() {
    let node = Node::new();
    let agent = node.start();
    let mut spec = one(&["run"]);
    spec["containers"][0]["readinessProbe"] = json!({"exec": {"command": ["health"]}, "periodSeconds": 1});
    node.create("stay", spec).await;
    node.create("gone", one(&["run"])).await;
    node.create(
        "ends",
        json!({"restartPolicy": "Never", "containers": [{"name": "e", "image": "here:1", "command": ["run"]}]}),
    )
    .await;
    node.create("back", json!({"containers": [{"name": "b", "image": "here:1", "command": ["run"]}]})).await;
    for name in ["stay", "gone", "ends", "back"] {
        node.until(name, "runs", running).await;
    }
    agent.kill().await;
    let starts = node.boundary.count("start");
    node.boundary.end("e", 7, Duration::from_secs(1));
    node.boundary.end("b", 1, Duration::from_secs(1));
    node.delete("gone", Some(0)).await;
    let agent = node.start();
    let pod = node.until("ends", "its end is seen", |p| phase(p) == "Failed").await;
    assert_eq!(exit_code(&pod, "e"), Some(7));
    let pod = node.until("back", "is restarted", |p| restarts(p, "b") == 1 && running(p)).await;
    assert_eq!(container(&pod, "b").pointer("/lastState/terminated/exitCode"), Some(&json!(1)));
    node.until_true("the orphan goes", || node.boundary.sandbox_count() == 2).await;
    let pod = node.until("stay", "still runs", running).await;
    assert_eq!(restarts(&pod, "c"), 0);
    assert_eq!(node.boundary.count("start"), starts + 1);
    node.boundary.healthy.send_replace(false);
    node.until("stay", "is probed again", |p| condition(p, "Ready") == "False").await;
    agent.stop().await;
    assert_eq!(node.boundary.sandbox_count(), 2, "workloads outlive the agent");
}

#[tokio::test(start_paused = true)]
async fn killed_at_any_point_it_goes_on() {
    for delay in 0..40u64 {
        let node = Node::new();
        let agent = node.start();
        node.create("p", one(&["run"])).await;
        // A different number of steps each time.
        for _ in 0..delay {
            tokio::task::yield_now().await;
        }
        if delay % 2 == 1 {
            tokio::time::sleep(Duration::from_micros(delay * 50)).await;
        }
        agent.kill().await;
        let agent = node.start();
        let pod = node.until("p", "runs", running).await;
        assert!(restarts(&pod, "c") <= 1, "{pod:#}");
        assert_eq!(node.boundary.sandbox_count(), 1);
        assert_eq!(node.networks.attached.lock().unwrap().len(), 1);
        node.delete("p", None).await;
        tokio::time::sleep(Duration::from_micros(delay * 100)).await;
        agent.kill().await;
        let _agent = node.start();
        node.until_gone("p").await;
        node.until_true("all is gone", || node.boundary.sandbox_count() == 0).await;
        node.until_true("network too", || node.networks.attached.lock().unwrap().is_empty()).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_sandbox_is_made_anew() {
    let node = Node::new();
    let _agent = node.start();
    node.create(
        "p",
        json!({"initContainers": [{"name": "i", "image": "here:1", "command": ["exit", "0"]}],
        "containers": [{"name": "c", "image": "here:1", "command": ["run"]}]}),
    )
    .await;
    let mut never = json!({"containers": [{"name": "n", "image": "here:1", "command": ["run"]}]});
    never["restartPolicy"] = "Never".into();
    node.create("never", never).await;
    node.until("p", "runs", running).await;
    node.until("never", "runs", running).await;
    node.boundary.lose_all();
    let pod = node.until("p", "runs again", |p| restarts(p, "c") == 1 && running(p)).await;
    assert_eq!(container(&pod, "c").str_at("/lastState/terminated/reason"), "ContainerStatusUnknown");
    assert_eq!(node.boundary.count("start i"), 2, "init containers run again");
    node.until("never", "fails", |p| phase(p) == "Failed").await;
    node.until_event("SandboxChanged").await;
}

#[tokio::test(start_paused = true)]
async fn down_works_without_the_api() {
    let node = Node::new();
    let agent = node.start();
    node.create("a", one(&["graceful"])).await;
    node.create("b", json!({"containers": [{"name": "s", "image": "here:1", "command": ["stubborn"]}]})).await;
    node.until("a", "runs", running).await;
    node.until("b", "runs", running).await;
    agent.stop().await;
    assert_eq!(node.agent().destroy_all().await, 2);
    assert_eq!(node.boundary.sandbox_count(), 0);
    assert!(node.networks.attached.lock().unwrap().is_empty());
    assert_eq!(node.agent().destroy_all().await, 0);
    let mut agent = node.start();
    for times in 1..4 {
        node.until("a", "comes back", |p| running(p) && restarts(p, "c") == times).await;
        node.until("b", "comes back", running).await;
        agent.stop().await;
        assert_eq!(node.agent().destroy_all().await, 2);
        agent = node.start();
    }
    let events = node.events().await;
    assert!(!events.iter().any(|e| e.contains("BackOff")), "nothing crashed: {events:#?}");
}

#[tokio::test(start_paused = true)]
async fn the_node_registers() {
    let node = Node::new();
    let agent = node.start();
    let nodes = core("nodes");
    let real = std::time::Instant::now();
    let found = loop {
        match node.client.get(&nodes, "", "n1").await {
            Ok(found) if found.pointer("/status/conditions").is_some() => break found,
            _ => assert!(real.elapsed() < Duration::from_secs(30)),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!(found.label("kubernetes.io/os"), Some("linux"));
    assert_eq!(condition(&found, "Ready"), "True");
    assert!(found.pointer("/status/capacity/cpu").is_some());
    assert_eq!(found.pointer("/status/runtimeHandlers/1/name"), Some(&json!("container")));
    let leases = api::kind::Resource::new("coordination.k8s.io", "v1", "leases");
    let renewed = || async {
        let lease = node.client.get(&leases, "kube-node-lease", "n1").await;
        lease.map(|l| l.resource_version().to_owned()).unwrap_or_default()
    };
    let first = renewed().await;
    tokio::time::sleep(Duration::from_secs(11)).await;
    assert_ne!(renewed().await, first);
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn many_pods_have_ranges_of_their_own() {
    let node = Node::new();
    let _agent = node.start();
    for index in 0..20 {
        node.create(&format!("p{index}"), json!({"containers": [{"name": format!("c{index}"), "image": "here:1"}]}))
            .await;
    }
    let mut bases = std::collections::BTreeSet::new();
    for index in 0..20 {
        let pod = node.until(&format!("p{index}"), "runs", running).await;
        let record = std::fs::read(node.dir.path().join("data/pods").join(pod.uid()).join("sandbox.json")).unwrap();
        let record: Value = serde_json::from_slice(&record).unwrap();
        bases.insert(record.pointer("/id_base").and_then(Value::as_u64).unwrap());
    }
    assert_eq!(bases.len(), 20);
    assert!(bases.iter().all(|b| *b >= 1_048_576 && b % 65_536 == 0));
}
