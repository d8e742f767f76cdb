#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# test.sh PACKAGES NEWER: installs the packages in directory PACKAGES in a fresh
# Debian, upgrades to those in NEWER, removes and purges them, and looks at each
# step. lintian has its say first. Needs root and a Debian mirror; nothing of the
# machine is touched.
set -eu

packages=$(realpath "$1")
newer=$(realpath "$2")
suite=${SUITE:-bookworm}
mirror=${MIRROR:-http://deb.debian.org/debian}

fail() {
	echo "test.sh: $*" >&2
	exit 1
}

[ "$(id -u)" = 0 ] || fail "needs root"
root=$(mktemp -d)
# The chroot's own mounts go with the mount namespace.
trap 'rm -rf --one-file-system "$root"' EXIT INT TERM

backports=
[ "$suite" = bookworm ] && backports=bookworm-backports
echo "== a fresh $suite in $root"
mmdebstrap --quiet --mode=root --variant=minbase --include=lintian,man-db,mandoc,bash-completion,fish,zsh,systemd \
	--dpkgopt='path-include=/usr/share/man/*' "$suite" "$root" \
	"deb $mirror $suite main" ${backports:+"deb $mirror $backports main"}
# No daemon is started there.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod +x "$root/usr/sbin/policy-rc.d"
mkdir "$root/packages" "$root/newer"
cp "$packages"/*.deb "$root/packages"
cp "$newer"/*.deb "$root/newer"

in_root() {
	unshare --mount --pid --fork --kill-child chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin \
		LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive sh -euc "mount -t proc proc /proc
mount -t devpts -o newinstance,ptmxmode=0666 devpts /dev/pts
mount --bind /dev/pts/ptmx /dev/ptmx
$1"
}
apt="apt-get -q -y --no-install-recommends ${backports:+-t $backports}"

echo "== lintian"
in_root 'useradd --create-home linter
# Whether the packager has a mailbox is not for a test to say.
su linter -c "lintian --fail-on warning --suppress-tags bogus-mail-host --tag-display-limit 0 /packages/*.deb"'

echo "== install"
in_root "apt-get -q update; $apt install /packages/*.deb"
in_root '
	ftvirt --help >/dev/null
	ftvirt config check /etc/ftvirt/ftvirt.toml
	test -x /etc/libvirt/hooks/qemu.d/ftvirt
	# A domain that nobody protects is none of the hook.
	echo "<domain type=\"qemu\"><name>plain</name></domain>" | /etc/libvirt/hooks/qemu.d/ftvirt plain prepare begin -
	ldd /usr/lib/ftvirt/ftvirt.so >/dev/null
	qemu-system-x86_64 -plugin /usr/lib/ftvirt/ftvirt.so,help=on -version | head -1
	for page in 8/ftvirt.8 5/ftvirt.toml.5 7/ftvirt-domain.7; do
		name=${page#*/}
		man "${page%%/*}" "${name%.*}" | grep -q ftvirt
		said=$(MANWIDTH=80 man --warnings -E UTF-8 -l "/usr/share/man/man$page.gz" 2>&1 >/dev/null)
		test -z "$said" || { echo "$page: $said"; exit 1; }
		zcat "/usr/share/man/man$page.gz" | mandoc -T lint -W error
	done
	bash -c ". /usr/share/bash-completion/completions/ftvirt; complete -p ftvirt" | grep -q _ftvirt
	HOME=/root fish -c "complete -C \"ftvirt sta\"" | grep -q ^status
	zsh -f -c "autoload -Uz compinit && compinit -u -D && echo \$_comps[ftvirt] && autoload +X _ftvirt" | grep -qx _ftvirt
	systemd-analyze verify /lib/systemd/system/ftvirt-agent.service /lib/systemd/system/ftvirt-handover.service /lib/systemd/system/ftvirt-witness.service
	test "$(systemctl is-enabled ftvirt-agent)" = disabled
	dpkg --verify ftvirt ftvirt-agent ftvirt-qemu-plugin
'
# What the operator wrote is the operator's.
in_root '
	sed -i "s/^# host = .*/host = \"hosta\"/" /etc/ftvirt/ftvirt.toml
	systemctl enable ftvirt-agent
	mkdir -p /var/lib/ftvirt/diagnosis
	sha256sum /etc/ftvirt/ftvirt.toml >/before
'

echo "== upgrade"
in_root "$apt install /newer/*.deb"
in_root '
	sha256sum --check --quiet /before
	test "$(systemctl is-enabled ftvirt-agent)" = enabled
	test -d /var/lib/ftvirt/diagnosis
	for p in ftvirt ftvirt-agent ftvirt-qemu-plugin; do dpkg-query -W -f "\${Version}\n" $p; done | sort -u | wc -l | grep -qx 1
	ls /etc/ftvirt /etc/libvirt/hooks/qemu.d | grep dpkg- && exit 1 || :
'

echo "== remove"
in_root "$apt remove ftvirt ftvirt-agent ftvirt-qemu-plugin"
in_root '
	test ! -e /usr/bin/ftvirt -a ! -e /usr/lib/ftvirt -a ! -e /usr/lib/ocf/resource.d/ftvirt
	test -f /etc/ftvirt/ftvirt.toml -a -d /var/lib/ftvirt
	# libvirt starts no domain whose hook fails.
	echo "<domain/>" | /etc/libvirt/hooks/qemu.d/ftvirt plain prepare begin -
'

echo "== install again, purge"
in_root "$apt install /newer/*.deb"
in_root 'sha256sum --check --quiet /before'
in_root "$apt purge ftvirt ftvirt-agent ftvirt-qemu-plugin"
left=$(find "$root" -xdev -name '*ftvirt*' -not -path "$root/packages/*" -not -path "$root/newer/*" -not -path "$root/var/log/*" \
	-not -path "$root/var/cache/*" -not -path "$root/tmp/*")
[ -z "$left" ] || fail "left behind: $left"
echo "== all is well"
