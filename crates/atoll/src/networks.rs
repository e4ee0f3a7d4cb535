//! The networks of workloads and Services: what `atoll up` was told, remembered in `DATA/network/networks` so that
//! `atoll down`, and the next `up` without flags, mean the same.
//!
//! ```text
//! atoll-networks 1
//! pods 10.42.0.0/16,fd00:10:42::/64
//! services 10.43.0.0/16,fd00:10:43::/112
//! subnets 10.44.0.0/16,fd00:10:44::/48
//! ```

use crate::cli::{Failure, explain};
use crate::instance::{Instance, patiently};
use network::{Cidr, Cidr6, Router, RouterConfig};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

const HEAD: &str = "atoll-networks 1";
/// The DNS server is the tenth Service address.
const DNS: u32 = 10;

#[derive(clap::Args, Clone, Debug, Default)]
pub struct Networks {
    /// Networks of workloads' addresses, IPv4 and IPv6 [default: 10.42.0.0/16,fd00:10:42::/64, or what was chosen before]
    #[arg(long, value_name = "V4[,V6]")]
    pub pod_cidr: Option<String>,
    /// Networks of Services' addresses, IPv4 and IPv6 [default: 10.43.0.0/16,fd00:10:43::/112, or what was chosen before]
    #[arg(long, value_name = "V4[,V6]")]
    pub service_cidr: Option<String>,
    /// Where Networks (atoll.dev) may be, IPv4 and IPv6; workloads do not reach these outside [default:
    /// 10.44.0.0/16,fd00:10:44::/48 or the next that is free, or what was chosen before]
    #[arg(long, value_name = "V4[,V6]")]
    pub subnet_cidr: Option<String>,
    /// What the Networks of one namespace may have together: one part in N of --subnet-cidr, in each family [default: 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub subnet_share: Option<u32>,
}

/// The router, once the program that had it before has let go of it.
pub fn router(config: RouterConfig) -> Result<Router, Failure> {
    let busy = |error: &network::Error| matches!(error, network::Error::InUse { .. });
    patiently(busy, || Router::open(config.clone())).map_err(explain)
}

/// `V4` or `V4,V6`, put in place of what is there.
fn put(text: &str, v4: &mut Cidr, v6: &mut Cidr6) -> Result<(), String> {
    let mut parts = text.split(',').map(str::trim);
    let first = parts.next().unwrap_or_default();
    *v4 = first.parse().map_err(|error| format!("{error}"))?;
    if let Some(second) = parts.next() {
        *v6 = second.parse().map_err(|error| format!("{error}"))?;
    }
    match parts.next() {
        Some(_) => Err("one IPv4 network and one IPv6 network at most".into()),
        None => Ok(()),
    }
}

fn apply(config: &mut RouterConfig, networks: &Networks) -> Result<(), Failure> {
    let told = |flag: &str, text: &str, why: String| Failure(format!("{flag} {text}: {why}"));
    if let Some(text) = &networks.pod_cidr {
        put(text, &mut config.pod_cidr, &mut config.pod_cidr6).map_err(|why| told("--pod-cidr", text, why))?;
    }
    if let Some(text) = &networks.service_cidr {
        put(text, &mut config.service_cidr, &mut config.service_cidr6)
            .map_err(|why| told("--service-cidr", text, why))?;
    }
    match &networks.subnet_cidr {
        Some(text) => put(text, &mut config.subnet_cidr, &mut config.subnet_cidr6)
            .map_err(|why| told("--subnet-cidr", text, why))?,
        None => move_subnets(config),
    }
    config.subnet_share = networks.subnet_share.unwrap_or(config.subnet_share);
    config.dns_address = (config.service_cidr.base().to_bits() + DNS).into();
    config.check().map_err(|error| match error {
        network::Error::Config { field, value, why } => {
            Failure(format!("--{} {value}: {why}", field.replace('_', "-")))
        }
        other => explain(other),
    })
}

/// Nobody asked for subnets where workloads or Services are: they go to the next networks that are free.
fn move_subnets(config: &mut RouterConfig) {
    let overlaps =
        |own: Cidr, config: &RouterConfig| own.overlaps(config.pod_cidr) || own.overlaps(config.service_cidr);
    let overlaps6 =
        |own: Cidr6, config: &RouterConfig| own.overlaps(config.pod_cidr6) || own.overlaps(config.service_cidr6);
    let next = (45..=255).map(|n| format!("10.{n}.0.0/16")).chain((16..=31).map(|n| format!("172.{n}.0.0/16")));
    let next6 = (45..=99).map(|n| format!("fd00:10:{n}::/48")).chain(["fd01:10:44::/48".to_owned()]);
    if overlaps(config.subnet_cidr, config)
        && let Some(free) = next.filter_map(|text| text.parse().ok()).find(|own| !overlaps(*own, config))
    {
        config.subnet_cidr = free;
    }
    if overlaps6(config.subnet_cidr6, config)
        && let Some(free) = next6.filter_map(|text| text.parse().ok()).find(|own| !overlaps6(*own, config))
    {
        config.subnet_cidr6 = free;
    }
}

fn file(instance: &Instance) -> PathBuf {
    instance.data_dir.join("network/networks")
}

fn text(config: &RouterConfig) -> String {
    let RouterConfig { pod_cidr, pod_cidr6, service_cidr, service_cidr6, subnet_cidr, subnet_cidr6, .. } = config;
    let own = format!("pods {pod_cidr},{pod_cidr6}\nservices {service_cidr},{service_cidr6}");
    format!("{HEAD}\n{own}\nsubnets {subnet_cidr},{subnet_cidr6}\n")
}

fn read(path: &Path) -> Result<Option<Networks>, Failure> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|error| Failure(format!("read {}: {error}", path.display())))?,
    };
    let mut lines = text.lines();
    if lines.next() != Some(HEAD) {
        let path = path.display();
        return Err(Failure(format!(
            "{path} does not begin with {HEAD:?}: a newer atoll wrote it, or nobody's; use that one"
        )));
    }
    let mut known = Networks::default();
    for line in lines {
        match line.split_once(' ') {
            Some(("pods", value)) => known.pod_cidr = Some(value.to_owned()),
            Some(("services", value)) => known.service_cidr = Some(value.to_owned()),
            Some(("subnets", value)) => known.subnet_cidr = Some(value.to_owned()),
            _ => return Err(Failure(format!("{}: not a line of it: {line:?}", path.display()))),
        }
    }
    Ok(Some(known))
}

/// What is remembered, or the default.
pub fn known(instance: &Instance) -> Result<RouterConfig, Failure> {
    let mut config = RouterConfig::new(instance.data_dir.join("network"), instance.run_dir.clone());
    if let Some(known) = read(&file(instance))? {
        apply(&mut config, &known)?;
    }
    Ok(config)
}

/// What the flags say, beyond that what is remembered; and that is remembered.
pub fn choose(instance: &Instance, flags: &Networks) -> Result<RouterConfig, Failure> {
    let before = known(instance)?;
    let mut config = before.clone();
    apply(&mut config, flags)?;
    if text(&config) != text(&before) && instance.run_dir.join("netns/router").exists() {
        return Err(Failure(format!(
            "--pod-cidr, --service-cidr, --subnet-cidr: workloads have addresses of {} and {}, Services of {}; stop them \
             first: atoll down",
            before.pod_cidr, before.subnet_cidr, before.service_cidr
        )));
    }
    let path = file(instance);
    if fs::read_to_string(&path).ok().as_deref() != Some(&text(&config)) {
        write(&path, &text(&config)).map_err(|error| Failure(format!("write {}: {error}", path.display())))?;
    }
    Ok(config)
}

fn write(path: &Path, text: &str) -> std::io::Result<()> {
    let dir = path.parent().unwrap_or(path);
    fs::create_dir_all(dir)?;
    let new = path.with_extension("new");
    let mut file = fs::File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    fs::File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(dir: &Path) -> Instance {
        Instance { data_dir: dir.join("data"), run_dir: dir.join("run") }
    }
    fn flags(pods: Option<&str>, services: Option<&str>) -> Networks {
        Networks { pod_cidr: pods.map(str::to_owned), service_cidr: services.map(str::to_owned), ..Networks::default() }
    }

    #[test]
    fn what_was_chosen_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let instance = instance(dir.path());
        let first = choose(&instance, &flags(None, None)).unwrap();
        assert_eq!(
            (first.pod_cidr.to_string(), first.dns_address.to_string()),
            ("10.42.0.0/16".into(), "10.43.0.10".into())
        );
        let pods = Some("172.20.0.0/16,2001:db8:20::/64");
        choose(&instance, &flags(pods, Some("172.21.0.0/20"))).unwrap();
        let again = choose(&instance, &flags(None, None)).unwrap();
        assert_eq!(again.pod_cidr6.to_string(), "2001:db8:20::/64");
        assert_eq!(again.service_cidr6.to_string(), "fd00:10:43::/112");
        assert_eq!(again.dns_address.to_string(), "172.21.0.10");
        assert_eq!(text(&known(&instance).unwrap()), text(&again));
        let golden = "atoll-networks 1\npods 172.20.0.0/16,2001:db8:20::/64\nservices 172.21.0.0/20,fd00:10:43::/112\n\
                      subnets 10.44.0.0/16,fd00:10:44::/48\n";
        assert_eq!(text(&again), golden);
        // Not under workloads that run.
        fs::create_dir_all(instance.run_dir.join("netns")).unwrap();
        fs::write(instance.run_dir.join("netns/router"), "").unwrap();
        assert!(choose(&instance, &flags(None, None)).is_ok());
        let refused = choose(&instance, &flags(Some("10.42.0.0/16"), None)).err().unwrap().0;
        assert!(refused.contains("atoll down"), "{refused}");
    }

    #[test]
    fn subnets_make_room_unless_somebody_says_where_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let instance = instance(dir.path());
        fs::create_dir_all(instance.data_dir.join("network")).unwrap();
        // As an atoll wrote it that knew no subnets.
        let old = "atoll-networks 1\npods 10.44.0.0/15,fd00:10:44::/64\nservices 10.46.0.0/16,fd00:10:45::/112\n";
        fs::write(file(&instance), old).unwrap();
        let config = choose(&instance, &flags(None, None)).unwrap();
        assert_eq!(
            (config.subnet_cidr.to_string(), config.subnet_cidr6.to_string()),
            ("10.47.0.0/16".into(), "fd00:10:46::/48".into())
        );
        let asked = |text: &str| Networks { subnet_cidr: Some(text.into()), ..Networks::default() };
        let config = choose(&instance, &asked("192.168.0.0/16")).unwrap();
        assert_eq!(
            (config.subnet_cidr.to_string(), config.subnet_cidr6.to_string()),
            ("192.168.0.0/16".into(), "fd00:10:46::/48".into())
        );
        assert_eq!(choose(&instance, &flags(None, None)).unwrap().subnet_cidr.to_string(), "192.168.0.0/16");
        for (text, wanted) in [
            ("10.44.7.0/24", "--subnet-cidr 10.44.7.0/24: overlaps pod_cidr 10.44.0.0/15"),
            ("192.168.0.0/16,fd00:10:45::/48", "--subnet-cidr fd00:10:45::/48: overlaps service_cidr fd00:10:45::/112"),
            ("192.168.0.0/16,fd00:9::/120", "--subnet-cidr fd00:9::/120: is smaller than 192.168.0.0/16"),
            ("192.168.0.0", "--subnet-cidr 192.168.0.0: "),
        ] {
            let told = choose(&instance, &asked(text)).err().unwrap().0;
            assert!(told.contains(wanted), "{told}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let instance = instance(dir.path());
        for (pods, services, wanted) in [
            (Some("10.42.0.0/16,fd00::/120"), None, "--pod-cidr fd00::/120: is smaller"),
            (Some("10.43.0.0/16"), None, "--service-cidr 10.43.0.0/16: overlaps"),
            (Some("fd00::/64,10.42.0.0/16"), None, "--pod-cidr fd00::/64,10.42.0.0/16: "),
            (None, Some("10.43.0.0/16,fd00:1::/112,fd00:2::/112"), "at most"),
            (None, Some("224.0.0.0/16"), "--service-cidr 224.0.0.0/16: not a unicast"),
            (None, Some("10.43.0.1/16"), "zero them"),
            (None, Some(""), "--service-cidr : "),
        ] {
            let told = choose(&instance, &flags(pods, services)).err().unwrap().0;
            assert!(told.contains(wanted), "{told}");
        }
        fs::create_dir_all(instance.data_dir.join("network")).unwrap();
        for strange in ["", "atoll-networks 2\n", "atoll-networks 1\nnonsense\n", "atoll-networks 1\npods x\n"] {
            fs::write(file(&instance), strange).unwrap();
            assert!(choose(&instance, &flags(None, None)).is_err(), "{strange:?}");
        }
    }
}
