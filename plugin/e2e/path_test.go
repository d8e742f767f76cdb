// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"strings"
	"testing"

	"ftvirt.org/ftvirt/plugin/doctor"
	"ftvirt.org/ftvirt/plugin/lab"
)

// The doctor names the MTU where small packets pass and large ones do not, and
// finds nothing once they do.
func TestDoctorNamesTheMTU(t *testing.T) {
	b, hosta, hostb := bed(t)
	for name, w := range map[string][2]lab.Weather{"there": {{Largest: 1400}, {}}, "back": {{}, {Largest: 1400}}} {
		wire, err := hosta.Disturb(t.Context(), lab.Logging, w[0], w[1])
		must(t, err)
		findings, err := b.Agent(hosta).Doctor(t.Context(), hostb.Name)
		must(t, wire.Close(context.WithoutCancel(t.Context())))
		must(t, err)
		named := false
		for _, f := range findings {
			named = named || f.Level == doctor.Problem && strings.Contains(f.Remedy, "MTU")
		}
		if !named {
			t.Errorf("%s: the doctor does not name the MTU: %+v", name, findings)
		}
	}
	findings, err := b.Agent(hosta).Doctor(t.Context(), hostb.Name)
	must(t, err)
	ok := false
	for _, f := range findings {
		ok = ok || f.Check == "path-mtu" && f.Level == doctor.OK
	}
	if !ok {
		t.Errorf("a path that is well: %+v", findings)
	}
}
