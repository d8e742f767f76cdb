// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/pair"
)

// methodArbiter asks the backup's host whether the arbiter would answer it.
const methodArbiter = "arbiter.probe"

// ErrArbiter is wrapped where a user's request is refused because the arbiter,
// which would be asked next, does not answer.
var ErrArbiter = errors.New("the arbiter does not answer, and the pair stays as it is; try again when it does, see 'ftvirt doctor'")

// requestTimeout is more than the machine gives the arbiter.
const requestTimeout = 10 * time.Second

// waiter waits for the machine's answer to a user's request.
type waiter struct {
	request pair.EventKind
	refused chan bool
}

// request has the machine carry out what a user asks for. If it does not, all
// is as it was.
func (d *domain) request(ctx context.Context, kind pair.EventKind) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	w := waiter{kind, make(chan bool, 1)}
	d.mu.Lock()
	d.waiters, d.probeErr = append(d.waiters, w), nil
	d.mu.Unlock()
	defer d.unwait(w)
	d.post(pair.Event{Kind: kind})
	select {
	case refused := <-w.refused:
		if !refused {
			return nil
		}
	case <-ctx.Done():
		return fmt.Errorf("the agent does not get to it: %w", context.Cause(ctx))
	}
	d.mu.Lock()
	err := d.probeErr
	d.mu.Unlock()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrArbiter, err)
	}
	s, _, _, _ := d.snapshot()
	return fmt.Errorf("it cannot be done now: the domain is %s", s)
}

func (d *domain) unwait(w waiter) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.waiters = slices.DeleteFunc(d.waiters, func(o waiter) bool { return o == w })
}

// answer tells who waits for it what became of a request.
func (d *domain) answer(act pair.Action) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, w := range d.waiters {
		if w.request == act.Request && len(w.refused) == 0 {
			w.refused <- act.Refused
		}
	}
}

// probe finds out for the machine whether those who will have to ask the arbiter
// would get an answer.
func (d *domain) probe(ctx context.Context, act pair.Action, p *primary) {
	d.a.wg.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, arbiterTimeout)
		defer cancel()
		err := d.a.probeArbiter(ctx, d.id, act.Epoch)
		if err == nil && act.Request == pair.EventUserFailover {
			err = errors.New("the data path is gone")
			if p != nil {
				if err = p.Call(ctx, methodArbiter, struct{}{}, nil); err != nil {
					err = fmt.Errorf("on host %s: %w", act.Peer, err)
				}
			}
		}
		ev := pair.Event{Kind: pair.EventArbiterAnswers, Epoch: act.Epoch}
		if err != nil {
			d.a.log.Warn("a request waits for an arbiter that does not answer", "domain", d.label(), "request", act.Request, "error", err)
			ev.Kind = pair.EventArbiterSilent
			d.mu.Lock()
			d.probeErr = err
			d.mu.Unlock()
		}
		d.post(ev)
	})
}

// probeArbiter tells what would keep the arbiter from deciding an epoch now, as
// seen from this host.
func (a *Agent) probeArbiter(ctx context.Context, id plugin.UUID, epoch plugin.Epoch) error {
	rec, err := a.arbiter.Lookup(ctx, id)
	if err != nil {
		return err
	}
	if rec.Epoch != epoch {
		return fmt.Errorf("the newest epoch at the arbiter is %d, not %d", rec.Epoch, epoch)
	}
	return a.arbiter.Probe(ctx, id)
}

// answersHere serves methodArbiter.
func (b *backup) answersHere(ctx context.Context, _ struct{}) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, arbiterTimeout)
	defer cancel()
	return struct{}{}, b.d.a.probeArbiter(ctx, b.d.id, b.epoch)
}
