#!/bin/sh
# Builds pricing.wasm here, with the versions of package.json; does nothing if it is newer than its sources.
# Needs node 20 or newer, and npm with a registry to fetch from the first time.
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
    npm install --no-package-lock --no-audit --no-fund --loglevel=error
    touch node_modules/.installed
fi
node build.js
