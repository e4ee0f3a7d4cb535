//! A gateway on its own, for measurements: `front LISTEN UPSTREAM WORKERS` routes everything to one endpoint.

use api::client::Client;
use api::kind::Resource;
use api::testing::MemoryClient;
use gateway::{Config, Gateway};
use serde_json::json;
use std::error::Error;
use std::net::{SocketAddr, TcpListener};

const GROUP: &str = "gateway.networking.k8s.io";

fn main() -> Result<(), Box<dyn Error>> {
    let [listen, upstream, workers] = std::env::args().skip(1).collect::<Vec<_>>().try_into().map_err(|_| "usage")?;
    let (listener, upstream): (_, SocketAddr) = (TcpListener::bind(listen)?, upstream.parse()?);
    let mut builder = match workers.parse()? {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let workers: usize = workers.parse()?;
    let runtime = builder.worker_threads(workers.max(1)).enable_all().build()?;
    runtime.block_on(async {
        let client = MemoryClient::new();
        let gateway = json!({"metadata": {"name": "gw"}, "spec": {"gatewayClassName": "atoll",
            "listeners": [{"name": "http", "port": 80, "protocol": "HTTP"}]}});
        client.create(&Resource::new(GROUP, "v1", "gateways"), "a", gateway).await?;
        let service = json!({"metadata": {"name": "web"}, "spec": {"ports": [{"port": 80}]}});
        client.create(&Resource::new("", "v1", "services"), "a", service).await?;
        let slice = json!({"metadata": {"name": "web", "labels": {"kubernetes.io/service-name": "web"}},
            "ports": [{"port": upstream.port()}], "endpoints": [{"addresses": [upstream.ip().to_string()]}]});
        client.create(&Resource::new("discovery.k8s.io", "v1", "endpointslices"), "a", slice).await?;
        let route = json!({"metadata": {"name": "web"}, "spec": {"parentRefs": [{"name": "gw"}],
            "rules": [{"backendRefs": [{"name": "web", "port": 80}]}]}});
        client.create(&Resource::new(GROUP, "v1", "httproutes"), "a", route).await?;
        Gateway::new(Config::new(listener), client).run(std::future::pending()).await?;
        Ok(())
    })
}
