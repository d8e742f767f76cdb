// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

// A primary whose host loses both networks, but not the arbiter's storage, lets
// its backup win: clients could not reach the domain where it is. It does so each
// time, not just when it is slower.
func TestIsolatedPrimary(t *testing.T) {
	const rounds = 6
	b, primary, backup := bed(t)
	vm, traffic := protected(t, b, primary, backup)
	networks := []lab.Network{lab.Service, lab.Logging}
	mend := func(ctx context.Context, h *lab.Host) error {
		var errs []error
		for _, n := range networks {
			errs = append(errs, h.RestoreLink(ctx, n))
		}
		return errors.Join(errs...)
	}
	for round := range rounds {
		if round > 0 {
			must(t, protect(t, vm, primary, backup))
		}
		// In turn, which of the two is noticed first.
		cut := time.Now()
		for i := range networks {
			must(t, primary.CutLink(t.Context(), networks[(i+round)%2]))
		}
		s, err := b.Wait(t.Context(), backup, vm.Name, "the decision", 15*time.Second,
			func(s client.Status) (bool, error) { return s.State == "live" || s.State == "failed", nil })
		took := time.Since(cut)
		must(t, mend(context.WithoutCancel(t.Context()), primary))
		must(t, err)
		if s.State != "live" {
			t.Fatalf("round %d: the host that clients cannot reach has the domain; the other one: %s", round, s)
		}
		t.Logf("round %d: live on %s after %v", round, backup.Name, took.Round(time.Millisecond))
		runsOnlyOn(t, b, vm, backup, primary)
		if _, err := traffic.WaitReply(t.Context(), cut, 15*time.Second); err != nil {
			t.Fatal(err)
		}
		primary, backup = backup, primary
	}
	onlyOn(t, vm, primary, backup)
	must(t, traffic.Stop())
	_, err := vm.VerifyDisk(t.Context(), primary)
	must(t, err)
}

// A host whose service link alone is down goes on with a domain whose backup is
// lost: it yields to one that lives only.
func TestIsolatedPrimaryWithoutBackup(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm, traffic := protected(t, b, hosta, hostb)
	must(t, hosta.CutLink(t.Context(), lab.Service))
	restore := func() { must(t, hosta.RestoreLink(context.WithoutCancel(t.Context()), lab.Service)) }
	err := scenario.Pause(t.Context(), time.Second)
	if err == nil {
		_, err = vm.KillQEMU(t.Context(), hostb)
	}
	killed := time.Now()
	if err == nil {
		_, err = b.WaitState(t.Context(), hosta, vm.Name, "live", 15*time.Second)
	}
	t.Logf("live after %v", time.Since(killed))
	restore()
	must(t, err)
	runsOnlyOn(t, b, vm, hosta, hostb)
	_, err = traffic.WaitReply(t.Context(), time.Now(), 15*time.Second)
	must(t, err)
}
