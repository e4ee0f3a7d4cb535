#!/bin/bash
# Makes the catalog's base from Debian packages: Python 3 and its PostgreSQL client. The Containerfile does the rest.
#   build.sh OUT   writes OUT/python.tar
# Needs root and mmdebstrap. Takes about 30 seconds; does nothing if the file is there and newer than this script.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: build.sh OUT}
mkdir -p "$out"
[ -s "$out/python.tar" ] && [ "$out/python.tar" -nt "$here/build.sh" ] && exit 0

sources=$("$here/../../../scripts/debian-sources.sh")
mmdebstrap --quiet --variant=minbase --format=tar \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --include=python3-minimal,python3-psycopg2 \
    bookworm "$out/python.tar.new" "$sources"
mv "$out/python.tar.new" "$out/python.tar"
