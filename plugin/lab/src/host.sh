# SPDX-License-Identifier: Apache-2.0
#
# Process 1 of a lab's host. Every mount below is the host's own, and goes with
# it; the machine's mounts are not touched.
#
#   sh -eu host.sh NAME ARBITER BIN IMAGES [cgroup]
#
# The working directory is the host's directory in the lab's state, with etc,
# run, var, srv and tmp in it. BIN may be empty.
# IMAGES is what all hosts have as srv/images, or empty if each has its own. It
# runs in new net, pid, mount, uts and ipc namespaces.

name=$1 arbiter=$2 bin=$3 images=$4 cgroup=${5:-}

if [ -z "${FTVIRT_LAB_STARTED:-}" ]; then
	# See node.sh. The starter has put this process into the host's control
	# groups by then, so that the new cgroup namespace has them as its root.
	read -r go && [ "$go" = go ]
	export FTVIRT_LAB_STARTED=1
	if [ "$cgroup" = cgroup ]; then
		exec unshare --cgroup sh -eu "$0" "$@"
	fi
fi
unset FTVIRT_LAB_STARTED

# The kernel's own view of this host: its processes, its network, its groups.
cgroup_mounts=$(awk '$3 ~ /^cgroup2?$/ && $2 ~ "^/sys/fs/cgroup" { print $2, $3, $4 }' /proc/self/mounts)
mount --make-rprivate /
mount -t proc proc /proc
mount -t sysfs sysfs /sys
if [ "$cgroup" = cgroup ]; then
	case $cgroup_mounts in
	'/sys/fs/cgroup cgroup2 '*) ;;
	*) mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup ;;
	esac
	printf '%s\n' "$cgroup_mounts" | while read -r dir type options; do
		mkdir -p "$dir"
		if [ "$type" = cgroup2 ]; then
			mount -t cgroup2 cgroup2 "$dir"
			continue
		fi
		# Of the mount's options only the controllers' names select a hierarchy.
		controllers=$(printf '%s\n' "$options" | tr , '\n' |
			grep -Evx 'rw|ro|nosuid|nodev|noexec|relatime|noatime|xattr|clone_children|release_agent=.*' | paste -sd, -)
		mount -t cgroup -o "$controllers" cgroup "$dir"
	done
fi

# Shared directories first: what follows may cover where they come from.
mkdir -p srv/ftvirt-arbiter srv/ftvirt
mount --bind "$arbiter" srv/ftvirt-arbiter
[ -z "$bin" ] || mount --bind -o ro "$bin" srv/ftvirt
[ -z "$images" ] || mount --bind "$images" srv/images
mount --rbind srv /srv
for dir in etc run var tmp; do
	mount --bind "$dir" "/$dir"
done

# Devices of its own, and no KVM among them: libvirt asks QEMU whether KVM works
# and /dev/kvm whether QEMU's user may open it. On a machine where the two
# disagree it probes QEMU anew, for a second, whenever it looks at a domain.
mkdir -p dev
mount -t tmpfs -o mode=755,nosuid tmpfs dev
mkdir dev/net dev/pts dev/shm
for device in null zero full random urandom tty net/tun; do
	[ ! -e "/dev/$device" ] || cp -a "/dev/$device" "dev/$device"
done
ln -s /proc/self/fd dev/fd
for stream in 0:stdin 1:stdout 2:stderr; do
	ln -s "/proc/self/fd/${stream%:*}" "dev/${stream#*:}"
done
mount -t devpts -o newinstance,mode=0620,gid=5,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs dev/shm
! mountpoint -q /dev || umount -l -R /dev # libvirt moves what is mounted below: no doubles
mount --move dev /dev

hostname "$name"
for scope in all default; do
	conf=/proc/sys/net/ipv6/conf/$scope/disable_ipv6
	[ ! -w "$conf" ] || echo 1 >"$conf"
done
cd /

echo ready
exec >/dev/null 2>&1 </dev/null
# As process 1 it also collects the processes that daemons leave behind.
while :; do
	sleep 2147483647 &
	wait || :
done
