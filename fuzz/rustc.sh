#!/bin/sh
# rustc.sh RUSTC ARGUMENTS: adds coverage counters to the crates whose parsers are fuzzed, and to those they parse with.
rustc=$1
shift
case " $* " in
*" --crate-name build_script_build "* | *" --print"* | *" --crate-type proc-macro "*) exec "$rustc" "$@" ;;
esac
case "${CARGO_PKG_NAME:-}" in
fuzz | api | container | image | network | registry | server | vmm | serde_json | serde-saphyr | granit-parser | saphyr-parser)
    exec "$rustc" "$@" -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
        -Cllvm-args=-sanitizer-coverage-trace-compares
    ;;
esac
exec "$rustc" "$@"
