// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

// FT paper, section 2.1: "the backup VM will ... take over" and clients see no
// interruption.
func TestKillPrimaryQEMU(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm, traffic := protected(t, b, hosta, hostb)
	failover, err := vm.FailOver(t.Context(), hosta, hostb, traffic)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("live after %v, next reply after %v", failover.Live, failover.Reply)
	alive(t, traffic, failover.Killed)
	runsOnlyOn(t, b, vm, hostb, hosta)
	onlyOn(t, vm, hostb, hosta)
	must(t, traffic.Stop())
	lines, err := vm.Verify(t.Context(), hosta, hostb)
	t.Logf("%+v", lines)
	must(t, err)
}

// Nothing of a failover waits for libvirt, not even that switches learn where
// the guest is now.
func TestFailoverWithoutLibvirt(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm, traffic := protected(t, b, hosta, hostb)
	frames, err := vm.Frames(hostb)
	must(t, err)
	defer frames.Stop()
	_, err = hostb.Signal(t.Context(), lab.LibvirtProcess, unix.SIGSTOP)
	must(t, err)
	goOn := func() {
		_, err := hostb.Signal(context.WithoutCancel(t.Context()), lab.LibvirtProcess, unix.SIGCONT)
		must(t, err)
	}
	failover, err := vm.FailOver(t.Context(), hosta, hostb, traffic)
	if err == nil {
		err = scenario.Pause(t.Context(), time.Second)
	}
	announced := frames.Announced()
	goOn()
	must(t, err)
	alive(t, traffic, failover.Killed)
	if announced == 0 {
		t.Error("the guest was not announced while libvirt did not answer")
	}
	runsOnlyOn(t, b, vm, hostb, hosta)
	must(t, traffic.Stop())
	_, err = vm.VerifyDisk(t.Context(), hostb)
	must(t, err)
}

// The primary goes on alone: its gate opens, and it can be protected again.
func TestKillBackupQEMU(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm, traffic := protected(t, b, hosta, hostb)
	killed, err := vm.KillQEMU(t.Context(), hostb)
	must(t, err)
	s, err := b.WaitState(t.Context(), hosta, vm.Name, "live", 15*time.Second)
	must(t, err)
	if s.Reason != "backup-lost" {
		t.Errorf("reason %s, want backup-lost", s.Reason)
	}
	alive(t, traffic, killed)
	runsOnlyOn(t, b, vm, hosta, hostb)
	onlyOn(t, vm, hosta, hostb)
	must(t, protect(t, vm, hosta, hostb))
	alive(t, traffic, time.Now())
	must(t, traffic.Stop())
	_, err = vm.VerifyDisk(t.Context(), hosta)
	must(t, err)
}

// A primary whose agent is dead cannot send its log, so the backup takes over;
// the old copy's outputs stay shut in, and it is destroyed as soon as an agent
// is there to do it.
func TestKillAgentOfPrimary(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm, traffic := protected(t, b, hosta, hostb)
	killAgent(t, b, vm, traffic, hosta, hostb)
	if s, err := b.Agent(hosta).StatusOf(t.Context(), vm.Name); err == nil && s.Mode != "none" {
		t.Errorf("the stale copy has a QEMU: %s", s)
	}
}

// A backup whose agent is dead cannot acknowledge, so the primary goes on
// alone.
func TestKillAgentOfBackup(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm, traffic := protected(t, b, hosta, hostb)
	killAgent(t, b, vm, traffic, hostb, hosta)
	// Both agents are well again, and so can the pair be.
	must(t, protect(t, vm, hosta, hostb))
	alive(t, traffic, time.Now())
}

// killAgent kills one side's agent and demands that the other side's copy, and
// no other, is seen from then on.
func killAgent(t *testing.T, b *scenario.Bed, vm *scenario.VM, traffic *scenario.Traffic, dead, survivor *lab.Host) {
	t.Helper()
	killed := time.Now()
	must(t, dead.KillAgent(t.Context()))
	_, err := b.WaitState(t.Context(), survivor, vm.Name, "live", 15*time.Second)
	must(t, err)
	alive(t, traffic, killed)
	onlyOn(t, vm, survivor, dead)
	must(t, b.StartAgent(t.Context(), dead))
	runsOnlyOn(t, b, vm, survivor, dead)
	onlyOn(t, vm, survivor, dead)
	alive(t, traffic, time.Now())
	if err := traffic.Err(); err != nil {
		t.Error(err)
	}
	if n, err := vm.VerifyDisk(t.Context(), survivor); err != nil || n == 0 {
		t.Errorf("disk of the survivor: %d lines, %v", n, err)
	}
	must(t, vm.Load(t.Context()))
	if text, err := dead.AgentLog(); err != nil || !strings.Contains(text, vm.UUID.String()) && !strings.Contains(text, vm.Name) {
		t.Errorf("the restarted agent of %s says nothing of the copy that it removed (%v)", dead.Name, err)
	}
}
