#!/usr/bin/env python3
"""The gateway beside nginx and haproxy, in one run: the same small nginx answers behind all three, each proxy has one worker
on core 0, upstream and client (h2load) are on core 1. Prints a table and JSON lines.

On a busy machine the rate says little; CPU time per request (user and system, of the proxy alone) says more.
usage: gateway.py [--rounds N] [--seconds N] [--only SUBSTRING]"""
import argparse, json, os, re, shutil, signal, statistics, subprocess, sys, tempfile, time, urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FRONT = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target")), "release/examples/front")
TICK = os.sysconf("SC_CLK_TCK")
UPSTREAM = 18081
# Peer: port without TLS, port with.
PORTS = {"nginx": (18082, 18442), "haproxy": (18083, 18443), "atoll": (18084, 18444), "atoll, 1,000 routes": (18085, 18445)}

NGINX = """daemon off; worker_processes 1; pid {dir}/{name}.pid; error_log /dev/null;
events {{ worker_connections 8192; }}
http {{ access_log off; keepalive_requests 100000000; client_body_temp_path {dir}/{name}-b; proxy_temp_path {dir}/{name}-p;
 fastcgi_temp_path {dir}/{name}-f; uwsgi_temp_path {dir}/{name}-u; scgi_temp_path {dir}/{name}-s; {body} }}
"""
PROXY = """upstream u {{ server 127.0.0.1:{up}; keepalive 1024; keepalive_requests 100000000; }}
 server {{ listen 127.0.0.1:{plain}; {same} }}
 server {{ listen 127.0.0.1:{tls} ssl http2; ssl_certificate {dir}/crt; ssl_certificate_key {dir}/key; {same} }}"""
SAME = """http2_max_concurrent_streams 128; location / { proxy_http_version 1.1; proxy_set_header Connection "";
 proxy_set_header Host $host; proxy_set_header X-Forwarded-For $remote_addr; proxy_pass http://u; }"""
HAPROXY = """global
 nbthread 1
 maxconn 8192
 ssl-default-bind-options ssl-min-ver TLSv1.2
defaults
 mode http
 option http-keep-alive
 http-reuse always
 timeout connect 3s
 timeout client 60s
 timeout server 60s
 option forwardfor
frontend plain
 bind 127.0.0.1:{plain}
 default_backend u
frontend tls
 bind 127.0.0.1:{tls} ssl crt {dir}/both alpn h2,http/1.1
 default_backend u
backend u
 server one 127.0.0.1:{up}
"""


def start(core, *command):
    return subprocess.Popen(["taskset", "-c", str(core), *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def cpu(pid):
    """Seconds of user and system time of a process and its children."""
    total = 0
    for one in [pid, *children(pid)]:
        with open(f"/proc/{one}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICK


def serve(directory):
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                    "-subj", "/CN=bench", "-keyout", f"{directory}/key", "-out", f"{directory}/crt"],
                   check=True, stderr=subprocess.DEVNULL)
    with open(f"{directory}/both", "w") as both:
        both.write(open(f"{directory}/crt").read() + open(f"{directory}/key").read())

    def nginx(name, body):
        with open(f"{directory}/{name}.conf", "w") as file:
            file.write(NGINX.format(dir=directory, name=name, body=body))
        return f"{directory}/{name}.conf"

    answer = 'server { listen 127.0.0.1:%d; location / { default_type text/plain; return 200 "hello, world\\n"; } }' % UPSTREAM
    running = {"upstream": start(1, "nginx", "-c", nginx("upstream", answer))}
    plain, tls = PORTS["nginx"]
    body = PROXY.format(up=UPSTREAM, plain=plain, tls=tls, dir=directory, same=SAME)
    running["nginx"] = start(0, "nginx", "-c", nginx("proxy", body))
    plain, tls = PORTS["haproxy"]
    with open(f"{directory}/haproxy.cfg", "w") as file:
        file.write(HAPROXY.format(up=UPSTREAM, plain=plain, tls=tls, dir=directory))
    running["haproxy"] = start(0, "haproxy", "-f", f"{directory}/haproxy.cfg")
    for name, routes in [("atoll", 0), ("atoll, 1,000 routes", 1000)]:
        plain, tls = PORTS[name]
        running[name] = start(0, FRONT, f"127.0.0.1:{plain}", f"127.0.0.1:{UPSTREAM}", "1", str(routes),
                              f"127.0.0.1:{tls}", f"{directory}/crt", f"{directory}/key")
    for port in [UPSTREAM, *(plain for plain, _ in PORTS.values())]:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        else:
            sys.exit(f"nothing answers at port {port}")
    return running


def load(pid, url, version, connections, seconds):
    """Requests a second, CPU microseconds a request, the 99th percentile's upper bound, failed requests."""
    before = cpu(pid)
    flags = ["--h1"] if version == 1 else ["-m", "8"]
    said = subprocess.run(["taskset", "-c", "1", "h2load", *flags, "-t", "1", "-c", str(connections), "-D", str(seconds),
                           "--log-file=/dev/fd/2", url], capture_output=True, text=True)
    used = cpu(pid) - before
    done = re.search(r"requests: (\d+) total.*?(\d+) succeeded, (\d+) failed", said.stdout)
    total, good, bad = (int(part) for part in done.groups())
    times = sorted(int(line.split()[2]) for line in said.stderr.splitlines() if line.count("\t") == 2)
    p99 = times[int(len(times) * 0.99)] / 1000 if times else 0.0
    return good / seconds, used / max(good, 1) * 1e6, p99, bad


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    for tool in ["nginx", "haproxy", "h2load", "openssl", "taskset"]:
        if not shutil.which(tool):
            sys.exit(f"{tool} is missing: scripts/packages.sh bench")
    directory = tempfile.mkdtemp(prefix="atoll-bench-")
    running = {}
    # Ended from outside, it still ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        running = serve(directory)
        print(f"{'case':<24}{'proxy':<22}{'requests/s':>11}{'cpu us':>9}{'p99 ms':>9}{'failed':>8}")
        for version, tls, connections in [(v, t, c) for v in (1, 2) for t in (False, True) for c in (32, 512)]:
            case = f"HTTP/{version} {'TLS ' if tls else ''}{connections}"
            # nginx speaks HTTP/2 without TLS on ports of its own only; the peers are compared where all three serve.
            if options.only not in case or (version == 2 and not tls):
                continue
            figures = {name: [] for name in PORTS}
            for _ in range(options.rounds):
                for name, ports in PORTS.items():
                    url = f"{'https' if tls else 'http'}://127.0.0.1:{ports[tls]}/"
                    figures[name].append(load(running[name].pid, url, version, connections, options.seconds))
            middle = {name: [statistics.median(column) for column in zip(*runs)] for name, runs in figures.items()}
            for name, (rate, used, p99, bad) in middle.items():
                print(f"{case:<24}{name:<22}{rate:>11.0f}{used:>9.1f}{p99:>9.1f}{bad:>8.0f}", flush=True)
            best = {"rate": max(middle[n][0] for n in ("nginx", "haproxy")), "cpu": min(middle[n][1] for n in ("nginx", "haproxy"))}
            print(json.dumps({"bench": "gateway", "case": case, "ratio_rate": round(middle["atoll"][0] / best["rate"], 3),
                              "ratio_cpu": round(best["cpu"] / middle["atoll"][1], 3),
                              "routes_cost": round(middle["atoll, 1,000 routes"][1] / middle["atoll"][1] - 1, 3)}), flush=True)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
