// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

// wild is a clock that nobody has set right: it jumps by up to ten hours, in both
// directions, whenever somebody looks at it.
func wild(rng *rand.Rand) func() time.Time {
	return func() time.Time { return time.Now().Add(time.Duration(rng.Int64N(int64(20*time.Hour))) - 10*time.Hour) }
}

// The times of records are for people: no decision follows from them.
func TestClocksDecideNothing(t *testing.T) {
	t.Parallel()
	domain := plugin.UUID{1}
	path := t.TempDir()
	if _, err := InitDir(t.Context(), DirConfig{Path: path}); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	host := map[string]*Dir{}
	for _, name := range []string{"a", "b"} {
		d, err := NewDir(DirConfig{Path: path, Clock: wild(rng)})
		if err != nil {
			t.Fatal(err)
		}
		host[name] = d
	}
	winner, loser := "a", "b"
	for want := plugin.Epoch(1); want <= 40; want++ {
		epoch, err := host[winner].Open(t.Context(), domain, winner, loser)
		if err != nil || epoch != want {
			t.Fatalf("epoch %d, %v; want %d", epoch, err, want)
		}
		if rng.IntN(2) == 0 {
			winner, loser = loser, winner
		}
		if err := host[winner].Acquire(t.Context(), domain, epoch, winner); err != nil {
			t.Fatal(err)
		}
		var lost *LostError
		if err := host[loser].Acquire(t.Context(), domain, epoch, loser); !errors.As(err, &lost) || lost.Winner != winner {
			t.Fatalf("epoch %d, which %s has: %v", epoch, winner, err)
		}
	}
}

// The same of the kinds that keep a register: what they do is a function of the
// state, and of the time for people alone.
func TestClocksDecideNothingInRegisters(t *testing.T) {
	t.Parallel()
	domain := plugin.UUID{1}
	play := func(now func() time.Time) []Record {
		var s state
		var err error
		var seen []Record
		see := func(next state, failure error) {
			s, err = next, failure
			if err != nil {
				t.Fatal(err)
			}
			r := s.rec
			r.OpenedAt, r.DecidedAt, r.ClosedAt = time.Time{}, time.Time{}, time.Time{}
			seen = append(seen, r)
		}
		for epoch := plugin.Epoch(1); epoch <= 20; epoch++ {
			see(s.open(domain, "a", "b", newToken(), now()))
			see(s.acquire(domain, epoch, "b", now()))
			if _, err := s.acquire(domain, epoch, "a", now()); !errors.Is(err, ErrLost) {
				t.Fatalf("epoch %d was won twice: %v", epoch, err)
			}
			see(s.close(domain, epoch, "b", now()))
		}
		return seen
	}
	right, wrong := play(time.Now), play(wild(rand.New(rand.NewPCG(3, 4))))
	for i := range right {
		if right[i] != wrong[i] {
			t.Fatalf("step %d: %+v, with a wrong clock %+v", i, right[i], wrong[i])
		}
	}
}

// A witness whose clock was put back tells of strangers all the same.
func TestComplaintsOfAWitness(t *testing.T) {
	t.Parallel()
	var c complaints
	now := time.Now()
	for _, step := range []struct {
		after time.Duration
		due   bool
	}{{0, true}, {time.Second, false}, {complainEach, false}, {complainEach + 1, true}, {complainEach + 2, false}} {
		if due := c.due(now.Add(step.after)); due != step.due {
			t.Errorf("after %v: %v", step.after, due)
		}
	}
}
