#!/bin/bash
# bench/function.sh: builds what is measured and runs bench/function.py in a network namespace of its own.
# ATOLL names a binary that is built already.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${ATOLL:-}" ]; then
    cargo build --release --bin atoll
    ATOLL=$PWD/target/release/atoll
fi
export ATOLL
examples/shop/pricing/build.sh
mkdir -p .cache/bench
if [ ! -x .cache/bench/node_modules/.bin/workerd ]; then
    npm install --prefix .cache/bench --no-audit --no-fund --loglevel=error workerd
fi
ns=atoll-bench-$$
ip netns add "$ns"
trap 'ip netns del "$ns"' EXIT
nsenter "--net=/run/netns/$ns" ip link set lo up
nsenter "--net=/run/netns/$ns" python3 bench/function.py "$@"
