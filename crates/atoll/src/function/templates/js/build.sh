#!/bin/sh
# Builds function.wasm with componentize-js. Needs node 18 or newer and npm.
set -eu
cd "$(dirname "$0")"
if [ ! -e node_modules/.installed ] || [ package.json -nt node_modules/.installed ]; then
    # From nothing: npm brings an older installation up to date only in part.
    rm -rf node_modules
    npm install --no-package-lock --no-audit --no-fund --loglevel=error
    # npm of node 18 leaves out optional native parts that ask for node 20, though node 18 runs them.
    left_out=$(node left-out.cjs)
    if [ -n "$left_out" ]; then
        npm install --no-save --no-package-lock --no-audit --no-fund --loglevel=error $left_out
    fi
    touch node_modules/.installed
fi
node build.js
