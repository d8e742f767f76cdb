# SPDX-License-Identifier: Apache-2.0
#
# Makes the root of a bare host: a Debian with an SSH server, to which the packages
# that apt will be asked for have been downloaded, since the hosts have no way out
# of their network.
#
#   sh -eu base.sh SUITE MIRROR ROOT PACKAGE...

suite=$1 mirror=$2 root=$3
shift 3

rm -rf --one-file-system "$root"
set -- "$@"
mmdebstrap --quiet --mode=root --variant=minbase --skip=cleanup/apt/lists \
	--include=ca-certificates,curl,dbus,iproute2,iputils-ping,man-db,openssh-server,procps,systemd,systemd-sysv \
	--dpkgopt='path-include=/usr/share/man/*' --dpkgopt='path-include=/usr/share/doc/*' \
	"$suite" "$root" "deb $mirror $suite main"
mkdir "$root/packages"
cp "$@" "$root/packages"
unshare --mount --pid --fork --kill-child chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 \
	DEBIAN_FRONTEND=noninteractive sh -euc '
		mount -t proc proc /proc
		apt-get -qq -o Acquire::Retries=3 --download-only -y install /packages/*.deb >/dev/null'
rm -r "$root/packages"

# There is nothing to keep should the machine lose its power.
echo force-unsafe-io >"$root/etc/dpkg/dpkg.cfg.d/unsafe-io"
# Of somebody who says yes to apt.
echo 'APT::Get::Assume-Yes "true";' >"$root/etc/apt/apt.conf.d/90yes"
rm -f "$root/etc/hostname" "$root/etc/machine-id" "$root/etc/resolv.conf"
: >"$root/etc/machine-id"
cat >"$root/etc/hosts" <<-HOSTS
	127.0.0.1 localhost
	192.0.2.1 hosta
	192.0.2.2 hostb
	192.0.2.3 hostc
HOSTS
# Root of each host gets to each other one.
install -d -m 0700 "$root/root/.ssh"
ssh-keygen -q -t ed25519 -N '' -C root -f "$root/root/.ssh/id_ed25519"
cp "$root/root/.ssh/id_ed25519.pub" "$root/root/.ssh/authorized_keys"
printf 'Host *\n\tStrictHostKeyChecking accept-new\n\tLogLevel ERROR\n' >"$root/root/.ssh/config"
