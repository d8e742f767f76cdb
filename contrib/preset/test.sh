#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Checks what the presets beside this file make of the units, in a directory.
set -eu
cd "$(dirname "$0")"
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM

# enabled PRESET... tells which units are enabled by them.
enabled() {
	rm -rf "$dir/root"
	mkdir -p "$dir/root/etc/systemd/system-preset" "$dir/root/usr/lib/systemd/system"
	cp ../ftvirt-agent.service ../ftvirt-handover.service ../ftvirt-witness.service "$dir/root/usr/lib/systemd/system"
	for preset; do cp "$preset" "$dir/root/etc/systemd/system-preset"; done
	systemctl --root="$dir/root" preset ftvirt-agent.service ftvirt-witness.service 2>/dev/null
	for unit in agent witness; do
		[ "$(systemctl --root="$dir/root" is-enabled ftvirt-$unit.service)" = enabled ] && printf '%s ' $unit
	done
	echo
}

expect() {
	want=$1
	shift
	got=$(enabled "$@" 99-ftvirt-others.preset)
	[ "$got" = "$want" ] || {
		echo "with $*: '$got', not '$want'" >&2
		exit 1
	}
}
expect ''
expect 'agent ' 90-ftvirt-host.preset
expect 'witness ' 90-ftvirt-witness.preset
expect 'agent witness ' 90-ftvirt-host.preset 90-ftvirt-witness.preset
echo "the presets are well"
