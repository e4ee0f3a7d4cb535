"""The daemon's path: from a pod's request being accepted to the first instruction of its program, beside `podman run`.

Pods are created through the API of a running `atoll up`, one after another: scheduled, bound, given an address, a link, policies and a
root file system from an image, started. The program tells when it began. podman runs the same image, in turns with them. PODS=8 in the
environment sets how many pods a round has.
"""
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
IMAGE = "127.0.0.1:5000/bench/clock:1"
ROUNDS, PODS, PODMAN = 5, int(os.environ.get("PODS", "60")), 5
STEP = re.compile(r"^(\S+)Z TRACE \w+::steps: pod=\"?([\w-]+)\"? step=\"(\w+)\"", re.M)


def run(*args, check=True):
    return subprocess.run(args, check=check, text=True, capture_output=True)


def archive():
    """A root file system with one program."""
    root = tempfile.mkdtemp()
    run("rustc", "-O", "-C", "target-feature=+crt-static", "-C", "panic=abort", "-o", f"{root}/clock", f"{ROOT}/bench/clock.rs")
    for name in ("proc", "sys", "dev", "etc", "tmp"):
        os.mkdir(f"{root}/{name}")
    run("tar", "-C", root, "-cf", f"{root}.tar", "--owner=0", "--group=0", ".")
    shutil.rmtree(root)
    return f"{root}.tar"


class Podman:
    def __init__(self, image):
        self.work = tempfile.mkdtemp(dir="/var/tmp")
        self.base = ["podman", "--runtime=runc", "--root", f"{self.work}/root", "--runroot", f"{self.work}/run"]
        self.why = "podman or runc is not installed"
        if not shutil.which("podman") or not shutil.which("runc"):
            return
        run(*self.base, "import", image, "localhost/clock:1", check=False)
        for self.network in ("bridge", "none"):
            if self.turn():
                self.why = None
                return

    def turn(self):
        """Milliseconds from its start to the program's."""
        # podman asks for higher limits than some machines may set, and runc then gives up
        limits = [f"--ulimit={name}={value}:{value}" for name, value in (("nofile", 1024), ("nproc", 4000))]
        begun = time.time_ns()
        done = run(*self.base, "run", "--rm", f"--network={self.network}", *limits, "localhost/clock:1", "/clock", check=False)
        self.why = done.stderr.strip()[-200:]
        return (int(done.stdout) - begun) / 1e6 if done.returncode == 0 else None

    def remove(self):
        if shutil.which("podman"):
            run(*self.base, "system", "reset", "--force", check=False)
        shutil.rmtree(self.work, ignore_errors=True)


def quantile(values, q):
    return sorted(values)[round((len(values) - 1) * q)]


def since(begin, end, pods):
    return [(pod[end] - pod[begin]) / 1e6 for pod in pods]


def steps(up):
    """Where the time goes, from a run of its own that logs: medians of what each step took, in the order they come."""
    up.stop()
    up.begin(ATOLL_LOG="warn,node::steps=trace,controllers::steps=trace")
    try:
        pods = up.apibench("path", IMAGE, str(PODS))
    finally:
        up.stop()
        up.begin()
    told = {}
    for stamp, pod, step in STEP.findall(open(f"{up.data}.log").read()):
        at = datetime.datetime.fromisoformat(stamp).replace(tzinfo=datetime.timezone.utc).timestamp() * 1e9
        told.setdefault(pod, []).append((step, at))
    took = {}
    for pod in pods:
        before = pod["sent"]
        marks = told.get(pod["name"], []) + [("program", pod["executed"]), ("accepted", pod["accepted"])]
        for step, at in sorted(marks, key=lambda mark: mark[1]):
            took.setdefault(step, []).append((at - before) / 1e6)
            before = at
    return {step: {"median": round(statistics.median(values), 3), "p99": round(quantile(values, 0.99), 3)} for step, values in took.items()}


def measure(up, figure):
    image = archive()
    up.atoll("image", "import", "--data-dir", up.data, image, "--tag", IMAGE)
    podman, pods, peer = Podman(image), [], []
    try:
        for _ in range(ROUNDS):
            pods += up.apibench("path", IMAGE, str(PODS))
            peer += [podman.turn() for _ in range(PODMAN) if not podman.why]
    finally:
        podman.remove()
        os.remove(image)
    peer = [value for value in peer if value]
    name = f"podman run --network={podman.network}" if peer else None
    if not peer:
        print(f"  podman: SKIPPED: {podman.why}")
    command = f"apibench path: {ROUNDS * PODS} pods one after another, image present; podman {len(peer)} times in between"
    for begin, what in (("accepted", "pod accepted to its program's start"), ("sent", "pod sent to its program's start")):
        times = since(begin, "executed", pods)
        figure(f"{what}, median", statistics.median(times), "ms", "< 3" if begin == "accepted" else "", command, name, statistics.median(peer) if peer else None)
        figure(f"{what}, p99", quantile(times, 0.99), "ms", "< 8" if begin == "accepted" else "", command, name, quantile(peer, 0.99) if peer else None)
    found = steps(up)
    print("  steps, ms (median, p99), each since the one before:")
    for step, took in found.items():
        print(f"    {step:12} {took['median']:7.2f} {took['p99']:7.2f}")
    os.makedirs(f"{ROOT}/bench/out", exist_ok=True)
    with open(f"{ROOT}/bench/out/path.json", "w") as out:
        json.dump({"pods": pods, "podman": peer, "steps": found}, out, indent=1)
