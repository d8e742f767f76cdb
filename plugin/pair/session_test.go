// SPDX-License-Identifier: Apache-2.0

package pair

import (
	"testing"
)

func eachRole(t *testing.T, f func(t *testing.T, s stepper)) {
	t.Run("primary", func(t *testing.T) { f(t, protectedPrimary(t)) })
	t.Run("backup", func(t *testing.T) { f(t, protectedBackup(t)) })
}

// What is told of a session that another has replaced ends nothing.
func TestOldSessionEndsNothing(t *testing.T) {
	eachRole(t, func(t *testing.T, s stepper) {
		tell := func(kind EventKind, session uint64) {
			s.Step(Event{Kind: kind, Epoch: epoch, Session: session})
		}
		tell(EventSessionRestored, 2)
		tell(EventSessionLost, 1)
		tell(EventPeerDead, 1)
		s.ticks(10 * s.cfg.Grace)
		s.want(Protected, ReasonNone)
		tell(EventSessionLost, 2)
		s.want(Protected, LostConnection)
		tell(EventSessionRestored, 3)
		s.want(Protected, ReasonNone)
		tell(EventSessionRestored, 2)
		tell(EventPeerDead, 2)
		s.want(Protected, ReasonNone)
		tell(EventPeerDead, 3)
		s.want(GoingLive, PeerAgentLost)
	})
}

// A session that comes back again and again and never holds is none.
func TestFlappingSessionIsLost(t *testing.T) {
	eachRole(t, func(t *testing.T, s stepper) {
		// As fast as events come, without a tick.
		for n := 0; s.state == Protected; n++ {
			if n > s.cfg.Grace {
				t.Fatalf("%d losses, and it is %s", n, s.Status())
			}
			s.on(EventSessionLost, EventSessionRestored)
		}
		s.want(GoingLive, LostConnection)
	})
	eachRole(t, func(t *testing.T, s stepper) {
		// Ticks that fall into the time in which it is back count for nothing, until
		// it has held.
		for n := 0; s.state == Protected; n++ {
			if n > s.cfg.Grace {
				t.Fatalf("%d losses, and it is %s", n, s.Status())
			}
			s.on(EventSessionLost, EventSessionRestored)
			s.ticks(s.cfg.Hold - 1)
		}
	})
	eachRole(t, func(t *testing.T, s stepper) {
		for range 10 {
			s.on(EventSessionLost)
			s.ticks(s.cfg.Grace - 1)
			s.on(EventSessionRestored)
			s.ticks(s.cfg.Hold)
			s.want(Protected, ReasonNone)
		}
	})
}
