// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// through sends numbered frames, one each millisecond, and returns those that
// came out, in order, and the latest delay.
func through(w Weather, frames int) (order []int, latest time.Duration) {
	random := rand.New(rand.NewPCG(1, 2))
	q := newFrameQueue(w, random.Float64)
	start := time.Unix(0, 0)
	for ms := 0; ms < frames+1000; ms++ {
		now := start.Add(time.Duration(ms) * time.Millisecond)
		if ms < frames {
			q.push([]byte{byte(ms >> 8), byte(ms)}, now)
		}
		for {
			frame, _ := q.pop(now)
			if frame == nil {
				break
			}
			number := int(frame[0])<<8 | int(frame[1])
			order = append(order, number)
			latest = max(latest, time.Duration(ms-number)*time.Millisecond)
		}
	}
	return order, latest
}

func TestWeather(t *testing.T) {
	const frames = 1000
	for name, test := range map[string]struct {
		weather  Weather
		fewest   int
		most     int
		inOrder  bool
		earliest time.Duration
		latest   time.Duration
	}{
		"fine":    {Weather{}, frames, frames, true, 0, 0},
		"cut":     {Weather{Cut: true}, 0, 0, true, 0, 0},
		"delay":   {Weather{Delay: 30 * time.Millisecond}, frames, frames, true, 30 * time.Millisecond, 30 * time.Millisecond},
		"jitter":  {Weather{Delay: 30 * time.Millisecond, Jitter: 20 * time.Millisecond}, frames, frames, true, 40 * time.Millisecond, 51 * time.Millisecond},
		"reorder": {Weather{Jitter: 20 * time.Millisecond, Reorder: true}, frames, frames, false, 10 * time.Millisecond, 21 * time.Millisecond},
		"drop":    {Weather{Drop: 0.2}, 700, 900, true, 0, 0},
	} {
		order, latest := through(test.weather, frames)
		if len(order) < test.fewest || len(order) > test.most || slices.IsSorted(order) != test.inOrder {
			t.Errorf("%s: %d frames, in order: %v", name, len(order), slices.IsSorted(order))
		}
		if latest < test.earliest || latest > test.latest {
			t.Errorf("%s: the latest frame took %v", name, latest)
		}
		if duplicates := len(order) - len(slices.Compact(slices.Sorted(slices.Values(order)))); duplicates != 0 {
			t.Errorf("%s: %d frames twice", name, duplicates)
		}
	}
}
