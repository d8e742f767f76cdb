// SPDX-License-Identifier: Apache-2.0

// Package hooks turns ordinary libvirt domains into fault-tolerant ones and
// back. Its functions are pure: XML in, XML out, no I/O and no libvirt
// connection, so that a libvirt hook, which must not call libvirt, can use them.
//
// What an operator writes is an annotation, the pair element of namespace
// urn:ftvirt:domain:1 in a domain's metadata. Check tells what keeps a domain
// from being protected, Transform makes it ready, BackupXML makes the copy that
// replays on the other host, and Plain gives the operator's domain back.
package hooks

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"libvirt.org/go/libvirtxml"
)

var (
	// ErrAnnotation is wrapped by an AnnotationError.
	ErrAnnotation = errors.New("invalid ftvirt annotation")
	// ErrMetadata: the domain's metadata is not well-formed XML, or larger
	// than any that is meant.
	ErrMetadata = errors.New("invalid domain metadata")
	// ErrOriginal: what Transform noted of the operator's definition cannot
	// be read.
	ErrOriginal = errors.New("the noted original definition is damaged")
	// ErrNotReady is wrapped by a NotReadyError.
	ErrNotReady = errors.New("domain cannot be protected")
	// ErrNotTransformed: the domain was not made by Transform, or was started
	// before it was.
	ErrNotTransformed = errors.New("domain was not started with record/replay")
	// ErrGuestABI: a saved or migrating guest would find other hardware.
	ErrGuestABI = errors.New("the guest's hardware would change")
	// ErrOptions: an option cannot be used.
	ErrOptions = errors.New("invalid option")
)

// NotReadyError carries all that Check found.
type NotReadyError struct {
	Domain   string
	Problems []Problem
}

func (e *NotReadyError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "domain %s cannot be protected:", e.Domain)
	for i, p := range e.Problems {
		if i > 0 {
			b.WriteByte(';')
		}
		b.WriteByte(' ')
		b.WriteString(p.String())
	}
	return b.String()
}

// Is makes errors.Is find ErrNotReady.
func (e *NotReadyError) Is(target error) bool { return target == ErrNotReady }

const (
	// DefaultICountShift makes one guest instruction last 4 ns, about what it
	// takes.
	DefaultICountShift = 2
	// maxShift is QEMU's own limit.
	maxShift = 10
)

// Options says what a transformed domain's QEMU loads.
type Options struct {
	// PluginFile is the path of ftvirt.so.
	PluginFile string
	// PluginSocket is where the plugin reaches this host's agent.
	PluginSocket string
	// ICountShift makes one guest instruction last 2^ICountShift ns. Zero is
	// a valid shift; DefaultICountShift is the usual one.
	ICountShift int

	cpu cpuChoice
}

func (o Options) validate() error {
	for _, p := range []struct{ name, path string }{{"plugin file", o.PluginFile}, {"plugin socket", o.PluginSocket}} {
		// QEMU splits the argument at commas; there is no way to quote one.
		if !filepath.IsAbs(p.path) || strings.Contains(p.path, ",") {
			return fmt.Errorf("%w: %s %q is not an absolute path without commas", ErrOptions, p.name, p.path)
		}
	}
	if o.ICountShift < 0 || o.ICountShift > maxShift {
		return fmt.Errorf("%w: icount shift %d is not within 0 to %d", ErrOptions, o.ICountShift, maxShift)
	}
	return nil
}

// Parse reads a domain as libvirt writes it.
func Parse(xml []byte) (*libvirtxml.Domain, error) {
	dom := new(libvirtxml.Domain)
	if err := dom.Unmarshal(string(xml)); err != nil {
		return nil, fmt.Errorf("parse domain XML: %w", err)
	}
	if dom.Devices != nil {
		for i := range dom.Devices.Disks {
			if target(&dom.Devices.Disks[i]) == "" {
				// libvirt writes it always; disks are told apart by it.
				return nil, fmt.Errorf("parse domain XML: disk %d has no target", i)
			}
		}
	}
	return dom, nil
}

// clone copies a domain deeply.
func clone(dom *libvirtxml.Domain) (*libvirtxml.Domain, error) {
	text, err := dom.Marshal()
	if err != nil {
		return nil, fmt.Errorf("copy domain %s: %w", dom.Name, err)
	}
	return Parse([]byte(text))
}

// devices gives the device list, which XML of a domain may lack.
func devices(dom *libvirtxml.Domain) *libvirtxml.DomainDeviceList {
	if dom.Devices == nil {
		dom.Devices = new(libvirtxml.DomainDeviceList)
	}
	return dom.Devices
}
