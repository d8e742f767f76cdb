// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"fmt"
	"strings"

	"libvirt.org/go/libvirtxml"
)

// RestoreFilter is for the hook's restore operation: it makes the XML of a saved
// domain ready for protection. It gives nil if nothing is to be changed, which
// is so for every domain without an annotation.
//
// A saved guest must find the hardware and the clock that it was saved with, so a
// domain that was not transformed when it was started gives ErrGuestABI.
func RestoreFilter(xml []byte, o Options) ([]byte, error) { return filter(xml, o) }

// MigrateFilter is the same for the hook's migrate operation, on the host that
// a domain comes to. A backup does not migrate: its host makes another.
func MigrateFilter(xml []byte, o Options) ([]byte, error) { return filter(xml, o) }

func filter(xml []byte, o Options) ([]byte, error) {
	dom, err := Parse(xml)
	if err != nil {
		return nil, err
	}
	a, ok, err := ReadAnnotation(dom)
	if err != nil || !ok {
		return nil, err
	}
	if a.Backup() {
		return nil, fmt.Errorf("domain %s is the backup of epoch %d: %w: it can be neither saved nor migrated", dom.Name, a.Epoch, ErrNotReady)
	}
	// The time of a saved guest is a number of instructions of that length.
	shift, uncounted := shiftOf(dom)
	if uncounted == nil {
		o.ICountShift = shift
	}
	out, err := Transform(dom, o)
	if err != nil {
		return nil, err
	}
	if changed := guestChanges(dom, out); changed != "" {
		return nil, fmt.Errorf("domain %s: %w: %s; power it off and start it again to protect it", dom.Name, ErrGuestABI, changed)
	}
	// QEMU takes such a state without a complaint, and begins its clock at 0.
	if uncounted != nil {
		return nil, fmt.Errorf("domain %s: %w: its clock would begin anew: %w; power it off and start it again to protect it",
			dom.Name, ErrGuestABI, uncounted)
	}
	before, err := dom.Marshal()
	if err != nil {
		return nil, fmt.Errorf("domain %s: %w", dom.Name, err)
	}
	after, err := out.Marshal()
	if err != nil {
		return nil, fmt.Errorf("domain %s: %w", dom.Name, err)
	}
	if before == after {
		return nil, nil
	}
	return []byte(after), nil
}

// guestChanges names the first thing that the guest would see changed.
func guestChanges(before, after *libvirtxml.Domain) string {
	if found := matching(before, changesGuest); len(found) > 0 {
		return "Transform would take out or replace " + strings.TrimSpace(found[0].Code+" "+found[0].Path)
	}
	// Without event_idx a virtio device offers the guest another feature.
	b, a := devices(before), devices(after)
	for i := range a.Disks {
		if b.Disks[i].Driver == nil || b.Disks[i].Driver.EventIDX != a.Disks[i].Driver.EventIDX {
			return "disk " + target(&a.Disks[i]) + " has event_idx"
		}
	}
	for i := range a.Interfaces {
		if b.Interfaces[i].Driver == nil || b.Interfaces[i].Driver.EventIDX != a.Interfaces[i].Driver.EventIDX {
			return nicPath(&a.Interfaces[i], i) + " has event_idx"
		}
	}
	return ""
}
