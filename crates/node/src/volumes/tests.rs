use super::*;
use serde_json::{Value, json};
use std::os::unix::fs::{PermissionsExt, symlink};

fn pod(volumes: Value, mounts: Value) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": "p", "namespace": "ns", "uid": "u", "labels": {"a": "b"}},
        "spec": {"volumes": volumes, "containers": [{"name": "c", "volumeMounts": mounts}]}
    }))
    .unwrap()
}

fn plan_of(volume: Value, sources: &Sources) -> Result<Vec<VolumePlan>, String> {
    let pod = pod(json!([volume]), json!([]));
    let tokens = Tokens::from([("\u{0}3600".to_owned(), "signed".to_owned())]);
    let input = PlanInput { pod: &pod, sources, facts: &Facts::default(), tokens: &tokens };
    plan(&input).map_err(|(_, e)| e.to_string())
}

fn some_sources() -> Sources {
    let mut sources = Sources::default();
    sources.insert(SourceKind::ConfigMap, "cm", &json!({"data": {"a": "1", "b": "2"}}));
    sources.insert(SourceKind::Secret, "s", &json!({"data": {"pw": "c2VjcmV0"}}));
    sources
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

struct Unmount(tempfile::TempDir);
impl Drop for Unmount {
    fn drop(&mut self) {
        tree::unmount_below(self.0.path());
    }
}
fn scratch() -> Unmount {
    Unmount(tempfile::tempdir().unwrap())
}

#[test]
fn content_changes_by_one_swap() {
    let dir = scratch();
    let mut sources = some_sources();
    let volume = json!({"name": "v", "configMap": {"name": "cm", "defaultMode": 416, "items": [
        {"key": "a", "path": "x/y"}, {"key": "b", "path": "z", "mode": 256}]}});
    set_up(dir.0.path(), &plan_of(volume.clone(), &sources).unwrap()[0], None).unwrap();
    let root = dir.0.path().join("volumes/v");
    assert_eq!(read(&root.join("x/y")), "1");
    let mode = |p: &str| std::fs::metadata(root.join(p)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("x/y"), mode("z")), (0o640, 0o400));
    let before = std::fs::read_link(root.join("..data")).unwrap();
    set_up(dir.0.path(), &plan_of(volume.clone(), &sources).unwrap()[0], None).unwrap();
    assert_eq!(std::fs::read_link(root.join("..data")).unwrap(), before, "nothing changed, nothing is rewritten");
    sources.insert(SourceKind::ConfigMap, "cm", &json!({"data": {"a": "new", "b": "2"}}));
    set_up(dir.0.path(), &plan_of(volume, &sources).unwrap()[0], None).unwrap();
    assert_eq!(read(&root.join("x/y")), "new");
    assert!(!root.join(before).exists());
    let all = json!({"name": "v", "configMap": {"name": "cm"}});
    set_up(dir.0.path(), &plan_of(all, &sources).unwrap()[0], Some(77)).unwrap();
    assert!(!root.join("x").exists() && root.join("a").exists());
    use std::os::unix::fs::MetadataExt;
    assert_eq!(std::fs::metadata(root.join("a")).unwrap().gid(), 77);
}

#[test]
fn missing_and_optional() {
    let sources = some_sources();
    let error = |v| plan_of(v, &sources).unwrap_err();
    assert_eq!(error(json!({"name": "v", "configMap": {"name": "no"}})), "configmap \"no\" not found");
    assert_eq!(error(json!({"name": "v", "secret": {"secretName": "no"}})), "secret \"no\" not found");
    assert!(
        error(json!({"name": "v", "configMap": {"name": "cm", "items": [{"key": "q", "path": "q"}]}}))
            .ends_with("references non-existent config key: q")
    );
    assert!(error(json!({"name": "v", "nfs": {"server": "a", "path": "/"}})).contains("nfs"));
    for good in [
        json!({"name": "v", "configMap": {"name": "no", "optional": true}}),
        json!({"name": "v", "configMap": {"name": "cm", "optional": true, "items": [{"key": "q", "path": "q"}]}}),
        json!({"name": "v"}),
    ] {
        assert!(plan_of(good.clone(), &sources).is_ok(), "{good}");
    }
}

#[test]
fn items_cannot_climb_out() {
    let sources = some_sources();
    for path in ["../x", "a/../../x", "/abs", "..", "..data", "", "a\0b", "./a"] {
        let volume = json!({"name": "v", "configMap": {"name": "cm", "items": [{"key": "a", "path": path}]}});
        assert!(plan_of(volume, &sources).is_err(), "{path:?}");
    }
    for name in ["..", "a/b", ""] {
        assert!(plan_of(json!({"name": name, "emptyDir": {}}), &sources).is_err(), "{name:?}");
    }
}

#[test]
fn a_file_is_no_directory() {
    let dir = scratch();
    let sources = some_sources();
    let volume = json!({"name": "v", "configMap": {"name": "cm", "items": [
        {"key": "a", "path": "x"}, {"key": "b", "path": "x/y"}]}});
    assert!(set_up(dir.0.path(), &plan_of(volume, &sources).unwrap()[0], None).is_err());
}

#[test]
fn projected_merges_and_secrets_stay_in_memory() {
    let dir = scratch();
    let sources = some_sources();
    let volume = json!({"name": "v", "projected": {"sources": [
        {"configMap": {"name": "cm"}},
        {"secret": {"name": "s", "items": [{"key": "pw", "path": "deep/pw"}]}},
        {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
        {"serviceAccountToken": {"path": "token"}}]}});
    set_up(dir.0.path(), &plan_of(volume, &sources).unwrap()[0], None).unwrap();
    let root = dir.0.path().join("volumes/v");
    assert_eq!(read(&root.join("deep/pw")), "secret");
    assert_eq!(read(&root.join("labels")), "a=\"b\"");
    assert_eq!(read(&root.join("token")), "signed");
    if !tree::is_mounted(&root) {
        println!("SKIPPED: no right to mount a tmpfs");
        return;
    }
    tree::remove(dir.0.path()).unwrap();
    assert!(!root.exists());
}

#[test]
fn host_path_types() {
    let dir = scratch();
    let at = |name: &str| dir.0.path().join(name);
    let go = |path: &Path, kind: &str| {
        let kind = VolumeKind::Host { path: path.to_owned(), kind: kind.into() };
        set_up(dir.0.path(), &VolumePlan { name: "v".into(), kind }, None)
    };
    assert!(go(&at("no"), "Directory").is_err());
    assert!(go(&at("d"), "DirectoryOrCreate").is_ok() && at("d").is_dir());
    assert!(go(&at("f"), "FileOrCreate").is_ok() && at("f").is_file());
    assert!(go(&at("f"), "Directory").is_err());
    assert!(go(&at("d"), "File").is_err());
    assert!(go(Path::new("/dev/null"), "CharDevice").is_ok());
    assert!(go(&at("f"), "Socket").is_err());
    assert!(go(&at("f"), "Banana").is_err());
    let relative = json!({"name": "v", "hostPath": {"path": "a/../b"}});
    assert!(plan_of(relative, &Sources::default()).is_err());
}

#[test]
fn sub_paths_stay_inside() {
    let dir = scratch();
    let root = dir.0.path().join("root");
    std::fs::create_dir_all(root.join("in")).unwrap();
    std::fs::write(dir.0.path().join("secret"), "outside").unwrap();
    symlink("../secret", root.join("climb")).unwrap();
    symlink(dir.0.path(), root.join("absolute")).unwrap();
    symlink("in", root.join("fine")).unwrap();
    symlink("/proc/self/root", root.join("magic")).unwrap();
    for bad in ["../secret", "climb", "absolute/secret", "absolute", "magic", "/etc", "in/../../secret", "absolute/new"]
    {
        assert!(subpath::resolve(&root, Path::new(bad), None).is_err(), "{bad}");
    }
    assert!(!dir.0.path().join("new").exists());
    for good in ["in", "fine", "fine/new/deep", "in/./x", "fresh"] {
        assert!(subpath::resolve(&root, Path::new(good), None).is_ok(), "{good}");
    }
    assert!(root.join("in/new/deep").is_dir() && root.join("fresh").is_dir());
}

#[test]
fn a_pinned_sub_path_cannot_be_swapped() {
    let dir = scratch();
    let pod =
        pod(json!([{"name": "v", "emptyDir": {}}]), json!([{"name": "v", "mountPath": "/m", "subPathExpr": "$(X)"}]));
    let volume = VolumePlan { name: "v".into(), kind: VolumeKind::EmptyDir { memory: false, size: None } };
    set_up(dir.0.path(), &volume, None).unwrap();
    let root = dir.0.path().join("volumes/v");
    let container = &pod.spec.as_ref().unwrap().containers[0];
    let mounts = match container_mounts(dir.0.path(), &pod, container, &|_| "sub".into(), None) {
        Ok(mounts) => mounts,
        Err(error) => {
            println!("SKIPPED: no right to bind mount: {}", chain(&error));
            return;
        }
    };
    let MountSource::Pod(path) = &mounts[0].source else { panic!("{mounts:?}") };
    std::fs::write(root.join("sub/mine"), "1").unwrap();
    std::fs::rename(root.join("sub"), root.join("moved")).unwrap();
    symlink("/", root.join("sub")).unwrap();
    assert!(path.join("mine").exists() && !path.join("etc").exists());
}

#[test]
fn file_volumes_are_read_only_and_mount_paths_plain() {
    let dir = scratch();
    let go = |volume: Value, mount: Value| {
        let pod = pod(json!([volume]), json!([mount]));
        container_mounts(dir.0.path(), &pod, &pod.spec.as_ref().unwrap().containers[0], &|t| t.into(), None)
    };
    let cm = json!({"name": "v", "configMap": {"name": "cm"}});
    assert!(go(cm.clone(), json!({"name": "v", "mountPath": "/m"})).unwrap()[0].read_only);
    assert!(go(cm.clone(), json!({"name": "v", "mountPath": "/m/../../x"})).is_err());
    assert!(go(cm, json!({"name": "other", "mountPath": "/m"})).is_err());
    assert!(!go(json!({"name": "v", "emptyDir": {}}), json!({"name": "v", "mountPath": "m"})).unwrap()[0].read_only);
}
