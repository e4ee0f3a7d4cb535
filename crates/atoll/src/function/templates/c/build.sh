#!/bin/sh
# Builds function.wasm. Needs clang, lld and wasi-libc (Debian 12: apt-get install clang lld wasi-libc
# libclang-rt-14-dev-wasm32) and, to make a component of it, node 18 or newer and npm.
set -eu
cd "$(dirname "$0")"
[ -d node_modules/@bytecodealliance/jco ] || npm install --no-package-lock --no-audit --no-fund --loglevel=error
clang --target=wasm32-wasi -O2 -Wall -mexec-model=reactor -o core.wasm handler.c
node component.mjs
rm core.wasm
