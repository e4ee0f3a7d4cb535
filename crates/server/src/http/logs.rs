//! Into a running pod: its logs here, exec, attach and port-forward handed to [`crate::stream`].

use super::{Query, Request, Response, Service, method_not_allowed, respond, route::ResourcePath};
use crate::admission::subresources;
use crate::auth::Permit;
use crate::core::Target;
use api::kind::Kind;
use api::object::{Meta, Object};
use api::status::{Status, StatusResult};
use api::streams::{self, LogOptions, Wanted};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use serde_json::Value;

/// Whether the path reaches into a pod, or for what pods left behind.
pub fn is_stream(kind: &Kind, path: &ResourcePath) -> bool {
    is_kept(kind, path) || reaches_pod(kind, path)
}

/// Whether it is for the logs of pods that are gone, kept for the object that owned them.
fn is_kept(kind: &Kind, path: &ResourcePath) -> bool {
    !kind.resource.group.is_empty()
        && path.subresource == "log"
        && !path.name.is_empty()
        && path.rest.is_empty()
        && subresources::find(kind, "log").is_some()
}

fn reaches_pod(kind: &Kind, path: &ResourcePath) -> bool {
    kind.resource.group.is_empty()
        && *kind.resource.plural == *"pods"
        && !path.name.is_empty()
        && path.rest.is_empty()
        && matches!(path.subresource.as_str(), "log" | "exec" | "attach" | "portforward")
}

pub async fn handle(
    service: &Service,
    _permit: &Permit,
    request: Request,
    target: &Target,
    subresource: &str,
    query: &Query,
) -> StatusResult<Response> {
    let pod = service.core.get(target).await?;
    if *target.kind.resource.plural != *"pods" {
        if request.method() != Method::GET {
            return Err(method_not_allowed());
        }
        let options = LogOptions { follow: false, ..log_options(query)? };
        let stream = service.core.streams()?.kept_logs(&target.namespace, pod.uid(), options).await?;
        return Ok(streamed(service, stream));
    }
    if subresource == "log" {
        if request.method() != Method::GET {
            return Err(method_not_allowed());
        }
        return logs(service, target, &pod, query).await;
    }
    if !matches!(*request.method(), Method::GET | Method::POST) {
        return Err(method_not_allowed());
    }
    if pod.str_at("/spec/nodeName").is_empty() {
        return Err(Status::bad_request(format!("pod {} does not have a host assigned", target.name)));
    }
    let streams = service.core.streams()?;
    let into = |container: String| streams::Target {
        namespace: target.namespace.clone(),
        pod: target.name.clone(),
        pod_uid: pod.uid().to_owned(),
        container,
    };
    let wanted = Wanted {
        stdin: query.flag("stdin"),
        stdout: query.flag("stdout"),
        stderr: query.flag("stderr"),
        tty: query.flag("tty"),
        size: None,
    };
    let response = match subresource {
        "portforward" => crate::stream::port_forward(request, streams, into(String::new())).await,
        "attach" => {
            let container = choose(&pod, target, query.get("container"))?;
            crate::stream::attach(request, streams, into(container), wanted).await
        }
        _ => {
            let container = choose(&pod, target, query.get("container"))?;
            let command: Vec<String> = query.all("command").map(str::to_owned).collect();
            if command.is_empty() {
                return Err(Status::bad_request("you must specify at least one command for the container"));
            }
            crate::stream::exec(request, streams, into(container), command, wanted).await
        }
    };
    Ok(response.map(|body| body.map_err(|never| match never {}).boxed_unsync()))
}

/// The names in one of a pod's container lists.
fn containers<'a>(pod: &'a Object, list: &str) -> impl Iterator<Item = &'a str> {
    pod.pointer("/spec")
        .and_then(|spec| spec.get(list))
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|c| c.get("name")?.as_str())
}

/// The container that is meant; refused in Kubernetes' words if that is not clear.
fn choose(pod: &Object, target: &Target, asked: &str) -> StatusResult<String> {
    let all: Vec<&str> = containers(pod, "containers").collect();
    let init: Vec<&str> = containers(pod, "initContainers").collect();
    if !asked.is_empty() {
        let known = all.iter().chain(&init).copied().chain(containers(pod, "ephemeralContainers")).any(|n| n == asked);
        let name = &target.name;
        return if known {
            Ok(asked.to_owned())
        } else {
            Err(Status::bad_request(format!("container {asked} is not valid for pod {name}")))
        };
    }
    if let Some(default) = pod.annotation("kubectl.kubernetes.io/default-container")
        && all.contains(&default)
    {
        return Ok(default.to_owned());
    }
    match all.as_slice() {
        [only] => Ok((*only).to_owned()),
        [] => Err(Status::bad_request(format!("pod {} has no containers", target.name))),
        several => {
            let list = several.join(" ");
            let mut text =
                format!("a container name must be specified for pod {}, choose one of: [{list}]", target.name);
            if !init.is_empty() {
                text.push_str(&format!(" or one of the init containers: [{}]", init.join(" ")));
            }
            Err(Status::bad_request(text))
        }
    }
}

fn log_options(query: &Query) -> StatusResult<LogOptions> {
    let since_seconds = query.number::<i64>("sinceSeconds")?;
    let since_time = query.get("sinceTime");
    if since_seconds.is_some() && !since_time.is_empty() {
        return Err(Status::bad_request("at most one of `sinceTime` or `sinceSeconds` may be specified"));
    }
    let since_nanos = match (since_seconds, since_time) {
        (Some(seconds), _) if seconds < 1 => {
            return Err(Status::bad_request("sinceSeconds: Invalid value: must be greater than 0"));
        }
        (Some(seconds), _) => Some(i128::from(api::time::now_micros()) * 1000 - i128::from(seconds) * 1_000_000_000),
        (None, "") => None,
        (None, text) => {
            let micros = api::time::parse_micros(text).ok_or_else(|| {
                Status::bad_request(format!("sinceTime: Invalid value: \"{text}\": must be an RFC 3339 time"))
            })?;
            Some(i128::from(micros) * 1000)
        }
    };
    let tail_lines = match query.number::<i64>("tailLines")? {
        Some(lines) if lines < 0 => {
            return Err(Status::bad_request("tailLines: Invalid value: must be greater than or equal to 0"));
        }
        lines => lines.and_then(|l| u64::try_from(l).ok()),
    };
    let limit_bytes = match query.number::<i64>("limitBytes")? {
        Some(bytes) if bytes < 1 => {
            return Err(Status::bad_request("limitBytes: Invalid value: must be greater than 0"));
        }
        bytes => bytes.and_then(|b| u64::try_from(b).ok()),
    };
    let stream = match query.get("stream") {
        "" | "All" => "All",
        "Stdout" => "Stdout",
        "Stderr" => "Stderr",
        other => {
            return Err(Status::bad_request(format!(
                "stream: Unsupported value: \"{other}\": supported values: \"All\", \"Stderr\", \"Stdout\""
            )));
        }
    };
    Ok(LogOptions {
        follow: query.flag("follow"),
        previous: query.flag("previous"),
        timestamps: query.flag("timestamps"),
        tail_lines,
        limit_bytes,
        since_nanos,
        stream: stream.to_owned(),
    })
}

async fn logs(service: &Service, target: &Target, pod: &Object, query: &Query) -> StatusResult<Response> {
    let container = choose(pod, target, query.get("container"))?;
    let options = log_options(query)?;
    let name = &target.name;
    if pod.str_at("/spec/nodeName").is_empty() {
        // Nothing has run: an empty log, as for a pod that waits for its node.
        return Ok(respond::text(StatusCode::OK, ""));
    }
    let status = ["containerStatuses", "initContainerStatuses", "ephemeralContainerStatuses"]
        .iter()
        .filter_map(|list| pod.pointer("/status")?.get(list)?.as_array())
        .flatten()
        .find(|s| s.get("name").and_then(Value::as_str) == Some(&container));
    if let Some(waiting) = status.and_then(|s| s.pointer("/state/waiting"))
        && status.is_some_and(|s| s.pointer("/lastState/terminated").is_none())
    {
        let reason = waiting.get("reason").and_then(Value::as_str).unwrap_or("waiting");
        let what = match reason {
            "ContainerCreating" | "PodInitializing" => {
                format!("container \"{container}\" in pod \"{name}\" is waiting to start: {reason}")
            }
            "ErrImagePull" | "ImagePullBackOff" => format!(
                "container \"{container}\" in pod \"{name}\" is waiting to start: trying and failing to pull image"
            ),
            other => format!("container \"{container}\" in pod \"{name}\" is waiting to start: {other}"),
        };
        return Err(Status::bad_request(what));
    }
    if options.previous && status.is_none_or(|s| s.pointer("/lastState/terminated").is_none()) {
        return Err(Status::bad_request(format!(
            "previous terminated container \"{container}\" in pod \"{name}\" not found"
        )));
    }
    let into = streams::Target {
        namespace: target.namespace.clone(),
        pod: name.clone(),
        pod_uid: pod.uid().to_owned(),
        container,
    };
    let stream = service.core.streams()?.logs(&into, options).await?;
    Ok(streamed(service, stream))
}

fn streamed(service: &Service, stream: BoxStream<'static, std::io::Result<Bytes>>) -> Response {
    let stop = service.stop.clone();
    let stream = stream.take_until(async move { stop.cancelled().await });
    let mut response = respond::text(StatusCode::OK, Bytes::new());
    *response.body_mut() = respond::stream(stream);
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn options() {
        let parse = |text: &str| log_options(&Query::parse(text));
        let options = parse("follow=true&tailLines=10&timestamps=true&limitBytes=5&stream=Stderr").unwrap();
        assert!(options.follow && options.timestamps && !options.previous);
        assert_eq!((options.tail_lines, options.limit_bytes), (Some(10), Some(5)));
        assert_eq!(parse("sinceTime=1970-01-01T00:00:01Z").unwrap().since_nanos, Some(1_000_000_000));
        for bad in
            ["tailLines=-1", "limitBytes=0", "sinceSeconds=1&sinceTime=x", "sinceTime=x", "stream=x", "tailLines=y"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn which_container() {
        let kind = crate::testing::kind("pods");
        let target = Target::new(&kind, "n", "p");
        let one = json!({"spec": {"containers": [{"name": "a"}], "initContainers": [{"name": "i"}]}});
        assert_eq!(choose(&one, &target, "").unwrap(), "a");
        assert_eq!(choose(&one, &target, "i").unwrap(), "i");
        assert_eq!(choose(&one, &target, "x").unwrap_err().message, "container x is not valid for pod p");
        let two = json!({"spec": {"containers": [{"name": "a"}, {"name": "b"}], "initContainers": [{"name": "i"}]}});
        assert_eq!(
            choose(&two, &target, "").unwrap_err().message,
            "a container name must be specified for pod p, choose one of: [a b] or one of the init containers: [i]"
        );
    }
}
