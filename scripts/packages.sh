#!/bin/bash
# Installs what is missing of the Debian packages that a target needs: packages.sh [demo|test|bench]
# The lists are in packages.txt, one "package command-or-file-that-shows-it-is-there set..." a line.
set -euo pipefail
set_wanted=${1:-demo}
list=$(dirname "$0")/packages.txt

missing=()
while read -r package shown sets; do
    case $package in ''|'#'*) continue ;; esac
    case " $sets " in *" $set_wanted "*) ;; *) continue ;; esac
    if [ "${shown#/}" != "$shown" ]; then [ -e "$shown" ] && continue
    else command -v "$shown" >/dev/null 2>&1 && continue; fi
    missing+=("$package")
done < "$list"
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -ne 0 ]; then
    echo "these Debian packages are missing; install them as root: apt-get install ${missing[*]}" >&2
    exit 1
fi
echo "installing Debian packages: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
