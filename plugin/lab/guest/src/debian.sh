# SPDX-License-Identifier: Apache-2.0
#
# What mmdebstrap runs when the packages of the lab's Debian guest are unpacked:
#
#   sh -eu debian.sh ROOT PUBLIC-KEY CONTENT
#
# PUBLIC-KEY may log in as root, CONTENT is a file that nginx hands out as /data.
# The rest is what an administrator would do to a small server, and what makes it
# start quickly on an emulated CPU.

root=$1 key=$2 content=$3
in_root() { chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 sh -euc "$1"; }

echo debian >"$root/etc/hostname"
echo '127.0.0.1 localhost debian' >"$root/etc/hosts"
echo '/dev/vda / ext4 noatime 0 1' >"$root/etc/fstab"

# The address is on the kernel's command line.
in_root 'systemctl --quiet enable systemd-network-generator systemd-networkd'

mkdir -p -m 0700 "$root/root/.ssh"
cp "$key" "$root/root/.ssh/authorized_keys"

# A second without work is a second of lag that is worked off: nothing runs by a
# timer, nobody looks for devices that are not there.
in_root 'systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
	e2scrub_all.timer e2scrub_reap.service fstrim.timer systemd-networkd-wait-online.service \
	systemd-pstore.service getty@tty1.service systemd-udev-settle.service'

# The drivers of the root disk, and no others, are in the initramfs.
echo 'MODULES=list' >"$root/etc/initramfs-tools/conf.d/lab"
printf '%s\n' virtio_pci virtio_blk ext4 crc32c_generic >>"$root/etc/initramfs-tools/modules"
in_root 'update-initramfs -u -k all'

cp "$content" "$root/var/www/html/data"
chmod 0644 "$root/var/www/html/data"

version=$(ls "$root/etc/postgresql")
conf=$root/etc/postgresql/$version/main
cat >"$conf/conf.d/lab.conf" <<-CONF
	listen_addresses = '*'
	shared_buffers = 64MB
	# Its library is left out of the image.
	jit = off
CONF
echo 'host all all samenet trust' >>"$conf/pg_hba.conf"
# mmdebstrap mounts no /dev/shm.
cat >"$conf/conf.d/shm.conf" <<-CONF
	dynamic_shared_memory_type = mmap
CONF
in_root "
	pg_ctlcluster $version main start >/dev/null
	su postgres -c 'pgbench --quiet --initialize --scale 1 2>/dev/null
		psql --quiet -v ON_ERROR_STOP=1 -c \"CREATE EXTENSION amcheck\" \
			-c \"CREATE TABLE ledger (id bigint PRIMARY KEY, note text NOT NULL)\"'
	pg_ctlcluster $version main stop
"
rm "$conf/conf.d/shm.conf"
