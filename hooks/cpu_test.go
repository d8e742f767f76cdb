// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"slices"
	"testing"

	"libvirt.org/go/libvirtxml"
)

func withoutRep(d *libvirtxml.Domain) bool {
	return slices.ContainsFunc(d.QEMUCommandline.Args, func(a libvirtxml.DomainQEMUCommandlineArg) bool { return a.Value == noRep })
}

// TestCPU: a guest whose CPU was left open gets the one on which Linux avoids
// string instructions; its backup gets the CPU that it runs with, however
// libvirt describes that, and so does its definition after a failover.
func TestCPU(t *testing.T) {
	t.Parallel()
	feature := []libvirtxml.DomainCPUFeature{{Policy: "require", Name: "hypervisor"}}
	expanded := defaultCPU()
	expanded.Check, expanded.Features = "full", feature
	named := func(model string) *libvirtxml.DomainCPU {
		cpu := defaultCPU()
		cpu.Model.Value = model
		return cpu
	}
	for name, c := range map[string]struct {
		written, live *libvirtxml.DomainCPU
		want          bool
	}{
		"none":           {nil, expanded, true},
		"libvirt's own":  {defaultCPU(), defaultCPU(), true},
		"with a feature": {expanded, expanded, false},
		"another model":  {named("Opteron_G3"), named("Opteron_G3"), false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			in := read(t, "q35-diskless.in.xml")
			in.CPU = c.written
			out, err := Transform(in, options)
			if err != nil {
				t.Fatal(err)
			}
			if withoutRep(out) != c.want {
				t.Errorf("without rep: %v, want %v", !c.want, c.want)
			}
			out.CPU = c.live
			again, err := Transform(out, options)
			if err != nil || withoutRep(again) != c.want {
				t.Errorf("brought up to date: %v, %v", withoutRep(again), err)
			}
			backup, err := BackupXML(out, BackupOptions{Options: options, Epoch: 1, Primary: "hosta"})
			if err != nil || withoutRep(backup) != c.want {
				t.Errorf("backup: %v, %v", withoutRep(backup), err)
			}
			defined, err := Definition(out, Annotation{Mode: ModeProtected, Peer: "hosta"}, options)
			if err != nil || withoutRep(defined) != c.want {
				t.Errorf("definition: %v, %v", withoutRep(defined), err)
			}
			plain, err := Plain(out)
			if err != nil || plain.QEMUCommandline != nil {
				t.Errorf("plain: arguments are left, %v", err)
			}
			// One that runs since before this was done: its backup is as it is.
			out.QEMUCommandline.Args = slices.DeleteFunc(out.QEMUCommandline.Args, func(a libvirtxml.DomainQEMUCommandlineArg) bool { return a.Value == noRep })
			if c.want {
				args := out.QEMUCommandline.Args
				last := slices.IndexFunc(args, func(a libvirtxml.DomainQEMUCommandlineArg) bool { return a.Value == noVAPIC })
				out.QEMUCommandline.Args = slices.Delete(args, last+1, last+2) // its -global
			}
			out.CPU = defaultCPU()
			backup, err = BackupXML(out, BackupOptions{Options: options, Epoch: 1, Primary: "hosta"})
			if err != nil || withoutRep(backup) {
				t.Errorf("backup of one that runs with the CPU as named: %v, %v", withoutRep(backup), err)
			}
		})
	}
}
