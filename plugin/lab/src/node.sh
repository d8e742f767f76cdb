# SPDX-License-Identifier: Apache-2.0
#
# Process 1 of a lab's network node: a switch or a client, which have a network
# of their own and otherwise the machine's files.
#
#   sh -eu node.sh NAME     (in new net, pid, mount and uts namespaces)

name=$1
# Whoever starts this writes "go" once it has recorded the process: a lab that
# is killed before that leaves nothing behind.
read -r go && [ "$go" = go ]

mount --make-rprivate /
mount -t proc proc /proc
mount -t sysfs sysfs /sys 2>/dev/null || mount -t sysfs -o ro sysfs /sys
hostname "$name"
for scope in all default; do
	conf=/proc/sys/net/ipv6/conf/$scope/disable_ipv6
	[ ! -w "$conf" ] || echo 1 >"$conf"
done

echo ready
exec >/dev/null 2>&1 </dev/null
while :; do
	sleep 2147483647 &
	wait || :
done
