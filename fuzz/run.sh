#!/bin/bash
# run.sh [SECONDS] [TARGET...]: builds with stable Rust and runs each target that long (default 60), from a fixed seed.
# Stops at the first input that breaks a target; libFuzzer leaves it in target/artifacts and says how to run it again:
#   ATOLL_FUZZ_TARGET=NAME target/fuzz/fuzz FILE
set -euo pipefail
cd "$(dirname "$0")"
seconds=${1:-60}
shift || true
cargo build --profile fuzz
program=target/fuzz/fuzz
mkdir -p target/artifacts target/corpus
scratch=$(mktemp -d -p /dev/shm atoll-fuzz-XXXXXX)
trap 'rm -rf "$scratch"' EXIT
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
    for directory in corpus/*/; do targets+=("$(basename "$directory")"); done
fi
for target in "${targets[@]}"; do
    mkdir -p "target/corpus/$target"
    longest=4096
    [ "$target" = image_layer ] && longest=16384
    ATOLL_FUZZ_TARGET=$target ATOLL_FUZZ_SCRATCH=$scratch "$program" -seed=1 -max_total_time="$seconds" -timeout=10 \
        -rss_limit_mb=1024 -max_len=$longest -print_final_stats=0 -verbosity=0 -reload=0 \
        -artifact_prefix="target/artifacts/$target-" "target/corpus/$target" "corpus/$target" >"$scratch/log" 2>&1 || {
        tail -40 "$scratch/log"
        echo "fuzz: $target failed" >&2
        exit 1
    }
    printf '%-18s %ss, no failure; %s inputs that reach something of their own\n' "$target" "$seconds" \
        "$(find "target/corpus/$target" "corpus/$target" -type f | wc -l)"
done
