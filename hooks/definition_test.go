// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"errors"
	"strings"
	"testing"

	"libvirt.org/go/libvirtxml"
)

// What an operator edits on the primary's host is the definition of the backup's
// host as well, with the disks that are there.
func TestPeerDefinition(t *testing.T) {
	t.Parallel()
	annotation := Annotation{Mode: ModeProtected, Peer: "hosta"}
	live := read(t, "live.xml")
	replicas := map[string]Replica{"vda": {File: "/r/vda.img"}, "vdb": {File: "/r/vdb.qcow2"}}
	define := func(t *testing.T, edit func(*libvirtxml.Domain)) (*libvirtxml.Domain, error) {
		t.Helper()
		def, err := Definition(live, Annotation{Mode: ModeProtected, Peer: "hostb"}, options)
		if err != nil {
			t.Fatal(err)
		}
		edit(def)
		return PeerDefinition(def, live, annotation, options, replicas)
	}

	out, err := define(t, func(d *libvirtxml.Domain) { d.Memory.Value, d.Title = 777, "edited" })
	if err != nil {
		t.Fatal(err)
	}
	text := marshal(t, out)
	for _, want := range []string{">777<", "<title>edited", "/r/vda.img", "/r/vdb.qcow2", "shift=3,", `peer="hosta"`} {
		if !strings.Contains(text, want) {
			t.Errorf("%s is not in:\n%s", want, text)
		}
	}
	for _, gone := range []string{"/var/lib/libvirt/images/vd", "base.img", "role=", "-incoming"} {
		if strings.Contains(text, gone) {
			t.Errorf("%s is in:\n%s", gone, text)
		}
	}
	again, err := Transform(out, options)
	if err != nil || withoutRep(again) != withoutRep(out) || len(again.QEMUCommandline.Args) != len(out.QEMUCommandline.Args) {
		t.Errorf("it is not ready for protection: %v", err)
	}
	// The live description will do where no other came.
	if _, err := PeerDefinition(live, live, annotation, options, replicas); err != nil {
		t.Error(err)
	}

	// A disk may go, and what the operator made of the arguments is mended.
	out, err = define(t, func(d *libvirtxml.Domain) { d.Devices.Disks, d.QEMUCommandline = d.Devices.Disks[:1], nil })
	if err != nil || len(out.Devices.Disks) != 1 || !transformed(out) {
		t.Errorf("a disk that goes: %v", err)
	}

	for name, edit := range map[string]func(*libvirtxml.Domain){
		"another image": func(d *libvirtxml.Domain) { d.Devices.Disks[0].Source.File.File = "/other.img" },
		"a new disk": func(d *libvirtxml.Domain) {
			more := d.Devices.Disks[0]
			more.Source = &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: "/new.img"}}
			more.Target = &libvirtxml.DomainDiskTarget{Dev: "vdz", Bus: "virtio"}
			more.Address = nil
			d.Devices.Disks = append(d.Devices.Disks, more)
		},
		"a device that cannot be": func(d *libvirtxml.Domain) {
			d.Devices.Hostdevs = append(d.Devices.Hostdevs, libvirtxml.DomainHostdev{SubsysUSB: &libvirtxml.DomainHostdevSubsysUSB{}})
		},
		"many CPUs": func(d *libvirtxml.Domain) { d.VCPU = &libvirtxml.DomainVCPU{Value: 4} },
	} {
		if _, err := define(t, edit); !errors.Is(err, ErrNotReady) {
			t.Errorf("%s: %v", name, err)
		}
	}
	other := *live
	other.UUID = "11111111-2222-3333-4444-555555555555"
	if _, err := PeerDefinition(&other, live, annotation, options, replicas); !errors.Is(err, ErrOptions) {
		t.Errorf("another domain: %v", err)
	}
}
