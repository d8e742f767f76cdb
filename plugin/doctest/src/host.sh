# SPDX-License-Identifier: Apache-2.0
#
# Makes a host whose process 1 is systemd out of new mount, pid, net, uts, ipc and
# cgroup namespaces:
#
#   sh -eu host.sh NAME ROOT SHARED
#
# ROOT is its root, SHARED the directory that all hosts have at
# /mnt/ftvirt-arbiter. It waits for a line on its input, by when it has its network.

name=$1 root=$2 shared=$3

mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
# The kernel's settings are the machine's, but for those of the network, and so is
# its magic key.
mount --bind "$root/proc/sys/net" "$root/mnt"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount --move "$root/mnt" "$root/proc/sys/net"
[ ! -e "$root/proc/sysrq-trigger" ] || mount --bind /dev/null "$root/proc/sysrq-trigger"
mount -t tmpfs -o mode=755,nosuid tmpfs "$root/dev"
mkdir "$root/dev/net" "$root/dev/pts" "$root/dev/shm"
for device in null zero full random urandom tty net/tun; do
	cp -a "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
for stream in 0:stdin 1:stdout 2:stderr; do
	ln -s "/proc/self/fd/${stream%:*}" "$root/dev/${stream#*:}"
done
mount -t devpts -o newinstance,mode=0620,gid=5,ptmxmode=0666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs "$root/run"
mkdir -p "$root/mnt/ftvirt-arbiter"
mount --bind "$shared" "$root/mnt/ftvirt-arbiter"
hostname "$name"
mkdir -p "$root/old"
cd "$root"
pivot_root . old
umount -l /old
rmdir /old

read -r go && [ "$go" = go ]
# The clock and the modules are the machine's, too.
exec env -i container=ftvirt-doctest PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
	setpriv --bounding-set=-sys_module,-sys_time,-syslog /sbin/init >/dev/null 2>&1 </dev/null
