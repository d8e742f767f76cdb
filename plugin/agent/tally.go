// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"sync"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/metrics"
	"ftvirt.org/ftvirt/plugin/pair"
)

// tally counts what became of a domain, for its metrics.
type tally struct {
	mu       sync.Mutex
	events   metrics.Events
	state    pair.State   // the newest
	diverged plugin.Epoch // the newest whose backup did
}

func (t *tally) read() metrics.Events {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.events
}

// happened counts a change of state; promoted tells that the copy here is the
// backup of the epoch. It is called in order, by the one who steps the machine.
func (t *tally) happened(to pair.State, reason pair.Reason, epoch plugin.Epoch, promoted bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	from := t.state
	t.state = to
	switch {
	case from == pair.Cloning && to == pair.Protected:
		t.events.ClonesDone++
	case from == pair.Cloning && to != pair.Cloning:
		t.events.ClonesFailed++
	case from == pair.Live || to != pair.Live:
	case promoted:
		t.events.Failovers++
	case reason != pair.UserRequest && reason != pair.AgentRestarted:
		t.events.BackupsLost++
	}
	// It is the reason of more than one state.
	if reason == pair.Divergence && epoch != t.diverged {
		t.diverged = epoch
		t.events.Divergences++
	}
}

// answered counts an answer of the arbiter.
func (t *tally) answered(ev pair.EventKind) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch ev {
	case pair.EventArbiterWon:
		t.events.ArbiterWon++
	case pair.EventArbiterLost:
		t.events.ArbiterLost++
	case pair.EventArbiterUnavailable:
		t.events.ArbiterAbsent++
	}
}

// ackTimer measures how long pieces of the log wait for their acks. Its owner
// guards it.
type ackTimer struct {
	sent  []sentPiece // in order, over this session
	since time.Time   // when the oldest was sent first that waits over a session that broke
	acks  uint64      // acks of something that waited
}

type sentPiece struct {
	end plugin.Position
	at  time.Time
}

// timedPieces bounds those that are timed at once; what is sent beyond is not.
const timedPieces = 4096

func (t *ackTimer) send(end plugin.Position, now time.Time) {
	if len(t.sent) < timedPieces {
		t.sent = append(t.sent, sentPiece{end, now})
	}
}

// reset forgets what was sent over a session that broke, but not for how long it
// waits.
func (t *ackTimer) reset() {
	if t.since.IsZero() && t.waits() {
		t.since = t.sent[0].at
	}
	t.sent = nil
}

// waits tells whether something waits for its ack.
func (t *ackTimer) waits() bool { return len(t.sent) > 0 }

// oldest is for how long the oldest piece has waited.
func (t *ackTimer) oldest(now time.Time) time.Duration {
	switch {
	case !t.since.IsZero():
		return now.Sub(t.since)
	case t.waits():
		return now.Sub(t.sent[0].at)
	default:
		return 0
	}
}

// ack notes how long the pieces waited that end at or before pos.
func (t *ackTimer) ack(pos plugin.Position, now time.Time, to *metrics.Histogram) {
	n := 0
	for ; n < len(t.sent) && t.sent[n].end <= pos; n++ {
		to.Observe(now.Sub(t.sent[n].at))
	}
	if n > 0 {
		t.acks++
		t.since = time.Time{}
	}
	t.sent = append(t.sent[:0], t.sent[n:]...)
}
