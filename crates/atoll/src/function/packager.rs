//! The Invoke API's packages: zips that clients send become images, as `atoll function deploy --lambda` makes them.

use super::lambda;
use async_trait::async_trait;
use image::Store;
use invoke::Package;
use std::sync::Arc;

pub struct Packager {
    pub images: Arc<Store>,
    /// Where the registry listens: what its images are named by.
    pub registry: String,
}

#[async_trait]
impl invoke::Packager for Packager {
    async fn image(&self, package: Package) -> Result<String, String> {
        let (images, registry) = (self.images.clone(), self.registry.clone());
        let make = move || {
            let package = lambda::Package {
                zip: &package.zip,
                repository: format!("{registry}/functions/{}/{}", package.namespace, package.function),
                base: package.base.as_deref(),
                handler: package.handler.as_deref(),
            };
            package.into_image(&images).map_err(|failure| failure.0)
        };
        tokio::task::spawn_blocking(make).await.unwrap_or_else(|error| Err(error.to_string()))
    }
}
