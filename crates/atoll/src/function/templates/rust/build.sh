#!/bin/sh
# Builds function.wasm. Needs Rust with the target: rustup target add wasm32-wasip2
set -eu
cd "$(dirname "$0")"
cargo build --release --target wasm32-wasip2
cp target/wasm32-wasip2/release/function.wasm function.wasm
