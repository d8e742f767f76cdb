// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

// A domain that is stopped on purpose stops on both hosts, whoever stops it, and
// starts again only where its newest disks are.
func TestDeliberateEnd(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm, traffic := protected(t, b, hosta, hostb)
	traffic.Close()

	_, err := hosta.Virsh(t.Context(), "destroy", vm.Name)
	must(t, err)
	ended(t, b, vm, hosta, hostb)
	must(t, vm.Boot(t.Context(), hosta))

	must(t, protect(t, vm, hosta, hostb))
	must(t, scenario.Pause(t.Context(), 2*time.Second))
	_, err = vm.KillQEMU(t.Context(), hosta)
	must(t, err)
	_, err = b.WaitState(t.Context(), hostb, vm.Name, "live", 15*time.Second)
	must(t, err)
	must(t, b.WaitGone(t.Context(), hosta, vm.Name))
	refused(t, vm, hosta)

	// The guest powers itself off on its new host, protected by the old one,
	// whose definition names an image of before the failover.
	must(t, protect(t, vm, hostb, hosta))
	must(t, scenario.Pause(t.Context(), 2*time.Second))
	must(t, vm.Guest.PowerOff(t.Context()))
	ended(t, b, vm, hostb, hosta)
	refused(t, vm, hosta)
	must(t, vm.Boot(t.Context(), hostb))
}

// ended waits until neither host runs the domain, and demands that none thinks
// of it as a failover.
func ended(t *testing.T, b *scenario.Bed, vm *scenario.VM, primary, backup *lab.Host) {
	t.Helper()
	must(t, b.WaitGone(t.Context(), primary, vm.Name))
	must(t, b.WaitGone(t.Context(), backup, vm.Name))
	_, err := b.WaitState(t.Context(), primary, vm.Name, "unprotected", 15*time.Second)
	must(t, err)
	// Long enough for a backup that took the end for a failure.
	must(t, scenario.Pause(t.Context(), 2*time.Second))
	must(t, b.WaitGone(t.Context(), backup, vm.Name))
	s, err := b.Agent(backup).StatusOf(t.Context(), vm.Name)
	if err == nil && (s.State == "live" || s.State == "going-live") {
		t.Errorf("the backup's host says %s", s)
	}
}

func refused(t *testing.T, vm *scenario.VM, h *lab.Host) {
	t.Helper()
	out, err := h.Virsh(t.Context(), "start", vm.Name)
	if err == nil {
		t.Errorf("%s started a stale copy: %s", h.Name, out)
		return
	}
	if text := out + err.Error(); !strings.Contains(text, "stale") {
		t.Errorf("%s refused with %q, which does not tell why", h.Name, text)
	}
}
