// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"testing"
	"time"

	"ftvirt.org/ftvirt/arbiter"
)

func at(ms int) time.Time { return time.UnixMilli(int64(ms)) }

func TestSplits(t *testing.T) {
	type frame struct {
		host string
		ms   int
	}
	tests := map[string]struct {
		frames  []frame
		decided []Decision
		want    int
	}{
		"alone": {[]frame{{"a", 1}, {"a", 2}}, []Decision{{0, "a", at(0)}}, 0},
		"failover": {
			[]frame{{"a", 1}, {"a", 4}, {"b", 5}, {"b", 6}},
			[]Decision{{0, "a", at(0)}, {1, "b", at(3)}}, 0,
		},
		"there and back": {
			[]frame{{"a", 1}, {"b", 5}, {"a", 9}},
			[]Decision{{0, "a", at(0)}, {1, "b", at(3)}, {2, "a", at(8)}}, 0,
		},
		"one that was never seen": {
			[]frame{{"a", 1}, {"c", 9}},
			[]Decision{{0, "a", at(0)}, {1, "b", at(3)}, {2, "c", at(8)}}, 0,
		},
		"the old copy once more": {
			[]frame{{"a", 1}, {"b", 5}, {"a", 6}, {"b", 7}},
			[]Decision{{0, "a", at(0)}, {1, "b", at(3)}}, 1,
		},
		"the old copy, which is chosen again later": {
			[]frame{{"a", 1}, {"b", 5}, {"a", 6}, {"b", 7}, {"a", 9}},
			[]Decision{{0, "a", at(0)}, {1, "b", at(3)}, {2, "a", at(8)}}, 1,
		},
		"two at once": {
			[]frame{{"a", 1}, {"b", 5}, {"a", 6}, {"b", 7}, {"a", 8}, {"b", 9}},
			[]Decision{{0, "a", at(0)}, {1, "b", at(3)}}, 2,
		},
		"before the decision": {
			[]frame{{"a", 1}, {"b", 2}},
			[]Decision{{0, "a", at(0)}, {1, "b", at(3)}}, 1,
		},
		"without one": {[]frame{{"a", 1}, {"b", 2}}, []Decision{{0, "a", at(0)}}, 1},
	}
	for name, test := range tests {
		var seen reigns
		for _, f := range test.frames {
			seen.see(f.host, at(f.ms))
		}
		if got := Splits(seen, test.decided); len(got) != test.want {
			t.Errorf("%s: got %d splits, want %d: %q", name, len(got), test.want, got)
		}
	}
}

func TestReigns(t *testing.T) {
	var seen reigns
	for i, host := range []string{"a", "a", "b", "a"} {
		seen.see(host, at(i))
	}
	want := reigns{{"a", at(0), at(1), 2}, {"b", at(2), at(2), 1}, {"a", at(3), at(3), 1}}
	if len(seen) != len(want) {
		t.Fatalf("got %v, want %v", seen, want)
	}
	for i := range want {
		if seen[i] != want[i] {
			t.Errorf("%d: got %v, want %v", i, seen[i], want[i])
		}
	}
}

// The witness sees the arbiter now and then only.
func TestDecisions(t *testing.T) {
	w := &Witness{decided: []Decision{{Host: "a"}}}
	for _, r := range []arbiter.Record{
		{Epoch: 1, Primary: "a", Backup: "b", OpenedAt: at(1)},
		{Epoch: 1, Primary: "a", Backup: "b", OpenedAt: at(1), Owner: "b", DecidedAt: at(2)},
		{Epoch: 1, Primary: "a", Backup: "b", OpenedAt: at(1), Owner: "b", DecidedAt: at(2)},
		{Epoch: 2, Primary: "b", Backup: "c", OpenedAt: at(3), Owner: "b", DecidedAt: at(4)},
		// That c won epoch 3 was missed.
		{Epoch: 4, Primary: "c", Backup: "a", OpenedAt: at(6), Owner: "a", DecidedAt: at(7)},
	} {
		w.note(r)
	}
	want := []Decision{{0, "a", time.Time{}}, {1, "b", at(2)}, {3, "c", at(6)}, {4, "a", at(7)}}
	if len(w.decided) != len(want) {
		t.Fatalf("got %v, want %v", w.decided, want)
	}
	for i := range want {
		if w.decided[i] != want[i] {
			t.Errorf("%d: got %v, want %v", i, w.decided[i], want[i])
		}
	}
}
