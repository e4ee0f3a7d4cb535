//! Lambda's Invoke API, driven by boto3; events that wait in the store; events by the clock.

use crate::cluster::{Cluster, json};
use crate::lambda::{BUSYBOX, function, python_base, zip};
use crate::{Outcome, Test};
use std::fs;
use std::time::{Duration, SystemTime};

pub const TESTS: &[Test] = &[("invoke_api_boto3", boto3), ("invoke_schedules", schedules)];

/// Secrets that are access keys, of two namespaces.
fn key(c: &Cluster, ns: &str, id: &str) {
    let ns_arg = ["-n", ns, "--type=functions.atoll.dev/access-key"];
    let id = format!("--from-literal=accessKeyId={id}");
    let secret = "--from-literal=secretAccessKey=wJalrXUtnFEMI-K7MDENG";
    c.kubectl(&[&["create", "secret", "generic", "key"], &ns_arg[..], &[&id, secret]].concat()).good();
}

/// Everything that a client does with functions, and what is refused.
const CLIENT: &str = r#"
import base64, io, json, sys, time, zipfile
import boto3, botocore
from botocore.config import Config

def client(key, secret="wJalrXUtnFEMI-K7MDENG"):
    return boto3.client("lambda", endpoint_url="http://127.0.0.1:9000", region_name="us-east-1", aws_access_key_id=key,
        aws_secret_access_key=secret, config=Config(retries={"max_attempts": 0}, read_timeout=120))

def package(text, name="app.py"):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, text)
    return out.getvalue()

def refused(code, call, **args):
    try:
        call(**args)
    except botocore.exceptions.ClientError as error:
        got = error.response["Error"]["Code"]
        assert got == code, (got, error)
        return error.response["Error"].get("Message") or error.response.get("message")
    raise AssertionError(f"{args} was not refused")

APP = """
import os, sys
def handler(event, context):
    print("working on", context.aws_request_id, flush=True)
    if event.get("fail"):
        raise ValueError("as asked")
    if event.get("once") and not os.path.exists("/tmp/seen"):
        open("/tmp/seen", "w").close()
        raise ValueError("not yet")
    sys.stdout.flush()
    return {"event": event, "version": VERSION, "greeting": os.environ.get("GREETING"),
            "context": (context.client_context.custom if context.client_context else None)}
"""
ours, others = client("AKIDOURS"), client("AKIDOTHERS")
"#;

const CALLS: &str = r#"
code = {"ZipFile": package(APP.replace("VERSION", "1"))}
base = dict(FunctionName="greet", Runtime="python3", Role="arn:aws:iam::000000000000:role/any", Handler="app.handler")

# What is wrong is told, with its field.
refused("UnrecognizedClientException", client("AKIDNONE").list_functions)
refused("InvalidSignatureException", client("AKIDOURS", "another-secret-that-is-long").list_functions)
said = refused("InvalidParameterValueException", ours.create_function, **{**base, "Runtime": "cobol1"}, Code=code)
assert "cobol1" in said and "lambda-runtimes" in said, said
said = refused("InvalidParameterValueException", ours.create_function, **base, Code={"ZipFile": b"nonsense"})
assert "not a zip" in said, said
refused("InvalidParameterValueException", ours.create_function, **{**base, "FunctionName": "Upper"}, Code=code)
refused("InvalidParameterValueException", ours.create_function, **base, Code=code, Timeout=901)
refused("ResourceNotFoundException", ours.get_function, FunctionName="greet")
refused("ResourceNotFoundException", ours.invoke, FunctionName="greet", Payload="{}")

# Create, wait, describe.
made = ours.create_function(**base, Code=code, Timeout=20, MemorySize=256, Description="a greeting",
    Environment={"Variables": {"GREETING": "hello"}}, Tags={"team": "one"})
assert made["State"] in ("Pending", "Active") and made["FunctionArn"].endswith(":function:greet"), made
refused("ResourceConflictException", ours.create_function, **base, Code=code)
ours.get_waiter("function_active_v2").wait(FunctionName="greet", WaiterConfig={"Delay": 1, "MaxAttempts": 120})
told = ours.get_function(FunctionName=made["FunctionArn"])
assert told["Tags"] == {"team": "one"} and told["Configuration"]["MemorySize"] == 256, told
assert [f["FunctionName"] for f in ours.list_functions()["Functions"]] == ["greet"]
# The other namespace's key sees and reaches nothing of it.
assert others.list_functions()["Functions"] == []
refused("ResourceNotFoundException", others.invoke, FunctionName="greet", Payload="{}")

# Call it.
context = base64.b64encode(json.dumps({"custom": {"a": "b"}}).encode()).decode()
said = ours.invoke(FunctionName="greet", Payload=json.dumps({"x": 1}), ClientContext=context, LogType="Tail")
body = json.load(said["Payload"])
assert body == {"event": {"x": 1}, "version": 1, "greeting": "hello", "context": {"a": "b"}}, body
assert said["StatusCode"] == 200 and said["ExecutedVersion"] == "$LATEST" and "FunctionError" not in said, said
log = base64.b64decode(said["LogResult"]).decode()
request = said["ResponseMetadata"]["RequestId"]
assert f"START RequestId: {request}" in log and "Memory Size: 256 MB" in log, log
said = ours.invoke(FunctionName="greet", Payload=json.dumps({"fail": True}), LogType="Tail")
assert said["FunctionError"] == "Unhandled", said
assert json.load(said["Payload"])["errorMessage"] == "as asked"
assert ours.invoke(FunctionName="greet", InvocationType="DryRun")["StatusCode"] == 204
refused("InvalidRequestContentException", ours.invoke, FunctionName="greet", Payload="{")
for _ in range(50):
    said = ours.invoke(FunctionName="greet", Payload="{}", LogType="Tail")
    if "working on" in base64.b64decode(said["LogResult"]).decode():
        break
else:
    raise AssertionError("what the function prints is never in the log's tail")

# Events: one that fails once is tried again.
assert ours.invoke(FunctionName="greet", InvocationType="Event", Payload=json.dumps({"once": 1}))["StatusCode"] == 202
refused("RequestTooLargeException", ours.invoke, FunctionName="greet", InvocationType="Event",
    Payload=json.dumps("x" * (300 << 10)))

print("done")
"#;

const CHANGES: &str = r#"
stale = ours.get_function_configuration(FunctionName="greet")["RevisionId"]
changed = ours.update_function_configuration(FunctionName="greet", Environment={"Variables": {"GREETING": "bye"}})
refused("PreconditionFailedException", ours.update_function_configuration, FunctionName="greet", RevisionId=stale, Timeout=9)
ours.get_waiter("function_updated_v2").wait(FunctionName="greet", WaiterConfig={"Delay": 1, "MaxAttempts": 120})
ours.update_function_code(FunctionName="greet", ZipFile=package(APP.replace("VERSION", "2")))
ours.get_waiter("function_updated_v2").wait(FunctionName="greet", WaiterConfig={"Delay": 1, "MaxAttempts": 120})
for _ in range(100):
    body = json.load(ours.invoke(FunctionName="greet", Payload="{}")["Payload"])
    if (body["version"], body["greeting"]) == (2, "bye"):
        break
    time.sleep(0.2)
else:
    raise AssertionError(body)
ours.delete_function(FunctionName="greet")
refused("ResourceNotFoundException", ours.delete_function, FunctionName="greet")
print("done")
"#;

fn boto3(c: &Cluster) -> Outcome {
    if !c.host("python3", &["-c", "import boto3"]).ok {
        return Outcome::Skipped("boto3 is not installed".into());
    }
    if let Err(reason) = python_base(c) {
        return Outcome::Skipped(reason);
    }
    let (ns, other) = (c.namespace("t-invoke"), c.namespace("t-invoke-other"));
    key(c, &ns, "AKIDOURS");
    key(c, &other, "AKIDOTHERS");
    let image = "--from-literal=python3=127.0.0.1:5000/lambda/python:3";
    c.kubectl(&["create", "configmap", "lambda-runtimes", "-n", &ns, image]).good();
    let python = |calls: &str| {
        let script = c.scratch("invoke.py");
        fs::write(&script, format!("{CLIENT}{calls}")).unwrap();
        let said = c.host("python3", &[script.to_str().unwrap()]);
        assert!(said.ok && said.out.contains("done"), "{}{}", said.out, said.err);
    };
    // Served only where it was asked for.
    assert!(
        c.host("python3", &["-c", "import socket; socket.create_connection(('127.0.0.1', 9000))"])
            .bad()
            .contains("refused")
    );
    c.stop(rustix::process::Signal::TERM);
    c.up_with(&["--invoke-addr", "127.0.0.1:9000"], &[]);
    python(CALLS);
    // The event that failed once was worked on in the end; nothing of it is left.
    c.until("all events are delivered", || c.kubectl(&["get", "messages", "-n", &ns, "-o", "name"]).good().is_empty());
    // One that always fails is dead after the attempts that it has, and says why. It outlives a kill -9.
    let message = format!(
        "apiVersion: functions.atoll.dev/v1alpha1\nkind: Message\nmetadata: {{name: doomed, namespace: {ns}}}\n\
         spec: {{function: greet, attempts: 2, body: eyJmYWlsIjogdHJ1ZX0=}}\n"
    );
    c.apply(&message);
    c.until("it was tried once", || c.kubectl(&["get", "message", "doomed", "-n", &ns]).good().contains("Waiting"));
    c.stop(rustix::process::Signal::KILL);
    c.up();
    c.until("it is dead", || c.kubectl(&["get", "message", "doomed", "-n", &ns]).good().contains("Dead"));
    let dead = json(&c.kubectl(&["get", "message", "doomed", "-n", &ns, "-o", "json"]).good());
    assert_eq!(dead["status"]["attempts"], 2);
    assert!(dead["status"]["lastError"].as_str().unwrap().contains("as asked"), "{dead}");
    c.stop(rustix::process::Signal::TERM);
    c.up_with(&["--invoke-addr", "127.0.0.1:9000"], &[]);
    python(CHANGES);
    // Made by hand, it belongs to nobody.
    c.kubectl(&["delete", "message", "doomed", "-n", &ns]).good();
    c.stop(rustix::process::Signal::TERM);
    c.up();
    Outcome::Passed
}

/// A runtime in shell that prints its events.
const BOOTSTRAP: &str = r#"#!/bin/sh
api=http://$AWS_LAMBDA_RUNTIME_API/2018-06-01/runtime
while :; do
  wget -S -O /tmp/event $api/invocation/next 2>/tmp/head || exit 1
  id=$(tr -d '\r' < /tmp/head | sed -n "s/^ *lambda-runtime-aws-request-id: *//p")
  cat /tmp/event; echo
  wget -q -O - --post-data '{}' $api/invocation/$id/response
done
"#;

/// Unix seconds.
fn clock() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

fn schedules(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-schedules");
    let schedule = |name: &str, spec: &str| {
        format!(
            "apiVersion: functions.atoll.dev/v1alpha1\nkind: Schedule\nmetadata: {{name: {name}, namespace: {ns}}}\n\
             spec: {{{spec}}}\n"
        )
    };
    let refused = |spec: &str| c.kubectl_with(&["apply", "-f", "-"], &schedule("bad", spec)).bad();
    assert!(refused("schedule: 60 * * * *, function: f").contains("spec.schedule"));
    assert!(refused("schedule: '@daily', function: f, body: '{'").contains("spec.body"));
    // Whose function is not there says so, and runs when it comes.
    c.apply(&schedule("tick", "schedule: '* * * * *', function: log, body: '{\"tick\": true}'"));
    let ready = |c: &Cluster| json(&c.kubectl(&["get", "schedule", "tick", "-n", &ns, "-o", "json"]).good());
    c.until("it says what is missing", || ready(c)["status"]["conditions"][0]["reason"] == "FunctionNotFound");
    let package = zip(c, "log", &[("bootstrap", BOOTSTRAP, 0o755)]);
    let deploy = ["deploy", "log", package.to_str().unwrap(), "--lambda", "--base", BUSYBOX];
    function(c, &ns, &deploy).good();
    let minute = Duration::from_secs(60 - clock() % 60);
    println!("the clock has to come to the next minute: {} s", minute.as_secs());
    std::thread::sleep(minute);
    c.until("an event was written", || !ready(c)["status"]["lastScheduleTime"].is_null());
    assert_eq!(ready(c)["status"]["conditions"][0]["status"], "True");
    c.until("the function got it", || {
        let logs = c.kubectl(&["logs", "-n", &ns, "-l", "serving.knative.dev/service=log"]);
        logs.ok && logs.out.contains("{\"tick\": true}")
    });
    c.until("it is delivered", || c.kubectl(&["get", "messages", "-n", &ns, "-o", "name"]).good().is_empty());
    let table = c.kubectl(&["get", "schedules", "-n", &ns]).good();
    assert!(table.contains("NEXT") && table.contains("* * * * *"), "{table}");
    Outcome::Passed
}
