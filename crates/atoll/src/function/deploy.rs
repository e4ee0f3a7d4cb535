//! From a component's file, or an image's name, to a Knative Service that serves it.

use super::api::{Api, Refusal};
use super::{Deploy, lambda, services, wait_ready};
use crate::cli::{Failure, Outcome, explain};
use crate::instance::Instance;
use image::{Digest, ImportOptions};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Label of what belongs to a function.
const FUNCTION: &str = "functions.atoll.dev/function";
/// Annotation: hosts that it may send requests to.
const ALLOW_OUTBOUND: &str = "functions.atoll.dev/allow-outbound";
const ROUTES: &str = "/apis/gateway.networking.k8s.io/v1/namespaces";
/// Enough to tell versions apart by name; the store goes by the whole.
const SHORT: usize = 16;

pub async fn run(options: &Deploy) -> Outcome {
    let api = options.at.api()?;
    let namespace = options.at.namespace(&api);
    let image = match (options.lambda, local(&options.source)?) {
        (true, Some(file)) => package(options, &namespace, &file)?,
        (false, Some(file)) => import(options, &namespace, &file)?,
        (_, None) => options.source.clone(),
    };
    let service = service(options, &namespace, &image)?;
    let routes = routes(options, &namespace)?;
    let path = format!("{}/{}", services(&namespace), options.name);
    let applied = api.apply(&path, &service).await.map_err(|refusal| match refusal {
        Refusal::NotFound(message) => Failure(format!("{message}; kubectl create namespace {namespace} makes it")),
        Refusal::Other(failure) => failure,
    })?;
    let owner = json!([{"apiVersion": "serving.knative.dev/v1", "kind": "Service", "name": options.name,
                        "uid": applied.pointer("/metadata/uid"), "controller": true}]);
    for mut route in routes.clone() {
        route["metadata"]["ownerReferences"] = owner.clone();
        let name = route["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        api.apply(&format!("{ROUTES}/{namespace}/httproutes/{name}"), &route).await?;
    }
    remove_others(&api, &namespace, &options.name, &routes).await?;
    println!("{} {namespace}/{}", image, options.name);
    if options.no_wait {
        return Ok(());
    }
    let ready = wait_ready(&api, &namespace, &options.name, applied.pointer("/metadata/generation")).await?;
    println!("{}", ready.pointer("/status/url").and_then(Value::as_str).unwrap_or("no URL"));
    Ok(())
}

/// The component's file, if the source is one: a file, or a project directory with `function.wasm` in it.
fn local(source: &str) -> Result<Option<PathBuf>, Failure> {
    let path = Path::new(source);
    if path.is_dir() {
        let built = path.join("function.wasm");
        return match built.is_file() {
            true => Ok(Some(built)),
            false => Err(Failure(format!("{}: no function.wasm in it; run its build.sh first", path.display()))),
        };
    }
    let looks_like_file =
        source.ends_with(".wasm") || source.ends_with(".zip") || source.starts_with('.') || source.starts_with('/');
    match path.is_file() {
        true => Ok(Some(path.to_owned())),
        false if looks_like_file => Err(Failure(format!("{source}: no such file"))),
        false => Ok(None),
    }
}

/// A zip becomes an image: over its base it is what Lambda unpacks to /var/task.
fn package(options: &Deploy, namespace: &str, file: &Path) -> Result<String, Failure> {
    let bytes = std::fs::read(file).map_err(|e| Failure(format!("{}: {e}", file.display())))?;
    let instance = Instance::existing(&options.at.data.data_dir)?;
    let store = crate::images::open_with(&instance)?;
    let store = store.with_local_hosts([options.registry.clone()]);
    let package = lambda::Package {
        zip: &bytes,
        repository: format!("{}/functions/{namespace}/{}", options.registry, options.name),
        base: options.base.as_deref(),
        handler: options.handler.as_deref(),
    };
    package.into_image(&store).map_err(|failure| Failure(format!("{}: {failure}", file.display())))
}

/// Into the image store, as a CNCF Wasm OCI artifact, named by what it holds: another content is another revision.
fn import(options: &Deploy, namespace: &str, file: &Path) -> Result<String, Failure> {
    let bytes = std::fs::read(file).map_err(|e| Failure(format!("{}: {e}", file.display())))?;
    if !bytes.starts_with(b"\0asm") {
        return Err(Failure(format!("{}: not WebAssembly; an image is given by its name", file.display())));
    }
    if bytes.get(4..8) == Some(&[1, 0, 0, 0]) {
        return Err(Failure(format!(
            "{}: a core module, not a component; build it for wasm32-wasip2, or see `atoll function new`",
            file.display()
        )));
    }
    let tag: String = Digest::of(&bytes).hex().chars().take(SHORT).collect();
    let name = format!("{}/functions/{namespace}/{}:{tag}", options.registry, options.name);
    let instance = Instance::existing(&options.at.data.data_dir)?;
    let store = crate::images::open_with(&instance)?;
    let import = ImportOptions { tag: Some(name.clone()), ..ImportOptions::default() };
    store.import(file, &import, &|_| {}).map_err(explain)?;
    Ok(name)
}

/// `NAME=VALUE`.
fn pair<'a>(flag: &str, text: &'a str) -> Result<(&'a str, &'a str), Failure> {
    let named = text.split_once('=').filter(|(name, _)| !name.is_empty());
    named.ok_or_else(|| Failure(format!("{flag} {text}: NAME=VALUE is needed")))
}

fn service(options: &Deploy, namespace: &str, image: &str) -> Result<Value, Failure> {
    let (mut env, mut env_from) = (Vec::new(), Vec::new());
    for text in &options.env {
        let (name, value) = pair("--env", text)?;
        env.push(json!({"name": name, "value": value}));
    }
    for text in &options.secret {
        match text.split_once('=') {
            None => env_from.push(json!({"secretRef": {"name": text}})),
            Some((variable, place)) => {
                let (name, key) = place
                    .split_once('/')
                    .ok_or_else(|| Failure(format!("--secret {text}: SECRET or VARIABLE=SECRET/KEY is needed")))?;
                env.push(json!({"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}}));
            }
        }
    }
    let mut annotations = json!({});
    for (annotation, value) in [("min-scale", options.min_scale), ("max-scale", options.max_scale)] {
        if let Some(value) = value {
            annotations[format!("autoscaling.knative.dev/{annotation}")] = value.to_string().into();
        }
    }
    if !options.allow_outbound.is_empty() {
        if options.lambda || options.boundary.as_deref().is_some_and(|boundary| boundary != "wasm") {
            return Err(Failure(
                "--allow-outbound: for components only; network policies say where pods may go".into(),
            ));
        }
        let list = function::AllowList::parse(&options.allow_outbound.join(","))
            .map_err(|why| Failure(format!("--allow-outbound {why}")))?;
        annotations[ALLOW_OUTBOUND] = list.to_string().into();
    }
    if options.lambda {
        annotations[lambda::INTERFACE] = lambda::LAMBDA.into();
        // A runtime has one event at a time: more pods, rather than a queue, up to a bound.
        if options.max_scale.is_none() {
            annotations["autoscaling.knative.dev/max-scale"] = lambda::MAX_SCALE.to_string().into();
        }
    }
    let mut container = json!({"image": image, "env": env, "envFrom": env_from});
    if let Some(memory) = &options.memory {
        container["resources"] = json!({"limits": {"memory": memory}});
    }
    let mut spec = json!({"containers": [container]});
    match (options.boundary.as_deref(), options.lambda) {
        (Some("container") | None, true) | (Some("container"), false) => {}
        (Some(other), true) => {
            return Err(Failure(format!("--boundary {other}: Lambda's runtime API is there for containers only")));
        }
        (named, false) => spec["runtimeClassName"] = named.unwrap_or("wasm").into(),
    }
    if let (true, Some(handler)) = (options.lambda && !options.source.ends_with(".zip"), &options.handler) {
        spec["containers"][0]["args"] = json!([handler]);
    }
    if let Some(seconds) = options.timeout {
        spec["timeoutSeconds"] = seconds.into();
    }
    if let Some(concurrency) = options.concurrency.or(options.lambda.then_some(1)) {
        spec["containerConcurrency"] = concurrency.into();
    }
    Ok(json!({
        "apiVersion": "serving.knative.dev/v1", "kind": "Service",
        "metadata": {"name": options.name, "namespace": namespace, "labels": {FUNCTION: options.name}},
        "spec": {"template": {"metadata": {"annotations": annotations}, "spec": spec}},
    }))
}

/// One HTTPRoute for each `HOST/PATH`.
fn routes(options: &Deploy, namespace: &str) -> Result<Vec<Value>, Failure> {
    let route = |(at, text): (usize, &String)| {
        let (host, path) = match text.find('/') {
            Some(slash) => text.split_at(slash),
            None => (text.as_str(), "/"),
        };
        if host.is_empty() {
            return Err(Failure(format!("--route {text}: HOST/PATH is needed, such as shop.localhost/price")));
        }
        Ok(json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
            "metadata": {"name": format!("{}-route-{at}", options.name), "namespace": namespace,
                         "labels": {FUNCTION: options.name}},
            "spec": {"parentRefs": [{"name": "atoll", "namespace": "default"}], "hostnames": [host],
                     "rules": [{"matches": [{"path": {"type": "PathPrefix", "value": path}}],
                                "backendRefs": [{"name": options.name, "port": 80}]}]},
        }))
    };
    options.route.iter().enumerate().map(route).collect()
}

/// Routes of an earlier deployment that this one does not ask for.
async fn remove_others(api: &Api, namespace: &str, name: &str, wanted: &[Value]) -> Outcome {
    let list = api.get(&format!("{ROUTES}/{namespace}/httproutes?labelSelector={FUNCTION}%3D{name}")).await?;
    for route in list.get("items").and_then(Value::as_array).into_iter().flatten() {
        let known = route.pointer("/metadata/name");
        // The Knative controllers' own routes carry their service's labels, too.
        let ours = known.and_then(Value::as_str).is_some_and(|n| n.starts_with(&format!("{name}-route-")));
        if ours && !wanted.iter().any(|w| w.pointer("/metadata/name") == known) {
            let known = known.and_then(Value::as_str).unwrap_or_default();
            match api.delete(&format!("{ROUTES}/{namespace}/httproutes/{known}")).await {
                Ok(_) | Err(Refusal::NotFound(_)) => {}
                Err(Refusal::Other(failure)) => return Err(failure),
            }
        }
    }
    Ok(())
}
