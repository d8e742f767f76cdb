#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
#
# /init of the lab's guest: mounts, modules, address, then ftguest until it
# asks for power-off. Parameters come from the kernel command line:
#   ip=ADDRESS/PREFIX[,GATEWAY]   ftguest.lines=RATE   ftguest.load=RATE

/bin/busybox mkdir -p /proc /sys /dev /data /usr/bin /sbin
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
export PATH=/bin:/sbin
exec </dev/console >/dev/console 2>&1

while read -r module; do
	/bin/busybox insmod "/lib/modules/$module" || echo "ftguest-init: module $module failed"
done </lib/modules/order

address='' gateway='' lines='' load=''
for word in $(/bin/busybox cat /proc/cmdline); do
	case $word in
	ip=*) address=${word#ip=} ;;
	ftguest.lines=*) lines=${word#*=} ;;
	ftguest.load=*) load=${word#*=} ;;
	esac
done
case $address in
*,*) gateway=${address#*,} address=${address%%,*} ;;
esac

/bin/busybox ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
	# No router solicitations, no duplicate address detection: only traffic
	# that a test asked for.
	[ -e /proc/sys/net/ipv6/conf/eth0/disable_ipv6 ] && echo 1 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6
	/bin/busybox ip link set eth0 up
	[ -n "$address" ] && /bin/busybox ip addr add "$address" dev eth0
	[ -n "$gateway" ] && /bin/busybox ip route add default via "$gateway"
fi

if [ -e /dev/vda ]; then
	/bin/busybox mount -t ext4 -o noatime /dev/vda /data || echo "ftguest-init: /dev/vda does not mount"
fi

# A line of its own per record on the console: no "\r\n" surprises, no echo.
/bin/busybox stty -F /dev/console raw -echo 2>/dev/null

/bin/ftguest "${lines:-0}" "${load:-0}"

/bin/busybox sync
/bin/busybox umount /data 2>/dev/null
/bin/busybox poweroff -f
