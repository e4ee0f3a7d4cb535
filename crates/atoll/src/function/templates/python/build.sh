#!/bin/sh
# Builds function.wasm with componentize-py, kept in .venv. Needs Python 3.10 or newer with venv and pip.
set -eu
cd "$(dirname "$0")"
if [ ! -x .venv/bin/componentize-py ]; then
    python3 -m venv .venv
    .venv/bin/pip install --quiet componentize-py==0.25.1
fi
.venv/bin/componentize-py -q -d wit -w function componentize app -o function.wasm
