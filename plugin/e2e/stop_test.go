// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/guest"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

// SIGTERM, as of systemd when it stops a machine's scope, ends QEMU's log as a
// power-off does, and yet nobody wanted the domain to end: the backup goes live,
// with all that was seen. An operator's end is TestDeliberateEnd's.
func TestTerminatePrimaryQEMU(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm, traffic := protected(t, b, hosta, hostb)
	failover, err := vm.FailOverAt(t.Context(), unix.SIGTERM, hosta, hostb, traffic)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("live after %v, next reply after %v", failover.Live, failover.Reply)
	runsOnlyOn(t, b, vm, hostb, hosta)
	onlyOn(t, vm, hostb, hosta)
	refused(t, vm, hosta)
	must(t, traffic.Stop())
	lines, err := vm.Verify(t.Context(), hosta, hostb)
	t.Logf("%+v", lines)
	must(t, err)
}

// The same of the backup's QEMU costs the backup, and the next is made.
func TestTerminateBackupQEMU(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm, traffic := protected(t, b, hosta, hostb)
	killed, err := vm.SignalQEMU(t.Context(), hostb, unix.SIGTERM)
	must(t, err)
	s, err := b.WaitState(t.Context(), hosta, vm.Name, "live", 15*time.Second)
	must(t, err)
	if s.Reason != "backup-lost" {
		t.Errorf("reason %s, want backup-lost", s.Reason)
	}
	alive(t, traffic, killed)
	must(t, b.WaitGone(t.Context(), hostb, vm.Name))
	must(t, protect(t, vm, hosta, hostb))
	must(t, traffic.Stop())
}

// poweredOff lets the guest of a pair power off while the primary's host cannot
// acquire the epoch, and returns how many lines the guest had written.
func poweredOff(t *testing.T, b *scenario.Bed, vm *scenario.VM, primary, backup *lab.Host) (lines int, heal func(context.Context) error) {
	t.Helper()
	digest, err := vm.Quiesce(t.Context())
	must(t, err)
	heal, err = primary.DisturbStorage(t.Context(), lab.StorageAway, 0)
	must(t, err)
	must(t, vm.Guest.PowerOff(t.Context()))
	_, err = b.Wait(t.Context(), backup, vm.Name, "the replayed power-off", 15*time.Second, func(s client.Status) (bool, error) {
		// Its replicas are kept as long as it has this role.
		return s.State == "unprotected" && s.Reason == "powered-off" && s.Mode == "none" && s.Role == plugin.RoleBackup, nil
	})
	must(t, err)
	return digest.Lines, heal
}

// The guest powers off, and the primary's host dies before it could acquire the
// epoch. The backup's host has the same disks, so it does, and can start the
// domain; what the other one has is stale.
func TestPowerOffAndHostDies(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm, traffic := protected(t, b, hosta, hostb)
	traffic.Close()
	lines, _ := poweredOff(t, b, vm, hosta, hostb)
	must(t, hosta.Crash(t.Context()))
	t.Cleanup(func() {
		if !hosta.Up() {
			must(t, hosta.Boot(context.Background()))
			must(t, b.WaitAgent(context.Background(), hosta))
		}
	})

	var path string
	must(t, eventually(t.Context(), 20*time.Second, func() error {
		var err error
		path, err = vm.DiskPath(t.Context(), hostb)
		return err
	}))
	n, err := guest.DiskLines(t.Context(), path)
	if err != nil || n != lines {
		t.Errorf("the guest wrote %d lines, its disk on %s has %d (%v)", lines, hostb.Name, n, err)
	}
	must(t, eventually(t.Context(), 20*time.Second, func() error { return vm.Boot(t.Context(), hostb) }))
	must(t, hosta.Boot(t.Context()))
	must(t, b.WaitAgent(t.Context(), hosta))
	refused(t, vm, hosta)
	if n, err := vm.VerifyDisk(t.Context(), hostb); err != nil || n < lines {
		t.Errorf("disk on %s: %d lines of at least %d, %v", hostb.Name, n, lines, err)
	}
}

// The same, but it is the backup's host that cannot ask, and its agent is
// restarted: the primary's acquires the epoch, and nothing is left of the backup.
func TestPowerOffAndPrimaryClaims(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm, traffic := protected(t, b, hosta, hostb)
	traffic.Close()
	blind, err := hostb.DisturbStorage(t.Context(), lab.StorageAway, 0)
	must(t, err)
	lines, heal := poweredOff(t, b, vm, hosta, hostb)
	must(t, b.RestartAgent(t.Context(), hostb, nil))
	must(t, heal(t.Context()))
	must(t, eventually(t.Context(), 20*time.Second, func() error { return vm.Boot(t.Context(), hosta) }))
	must(t, blind(t.Context()))
	// Nothing there has the domain's name any more.
	_, err = b.Wait(t.Context(), hostb, vm.UUID.String(), "the end of the backup's part", 20*time.Second, func(s client.Status) (bool, error) {
		return s.Reason == "powered-off" && s.Role == plugin.RoleNone, nil
	})
	must(t, err)
	if n, err := vm.VerifyDisk(t.Context(), hosta); err != nil || n < lines {
		t.Errorf("disk on %s: %d lines of at least %d, %v", hosta.Name, n, lines, err)
	}
	must(t, protect(t, vm, hosta, hostb))
}

// A host that is to be shut down hands its domain over, and gives its backup of
// another one up, whose primary goes on at once; it takes no part in new pairs.
func TestHandover(t *testing.T) {
	b, hosta, hostb := bed(t)
	handover := func(h *lab.Host) string {
		out, err := h.Exec(t.Context(), filepath.Join(lab.BinDir, "ftvirt"), "handover", "--timeout", "30s")
		must(t, err)
		t.Log(out)
		return out
	}
	t.Cleanup(func() { must(t, b.RestartAgent(context.Background(), hosta, nil)) })
	vm, traffic := protected(t, b, hosta, hostb)
	began := time.Now()
	if out := handover(hosta); !strings.Contains(out, "was handed over to hostb") {
		t.Errorf("it says %q", out)
	}
	alive(t, traffic, began)
	runsOnlyOn(t, b, vm, hostb, hosta)
	refused(t, vm, hosta)
	if err := protect(t, vm, hostb, hosta); err == nil || !strings.Contains(err.Error(), "handed over") {
		t.Errorf("a host that was handed over took a backup: %v", err)
	}

	must(t, b.RestartAgent(t.Context(), hosta, nil))
	must(t, protect(t, vm, hostb, hosta))
	must(t, scenario.Pause(t.Context(), 2*time.Second))
	began = time.Now()
	if out := handover(hosta); !strings.Contains(out, "goes on without its backup here") {
		t.Errorf("it says %q", out)
	}
	s, err := b.WaitState(t.Context(), hostb, vm.Name, "live", 15*time.Second)
	must(t, err)
	if s.Reason != "backup-lost" {
		t.Errorf("reason %s, want backup-lost", s.Reason)
	}
	alive(t, traffic, began)
	must(t, b.WaitGone(t.Context(), hosta, vm.Name))
	must(t, traffic.Stop())
}
