//! Functions as Lambda describes them, and the Knative Services that they are.

use crate::answer::Refused;
use crate::dispatch::{self, INTERFACE, is_lambda};
use crate::settings::{ImageConfig, NewCode, Wanted, name};
use api::client::{Client, DeleteOptions, Patch};
use api::kind::Resource;
use api::object::{Meta, Object, SharedObject};
use api::status::Found;
use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::digest;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

pub const REGION: &str = "us-east-1";
pub const ACCOUNT: &str = "000000000000";
/// Bytes of a package.
const PACKAGE: usize = 50 << 20;
const DEFAULT_TIMEOUT: i64 = 3;
const DEFAULT_MEMORY: i64 = 128;
/// Pods of one function, unless its Knative Service says otherwise.
const MAX_SCALE: &str = "10";
/// ConfigMap of a namespace: images by the name of the runtime that they have.
const RUNTIMES: &str = "lambda-runtimes";
const LABEL: &str = "functions.atoll.dev/function";
const PREFIX: &str = "functions.atoll.dev/";

/// A zip that is to become an image.
#[derive(Debug)]
pub struct Package {
    pub namespace: String,
    pub function: String,
    pub zip: Vec<u8>,
    pub base: Option<String>,
    pub handler: Option<String>,
}

/// Makes images of packages.
#[async_trait]
pub trait Packager: Send + Sync + 'static {
    /// Name of the image, or what is wrong with the package.
    async fn image(&self, package: Package) -> Result<String, String>;
}

pub fn arn(name: &str) -> String {
    format!("arn:aws:lambda:{REGION}:{ACCOUNT}:function:{name}")
}

/// One namespace's functions.
pub struct Functions<'a> {
    pub client: &'a Arc<dyn Client>,
    pub packager: &'a Arc<dyn Packager>,
    pub namespace: &'a str,
}

/// Image, and what is told of the code.
struct Built {
    image: String,
    size: usize,
    sha256: String,
}

impl Functions<'_> {
    pub async fn get(&self, name: &str) -> Result<SharedObject, Refused> {
        let found = self.client.get(&dispatch::functions(), self.namespace, name).await;
        found.map_err(|status| if status.is_not_found() { Refused::not_found(name) } else { status.into() })
    }

    pub async fn create(&self, wanted: &Wanted) -> Result<SharedObject, Refused> {
        wanted.check()?;
        let given = wanted.function_name.as_deref();
        let name = name(given.ok_or_else(|| Refused::parameter("FunctionName: it is needed"))?)?;
        if self.get(&name).await.is_ok() {
            return Err(Refused::conflict(format!("Function already exist: {name}")));
        }
        let code = wanted.code.as_ref().ok_or_else(|| Refused::parameter("Code: ZipFile or ImageUri is needed"))?;
        let is_zip = code.zip_file.is_some();
        let package_type = if is_zip { "Zip" } else { "Image" };
        if wanted.package_type.as_deref().is_some_and(|wanted| wanted != package_type) {
            let message = format!("PackageType: Code has what {package_type} has");
            return Err(Refused::parameter(message));
        }
        let (runtime, handler) = (wanted.runtime.as_deref(), wanted.handler.as_deref());
        let built = self.build(&name, code.zip_file.as_deref(), code.image_uri.as_deref(), runtime, handler).await?;
        let mut service = json!({
            "apiVersion": "serving.knative.dev/v1", "kind": "Service",
            "metadata": {"name": name, "namespace": self.namespace, "labels": {LABEL: name}},
            "spec": {"template": {
                "metadata": {"annotations": {INTERFACE: "lambda", "autoscaling.knative.dev/max-scale": MAX_SCALE}},
                "spec": {"containerConcurrency": 1, "timeoutSeconds": DEFAULT_TIMEOUT,
                         "containers": [{"resources": {"limits": {"memory": format!("{DEFAULT_MEMORY}Mi")}}}]},
            }},
        });
        service.set_annotation(&key("package-type"), package_type);
        built.write(&mut service);
        write(&mut service, wanted)?;
        Ok(self.client.create(&dispatch::functions(), self.namespace, service).await?)
    }

    pub async fn change(&self, name: &str, wanted: &Wanted) -> Result<SharedObject, Refused> {
        wanted.check()?;
        if wanted.code.is_some() || wanted.package_type.is_some() || wanted.tags.is_some() {
            return Err(Refused::parameter("Code, PackageType, Tags: not of UpdateFunctionConfiguration"));
        }
        let mut service = self.changeable(name, wanted.revision_id.as_deref()).await?;
        if wanted.runtime.as_deref().is_some_and(|runtime| runtime != annotation(&service, "runtime")) {
            return Err(Refused::parameter(
                "Runtime: it is part of the image; send the code again by UpdateFunctionCode",
            ));
        }
        write(&mut service, wanted)?;
        self.update(service).await
    }

    pub async fn change_code(&self, name: &str, new: &NewCode) -> Result<SharedObject, Refused> {
        new.check()?;
        let mut service = self.changeable(name, new.revision_id.as_deref()).await?;
        let was_zip = annotation(&service, "package-type") == "Zip";
        if was_zip != new.zip_file.is_some() {
            let wanted = if was_zip { "ZipFile" } else { "ImageUri" };
            return Err(Refused::parameter(format!("{wanted}: it is needed, since the function was made of one")));
        }
        let (runtime, handler) = (annotation(&service, "runtime"), annotation(&service, "handler"));
        let handler = Some(handler).filter(|handler| !handler.is_empty());
        let (zip, image) = (new.zip_file.as_deref(), new.image_uri.as_deref());
        let built = self.build(name, zip, image, Some(&runtime), handler.as_deref()).await?;
        built.write(&mut service);
        if new.dry_run == Some(true) {
            return Ok(Arc::new(service));
        }
        self.update(service).await
    }

    pub async fn delete(&self, name: &str) -> Result<(), Refused> {
        let known = self.get(name).await?;
        let options = DeleteOptions { uid: Some(known.uid().to_owned()), ..DeleteOptions::default() };
        Ok(self.client.delete(&dispatch::functions(), self.namespace, name, &options).await?)
    }

    async fn changeable(&self, name: &str, revision: Option<&str>) -> Result<Object, Refused> {
        let known = self.get(name).await?;
        if !is_lambda(&known) {
            return Err(Refused::parameter(format!(
                "FunctionName: {name:?} is no Lambda function: change its Service"
            )));
        }
        match revision.filter(|revision| *revision != revision_of(&known)) {
            Some(_) => {
                let message = format!("RevisionId: the function's is {} now; read it again", revision_of(&known));
                Err(Refused::new(412, "PreconditionFailedException", message))
            }
            None => Ok((*known).clone()),
        }
    }

    async fn update(&self, mut service: Object) -> Result<SharedObject, Refused> {
        service.set_annotation(&key("last-modified"), &now());
        // Only what is ours: its status changes meanwhile, and RevisionId is who guards against another's change.
        let patch = json!({"metadata": {"annotations": service.pointer("/metadata/annotations")},
                           "spec": {"template": service.pointer("/spec/template")}});
        let (functions, name) = (dispatch::functions(), service.name().to_owned());
        Ok(self.client.patch(&functions, self.namespace, &name, "", Patch::Merge(patch)).await?)
    }

    async fn build(
        &self,
        name: &str,
        zip: Option<&str>,
        image: Option<&str>,
        runtime: Option<&str>,
        handler: Option<&str>,
    ) -> Result<Built, Refused> {
        let zip = match (zip, image) {
            (None, Some(image)) => {
                return Ok(Built { image: image.to_owned(), size: 0, sha256: sha256(image.as_bytes()) });
            }
            (Some(zip), None) => zip,
            _ => return Err(Refused::parameter("Code: one of ZipFile and ImageUri is needed")),
        };
        let zip = STANDARD.decode(zip).map_err(|e| Refused::parameter(format!("ZipFile: not base64: {e}")))?;
        if zip.len() > PACKAGE {
            let message = format!("ZipFile: {} bytes, of at most {PACKAGE}; make an image of it instead", zip.len());
            return Err(Refused::new(413, "RequestTooLargeException", message));
        }
        let (size, sha256) = (zip.len(), sha256(&zip));
        let package = Package {
            namespace: self.namespace.to_owned(),
            function: name.to_owned(),
            base: self.base(runtime).await?,
            handler: handler.map(str::to_owned),
            zip,
        };
        let image = self.packager.image(package).await.map_err(|why| Refused::parameter(format!("ZipFile: {why}")))?;
        Ok(Built { image, size, sha256 })
    }

    /// The image that has a runtime. Those of the kind `provided` need none: their packages bring it along.
    async fn base(&self, runtime: Option<&str>) -> Result<Option<String>, Refused> {
        let runtime = runtime.filter(|runtime| !runtime.is_empty());
        let runtime = runtime.ok_or_else(|| Refused::parameter("Runtime: it is needed with ZipFile"))?;
        let configmaps = Resource::new("", "v1", "configmaps");
        let map = self.client.get(&configmaps, self.namespace, RUNTIMES).await.found()?.unwrap_or_default();
        let image = map.get("data").and_then(|data| data.get(runtime)).and_then(Value::as_str);
        match image {
            None if !runtime.starts_with("provided") => Err(Refused::parameter(format!(
                "Runtime: no image is known that has {runtime:?}; name one in the ConfigMap {}/{RUNTIMES} under that key, \
                 or use provided.al2023 with a static bootstrap",
                self.namespace
            ))),
            image => Ok(image.map(str::to_owned)),
        }
    }
}

impl Built {
    fn write(&self, service: &mut Object) {
        service["spec"]["template"]["spec"]["containers"][0]["image"] = self.image.as_str().into();
        service.set_annotation(&key("code-size"), &self.size.to_string());
        service.set_annotation(&key("code-sha256"), &self.sha256);
        service.set_annotation(&key("last-modified"), &now());
    }
}

fn key(name: &str) -> String {
    format!("{PREFIX}{name}")
}

fn annotation(service: &Object, name: &str) -> String {
    service.annotation(&key(name)).unwrap_or_default().to_owned()
}

fn sha256(bytes: &[u8]) -> String {
    STANDARD.encode(digest::digest(&digest::SHA256, bytes))
}

/// As Lambda writes times: `2026-01-01T00:00:00.000+0000`.
fn now() -> String {
    format!("{}.000+0000", api::time::now_rfc3339().trim_end_matches('Z'))
}

/// Settings into a service's template and annotations.
fn write(service: &mut Object, wanted: &Wanted) -> Result<(), Refused> {
    let told = [
        ("runtime", &wanted.runtime),
        ("role", &wanted.role),
        ("handler", &wanted.handler),
        ("description", &wanted.description),
    ];
    for (name, value) in told {
        if let Some(value) = value {
            service.set_annotation(&key(name), value);
        }
    }
    if let Some(tags) = &wanted.tags {
        service.set_annotation(&key("tags"), &json!(tags).to_string());
    }
    let is_zip = annotation(service, "package-type") == "Zip";
    let spec = service.pointer_mut("/spec/template/spec");
    let spec = spec.ok_or_else(|| Refused::service("the function's Knative Service has no template"))?;
    if let Some(seconds) = wanted.timeout {
        spec["timeoutSeconds"] = seconds.into();
    }
    let container = spec.pointer_mut("/containers/0");
    let container = container.ok_or_else(|| Refused::service("the function's Knative Service has no container"))?;
    if let Some(memory) = wanted.memory_size {
        container["resources"]["limits"]["memory"] = format!("{memory}Mi").into();
    }
    if let Some(environment) = &wanted.environment {
        // What comes from elsewhere (a Secret's keys) is not of these settings, and stays.
        let kept = container["env"].as_array().into_iter().flatten().filter(|one| one.get("value").is_none()).cloned();
        let own = environment.variables.iter().map(|(name, value)| json!({"name": name, "value": value}));
        container["env"] = kept.chain(own).collect();
    }
    if let (true, Some(handler)) = (is_zip, &wanted.handler) {
        container["args"] = json!([handler]);
    }
    if let Some(config) = wanted.image_config.as_ref().filter(|_| !is_zip) {
        start(container, config);
    }
    Ok(())
}

/// How an image is started otherwise than it says itself.
fn start(container: &mut Value, config: &ImageConfig) {
    let set = [
        ("command", config.entry_point.as_ref().map(|words| json!(words))),
        ("args", config.command.as_ref().map(|words| json!(words))),
        ("workingDir", config.working_directory.as_ref().map(|dir| json!(dir))),
    ];
    for (field, value) in set {
        if let Some(value) = value {
            container[field] = value;
        }
    }
}

fn revision_of(service: &Object) -> String {
    format!("{}-{}", service.uid(), service.generation())
}

/// FunctionConfiguration.
pub fn configuration(service: &Object) -> Value {
    let name = service.name();
    let container = service.pointer("/spec/template/spec/containers/0").unwrap_or(&Value::Null);
    let mut told = json!({
        "FunctionName": name, "FunctionArn": arn(name), "Version": "$LATEST", "RevisionId": revision_of(service),
        "Role": annotation(service, "role"), "Description": annotation(service, "description"),
        "CodeSize": annotation(service, "code-size").parse().unwrap_or(0u64), "CodeSha256": annotation(service, "code-sha256"),
        "LastModified": last_modified(service),
        "PackageType": if annotation(service, "package-type") == "Zip" { "Zip" } else { "Image" },
        "Timeout": service.pointer("/spec/template/spec/timeoutSeconds").and_then(Value::as_i64).unwrap_or(300),
        "MemorySize": memory(container), "Architectures": ["x86_64"], "TracingConfig": {"Mode": "PassThrough"},
        "EphemeralStorage": {"Size": 512},
    });
    let variables: Map<String, Value> = container["env"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|one| Some((one.get("name")?.as_str()?.to_owned(), one.get("value")?.clone())))
        .collect();
    if !variables.is_empty() {
        told["Environment"] = json!({"Variables": variables});
    }
    for (field, name) in [("Runtime", "runtime"), ("Handler", "handler")] {
        let value = annotation(service, name);
        if !value.is_empty() {
            told[field] = value.into();
        }
    }
    for (field, value) in state(service) {
        told[field] = value;
    }
    told
}

fn last_modified(service: &Object) -> String {
    match annotation(service, "last-modified") {
        known if !known.is_empty() => known,
        _ => format!("{}.000+0000", service.str_at("/metadata/creationTimestamp").trim_end_matches('Z')),
    }
}

/// MiB.
fn memory(container: &Value) -> i64 {
    let limit = container.pointer("/resources/limits/memory").and_then(Value::as_str);
    let limit = limit.and_then(|text| api::quantity::Quantity::parse(text).ok());
    limit.map_or(DEFAULT_MEMORY, |bytes| bytes.value() >> 20)
}

/// State and LastUpdateStatus, with their reasons.
fn state(service: &Object) -> Vec<(&'static str, Value)> {
    let ready = service.pointer("/status/conditions").and_then(Value::as_array).into_iter().flatten();
    let ready = ready.into_iter().find(|condition| condition["type"] == "Ready").cloned().unwrap_or(Value::Null);
    let current = service.pointer("/status/observedGeneration").and_then(Value::as_i64) == Some(service.generation());
    let once = !service.str_at("/status/latestReadyRevisionName").is_empty();
    let status = if current { ready["status"].as_str().unwrap_or("Unknown") } else { "Unknown" };
    let why = || ready["message"].as_str().unwrap_or_default().to_owned();
    let mut told = Vec::new();
    match (once, status) {
        (true, _) | (_, "True") => told.push(("State", json!("Active"))),
        (false, "False") => {
            told.extend([("State", json!("Failed")), ("StateReason", why().into())]);
            told.push(("StateReasonCode", "FunctionError".into()));
        }
        (false, _) => {
            told.extend([("State", json!("Pending")), ("StateReason", json!("The function is being created."))]);
            told.push(("StateReasonCode", "Creating".into()));
        }
    }
    match status {
        "True" => told.push(("LastUpdateStatus", "Successful".into())),
        "False" => told.extend([("LastUpdateStatus", json!("Failed")), ("LastUpdateStatusReason", why().into())]),
        _ => told.push(("LastUpdateStatus", "InProgress".into())),
    }
    told
}

/// GetFunction.
pub fn whole(service: &Object) -> Value {
    let image = service.str_at("/spec/template/spec/containers/0/image");
    let tags: BTreeMap<String, String> = serde_json::from_str(&annotation(service, "tags")).unwrap_or_default();
    let mut told = json!({
        "Configuration": configuration(service),
        "Code": {"RepositoryType": "ECR", "ImageUri": image, "ResolvedImageUri": image},
    });
    if !tags.is_empty() {
        told["Tags"] = json!(tags);
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service() -> Object {
        let mut service = json!({
            "metadata": {"name": "f", "uid": "u", "generation": 2},
            "spec": {"template": {"spec": {"timeoutSeconds": 3, "containers": [
                {"image": "i", "resources": {"limits": {"memory": "128Mi"}},
                 "env": [{"name": "OLD", "value": "1"}, {"name": "SECRET", "valueFrom": {}}]}]}}},
        });
        service.set_annotation(&key("package-type"), "Zip");
        service
    }

    fn with_ready(status: &str, observed: i64, latest_ready: &str) -> (String, String) {
        let mut service = service();
        service["status"] = json!({"observedGeneration": observed, "latestReadyRevisionName": latest_ready,
            "conditions": [{"type": "Ready", "status": status, "message": "because"}]});
        let told = configuration(&service);
        (told["State"].as_str().unwrap().into(), told["LastUpdateStatus"].as_str().unwrap().into())
    }

    #[test]
    fn settings_are_written_and_told_again() {
        let mut service = service();
        let wanted = json!({"Timeout": 9, "MemorySize": 256, "Handler": "a.b", "Description": "d", "Tags": {"k": "v"},
                            "Environment": {"Variables": {"AB": "1"}}});
        write(&mut service, &crate::settings::read(wanted.to_string().as_bytes()).unwrap()).unwrap();
        let told = whole(&service);
        let configuration = &told["Configuration"];
        assert_eq!((&configuration["Timeout"], &configuration["MemorySize"]), (&json!(9), &json!(256)));
        assert_eq!(configuration["Environment"]["Variables"], json!({"AB": "1"}));
        assert_eq!((&configuration["Handler"], &told["Tags"]["k"]), (&json!("a.b"), &json!("v")));
        let container = &service["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["args"], json!(["a.b"]));
        assert_eq!(container["env"], json!([{"name": "SECRET", "valueFrom": {}}, {"name": "AB", "value": "1"}]));
    }

    #[test]
    fn states_are_lambdas() {
        let of = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(with_ready("Unknown", 2, ""), of("Pending", "InProgress"));
        assert_eq!(with_ready("False", 2, ""), of("Failed", "Failed"));
        assert_eq!(with_ready("True", 2, "r"), of("Active", "Successful"));
        // What is said is of an earlier generation.
        assert_eq!(with_ready("True", 1, "r"), of("Active", "InProgress"));
        assert_eq!(with_ready("False", 2, "r"), of("Active", "Failed"));
    }
}
