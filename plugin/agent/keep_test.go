// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/config"
)

func TestBackoff(t *testing.T) {
	t.Parallel()
	b := newBackoff(time.Second, 4*time.Second)
	now := time.Unix(1000, 0)
	// waits looks until a try is due, and returns how long that was.
	waits := func() time.Duration {
		t.Helper()
		begin := now
		for !b.due(now) {
			now = now.Add(100 * time.Millisecond)
			if now.Sub(begin) > time.Minute {
				t.Fatal("never due")
			}
		}
		return now.Sub(begin)
	}
	for i, want := range []time.Duration{1, 2, 4, 4} {
		if got := waits(); got != want*time.Second {
			t.Errorf("try %d came after %v, want %v s", i, got, want)
		}
		b.tried()
	}
	b.rest(false, now) // cloning
	if got := waits(); got != 4*time.Second {
		t.Errorf("after a clone that failed: %v", got)
	}
	b.tried()
	b.rest(true, now)
	now = now.Add(stablePeriod / 2)
	b.rest(true, now)
	if got := waits(); got != 4*time.Second {
		t.Errorf("after a pair that did not last: %v", got)
	}
	b.tried()
	b.rest(true, now)
	b.rest(true, now.Add(stablePeriod))
	if got := waits(); got != time.Second {
		t.Errorf("after a pair that lasted: %v", got)
	}
	b.tried()
	b.reset()
	if got := waits(); got != time.Second {
		t.Errorf("after a reset: %v", got)
	}
}

func TestCandidates(t *testing.T) {
	t.Parallel()
	cfg := config.Default()
	cfg.Host = "b"
	cfg.Peers = map[string]config.Peer{"a": {}, "b": {}, "c": {}, "d": {}}
	d := newDomain(&Agent{cfg: cfg}, plugin.UUID{1})
	for _, tc := range []struct{ wanted, avoid, want string }{
		{"", "", "acd"},
		{"c", "", "cad"},
		{"c", "c", "adc"},
		{"c", "a", "cda"},
		{"b", "", "acd"}, // this host
		{"x", "", "acd"}, // not configured any more
	} {
		d.setAvoid(tc.avoid)
		var got string
		for _, name := range d.candidates(tc.wanted) {
			got += name
		}
		if got != tc.want {
			t.Errorf("%+v: got %s", tc, got)
		}
	}
}
