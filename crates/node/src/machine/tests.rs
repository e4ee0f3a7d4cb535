use super::*;
use crate::ports::{Credentials, DiskImage, ImageConfig, ResolvedImage};
use async_trait::async_trait;
use serde_json::json;

struct OneImage(PathBuf);

#[async_trait]
impl Images for OneImage {
    async fn find(&self, reference: &str) -> Result<Option<ResolvedImage>, ImageError> {
        let rootfs = Rootfs::Layers { image: reference.into(), layers: vec![self.0.clone()] };
        let config = ImageConfig::default();
        Ok(Some(ResolvedImage { reference: reference.into(), id: "sha256:1".into(), size: 1, config, rootfs }))
    }
    async fn pull(&self, reference: &str, _: &[Credentials]) -> Result<ResolvedImage, ImageError> {
        Ok(self.find(reference).await?.unwrap())
    }
    async fn disk(&self, _: &str) -> Result<DiskImage, ImageError> {
        Ok(DiskImage { path: "/images/disk".into(), format: "qcow2".into() })
    }
    async fn collect(&self, _: &BTreeSet<String>) -> Result<u64, ImageError> {
        Ok(0)
    }
}

async fn go(spec: serde_json::Value) -> Result<(tempfile::TempDir, MachineSpec), MachineError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("boot")).unwrap();
    std::fs::write(dir.path().join("boot/vmlinuz"), "k").unwrap();
    let network = SandboxNetwork {
        address: Some("10.42.0.7".parse().unwrap()),
        address6: Some("fd00:10:42::7".parse().unwrap()),
        gateway: Some("169.254.1.1".parse().unwrap()),
        dns: Some("10.43.0.10".parse().unwrap()),
        dns_search: vec!["ns.svc.cluster.local".into()],
        mac: "02:00:0a:2a:00:07".into(),
        ..SandboxNetwork::default()
    };
    let mut sources = Sources::default();
    sources.insert(SourceKind::Secret, "ci", &json!({"data": {"userdata": "I2Nsb3VkLWNvbmZpZw=="}}));
    sources.insert(SourceKind::Secret, "ssh", &json!({"data": {"a": "c3NoLWVkMjU1MTkgQUFBQQo="}}));
    let instance = InstanceSpec::parse(&spec.to_string())?;
    let input = MachineInput {
        instance: &instance,
        name: "vm",
        namespace: "ns",
        hostname: "vm",
        pod_dir: dir.path(),
        network: &network,
        sources: &sources,
        origin: None,
    };
    let machine = resolve(&OneImage(dir.path().to_owned()), &input).await?;
    Ok((dir, machine))
}

#[tokio::test]
async fn a_whole_machine() {
    let (dir, machine) = go(json!({
        "domain": {
            "cpu": {"cores": 2, "sockets": 2}, "memory": {"guest": "512Mi"},
            "firmware": {"kernelBoot": {"kernelArgs": "console=ttyS0", "container": {"image": "k", "kernelPath": "/boot/vmlinuz"}}},
            "devices": {"disks": [{"name": "root", "disk": {"bus": "scsi"}, "bootOrder": 1, "serial": "S"},
                {"name": "scratch", "disk": {}}, {"name": "init", "disk": {}}]}},
        "accessCredentials": [{"sshPublicKey": {"source": {"secret": {"secretName": "ssh"}}, "propagationMethod": {"noCloud": {}}}}],
        "volumes": [{"name": "root", "containerDisk": {"image": "d"}}, {"name": "scratch", "emptyDisk": {"capacity": "1Gi"}},
            {"name": "init", "cloudInitNoCloud": {"secretRef": {"name": "ci"}}}]
    }))
    .await
    .unwrap();
    assert_eq!((machine.vcpus, machine.memory_bytes), (4, 512 << 20));
    assert_eq!(machine.kernel.unwrap(), dir.path().canonicalize().unwrap().join("boot/vmlinuz"));
    assert_eq!((machine.disks[0].bus.as_str(), machine.disks[0].format.as_str()), ("scsi", "qcow2"));
    let scratch = &machine.disks[1];
    assert_eq!((scratch.format.as_str(), std::fs::metadata(&scratch.path).unwrap().len()), ("raw", 1 << 30));
    let init = machine.cloud_init.unwrap();
    assert_eq!(init.user_data, "#cloud-config");
    assert!(init.meta_data.contains("public-keys:\n  - \"ssh-ed25519 AAAA\"\n"), "{}", init.meta_data);
    let config = &init.network_config;
    for part in [
        "\"10.42.0.7/32\"",
        "to: \"0.0.0.0/0\"\n        via: \"169.254.1.1\"",
        "on-link: true",
        "02:00:0a:2a:00:07",
        "\"fd00:10:42::7/128\"",
        "to: \"::/0\"\n        via: \"fe80::1\"",
        "[10.43.0.10]",
    ] {
        assert!(config.contains(part), "{config}");
    }
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let error = |spec: serde_json::Value| async { go(spec).await.unwrap_err().to_string() };
    let disks = json!({"disks": [{"name": "a", "disk": {}}]});
    let memory = json!({"guest": "64Mi"});
    assert!(error(json!({"domain": {"memory": memory}})).await.starts_with("spec.volumes: nothing to boot from"));
    assert!(
        error(json!({"domain": {"devices": disks}, "volumes": [{"name": "a", "containerDisk": {"image": "i"}}]}))
            .await
            .starts_with("spec.domain.memory.guest: is required")
    );
    let pvc = json!([{"name": "a", "persistentVolumeClaim": {"claimName": "x"}}]);
    let text = error(json!({"domain": {"memory": memory, "devices": disks}, "volumes": pvc})).await;
    assert!(text.starts_with("spec.volumes[0]: volume type persistentVolumeClaim"), "{text}");
    let with = |extra: serde_json::Value, interfaces: serde_json::Value| {
        json!({"domain": {"memory": memory, "firmware": {"bootloader": extra},
                          "devices": {"disks": [{"name": "a", "disk": {}}], "interfaces": interfaces}},
               "volumes": [{"name": "a", "containerDisk": {"image": "i"}}]})
    };
    for (bootloader, interfaces, expected) in [
        (json!({"efi": {}}), json!([]), "spec.domain.firmware.bootloader.efi.secureBoot: is not there"),
        (
            json!({"efi": {"secureBoot": false, "persistent": true}}),
            json!([]),
            "efi.persistent: EFI variables do not last",
        ),
        (json!({"bios": {"useSerial": true}}), json!([]), "bios.useSerial: the BIOS has no serial"),
        (
            json!({}),
            json!([{}, {"macAddress": "52:54:00:00:00:01"}]),
            "spec.domain.devices.interfaces[1].macAddress: \"52:",
        ),
    ] {
        let text = error(with(bootloader, interfaces)).await;
        assert!(text.contains(expected), "{text}");
    }
    let good = with(json!({"efi": {"secureBoot": false}}), json!([{"macAddress": "02-00-0A-2A-00-07"}]));
    assert!(go(good).await.unwrap().1.efi);
    for bad in ["../up", "a/b"] {
        let volumes = json!([{"name": bad, "emptyDisk": {"capacity": "1Gi"}}]);
        assert!(error(json!({"domain": {"memory": memory}, "volumes": volumes})).await.contains("is not a name"));
    }
    let missing = json!([{"name": "a", "cloudInitNoCloud": {"secretRef": {"name": "no"}}}]);
    assert_eq!(error(json!({"domain": {"memory": memory}, "volumes": missing})).await, "secret \"no\" not found");
    let kernel = json!({"kernelBoot": {"container": {"image": "k", "kernelPath": "/../../etc/passwd"}}});
    assert!(error(json!({"domain": {"memory": memory, "firmware": kernel}})).await.contains("no file"));
    let many = json!({"memory": memory, "cpu": {"cores": 4000}, "devices": disks});
    let text = error(json!({"domain": many, "volumes": [{"name": "a", "emptyDisk": {"capacity": "1Gi"}}]})).await;
    assert!(text.contains("at most 256"), "{text}");
    assert!(InstanceSpec::parse("[").is_err());
}
