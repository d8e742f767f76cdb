// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

// imageBytes is the room of the file systems that these tests fill: two disks of
// the guest's.
const imageBytes = 160 << 20

// smallImages gives a host's disks little room for the rest of the test.
func smallImages(t *testing.T, h *lab.Host) {
	t.Helper()
	must(t, h.MountImages(t.Context(), imageBytes))
	t.Cleanup(func() {
		if err := h.UnmountImages(context.Background()); err != nil {
			t.Error(err)
		}
	})
}

// filled leaves no room for a host's disks until free is called, or the test ends.
func filled(t *testing.T, h *lab.Host) (free func()) {
	t.Helper()
	undo, err := h.FillImages(t.Context())
	must(t, err)
	done := false
	free = func() {
		if done {
			return
		}
		done = true
		if err := undo(context.Background()); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(free)
	return free
}

// A backup whose disk is full does not run, and is no backup. That is told at
// once, the primary goes on alone, and no clone is made as long as there is no
// room for it.
func TestBackupDiskFull(t *testing.T) {
	b, hosta, hostb := bed(t)
	smallImages(t, hostb)
	vm, traffic := protected(t, b, hosta, hostb)
	began := time.Now()
	free := filled(t, hostb)
	s, err := b.Wait(t.Context(), hosta, vm.Name, "the end of the pair", 20*time.Second,
		func(s client.Status) (bool, error) { return s.State == "live", nil })
	must(t, err)
	t.Logf("alone %v after the disk was full", time.Since(began))
	if s.Reason != "io-error" {
		t.Errorf("the primary says %s, want io-error", s.Reason)
	}
	alive(t, traffic, time.Now())
	runsOnlyOn(t, b, vm, hosta, hostb)
	if _, err := vm.Protect(t.Context(), hosta, hostb); err == nil {
		t.Error("a backup was made where there is no room for it")
	} else {
		t.Log(err)
	}
	free()
	must(t, protect(t, vm, hosta, hostb))
	alive(t, traffic, time.Now())
}

// A primary whose disk is full stands still, and says so. Its backup, for which
// the request succeeded, is no copy of it any more. When there is room again and
// somebody has resumed the guest, it goes on where it stood, and the pair is made
// anew.
func TestPrimaryDiskFull(t *testing.T) {
	b, hosta, hostb := bed(t)
	smallImages(t, hosta)
	vm, traffic := protected(t, b, hosta, hostb)
	free := filled(t, hosta)
	s, err := b.Wait(t.Context(), hosta, vm.Name, "the end of the pair", 20*time.Second,
		func(s client.Status) (bool, error) { return s.State == "live", nil })
	must(t, err)
	if s.Reason != "io-error" || s.Paused != "io-error" {
		t.Errorf("the primary says %s; want reason and pause io-error", s)
	}
	must(t, vm.WaitPaused(t.Context(), hosta, "I/O error", 5*time.Second))
	runsOnlyOn(t, b, vm, hosta, hostb)
	// A clone would make it go on.
	if _, err := vm.Enable(t.Context(), hosta, hostb); err == nil || !strings.Contains(err.Error(), "virsh resume") {
		t.Errorf("a domain that is paused by an error is protected: %v", err)
	}
	free()
	resumed := time.Now()
	_, err = hosta.Virsh(t.Context(), "resume", vm.Name)
	must(t, err)
	must(t, protect(t, vm, hosta, hostb))
	if _, err := traffic.WaitReply(t.Context(), resumed, 30*time.Second); err != nil {
		t.Error(err)
	}
	must(t, traffic.Stop())
	for _, h := range []*lab.Host{hosta, hostb} {
		noDivergence(t, b, vm, h)
	}
	again, err := vm.Traffic(t.Context())
	must(t, err)
	defer again.Close()
	failover, err := vm.FailOver(t.Context(), hosta, hostb, again)
	must(t, err)
	t.Logf("live after %v", failover.Live)
	lines, err := vm.VerifyDisk(t.Context(), hostb)
	must(t, err)
	t.Logf("%d lines", lines)
}

func noDivergence(t *testing.T, b *scenario.Bed, vm *scenario.VM, h *lab.Host) {
	t.Helper()
	must(t, b.Agent(h).Events(t.Context(), false, func(e client.Event) error {
		if e.UUID == vm.UUID && e.Reason == "divergence" {
			t.Errorf("%s tells of a divergence: %+v", h.Name, e)
		}
		return nil
	}))
}

// The primary dies before it can give its backup up, whose disk is full: the copy
// is held, whatever the time, until there is room. Then the requests that failed
// are done, and it goes live as the guest that its primary was.
func TestBackupDiskFullAlone(t *testing.T) {
	b, hosta, hostb := bed(t)
	smallImages(t, hostb)
	vm, traffic := protected(t, b, hosta, hostb)
	// The primary cannot decide the epoch, else it would have by then.
	heal, err := hosta.DisturbStorage(t.Context(), lab.StorageAway, 0)
	must(t, err)
	mended := false
	mend := func() {
		if !mended {
			mended = true
			must(t, heal(context.WithoutCancel(t.Context())))
		}
	}
	t.Cleanup(mend)
	free := filled(t, hostb)
	_, err = b.Wait(t.Context(), hostb, vm.Name, "the backup to be paused", 20*time.Second,
		func(s client.Status) (bool, error) { return s.Paused == "io-error", nil })
	must(t, err)
	killed, err := vm.KillQEMU(t.Context(), hosta)
	must(t, err)
	s, err := b.Wait(t.Context(), hostb, vm.Name, "the backup to tell what it needs", 5*time.Second,
		func(s client.Status) (bool, error) { return s.State == "going-live" && s.Reason == "io-error", nil })
	must(t, err)
	t.Logf("%v after the kill: %s", time.Since(killed), s)
	mend() // a copy that is known to be dead does not ask
	must(t, scenario.Pause(t.Context(), 35*time.Second))
	if s, err = b.Agent(hostb).StatusOf(t.Context(), vm.Name); err != nil || s.State != "going-live" || s.Paused != "io-error" {
		t.Fatalf("the copy is not held: %s (%v)", s, err)
	}
	free()
	freed := time.Now()
	_, err = b.WaitState(t.Context(), hostb, vm.Name, "live", 15*time.Second)
	must(t, err)
	if _, err := traffic.WaitReply(t.Context(), freed, 90*time.Second); err != nil { // the client's TCP has backed off
		t.Error(err)
	}
	must(t, b.WaitGone(t.Context(), hosta, vm.Name))
	must(t, traffic.Stop())
	lines, err := vm.Verify(t.Context(), hosta, hostb)
	t.Logf("%+v", lines)
	must(t, err)
}
