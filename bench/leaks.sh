#!/bin/sh
# A thousand containers of one pod, 250 pods and a hundred containers at once: mounts, links, descriptors, control groups,
# processes and files are as before, or this fails. LOOPS and AT_ONCE set other numbers.
set -e
cd "$(dirname "$0")/.."
ATOLL_LOOPS=${LOOPS:-1000} ATOLL_AT_ONCE=${AT_ONCE:-100} cargo test --release -p container --test runtime -- leaks
