#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# What BenchmarkCounting measures: the CPU time between two marks.
/bin/busybox mkdir -p /proc /sys /tmp
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
exec </dev/console >/dev/console 2>&1
cat /bin/busybox /bin/busybox /bin/busybox /bin/busybox >/tmp/data
mark() { echo "MARK $1 $(cut -d' ' -f1 /proc/uptime)"; }
repeat() {
	turns=$1
	shift
	while [ "$turns" -gt 0 ]; do "$@" >/dev/null 2>&1; turns=$((turns - 1)); done
}
mark boot
repeat 6 md5sum /tmp/data
mark md5sum
repeat 1 gzip -1 -c /tmp/data
mark gzip
repeat 150 /bin/busybox true
mark fork-exec
repeat 1 dd if=/dev/zero of=/dev/null bs=64k count=6000
mark clear
repeat 8 sh -c 'cat /tmp/data | cat'
mark pipe
repeat 8 cp /tmp/data /tmp/copy
mark copy
repeat 20 ls -lR /sys/devices
mark syscalls
poweroff -f
