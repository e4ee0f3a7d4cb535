//! A gateway on its own, for measurements: `front LISTEN UPSTREAM WORKERS [ROUTES [TLS_LISTEN CERT KEY]]` routes everything
//! to one endpoint; of ROUTES further ones each has a path of its own.

use api::client::Client;
use api::kind::Resource;
use api::testing::MemoryClient;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use gateway::{Config, Gateway};
use serde_json::json;
use std::error::Error;
use std::net::{SocketAddr, TcpListener};

const GROUP: &str = "gateway.networking.k8s.io";

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [listen, upstream, workers, more @ ..] = args.as_slice() else { return Err("usage".into()) };
    let (listener, upstream): (_, SocketAddr) = (TcpListener::bind(listen)?, upstream.parse()?);
    let routes: usize = more.first().map_or(Ok(0), |count| count.parse())?;
    let mut config = Config::new(listener);
    let mut listeners = json!([{"name": "http", "port": 80, "protocol": "HTTP"}]);
    let mut secret = None;
    if let [_, tls, certificate, key] = more {
        let encode = |path: &String| Ok::<_, std::io::Error>(STANDARD.encode(std::fs::read(path)?));
        config.tls_listener = Some(TcpListener::bind(tls)?);
        listeners = json!([{"name": "http", "port": 80, "protocol": "HTTP"},
            {"name": "https", "port": 443, "protocol": "HTTPS", "tls": {"certificateRefs": [{"name": "cert"}]}}]);
        secret = Some(
            json!({"metadata": {"name": "cert"}, "data": {"tls.crt": encode(certificate)?, "tls.key": encode(key)?}}),
        );
    }
    let mut builder = match workers.parse::<usize>()? {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let workers: usize = workers.parse()?;
    let runtime = builder.worker_threads(workers.max(1)).enable_all().build()?;
    runtime.block_on(async {
        let client = MemoryClient::new();
        let gateway = json!({"metadata": {"name": "gw"}, "spec": {"gatewayClassName": "atoll",
            "listeners": listeners}});
        client.create(&Resource::new(GROUP, "v1", "gateways"), "a", gateway).await?;
        let service = json!({"metadata": {"name": "web"}, "spec": {"ports": [{"port": 80}]}});
        client.create(&Resource::new("", "v1", "services"), "a", service).await?;
        let slice = json!({"metadata": {"name": "web", "labels": {"kubernetes.io/service-name": "web"}},
            "ports": [{"port": upstream.port()}], "endpoints": [{"addresses": [upstream.ip().to_string()]}]});
        client.create(&Resource::new("discovery.k8s.io", "v1", "endpointslices"), "a", slice).await?;
        let route = json!({"metadata": {"name": "web"}, "spec": {"parentRefs": [{"name": "gw"}],
            "rules": [{"backendRefs": [{"name": "web", "port": 80}]}]}});
        client.create(&Resource::new(GROUP, "v1", "httproutes"), "a", route).await?;
        for number in 0..routes {
            let rule = json!({"matches": [{"path": {"type": "PathPrefix", "value": format!("/route/{number}")}}],
                "backendRefs": [{"name": "web", "port": 80}]});
            let route = json!({"metadata": {"name": format!("r{number}")},
                "spec": {"parentRefs": [{"name": "gw"}], "rules": [rule]}});
            client.create(&Resource::new(GROUP, "v1", "httproutes"), "a", route).await?;
        }
        if let Some(secret) = secret {
            client.create(&Resource::new("", "v1", "secrets"), "a", secret).await?;
        }
        Gateway::new(config, client).run(std::future::pending()).await?;
        Ok(())
    })
}
