#!/bin/bash
# make bench: builds what is measured and runs bench/run.py in a network namespace of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --bin atoll --bin atoll-oci --example apibench
ns=atoll-bench-$$
ip netns add "$ns"
trap 'ip netns del "$ns"' EXIT
nsenter "--net=/run/netns/$ns" ip link set lo up
nsenter "--net=/run/netns/$ns" python3 bench/run.py "$@"
