// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"time"

	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/pair"
)

// silentTicks is in how many parts the limit of a silence is counted.
const silentTicks = 10

// silence counts for how long a plugin has said nothing. An agent that did not
// run itself has fewer ticks, so it accuses nobody of its own silence.
type silence struct {
	heard any // what was seen of the last report
	ticks int
}

// tick takes what is now seen of the last report. It tells that the silence has
// just reached its limit, or that one that had reached it is over.
func (s *silence) tick(report any) (silent, spoke bool) {
	if report != s.heard {
		spoke = s.ticks >= silentTicks
		s.heard, s.ticks = report, 0
		return false, spoke
	}
	s.ticks++
	return s.ticks == silentTicks, false
}

// watchSilence finds a QEMU that does not run though its process is there, as
// when somebody stopped it or the host has no memory for it: its plugin, which
// waits for nothing of QEMU, reports ten times a second in a pair. Such a backup
// is of no use and holds the primary up, which waits for it to catch up. Such a
// primary is the only copy that may be live, and nobody is dead.
func (d *domain) watchSilence(ctx context.Context, v *vm) {
	limit := d.a.cfg.Replay.DivergenceTimeout
	t := time.NewTicker(limit / silentTicks)
	defer t.Stop()
	var s silence
	for {
		select {
		case <-t.C:
		case <-v.done:
			return
		case <-ctx.Done():
			return
		}
		v.mu.Lock()
		report, mode := v.changed, v.state.Mode
		v.mu.Unlock()
		if mode != control.ModeRecord && mode != control.ModeReplay {
			s = silence{} // it has nothing to report
			v.silent.Store(false)
			continue
		}
		silent, spoke := s.tick(report)
		if silent || spoke {
			v.silent.Store(silent)
		}
		switch status, _, _, b := d.snapshot(); {
		case silent && mode == control.ModeReplay && b != nil && status.State == pair.Protected:
			d.a.log.Error("the backup's QEMU does not run: it is none", "domain", d.label(), "epoch", b.epoch, "silent_for", limit)
			d.post(pair.Event{Kind: pair.EventLocalUnfit, Epoch: b.epoch, Reason: pair.Stuck})
		case silent:
			d.a.log.Warn("the domain's QEMU does not run: the guest stands still", "domain", d.label(), "silent_for", limit)
		case spoke:
			d.a.log.Info("the domain's QEMU runs again", "domain", d.label())
		}
	}
}
