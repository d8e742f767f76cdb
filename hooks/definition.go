// SPDX-License-Identifier: Apache-2.0

package hooks

import (
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
