// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// guard keeps callers apart from storage that hangs. A system call on a dead
// NFS server cannot be interrupted, so each operation runs in a goroutine that
// its caller can leave behind. The number of those left behind is bounded:
// beyond it, operations fail at once.
type guard struct {
	// limit is how many abandoned operations may hang at a time.
	limit int
	// timeout bounds an operation whose caller set no earlier deadline.
	timeout time.Duration

	mu sync.Mutex
	// stuck counts operations that were abandoned and have not returned yet.
	stuck int
	// since is when the oldest series of stuck operations began.
	since time.Time
}

// ticket is one operation under a guard; its fields belong to guard.mu.
type ticket struct {
	started             time.Time
	abandoned, finished bool
}

func (g *guard) admit() (*ticket, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.stuck >= g.limit {
		return nil, fmt.Errorf("%w: storage not answering since %s (%d operations hang)",
			ErrUnavailable, g.since.Format(time.RFC3339), g.stuck)
	}
	return &ticket{started: time.Now()}, nil
}

func (g *guard) abandon(t *ticket) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if t.finished {
		return
	}
	t.abandoned = true
	if g.stuck == 0 {
		g.since = t.started
	}
	g.stuck++
}

func (g *guard) leave(t *ticket) {
	g.mu.Lock()
	defer g.mu.Unlock()
	t.finished = true
	if t.abandoned {
		g.stuck--
	}
}

// do runs fn under g and waits for it as long as ctx and g allow. fn gets a
// context that ends when its caller has gone, and must look at it before each
// step that changes something: a host that gave up must not win hours later.
func do[T any](ctx context.Context, g *guard, what string, fn func(context.Context) (T, error)) (T, error) {
	var none T
	if ctx.Err() != nil {
		return none, gone(ctx, what)
	}
	t, err := g.admit()
	if err != nil {
		return none, fmt.Errorf("%s: %w", what, err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, g.timeout,
		fmt.Errorf("no answer within %v: %w", g.timeout, context.DeadlineExceeded))
	defer cancel()

	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		value, err := fn(ctx)
		g.leave(t)
		done <- result{value, err}
	}()
	var r result
	select {
	case r = <-done:
	case <-ctx.Done():
		select {
		case r = <-done: // Both came at once: an answer is worth more.
		default:
			g.abandon(t)
			return none, gone(ctx, what)
		}
	}
	if r.err != nil {
		return none, fmt.Errorf("%s: %w", what, r.err)
	}
	return r.value, nil
}

// gone says that the caller's time is over while the outcome is not known.
func gone(ctx context.Context, what string) error {
	return fmt.Errorf("%s: %w: %w", what, ErrUnavailable, context.Cause(ctx))
}
