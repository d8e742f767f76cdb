// SPDX-License-Identifier: Apache-2.0

// Package e2e tests whole pairs: two hosts with their own libvirtd and ftvirt
// agent, QEMU with the plugin, a Linux guest, and a client. All tests share one
// lab, so none of them runs in parallel; each has a guest of its own.
package e2e

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/labtest"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

var bin = flag.String("bin", "", "directory of ftvirt, ftvirt-hook and ftvirt.so; bin of the repository unless given")

// shared is the lab of all tests, made by the first that needs it.
var shared struct {
	once   sync.Once
	bed    *scenario.Bed
	guests int
}

func TestMain(m *testing.M) {
	flag.Parse()
	code := m.Run()
	if shared.bed != nil {
		if err := shared.bed.Down(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// bed returns the lab with two agents that run with the lab's configuration.
func bed(t *testing.T) (b *scenario.Bed, hosta, hostb *lab.Host) {
	t.Helper()
	root := labtest.Root(t)
	shared.once.Do(func() {
		o := lab.Options{
			Name: fmt.Sprintf("e2e%d", os.Getpid()), Bin: *bin, Guest: labtest.Guest(t), Ephemeral: true,
			// Most tests say themselves when there is a backup.
			Configure: func(c *config.Config) { c.Protect.Auto = false },
		}
		if o.Bin == "" {
			o.Bin = filepath.Join(root, "bin")
		}
		var err error
		// The lab outlives this test.
		if shared.bed, err = scenario.Up(context.Background(), o); err != nil {
			t.Fatal(err)
		}
	})
	if b = shared.bed; b == nil {
		t.Fatal("the lab could not be started, see the first test")
	}
	t.Cleanup(func() {
		if t.Failed() {
			saveLogs(t, b, root)
		}
	})
	hosta, hostb = b.Pair()
	return b, hosta, hostb
}

func saveLogs(t *testing.T, b *scenario.Bed, root string) {
	dir, err := b.SaveLogs(context.Background(), filepath.Join(root, "build", "evidence"), filepath.Base(t.Name()))
	t.Logf("logs are kept in %s (%v)", dir, err)
	for _, h := range b.Hosts() {
		if text, err := h.AgentLog(); err == nil {
			t.Logf("agent of %s, end of its log:\n%s", h.Name, text[max(0, len(text)-6000):])
		}
	}
}

// start boots a guest on a host; it and what is left of its copies end with the
// test.
func start(t *testing.T, b *scenario.Bed, h, peer *lab.Host) *scenario.VM {
	t.Helper()
	// Each has an address of its own: the bridge takes the last one's for where that
	// was failed over to, for half a minute.
	shared.guests++
	vm, err := b.StartVM(t.Context(), h, peer, shared.guests, fmt.Sprintf("guest%d", shared.guests))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			saveLogs(t, b, labtest.Root(t)) // before the evidence goes
		}
		if err := vm.Remove(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return vm
}

// protected boots a guest, protects it and connects a client.
func protected(t *testing.T, b *scenario.Bed, primary, backup *lab.Host) (*scenario.VM, *scenario.Traffic) {
	t.Helper()
	vm := start(t, b, primary, backup)
	traffic, err := vm.Traffic(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(traffic.Close)
	must(t, protect(t, vm, primary, backup))
	must(t, scenario.Pause(t.Context(), 2*time.Second))
	return vm, traffic
}

func protect(t *testing.T, vm *scenario.VM, primary, backup *lab.Host) error {
	t.Helper()
	s, err := vm.Protect(t.Context(), primary, backup)
	if err == nil && s.ClonePause >= 1000 {
		err = fmt.Errorf("the clone stopped the guest for %.0f ms", s.ClonePause)
	}
	return err
}

// configured runs a host's agent with a changed configuration, for the rest of
// the test.
func configured(t *testing.T, b *scenario.Bed, h *lab.Host, change func(*config.Config)) {
	t.Helper()
	t.Cleanup(func() {
		if err := b.RestartAgent(context.Background(), h, nil); err != nil {
			t.Error(err)
		}
	})
	must(t, b.RestartAgent(t.Context(), h, change))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// alive demands that the client's connection goes on: a reply to a request of
// after the instant comes, and no gap is longer than the acceptance allows.
func alive(t *testing.T, traffic *scenario.Traffic, after time.Time) {
	t.Helper()
	const longestGap = 2 * time.Second
	reply, err := traffic.WaitReply(t.Context(), after, 15*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	gap := traffic.LongestGap(after)
	t.Logf("next reply after %v, longest gap %v", reply.Sub(after).Round(time.Millisecond), gap.Round(time.Millisecond))
	if gap >= longestGap {
		t.Errorf("the longest gap is %v, want less than %v", gap, longestGap)
	}
}

// onlyOn demands that exactly one host's copy is seen: by the frames that leave
// each host, which is all that a client can know.
func onlyOn(t *testing.T, vm *scenario.VM, here, elsewhere *lab.Host) {
	t.Helper()
	ours, err := vm.Frames(here)
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Stop()
	theirs, err := vm.Frames(elsewhere)
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Stop()
	must(t, scenario.Pause(t.Context(), time.Second))
	if ours.Count() == 0 || theirs.Count() != 0 {
		t.Errorf("in a second, %d frames of the guest left %s and %d left %s; want some and none",
			ours.Count(), here.Name, theirs.Count(), elsewhere.Name)
	}
}

// runsOnlyOn demands the same of what libvirt says.
func runsOnlyOn(t *testing.T, b *scenario.Bed, vm *scenario.VM, here, elsewhere *lab.Host) {
	t.Helper()
	must(t, b.WaitGone(t.Context(), elsewhere, vm.Name))
	running, err := b.Running(t.Context(), here, vm.Name)
	if err != nil || !running {
		t.Errorf("%s runs on %s: %v (%v)", vm.Name, here.Name, running, err)
	}
}
