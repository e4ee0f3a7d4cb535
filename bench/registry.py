#!/usr/bin/env python3
"""The registry against Debian's docker-registry, in one run, turn by turn. Prints a table, writes bench/out/registry.json.

Run by bench/registry.sh in a network namespace of its own.
"""
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILT = os.environ.get("CARGO_TARGET_DIR", f"{ROOT}/target") + "/release"
OURS, PEER = "127.0.0.1:5000", "127.0.0.1:5001"
ROUNDS = int(os.environ.get("ROUNDS", "3"))
PEER_CONFIG = """version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {cache: {blobdescriptor: inmemory}, filesystem: {rootdirectory: %s, maxthreads: 100}, delete: {enabled: true}}
http: {addr: "%s"}
"""


def wait(address):
    for _ in range(300):
        try:
            return urllib.request.urlopen(f"http://{address}/v2/", timeout=5).read()
        except OSError:
            time.sleep(0.1)
    sys.exit(f"nothing answers on {address}")


def load(address, *args):
    said = subprocess.run([f"{BUILT}/examples/registryload", address, *map(str, args)], check=True, text=True, capture_output=True)
    return json.loads(said.stdout)


def skopeo(scratch, address, push):
    layout = f"oci:{scratch}/image:t"
    there = f"docker://{address}/bench/skopeo:{time.time_ns()}"
    copy = ["skopeo", "--insecure-policy", "copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false"]
    begun = time.monotonic()
    subprocess.run([*copy, layout, there], check=True, capture_output=True)
    took = time.monotonic() - begun
    if push:
        return took
    back = f"{scratch}/back"
    begun = time.monotonic()
    subprocess.run([*copy, there, f"dir:{back}"], check=True, capture_output=True)
    took = time.monotonic() - begun
    shutil.rmtree(back)
    return took


def sample_image(scratch, number):
    """A fresh image of four 32 MiB layers that do not compress, as an OCI layout; nothing of it is anywhere yet."""
    import hashlib
    shutil.rmtree(f"{scratch}/image", ignore_errors=True)
    os.makedirs(f"{scratch}/image/blobs/sha256")

    def blob(data, media):
        digest = hashlib.sha256(data).hexdigest()
        open(f"{scratch}/image/blobs/sha256/{digest}", "wb").write(data)
        return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(data)}
    base = "application/vnd.oci.image"
    layers = [blob(os.urandom(32 << 20), f"{base}.layer.v1.tar") for _ in range(4)]
    config = {"architecture": "amd64", "os": "linux", "config": {},
              "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]}}
    manifest = {"schemaVersion": 2, "mediaType": f"{base}.manifest.v1+json", "layers": layers,
                "config": blob(json.dumps(config).encode(), f"{base}.config.v1+json")}
    entry = blob(json.dumps(manifest).encode(), manifest["mediaType"])
    entry["annotations"] = {"org.opencontainers.image.ref.name": "t"}
    json.dump({"schemaVersion": 2, "manifests": [entry]}, open(f"{scratch}/image/index.json", "w"))
    json.dump({"imageLayoutVersion": "1.0.0"}, open(f"{scratch}/image/oci-layout", "w"))


def main():
    scratch = tempfile.mkdtemp(prefix="atoll-bench-registry-")
    config = f"{scratch}/peer.yml"
    open(config, "w").write(PEER_CONFIG % (f"{scratch}/peer", PEER))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": open(f"{scratch}/log", "w")}
    ours = subprocess.Popen([f"{BUILT}/atoll", "up", "--data-dir", f"{scratch}/data"], **quiet)
    peer = subprocess.Popen(["docker-registry", "serve", config], **quiet)
    figures = []
    try:
        wait(OURS), wait(PEER)
        measure(scratch, figures)
    finally:
        for process in (ours, peer):
            process.send_signal(signal.SIGTERM)
            process.wait(30)
        subprocess.run([f"{BUILT}/atoll", "down", "--data-dir", f"{scratch}/data"], capture_output=True)
        shutil.rmtree(scratch, ignore_errors=True)
    os.makedirs(f"{ROOT}/bench/out", exist_ok=True)
    json.dump(figures, open(f"{ROOT}/bench/out/registry.json", "w"), indent=1)


def measure(scratch, figures):
    cases = [
        ("manifest GETs, 8 connections", "requests/s", lambda a: load(a, "get", 3, 8)["per_second"]),
        ("blob HEADs, 8 connections", "requests/s", lambda a: load(a, "head", 3, 8)["per_second"]),
        ("pull 64 MiB blobs, 4 connections", "MiB/s", lambda a: load(a, "pull", 3, 4)["mib_per_second"]),
        ("push 32 MiB blobs, 4 connections", "MiB/s", lambda a: load(a, "push", 4, 4, 32 << 20)["mib_per_second"]),
        ("push 4 KiB blobs, 8 connections", "blobs/s", lambda a: load(a, "push-small", 3, 8, 4096)["per_second"]),
        ("skopeo push, 4 layers of 32 MiB", "MiB/s", lambda a: 128 / skopeo(scratch, a, True)),
        ("skopeo pull, 4 layers of 32 MiB", "MiB/s", lambda a: 128 / skopeo(scratch, a, False)),
    ]
    wanted = sys.argv[1:]
    for name, unit, run in cases:
        if wanted and not any(w in name for w in wanted):
            continue
        mine, theirs = [], []
        for number in range(ROUNDS):
            if "skopeo" in name:
                sample_image(scratch, number)
            mine.append(run(OURS))
            theirs.append(run(PEER))
        a, b = statistics.median(mine), statistics.median(theirs)
        figures.append({"figure": f"registry: {name}", "value": round(a, 1), "unit": unit, "goal": ">= 1.5 x",
                        "peer": "docker-registry", "peer_value": round(b, 1), "ratio": round(a / b, 2),
                        "command": f"bench/registry.sh; median of {ROUNDS}, turn by turn"})
        print(f"  {name}: {a:.1f} {unit} (docker-registry {b:.1f}, ratio {a / b:.2f})", flush=True)


main()
