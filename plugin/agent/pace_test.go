// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"math/rand/v2"
	"testing"
	"time"
)

// TestPacer drives the pacer with a model of a pair: the backup executes at
// speed parts of a second's worth of the primary's execution in each second.
func TestPacer(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		speed func(second float64) float64
		begin time.Duration // lag at the beginning
	}{
		"as fast":      {func(float64) float64 { return 1.05 }, 0},
		"a bit slower": {func(float64) float64 { return 0.9 }, 0},
		"half":         {func(float64) float64 { return 0.5 }, 0},
		"a quarter":    {func(float64) float64 { return 0.25 }, 0},
		"far behind":   {func(float64) float64 { return 0.8 }, 20 * time.Second},
		"slowed down": {func(s float64) float64 {
			if s < 20 {
				return 1.1
			}
			return 0.4
		}, 0},
	} {
		rng := rand.New(rand.NewPCG(1, 2))
		var p pacer
		now, lag, part := time.Unix(0, 0), tc.begin.Seconds(), 0.0
		var pending []float64 // what was ordered acts a report later
		var lags, parts []float64
		const step = 0.1
		for second := 0.0; second < 60; second += step {
			now = now.Add(100 * time.Millisecond)
			lag = max(0.005, lag+step*((1-part)-tc.speed(second)))
			seen := lag + 0.01*rng.Float64()
			pending = append(pending, p.update(time.Duration(seen*float64(time.Second)), now))
			if len(pending) > 1 {
				part, pending = pending[0], pending[1:]
			}
			lags, parts = append(lags, lag), append(parts, part)
		}
		// Settled: the last twenty seconds.
		tail := len(lags) - 200
		worst, least, most := 0.0, 1.0, 0.0
		for i := tail; i < len(lags); i++ {
			worst, least, most = max(worst, lags[i]), min(least, parts[i]), max(most, parts[i])
		}
		t.Logf("%s: worst lag %.0f ms, part %.2f to %.2f", name, worst*1000, least, most)
		if worst > 0.1 {
			t.Errorf("%s: the lag reaches %.0f ms when settled", name, worst*1000)
		}
		if most-least > 0.2 {
			t.Errorf("%s: the part swings between %.2f and %.2f", name, least, most)
		}
		if name == "as fast" && most > 0.02 {
			t.Errorf("%s: slowed down by %.2f for nothing", name, most)
		}
	}
}
