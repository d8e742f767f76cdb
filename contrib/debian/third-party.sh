#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Prints the licences of what Go linked into the programs named as arguments.
set -eu

echo "The programs contain the Go runtime and library, and the modules below."
echo
echo "======== Go"
cat "$(go env GOROOT)/LICENSE"
for program; do
	go version -m "$program"
done | awk '$1 == "dep" { print $2 "@" $3 }' | sort -u | while read -r module; do
	dir=$(go list -m -f '{{.Dir}}' "${module%@*}")
	printf '\n======== %s\n' "$module"
	found=
	for file in "$dir"/LICENSE* "$dir"/LICENCE* "$dir"/COPYING* "$dir"/NOTICE*; do
		if [ -f "$file" ]; then
			cat "$file"
			found=1
		fi
	done
	if [ -z "$found" ]; then
		echo "third-party: $module has no licence" >&2
		exit 1
	fi
done
