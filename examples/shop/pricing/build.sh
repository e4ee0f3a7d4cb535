#!/bin/sh
# Builds pricing.wasm here, with the versions of package.json; does nothing if it is newer than its sources.
# Needs node 18 or newer, and npm with a registry to fetch from the first time.
set -eu
cd "$(dirname "$0")"
if [ -e pricing.wasm ]; then
    fresh=yes
    for source in pricing.js build.js wit/world.wit package.json; do
        [ "$source" -nt pricing.wasm ] && fresh=no
    done
    if [ "$fresh" = yes ]; then
        echo "pricing.wasm is up to date"
        exit 0
    fi
fi
if [ ! -e node_modules/.installed ] || [ package.json -nt node_modules/.installed ]; then
    # From nothing: npm brings an older installation up to date only in part.
    rm -rf node_modules
    npm install --no-package-lock --no-audit --no-fund --loglevel=error
    # Debian 12's node 18 runs all of it, but its npm leaves out optional parts that ask for node 20.
    left_out=$(node left-out.cjs)
    if [ -n "$left_out" ]; then
        # shellcheck disable=SC2086
        npm install --no-save --no-package-lock --no-audit --no-fund --loglevel=error $left_out
    fi
    touch node_modules/.installed
fi
node build.js
