#!/bin/sh
# `atoll oci run` beside crun, runc and youki: the same bundle, in one run. Writes bench/out/oci.json and oci.md.
#
# crun 1.8 refuses hybrid control groups, so all of them run where version 2 is all there is, in a mount namespace of
# this script's own; crun without control groups, which spares it that work. RUNS=200 sets the count. `runtime alone` is the
# same code without the rest of the binary (cargo build --release -p container --bin atoll-oci): what its size costs.
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
built=${CARGO_TARGET_DIR:-$root/target}/release
atoll=${ATOLL:-$built/atoll}
small=${ATOLL_OCI:-$built/atoll-oci}
[ "$1" = inside ] || exec unshare --mount --propagation private "$0" inside
mount -t cgroup2 none /sys/fs/cgroup

work=$(mktemp -d /var/tmp/atoll-bench-oci.XXXXXX)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/rootfs/bin" "$work/rootfs/proc" "$work/rootfs/sys" "$work/rootfs/dev" "$root/bench/out"
cp /bin/busybox "$work/rootfs/bin/busybox"
ln -s busybox "$work/rootfs/bin/true"
mkdir "$work/whole"
ln -s "$atoll" "$work/whole/atoll-oci"
ln -s "$small" "$work/atoll-oci"
cd "$work"
./atoll-oci spec
python3 - <<'P'
import json
config = json.load(open("config.json"))
config["ociVersion"] = "1.0.2"
config["process"].update(terminal=False, args=["true"])
json.dump(config, open("config.json", "w"))
P

set -- -n "atoll oci" "$work/whole/atoll-oci run bench-whole" -n "runtime alone" "$work/atoll-oci run bench-small"
for peer in crun runc youki; do
    case $peer in crun) call="crun --cgroup-manager=disabled run bench-crun" ;; *) call="$peer run bench-$peer" ;; esac
    if ! command -v $peer > /dev/null; then
        echo "$peer: SKIPPED: not installed"
    elif ! $call > /dev/null 2> why; then
        echo "$peer: SKIPPED: $(head -c 200 why)"
    else
        set -- "$@" -n $peer "$call"
    fi
done
hyperfine --shell=none --warmup 5 --runs "${RUNS:-200}" --export-json "$root/bench/out/oci.json" --export-markdown "$root/bench/out/oci.md" "$@"

echo "ratios of medians (goal: 0.7 of crun, 0.2 of runc)"
python3 - "$root/bench/out/oci.json" <<'P'
import json, sys
results = {r["command"]: r for r in json.load(open(sys.argv[1]))["results"]}
ours = results["atoll oci"]
for name, peer in results.items():
    print(f"  {name:13} median {peer['median'] * 1e3:6.2f} ms, best {peer['min'] * 1e3:6.2f} ms, cpu {(peer['user'] + peer['system']) * 1e3:6.2f} ms; "
          f"atoll oci is {ours['median'] / peer['median']:.2f} of its median, {ours['min'] / peer['min']:.2f} of its best")
P

# Load changes times; what is asked of the kernel repeats, and so do instructions where the machine counts them.
for call in "$work/whole/atoll-oci run bench-whole" "$work/atoll-oci run bench-small" "crun --cgroup-manager=disabled run bench-crun" "runc run bench-runc"; do
    command -v strace > /dev/null && command -v "${call%% *}" > /dev/null || continue
    strace -f -c -o counted $call > /dev/null 2>&1 || continue
    echo "  ${call##*/}: $(tail -n 1 counted | awk '{print $4}') system calls"
    command -v perf > /dev/null || continue
    perf stat -r 30 -x, -e task-clock,page-faults,instructions:u $call 2>&1 > /dev/null |
        awk -F, '/^[0-9]/ {print "    " $1 " " ($2 == "msec" ? "ms of processor time" : $3)} /not supported/ {print "    instructions: SKIPPED: no counters here"}'
done
