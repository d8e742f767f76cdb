// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"ftvirt.org/ftvirt/plugin"
	"libvirt.org/go/libvirtxml"
)

const (
	// Namespace is that of the annotation.
	Namespace = "urn:ftvirt:domain:1"
	// prefix is what we write; any other works as well.
	prefix = "ft"
	// maxValue bounds an attribute's value.
	maxValue = 64
)

// Mode is the state that the operator wants for a domain.
type Mode string

const (
	// ModeProtected asks for a backup at all times.
	ModeProtected Mode = "protected"
	// ModeSuspended keeps the other settings, but asks for no backup for now.
	ModeSuspended Mode = "suspended"
)

// Annotation is the pair element in a domain's metadata:
//
//	<ft:pair xmlns:ft="urn:ftvirt:domain:1" mode="protected" peer="hostb"/>
//
// A copy that BackupXML made carries role="backup" and its epoch as well.
type Annotation struct {
	Mode Mode
	// Peer is the host to run the backup on, or, in a backup, the primary's
	// host. It may be empty, which Check reports.
	Peer string
	// Role is RoleBackup or RoleNone.
	Role plugin.Role
	// Epoch is set with RoleBackup only.
	Epoch plugin.Epoch
}

// Backup tells whether the domain is a copy that replays another's log.
func (a Annotation) Backup() bool { return a.Role == plugin.RoleBackup }

// AnnotationError tells what of an annotation is not understood. It is
// ErrAnnotation.
type AnnotationError struct {
	// Attribute is empty if it is not about one.
	Attribute string
	Value     string
	Reason    string
}

func (e *AnnotationError) Error() string {
	if e.Attribute == "" {
		return ErrAnnotation.Error() + ": " + e.Reason
	}
	return fmt.Sprintf("%s: %s=%q: %s", ErrAnnotation, e.Attribute, e.Value, e.Reason)
}

// Is makes errors.Is find ErrAnnotation.
func (e *AnnotationError) Is(target error) bool { return target == ErrAnnotation }

var hostName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

// ReadAnnotation finds a domain's annotation. A domain without one gives false;
// one that is not fully understood gives an *AnnotationError, since protecting
// less than was asked for would go unnoticed.
func ReadAnnotation(dom *libvirtxml.Domain) (Annotation, bool, error) {
	found, err := metadataElements(dom, Namespace)
	if err != nil || len(found) == 0 {
		return Annotation{}, false, err
	}
	if len(found) > 1 {
		return Annotation{}, true, &AnnotationError{Reason: "there is more than one element of namespace " + Namespace}
	}
	a, err := parseAnnotation(found[0])
	return a, true, err
}

func parseAnnotation(e element) (Annotation, error) {
	if e.name.Local != "pair" {
		return Annotation{}, &AnnotationError{Reason: fmt.Sprintf("unknown element %.64q; the only one is pair", e.name.Local)}
	}
	if len(e.children) > 0 {
		return Annotation{}, &AnnotationError{Reason: fmt.Sprintf("unknown element %.64q inside pair", e.children[0])}
	}
	if e.text != "" {
		return Annotation{}, &AnnotationError{Reason: "pair has text; it takes attributes only"}
	}
	a := Annotation{Role: plugin.RoleNone}
	seen := map[string]bool{}
	for _, at := range e.attrs {
		if at.Name.Space == "xmlns" || at.Name.Space == "" && at.Name.Local == "xmlns" {
			continue
		}
		name, value := at.Name.Local, at.Value
		if at.Name.Space != "" && at.Name.Space != Namespace {
			name = at.Name.Space + ":" + name
		}
		bad := func(reason string) error {
			if len(value) > maxValue {
				value = value[:maxValue]
			}
			return &AnnotationError{Attribute: name, Value: value, Reason: reason}
		}
		if seen[name] {
			return Annotation{}, bad("it is given twice")
		}
		seen[name] = true
		if len(value) > maxValue {
			return Annotation{}, bad(fmt.Sprintf("longer than %d bytes", maxValue))
		}
		switch name {
		case "mode":
			a.Mode = Mode(value)
			if a.Mode != ModeProtected && a.Mode != ModeSuspended {
				return Annotation{}, bad(`unknown value; use "protected" or "suspended"`)
			}
		case "peer":
			a.Peer = value
			if !hostName.MatchString(value) {
				return Annotation{}, bad("not a host name")
			}
		case "role":
			a.Role = plugin.Role(value)
			if a.Role != plugin.RoleBackup {
				return Annotation{}, bad(`unknown value; the only one is "backup"`)
			}
		case "epoch":
			n, err := strconv.ParseUint(value, 10, 64)
			if err != nil || n == 0 {
				return Annotation{}, bad("not a positive number")
			}
			a.Epoch = plugin.Epoch(n)
		default:
			return Annotation{}, bad("unknown attribute; known are mode, peer, role and epoch")
		}
	}
	switch {
	case a.Mode == "":
		return Annotation{}, &AnnotationError{Attribute: "mode", Reason: `it is missing; write mode="protected"`}
	case a.Backup() != (a.Epoch != 0):
		return Annotation{}, &AnnotationError{Attribute: "epoch", Reason: `role="backup" and an epoch come together or not at all`}
	}
	return a, nil
}

// String gives the element as WriteAnnotation writes it.
func (a Annotation) String() string {
	var b strings.Builder
	b.WriteString("<" + prefix + ":pair" + attr("xmlns:"+prefix, Namespace) + attr("mode", string(a.Mode)))
	if a.Peer != "" {
		b.WriteString(attr("peer", a.Peer))
	}
	if a.Backup() {
		b.WriteString(attr("role", string(a.Role)) + attr("epoch", strconv.FormatUint(uint64(a.Epoch), 10)))
	}
	b.WriteString("/>")
	return b.String()
}

// WriteAnnotation sets or replaces the annotation, in place.
func WriteAnnotation(dom *libvirtxml.Domain, a Annotation) error {
	if a.Role == "" {
		a.Role = plugin.RoleNone
	}
	if err := a.validate(); err != nil {
		return err
	}
	return setMetadata(dom, Namespace, a.String())
}

// validate refuses what ReadAnnotation would not take back.
func (a Annotation) validate() error {
	probe := &libvirtxml.Domain{Metadata: &libvirtxml.DomainMetadata{XML: a.String()}}
	back, _, err := ReadAnnotation(probe)
	if err != nil {
		return err
	}
	if back != a {
		return &AnnotationError{Reason: fmt.Sprintf("%+v cannot be written", a)}
	}
	return nil
}

// RemoveAnnotation takes the annotation away, in place.
func RemoveAnnotation(dom *libvirtxml.Domain) error { return setMetadata(dom, Namespace, "") }
