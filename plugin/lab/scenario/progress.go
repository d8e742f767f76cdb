// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// progress is what a client of a guest got done, step by step.
type progress struct {
	mu    sync.Mutex
	count int
	last  time.Time
	gap   time.Duration // the longest between two steps
	err   error
}

// advance counts a step.
func (p *progress) advance() {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if !p.last.IsZero() {
		p.gap = max(p.gap, now.Sub(p.last))
	}
	p.count, p.last = p.count+1, now
}

// fail keeps the first fault; there is no progress after it.
func (p *progress) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil {
		p.err = err
	}
}

// Count is the number of steps so far.
func (p *progress) Count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count
}

// forgetGap begins anew with the longest gap.
func (p *progress) forgetGap() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gap = 0
}

// Gap is the longest time between two steps since then.
func (p *progress) Gap() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.gap
}

// Err tells what was wrong so far.
func (p *progress) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// await waits for two more steps: the first may have been on its way already.
func (p *progress) await(ctx context.Context, what string, limit time.Duration) error {
	before := p.Count()
	err := poll(ctx, limit, func(context.Context) (bool, error) {
		return p.Count() >= before+2, p.Err()
	})
	if err != nil {
		return fmt.Errorf("%s, after %d: %w", what, p.Count(), err)
	}
	return nil
}
