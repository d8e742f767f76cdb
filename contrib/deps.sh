#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Installs what building, testing and the lab need, on Debian 12 or 13, and with
# an argument what one target needs beside that: "lint" what looks at the C
# sources, "bench" what benchmarks run, "web" a browser, "orchestration" Ansible,
# "packages" what makes a Debian to install them in, "real" what makes a Debian
# guest and talks to it. It does nothing, quickly and without root, when all of it
# is there.
set -eu

# What ftvirt drives. Debian 12 has these in bookworm-backports in a version
# that works: its own QEMU 7.2 has known bugs in record and replay.
virt='qemu-system-x86 qemu-utils libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients'
# For the build and the lab.
base='busybox-static ca-certificates e2fsprogs gcc git hostname iproute2 libc6-dev make mawk procps util-linux xz-utils'
# The arbiter's storage, for its tests: servers of NFS and iSCSI, and what an
# initiator needs beside the kernel. The tests run them by themselves, so the
# services that come with the packages stay off.
storage='nfs-ganesha nfs-ganesha-vfs open-iscsi rpcbind tgt'
# What reads manual pages and completions, for their tests.
docs='fish man-db mandoc zsh'
case ${1:-} in
lint) base="$base clang cppcheck" ;;
bench) base="$base fio iperf3" ;;
web) base="$base chromium fonts-dejavu-core" ;;
packages) base="$base debian-archive-keyring mmdebstrap openssh-client" ;;
orchestration) base="$base ansible-core ansible-lint libxml2-utils" ;;
real) base="$base libpq5 mmdebstrap openssh-client" ;;
esac
oldest_qemu=1:9.1

fail() {
	echo "deps: $*" >&2
	exit 1
}

# missing prints those of the packages that are not installed.
missing() {
	for package; do
		[ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
	done
}

virt_ok() {
	# shellcheck disable=SC2086 # lists of words
	[ -z "$(missing $virt)" ] &&
		dpkg --compare-versions "$(dpkg-query -W -f '${Version}' qemu-system-x86)" ge "$oldest_qemu"
}

# The guest's kernel is downloaded, not installed; apt must know of it.
apt_ok() { apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1; }

go_ok() { command -v go >/dev/null; }

# shellcheck disable=SC2086
if virt_ok && [ -z "$(missing $base $docs $storage)" ] && apt_ok && go_ok; then
	exit 0
fi

[ -r /etc/os-release ] || fail "not Debian; install by hand: $virt (QEMU 9.1 or newer), $base, $storage, Go"
# shellcheck disable=SC1091
. /etc/os-release
case ${ID:-}-${VERSION_ID:-} in
debian-12 | debian-13) ;;
*) fail "this is ${PRETTY_NAME:-an unknown system}, not Debian 12 or 13; install by hand: $virt (QEMU 9.1 or newer), $base, $storage, Go" ;;
esac
[ "$(dpkg --print-architecture)" = amd64 ] || fail "ftvirt runs on amd64 only"
[ "$(id -u)" = 0 ] || fail "packages are missing and installing them needs root: sudo make deps"

target=
if [ "$VERSION_ID" = 12 ]; then
	target=bookworm-backports
	if ! grep -rqsE '^[^#]*bookworm-backports' /etc/apt/sources.list /etc/apt/sources.list.d; then
		cat >/etc/apt/sources.list.d/ftvirt-backports.sources <<-SOURCES
			# QEMU and libvirt for ftvirt
			Types: deb
			URIs: http://deb.debian.org/debian
			Suites: bookworm-backports
			Components: main
			Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
		SOURCES
	fi
fi

export DEBIAN_FRONTEND=noninteractive
apt_get() { apt-get -q -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 "$@"; }

# install_silently installs packages without starting their services, now or at
# the next boot. A machine's own policy-rc.d is left to decide.
install_silently() {
	policy=/usr/sbin/policy-rc.d
	if [ ! -e "$policy" ]; then
		# Whatever ends this script must not leave the policy behind.
		trap 'rm -f "$policy"' EXIT
		trap 'exit 1' HUP INT TERM
		printf '#!/bin/sh\nexit 101\n' >"$policy"
		chmod 0755 "$policy"
	else
		policy=
	fi
	apt_get install -y --no-install-recommends "$@"
	if command -v systemctl >/dev/null; then
		dpkg -L "$@" | sed -n 's|^.*/systemd/system/\([^/@]*\.\(service\|socket\)\)$|\1|p' | while read -r unit; do
			systemctl --quiet disable "$unit"
		done
	fi
	[ -z "$policy" ] || rm -f "$policy"
}

apt_get update
# What is installed already is left as it is: naming it would upgrade it.
# shellcheck disable=SC2046,SC2086
apt_get install -y --no-install-recommends $(missing $base $docs)
if ! virt_ok; then
	# shellcheck disable=SC2086
	apt_get install -y --no-install-recommends ${target:+-t "$target"} $virt
fi
# shellcheck disable=SC2046,SC2086
[ -z "$(missing $storage)" ] || install_silently $(missing $storage)
virt_ok || fail "QEMU is $(dpkg-query -W -f '${Version}' qemu-system-x86), and $oldest_qemu or newer is needed"
apt_ok || fail "apt has no linux-image-cloud-amd64; is 'main' among its sources?"
if ! go_ok; then
	# Debian's Go fetches the version that go.mod names.
	apt_get install -y --no-install-recommends ${target:+-t "$target"} golang-go
fi
