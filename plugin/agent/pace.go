// SPDX-License-Identifier: Apache-2.0

package agent

import "time"

// Constants of the pacer. A backup that replays slower than its primary
// executes makes the lag grow by the difference, as long as the guest is busy.
const (
	// paceTarget is the lag below which nothing is slowed down: most of it is
	// the period in which QEMU tells how far it is.
	paceTarget = 30 * time.Millisecond
	// paceMost is the largest part of its time that a primary is made to
	// pause. It is never stopped: a backup that does not move at all is found
	// by other means.
	paceMost = 0.9
	// paceNow is the part for each second of lag above the target, paceSlope
	// that by which the part grows in each second for each second of lag.
	paceNow   = 6.0
	paceSlope = 4.0
	// paceRelease is how much of the part is given back in each second without
	// lag, and less as the lag is nearer to the target: a backup that lagged for
	// once, as at its start, is no slower for that.
	paceRelease = 0.6
	// paceLearn is the most lag above the target, in seconds, that the part
	// learns from.
	paceLearn = 0.2
	// paceChange is the least change of the part that is worth telling.
	paceChange = 0.01
	// paceStep bounds what a single report may count for.
	paceStep = 250 * time.Millisecond
)

// pacer keeps the execution lag of a backup small by slowing its primary down
// (the paper, section 2.4.1: "we have added an additional mechanism to prevent
// the backup VM from getting too far behind"). It is a controller with a
// proportional and an integral part: the integral learns how much slower the
// backup is, so that the lag settles at the target instead of swinging.
type pacer struct {
	integral float64
	last     time.Time
}

// update takes a report of the lag and returns the part of its time that the
// primary is to pause, 0 to paceMost.
func (p *pacer) update(lag time.Duration, now time.Time) float64 {
	elapsed := min(now.Sub(p.last), paceStep).Seconds()
	if p.last.IsZero() {
		elapsed = 0
	}
	p.last = now
	over := (lag - paceTarget).Seconds()
	if over > 0 {
		// Beyond that more lag tells nothing more about the speed: the part is
		// at its most as it is.
		p.integral += paceSlope * min(over, paceLearn) * elapsed
	} else {
		p.integral += paceRelease * over / paceTarget.Seconds() * elapsed
	}
	p.integral = min(max(p.integral, 0), paceMost)
	return min(max(p.integral+paceNow*max(over, 0), 0), paceMost)
}
