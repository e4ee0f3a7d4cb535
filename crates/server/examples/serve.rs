//! The API server alone, for trying it out: `cargo run -p server --example serve -- DIR [PORT]`. Writes `DIR/kubeconfig`.

use std::sync::Arc;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let dir = std::path::PathBuf::from(args.next().ok_or("usage: serve DIR [PORT]")?);
    let port: u16 = args.next().map_or(Ok(0), |p| p.parse())?;
    std::fs::create_dir_all(&dir)?;
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let listener = std::net::TcpListener::bind(("127.0.0.1", port))?;
    let advertise = listener.local_addr()?;
    let store = Arc::new(store::redb::Engine::open(&dir.join("store"))?);
    let config = server::Config {
        listener,
        data_dir: dir.clone(),
        advertise,
        store,
        cluster_domain: "cluster.local".into(),
        service_cidr: "10.43.0.0/16".into(),
    };
    let server = server::Server::new(config).await?;
    server.write_kubeconfig(&dir.join("kubeconfig"))?;
    println!("KUBECONFIG={}", dir.join("kubeconfig").display());
    server
        .serve(async {
            let _ = tokio::signal::ctrl_c().await;
        })
        .await?;
    Ok(())
}
