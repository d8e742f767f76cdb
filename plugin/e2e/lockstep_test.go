// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/labtest"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

// minLines is how much the guest must have done for a comparison to mean
// something.
const minLines = 40

// TestLockstep compares both sides at a quiesced point of a loaded guest: the
// consoles from the clone on byte for byte, and the disks' contents. Memory
// cannot be read from a replaying QEMU without disturbing it; so the guest's
// own digest is compared, of before and after the backup went live, which is
// computed from its memory and disk by the CPU whose state was replayed.
func TestLockstep(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm, traffic := protected(t, b, hosta, hostb)
	must(t, eventually(t.Context(), 60*time.Second, func() error {
		console, err := vm.Console(hostb)
		if n := scenario.CountLines(console); err == nil && n < minLines {
			err = fmt.Errorf("the backup's console has %d lines", n)
		}
		return err
	}))
	must(t, traffic.Stop())
	observed(t, b, vm, hosta, hostb)
	primary, err := vm.Quiesce(t.Context())
	must(t, err)
	if primary.Lines < minLines || primary.LoadOps < minLines {
		t.Errorf("there was hardly any load: %+v", primary)
	}
	follow(t, b, vm, hosta, hostb)
	registersCompared(t, b, vm, hosta, hostb)
	sameConsoles(t, vm, hosta, hostb)
	sameDisks(t, vm, hosta, hostb)

	killed, err := vm.KillQEMU(t.Context(), hosta)
	must(t, err)
	_, err = b.WaitState(t.Context(), hostb, vm.Name, "live", 15*time.Second)
	must(t, err)
	t.Logf("live %v after the kill", time.Since(killed).Round(time.Millisecond))
	survivor, err := vm.Quiesce(t.Context())
	must(t, err)
	if survivor != primary {
		t.Errorf("the guest's digest on the primary: %+v\non the backup that went live: %+v", primary, survivor)
	}
	_, err = vm.Verify(t.Context(), hosta, hostb)
	must(t, err)
}

// follow waits until the backup has replayed all that the primary has logged
// by now.
func follow(t *testing.T, b *scenario.Bed, vm *scenario.VM, primary, backup *lab.Host) {
	t.Helper()
	p, err := b.Agent(primary).StatusOf(t.Context(), vm.Name)
	must(t, err)
	s, err := b.Wait(t.Context(), backup, vm.Name, fmt.Sprintf("the backup to be at %d", p.Position), 10*time.Second,
		func(s client.Status) (bool, error) { return s.Position >= p.Position, nil })
	must(t, err)
	t.Logf("position %d on the primary, %d on the backup", p.Position, s.Position)
}

// registersCompared demands that the registers were compared again and again
// while the pair ran, as both hosts tell.
func registersCompared(t *testing.T, b *scenario.Bed, vm *scenario.VM, hosts ...*lab.Host) {
	t.Helper()
	for _, h := range hosts {
		s, err := b.Agent(h).StatusOf(t.Context(), vm.Name)
		must(t, err)
		if s.Compared < 10 {
			t.Errorf("%s: registers were found equal %d times only", h.Name, s.Compared)
		}
	}
}

func sameConsoles(t *testing.T, vm *scenario.VM, primary, backup *lab.Host) {
	t.Helper()
	// The consoles go through two virtlogd, which take a moment.
	var ours, theirs string
	err := eventually(t.Context(), 5*time.Second, func() error {
		var errs [2]error
		ours, errs[0] = vm.Console(primary)
		theirs, errs[1] = vm.Console(backup)
		if err := errors.Join(errs[:]...); err != nil {
			return err
		}
		if !strings.HasSuffix(ours, theirs) {
			return errors.New("the consoles differ")
		}
		return nil
	})
	if err != nil {
		t.Fatalf("%v; primary's ends:\n%s\nbackup's ends:\n%s", err, ours[max(0, len(ours)-300):], theirs[max(0, len(theirs)-300):])
	}
	if n := scenario.CountLines(theirs); n < minLines {
		t.Errorf("the backup's console has %d lines only", n)
	}
	t.Logf("%d bytes of console are equal", len(theirs))
}

func sameDisks(t *testing.T, vm *scenario.VM, primary, backup *lab.Host) {
	t.Helper()
	var paths [2]string
	for i, h := range []*lab.Host{primary, backup} {
		var err error
		paths[i], err = vm.DiskPath(t.Context(), h)
		must(t, err)
	}
	// The position covers the order to write, not yet its completion here, and
	// what the primary told of its own may be older than the end of the load. And
	// a cluster that one image had already, but for the other is new, is on disk
	// in the first only, until QEMU writes its tables: verify makes both do so.
	err := eventually(t.Context(), 30*time.Second, func() error {
		if out, err := verify(t, primary, vm); err != nil {
			return fmt.Errorf("verify: %w: %s", err, out)
		}
		out, err := exec.CommandContext(t.Context(), "qemu-img", "compare", "-U", paths[0], paths[1]).CombinedOutput()
		if err != nil {
			return fmt.Errorf("disks: %w: %s", err, out)
		}
		return nil
	})
	if err == nil {
		return
	}
	for i, path := range paths {
		kept := filepath.Join(labtest.Root(t), "build", "evidence", fmt.Sprintf("%s-%d.qcow2", t.Name(), i))
		out, err := exec.CommandContext(t.Context(), "cp", path, kept).CombinedOutput()
		t.Logf("the image is kept as %s (%v%s)", kept, err, out)
	}
	t.Fatal(err)
}

// eventually repeats f until it succeeds, and returns its last error if it does
// not within the limit.
func eventually(ctx context.Context, limit time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return nil
		}
		if scenario.Pause(ctx, 100*time.Millisecond) != nil {
			return err
		}
	}
}
