// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

// Retry says how AcquireRetry waits. Zero fields take the defaults.
type Retry struct {
	// Attempt bounds one call of Acquire. Default 2 s.
	Attempt time.Duration
	// Min is the first pause, doubled after each failure. Default 50 ms.
	Min time.Duration
	// Max bounds the pause. Default 2 s.
	Max time.Duration
	// Notify, if set, is told of each attempt that decided nothing, and of
	// the pause that follows. It must not block.
	Notify func(attempt int, err error, pause time.Duration)
}

func (r Retry) withDefaults() Retry {
	if r.Attempt <= 0 {
		r.Attempt = 2 * time.Second
	}
	if r.Min <= 0 {
		r.Min = 50 * time.Millisecond
	}
	if r.Max <= 0 {
		r.Max = 2 * time.Second
	}
	r.Max = max(r.Max, r.Min)
	return r
}

// AcquireRetry acquires like Arbiter.Acquire, but waits for storage that cannot
// be reached or trusted: "if the VM cannot access the shared storage when
// trying to do the atomic operation, then it just waits until it can" (the
// paper, section 2.3). It returns only when the outcome is decided or ctx ends;
// in the latter case the error wraps both the context's and the last cause.
func AcquireRetry(ctx context.Context, a Arbiter, domain plugin.UUID, epoch plugin.Epoch, host string, r Retry) error {
	r = r.withDefaults()
	pause := r.Min
	for attempt := 1; ; attempt++ {
		err := acquireOnce(ctx, a, domain, epoch, host, r.Attempt)
		if decided(err) {
			return err
		}
		// Both hosts lose the storage at the same moment as a rule; jitter
		// keeps them from hammering it in step when it is back.
		wait := pause/2 + rand.N(pause/2+1)
		if r.Notify != nil {
			r.Notify(attempt, err, wait)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("acquiring epoch %d of domain %s: %w (last attempt: %w)",
				epoch, domain, context.Cause(ctx), err)
		case <-timer.C:
		}
		pause = min(2*pause, r.Max)
	}
}

func acquireOnce(ctx context.Context, a Arbiter, domain plugin.UUID, epoch plugin.Epoch, host string, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return a.Acquire(ctx, domain, epoch, host)
}

// decided tells whether asking again could not change the answer. A corrupt
// record is undecided: the domain stays held until a person repaired it.
func decided(err error) bool {
	if err == nil {
		return true
	}
	for _, final := range []error{ErrLost, ErrStale, ErrNoRecord, ErrNotMember, ErrInvalid} {
		if errors.Is(err, final) {
			return true
		}
	}
	return false
}
