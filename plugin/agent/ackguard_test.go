// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

func TestAckGuard(t *testing.T) {
	const silence = 250 * time.Millisecond
	type ack struct {
		ms        int
		ack, head plugin.Position
		ok        bool
	}
	for name, acks := range map[string][]ack{
		"steady": {{0, 1, 1, true}, {50, 2, 9, true}, {250, 3, 9, true}},
		// A link that takes long delivers acks as often as any other.
		"far away": {{1000, 1, 90, true}, {1050, 2, 100, true}, {1100, 3, 110, true}},
		"stopped, and all was sent before": {
			{0, 10, 20, true}, {2000, 20, 20, false}, {2001, 20, 20, false}, {2010, 21, 22, true},
		},
		"stopped, and the log goes on": {
			{0, 10, 20, true}, {2000, 15, 30, false}, {2020, 30, 40, false}, {2040, 31, 50, true}, {2060, 32, 50, true},
		},
		"stopped twice": {
			{0, 10, 20, true}, {1000, 15, 30, false}, {2000, 31, 40, false}, {2010, 41, 50, true},
		},
		// The primary waits for room, and nothing speaks against the pair.
		"no more log": {{0, 10, 20, true}, {1000, 20, 20, false}, {1200, 20, 20, false}, {1400, 20, 20, false}, {1501, 20, 20, true}},
	} {
		g := ackGuard{silence: silence}
		start := time.Unix(0, 0)
		for i, a := range acks {
			now := start.Add(time.Duration(a.ms) * time.Millisecond)
			ok, wait := g.admit(a.ack, a.head, now)
			if ok != a.ok || ok != (wait == 0) || wait > 2*silence {
				t.Errorf("%s, ack %d: %v, after %v; want %v", name, i, ok, wait, a.ok)
			}
		}
	}
	g := ackGuard{silence: silence}
	g.admit(1, 1, time.Unix(0, 0))
	g.renew()
	if ok, _ := g.admit(2, 2, time.Unix(9, 0)); !ok || g.silence != silence {
		t.Error("a new session is in doubt")
	}
}
