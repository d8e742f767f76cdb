// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"fmt"
	"strings"

	"libvirt.org/go/libvirtxml"
)

// Definition makes the persistent definition of a domain out of the XML of its
// running copy, be it a backup that went live: transformed, with the given
// annotation, without what belongs to this run alone.
//
// The live XML must come with VIR_DOMAIN_XML_SECURE if a display has a password.
func Definition(live *libvirtxml.Domain, a Annotation, o Options) (*libvirtxml.Domain, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	shift, err := shiftOf(live)
	if err != nil {
		return nil, err
	}
	o.ICountShift, o.cpu = shift, cpuOf(live)
	dom, err := Plain(live)
	if err != nil {
		return nil, err
	}
	stripRuntime(dom)
	if err := WriteAnnotation(dom, a); err != nil {
		return nil, err
	}
	return apply(dom, o, false)
}

// Element gives the annotation as virDomainSetMetadata and "virsh metadata
// --set" take it: libvirt adds the namespace and its prefix.
func (a Annotation) Element() string {
	text := strings.Replace(a.String(), "<"+prefix+":", "<", 1)
	return strings.Replace(text, attr("xmlns:"+prefix, Namespace), "", 1)
}

// PeerDefinition makes, of the definition that a domain has on one host, that of
// the host of its backup: the same domain, whose disks are the replicas, which
// are by target. Live is the running domain that the replicas are of. What the
// other host could not have, such as a disk that was added since the start and
// has no replica, gives a *NotReadyError.
//
// Both must come with VIR_DOMAIN_XML_SECURE if a display has a password.
func PeerDefinition(def, live *libvirtxml.Domain, a Annotation, o Options, replicas map[string]Replica) (*libvirtxml.Domain, error) {
	if def.UUID != live.UUID {
		return nil, fmt.Errorf("%w: the definition of domain %s, and %s runs", ErrOptions, def.UUID, live.UUID)
	}
	dom, err := clone(def)
	if err != nil {
		return nil, err
	}
	if shift, err := shiftOf(def); err == nil {
		o.ICountShift = shift
	}
	stripRuntime(dom)
	running := map[string]*libvirtxml.DomainDisk{}
	for i := range devices(live).Disks {
		d := &live.Devices.Disks[i]
		running[target(d)] = d
	}
	used := map[string]Replica{}
	var problems []Problem
	add := func(d *libvirtxml.DomainDisk, reason string) {
		problems = append(problems, Problem{
			Code: "disk-edited", Path: "disk " + target(d), Reason: reason, Remedy: "power the domain off and start it again",
		})
	}
	for i := range devices(dom).Disks {
		d := &dom.Devices.Disks[i]
		was := running[target(d)]
		if r, ok := replicas[target(d)]; ok {
			used[target(d)] = r
			if was == nil || imagePath(was) != imagePath(d) {
				add(d, "it names another image than that which runs and has a replica")
			}
		} else if d.ReadOnly == nil && (d.Device == "" || d.Device == "disk") && was == nil {
			add(d, "it was added since the start, and has no replica")
		}
	}
	if len(problems) > 0 {
		return nil, &NotReadyError{Domain: dom.Name, Problems: problems}
	}
	if err := (BackupOptions{Replicas: used}).replaceDisks(dom); err != nil {
		return nil, err
	}
	if err := WriteAnnotation(dom, a); err != nil {
		return nil, err
	}
	return Transform(dom, o)
}

func imagePath(d *libvirtxml.DomainDisk) string {
	if d.Source == nil || d.Source.File == nil {
		return ""
	}
	return d.Source.File.File
}
