#!/bin/sh
# What a machine with a real KVM under translation is made of: Debian's cloud kernel and its modules, kept in the given
# directory.   nested.sh DIR   writes DIR/vmlinuz and DIR/modules/; says on stderr what is missing.
set -eu
out=${1:?usage: nested.sh DIR}
mkdir -p "$out"
[ -s "$out/vmlinuz" ] && [ -d "$out/modules" ] && exit 0
package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '/Depends: linux-image/ { print $2; exit }')
[ -n "$package" ] || { echo "linux-image-cloud-amd64 is in no package source of this machine" >&2; exit 1; }
work=$(mktemp -d "$out/unpack.XXXXXX")
trap 'rm -rf "$work"' EXIT
(cd "$work" && apt-get download "$package" >/dev/null 2>&1) || { echo "apt-get download $package failed" >&2; exit 1; }
dpkg -x "$work"/*.deb "$work/tree"
mkdir "$work/modules"
find "$work/tree/lib/modules" -name '*.ko' -exec cp {} "$work/modules/" \;
rm -rf "$out/modules"
mv "$work/modules" "$out/modules"
mv "$work"/tree/boot/vmlinuz-* "$out/vmlinuz"
