// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

// An agent that is restarted or upgraded costs nothing: the pair is the same
// afterwards, and so is the client's connection. The same holds for libvirtd.
func TestRestartsKeepThePair(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm, traffic := protected(t, b, hosta, hostb)
	before, err := b.Agent(hosta).StatusOf(t.Context(), vm.Name)
	must(t, err)
	for _, tc := range []struct {
		name    string
		restart func(context.Context) error
	}{
		{"agent of the primary", func(ctx context.Context) error { return b.RestartAgent(ctx, hosta, nil) }},
		{"agent of the backup", func(ctx context.Context) error { return b.RestartAgent(ctx, hostb, nil) }},
		{"libvirtd of the primary", func(ctx context.Context) error { return restartLibvirt(ctx, hosta) }},
		{"libvirtd of the backup", func(ctx context.Context) error { return restartLibvirt(ctx, hostb) }},
		{"agent of the backup again", func(ctx context.Context) error { return b.RestartAgent(ctx, hostb, nil) }},
		{"agent of the primary, without libvirtd", func(ctx context.Context) error { return restartWithoutLibvirt(ctx, b, hosta) }},
		{"agent of the backup, without libvirtd", func(ctx context.Context) error { return restartWithoutLibvirt(ctx, b, hostb) }},
	} {
		begin := time.Now()
		must(t, tc.restart(t.Context()))
		for _, h := range []*lab.Host{hosta, hostb} {
			_, err := b.Wait(t.Context(), h, vm.Name, "the pair to be whole on "+h.Name+" after a restart of the "+tc.name, 10*time.Second,
				func(s client.Status) (bool, error) {
					return s.State == "protected" && s.Reason == "none" && s.Epoch == before.Epoch, nil
				})
			must(t, err)
		}
		t.Logf("%s: whole after %v", tc.name, time.Since(begin).Round(time.Millisecond))
		alive(t, traffic, begin)
		must(t, scenario.Pause(t.Context(), time.Second))
	}
	// The new agents know the pair well enough to fail over, and find libvirtd by
	// themselves when it is there.
	for _, h := range []*lab.Host{hosta, hostb} {
		must(t, h.Start(t.Context(), lab.LibvirtProcess))
		must(t, eventually(t.Context(), 15*time.Second, func() error {
			_, err := b.Agent(h).Domain(t.Context(), vm.Name)
			return err
		}))
	}
	failover, err := vm.FailOver(t.Context(), hosta, hostb, traffic)
	must(t, err)
	alive(t, traffic, failover.Killed)
	must(t, traffic.Stop())
	_, err = vm.Verify(t.Context(), hosta, hostb)
	must(t, err)
}

func restartWithoutLibvirt(ctx context.Context, b *scenario.Bed, h *lab.Host) error {
	if err := h.KillLibvirt(ctx); err != nil {
		return err
	}
	return b.RestartAgent(ctx, h, nil)
}

func restartLibvirt(ctx context.Context, h *lab.Host) error {
	if err := h.KillLibvirt(ctx); err != nil {
		return err
	}
	if _, err := h.Exec(ctx, "libvirtd", "--daemon"); err != nil {
		return err
	}
	_, err := h.Virsh(ctx, "list")
	return err
}
