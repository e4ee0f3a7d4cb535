#!/bin/bash
# make bench: builds what is measured and runs bench/run.py in namespaces of its own. CGROUPS=2: with version 2 of control
# groups alone, as most machines have it; podman with runc finds no controllers in such a view where version 1 has them.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --bin atoll --bin atoll-oci --example apibench
ns=atoll-bench-$$
ip netns add "$ns"
trap 'ip netns del "$ns"' EXIT
nsenter "--net=/run/netns/$ns" ip link set lo up
# Its mounts end with it. /run is in memory on most machines.
in_memory='[ "$(stat -f -c %T /run)" = tmpfs ] || { mkdir -p /run/atoll && mount -t tmpfs run /run/atoll; }
[ "${CGROUPS:-}" != 2 ] || mount -t cgroup2 none /sys/fs/cgroup
exec "$@"'
nsenter "--net=/run/netns/$ns" unshare --mount --propagation private sh -c "$in_memory" sh python3 bench/run.py "$@"
