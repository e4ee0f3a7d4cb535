#!/bin/sh
# Prints the file that says where this machine gets Debian packages from, for mmdebstrap.
for file in /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list; do
    [ -s "$file" ] && echo "$file" && exit 0
done
echo "no Debian package sources on this machine: /etc/apt/sources.list is empty" >&2
exit 1
