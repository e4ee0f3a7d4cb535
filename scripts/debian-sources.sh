#!/bin/sh
# Prints the file that says where this machine gets Debian packages from, for mmdebstrap.
for file in /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list /etc/apt/sources.list.d/*; do
    if grep -Eqs '^(deb |URIs:).*/debian/? *' "$file"; then
        echo "$file" && exit 0
    fi
done
echo "no Debian package sources on this machine: neither /etc/apt/sources.list nor /etc/apt/sources.list.d names one" >&2
exit 1
