// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"strings"
	"testing"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/agent/client"
)

// A wrong annotation is told of in the list and with the domain.
func TestStatusTellsOfTheAnnotation(t *testing.T) {
	t.Parallel()
	wrong := client.Status{
		Domain: "web", Host: "hosta", Role: plugin.RoleNone, State: "unprotected", Reason: "not-enabled", Mode: "none",
		AnnotationError: `invalid ftvirt annotation: pear="hostb": unknown attribute`,
	}
	f := serve(t, map[string]any{"GET /v1/status": []client.Status{wrong}, "GET /v1/status/web": wrong})
	if r := run(t, "", "status", "--socket", f.socket); r.code != exitOK || !strings.Contains(r.out, annotationWrong) {
		t.Errorf("got %+v", r)
	}
	r := run(t, "", "status", "web", "--socket", f.socket)
	for _, want := range []string{wrong.AnnotationError, "virsh edit"} {
		if r.code != exitOK || !strings.Contains(r.out, want) {
			t.Errorf("%q is not in %+v", want, r)
		}
	}
}

// So is a definition that is not yet what it should be.
func TestStatusTellsOfTheDefinition(t *testing.T) {
	t.Parallel()
	s := client.Status{
		Domain: "web", Host: "hostb", Role: plugin.RolePrimary, State: "live", Reason: "primary-lost", Mode: "live",
		Definition: "libvirt did not answer in time", DefinitionAge: 12,
	}
	f := serve(t, map[string]any{"GET /v1/status": []client.Status{s}, "GET /v1/status/web": s})
	if r := run(t, "", "status", "--socket", f.socket); r.code != exitOK || !strings.Contains(r.out, definitionPending) {
		t.Errorf("got %+v", r)
	}
	if r := run(t, "", "status", "web", "--socket", f.socket); r.code != exitOK || !strings.Contains(r.out, s.Definition+"; for 12 s") {
		t.Errorf("got %+v", r)
	}
}
