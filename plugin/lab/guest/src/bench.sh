#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
#
# First process of a guest that a benchmark boots, by rdinit=: the usual one runs
# as ever, and beside it ftbench. Tools that are no part of the initramfs are on
# the disk, where their libraries are looked for.

/bin/busybox mkdir -p /lib64 /tmp
/bin/busybox ln -s /data/tools/lib/ld-linux-x86-64.so.2 /lib64/ld-linux-x86-64.so.2
/bin/busybox ln -s busybox /bin/sh
export LD_LIBRARY_PATH=/data/tools/lib PATH=/bin:/sbin:/data/tools/bin
/bin/ftbench serve &
exec /init
