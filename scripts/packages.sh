#!/bin/bash
# Installs what is missing of the Debian packages that a target needs: packages.sh [demo|test|bench]
# The lists are in packages.txt, one "package command-or-file-that-shows-it-is-there set..." a line; a package written
# name/suite comes from that newer suite of Debian, alone.
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
    echo "these Debian packages are missing; install them as root: apt-get install ${missing[*]%%/*}" >&2
    exit 1
fi
echo "installing Debian packages: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive

# One package of a newer suite than this machine's, without adding that suite to the machine's sources.
newer() {
    local package=${1%/*} suite=${1#*/} dir
    dir=$(mktemp -d)
    mkdir -p "$dir/lists/partial" "$dir/archives/partial"
    echo "deb http://deb.debian.org/debian $suite main" >"$dir/sources.list"
    local apt=(apt-get -qq -o APT::Sandbox::User=root -o "Dir::Etc::SourceList=$dir/sources.list" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$dir/lists")
    (cd "$dir" && "${apt[@]}" update && "${apt[@]}" download "$package") \
        && apt-get install -y -qq --no-install-recommends "$dir/$package"_*.deb >/dev/null
    local done=$?
    rm -rf "$dir"
    return $done
}

apt-get update -qq
ordinary=()
for package in "${missing[@]}"; do
    case $package in */*) ;; *) ordinary+=("$package") ;; esac
done
[ ${#ordinary[@]} -eq 0 ] || apt-get install -y -qq --no-install-recommends "${ordinary[@]}" >/dev/null
for package in "${missing[@]}"; do
    case $package in */*) newer "$package" ;; esac
done
