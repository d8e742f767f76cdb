#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# test.sh BIN GUEST: protects a guest of an ordinary user's own libvirt,
# qemu:///session, kills its primary, and waits for the next backup. The two hosts
# are two libvirtd and two agents of that user, in two home directories. BIN has
# ftvirt and ftvirt.so, GUEST the lab's guest. It is run as root, only to become
# nobody, in a network and among processes of its own.
set -eu

fail() {
	echo "session: $*" >&2
	exit 1
}

if [ -z "${FTVIRT_SESSION:-}" ]; then
	[ "$(id -u)" = 0 ] || fail "needs root"
	dir=$(mktemp -d /tmp/ftses.XXXXXX) # a socket's path has at most 107 bytes
	trap 'rm -rf "$dir"' EXIT INT TERM
	cp "$1/ftvirt" "$1/ftvirt.so" "$0" "$dir"
	cp --sparse=always "$2/vmlinuz" "$2/initrd.gz" "$2/disk.raw" "$dir"
	chown -R nobody: "$dir"
	unshare --net --pid --mount-proc --fork --kill-child sh -euc 'ip link set lo up; cd "$1"
		FTVIRT_SESSION=1 exec setpriv --reuid=nobody --regid=nogroup --clear-groups --no-new-privs sh "$1/test.sh"' sh "$dir"
	exit
fi

dir=$PWD
on() { # on HOST COMMAND...
	home=$dir/$1
	shift
	HOME=$home XDG_RUNTIME_DIR=$home/run FTVIRT_CONFIG=$home/ftvirt.toml \
		PATH=$dir:/usr/bin:/usr/sbin:/bin:/sbin timeout -k 5 "${limit:-60}" "$@"
}
virsh_on() {
	host=$1
	shift
	on "$host" virsh -q -c qemu:///session "$@"
}

mkdir arbiter
for n in 1 2; do
	mkdir -p "$n/run" "$n/images"
	chmod 0700 "$n/run"
	cat >"$n/ftvirt.toml" <<TOML
host = "host$n"
libvirt_uri = "qemu:///session"
[agent]
admin_socket = "$dir/$n/run/admin.sock"
plugin_socket = "$dir/$n/run/plugin.sock"
plugin_file = "$dir/ftvirt.so"
run_dir = "$dir/$n/run"
state_dir = "$dir/$n/state"
[clone]
disk_dir = "$dir/$n/images"
[arbiter]
path = "$dir/arbiter"
[channel]
plaintext = true
listen = "127.0.0.$n:7700"
[heartbeat]
listen = "127.0.0.$n:7701"
[peers.host1]
channel = "127.0.0.1:7700"
heartbeat = "127.0.0.1:7701"
[peers.host2]
channel = "127.0.0.2:7700"
heartbeat = "127.0.0.2:7701"
TOML
done
on 1 ftvirt arbiter init >/dev/null
for n in 1 2; do
	limit=600 on "$n" ftvirt agent >"$n/agent.log" 2>&1 &
done

# wait_for HOST WHAT: until the host's status has all the lines of WHAT.
wait_for() {
	left=90
	while :; do
		status=$(on "$1" ftvirt status guest 2>&1) || :
		short=$(printf '%s\n' "$status" | tr -s ' ' | grep -E '^(Role|Primary|Backup|State|Epoch):') || :
		[ "$short" != "$2" ] || return 0
		left=$((left - 1))
		[ "$left" -gt 0 ] || fail "host$1 is not as wanted: $status
$(tail -n 20 1/agent.log 2/agent.log)"
		sleep 1
	done
}
couple() { printf 'Role: primary\nPrimary: host%s\nBackup: host%s\nState: protected\nEpoch: %s' "$1" "$2" "$3"; }

left=30
until on 1 ftvirt status >/dev/null 2>&1 && on 2 ftvirt status >/dev/null 2>&1; do
	left=$((left - 1))
	[ "$left" -gt 0 ] || fail "the agents do not answer: $(cat 1/agent.log 2/agent.log)"
	sleep 1
done
qemu-img convert -q -O qcow2 disk.raw 1/images/guest.qcow2
cat >guest.xml <<XML
<domain type='qemu'>
  <name>guest</name>
  <memory unit='MiB'>256</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>$dir/vmlinuz</kernel>
    <initrd>$dir/initrd.gz</initrd>
    <cmdline>console=ttyS0 quiet ftguest.lines=10 ip=10.0.2.15/24</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='$dir/1/images/guest.qcow2'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <controller type='usb' model='none'/>
    <interface type='user'><model type='virtio'/></interface>
    <serial type='pty'/>
    <console type='pty'/>
  </devices>
</domain>
XML
virsh_on 1 define guest.xml
on 1 ftvirt enable guest --peer host2
virsh_on 1 start guest
wait_for 1 "$(couple 1 2 1)"
echo "session: protected, as $(id -un)"
kill -KILL "$(cat 1/run/libvirt/qemu/run/guest.pid)"
wait_for 2 "$(couple 2 1 2)"
[ "$(virsh_on 2 domstate guest)" = running ] || fail "the survivor does not run: $(virsh_on 2 list --all)"
# Off in order: both copies end.
virsh_on 2 destroy guest
echo "session: failed over, and protected again"
