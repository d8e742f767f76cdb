// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"reflect"
	"slices"
	"strconv"
	"strings"

	"libvirt.org/go/libvirtxml"
)

// What virt-install and virt-manager give every domain, and a guest can do
// without, is taken out of a protected one rather than refused: nearly no
// definition would pass otherwise. It is noted, shown by 'ftvirt check' and
// 'ftvirt xml --diff', and comes back with the plain definition.

// noUSB is the model by which libvirt leaves the USB controller out that it
// adds to a domain without one.
const noUSB = "none"

// emptyDrive tells a CD-ROM drive without a medium, as installations leave it.
func emptyDrive(d *libvirtxml.DomainDisk) bool {
	return diskDevice(d) == "cdrom" && (d.Source == nil || reflect.DeepEqual(*d.Source, libvirtxml.DomainDiskSource{}) ||
		d.Source.File != nil && d.Source.File.File == "" && d.Source.File.FDGroup == "")
}

// looseInput tells a pointer or keyboard beside those of the PS/2 ports.
func looseInput(in *libvirtxml.DomainInput) bool {
	return in.Bus == "usb" || in.Bus == "virtio" && in.Type != "passthrough"
}

// looseChannel tells the channels of agents that guests run if they find one.
func looseChannel(c *libvirtxml.DomainChannel) bool {
	if s := c.Source; s != nil && (s.SpiceVMC != nil || s.QEMUVDAgent != nil) {
		return true
	}
	return c.Target != nil && c.Target.VirtIO != nil &&
		(strings.HasPrefix(c.Target.VirtIO.Name, "org.qemu.guest_agent.") || c.Target.VirtIO.Name == "com.redhat.spice.0")
}

// looseController tells a controller to which nothing is attached once the rest
// is taken out. What keeps one in use is refused by a rule of its own.
func looseController(c *libvirtxml.DomainController) bool {
	switch c.Type {
	case "usb":
		return c.Model != noUSB
	case "virtio-serial", "scsi":
		return true
	}
	return false
}

func looseRedirDev(r *libvirtxml.DomainRedirDev) bool {
	return r.Source != nil && r.Source.SpiceVMC != nil
}

func isNoUSB(c *libvirtxml.DomainController) bool { return c.Type == "usb" && c.Model == noUSB }

// audible tells an audio backend that needs more than QEMU itself.
func audible(a *libvirtxml.DomainAudio) bool { return a.None == nil }

// otherVideo tells the models that are replaced by VGA, which every guest knows.
func otherVideo(v *libvirtxml.DomainVideo) bool {
	return slices.Contains([]string{"qxl", "virtio", "cirrus", "bochs"}, v.Model.Type)
}

// takeOut removes what guests can do without, in place.
func takeOut(dom *libvirtxml.Domain) {
	dev := devices(dom)
	dev.Disks = without(dev.Disks, emptyDrive)
	dev.Inputs = without(dev.Inputs, looseInput)
	dev.Channels = without(dev.Channels, looseChannel)
	dev.Controllers = without(dev.Controllers, looseController)
	dev.RedirDevs = without(dev.RedirDevs, looseRedirDev)
	dev.RedirFilters, dev.Hubs, dev.Sounds, dev.RNGs = nil, nil, nil, nil
	if !slices.ContainsFunc(dev.Controllers, func(c libvirtxml.DomainController) bool { return isNoUSB(&c) }) {
		dev.Controllers = append(dev.Controllers, libvirtxml.DomainController{Type: "usb", Index: new(uint), Model: noUSB})
	}
	for i := range dev.Audios {
		if a := &dev.Audios[i]; audible(a) {
			*a = libvirtxml.DomainAudio{ID: a.ID, None: new(libvirtxml.DomainAudioNone)}
		}
	}
	for i := range dev.Videos {
		if v := &dev.Videos[i]; otherVideo(v) {
			v.Model = libvirtxml.DomainVideoModel{Type: "vga", VRam: 16384, Heads: 1, Primary: v.Model.Primary}
			v.Driver = nil
		}
	}
	for i := range dev.Graphics {
		if g := &dev.Graphics[i]; g.Spice != nil {
			*g = libvirtxml.DomainGraphic{VNC: showByVNC(g.Spice), Audio: g.Audio}
		}
	}
	dev.MemBalloon = &libvirtxml.DomainMemBalloon{Model: "none"}
}

// firstVNC is the lowest port that libvirt takes for VNC.
const firstVNC = 5900

// showByVNC gives the display that is reached as the SPICE display was.
func showByVNC(s *libvirtxml.DomainGraphicSpice) *libvirtxml.DomainGraphicVNC {
	v := &libvirtxml.DomainGraphicVNC{
		Port: s.Port, AutoPort: s.AutoPort, Listen: s.Listen, Keymap: s.Keymap, Passwd: s.Passwd, PasswdValidTo: s.PasswdValidTo,
		Connected: s.Connected, Listeners: slices.Clone(s.Listeners),
	}
	if v.Port >= 0 && v.Port < firstVNC {
		v.Port, v.AutoPort = -1, "yes"
	}
	return v
}

// maxVNCPassword is the protocol's own limit.
const maxVNCPassword = 8

// replaceable tells whether VNC shows and guards as much.
func replaceable(s *libvirtxml.DomainGraphicSpice) bool {
	secure := s.DefaultMode == "secure" || s.TLSPort > 0 ||
		slices.ContainsFunc(s.Channel, func(c libvirtxml.DomainGraphicSpiceChannel) bool { return c.Mode == "secure" })
	return !secure && (s.GL == nil || s.GL.Enable != "yes") && len(s.Passwd) <= maxVNCPassword
}

// putBack undoes takeOut on a domain, in place, given what was noted. It leaves
// what was added since, and wins over no address that was given away since.
func putBack(dom, original *libvirtxml.Domain) {
	dev, was := devices(dom), devices(original)
	used := addresses(reflect.ValueOf(dev))
	none := func(c libvirtxml.DomainController) bool { return isNoUSB(&c) }
	if !slices.ContainsFunc(was.Controllers, none) {
		dev.Controllers = slices.DeleteFunc(dev.Controllers, none)
	}
	dev.Disks = with(dev.Disks, was.Disks, emptyDrive, used)
	dev.Inputs = with(dev.Inputs, was.Inputs, looseInput, used)
	dev.Channels = with(dev.Channels, was.Channels, looseChannel, used)
	dev.Controllers = with(dev.Controllers, was.Controllers, looseController, used)
	dev.RedirDevs = with(dev.RedirDevs, was.RedirDevs, looseRedirDev, used)
	dev.RedirFilters = with(dev.RedirFilters, was.RedirFilters, all, used)
	dev.Hubs = with(dev.Hubs, was.Hubs, all, used)
	dev.Sounds = with(dev.Sounds, was.Sounds, all, used)
	dev.RNGs = with(dev.RNGs, was.RNGs, all, used)
	for i := range dev.Audios {
		for _, a := range was.Audios {
			if now := &dev.Audios[i]; now.ID == a.ID && !audible(now) {
				*now = a
			}
		}
	}
	for i := range dev.Videos {
		if i < len(was.Videos) && otherVideo(&was.Videos[i]) && dev.Videos[i].Model.Type == "vga" {
			dev.Videos[i].Model, dev.Videos[i].Driver = was.Videos[i].Model, was.Videos[i].Driver
		}
	}
	for i := range dev.Graphics {
		if v := dev.Graphics[i].VNC; v != nil && i < len(was.Graphics) && was.Graphics[i].Spice != nil {
			s := *was.Graphics[i].Spice
			// Not noted, or the operator's to change.
			s.Passwd, s.PasswdValidTo, s.Listen, s.Listeners = v.Passwd, v.PasswdValidTo, v.Listen, v.Listeners
			dev.Graphics[i] = libvirtxml.DomainGraphic{Spice: &s, Audio: dev.Graphics[i].Audio}
		}
	}
	if dev.MemBalloon != nil && dev.MemBalloon.Model == "none" {
		dev.MemBalloon = was.MemBalloon
		if was.MemBalloon != nil {
			balloon := *was.MemBalloon
			balloon.Address = free(balloon.Address, used)
			dev.MemBalloon = &balloon
		}
	}
}

func all[T any](*T) bool { return true }

// without gives the list less those that gone tells, and nil if none is left.
func without[T any](list []T, gone func(*T) bool) []T {
	var rest []T
	for i := range list {
		if !gone(&list[i]) {
			rest = append(rest, list[i])
		}
	}
	return rest
}

// with puts those of was that are gone back into now, where they were. One whose
// address another device has by now gets a new one from libvirt.
func with[T any](now, was []T, gone func(*T) bool, used map[string]bool) []T {
	for i := range was {
		if !gone(&was[i]) {
			continue
		}
		back := was[i]
		if f := reflect.ValueOf(&back).Elem().FieldByName("Address"); f.IsValid() {
			if a, ok := f.Interface().(*libvirtxml.DomainAddress); ok {
				f.Set(reflect.ValueOf(free(a, used)))
			}
		}
		now = slices.Insert(now, min(i, len(now)), back)
	}
	return now
}

func free(a *libvirtxml.DomainAddress, used map[string]bool) *libvirtxml.DomainAddress {
	if a != nil && a.PCI != nil && used[slot(a.PCI)] {
		return nil
	}
	return a
}

// addresses collects the PCI addresses of all devices.
func addresses(v reflect.Value) map[string]bool {
	used := map[string]bool{}
	walk(v, func(x any) {
		if a, ok := x.(*libvirtxml.DomainAddressPCI); ok {
			used[slot(a)] = true
		}
	})
	return used
}

// slot is a PCI address as text.
func slot(a *libvirtxml.DomainAddressPCI) string {
	var text []string
	for _, p := range []*uint{a.Domain, a.Bus, a.Slot, a.Function} {
		n := uint64(0)
		if p != nil {
			n = uint64(*p)
		}
		text = append(text, strconv.FormatUint(n, 16))
	}
	return strings.Join(text, ":")
}

// walk calls f with a pointer to each structure below v.
func walk(v reflect.Value, f func(any)) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			walk(v.Elem(), f)
		}
	case reflect.Slice:
		for i := range v.Len() {
			walk(v.Index(i), f)
		}
	case reflect.Struct:
		if v.CanAddr() {
			f(v.Addr().Interface())
		}
		for i := range v.NumField() {
			if v.Field(i).CanInterface() {
				walk(v.Field(i), f)
			}
		}
	}
}
