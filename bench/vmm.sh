#!/bin/sh
# Our KVM engine beside QEMU's microvm, the same kernel and initrd to /init, in one nested machine with a real KVM under
# translation. Prints a table and writes JSON lines to bench/out/vmm.json. Figures are of a translated computer: ratios count.
set -eu
cd "$(dirname "$0")/.."
mkdir -p bench/out
cargo build --quiet -p vmm --release --examples
log=bench/out/vmm.log
ATOLL_BENCH=1 ATOLL_VMM=$PWD/target/release/examples/vmm cargo test --quiet -p vmm --test nested >"$log" 2>&1 || {
    tail -n 20 "$log" >&2
    exit 1
}
if grep -q SKIPPED "$log"; then grep SKIPPED "$log"; exit 0; fi
grep -a -o '{"name".*}' "$log" >bench/out/vmm.json
printf '%-20s %10s %14s %8s\n' WHAT ATOLL QEMU-MICROVM RATIO
sed 's/[{}"]//g; s/[a-z-]*://g' bench/out/vmm.json | while IFS=, read -r name ours peer ratio; do
    printf '%-20s %10s %14s %8s\n' "$name" "$ours" "$peer" "$ratio"
done
