// SPDX-License-Identifier: Apache-2.0

package agent

import "testing"

func TestSilence(t *testing.T) {
	t.Parallel()
	var s silence
	expect := func(report int, silent, spoke bool) {
		t.Helper()
		if a, b := s.tick(report); a != silent || b != spoke {
			t.Fatalf("report %d after %d silent ticks: %v, %v; want %v, %v", report, s.ticks, a, b, silent, spoke)
		}
	}
	// Reports that come often enough are no silence, nor is one that ends just
	// before the limit.
	for report := range 5 {
		for range silentTicks {
			expect(report, false, false)
		}
	}
	// It is told once, however long it lasts, and so is its end.
	expect(5, false, false)
	for range silentTicks - 1 {
		expect(5, false, false)
	}
	expect(5, true, false)
	for range 3 * silentTicks {
		expect(5, false, false)
	}
	expect(6, false, true)
	expect(7, false, false)
}
