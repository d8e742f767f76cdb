#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# test.sh FTVIRT: checks the role beside this file without hosts: its syntax and
# style, what it refuses, and that the command FTVIRT takes each host's
# configuration that it writes.
set -eu
ftvirt=$(realpath "$1")
cd "$(dirname "$0")"
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export HOME="$dir" ANSIBLE_LOCALHOST_WARNING=false ANSIBLE_NOCOLOR=1 ANSIBLE_HOME="$dir" ANSIBLE_LOCAL_TEMP="$dir/tmp" ANSIBLE_REMOTE_TEMP="$dir/tmp"

fail() {
	echo "test.sh: $*" >&2
	exit 1
}

two=$(printf '{"ftvirt_arbiter_id": "%s"}' 0011223344556677)
three='{"ftvirt_witnesses": ["A1B2@192.0.2.1:7702", "C3D4@192.0.2.2:7702", "E5F6@192.0.2.3:7702"]}'

echo "== style"
ansible-lint --nocolor -q
for book in init.yml site.yml; do
	for inventory in inventories/*.yml; do
		ansible-playbook --syntax-check -i "$inventory" "$book" >/dev/null
	done
done

# The first task of the role, which stands for what init.yml has yet to print.
check() {
	ansible-playbook -c local -i "inventories/$1.yml" -e "$2" --tags check site.yml >"$dir/out" 2>&1
}
echo "== what it refuses"
check two-hosts '{}' && fail "a directory without an id passes"
grep -q 'Run init.yml once' "$dir/out" || fail "it does not say what to do: $(cat "$dir/out")"
check three-hosts '{}' && fail "a majority without witnesses passes"
check two-hosts "$two" || fail "two hosts are refused: $(cat "$dir/out")"
check three-hosts "$three" || fail "three hosts are refused: $(cat "$dir/out")"

echo "== what it writes"
# Defaults are the weakest in a role, but not on the command line.
sed '/^ftvirt_arbiter\|^ftvirt_witnesses\|^ftvirt_settings\|_address:/d' roles/ftvirt/defaults/main.yml >"$dir/defaults.yml"
render() {
	ansible all -c local -i "inventories/$1.yml" -e "@$dir/defaults.yml" -e "$2" -m ansible.builtin.template \
		-a "src=$PWD/roles/ftvirt/templates/ftvirt.toml.j2 dest=$dir/$1-{{ inventory_hostname }}.toml" >"$dir/out" 2>&1 ||
		fail "$(cat "$dir/out")"
}
render two-hosts "$(printf '{"ftvirt_settings": {}, %s' "${two#?}")"
render three-hosts "$three"
count=0
for file in "$dir"/*.toml; do
	"$ftvirt" config check "$file" || fail "$(cat "$file")"
	count=$((count + 1))
done
[ "$count" = 5 ] || fail "$count files, not 5"
grep -qx 'channel = "198.51.100.2:7700"' "$dir/two-hosts-hosta.toml" || fail "the peer's channel is not where the inventory says: $(cat "$dir/two-hosts-hosta.toml")"
grep -qx 'host = "hostc"' "$dir/three-hosts-hostc.toml" || fail "the host has not its name"
grep -qx 'bandwidth = "300MiB"' "$dir/three-hosts-hosta.toml" || fail "settings are lost"
echo "the role is well"
