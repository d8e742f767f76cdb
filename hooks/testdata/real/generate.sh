#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# hooks/testdata/real/generate.sh [NAME...]
#
# Makes the definitions in this directory again, as virt-install writes them and
# libvirt completes them; those that no tool here can write, kvm.xml and
# uefi-nvram.xml, are kept by hand. It needs Debian's packages virtinst,
# osinfo-db, qemu-utils and libvirt-clients, no libvirtd and no root: both tools
# use a private driver. Afterwards: go test ./hooks -run TestReal -update
set -eu
cd "$(dirname "$0")"
root=$(mktemp -d /tmp/ftvirt-real.XXXXXX)
trap 'rm -rf "$root"' EXIT INT TERM
mkdir -p "$root/etc"
uri="qemu:///embed?root=$root"
images=$root/images
mkdir "$images"
touch "$root/debian.iso"
number=0

# install NAME ARGUMENT... writes NAME.xml: the definition of after the
# installation, which is virt-install's last step.
install() {
	name=$1
	shift
	number=$((number + 1))
	[ -z "$wanted" ] || case " $wanted " in *" $name "*) ;; *) return 0 ;; esac
	printf '%s\n' "$name" >&2
	# virt-install leaves the event loop that this driver needs to virt-manager.
	/usr/bin/python3 -c 'import libvirt, runpy, sys
libvirt.virEventRegisterDefaultImpl()
sys.argv[0] = "virt-install"
runpy.run_path("/usr/bin/virt-install", run_name="__main__")' \
		--connect "$uri" --virt-type qemu --name "$name" --vcpus 1 --check all=off --print-xml --dry-run \
		--uuid "$(printf '3e0a1c52-8d0f-4b8e-9a55-0000000000%02d' "$number")" "$@" >"$root/out.xml"
	# The last of the documents that it printed.
	awk '/^<domain /{text = ""} {text = text $0 "\n"} END {printf "%s", text}' "$root/out.xml" >"$root/$name.xml"
	# libvirt refuses what the QEMU here was built without, such as SPICE: then
	# it is what virt-install hands over.
	if virsh -q -c "$uri" "define $root/$name.xml; dumpxml --inactive $name" >"$root/all" 2>"$root/refused"; then
		awk '/^<domain /{on = 1} on {print} /^<\/domain>/{on = 0}' "$root/all" >"$root/$name.xml"
	else
		cat "$root/refused" >&2
	fi
	# An alias of a machine type is libvirt's to resolve, too.
	sed -e "s,$images,/var/lib/libvirt/images," -e "s,machine=\"q35\",machine=\"pc-q35-10.0\"," "$root/$name.xml" >"$name.xml"
	[ -s "$name.xml" ]
}

# image NAME FORMAT GIB makes an image, since virt-install looks at it.
image() {
	qemu-img create -q -f "$2" "$images/$1" "$3G"
	printf 'source.file=%s,driver.name=qemu,driver.type=%s' "$images/$1" "$2"
}

wanted=$*
mac() { printf '52:54:00:6b:3d:%02x' "$1"; }

install debian-server --memory 2048 --osinfo debian11 --import --graphics none \
	--disk "$(image debian.qcow2 qcow2 10)" --network "bridge=br0,mac=$(mac 1)"
install debian-vnc --memory 2048 --osinfo debian11 --cdrom "$root/debian.iso" --graphics vnc,listen=127.0.0.1 \
	--disk "$(image vnc.img raw 10)" --disk device=cdrom,bus=sata --network "network=default,mac=$(mac 2)"
install desktop-spice --memory 4096 --osinfo ubuntu22.04 --import --graphics spice --sound ich9 --video virtio \
	--redirdev usb,type=spicevmc --redirdev usb,type=spicevmc \
	--disk "$(image desktop.qcow2 qcow2 20)" --network "network=default,mac=$(mac 3)"
install centos-i440fx --memory 1024 --osinfo centos7.0 --machine pc --import --graphics vnc \
	--disk "$(image centos.qcow2 qcow2 10)" --network "bridge=br0,mac=$(mac 4)"
install database --memory 2048 --osinfo debian11 --import --graphics none --watchdog i6300esb,action=reset \
	--disk "$(image db.qcow2 qcow2 10),cache=none,discard=unmap" \
	--disk "$(image data.img raw 40),cache=none" --disk "$(image static.img raw 1),readonly=on" \
	--network "bridge=br0,mac=$(mac 5)" --network "bridge=br1,mac=$(mac 6)"
install router --memory 512 --osinfo debian11 --import --graphics none --rng /dev/urandom --memballoon none \
	--disk "$(image router.qcow2 qcow2 2)" --network "user,mac=$(mac 7)" \
	--network "type=ethernet,target.dev=tap-lan,mac=$(mac 8)"
install windows --memory 4096 --osinfo win10 --cdrom "$root/debian.iso" --graphics vnc \
	--disk "$(image windows.qcow2 qcow2 40)" --network "network=default,mac=$(mac 9)"
install windows-virtio --memory 4096 --osinfo win2k19 --import --graphics vnc --controller type=usb,model=none --input none \
	--disk "$(image winsrv.qcow2 qcow2 40),bus=virtio" --network "network=default,model=virtio,mac=$(mac 10)"
install generic --memory 1024 --osinfo generic --import --graphics vnc \
	--disk "$(image generic.qcow2 qcow2 10)" --network "network=default,mac=$(mac 11)"
install scsi-tpm --memory 2048 --osinfo debian11 --import --graphics none --tpm emulator --vsock cid.auto=yes --panic isa \
	--controller type=scsi,model=virtio-scsi --disk "$(image scsi.qcow2 qcow2 10),bus=scsi" \
	--network "type=direct,source=eth0,mac=$(mac 12)"
install shared --memory 2048 --osinfo debian11 --import --graphics none --memorybacking source.type=memfd,access.mode=shared \
	--filesystem type=mount,source=/srv/share,target=share,driver.type=virtiofs --shmem name=ring,model.type=ivshmem-plain,size=4,size.unit=M \
	--iommu model=intel --disk "$(image shared.qcow2 qcow2 10)" --network "bridge=br0,mac=$(mac 13)"
