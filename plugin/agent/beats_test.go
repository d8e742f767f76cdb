// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"log/slog"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/pair"
)

// Heartbeats go on while the log is being taken in, which may wait for the disk
// or for memory: all pairs of a host have theirs sent by one goroutine.
func TestHeartbeatsWaitForNoLock(t *testing.T) {
	t.Parallel()
	a := &Agent{cfg: config.Config{Host: "hostb", Agent: config.Agent{RunDir: t.TempDir()}}, log: slog.New(slog.DiscardHandler), ctx: t.Context()}
	b := newDomain(a, plugin.UUID{1}).newBackup("hosta", 4)
	b.mu.Lock()
	defer b.mu.Unlock()
	told := make(chan bool, 1)
	go func() { told <- b.alive() }()
	select {
	case alive := <-told:
		if !alive {
			t.Error("a backup whose QEMU is to be started counts as dead")
		}
	case <-time.After(5 * time.Second):
		t.Fatal("a heartbeat waits for the log")
	}
}

// Only while a clone is under way, of which no guest feels anything, a silent
// peer is waited for longer.
func TestPatience(t *testing.T) {
	t.Parallel()
	a := &Agent{cfg: config.Config{Heartbeat: config.Heartbeat{Timeout: time.Second}}}
	d := newDomain(a, plugin.UUID{1})
	d.vm = &vm{}
	for _, c := range []struct {
		state pair.State
		mode  control.Mode
		want  time.Duration
	}{
		{pair.Cloning, control.ModeIdle, 4 * time.Second},
		{pair.Cloning, control.ModeReplay, 4 * time.Second},
		{pair.Cloning, control.ModeRecord, 0},
		{pair.Protected, control.ModeRecord, 0},
		{pair.Protected, control.ModeReplay, 0},
	} {
		d.status.State, d.vm.state.Mode = c.state, c.mode
		if got := d.patience(); got != c.want {
			t.Errorf("%v in mode %v: %v, want %v", c.state, c.mode, got, c.want)
		}
	}
}
