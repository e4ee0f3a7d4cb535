//! The paths of a document: what can be done with each kind, and with which parameters.

use super::{Version, group_version_kind, takes_strategic};
use crate::kind::{Kind, Scope};
use crate::schema::builtin;
use serde_json::{Map, Value, json};

/// What an operation does: HTTP method, `x-kubernetes-action`, first word of its id.
const LIST: (&str, &str, &str) = ("get", "list", "list");
const READ: (&str, &str, &str) = ("get", "get", "read");
const CREATE: (&str, &str, &str) = ("post", "post", "create");
const REPLACE: (&str, &str, &str) = ("put", "put", "replace");
const PATCH: (&str, &str, &str) = ("patch", "patch", "patch");
const DELETE: (&str, &str, &str) = ("delete", "delete", "delete");
const DELETE_ALL: (&str, &str, &str) = ("delete", "deletecollection", "deleteCollection");

pub fn of(kinds: &[&Kind], version: Version) -> Map<String, Value> {
    let mut paths = Map::new();
    for kind in kinds {
        let writer = Writer { kind, version };
        let base = match &*kind.resource.group {
            "" => format!("/api/{}", kind.resource.version),
            group => format!("/apis/{group}/{}", kind.resource.version),
        };
        let plural = &kind.resource.plural;
        let collection = match kind.scope {
            Scope::Cluster => format!("{base}/{plural}"),
            Scope::Namespaced => format!("{base}/namespaces/{{namespace}}/{plural}"),
        };
        let item = format!("{collection}/{{name}}");
        if kind.scope == Scope::Namespaced {
            paths.insert(format!("{base}/{plural}"), writer.path(&[LIST], "", "ForAllNamespaces"));
        }
        for subresource in writer.subresources() {
            let path = writer.path(&[READ, REPLACE, PATCH], subresource, "");
            paths.insert(format!("{item}/{subresource}"), path);
        }
        paths.insert(collection, writer.path(&[LIST, CREATE, DELETE_ALL], "", ""));
        paths.insert(item, writer.path(&[READ, REPLACE, PATCH, DELETE], "", ""));
    }
    paths
}

struct Writer<'a> {
    kind: &'a Kind,
    version: Version,
}

impl Writer<'_> {
    fn subresources(&self) -> Vec<&'static str> {
        let mut all = Vec::new();
        if self.kind.subresources.status {
            all.push("status");
        }
        if self.kind.subresources.scale.is_some() {
            all.push("scale");
        }
        all
    }

    fn path(&self, operations: &[(&str, &str, &str)], subresource: &str, suffix: &str) -> Value {
        let mut path = Map::new();
        for operation in operations {
            path.insert(operation.0.to_owned(), self.operation(*operation, subresource, suffix));
        }
        let mut parameters = Vec::new();
        let item = !subresource.is_empty() || operations.contains(&DELETE);
        if item {
            let text = format!("name of the {}", self.kind.kind);
            parameters.push(self.parameter("name", "path", "string", &text));
        }
        if self.kind.scope == Scope::Namespaced && suffix.is_empty() {
            let text = "object name and auth scope, such as for teams and projects";
            parameters.push(self.parameter("namespace", "path", "string", text));
        }
        parameters.push(self.parameter("pretty", "query", "string", "If 'true', then the output is pretty printed."));
        path.insert("parameters".into(), parameters.into());
        Value::Object(path)
    }

    fn operation(&self, operation: (&str, &str, &str), subresource: &str, suffix: &str) -> Value {
        let (_, action, word) = operation;
        let kind = self.kind;
        let identity = match subresource {
            "scale" => json!({"group": "autoscaling", "version": "v1", "kind": "Scale"}),
            _ => group_version_kind(kind, &kind.kind),
        };
        let namespaced = if kind.scope == Scope::Namespaced && suffix.is_empty() { "Namespaced" } else { "" };
        let sub = match subresource {
            "status" => "Status",
            "scale" => "Scale",
            _ => "",
        };
        let id = format!("{word}{}{namespaced}{}{sub}{suffix}", self.tag(true), kind.kind);
        let mut out = json!({
            "description": format!("{word} {}", if action == "list" || action == "deletecollection" { "objects" } else { "the object" }),
            "operationId": id,
            "tags": [self.tag(false)],
            "parameters": self.parameters(action),
            "responses": self.responses(action, subresource),
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": identity,
        });
        self.body(&mut out, action, subresource);
        out
    }

    /// `core_v1`, `apps_v1`; in operation ids `CoreV1`, `AppsV1`.
    fn tag(&self, id: bool) -> String {
        let group = if self.kind.resource.group.is_empty() { "core" } else { &self.kind.resource.group };
        let group: String = group.split('.').next().unwrap_or(group).to_owned();
        if !id {
            return format!("{group}_{}", self.kind.resource.version);
        }
        let capital = |text: &str| {
            let mut chars = text.chars();
            chars.next().map(|first| first.to_uppercase().chain(chars).collect::<String>()).unwrap_or_default()
        };
        format!("{}{}", capital(&group), capital(&self.kind.resource.version))
    }

    fn parameter(&self, name: &str, place: &str, kind: &str, description: &str) -> Value {
        let mut out = json!({"name": name, "in": place, "description": description});
        let fields = crate::object::object_of(&mut out);
        match self.version {
            Version::V2 => fields.insert("type".into(), kind.into()),
            Version::V3 => fields.insert("schema".into(), json!({"type": kind, "uniqueItems": true})),
        };
        if place == "path" {
            fields.insert("required".into(), true.into());
        } else if self.version == Version::V2 {
            fields.insert("uniqueItems".into(), true.into());
        }
        out
    }

    fn parameters(&self, action: &str) -> Vec<Value> {
        let query = |name: &str, kind: &str, text: &str| self.parameter(name, "query", kind, text);
        let mut all = Vec::new();
        if matches!(action, "list" | "deletecollection") {
            all.push(query("labelSelector", "string", "Selects objects by their labels. Defaults to everything."));
            all.push(query("fieldSelector", "string", "Selects objects by their fields. Defaults to everything."));
            all.push(query("limit", "integer", "Maximum number of objects in the answer."));
            all.push(query("continue", "string", "Where a list that was cut off goes on."));
            all.push(query("resourceVersion", "string", "Constrains which version of the data is served."));
            all.push(query("resourceVersionMatch", "string", "How resourceVersion is applied: Exact or NotOlderThan."));
            all.push(query("timeoutSeconds", "integer", "Seconds after which the call ends."));
        }
        if action == "list" {
            all.push(query("watch", "boolean", "Answers with a stream of changes instead of a list."));
            all.push(query("allowWatchBookmarks", "boolean", "Asks for bookmark events."));
            all.push(query("sendInitialEvents", "boolean", "Begins the stream with the objects there are."));
        }
        if matches!(action, "post" | "put" | "patch" | "delete" | "deletecollection") {
            all.push(query("dryRun", "string", "All: does everything but write."));
        }
        if matches!(action, "post" | "put" | "patch") {
            all.push(query("fieldManager", "string", "Name of the actor who makes these changes."));
            let text = "What to do about unknown and duplicate fields: Ignore, Warn or Strict.";
            all.push(query("fieldValidation", "string", text));
        }
        if action == "patch" {
            all.push(query("force", "boolean", "Apply takes over fields that other actors own."));
        }
        if matches!(action, "delete" | "deletecollection") {
            all.push(query("gracePeriodSeconds", "integer", "Seconds the object is given to end."));
            all.push(query("propagationPolicy", "string", "Orphan, Background or Foreground."));
        }
        all
    }

    fn reference(&self, name: &str) -> Value {
        json!({"$ref": self.version.reference(name)})
    }

    fn responses(&self, action: &str, subresource: &str) -> Value {
        let schema = match (action, subresource) {
            (_, "scale") => json!({"type": "object"}),
            ("list", _) => self.reference(&format!("{}List", self.kind.type_name)),
            ("delete" | "deletecollection", _) => self.reference(&format!("{}.Status", builtin::META)),
            _ => self.reference(&self.kind.type_name),
        };
        let answer = |text: &str| match self.version {
            Version::V2 => json!({"description": text, "schema": schema}),
            Version::V3 => json!({"description": text, "content": {"application/json": {"schema": schema}}}),
        };
        let mut out = json!({"200": answer("OK"), "401": {"description": "Unauthorized"}});
        let extra: &[(&str, &str)] = match action {
            "post" => &[("201", "Created"), ("202", "Accepted")],
            "put" | "patch" => &[("201", "Created")],
            "delete" => &[("202", "Accepted")],
            _ => &[],
        };
        for (code, text) in extra {
            crate::object::object_of(&mut out).insert((*code).to_owned(), answer(text));
        }
        out
    }

    fn body(&self, out: &mut Value, action: &str, subresource: &str) {
        let patches: &[&str] = if takes_strategic(self.kind) {
            &[
                "application/apply-patch+yaml",
                "application/json-patch+json",
                "application/merge-patch+json",
                "application/strategic-merge-patch+json",
            ]
        } else {
            &["application/apply-patch+yaml", "application/json-patch+json", "application/merge-patch+json"]
        };
        let (types, schema): (&[&str], Value) = match action {
            "patch" => (patches, json!({"type": "object"})),
            "post" | "put" if subresource == "scale" => (&["*/*"], json!({"type": "object"})),
            "post" | "put" => (&["*/*"], self.reference(&self.kind.type_name)),
            "delete" | "deletecollection" => (&["*/*"], self.reference(&format!("{}.DeleteOptions", builtin::META))),
            _ => return,
        };
        let required = !action.starts_with("delete");
        let fields = crate::object::object_of(out);
        match self.version {
            Version::V2 => {
                fields.insert("consumes".into(), types.into());
                fields.insert("produces".into(), json!(["application/json", "application/yaml"]));
                if let Some(Value::Array(parameters)) = fields.get_mut("parameters") {
                    parameters.insert(0, json!({"name": "body", "in": "body", "required": required, "schema": schema}));
                }
            }
            Version::V3 => {
                let content: Map<String, Value> =
                    types.iter().map(|kind| ((*kind).to_owned(), json!({"schema": schema}))).collect();
                fields.insert("requestBody".into(), json!({"required": required, "content": content}));
            }
        }
    }
}
