// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"fmt"
	"path/filepath"
	"reflect"
	"strings"

	"ftvirt.org/ftvirt/plugin"
	"libvirt.org/go/libvirtxml"
)

// Replica is where the backup's host has its copy of a disk.
type Replica struct {
	File string
	// Format is raw or qcow2; empty means that of the primary.
	Format string
	// Backing says that the replica is an overlay on the same backing images,
	// at the same paths. Otherwise it stands alone.
	Backing bool
}

// BackupOptions says how the copy for the other host differs.
type BackupOptions struct {
	// Options are those of the backup's host. ICountShift is not used: both
	// sides must count alike, so it is taken from the running domain.
	Options
	// Epoch is the one that the arbiter opened for the pair.
	Epoch plugin.Epoch
	// Primary is the host that the domain runs on.
	Primary string
	// Replicas are by target device. A disk without one keeps its path, as
	// for images that both hosts share read-only.
	Replicas map[string]Replica
}

// BackupXML makes, from the XML of a running transformed domain, the transient
// domain that replays on another host: the same guest, without what libvirt
// only tells about this run, waiting for the memory of the primary. The
// argument is not changed. Create it paused.
//
// The live XML must come with VIR_DOMAIN_XML_SECURE if a display has a password.
func BackupXML(live *libvirtxml.Domain, o BackupOptions) (*libvirtxml.Domain, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	if !transformed(live) {
		return nil, fmt.Errorf("domain %s: %w; enable it, power it off and start it again", live.Name, ErrNotTransformed)
	}
	shift, err := shiftOf(live)
	if err != nil {
		return nil, fmt.Errorf("domain %s: %w", live.Name, err)
	}
	o.ICountShift, o.cpu = shift, cpuOf(live)
	if found := append(matching(live, func(r Rule) bool { return r.Code == "hotplug" }), attached(live)...); len(found) > 0 {
		return nil, &NotReadyError{Domain: live.Name, Problems: found}
	}

	dom, err := Plain(live)
	if err != nil {
		return nil, err
	}
	stripRuntime(dom)
	if err := o.replaceDisks(dom); err != nil {
		return nil, err
	}
	a := Annotation{Mode: ModeProtected, Peer: o.Primary, Role: plugin.RoleBackup, Epoch: o.Epoch}
	if err := WriteAnnotation(dom, a); err != nil {
		return nil, err
	}
	return apply(dom, o.Options, true)
}

func (o BackupOptions) validate() error {
	if err := o.Options.validate(); err != nil {
		return err
	}
	if o.Epoch == 0 {
		return fmt.Errorf("%w: a backup needs an epoch", ErrOptions)
	}
	if !hostName.MatchString(o.Primary) {
		return fmt.Errorf("%w: %q is not a host name for the primary", ErrOptions, o.Primary)
	}
	for dev, r := range o.Replicas {
		if !filepath.IsAbs(r.File) {
			return fmt.Errorf("%w: replica %q of disk %s is not an absolute path", ErrOptions, r.File, dev)
		}
	}
	return nil
}

func (o BackupOptions) replaceDisks(dom *libvirtxml.Domain) error {
	used := 0
	for i := range devices(dom).Disks {
		d := &dom.Devices.Disks[i]
		r, ok := o.Replicas[target(d)]
		if !ok {
			continue
		}
		used++
		d.Source = &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: r.File}}
		if r.Format != "" {
			if d.Driver == nil {
				d.Driver = &libvirtxml.DomainDiskDriver{Name: "qemu"}
			}
			d.Driver.Type = r.Format
		}
		if !r.Backing {
			d.BackingStore = nil
			if imageFormat(d) != "raw" {
				// An empty element ends the chain, so that libvirt
				// does not look for one in the image.
				d.BackingStore = new(libvirtxml.DomainDiskBackingStore)
			}
		}
	}
	if used != len(o.Replicas) {
		return fmt.Errorf("%w: %d replicas are given, of which the domain has %d as disks", ErrOptions, len(o.Replicas), used)
	}
	return nil
}

// stripRuntime takes out what libvirt adds to the XML of a running domain and
// what another host must choose for itself. Addresses, MACs and the machine
// type stay: they are the guest's hardware.
func stripRuntime(dom *libvirtxml.Domain) {
	dom.ID = nil
	if dom.Resource != nil && dom.Resource.Partition == "/machine" {
		dom.Resource.Partition = ""
		if dom.Resource.FibreChannel == nil {
			dom.Resource = nil
		}
	}
	stripLabels(dom)
	stripGenerated(reflect.ValueOf(dom))

	dev := devices(dom)
	for i := range dev.Interfaces {
		n := &dev.Interfaces[i]
		if n.Target != nil && generatedTap(n.Target.Dev) {
			n.Target = nil
		}
		if n.Source != nil && n.Source.Network != nil {
			// Where the network ended on this host is not where it ends there.
			n.Source.Network.PortID, n.Source.Network.Bridge = "", ""
		}
		n.Backend = stripBackend(n.Backend)
	}
	for i := range dev.Serials {
		stripChardev(dev.Serials[i].Source)
	}
	for i := range dev.Consoles {
		dev.Consoles[i].TTY = ""
		stripChardev(dev.Consoles[i].Source)
	}
	for i := range dev.Graphics {
		if v := dev.Graphics[i].VNC; v != nil {
			stripVNC(v)
		}
	}
}

// generatedTap tells a name that libvirt gave. It does not keep one when it
// defines a domain, and two hosts may use one for different guests.
func generatedTap(name string) bool {
	return strings.HasPrefix(name, "vnet") || strings.HasPrefix(name, "macvtap")
}

func stripBackend(b *libvirtxml.DomainInterfaceBackend) *libvirtxml.DomainInterfaceBackend {
	if b != nil && b.VHost != "" {
		b.VHost = "" // a device node of this host; vhost is off anyway
		if reflect.DeepEqual(*b, libvirtxml.DomainInterfaceBackend{}) {
			return nil
		}
	}
	return b
}

func stripChardev(s *libvirtxml.DomainChardevSource) {
	if s != nil && s.Pty != nil {
		s.Pty.Path, s.Pty.SecLabel = "", nil
	}
}

func stripVNC(v *libvirtxml.DomainGraphicVNC) {
	if v.AutoPort == "yes" {
		v.Port = 0
	}
	if generatedSocket(v.Socket) {
		v.Socket = ""
	}
	for i := range v.Listeners {
		l := &v.Listeners[i]
		if l.Socket != nil && generatedSocket(l.Socket.Socket) {
			l.Socket.Socket = ""
		}
		if l.Network != nil {
			l.Network.Address = ""
		}
	}
}

// generatedSocket tells a path below the directory of one run: domain-ID-NAME.
func generatedSocket(path string) bool {
	return strings.HasPrefix(filepath.Base(filepath.Dir(path)), "domain-")
}

// stripLabels leaves the security labels that an operator wrote. A dynamic
// label is chosen anew for each run.
func stripLabels(dom *libvirtxml.Domain) {
	var keep []libvirtxml.DomainSecLabel
	for _, l := range dom.SecLabel {
		if l.Type == "dynamic" {
			if l.BaseLabel == "" && l.Relabel != "no" {
				continue
			}
			l.Label, l.ImageLabel = "", ""
		}
		keep = append(keep, l)
	}
	dom.SecLabel = keep
}

// stripGenerated walks all devices: aliases that are not the operator's own and
// block node numbers belong to one run.
func stripGenerated(v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			stripGenerated(v.Elem())
		}
	case reflect.Slice:
		for i := range v.Len() {
			stripGenerated(v.Index(i))
		}
	case reflect.Struct:
		for i := range v.NumField() {
			f := v.Field(i)
			if !f.CanSet() {
				continue
			}
			if a, ok := f.Interface().(*libvirtxml.DomainAlias); ok && a != nil && !isUserAlias(a) {
				f.SetZero()
				continue
			}
			stripGenerated(f)
		}
		switch x := v.Addr().Interface().(type) {
		case *libvirtxml.DomainDiskSource:
			x.Index = 0
		case *libvirtxml.DomainDiskBackingStore:
			x.Index = 0
		}
	}
}
