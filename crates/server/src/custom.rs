//! CustomResourceDefinitions at work.

use crate::core::Core;
use api::status::StatusResult;
use std::sync::Arc;

pub async fn load(_core: &Arc<Core>) -> StatusResult<()> {
    Ok(())
}

pub async fn run(_core: Arc<Core>) {
    std::future::pending::<()>().await
}
