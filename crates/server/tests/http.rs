//! The API by hand: what clients rely on and what hostile ones try.

mod common;

use common::{As, Running};
use serde_json::{Value, json};

const JSON: (&str, &str) = ("content-type", "application/json");
const CMS: &str = "/api/v1/namespaces/default/configmaps";

fn config_map(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"k": "v"}})
}

#[tokio::test]
async fn metrics_are_for_administrators() {
    let running = Running::start().await;
    let told = running.get("/metrics").await;
    assert_eq!(told.code, 200);
    assert_eq!(told.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    running.send(&As::Admin, "GET", "/api/v1/namespaces/default/configmaps/none", &[], "").await.refusal(404);
    let told = running.get("/metrics").await;
    let text = String::from_utf8_lossy(&told.body);
    for line in ["# TYPE atoll_api_requests_total counter", "atoll_api_requests_total{method=\"GET\",code=\"404\"} 1"] {
        assert!(text.lines().any(|one| one == line), "{line}: {text}");
    }
    assert!(text.contains("\nprocess_resident_memory_bytes "), "{text}");
    running.send(&As::Admin, "POST", "/metrics", &[JSON], "{}").await.refusal(405);
    running.send(&As::Anonymous, "GET", "/metrics", &[], "").await.refusal(401);
}

/// Tells of two connections, and of refusals without end.
struct Told;

#[async_trait::async_trait]
impl api::inspect::Inspect for Told {
    async fn ask(&self, question: api::inspect::Question) -> api::StatusResult<api::inspect::Lines> {
        use api::inspect::Question;
        use futures_util::StreamExt;
        match question {
            Question::Connections => Ok(futures_util::stream::iter(["1\n", "2\n"]).map(|line| Ok(line.into())).boxed()),
            Question::Log { .. } => Ok(futures_util::stream::repeat("0\n").map(|line| Ok(line.into())).boxed()),
            Question::Capture { pod, .. } => Err(api::Status::new(api::status::Reason::NotFound, format!("no {pod}"))),
            Question::Explain { .. } => Err(api::Status::bad_request("from: nobody")),
        }
    }
}

#[tokio::test]
async fn the_network_is_asked_by_administrators_alone() {
    const BASE: &str = "/apis/subresources.atoll.dev/v1alpha1";
    let running = Running::start().await;
    let connections = format!("{BASE}/connections");
    running.send(&As::Admin, "GET", &connections, &[], "").await.refusal(503);
    running.server.set_inspect(std::sync::Arc::new(Told));
    let told = running.get(&connections).await;
    assert_eq!((told.code, told.header("content-type"), &told.body[..]), (200, "application/jsonl", &b"1\n2\n"[..]));
    let capture = format!("{BASE}/namespaces/default/pods/web/capture");
    assert_eq!(running.send(&As::Admin, "GET", &capture, &[], "").await.refusal(404), "no web");
    let explain = format!("{BASE}/explanations?from=a&to=b&protocol=tcp&port=1");
    assert_eq!(running.send(&As::Admin, "GET", &explain, &[], "").await.refusal(400), "from: nobody");
    running.send(&As::Admin, "POST", &connections, &[JSON], "{}").await.refusal(405);
    running.send(&As::Admin, "GET", &format!("{BASE}/nothing"), &[], "").await.refusal(404);
    let answer = running
        .post(
            "/api/v1/namespaces/default/serviceaccounts/default/token",
            &json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 600}}),
        )
        .await;
    let token = As::Token(answer.json()["status"]["token"].as_str().unwrap().to_owned());
    for path in [connections, format!("{BASE}/refusals?follow=true"), capture, explain] {
        running.send(&As::Anonymous, "GET", &path, &[], "").await.refusal(401);
        let refusal = running.send(&token, "GET", &path, &[], "").await.refusal(403);
        assert!(refusal.contains("in API group \"subresources.atoll.dev\""), "{refusal}");
        // Reading packets is reaching into a pod.
        assert!(!path.ends_with("capture") || refusal.contains("cannot create resource \"pods/capture\""), "{refusal}");
    }
}

#[tokio::test]
async fn anonymous_gets_nothing_but_health_and_version() {
    let running = Running::start().await;
    for open in ["/healthz", "/livez", "/readyz", "/version"] {
        assert_eq!(running.send(&As::Anonymous, "GET", open, &[], "").await.code, 200, "{open}");
    }
    // Every endpoint there is, from the server's own description.
    let mut paths: Vec<(String, String)> = Vec::new();
    for path in running.get("/").await.json()["paths"].as_array().unwrap() {
        paths.push(("GET".into(), path.as_str().unwrap().to_owned()));
    }
    let mut groups = vec!["/api/v1".to_owned()];
    for group in running.get("/apis").await.json()["groups"].as_array().unwrap() {
        groups.extend(
            group["versions"]
                .as_array()
                .unwrap()
                .iter()
                .map(|v| format!("/apis/{}", v["groupVersion"].as_str().unwrap())),
        );
    }
    for group in groups {
        for resource in running.get(&group).await.json()["resources"].as_array().unwrap() {
            let name = resource["name"].as_str().unwrap();
            let base = match (name.split_once('/'), resource["namespaced"].as_bool().unwrap()) {
                (None, true) => format!("{group}/namespaces/default/{name}"),
                (None, false) => format!("{group}/{name}"),
                (Some((plural, sub)), true) => format!("{group}/namespaces/default/{plural}/x/{sub}"),
                (Some((plural, sub)), false) => format!("{group}/{plural}/x/{sub}"),
            };
            for verb in resource["verbs"].as_array().unwrap() {
                let (method, path) = match verb.as_str().unwrap() {
                    "create" => ("POST", base.clone()),
                    "list" => ("GET", base.clone()),
                    "watch" => ("GET", format!("{base}?watch=1")),
                    "deletecollection" => ("DELETE", base.clone()),
                    "get" if name.contains('/') => ("GET", base.clone()),
                    "get" => ("GET", format!("{base}/x")),
                    "update" if name.contains('/') => ("PUT", base.clone()),
                    "update" => ("PUT", format!("{base}/x")),
                    "patch" if name.contains('/') => ("PATCH", base.clone()),
                    "patch" => ("PATCH", format!("{base}/x")),
                    "delete" => ("DELETE", format!("{base}/x")),
                    other => panic!("unknown verb {other}"),
                };
                paths.push((method.into(), path));
            }
        }
    }
    assert!(paths.len() > 50, "{}", paths.len());
    for (method, path) in paths {
        if ["/healthz", "/livez", "/readyz", "/version"].contains(&path.as_str()) {
            continue;
        }
        let answer = running.send(&As::Anonymous, &method, &path, &[JSON], "{}").await;
        assert_eq!(answer.refusal(401), "Unauthorized", "{method} {path}");
        let forged = As::Token("eyJhbGciOiJub25lIn0.e30.".into());
        assert_eq!(running.send(&forged, &method, &path, &[JSON], "{}").await.code, 401, "{method} {path}");
    }
}

#[tokio::test]
async fn service_accounts_have_tokens_and_may_little() {
    let running = Running::start().await;
    let answer = running
        .post(
            "/api/v1/namespaces/default/serviceaccounts/default/token",
            &json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 600}}),
        )
        .await;
    assert_eq!(answer.code, 201);
    let token = As::Token(answer.json()["status"]["token"].as_str().unwrap().to_owned());
    assert_eq!(running.send(&token, "GET", "/apis", &[], "").await.code, 200);
    let refusal = running.send(&token, "GET", "/api/v1/pods", &[], "").await.refusal(403);
    assert_eq!(
        refusal,
        "pods is forbidden: User \"system:serviceaccount:default:default\" cannot list resource \"pods\" in API group \
         \"\" at the cluster scope"
    );
    let review = |group: &str| {
        json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
               "spec": {"resourceAttributes": {"verb": "get", "resource": "pods", "group": group}}})
    };
    let path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
    let answer = running.send(&token, "POST", path, &[JSON], review("").to_string()).await;
    assert_eq!((answer.code, &answer.json()["status"]["allowed"]), (201, &json!(false)));
    assert_eq!(running.post(path, &review("")).await.json()["status"]["allowed"], true);
    let who =
        running.send(&token, "POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", &[JSON], "{}").await.json();
    assert_eq!(who["status"]["userInfo"]["username"], "system:serviceaccount:default:default");
    let short = running
        .post("/api/v1/namespaces/default/serviceaccounts/default/token", &json!({"spec": {"expirationSeconds": 5}}))
        .await;
    assert!(short.refusal(422).contains("10 minutes"));
    // The token goes with its account.
    running.delete("/api/v1/namespaces/default/serviceaccounts/default", &Value::Null).await;
    assert_eq!(running.send(&token, "GET", "/apis", &[], "").await.code, 401);
}

#[tokio::test]
async fn an_object_from_creation_to_deletion() {
    let running = Running::start().await;
    let made = running.post(CMS, &config_map("a")).await;
    assert_eq!(made.code, 201);
    let made = made.json();
    assert_eq!(made["metadata"]["namespace"], "default");
    assert!(!made["metadata"]["uid"].as_str().unwrap().is_empty());
    assert_eq!(running.post(CMS, &config_map("a")).await.refusal(409), "configmaps \"a\" already exists");

    let mut stale = made.clone();
    let mut changed = made.clone();
    changed["data"]["k"] = "w".into();
    let updated = running.put(&format!("{CMS}/a"), &changed).await.json();
    assert_ne!(updated["metadata"]["resourceVersion"], made["metadata"]["resourceVersion"]);
    stale["data"]["k"] = "x".into();
    assert_eq!(
        running.put(&format!("{CMS}/a"), &stale).await.refusal(409),
        "Operation cannot be fulfilled on configmaps \"a\": the object has been modified; please apply your changes to \
         the latest version and try again"
    );
    // Nothing changed, nothing written.
    let same = running.put(&format!("{CMS}/a"), &updated).await.json();
    assert_eq!(same["metadata"]["resourceVersion"], updated["metadata"]["resourceVersion"]);
    // Without a version it wins.
    stale["metadata"]["resourceVersion"].take();
    assert_eq!(running.put(&format!("{CMS}/a"), &stale).await.json()["data"]["k"], "x");

    let wrong = json!({"preconditions": {"uid": "other"}});
    assert!(running.delete(&format!("{CMS}/a"), &wrong).await.refusal(409).contains("Precondition failed"));
    let gone = running.delete(&format!("{CMS}/a"), &Value::Null).await.json();
    assert_eq!((&gone["status"], &gone["details"]["uid"]), (&json!("Success"), &made["metadata"]["uid"]));
    assert_eq!(running.get(&format!("{CMS}/a")).await.refusal(404), "configmaps \"a\" not found");
}

#[tokio::test]
async fn what_does_not_fit_is_refused_with_its_place() {
    let running = Running::start().await;
    let refused = async |body: Value, code: u16| running.post(CMS, &body).await.refusal(code);
    let mut body = config_map("a");
    body["apiVersion"] = "v2".into();
    assert!(refused(body, 400).await.contains("does not match the expected API version (v1)"));
    let mut body = config_map("a");
    body["metadata"]["namespace"] = "other".into();
    assert!(refused(body, 400).await.contains("does not match the namespace sent on the request"));
    assert!(refused(config_map("Not_A_Name"), 422).await.contains("metadata.name: Invalid value: \"Not_A_Name\""));
    let nameless = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {}});
    assert!(refused(nameless, 422).await.contains("name or generateName is required"));
    let mut body = config_map("a");
    body["data"]["k"] = json!(1);
    assert!(refused(body, 400).await.contains("data"));
    let mut body = config_map("a");
    body["metadata"]["resourceVersion"] = "1".into();
    assert!(refused(body, 400).await.contains("resourceVersion should not be set"));
    let mut body = config_map("a");
    body["metadata"]["ownerReferences"] = json!([{"kind": "X"}]);
    assert!(refused(body, 422).await.contains("metadata.ownerReferences[0].uid"));
    let mut body = config_map("a");
    body["metadata"]["labels"] = json!({"-bad-": "x"});
    assert!(refused(body, 422).await.contains("metadata.labels"));

    let missing = running.post("/api/v1/namespaces/none/configmaps", &config_map("a")).await;
    assert_eq!(missing.refusal(404), "namespaces \"none\" not found");
    assert_eq!(running.get("/api/v1/nothings").await.code, 404);
    assert_eq!(running.get("/apis/none.example.com/v1/x").await.code, 404);
    running.post("/api/v1/configmaps", &config_map("a")).await.refusal(405);
    running.send(&As::Admin, "PUT", CMS, &[JSON], "{}").await.refusal(405);
    running.send(&As::Admin, "POST", "/apis", &[JSON], "{}").await.refusal(405);
}

#[tokio::test]
async fn hostile_bodies() {
    let running = Running::start().await;
    let post =
        async |kind: &str, body: String| running.send(&As::Admin, "POST", CMS, &[("content-type", kind)], body).await;
    post("application/json", "x".repeat(4 << 20)).await.refusal(413);
    post("application/json", "[".repeat(100_000)).await.refusal(400);
    post("application/json", "{\"a\":".repeat(1000)).await.refusal(400);
    post("application/json", String::new()).await.refusal(400);
    post("application/json", "[]".into()).await.refusal(400);
    post("application/json", "null".into()).await.refusal(400);
    post("application/cbor", "{}".into()).await.refusal(415);
    post("application/vnd.kubernetes.protobuf", "{}".into()).await.refusal(400);
    let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
    for n in 1..14 {
        bomb.push_str(&format!("a{n}: &a{n} [{}]\n", vec![format!("*a{}", n - 1); 10].join(",")));
    }
    // One that went off would have 10^14 values.
    post("application/yaml", bomb).await.refusal(400);
    let yaml = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: from-yaml\ndata:\n  k: v\n";
    assert_eq!(post("application/yaml", yaml.into()).await.code, 201);
    let accept = [("accept", "text/html")];
    running.send(&As::Admin, "GET", CMS, &accept, "").await.refusal(406);
}

#[tokio::test]
async fn strict_and_lenient_field_validation() {
    let running = Running::start().await;
    let body = r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"a","name":"a"},"dat":{},"data":{"k":"v"}}"#;
    let post = async |mode: &str| {
        let path = format!("{CMS}?dryRun=All&fieldValidation={mode}");
        running.send(&As::Admin, "POST", &path, &[JSON], body).await
    };
    let text = post("Strict").await.refusal(400);
    assert!(text.contains("duplicate field \"metadata.name\"") && text.contains("unknown field \"dat\""), "{text}");
    let warned = post("Warn").await;
    let warnings: Vec<_> = warned.headers.get_all("warning").iter().map(|v| v.to_str().unwrap()).collect();
    assert_eq!(warnings, ["299 - \"duplicate field \\\"metadata.name\\\"\"", "299 - \"unknown field \\\"dat\\\"\""]);
    assert_eq!(warned.json().get("dat"), None);
    let ignored = post("Ignore").await;
    assert_eq!((ignored.code, ignored.header("warning")), (201, ""));
    post("Maybe").await.refusal(400);
    // It was all a dry run.
    assert_eq!(running.get(&format!("{CMS}/a")).await.code, 404);
}

#[tokio::test]
async fn lists_in_pages_and_at_versions() {
    let running = Running::start().await;
    for n in 0..25 {
        let mut body = config_map(&format!("c{n:02}"));
        body["metadata"]["labels"] = json!({"even": (n % 2 == 0).to_string()});
        running.post(CMS, &body).await;
    }
    let names = |list: &Value| -> Vec<String> {
        let items = list["items"].as_array().unwrap();
        items.iter().map(|i| i["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    };
    let first = running.get(&format!("{CMS}?limit=10")).await.json();
    assert_eq!(names(&first).len(), 10);
    assert_eq!(first["metadata"]["remainingItemCount"], 15);
    let token = first["metadata"]["continue"].as_str().unwrap().to_owned();
    running.post(CMS, &config_map("c99")).await;
    let second = running.get(&format!("{CMS}?limit=10&continue={token}")).await.json();
    assert_eq!(second["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
    let token = second["metadata"]["continue"].as_str().unwrap().to_owned();
    let third = running.get(&format!("{CMS}?limit=10&continue={token}")).await.json();
    assert_eq!(names(&third).last().unwrap(), "c24", "pages are of one state");
    assert_eq!(third["metadata"].get("continue"), None);

    let even = running.get(&format!("{CMS}?labelSelector=even%3Dtrue&limit=5")).await.json();
    assert_eq!(names(&even), ["c00", "c02", "c04", "c06", "c08"]);
    let token = even["metadata"]["continue"].as_str().unwrap().to_owned();
    let rest = running.get(&format!("{CMS}?labelSelector=even%3Dtrue&limit=50&continue={token}")).await.json();
    assert_eq!(names(&rest).len(), 8);
    let one = running.get(&format!("{CMS}?fieldSelector=metadata.name%3Dc07")).await.json();
    assert_eq!(names(&one), ["c07"]);

    let version = first["metadata"]["resourceVersion"].as_str().unwrap();
    let exact = running.get(&format!("{CMS}?resourceVersion={version}&resourceVersionMatch=Exact")).await.json();
    assert_eq!(names(&exact).len(), 25);
    let newer = running.get(&format!("{CMS}?resourceVersion={version}&resourceVersionMatch=NotOlderThan")).await.json();
    assert_eq!(names(&newer).len(), 26);
    assert!(
        running.get(&format!("{CMS}?resourceVersion=999999")).await.refusal(504).contains("Too large resource version")
    );
    running.get(&format!("{CMS}?resourceVersionMatch=Exact")).await.refusal(422);
    running.get(&format!("{CMS}?continue=zzz")).await.refusal(400);
    running.get(&format!("{CMS}?limit=x")).await.refusal(400);
    running.get(&format!("{CMS}?labelSelector=a%3D%3D%3Db")).await.refusal(400);
    running.get(&format!("{CMS}?fieldSelector=spec.x%3D1")).await.refusal(400);
}

#[tokio::test]
async fn tables_and_metadata() {
    let running = Running::start().await;
    running.post(CMS, &config_map("a")).await;
    let table = [("accept", "application/json;as=Table;v=v1;g=meta.k8s.io,application/json")];
    let answer = running.send(&As::Admin, "GET", CMS, &table, "").await.json();
    assert_eq!((&answer["kind"], &answer["rows"][0]["cells"][0]), (&json!("Table"), &json!("a")));
    assert_eq!(answer["rows"][0]["object"]["kind"], "PartialObjectMetadata");
    let whole = running.send(&As::Admin, "GET", &format!("{CMS}?includeObject=Object"), &table, "").await.json();
    assert_eq!(whole["rows"][0]["object"]["data"]["k"], "v");
    let metadata = [("accept", "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io")];
    let answer = running.send(&As::Admin, "GET", CMS, &metadata, "").await.json();
    assert_eq!(answer["kind"], "PartialObjectMetadataList");
    assert_eq!(answer["items"][0].get("data"), None);
    let one = [("accept", "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io")];
    let answer = running.send(&As::Admin, "GET", &format!("{CMS}/a"), &one, "").await.json();
    assert_eq!(answer["kind"], "PartialObjectMetadata");
    assert!(running.get(&format!("{CMS}/a?pretty=true")).await.body.contains(&b'\n'));
}

#[tokio::test]
async fn generated_names_and_discovery_forms() {
    let running = Running::start().await;
    let body = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"generateName": "job-"}});
    let (one, two) = (running.post(CMS, &body).await.json(), running.post(CMS, &body).await.json());
    assert!(one["metadata"]["name"].as_str().unwrap().starts_with("job-"));
    assert_ne!(one["metadata"]["name"], two["metadata"]["name"]);

    for version in ["v2", "v2beta1"] {
        let accept =
            format!("application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList,application/json");
        let answer = running.send(&As::Admin, "GET", "/apis", &[("accept", &accept)], "").await;
        assert!(answer.header("content-type").contains("as=APIGroupDiscoveryList"));
        let json = answer.json();
        assert_eq!(json["apiVersion"], format!("apidiscovery.k8s.io/{version}"));
        assert!(json["items"].as_array().unwrap().iter().any(|g| g["metadata"]["name"] == "apps"));
        let etag = answer.header("etag").to_owned();
        let again =
            running.send(&As::Admin, "GET", "/apis", &[("accept", &accept), ("if-none-match", &etag)], "").await;
        assert_eq!(again.code, 304);
    }
    assert_eq!(running.get("/api").await.json()["versions"], json!(["v1"]));
    assert_eq!(running.get("/version").await.json()["minor"], "32");
}

#[tokio::test]
async fn compression_of_large_answers() {
    let running = Running::start().await;
    let mut body = config_map("large");
    body["data"]["k"] = "x".repeat(300_000).into();
    running.post(CMS, &body).await;
    let plain = running.get(CMS).await;
    assert_eq!(plain.header("content-encoding"), "");
    let small = running.send(&As::Admin, "GET", CMS, &[("accept-encoding", "gzip")], "").await;
    assert_eq!(small.header("content-encoding"), "gzip");
    assert!(small.body.len() < plain.body.len() / 10);
}

#[tokio::test]
async fn finalizers_hold_and_propagation_is_marked() {
    let running = Running::start().await;
    let mut body = config_map("held");
    body["metadata"]["finalizers"] = json!(["example.com/hold"]);
    running.post(CMS, &body).await;
    let path = format!("{CMS}/held");
    let marked = running.delete(&path, &Value::Null).await.json();
    assert!(marked["metadata"]["deletionTimestamp"].is_string());
    let mut live = running.get(&path).await.json();
    live["metadata"]["finalizers"] = json!(["example.com/hold", "example.com/more"]);
    assert!(running.put(&path, &live).await.refusal(422).contains("no new finalizers can be added"));
    live["metadata"]["finalizers"] = json!([]);
    assert_eq!(running.put(&path, &live).await.code, 200);
    running.get(&path).await.refusal(404);

    for (policy, finalizer) in [("Foreground", "foregroundDeletion"), ("Orphan", "orphan")] {
        running.post(CMS, &config_map("owner")).await;
        let path = format!("{CMS}/owner");
        let marked = running.delete(&path, &json!({"propagationPolicy": policy})).await.json();
        assert_eq!(marked["metadata"]["finalizers"], json!([finalizer]));
        let patch = json!({"metadata": {"finalizers": null}}).to_string();
        let merge = [("content-type", "application/merge-patch+json")];
        running.send(&As::Admin, "PATCH", &path, &merge, patch).await;
        running.get(&path).await.refusal(404);
    }
    running.post(CMS, &config_map("a")).await;
    running.delete(&format!("{CMS}/a?propagationPolicy=Sideways"), &Value::Null).await.refusal(400);
    let list = running.delete(&format!("{CMS}?labelSelector=none%3Dsuch"), &Value::Null).await.json();
    assert_eq!(list["items"], json!([]));
    running.delete(CMS, &Value::Null).await;
    assert_eq!(running.get(CMS).await.json()["items"], json!([]));
}

#[tokio::test]
async fn namespaces_end_when_they_are_empty() {
    let running = Running::start().await;
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n"}});
    let made = running.post("/api/v1/namespaces", &namespace).await.json();
    assert_eq!(made["spec"]["finalizers"], json!(["kubernetes"]));
    assert_eq!(running.get("/api/v1/namespaces/n/serviceaccounts/default").await.code, 200);
    let marked = running.delete("/api/v1/namespaces/n", &Value::Null).await.json();
    assert_eq!(marked["status"]["phase"], "Terminating");
    let refused = running.post("/api/v1/namespaces/n/configmaps", &config_map("a")).await.refusal(403);
    assert!(refused.contains("because it is being terminated"), "{refused}");
    let mut done = marked.clone();
    done["spec"]["finalizers"] = json!([]);
    assert_eq!(running.put("/api/v1/namespaces/n/finalize", &done).await.code, 200);
    running.get("/api/v1/namespaces/n").await.refusal(404);
    assert!(
        running.delete("/api/v1/namespaces/default", &Value::Null).await.refusal(403).contains("may not be deleted")
    );
}

#[tokio::test]
async fn services_get_addresses_and_ports_of_their_own() {
    let running = Running::start().await;
    let path = "/api/v1/namespaces/default/services";
    let service = |name: &str, spec: Value| {
        let mut spec = spec;
        if spec.get("ports").is_none() {
            spec["ports"] = json!([{"port": 80, "name": "http"}]);
        }
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec})
    };
    assert_eq!(running.get(&format!("{path}/kubernetes")).await.json()["spec"]["clusterIP"], "10.43.0.1");
    let one = running.post(path, &service("one", json!({}))).await.json();
    let address = one["spec"]["clusterIP"].as_str().unwrap().to_owned();
    assert!(address.starts_with("10.43."), "{one}");
    let taken = running.post(path, &service("two", json!({"clusterIP": address}))).await.refusal(422);
    assert!(taken.contains("provided IP is already allocated"), "{taken}");
    let outside = running.post(path, &service("two", json!({"clusterIP": "192.0.2.1"}))).await.refusal(422);
    assert!(outside.contains("not in the valid range"), "{outside}");
    let headless = running.post(path, &service("headless", json!({"clusterIP": "None"}))).await.json();
    assert_eq!(headless["spec"]["clusterIPs"], json!(["None"]));
    let dns = running.post(path, &service("dns", json!({"clusterIP": "10.43.0.10"}))).await;
    assert_eq!(dns.code, 201);

    let node = running.post(path, &service("node", json!({"type": "NodePort"}))).await.json();
    let port = node["spec"]["ports"][0]["nodePort"].as_i64().unwrap();
    assert!((30000..=32767).contains(&port));
    let ports = json!([{"port": 80, "nodePort": port, "name": "http"}]);
    let clash = running.post(path, &service("clash", json!({"type": "NodePort", "ports": ports}))).await.refusal(422);
    assert!(clash.contains("spec.ports[0].nodePort") && clash.contains("already allocated"), "{clash}");

    // Both families: an address of each, held and given back together.
    let dual = running.post(path, &service("dual", json!({"ipFamilyPolicy": "PreferDualStack"}))).await.json();
    let both = dual["spec"]["clusterIPs"].clone();
    assert_eq!(dual["spec"]["ipFamilies"], json!(["IPv4", "IPv6"]));
    assert!(both[1].as_str().unwrap().starts_with("fd00:10:43::"), "{dual}");
    let same = service("same", json!({"ipFamilies": ["IPv6"], "clusterIP": both[1]}));
    assert!(running.post(path, &same).await.refusal(422).contains("already allocated"));
    let single = service("dual", json!({"ipFamilyPolicy": "SingleStack"}));
    let single = running.put(&format!("{path}/dual"), &single).await.json();
    assert_eq!(single["spec"]["clusterIPs"], json!([both[0]]));
    let taken = running.post(path, &same).await.json();
    assert_eq!((&taken["spec"]["clusterIP"], &taken["spec"]["ipFamilies"]), (&both[1], &json!(["IPv6"])));
    let bad = service("bad", json!({"ipFamilies": ["IPv5"]}));
    assert!(running.post(path, &bad).await.refusal(422).contains("spec.ipFamilies[0]"));

    // An update that says nothing of the address keeps it; one that says another is refused.
    let mut update = service("one", json!({"selector": {"a": "b"}}));
    assert_eq!(running.put(&format!("{path}/one"), &update).await.json()["spec"]["clusterIP"], *address);
    update["spec"]["clusterIP"] = "10.43.9.9".into();
    assert!(running.put(&format!("{path}/one"), &update).await.refusal(422).contains("may not change once set"));
    // What is deleted gives its address back.
    running.delete(&format!("{path}/one"), &Value::Null).await;
    assert_eq!(running.post(path, &service("two", json!({"clusterIP": address}))).await.code, 201);
    running.delete(&format!("{path}/node"), &Value::Null).await;
    let ports = json!([{"port": 80, "nodePort": port, "name": "http"}]);
    assert_eq!(running.post(path, &service("clash", json!({"type": "NodePort", "ports": ports}))).await.code, 201);
}

#[tokio::test]
async fn node_ports_are_kept_shared_and_given_back() {
    let running = Running::start().await;
    let path = "/api/v1/namespaces/default/services";
    let service = |name: &str, spec: Value| json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec});
    let ports = json!([{"port": 53, "name": "tcp"}, {"port": 53, "name": "udp", "protocol": "UDP"}, {"port": 80, "name": "http"}]);
    let dns = running.post(path, &service("dns", json!({"type": "NodePort", "ports": ports}))).await.json();
    let number = |service: &Value, index: usize| service["spec"]["ports"][index]["nodePort"].as_i64().unwrap();
    // One number for both protocols of a port.
    assert_eq!(number(&dns, 0), number(&dns, 1));
    assert_ne!(number(&dns, 0), number(&dns, 2));
    let far = json!([{"port": 80, "nodePort": 8080}]);
    let far = running.post(path, &service("far", json!({"type": "NodePort", "ports": far}))).await.refusal(422);
    assert!(far.contains("spec.ports[0].nodePort") && far.contains("30000-32767"), "{far}");
    // An update that does not mention them keeps them, also on the way to a load balancer.
    let balanced = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "ports": ports});
    let balanced = running.put(&format!("{path}/dns"), &service("dns", balanced)).await.json();
    assert_eq!((number(&balanced, 0), number(&balanced, 2)), (number(&dns, 0), number(&dns, 2)));
    let health = balanced["spec"]["healthCheckNodePort"].as_i64().unwrap();
    assert!((30000..=32767).contains(&health) && ![number(&dns, 0), number(&dns, 2)].contains(&health));
    let taken = json!([{"port": 80, "nodePort": health}]);
    let clash = running.post(path, &service("clash", json!({"type": "NodePort", "ports": taken}))).await;
    assert!(clash.refusal(422).contains("already allocated"));
    let asked = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": number(&dns, 2), "ports": [{"port": 1}]});
    let clash = running.post(path, &service("clash", asked)).await.refusal(422);
    assert!(clash.contains("spec.healthCheckNodePort") && clash.contains("already allocated"), "{clash}");
    // What belongs to a load balancer goes with it, and its ports are others' to take.
    let mut plain = balanced;
    plain["spec"]["type"] = "ClusterIP".into();
    for port in plain["spec"]["ports"].as_array_mut().unwrap() {
        port.as_object_mut().unwrap().remove("nodePort");
    }
    let plain = running.put(&format!("{path}/dns"), &plain).await.json();
    for gone in ["healthCheckNodePort", "externalTrafficPolicy", "allocateLoadBalancerNodePorts"] {
        assert!(plain["spec"].get(gone).is_none(), "{gone}: {plain}");
    }
    let taken =
        json!([{"port": 80, "nodePort": health, "name": "a"}, {"port": 81, "nodePort": number(&dns, 0), "name": "b"}]);
    let taken = running.post(path, &service("taken", json!({"type": "NodePort", "ports": taken}))).await.json();
    assert_eq!(number(&taken, 0), health);
    // A load balancer may do without.
    let without = json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": [{"port": 80}]});
    let without = running.post(path, &service("without", without)).await.json();
    assert!(without["spec"]["ports"][0].get("nodePort").is_none(), "{without}");
}

#[tokio::test]
async fn pods_are_completed_bound_and_ended() {
    let running = Running::start().await;
    let path = "/api/v1/namespaces/default/pods";
    let pod = |name: &str, spec: Value| {
        let mut all = json!({"containers": [{"name": "c", "image": "i", "resources": {"limits": {"cpu": "1"}}}]});
        all.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": all})
    };
    let made = running.post(path, &pod("a", json!({}))).await.json();
    assert_eq!(made["spec"]["serviceAccountName"], "default");
    assert_eq!(made["spec"]["containers"][0]["resources"]["requests"]["cpu"], "1");
    assert_eq!(made["status"]["phase"], "Pending");
    let unknown = running.post(path, &pod("b", json!({"runtimeClassName": "none"}))).await.refusal(403);
    assert!(unknown.contains("RuntimeClass \"none\" not found"), "{unknown}");
    assert_eq!(running.post(path, &pod("b", json!({"runtimeClassName": "microvm"}))).await.code, 201);
    let account = running.post(path, &pod("c", json!({"serviceAccountName": "none"}))).await.refusal(403);
    assert!(account.contains("serviceaccount \"none\" not found"), "{account}");

    let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "a"},
                         "target": {"kind": "Node", "name": "n1"}});
    assert_eq!(running.post(&format!("{path}/a/binding"), &binding).await.code, 201);
    let bound = running.get(&format!("{path}/a")).await.json();
    assert_eq!(bound["spec"]["nodeName"], "n1");
    assert!(running.post(&format!("{path}/a/binding"), &binding).await.refusal(409).contains("already assigned"));
    let on_node = running.get("/api/v1/pods?fieldSelector=spec.nodeName%3Dn1").await.json();
    assert_eq!(on_node["items"].as_array().unwrap().len(), 1);

    // Status goes by its own way only.
    let mut status = bound.clone();
    status["status"]["phase"] = "Running".into();
    status["spec"]["hostname"] = "other".into();
    let kept = running.put(&format!("{path}/a/status"), &status).await.json();
    assert_eq!((&kept["status"]["phase"], kept["spec"].get("hostname")), (&json!("Running"), None));

    let marked = running.delete(&format!("{path}/a"), &Value::Null).await.json();
    assert_eq!(marked["metadata"]["deletionGracePeriodSeconds"], 30);
    let gone = running.delete(&format!("{path}/a"), &json!({"gracePeriodSeconds": 0})).await.json();
    assert_eq!(gone["kind"], "Pod", "as Kubernetes answers");
    running.get(&format!("{path}/a")).await.refusal(404);
    // Never scheduled: nothing to wait for. By eviction this time.
    let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "b"}});
    assert_eq!(running.post(&format!("{path}/b/eviction"), &eviction).await.code, 201);
    running.get(&format!("{path}/b")).await.refusal(404);
}

#[tokio::test]
async fn stopping_ends_watches() {
    let mut running = Running::start().await;
    let mut watch = running.watch(&format!("{CMS}?watch=1"), &[]).await;
    running.stop().await;
    assert!(watch.next().await.is_none());
}
