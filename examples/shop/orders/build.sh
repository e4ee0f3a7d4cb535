#!/bin/bash
# Makes the shop's database machine: Debian 12 with systemd, cloud-init and PostgreSQL.
#   build.sh OUT   writes OUT/orders.raw (an ext4 root disk) and OUT/orders-kernel.tar (kernel and initrd)
# Needs root and: mmdebstrap, e2fsprogs. Takes about two minutes; does nothing if both files are there.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: build.sh OUT}
mkdir -p "$out"
[ -s "$out/orders.raw" ] && [ -s "$out/orders-kernel.tar" ] && exit 0

work=$(mktemp -d "$out/orders.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir "$work/skel"
cp -r "$here/rootfs/." "$work/skel/"

sources=$("$here/../../../scripts/debian-sources.sh")
mmdebstrap --quiet --variant=minbase --format=directory \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    --essential-hook="cp -r '$work/skel/.' \"\$1\"" \
    --include=systemd,systemd-sysv,dbus,udev,kmod,iproute2,netplan.io,cloud-init,postgresql,linux-image-cloud-amd64 \
    --customize-hook='echo "listen_addresses = '"'*'"'" > "$1/etc/postgresql/15/main/conf.d/shop.conf"' \
    --customize-hook='echo "host all all 10.42.0.0/16 scram-sha-256" >> "$1/etc/postgresql/15/main/pg_hba.conf"' \
    --customize-hook='rm -f "$1/etc/resolv.conf" "$1/etc/hostname" && : > "$1/etc/machine-id"' \
    bookworm "$work/root" "$sources"

mkdir -p "$work/kernel/boot"
cp "$work"/root/boot/vmlinuz-* "$work/kernel/boot/vmlinuz"
cp "$work"/root/boot/initrd.img-* "$work/kernel/boot/initrd.img"
tar -C "$work/kernel" --owner=0 --group=0 -cf "$out/orders-kernel.tar.new" boot
rm -f "$work"/root/boot/vmlinuz-* "$work"/root/boot/initrd.img-*

mkfs.ext4 -q -F -L rootfs -O ^has_journal -d "$work/root" "$out/orders.raw.new" 1536M
mv "$out/orders-kernel.tar.new" "$out/orders-kernel.tar"
mv "$out/orders.raw.new" "$out/orders.raw"
