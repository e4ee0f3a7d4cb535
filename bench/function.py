#!/usr/bin/env python3
"""The figures of functions: gateway to function and back, cold starts, idle functions, waking from zero; workerd with the
same JavaScript in the same run. Prints a table, writes bench/out/function.json.

`wasmtime serve` is not among the peers: it has no package here and building it takes longer than all of this.
"""
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ATOLL = os.environ["ATOLL"]
IDLE = int(os.environ.get("IDLE", "100"))
COMPONENT = os.environ.get("COMPONENT", f"{ROOT}/examples/shop/pricing/pricing.wasm")
PATH = "/price?sku=teapot&qty=1"
HOST = "pricing.default.atoll.local"
figures = []


def figure(name, value, unit, peer=None, peer_value=None):
    ratio = round(value / peer_value, 3) if peer_value else None
    figures.append({"figure": name, "value": round(value, 3), "unit": unit, "peer": peer, "peer_value": peer_value,
                    "ratio": ratio})
    beside = f"; {peer} {peer_value:.1f}, ratio {ratio}" if peer_value else ""
    print(f"  {name}: {value:.3f} {unit}{beside}", flush=True)


def run(*args):
    done = subprocess.run(args, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(args)}: {done.stdout}{done.stderr}")
    return done.stdout


def wrk(port, connections, host="localhost"):
    text = run("wrk", "-t1", "-d8", "-c", str(connections), "--latency", "-H", f"Host: {host}",
               f"http://127.0.0.1:{port}{PATH}")
    if "Non-2xx" in text or "Socket errors" in text:
        print(text)
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1])
    number, unit = re.search(r"99%\s+([\d.]+)(us|ms|s)", text).groups()
    return rate, float(number) * {"us": 0.001, "ms": 1, "s": 1000}[unit]


def once(host, path=PATH):
    """Milliseconds of one request on a connection of its own; its status."""
    begun = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=60)
    connection.request("GET", path, headers={"Host": host})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return (time.perf_counter() - begun) * 1000, answer.status


def memory(pids):
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            total += int(re.search(r"Pss:\s+(\d+)", file.read())[1])
    return total / 1024


def hosts():
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = open(f"/proc/{pid}/cmdline").read().split("\0")
        except OSError:
            continue
        if "function-host" in line and "--serve" in line:
            found.append(int(pid))
    return found


def workerd(scratch):
    source = open(f"{ROOT}/examples/shop/pricing/pricing.js").read()
    source = re.sub(r"(?m)^import .*$", 'const getEnvironment = () => [["TAX_PERCENT", "19"]];', source)
    open(f"{scratch}/worker.js", "w").write(source)
    open(f"{scratch}/config.capnp", "w").write("""using Workerd = import "/workerd/workerd.capnp";
const config :Workerd.Config = (
  services = [(name = "main", worker = (serviceWorkerScript = embed "worker.js", compatibilityDate = "2024-01-01"))],
  sockets = [(name = "http", address = "127.0.0.1:9090", http = (), service = "main")]
);
""")
    process = subprocess.Popen([f"{ROOT}/.cache/bench/node_modules/.bin/workerd", "serve", f"{scratch}/config.capnp"])
    for _ in range(100):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", 9090)
            connection.request("GET", PATH)
            assert connection.getresponse().status == 200
            return process
        except OSError:
            time.sleep(0.1)
    sys.exit("workerd does not answer")


def requests(scratch):
    peer = workerd(scratch)
    try:
        peers = {connections: wrk(9090, connections) for connections in (1, 32)}
    finally:
        peer.kill()
        peer.wait()
    for connections in (1, 32):
        rate, late = wrk(8080, connections, HOST)
        figure(f"JavaScript, {connections} connections, fresh instance each", rate, "requests/s",
               "workerd, one isolate for all", peers[connections][0])
        figure(f"JavaScript, {connections} connections, p99", late, "ms", "workerd", peers[connections][1])


def cold(function):
    """The first request after a deployment against the median of those that follow."""
    differences = []
    for n in range(5):
        function("deploy", f"cold{n}", COMPONENT, "--env", f"N={n}")
        host = f"cold{n}.default.atoll.local"
        first, status = once(host)
        assert status == 200, status
        warm = statistics.median(once(host)[0] for _ in range(30))
        differences.append(first - warm)
        function("rm", f"cold{n}")
    figure("JavaScript, first request after deployment beyond a warm one, median of 5", statistics.median(differences), "ms")


def idle(function, up):
    pids = lambda: [up.pid, *hosts()]
    before = memory(pids())
    times = []
    for n in range(IDLE):
        begun = time.perf_counter()
        function("deploy", f"idle{n}", COMPONENT)
        times.append((time.perf_counter() - begun) * 1000)
    time.sleep(10)
    each = (memory(pids()) - before) / IDLE
    figure(f"an idle function, mean of {IDLE}: memory of atoll up and host", each * 1024, "KiB")
    figure(f"10,000 of them, were they all like these {IDLE}", each * 10_000, "MiB")
    figure("deploying, median of the first 20", statistics.median(times[:20]), "ms")
    figure("deploying, median of the last 20", statistics.median(times[-20:]), "ms")
    for n in range(IDLE):
        function("rm", f"idle{n}")


def wake(function):
    function("deploy", "sleeper", COMPONENT, "--min-scale", "0")
    env = dict(os.environ)
    replicas = lambda: subprocess.run(
        ["kubectl", "get", "deployment/sleeper-00001-deployment", "-o", "jsonpath={.spec.replicas}"], env=env, text=True,
        capture_output=True).stdout
    times = []
    for _ in range(2):
        while replicas() != "0":
            time.sleep(0.5)
        time.sleep(2)
        took, status = once("sleeper.default.atoll.local")
        assert status == 200, status
        times.append(took)
    figure("a function that sleeps (no pod), first answer, better of 2", min(times), "ms")
    function("rm", "sleeper")


def main():
    scratch = tempfile.mkdtemp(prefix="atoll-bench-")
    data = f"{scratch}/data"
    up = subprocess.Popen([ATOLL, "up", "--data-dir", data], stdout=subprocess.PIPE, stderr=open(f"{scratch}/log", "w"),
                          text=True)
    try:
        line = up.stdout.readline()
        assert line.startswith("ready"), line
        os.environ["KUBECONFIG"] = f"{data}/kubeconfig"
        function = lambda command, *args: run(ATOLL, "function", command, "--data-dir", data, *args)
        begun = time.perf_counter()
        function("deploy", "pricing", COMPONENT)
        figure("JavaScript, 12.8 MB: first deployment, compilation included", time.perf_counter() - begun, "s")
        wanted = sys.argv[1:] or ["requests", "cold", "idle", "wake"]
        if "requests" in wanted:
            requests(scratch)
        if "cold" in wanted:
            cold(function)
        if "idle" in wanted:
            idle(function, up)
        if "wake" in wanted:
            wake(function)
    finally:
        run(ATOLL, "down", "--data-dir", data)
        up.wait()
    os.makedirs(f"{ROOT}/bench/out", exist_ok=True)
    with open(f"{ROOT}/bench/out/function.json", "w") as file:
        json.dump({"command": "bench/function.sh", "figures": figures}, file, indent=1)


main()
