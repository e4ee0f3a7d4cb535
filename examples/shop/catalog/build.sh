#!/bin/bash
# Makes the catalog's root file system from Debian packages: Python 3 and its PostgreSQL client.
#   build.sh OUT   writes OUT/catalog.tar
# Needs root and mmdebstrap. Takes about 30 seconds; does nothing if the file is there and newer than the program.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: build.sh OUT}
mkdir -p "$out"
[ -s "$out/catalog.tar" ] && [ "$out/catalog.tar" -nt "$here/catalog.py" ] && exit 0

sources=$("$here/../../../scripts/debian-sources.sh")
mmdebstrap --quiet --variant=minbase --format=tar \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --include=python3-minimal,python3-psycopg2 \
    --customize-hook="install -D -m 0755 '$here/catalog.py' \"\$1/srv/catalog.py\"" \
    --customize-hook='echo "catalog:x:10001:10001::/srv:/usr/sbin/nologin" >> "$1/etc/passwd"' \
    bookworm "$out/catalog.tar.new" "$sources"
mv "$out/catalog.tar.new" "$out/catalog.tar"
