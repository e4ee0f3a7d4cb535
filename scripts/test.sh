#!/bin/bash
# Runs all tests, and tells again at the very end what failed: among the output of some thirty programs nobody finds it.
set -uo pipefail
cd "$(dirname "$0")/.."

log=$(mktemp)
trap 'rm -f "$log"' EXIT
cargo test --workspace --no-fail-fast 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
[ "$status" -eq 0 ] && exit 0

printf '\n== what failed\n'
# the end-to-end suite's own list; of the others, the name, the place and the first line of what was said
awk '
    BEGIN { told = 1 }
    /^failed: / { print; next }
    /^---- .* stdout ----$/ { print "failed: " $2; told = 0; next }
    / panicked at / && !told { print "  " $0; told = 1; line = 1; next }
    line { print "  " substr($0, 1, 300); line = 0 }
' "$log"
grep -a '^error' "$log" | tail -5
exit "$status"
