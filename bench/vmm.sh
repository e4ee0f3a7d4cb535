#!/bin/sh
# Our KVM engine: how fast it starts and restores and what it takes, with a guest of a few KiB, on this computer's own KVM,
# whatever that is; and beside QEMU's microvm, the same kernel, initrd, disk and tap, in one nested machine with a real KVM
# under translation, where ratios count and times do not. Prints tables and writes bench/out/vmm.json (JSON lines).
set -eu
cd "$(dirname "$0")/.."
mkdir -p bench/out
out=bench/out/vmm.json
target=${CARGO_TARGET_DIR:-target}
cargo build --quiet -p vmm --release --examples
export ATOLL_VMM="$(cd "$target" && pwd)/release/examples/vmm"
: >$out
log=bench/out/vmm.log
"$target/release/examples/monitor_figures" >"$log"
if grep SKIPPED "$log"; then :; else
    cat "$log" >>$out
    printf '%-40s %10s %5s %6s\n' WHAT ATOLL UNIT GOAL
    jq -r 'select(.unit) | [.name, .atoll, .unit, (if .goal == 0 then "" else .goal end)] | @tsv' "$log" |
        while IFS='	' read -r name ours unit goal; do printf '%-40s %10s %5s %6s\n' "$name" "$ours" "$unit" "$goal"; done
fi
ATOLL_BENCH=1 cargo test --quiet -p vmm --test nested >"$log" 2>&1 || {
    tail -n 20 "$log" >&2
    exit 1
}
if grep SKIPPED "$log" | grep -v PVH; then exit 0; fi
grep -a '^bench {' "$log" | tail -n 8 | sed 's/^bench //' >"$log.found"
cat "$log.found" >>$out
printf '\n%-40s %10s %14s %8s\n' WHAT ATOLL QEMU-MICROVM RATIO
jq -r '[.name, .atoll, ."qemu-microvm", .ratio] | @tsv' "$log.found" |
    while IFS='	' read -r name ours peer ratio; do printf '%-40s %10s %14s %8s\n' "$name" "$ours" "$peer" "$ratio"; done
