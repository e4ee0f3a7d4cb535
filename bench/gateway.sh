#!/bin/bash
# The gateway's figures: builds what is measured and runs bench/gateway.py in a network namespace of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --example front -p gateway
ns=atoll-bench-gw-$$
ip netns add "$ns"
trap 'ip netns del "$ns"' EXIT
nsenter "--net=/run/netns/$ns" ip link set lo up
nsenter "--net=/run/netns/$ns" python3 bench/gateway.py "$@"
