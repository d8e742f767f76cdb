#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# apparmor-test.sh APPARMOR: has AppArmor's parser compile the profile that libvirt
# makes for a domain, with the rules of contrib/apparmor-libvirt-qemu. APPARMOR is
# Debian's package, unpacked; nothing is loaded into the kernel.
set -eu

apparmor=$1
rules=$(dirname "$0")/apparmor-libvirt-qemu
# Debian 13 merged /sbin into /usr/sbin.
parser=$apparmor/sbin/apparmor_parser
[ -x "$parser" ] || parser=$apparmor/usr/sbin/apparmor_parser
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT INT TERM

fail() {
	echo "apparmor-test.sh: $*" >&2
	exit 1
}

cp -a "$apparmor/etc/apparmor.d" "$dir/apparmor.d"
cp -a /etc/apparmor.d/abstractions/libvirt-qemu "$dir/apparmor.d/abstractions"
sed 's/LIBVIRT_TEMPLATE/libvirt-test/' /etc/apparmor.d/libvirt/TEMPLATE.qemu >"$dir/profile"

# parse compiles the profile and prints, in the parser's words, what it includes.
parse() {
	# With the features of a kernel that has AppArmor, whichever runs here.
	features=$dir/apparmor.d/abi/3.0
	"$parser" --skip-kernel-load --skip-cache --quiet --config-file=/dev/null \
		--policy-features="$features" --kernel-features="$features" --base "$dir/apparmor.d" --Include "$dir/apparmor.d" "$@" "$dir/profile"
}

parse --preprocess | grep -q ftvirt && fail "Debian's own rules name ftvirt"
mkdir -p "$dir/apparmor.d/abstractions/libvirt-qemu.d"
cp "$rules" "$dir/apparmor.d/abstractions/libvirt-qemu.d/ftvirt"
parse
for path in /usr/lib/ftvirt/ftvirt.so run/ftvirt/plugin.sock 'run/ftvirt/clone-'; do
	parse --preprocess | grep -v '^ *#' | grep -qF "$path" || fail "no rule for $path is in the profile"
done
# A parser that takes anything would prove nothing.
echo '  /usr/lib/ftvirt/ftvirt.so nonsense,' >>"$dir/apparmor.d/abstractions/libvirt-qemu.d/ftvirt"
! parse 2>/dev/null || fail "the parser took a rule that is none"
echo "the profile of a domain compiles with the rules of $rules"
