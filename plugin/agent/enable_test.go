// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"path/filepath"
	"testing"

	"libvirt.org/go/libvirtxml"
)

func TestUnknownQEMU(t *testing.T) {
	for version, known := range map[string]bool{
		"7.2.11": false, "9.0.4": false, "9.1.0": true, "10.0.2": true, "10.2.0": true, "11.0.0": false, "": false, "next": false,
	} {
		problems := unknownQEMU(version)
		if (len(problems) == 0) != known {
			t.Errorf("QEMU %q: %v", version, problems)
		}
		for _, p := range problems {
			if p.Reason == "" || p.Remedy == "" {
				t.Errorf("QEMU %q: a problem without reason or remedy: %v", version, p)
			}
		}
	}
}

func TestMissingDisks(t *testing.T) {
	there := t.TempDir()
	file := func(target, path string) libvirtxml.DomainDisk {
		return libvirtxml.DomainDisk{
			Target: &libvirtxml.DomainDiskTarget{Dev: target},
			Source: &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: path}},
		}
	}
	dom := &libvirtxml.Domain{Devices: &libvirtxml.DomainDeviceList{Disks: []libvirtxml.DomainDisk{
		file("vda", there), file("vdb", filepath.Join(there, "none.qcow2")), {Target: &libvirtxml.DomainDiskTarget{Dev: "sda"}},
	}}}
	problems := missingDisks(dom)
	if len(problems) != 1 || problems[0].Path != "disk vdb" {
		t.Errorf("problems %v, want one, of vdb", problems)
	}
}
