//! Who owns which field: `metadata.managedFields`, and server-side apply
//! (<https://kubernetes.io/docs/reference/using-api/server-side-apply/>).
//!
//! An *entry* is a manager, how it writes (`Apply` or `Update`), through which subresource and in which version, and
//! the set of fields it owns. A write by `Update` takes the fields it changes from everyone. A write by `Apply` owns
//! all it lists, together with whoever owns the same value; a value that differs from another's is a conflict, unless
//! forced; what the manager listed before and no longer lists goes away, unless someone else owns it.

use super::fields::{Set, path_text};
use super::typed::{Changes, Typed, without_system_fields};
use api::Object;
use api::object::Meta;
use api::schema::{Schema, Types};
use api::status::{Cause, Reason, Status, StatusResult};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// More `Update` entries than this are merged, oldest first.
const MAX_UPDATE_MANAGERS: usize = 10;
const ANCIENT_CHANGES: &str = "ancient-changes";
const BEFORE_FIRST_APPLY: &str = "before-first-apply";
/// The manager `kubectl apply --server-side` uses; only with it is the annotation of client-side apply heeded.
const KUBECTL: &str = "kubectl";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// All annotations of an object together.
const MAX_ANNOTATION_BYTES: usize = 256 << 10;
const MAX_MANAGER_LENGTH: usize = 128;

/// Who writes, how and when.
#[derive(Clone, Copy, Debug)]
pub struct Writer<'a> {
    /// See [`manager_name`].
    pub manager: &'a str,
    /// Version of the request, `apps/v1`.
    pub api_version: &'a str,
    /// `""`, `status`, `scale`, ...
    pub subresource: &'a str,
    /// Now: RFC 3339 in UTC with whole seconds, `2024-01-01T00:00:00Z`.
    pub time: &'a str,
}

/// The manager of a request: `?fieldManager=` if given, else what `User-Agent` says before the first `/`.
pub fn manager_name(field_manager: Option<&str>, user_agent: Option<&str>) -> StatusResult<String> {
    let given = field_manager.unwrap_or_default();
    if given.is_empty() {
        let product = user_agent.and_then(|agent| agent.split('/').next()).unwrap_or_default();
        let printable = product.chars().filter(|c| !c.is_control()).take(MAX_MANAGER_LENGTH).collect::<String>();
        return Ok(if printable.is_empty() { "unknown".to_owned() } else { printable });
    }
    let why = if given.chars().count() > MAX_MANAGER_LENGTH {
        format!("may not be more than {MAX_MANAGER_LENGTH} characters")
    } else if given.chars().any(char::is_control) {
        "should only contain printable characters".to_owned()
    } else {
        return Ok(given.to_owned());
    };
    let message = format!("Invalid value: {given:?}: {why}");
    let cause = Cause { reason: "FieldValueInvalid".into(), message, field: "fieldManager".into() };
    Err(Status::invalid("meta.k8s.io", "PatchOptions", "", vec![cause]))
}

/// Leaves of an applied object only what the endpoint it was sent to writes: through `/status` its identity and its
/// `status`; to the main resource of a kind with a status subresource all but `status`.
pub fn keep_part(applied: &mut Object, subresource: &str, has_status: bool) {
    let Value::Object(root) = applied else { return };
    match subresource {
        "" if has_status => {
            root.remove("status");
        }
        "status" => {
            root.retain(|key, _| matches!(key.as_str(), "apiVersion" | "kind" | "metadata" | "status"));
            if let Some(Value::Object(metadata)) = root.get_mut("metadata") {
                metadata.retain(|key, _| matches!(key.as_str(), "name" | "namespace" | "uid" | "resourceVersion"));
            }
        }
        _ => {}
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Operation {
    Apply,
    Update,
}

#[derive(Clone, Debug, PartialEq)]
struct Entry {
    manager: String,
    operation: Operation,
    api_version: String,
    subresource: String,
    /// RFC 3339; empty if not known. Sorts as text.
    time: String,
    fields: Set,
}

impl Entry {
    fn new(writer: &Writer, operation: Operation, fields: Set) -> Self {
        Entry {
            manager: writer.manager.to_owned(),
            operation,
            api_version: writer.api_version.to_owned(),
            subresource: writer.subresource.to_owned(),
            time: writer.time.to_owned(),
            fields,
        }
    }

    /// Whether this is the entry that `writer` continues. Appliers keep theirs when they change the version.
    fn is_of(&self, writer: &Writer, operation: Operation) -> bool {
        self.manager == writer.manager
            && self.operation == operation
            && self.subresource == writer.subresource
            && (operation == Operation::Apply || self.api_version == writer.api_version)
    }

    fn from_json(entry: &Value) -> Option<Self> {
        let text = |key: &str| entry.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let operation = match text("operation").as_str() {
            "Apply" => Operation::Apply,
            "Update" => Operation::Update,
            _ => return None,
        };
        if !matches!(text("fieldsType").as_str(), "" | "FieldsV1") {
            return None;
        }
        let fields = entry.get("fieldsV1").map_or(Ok(Set::default()), Set::from_json).ok()?;
        Some(Entry {
            manager: text("manager"),
            operation,
            api_version: text("apiVersion"),
            subresource: text("subresource"),
            time: text("time"),
            fields,
        })
    }

    fn to_json(&self) -> Value {
        let operation = match self.operation {
            Operation::Apply => "Apply",
            Operation::Update => "Update",
        };
        let mut entry = json!({
            "manager": self.manager,
            "operation": operation,
            "apiVersion": self.api_version,
            "fieldsType": "FieldsV1",
            "fieldsV1": self.fields.to_json(),
        });
        for (key, value) in [("subresource", &self.subresource), ("time", &self.time)] {
            if let (false, Value::Object(map)) = (value.is_empty(), &mut entry) {
                map.insert(key.to_owned(), value.as_str().into());
            }
        }
        entry
    }

    /// As conflict messages name it.
    fn described(&self) -> String {
        let mut text = format!("{:?}", self.manager);
        if !self.subresource.is_empty() {
            text.push_str(&format!(" with subresource {:?}", self.subresource));
        }
        if self.operation == Operation::Update {
            text.push_str(&format!(" using {}", self.api_version));
        }
        text
    }
}

/// All entries of an object; `None` if they cannot be read.
fn read(object: Option<&Object>) -> Option<Vec<Entry>> {
    let list = object.and_then(|object| object.pointer("/metadata/managedFields"));
    match list {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(Entry::from_json).collect(),
        Some(_) => None,
    }
}

fn write(object: &mut Object, mut entries: Vec<Entry>) {
    entries.sort_by(|a, b| {
        let key = |entry: &Entry| {
            (
                entry.operation,
                entry.time.clone(),
                entry.manager.clone(),
                entry.api_version.clone(),
                entry.subresource.clone(),
            )
        };
        key(a).cmp(&key(b))
    });
    let metadata = object.metadata_mut();
    if entries.is_empty() {
        metadata.remove("managedFields");
    } else {
        metadata.insert("managedFields".to_owned(), entries.iter().map(Entry::to_json).collect());
    }
}

/// The entries an update starts from. A client may rewrite `managedFields` itself, or reset them by `[{}]`; through a
/// subresource it may not, and what cannot be read or is left out does not count.
fn entries_for_update(live: Option<&Object>, new: &Object, subresource: &str) -> Vec<Entry> {
    let of_live = || read(live).unwrap_or_default();
    if !subresource.is_empty() {
        return of_live();
    }
    let sent = new.pointer("/metadata/managedFields").and_then(Value::as_array);
    if let Some([only]) = sent.map(Vec::as_slice)
        && only.as_object().is_some_and(Map::is_empty)
    {
        return Vec::new();
    }
    match read(Some(new)) {
        Some(entries) if !entries.is_empty() => entries,
        _ => of_live(),
    }
}

/// Records in `new` what a create, update or patch changed. `new` is what will be written: patched and defaulted.
pub fn track_update(live: Option<&Object>, new: &mut Object, writer: &Writer, schema: &Schema, types: &Types) {
    let mut entries = entries_for_update(live, new, writer.subresource);
    if live.is_some() && entries.is_empty() {
        // Not tracked so far; tracking begins with the first apply.
        write(new, entries);
        return;
    }
    let old = live.map(without_system_fields).unwrap_or_else(|| Value::Object(Map::new()));
    let changes = Typed::new(schema, types).compare(&old, &without_system_fields(new));
    take(&mut entries, &changes, writer);
    cap(&mut entries);
    write(new, entries);
}

/// Gives what changed to an `Update` entry of `writer` and takes it from everyone else.
fn take(entries: &mut Vec<Entry>, changes: &Changes, writer: &Writer) {
    let taken = changes.added.union(&changes.modified);
    let lost = taken.union(&changes.removed);
    let mine = entries.iter().position(|entry| entry.is_of(writer, Operation::Update));
    for entry in entries.iter_mut() {
        entry.fields = entry.fields.difference(&lost);
    }
    if !taken.is_empty() {
        match mine.and_then(|index| entries.get_mut(index)) {
            Some(entry) => {
                entry.fields = entry.fields.union(&taken);
                writer.time.clone_into(&mut entry.time);
            }
            None => entries.push(Entry::new(writer, Operation::Update, taken)),
        }
    }
    entries.retain(|entry| !entry.fields.is_empty());
}

/// Merges the oldest `Update` entries, version by version, until few enough are left.
fn cap(entries: &mut Vec<Entry>) {
    let updates = |entries: &[Entry]| entries.iter().filter(|entry| entry.operation == Operation::Update).count();
    if updates(entries) <= MAX_UPDATE_MANAGERS {
        return;
    }
    let (mut old, mut rest): (Vec<Entry>, Vec<Entry>) =
        std::mem::take(entries).into_iter().partition(|entry| entry.operation == Operation::Update);
    old.sort_by(|a, b| (&a.time, &a.manager).cmp(&(&b.time, &b.manager)));
    let mut count = old.len();
    // The first entry seen of each version; it becomes the bucket when a second one joins it.
    let mut buckets: BTreeMap<String, usize> = BTreeMap::new();
    let mut kept: Vec<Entry> = Vec::with_capacity(count);
    for entry in old {
        let bucket = buckets.get(&entry.api_version).and_then(|index| kept.get_mut(*index));
        match bucket {
            Some(bucket) if count > MAX_UPDATE_MANAGERS => {
                ANCIENT_CHANGES.clone_into(&mut bucket.manager);
                bucket.subresource.clear();
                bucket.fields = bucket.fields.union(&entry.fields);
                bucket.time = entry.time;
                count -= 1;
            }
            _ => {
                buckets.entry(entry.api_version.clone()).or_insert(kept.len());
                kept.push(entry);
            }
        }
    }
    rest.extend(kept);
    *entries = rest;
}

/// Server-side apply: `live` with `applied` merged in, `managedFields` set. Equal to `live` if nothing changed.
pub fn apply(
    live: Option<&Object>,
    applied: &Object,
    writer: &Writer,
    force: bool,
    schema: &Schema,
    types: &Types,
) -> StatusResult<Object> {
    check_applied(applied, writer)?;
    let typed = Typed::new(schema, types);
    let config = without_system_fields(applied);
    let fields = typed.applied_fields(&config).map_err(|errors| malformed(applied, &errors))?;
    let before = read(live).unwrap_or_default();
    let mut entries = before.clone();
    let live_fields = live.map(without_system_fields).unwrap_or_else(|| Value::Object(Map::new()));
    if live.is_some() && entries.is_empty() {
        let owned = typed.compare(&Value::Object(Map::new()), &live_fields).added;
        let first = Writer { manager: BEFORE_FIRST_APPLY, subresource: "", ..*writer };
        entries.push(Entry::new(&first, Operation::Update, owned));
    }
    let position = entries.iter().position(|entry| entry.is_of(writer, Operation::Apply));
    let previous = position.map(|index| entries.remove(index));

    let mut merged = typed.merge(Some(&live_fields), &config);
    if let Some(previous) = &previous {
        let managed = entries.iter().fold(fields.clone(), |all, entry| all.union(&entry.fields));
        typed.prune(&mut merged, &previous.fields, &managed);
    }
    let changes = typed.compare(&live_fields, &merged);
    let conflicts = conflicts(&entries, &changes);
    if !force && !conflicts.is_empty() {
        let allowed = if writer.manager == KUBECTL { last_applied_fields(live, typed) } else { Set::default() };
        let refused: Vec<Conflict> = conflicts
            .into_iter()
            .map(|conflict| Conflict { fields: conflict.fields.difference(&allowed), ..conflict })
            .filter(|conflict| !conflict.fields.is_empty())
            .collect();
        if !refused.is_empty() {
            return Err(conflict_status(&refused));
        }
    }
    let lost = changes.added.union(&changes.modified).union(&changes.removed);
    for entry in &mut entries {
        entry.fields = entry.fields.difference(&lost);
    }
    let unchanged_set = previous
        .as_ref()
        .is_some_and(|previous| previous.fields == fields && previous.api_version == writer.api_version);
    let mut entry = Entry::new(writer, Operation::Apply, fields);
    if let (true, true, Some(previous)) = (changes.is_empty(), unchanged_set, &previous) {
        entry.time = previous.time.clone();
    }
    entries.push(entry);
    entries.retain(|entry| !entry.fields.is_empty());

    let mut result = match live {
        // The order of sets and of keyed lists is no change.
        Some(live) if changes.is_empty() => live.clone(),
        _ => with_system_fields(live.unwrap_or(applied), merged),
    };
    set_preconditions(&mut result, applied);
    sync_last_applied(&mut result, applied, writer.manager);
    if !(changes.is_empty() && same_entries(&before, &entries)) {
        cap(&mut entries);
        write(&mut result, entries);
    }
    Ok(result)
}

fn same_entries(before: &[Entry], after: &[Entry]) -> bool {
    before.len() == after.len() && after.iter().all(|entry| before.contains(entry))
}

fn check_applied(applied: &Object, writer: &Writer) -> StatusResult<()> {
    if writer.manager.is_empty() {
        let message = "Required value: is required for apply patch".to_owned();
        let cause = Cause { reason: "FieldValueRequired".into(), message, field: "fieldManager".into() };
        return Err(Status::invalid("meta.k8s.io", "PatchOptions", "", vec![cause]));
    }
    if !applied.is_object() {
        return Err(Status::bad_request("an apply patch is an object"));
    }
    let version = applied.str_at("/apiVersion");
    if version != writer.api_version {
        return Err(Status::bad_request(format!(
            "Incorrect version specified in apply patch. Specified patch version: {version}, expected: {}",
            writer.api_version
        )));
    }
    match applied.pointer("/metadata/managedFields") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Array(list)) if list.is_empty() => Ok(()),
        Some(_) => Err(Status::bad_request("metadata.managedFields must be nil")),
    }
}

fn malformed(applied: &Object, errors: &[String]) -> Status {
    const SHOWN: usize = 20;
    let mut list = errors.iter().take(SHOWN).cloned().collect::<Vec<_>>().join("\n  ");
    if errors.len() > SHOWN {
        list.push_str(&format!("\n  and {} more", errors.len() - SHOWN));
    }
    let text = if errors.len() == 1 { list } else { format!("errors:\n  {list}") };
    let namespace = applied.namespace();
    let name = if namespace.is_empty() { applied.name().to_owned() } else { format!("{namespace}/{}", applied.name()) };
    Status::bad_request(format!(
        "failed to create typed patch object ({name}; {}, Kind={}): {text}",
        applied.str_at("/apiVersion"),
        applied.str_at("/kind")
    ))
}

/// `merged` with the identity and system fields of `source` again.
fn with_system_fields(source: &Object, merged: Value) -> Object {
    let mut result = merged;
    let stripped = without_system_fields(source);
    let system = |from: Option<&Value>, kept: Option<&Value>| -> Vec<(String, Value)> {
        from.and_then(Value::as_object)
            .into_iter()
            .flatten()
            .filter(|(key, value)| !value.is_null() && kept.is_none_or(|kept| kept.get(key.as_str()).is_none()))
            .filter(|(key, _)| !matches!(key.as_str(), "metadata" | "managedFields"))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    };
    api::object::object_of(&mut result).extend(system(Some(source), Some(&stripped)));
    result.metadata_mut().extend(system(source.get("metadata"), stripped.get("metadata")));
    result
}

/// A resource version or uid in what was applied is a precondition; it stays for the write to check.
fn set_preconditions(result: &mut Object, applied: &Object) {
    for key in ["resourceVersion", "uid"] {
        let text = applied.pointer(&format!("/metadata/{key}")).and_then(Value::as_str).unwrap_or_default();
        if !text.is_empty() {
            result.metadata_mut().insert(key.to_owned(), text.into());
        }
    }
}

struct Conflict {
    /// The other manager, as it is shown.
    with: String,
    fields: Set,
}

fn conflicts(entries: &[Entry], changes: &Changes) -> Vec<Conflict> {
    let written = changes.added.union(&changes.modified);
    let mut found: Vec<Conflict> = entries
        .iter()
        .map(|entry| Conflict { with: entry.described(), fields: entry.fields.intersection(&written) })
        .filter(|conflict| !conflict.fields.is_empty())
        .collect();
    found.sort_by(|a, b| a.with.cmp(&b.with));
    found
}

fn conflict_status(conflicts: &[Conflict]) -> Status {
    let causes: Vec<Cause> = conflicts
        .iter()
        .flat_map(|conflict| {
            conflict.fields.paths().into_iter().map(|path| Cause {
                reason: "FieldManagerConflict".to_owned(),
                message: format!("conflict with {}", conflict.with),
                field: path_text(&path),
            })
        })
        .collect();
    let message = match causes.as_slice() {
        [only] => format!("Apply failed with 1 conflict: {}: {}", only.message, only.field),
        _ => {
            let mut lines = Vec::new();
            for conflict in conflicts {
                lines.push(format!("conflicts with {}:", conflict.with));
                lines.extend(conflict.fields.paths().iter().map(|path| format!("- {}", path_text(path))));
            }
            format!("Apply failed with {} conflicts: {}", causes.len(), lines.join("\n"))
        }
    };
    let mut status = Status::new(Reason::Conflict, message);
    status.causes = causes;
    status
}

/// The fields that client-side apply wrote and that still have the value it wrote: `kubectl apply --server-side` takes
/// those over without a conflict.
fn last_applied_fields(live: Option<&Object>, typed: Typed) -> Set {
    let Some(live) = live else { return Set::default() };
    let Some(Ok(last)) = live.annotation(LAST_APPLIED).map(serde_json::from_str::<Value>) else {
        return Set::default();
    };
    let last = without_system_fields(&last);
    let differs = typed.compare(&last, &without_system_fields(live));
    typed.fields(&last).difference(&differs.modified.union(&differs.removed))
}

/// Keeps the annotation of client-side apply true while `kubectl` applies server-side, so that one can go back.
fn sync_last_applied(result: &mut Object, applied: &Object, manager: &str) {
    if manager != KUBECTL || result.annotation(LAST_APPLIED).is_none() {
        return;
    }
    let mut config = applied.clone();
    if let Value::Object(metadata) = config.pointer_mut("/metadata").unwrap_or(&mut Value::Null) {
        metadata.remove("managedFields");
        if let Some(Value::Object(annotations)) = metadata.get_mut("annotations") {
            annotations.remove(LAST_APPLIED);
        }
    }
    let old = result.annotation(LAST_APPLIED).and_then(|text| serde_json::from_str::<Value>(text).ok());
    if old.as_ref() == Some(&config) {
        return;
    }
    let others: usize = result
        .pointer("/metadata/annotations")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter(|(key, _)| *key != LAST_APPLIED)
        .map(|(key, value)| key.len() + value.as_str().map_or(0, str::len))
        .sum();
    let text = format!("{config}\n");
    let fits = others + LAST_APPLIED.len() + text.len() <= MAX_ANNOTATION_BYTES;
    result.set_annotation(LAST_APPLIED, if fits { &text } else { "" });
}

/// Every path of an object's owner sets by manager, for tests and debugging.
#[cfg(test)]
fn owned(object: &Object, manager: &str) -> Vec<String> {
    let entries = read(Some(object)).unwrap_or_default();
    let mine = entries.iter().filter(|entry| entry.manager == manager);
    mine.flat_map(|entry| entry.fields.paths()).map(|path| path_text(&path)).collect()
}

#[cfg(test)]
#[path = "managed_tests.rs"]
mod tests;
