// SPDX-License-Identifier: Apache-2.0

package arbiter_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/arbiter/arbitertest"
	"ftvirt.org/ftvirt/plugin"
)

func TestMayStart(t *testing.T) {
	undecided := arbiter.Record{Epoch: 3, Primary: "a", Backup: "b"}
	ownedByA := arbiter.Record{Epoch: 3, Primary: "a", Backup: "b", Owner: "a"}
	closed := arbiter.Record{Epoch: 3, Primary: "a", Backup: "b", Owner: "a", Closed: true}
	for _, c := range []struct {
		name     string
		rec      arbiter.Record
		host     string
		asBackup bool
		want     arbiter.Decision
	}{
		{"no record", arbiter.Record{}, "a", false, arbiter.StartAllowed},
		{"no record, as backup", arbiter.Record{}, "b", true, arbiter.StartAllowed},
		{"closed, primary", closed, "a", false, arbiter.StartAllowed},
		{"closed, backup", closed, "b", false, arbiter.StartRefused},
		{"closed, third", closed, "c", false, arbiter.StartRefused},
		{"owner", ownedByA, "a", false, arbiter.StartAllowed},
		{"owner, as backup", ownedByA, "a", true, arbiter.StartAllowed},
		{"loser", ownedByA, "b", false, arbiter.StartRefused},
		{"loser, as backup of the old epoch", ownedByA, "b", true, arbiter.StartRefused},
		{"owned, third", ownedByA, "c", false, arbiter.StartRefused},
		{"undecided, backup as backup", undecided, "b", true, arbiter.StartAllowed},
		{"undecided, backup on its own", undecided, "b", false, arbiter.StartRefused},
		{"undecided, primary", undecided, "a", false, arbiter.StartAfterAcquire},
		{"undecided, primary as backup", undecided, "a", true, arbiter.StartAfterAcquire},
		{"undecided, third", undecided, "c", false, arbiter.StartRefused},
		{"undecided, third as backup", undecided, "c", true, arbiter.StartRefused},
		{"undecided, nobody", undecided, "", true, arbiter.StartRefused},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := arbiter.MayStart(c.rec, c.host, c.asBackup)
			if got.Decision != c.want || got.Reason == "" {
				t.Errorf("%v (%q), want %v", got.Decision, got.Reason, c.want)
			}
		})
	}
	if (arbiter.Verdict{}).Decision != arbiter.StartRefused {
		t.Error("the zero verdict does not refuse")
	}
}

func TestMemory(t *testing.T) {
	targets := make(map[string]*arbitertest.Memory)
	arbitertest.Run(t, arbitertest.Backend{
		New: func(testing.TB) string {
			target := fmt.Sprintf("memory-%d", len(targets))
			targets[target] = arbitertest.NewMemory()
			return target
		},
		Connect: func(target string) (arbiter.Arbiter, error) { return targets[target], nil },
		Break: func(_ testing.TB, target string) func() {
			targets[target].SetUnavailable(errors.New("cable pulled"))
			return func() { targets[target].SetUnavailable(nil) }
		},
	})
}

// scripted is an arbiter of which only Acquire answers, one error at a time.
type scripted struct {
	arbiter.Arbiter
	answers []error
	calls   []time.Time
}

func (s *scripted) Acquire(context.Context, plugin.UUID, plugin.Epoch, string) error {
	s.calls = append(s.calls, time.Now())
	answer := s.answers[0]
	if len(s.answers) > 1 {
		s.answers = s.answers[1:]
	}
	return answer
}

func TestAcquireRetryDecides(t *testing.T) {
	for _, final := range []error{
		nil,
		&arbiter.LostError{Winner: "b"},
		&arbiter.LostError{Winner: "b", Closed: true},
		&arbiter.StaleError{Newest: 9},
		fmt.Errorf("wrapped: %w", arbiter.ErrNoRecord),
		arbiter.ErrNotMember,
		arbiter.ErrInvalid,
	} {
		synctest.Test(t, func(t *testing.T) {
			s := &scripted{answers: []error{
				arbiter.ErrUnavailable, &arbiter.CorruptError{Path: "p", Reason: "r"}, errors.New("odd"), final,
			}}
			err := arbiter.AcquireRetry(t.Context(), s, testDomain, 1, "a", arbiter.Retry{})
			if !errors.Is(err, final) || len(s.calls) != 4 {
				t.Errorf("%v after %d calls, want %v after 4", err, len(s.calls), final)
			}
		})
	}
}

func TestAcquireRetryBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &scripted{answers: []error{arbiter.ErrUnavailable}}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		notified := 0
		r := arbiter.Retry{Min: 100 * time.Millisecond, Max: 4 * time.Second, Notify: func(attempt int, err error, pause time.Duration) {
			notified++
			if attempt != notified || !errors.Is(err, arbiter.ErrUnavailable) || pause <= 0 || pause > 4*time.Second {
				t.Errorf("attempt %d: %v, pause %v", attempt, err, pause)
			}
		}}
		start := time.Now()
		err := arbiter.AcquireRetry(ctx, s, testDomain, 1, "a", r)
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, arbiter.ErrUnavailable) {
			t.Errorf("error %v", err)
		}
		if took := time.Since(start); took != time.Minute {
			t.Errorf("returned after %v", took)
		}
		pause := r.Min
		for i := 1; i < len(s.calls); i++ {
			if got := s.calls[i].Sub(s.calls[i-1]); got < pause/2 || got > pause {
				t.Errorf("pause %d is %v, want %v to %v", i, got, pause/2, pause)
			}
			pause = min(2*pause, r.Max)
		}
		if len(s.calls) < 15 || len(s.calls) > 40 {
			t.Errorf("%d calls in a minute", len(s.calls))
		}
	})
}
