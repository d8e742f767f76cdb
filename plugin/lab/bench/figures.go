// SPDX-License-Identifier: Apache-2.0

// Package bench keeps what a benchmark measured, compares it and tells whether
// it is what was aimed at, as a table, as JSON and in plots. It is pure: who
// measures is package scenario.
package bench

import (
	"fmt"
	"math"
	"slices"
	"strconv"
)

// Figures are one quantity, measured again and again.
type Figures []float64

// Median returns the middle one, or the mean of the two in the middle, NaN of
// none.
func (f Figures) Median() float64 {
	if len(f) == 0 {
		return math.NaN()
	}
	sorted, middle := slices.Sorted(slices.Values(f)), len(f)/2
	if len(f)%2 == 0 {
		return (sorted[middle-1] + sorted[middle]) / 2
	}
	return sorted[middle]
}

// Quantile returns the smallest figure that at least the part p of all does not
// exceed, NaN of none.
func (f Figures) Quantile(p float64) float64 {
	if len(f) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(f))
	n := int(math.Ceil(p*float64(len(sorted)))) - 1
	return sorted[min(max(n, 0), len(sorted)-1)]
}

// String is the median with the least and the greatest.
func (f Figures) String() string {
	switch len(f) {
	case 0:
		return "-"
	case 1:
		return short(f[0])
	}
	return fmt.Sprintf("%s (%s..%s)", short(f.Median()), short(slices.Min(f)), short(slices.Max(f)))
}

// short has three digits, or all before the point.
func short(v float64) string {
	if math.IsNaN(v) {
		return "-"
	}
	digits := 0
	for m := math.Abs(v); m < 100 && digits < 3; digits++ {
		m *= 10
	}
	return strconv.FormatFloat(v, 'f', digits, 64)
}

// Measurement is what one workload took in one configuration, once for each
// round.
type Measurement struct {
	Workload string `json:"workload"`
	Config   string `json:"config"`
	Unit     string `json:"unit"`
	// Rate tells that more is better. Else the figures are times, and less is.
	Rate    bool    `json:"rate"`
	Figures Figures `json:"figures"`
	// Note tells why there are no figures.
	Note string `json:"note,omitempty"`
}

// Speed returns how much faster the candidate is than the baseline, round by
// round: 1 is as fast. Rounds that only one of them has do not count.
func Speed(candidate, baseline *Measurement) Figures {
	if candidate == nil || baseline == nil {
		return nil
	}
	var ratios Figures
	for i := range min(len(candidate.Figures), len(baseline.Figures)) {
		c, b := candidate.Figures[i], baseline.Figures[i]
		if !candidate.Rate {
			c, b = b, c
		}
		if b > 0 {
			ratios = append(ratios, c/b)
		}
	}
	return ratios
}
