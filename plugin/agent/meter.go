// SPDX-License-Identifier: Apache-2.0

package agent

import "time"

// meter measures a rate over the last seconds: the bytes of whole seconds,
// smoothed, so that the figure neither jumps nor lags by much.
type meter struct {
	since  time.Time
	bytes  int
	smooth float64 // bytes per second
}

const meterPeriod = time.Second

func (m *meter) add(n int, now time.Time) {
	m.roll(now)
	m.bytes += n
}

// rate gives bytes per second.
func (m *meter) rate(now time.Time) float64 {
	m.roll(now)
	return m.smooth
}

func (m *meter) roll(now time.Time) {
	if m.since.IsZero() {
		m.since = now
		return
	}
	passed := now.Sub(m.since)
	if passed < meterPeriod {
		return
	}
	rate := float64(m.bytes) / passed.Seconds()
	if m.smooth == 0 || passed > 3*meterPeriod {
		m.smooth = rate
	} else {
		m.smooth += (rate - m.smooth) / 2
	}
	m.since, m.bytes = now, 0
}
