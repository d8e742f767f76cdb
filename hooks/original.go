// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"fmt"
	"io"
	"reflect"
	"slices"

	"libvirt.org/go/libvirtxml"
)

const (
	// originalNamespace is not that of the annotation: libvirt keeps one
	// element for each namespace, and virsh metadata --set replaces it.
	originalNamespace = "urn:ftvirt:original:1"
	// maxOriginal bounds what a noted definition may unpack to.
	maxOriginal = 4 << 20
)

// encodeOriginal notes the operator's definition, less the metadata, and less
// the displays' passwords: libvirt shows metadata to all, passwords to some only.
func encodeOriginal(dom *libvirtxml.Domain) (string, error) {
	noted := *dom
	noted.Metadata = nil
	list := *devices(dom) // there is always one in what is made ready
	list.Graphics = withoutPasswords(list.Graphics)
	noted.Devices = &list
	text, err := noted.Marshal()
	if err != nil {
		return "", fmt.Errorf("note domain %s: %w", dom.Name, err)
	}
	var buf bytes.Buffer
	z := gzip.NewWriter(&buf) // without a time in its header: the same domain gives the same text
	if _, err := io.WriteString(z, text); err != nil {
		return "", fmt.Errorf("note domain %s: %w", dom.Name, err)
	}
	if err := z.Close(); err != nil {
		return "", fmt.Errorf("note domain %s: %w", dom.Name, err)
	}
	return "<fto:original" + attr("xmlns:fto", originalNamespace) + attr("encoding", "gzip+base64") + ">" +
		base64.StdEncoding.EncodeToString(buf.Bytes()) + "</fto:original>", nil
}

// withoutPasswords copies displays. Of kinds that no protected domain has,
// nothing is copied.
func withoutPasswords(list []libvirtxml.DomainGraphic) []libvirtxml.DomainGraphic {
	var out []libvirtxml.DomainGraphic
	for _, g := range list {
		bare := libvirtxml.DomainGraphic{Audio: g.Audio}
		if g.VNC != nil {
			v := *g.VNC
			v.Passwd, v.PasswdValidTo = "", ""
			bare.VNC = &v
		}
		if g.Spice != nil {
			s := *g.Spice
			s.Passwd, s.PasswdValidTo = "", ""
			bare.Spice = &s
		}
		if bare.VNC != nil || bare.Spice != nil {
			out = append(out, bare)
		}
	}
	return out
}

// readOriginal gives nil if nothing is noted.
func readOriginal(dom *libvirtxml.Domain) (*libvirtxml.Domain, error) {
	found, err := metadataElements(dom, originalNamespace)
	if err != nil || len(found) == 0 {
		return nil, err
	}
	packed, err := base64.StdEncoding.DecodeString(found[0].text)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrOriginal, err)
	}
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrOriginal, err)
	}
	text, err := io.ReadAll(io.LimitReader(z, maxOriginal+1))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrOriginal, err)
	}
	if len(text) > maxOriginal {
		return nil, fmt.Errorf("%w: larger than %d bytes", ErrOriginal, maxOriginal)
	}
	original, err := Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrOriginal, err)
	}
	return original, nil
}

// Plain gives back the operator's domain from a transformed one: exactly what
// Transform was given if nobody changed it since, and otherwise with all that
// was changed since. The annotation stays; the argument is not changed. A
// domain that was never transformed comes back as it is.
//
// If the operator deleted what Transform noted, settings of ours are removed
// and libvirt's defaults take their place.
func Plain(dom *libvirtxml.Domain) (*libvirtxml.Domain, error) {
	out, err := clone(dom)
	if err != nil {
		return nil, err
	}
	original, err := readOriginal(dom)
	if err != nil {
		return nil, err
	}
	if had := removeArguments(out); !had && original == nil {
		return out, nil
	}
	if err := setMetadata(out, originalNamespace, ""); err != nil {
		return nil, err
	}
	if original == nil {
		original = new(libvirtxml.Domain)
	}
	if original.CPU == nil && isDefaultCPU(out.CPU) {
		out.CPU = nil
	}
	plainTimers(out, original)
	putBack(out, original)
	dev, was := devices(out), devices(original)
	for i := range dev.Disks {
		plainDisk(&dev.Disks[i], was.Disks)
	}
	for i := range dev.Interfaces {
		plainNIC(&dev.Interfaces[i], i, was.Interfaces)
	}
	return out, nil
}

// revert gives a field its former value, unless somebody else changed it.
func revert(field *string, set, was string) {
	if *field == set {
		*field = was
	}
}

func plainTimers(out, original *libvirtxml.Domain) {
	if out.Clock == nil {
		return
	}
	for _, t := range []struct {
		name, set string
		field     func(*libvirtxml.DomainTimer) *string
	}{
		{"rtc", "guest", func(t *libvirtxml.DomainTimer) *string { return &t.Track }},
		{"hpet", "no", func(t *libvirtxml.DomainTimer) *string { return &t.Present }},
	} {
		now := timer(out, t.name)
		if now == nil {
			continue
		}
		was := timer(original, t.name)
		former := ""
		if was != nil {
			former = *t.field(was)
		}
		revert(t.field(now), t.set, former)
		if was == nil && reflect.DeepEqual(*now, libvirtxml.DomainTimer{Name: t.name}) {
			out.Clock.Timer = slices.DeleteFunc(out.Clock.Timer, func(x libvirtxml.DomainTimer) bool { return x.Name == t.name })
		}
	}
	if len(out.Clock.Timer) == 0 {
		out.Clock.Timer = nil
	}
	if original.Clock == nil && reflect.DeepEqual(*out.Clock, libvirtxml.DomainClock{Offset: "utc"}) {
		out.Clock = nil
	}
}

func plainDisk(d *libvirtxml.DomainDisk, was []libvirtxml.DomainDisk) {
	if d.Driver == nil || diskBus(d) != "virtio" {
		return
	}
	var former libvirtxml.DomainDiskDriver
	had := false
	for i := range was {
		if target(&was[i]) != target(d) {
			continue
		}
		if was[i].Driver != nil {
			former, had = *was[i].Driver, true
		}
		if was[i].Target != nil {
			revert(&d.Target.Bus, diskBus(&was[i]), was[i].Target.Bus)
		}
	}
	revert(&d.Driver.EventIDX, off, former.EventIDX)
	revert(&d.Driver.IOEventFD, off, former.IOEventFD)
	if !had && reflect.DeepEqual(*d.Driver, libvirtxml.DomainDiskDriver{}) {
		d.Driver = nil
	}
}

func plainNIC(n *libvirtxml.DomainInterface, at int, was []libvirtxml.DomainInterface) {
	if n.Driver == nil || n.Model == nil || n.Model.Type != "virtio" {
		return
	}
	var former libvirtxml.DomainInterfaceDriver
	old := formerNIC(n, at, was)
	had := old != nil && old.Driver != nil
	if had {
		former = *old.Driver
	}
	revert(&n.Driver.Name, qemuBackend, former.Name)
	revert(&n.Driver.EventIDX, off, former.EventIDX)
	revert(&n.Driver.IOEventFD, off, former.IOEventFD)
	if !had && reflect.DeepEqual(*n.Driver, libvirtxml.DomainInterfaceDriver{}) {
		n.Driver = nil
	}
}

// formerNIC finds what a network card, which is the one at that place now, was.
// libvirt gives a MAC to those that had none, so then the place counts.
func formerNIC(n *libvirtxml.DomainInterface, at int, was []libvirtxml.DomainInterface) *libvirtxml.DomainInterface {
	mac := func(n *libvirtxml.DomainInterface) string {
		if n.MAC == nil {
			return ""
		}
		return n.MAC.Address
	}
	if at < len(was) && (mac(&was[at]) == "" || mac(&was[at]) == mac(n)) {
		return &was[at]
	}
	for i := range was {
		if mac(&was[i]) != "" && mac(&was[i]) == mac(n) {
			return &was[i]
		}
	}
	return nil
}
