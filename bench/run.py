#!/usr/bin/env python3
"""The figures of the first issue, measured; peers in the same run. Prints a table, writes bench/out/figures.json.

Names as arguments run only those: start idle size creates watchers pods path endpoint gateway oci
"""
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

import daemon_path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILT = os.environ.get("CARGO_TARGET_DIR", f"{ROOT}/target") + "/release"
ATOLL = f"{BUILT}/atoll"
APIBENCH = f"{BUILT}/examples/apibench"
GATEWAY = "http://127.0.0.1:8080"
figures = []


def figure(name, value, unit, goal, command, peer=None, peer_value=None):
    ratio = round(value / peer_value, 3) if peer_value else None
    figures.append({"figure": name, "value": round(value, 2), "unit": unit, "goal": goal, "command": command,
                    "peer": peer, "peer_value": peer_value and round(peer_value, 2), "ratio": ratio})
    beside = f"; {peer} {peer_value:.1f}, ratio {ratio}" if peer_value else ""
    print(f"  {name}: {value:.2f} {unit} (goal {goal}){beside}", flush=True)


def run(*args, check=True, **kwargs):
    return subprocess.run(args, check=check, text=True, capture_output=True, **kwargs)


class Up:
    """A running atoll up."""

    def __init__(self, data):
        self.data = data
        self.begin()

    def begin(self, **env):
        begun = time.monotonic()
        self.process = subprocess.Popen([ATOLL, "up", "--data-dir", self.data], stdout=subprocess.PIPE,
                                        stderr=open(f"{self.data}.log", "a"), text=True, env=dict(os.environ, **env))
        self.line = self.process.stdout.readline().strip()
        self.took = (time.monotonic() - begun) * 1000
        if not self.line.startswith("ready"):
            sys.exit(f"atoll up is not ready: {self.line!r}; see {self.data}.log")
        self.env = dict(os.environ, KUBECONFIG=f"{self.data}/kubeconfig")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)

    def atoll(self, *args):
        return run(ATOLL, *args)

    def kubectl(self, *args, **kwargs):
        return run("kubectl", *args, env=self.env, **kwargs)

    def apibench(self, *what):
        return json.loads(run(APIBENCH, f"{self.data}/kubeconfig", *what).stdout)


def start(up):
    times = []
    for _ in range(7):
        up.stop()
        up.begin()
        times.append(up.took)
    figure("atoll up to ready, warm", statistics.median(times), "ms", "< 300", "atoll up; time to its ready line, median of 7")


def processes(data):
    """All of Atoll's own processes: by executable, not by name."""
    exe = os.path.realpath(ATOLL)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.path.realpath(f"/proc/{pid}/exe") == exe:
                yield int(pid)
        except OSError:
            pass


def rss(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", open(f"/proc/{pid}/status").read()).group(1)) / 1024


def ticks(pid):
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def idle(up):
    time.sleep(10)
    pids = list(processes(up.data))
    figure("idle memory, all Atoll processes", sum(map(rss, pids)), "MiB RSS", "< 60", "VmRSS of every atoll process, 10 s after ready",
           "k3s (published)", 535)
    before = sum(map(ticks, pids))
    time.sleep(20)
    used = sum(map(ticks, pids)) - before
    figure("idle CPU", used / os.sysconf("SC_CLK_TCK") / 20 * 100, "% of a core", "< 1", "utime+stime over 20 s")


def creates(up):
    result = up.apibench("creates")
    figure("durable ConfigMap creates", result["creates_per_second"], "/s", ">= 2000", "apibench creates: 10,000 over 64 TLS connections")


def watchers(up):
    result = up.apibench("watchers")["write_to_last_of_100_watchers_ms"]
    figure("watch event to 100 watchers, median", result["median"], "ms", "< 10", "apibench watchers (write included)")
    figure("watch event to 100 watchers, p99", result["p99"], "ms", "", "apibench watchers (write included)")


def busybox(up):
    root = tempfile.mkdtemp()
    os.makedirs(f"{root}/bin")
    os.makedirs(f"{root}/www")
    shutil.copy("/bin/busybox", f"{root}/bin/busybox")
    for name in ("sh", "sleep", "echo", "httpd", "true"):
        os.symlink("busybox", f"{root}/bin/{name}")
    with open(f"{root}/www/index.html", "w") as page:
        page.write("hello\n")
    run("tar", "-C", root, "-cf", f"{root}.tar", "--owner=0", "--group=0", ".")
    run(ATOLL, "image", "import", "--data-dir", up.data, f"{root}.tar", "--tag", "127.0.0.1:5000/bench/busybox:1")
    return root


def pods(up):
    result = up.apibench("pods")["pod_request_to_process_ms"]
    figure("pod request to its process running, median", result["median"], "ms", "< 100", "apibench pods: 30 pods one after another, image present")
    figure("pod request to its process running, p99", result["p99"], "ms", "", "apibench pods")


NGINX = """daemon off; worker_processes 1; pid {0}/pid; error_log {0}/err;
events {{ worker_connections 1024; }}
http {{ access_log off; client_body_temp_path {0}/b; proxy_temp_path {0}/p; fastcgi_temp_path {0}/f; uwsgi_temp_path {0}/u; scgi_temp_path {0}/s;
  upstream up {{ server {1}; keepalive 64; }}
  server {{ listen 127.0.0.1:9099; location / {{ proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection ""; }} }}
}}
"""


def wrk(url, *headers):
    args = ["wrk", "-t1", "-c32", "-d8s"] + [part for h in headers for part in ("-H", h)] + [url]
    return float(re.search(r"Requests/sec:\s+([\d.]+)", run(*args).stdout).group(1))


ROUTE = """
apiVersion: v1
kind: Service
metadata: {name: up, namespace: bench}
spec: {ports: [{port: 80, targetPort: 9098}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: up-1, namespace: bench, labels: {kubernetes.io/service-name: up}}
addressType: IPv4
ports: [{port: 9098, protocol: TCP}]
endpoints: [{addresses: ["ADDRESS"], conditions: {ready: true}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: up, namespace: bench}
spec:
  parentRefs: [{name: atoll, namespace: default}]
  hostnames: [bench.example]
  rules: [{backendRefs: [{name: up, port: 80}]}]
"""


def gateway(up):
    """Both proxies in front of one nginx pod-side upstream: atoll's gateway, and nginx in the router's namespace."""
    work = tempfile.mkdtemp()
    router = f"/run/atoll/{os.listdir('/run/atoll')[0]}/netns/router"
    static = f"""daemon off; worker_processes 1; pid {work}/spid; error_log {work}/serr; events {{ worker_connections 1024; }}
http {{ access_log off; client_body_temp_path {work}/sb; proxy_temp_path {work}/sp; fastcgi_temp_path {work}/sf; uwsgi_temp_path {work}/su; scgi_temp_path {work}/ss;
  keepalive_requests 1000000; server {{ listen 127.0.0.1:9098; location / {{ return 200 "hello\\n"; }} }} }}"""
    open(f"{work}/static.conf", "w").write(static)
    open(f"{work}/proxy.conf", "w").write(NGINX.format(work, "127.0.0.1:9098"))
    inside = ["nsenter", f"--net={router}", "nginx", "-c"]
    servers = [subprocess.Popen(inside + [f"{work}/{name}.conf"], stderr=subprocess.DEVNULL) for name in ("static", "proxy")]
    try:
        up.kubectl("apply", "-f", "-", input=ROUTE.replace("ADDRESS", "127.0.0.1"))
        request = urllib.request.Request(GATEWAY + "/", headers={"Host": "bench.example"})
        for _ in range(100):
            try:
                urllib.request.urlopen(request, timeout=2).read()
                break
            except OSError:
                time.sleep(0.1)
        ours = wrk(GATEWAY + "/", "Host: bench.example")
        args = ["nsenter", f"--net={router}", "wrk", "-t1", "-c32", "-d8s", "http://127.0.0.1:9099/"]
        theirs = float(re.search(r"Requests/sec:\s+([\d.]+)", run(*args).stdout).group(1))
        figure("gateway, small answers", ours, "requests/s", "> nginx", "wrk -t1 -c32 -d8s through each, same upstream", "nginx proxy, one worker", theirs)
    except (AttributeError, subprocess.CalledProcessError) as error:
        print(f"  gateway: SKIPPED: {error}")
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def path(up):
    daemon_path.measure(up, figure)


def endpoint(up):
    router = f"/run/atoll/{os.listdir('/run/atoll')[0]}/netns/router"
    for count in (1, 2000):
        result = up.apibench("endpoint", router, str(count))
        command = f"apibench endpoint: {result['changes']} changes of one of {count} Services' EndpointSlices, until nftables tells of it"
        for begin, goal in (("accepted", "< 5"), ("sent", "")):
            for quantile in ("median", "p99"):
                value = result[f"{begin}_to_kernel_ms"][quantile]
                figure(f"endpoint {begin} to kernel, {count} Services, {quantile}", value, "ms", goal, command)


def oci(_):
    """Its own script: all runtimes in one view of control groups, hyperfine's table."""
    subprocess.run([f"{ROOT}/bench/oci.sh"], check=False)


def size(_):
    figure("release binary", os.path.getsize(ATOLL) / 1e6, "MB", "< 60", "size of the release binary")


def main():
    every = [start, idle, size, creates, watchers, pods, path, endpoint, gateway, oci]
    wanted = [f for f in every if not sys.argv[1:] or f.__name__ in sys.argv[1:]]
    data = tempfile.mkdtemp(prefix="atoll-bench.") + "/data"
    up = Up(data)
    try:
        busybox(up)
        for measure in wanted:
            print(f"{measure.__name__}:", flush=True)
            measure(up)
    finally:
        run(ATOLL, "down", "--data-dir", data, check=False)
        shutil.rmtree(os.path.dirname(data), ignore_errors=True)
    os.makedirs(f"{ROOT}/bench/out", exist_ok=True)
    with open(f"{ROOT}/bench/out/figures.json", "w") as out:
        json.dump({"figures": figures, "machine": {"cores": os.cpu_count(), "kernel": os.uname().release}}, out, indent=2)
    print(f"\n{'FIGURE':50} {'VALUE':>12} {'UNIT':14} {'GOAL':9} {'PEER':28} {'RATIO':>7}")
    for f in figures:
        print(f"{f['figure']:50} {f['value']:>12} {f['unit']:14} {f['goal']:9} {f['peer'] or '-':28} {f['ratio'] if f['ratio'] else '-':>7}")


main()
