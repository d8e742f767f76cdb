// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/control"
)

// ErrVMEnded is returned by waits on a VM whose plugin went away.
var ErrVMEnded = errors.New("the domain's QEMU ended")

// vm is one QEMU of this host, as its plugin tells of it. It implements
// migrate.Recorder and migrate.Replayer.
type vm struct {
	*control.Session
	id   plugin.UUID
	done chan struct{} // closed when the connection ended
	// opened: the gate was opened for good, after the pair was over.
	opened atomic.Bool
	// switched is the epoch whose switch was posted.
	switched atomic.Uint64
	// What was posted of a backup: each once.
	loaded, running, live, left atomic.Bool
	// silent: it has said nothing for so long that its QEMU does not run.
	silent atomic.Bool

	mu       sync.Mutex
	changed  chan struct{} // closed and renewed at each report
	state    control.State
	pause    string // see control.State.Pause; it outlives other reports of a VM that stands still
	consumed control.Consumed
	stats    control.Stats
	diverged *control.Diverged
	refused  error
	looked   control.Looked
	memories memories // what was told of memory, since the last Look
	looking  sync.Mutex
	onLog    func(plugin.Position, []byte) error
	onDigest func(control.Digest)
	onReport func() // after state, consumed and diverged; must not block
}

func newVM(s *control.Session) *vm {
	h := s.Hello()
	return &vm{
		Session: s, id: h.Domain, done: make(chan struct{}), changed: make(chan struct{}),
		state: control.State{Mode: h.Mode, Epoch: h.Epoch, Pos: h.Head, Icount: h.Icount},
	}
}

// run reads the plugin's reports until the connection ends.
func (v *vm) run(ctx context.Context) error {
	defer close(v.done)
	return v.Run(ctx, control.Handler{
		Log: func(pos plugin.Position, p []byte) error {
			v.mu.Lock()
			f := v.onLog
			v.mu.Unlock()
			if f == nil {
				return nil
			}
			return f(pos, p)
		},
		State: func(s control.State) {
			v.report(func() {
				if v.state = s; s.Running || s.Text == control.Held || s.Pause() != "" {
					v.pause = s.Pause()
				}
			})
		},
		Consumed: func(c control.Consumed) { v.report(func() { v.consumed = c }) },
		Stats:    func(s control.Stats) { v.report(func() { v.stats = s }) },
		Diverged: func(d control.Diverged) { v.report(func() { v.diverged = &d }) },
		Digest: func(g control.Digest) {
			v.mu.Lock()
			f := v.onDigest
			v.mu.Unlock()
			if f != nil {
				f(g)
			}
		},
		Memory: func(m control.Memory) {
			v.mu.Lock()
			defer v.mu.Unlock()
			v.memories.add(m)
		},
		Looked:  func(l control.Looked) { v.report(func() { v.looked = l }) },
		Refused: func(err error) { v.report(func() { v.refused = err }) },
	})
}

func (v *vm) report(f func()) {
	v.mu.Lock()
	f()
	close(v.changed)
	v.changed = make(chan struct{})
	notify := v.onReport
	v.mu.Unlock()
	if notify != nil {
		notify()
	}
}

// ship directs the log of a recording VM to f.
func (v *vm) ship(f func(plugin.Position, []byte) error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.onLog = f
}

// digests directs what the plugin tells of registers to f.
func (v *vm) digests(f func(control.Digest)) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.onDigest = f
}

// watch calls f after each report.
func (v *vm) watch(f func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.onReport = f
}

// reports is a snapshot of what the plugin told.
type reports struct {
	control.State
	pause    string
	consumed control.Consumed
	stats    control.Stats
	diverged *control.Diverged
	looked   control.Looked
}

func (v *vm) reports() reports {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.reported()
}

// reported does so with the lock held.
func (v *vm) reported() reports {
	return reports{State: v.state, pause: v.pause, consumed: v.consumed, stats: v.stats, diverged: v.diverged, looked: v.looked}
}

// wait returns when cond holds for what the plugin reported. A command that it
// refused meanwhile is an error.
func (v *vm) wait(ctx context.Context, what string, cond func(reports) bool) error {
	for {
		v.mu.Lock()
		r := v.reported()
		changed, refused := v.changed, v.refused
		v.refused = nil
		v.mu.Unlock()
		if cond(r) {
			return nil
		}
		if refused != nil {
			return fmt.Errorf("%s: %w", what, refused)
		}
		select {
		case <-changed:
		case <-v.done:
			return fmt.Errorf("%s: %w", what, ErrVMEnded)
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, context.Cause(ctx))
		}
	}
}

// Recording waits until the VM records in epoch and runs.
func (v *vm) Recording(ctx context.Context, epoch plugin.Epoch) (time.Duration, error) {
	var got control.State
	err := v.wait(ctx, "waiting for the primary to record", func(r reports) bool {
		got = r.State
		return strings.HasPrefix(r.Text, textNotCloned) || r.Mode == control.ModeRecord && r.Epoch == epoch && r.Text == textCloned
	})
	if err == nil && got.Text != textCloned {
		err = errors.New(got.Text)
	}
	return time.Duration(got.PauseNS), err
}

// What the plugin says of a clone, see mode.c.
const (
	textCloned    = "cloned"
	textNotCloned = "not cloned: "
)

// Replaying waits until the VM has its state and replays.
func (v *vm) Replaying(ctx context.Context) error {
	return v.wait(ctx, "waiting for the backup to replay", func(r reports) bool {
		return r.Mode == control.ModeReplay && r.Running
	})
}

// ended tells, after the connection broke, whether QEMU is gone within a limit,
// 0 being none. The kernel closes the connection a moment before the process is
// gone.
func (v *vm) ended(ctx context.Context, limit time.Duration) bool {
	t := time.NewTicker(2 * time.Millisecond)
	defer t.Stop()
	if limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	for v.Alive() {
		select {
		case <-t.C:
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// idle brings the VM to where it can be cloned.
func (v *vm) idle(ctx context.Context) error {
	if v.reports().Mode == control.ModeIdle {
		return nil
	}
	if err := v.Idle(); err != nil {
		return err
	}
	return v.wait(ctx, "waiting for the domain to stop recording", func(r reports) bool { return r.Mode == control.ModeIdle })
}

// once tells the first of its callers apart.
func once(b *atomic.Bool) bool { return b.CompareAndSwap(false, true) }
