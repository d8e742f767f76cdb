// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"context"
	"errors"
	"fmt"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

// register is storage that holds one state for each domain and can replace it
// atomically. A domain that it never heard of has the zero state.
type register interface {
	// update lets change say what follows the domain's state, and stores that
	// unless somebody else was faster; then it asks change again. When it
	// returns nil or the error of change, the state that change was given
	// last is durable, and so is what change made of it. Any other error
	// wraps ErrUnavailable or ErrCorrupt, and what was stored is not known.
	update(ctx context.Context, domain plugin.UUID, change func(state) (state, error)) error
	// forget is update with state.forget, which must also do for a domain
	// whose state cannot be trusted, if anything tells its newest epoch.
	forget(ctx context.Context, domain plugin.UUID) error
	// probe changes something that is nobody's.
	probe(ctx context.Context) error
}

// registered is the arbiter on a register.
type registered struct {
	reg   register
	seen  *Seen
	guard *guard
}

// change is the register's update, with what is read held against what this host
// has seen.
func (r registered) change(ctx context.Context, domain plugin.UUID, change func(state) (state, error)) error {
	known, err := r.seen.recall()
	if err != nil {
		return err
	}
	var last state
	err = r.reg.update(ctx, domain, func(s state) (state, error) {
		last = s
		if err := known.check(domain, s); err != nil {
			return s, err
		}
		next, err := change(s)
		if err == nil {
			last = next
		}
		return next, err
	})
	if last.from != "" && !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrCorrupt) {
		r.seen.note(domain, last)
	}
	return err
}

// ID gives the identity of the LUN, or of the witnesses together, for hosts to make
// sure that they ask the same.
func (r registered) ID(ctx context.Context) (string, error) {
	return do(ctx, r.guard, "reading the arbiter's identity", func(ctx context.Context) (id string, err error) {
		err = r.reg.update(ctx, plugin.UUID{}, func(s state) (state, error) {
			id = s.from
			return s, nil
		})
		return id, err
	})
}

// update runs change under the guard.
func (r registered) update(ctx context.Context, domain plugin.UUID, what string, change func(state) (state, error)) error {
	_, err := do(ctx, r.guard, what, func(ctx context.Context) (struct{}, error) {
		return struct{}{}, r.change(ctx, domain, change)
	})
	return err
}

// Open implements Arbiter.
func (r registered) Open(ctx context.Context, domain plugin.UUID, primary, backup string) (plugin.Epoch, error) {
	if err := checkHosts(primary, backup); err != nil {
		return 0, err
	}
	what := fmt.Sprintf("opening an epoch of domain %s", domain)
	return do(ctx, r.guard, what, func(ctx context.Context) (plugin.Epoch, error) {
		var epoch plugin.Epoch
		token, now := newToken(), timestamp()
		err := r.change(ctx, domain, func(s state) (state, error) {
			next, err := s.open(domain, primary, backup, token, now)
			epoch = next.rec.Epoch
			return next, err
		})
		if err != nil {
			return 0, err
		}
		return epoch, nil
	})
}

// Acquire implements Arbiter.
func (r registered) Acquire(ctx context.Context, domain plugin.UUID, epoch plugin.Epoch, host string) error {
	if err := checkHost(host); err != nil {
		return err
	}
	what := fmt.Sprintf("acquiring epoch %d of domain %s for host %s", epoch, domain, host)
	now := timestamp()
	return r.update(ctx, domain, what, func(s state) (state, error) { return s.acquire(domain, epoch, host, now) })
}

// Lookup implements Arbiter.
func (r registered) Lookup(ctx context.Context, domain plugin.UUID) (Record, error) {
	what := fmt.Sprintf("looking up domain %s", domain)
	return do(ctx, r.guard, what, func(ctx context.Context) (Record, error) {
		var rec Record
		err := r.change(ctx, domain, func(s state) (state, error) {
			rec = s.rec
			return s, nil
		})
		switch {
		case err != nil:
			return Record{}, err
		case rec.Epoch == 0:
			return Record{}, fmt.Errorf("%w: domain %s", ErrNoRecord, domain)
		}
		return rec, nil
	})
}

// Close implements Arbiter.
func (r registered) Close(ctx context.Context, domain plugin.UUID, epoch plugin.Epoch, host string) error {
	if err := checkHost(host); err != nil {
		return err
	}
	what := fmt.Sprintf("closing epoch %d of domain %s for host %s", epoch, domain, host)
	now := timestamp()
	return r.update(ctx, domain, what, func(s state) (state, error) { return s.close(domain, epoch, host, now) })
}

// Probe implements Arbiter.
func (r registered) Probe(ctx context.Context, domain plugin.UUID) error {
	what := fmt.Sprintf("probing the arbiter of domain %s", domain)
	_, err := do(ctx, r.guard, what, func(ctx context.Context) (struct{}, error) {
		if err := r.change(ctx, domain, func(s state) (state, error) { return s, nil }); err != nil {
			return struct{}{}, err
		}
		return struct{}{}, r.reg.probe(ctx)
	})
	return err
}

// Forget implements Arbiter. The fence stays behind.
func (r registered) Forget(ctx context.Context, domain plugin.UUID) error {
	what := fmt.Sprintf("forgetting domain %s", domain)
	_, err := do(ctx, r.guard, what, func(ctx context.Context) (struct{}, error) {
		return struct{}{}, r.reg.forget(ctx, domain)
	})
	return err
}

// timestamp is the time as it survives storage: no monotonic reading, no zone.
func timestamp() time.Time { return time.Now().UTC().Round(time.Millisecond) }
