#!/bin/bash
# The registry's throughput against docker-registry's: bench/registry.sh [PART OF A NAME...]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/packages.sh bench
cargo build --release --bin atoll
cargo build --release -p registry --example registryload
ns=atoll-regbench-$$
ip netns add "$ns"
trap 'ip netns del "$ns"' EXIT
nsenter "--net=/run/netns/$ns" ip link set lo up
nsenter "--net=/run/netns/$ns" python3 bench/registry.py "$@"
