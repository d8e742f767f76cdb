// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin"
)

// ackGuard tells acks that may open the gate from those that come too late. An
// ack proves that the backup was one when it sent it. An agent that was stopped,
// or a network that held it up, may deliver it when the backup has long gone
// live: a packet that it lets go is then one of a second copy.
//
// So an ack that comes after a silence counts only if it covers log that was
// sent after the silence, or if nothing has ended the pair for a while more:
// log may be missing because the primary waits for room in it.
type ackGuard struct {
	// silence is how long no ack may come without doubt, see config.AckSilence.
	silence time.Duration

	last   time.Time
	beyond plugin.Position // acks up to here are in doubt
	until  time.Time       // until then
}

// admit judges an ack that came now; head is where the log ends that was sent.
// If it is false, the ack may count after the returned time.
func (g *ackGuard) admit(ack, head plugin.Position, now time.Time) (ok bool, wait time.Duration) {
	if !g.last.IsZero() && now.Sub(g.last) > g.silence {
		g.beyond, g.until = head, now.Add(2*g.silence)
	}
	g.last = now
	if ack > g.beyond || !now.Before(g.until) {
		return true, 0
	}
	return false, g.until.Sub(now)
}

// renew begins afresh: the peer has just shown, by an answer, that it is the
// backup.
func (g *ackGuard) renew() { *g = ackGuard{silence: g.silence} }

// bootTime is the time since the host was booted, that in which it was suspended
// included: Go's own clock stands still then, and the peer's does not.
func bootTime() time.Time {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return time.Now() // every Linux since 2.6.39 has that clock
	}
	return time.Unix(t.Unix())
}
