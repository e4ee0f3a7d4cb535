#!/bin/bash
# The network's figures beside a plain veth pair, a bridge with iptables rules as Docker and kube-proxy set them, and
# loopback, in a network namespace of its own; kept in bench/out/network.json. network.sh [ROUNDS [WAY...]]
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release -p network --example netbench
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p bench/out "$scratch/run"
# As /run is on most machines.
in_memory='mount -t tmpfs run "$2/run" && exec "$@"'
unshare --net --mount --propagation private sh -c "$in_memory" sh \
    "${CARGO_TARGET_DIR:-target}/release/examples/netbench" "$scratch" "$@" | tee bench/out/network.json
