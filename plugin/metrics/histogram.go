// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"slices"
	"sync"
	"time"
)

// Histogram counts durations by class. It may be used by several goroutines.
type Histogram struct {
	bounds []time.Duration

	mu     sync.Mutex
	counts []uint64 // one more than bounds
	sum    time.Duration
}

// NewHistogram makes one with the given upper bounds, in ascending order.
func NewHistogram(bounds []time.Duration) *Histogram {
	return &Histogram{bounds: bounds, counts: make([]uint64, len(bounds)+1)}
}

// Observe counts d.
func (h *Histogram) Observe(d time.Duration) {
	i, _ := slices.BinarySearch(h.bounds, d)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.counts[i]++
	h.sum += d
}

func (h *Histogram) read() distribution {
	h.mu.Lock()
	defer h.mu.Unlock()
	return distribution{h.bounds, slices.Clone(h.counts), h.sum}
}

// distribution is a histogram that stands still.
type distribution struct {
	bounds []time.Duration
	counts []uint64 // one more than bounds
	sum    time.Duration
}

// cumulative gives it as Prometheus has it: how many there are in all, and up
// to each bound in seconds.
func (d distribution) cumulative() (uint64, map[float64]uint64) {
	var count uint64
	buckets := make(map[float64]uint64, len(d.bounds))
	for i, n := range d.counts {
		count += n
		if i < len(d.bounds) {
			buckets[d.bounds[i].Seconds()] = count
		}
	}
	return count, buckets
}
