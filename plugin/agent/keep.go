// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/pair"
	"ftvirt.org/ftvirt/plugin/virt"
)

// keepPeriod is between two looks at whether a domain is as its annotation
// wants it, unless something happens to it before.
const keepPeriod = time.Second

// stablePeriod is how long a pair must last before its next loss counts as a
// first one again. A shorter one looks like a clone that failed.
const stablePeriod = 10 * time.Second

// keep makes the domain what its annotation asks for, as long as the agent
// runs: protected by some peer, or by none. It is the only one that protects a
// domain again whose backup was lost.
func (d *domain) keep(ctx context.Context) {
	t := time.NewTicker(keepPeriod)
	defer t.Stop()
	pause := newBackoff(d.a.cfg.Protect.RetryMin, d.a.cfg.Protect.RetryMax)
	followed := true
	for {
		select {
		case <-t.C:
			if !followed {
				followed = d.follow(ctx) == nil
			}
		case <-d.kicked:
			pause.reset()
			err := d.follow(ctx)
			if err != nil && followed && ctx.Err() == nil {
				d.a.log.Warn("the annotation is not followed yet", "domain", d.label(), "error", err)
				d.setFailure(err)
			}
			followed = err == nil
		case <-ctx.Done():
			return
		}
		d.settleDefinition(ctx, time.Now())
		switch now := time.Now(); {
		case !d.alone():
			s, _, _, _ := d.snapshot()
			pause.rest(s.State == pair.Protected, now)
		case !d.a.cfg.Protect.Auto || !pause.due(now):
		default:
			err := d.protectAgain(ctx)
			pause.tried()
			if err != nil && ctx.Err() == nil {
				d.a.log.Warn("the domain has no backup", "domain", d.label(), "error", err, "next_try", pause.pause)
				d.setFailure(err)
			}
		}
		d.setRetry(pause.next)
	}
}

// alone tells whether the domain runs here without a backup, and nothing is
// under way that would change that.
func (d *domain) alone() bool {
	d.mu.Lock()
	s, v, busy := d.status, d.vm, d.clones > 0 || d.adoptions > 0
	d.mu.Unlock()
	if v == nil || busy || s.Asking || s.Removing {
		return false
	}
	over := s.State == pair.Unprotected || s.State == pair.Live || s.State == pair.Failed
	mode := v.reports().Mode
	return over && (mode == control.ModeIdle || mode == control.ModeLive)
}

// wish reads the domain's annotation. What the operator wrote into the
// definition counts; a copy that has none yet, having just gone live, carries
// that of its primary.
func (d *domain) wish(ctx context.Context) (hooks.Annotation, virt.Info, error) {
	info, err := d.a.virt.Lookup(ctx, d.id)
	if err != nil {
		return hooks.Annotation{}, info, err
	}
	text, err := d.a.virt.XML(ctx, d.id, info.Persistent)
	if err != nil {
		return hooks.Annotation{}, info, err
	}
	dom, err := hooks.Parse([]byte(text))
	if err != nil {
		return hooks.Annotation{}, info, err
	}
	wish, _, err := hooks.ReadAnnotation(dom)
	return wish, info, err
}

// follow takes the protection away that the annotation no longer asks for. With
// an error, such as of an arbiter that does not answer, the pair stays.
func (d *domain) follow(ctx context.Context) error {
	s, _, p, _ := d.snapshot()
	if p == nil || s.State != pair.Protected && s.State != pair.Cloning {
		return nil
	}
	wish, _, err := d.wish(ctx)
	if err != nil {
		d.a.log.Warn("annotation", "domain", d.label(), "error", err)
		return nil
	}
	if wish.Mode == hooks.ModeProtected {
		return nil
	}
	if err := d.request(ctx, pair.EventUserDisable); err != nil {
		return fmt.Errorf("the annotation asks for no backup any more: %w", err)
	}
	d.a.log.Info("the annotation asks for no backup any more", "domain", d.label())
	d.setFailure(nil)
	if wish.Mode == "" {
		d.a.wg.Go(func() { d.forgetReplicas(ctx) })
	}
	return nil
}

// protectAgain gives the domain the backup that it should have. It returns nil
// if it should have none, or once a clone has begun.
func (d *domain) protectAgain(ctx context.Context) error {
	wish, info, err := d.wish(ctx)
	if errors.Is(err, virt.ErrNoDomain) {
		return nil
	}
	if err != nil {
		return err
	}
	if wish.Mode != hooks.ModeProtected || !info.Active {
		return nil
	}
	var errs []error
	for _, peer := range d.candidates(wish.Peer) {
		err := d.enable(ctx, info, peer)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
		if !errors.Is(err, ErrPeer) {
			break // no other peer would make a difference
		}
	}
	if len(errs) == 0 {
		return errors.New("no peers are configured")
	}
	return errors.Join(errs...)
}

// candidates lists the hosts that may run the backup, the most wanted first.
// The one on which a clone has just failed comes last.
func (d *domain) candidates(wanted string) []string {
	d.mu.Lock()
	avoid := d.avoid
	d.mu.Unlock()
	list := slices.DeleteFunc(slices.Sorted(maps.Keys(d.a.cfg.Peers)), func(n string) bool { return n == d.a.cfg.Host })
	rank := func(name string) int {
		switch name {
		case avoid:
			return 2
		case wanted:
			return 0
		default:
			return 1
		}
	}
	slices.SortStableFunc(list, func(a, b string) int { return rank(a) - rank(b) })
	return list
}

// peerUp is called when a peer's agent says that it is there: it may be the one
// that domains of this host wait for.
func (a *Agent) peerUp() {
	for _, d := range a.known() {
		d.kick()
	}
}

// greet tells the peers that this agent is there.
func (a *Agent) greet(ctx context.Context) {
	for name := range a.cfg.Peers {
		if name == a.cfg.Host {
			continue
		}
		a.wg.Go(func() {
			if _, err := a.probe(ctx, name); err != nil && ctx.Err() == nil {
				a.log.Info("a peer cannot be reached", "peer", name, "error", err)
			}
		})
	}
}

// kick makes keep look at once, and the definition be told of if it changed.
func (d *domain) kick() {
	d.wakeTeller()
	select {
	case d.kicked <- struct{}{}:
	default: // it will look anyway
	}
}

// kickID does the same for a domain that is known here.
func (a *Agent) kickID(id plugin.UUID) {
	a.mu.Lock()
	d := a.domains[id]
	a.mu.Unlock()
	if d != nil {
		d.kick()
	}
}

func (d *domain) setRetry(at time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.retryAt = at
}

// backoff spaces tries: each comes after a pause, and each that follows soon
// doubles the next pause.
type backoff struct {
	least, most, pause time.Duration
	next               time.Time // of the next try, while it is waited for
	since              time.Time // when the pair that holds now was first seen
}

func newBackoff(least, most time.Duration) *backoff {
	return &backoff{least: least, most: most, pause: least}
}

// due tells whether it is time for a try. The first look starts the pause.
func (b *backoff) due(now time.Time) bool {
	b.since = time.Time{}
	if b.next.IsZero() {
		b.next = now.Add(b.pause)
	}
	return !now.Before(b.next)
}

// tried notes a try, whatever came of it.
func (b *backoff) tried() {
	b.next = time.Time{}
	b.pause = min(2*b.pause, b.most)
}

// rest is called while no try is needed. The pauses are forgotten once a pair
// has held for long enough.
func (b *backoff) rest(protected bool, now time.Time) {
	b.next = time.Time{}
	switch {
	case !protected:
		b.since = time.Time{}
	case b.since.IsZero():
		b.since = now
	case now.Sub(b.since) >= stablePeriod:
		b.reset()
	}
}

// reset forgets the failures of before, since something changed.
func (b *backoff) reset() { b.pause, b.next = b.least, time.Time{} }

// Errors of operations on a pair.
var (
	ErrNotProtected = errors.New("the domain is not protected")
	ErrNotPrimary   = errors.New("the domain does not run on this host")
)

// primaryOf finds the domain, which must run here as the primary of a pair.
func (a *Agent) primaryOf(ctx context.Context, name string) (*domain, virt.Info, error) {
	info, err := a.virt.Find(ctx, name)
	if err != nil {
		return nil, info, err
	}
	d := a.domain(info.UUID)
	s, _, p, b := d.snapshot()
	switch {
	case b != nil && (s.State == pair.Cloning || s.State == pair.Protected):
		return nil, info, fmt.Errorf("%w, which has its backup: ask the agent of host %s", ErrNotPrimary, s.Peer)
	case p == nil || s.State != pair.Protected:
		return nil, info, fmt.Errorf("%w: it is %s", ErrNotProtected, s)
	}
	return d, info, nil
}

// Failover lets the backup of a domain that runs here take over, as if this
// host had failed, to test that or to clear the host. It returns once that was
// ordered, and changes nothing unless the arbiter answers both hosts.
func (a *Agent) Failover(ctx context.Context, name string) error {
	d, _, err := a.primaryOf(ctx, name)
	if err != nil {
		return err
	}
	if s, _, p, _ := d.snapshot(); p.session() == nil || s.Reason != pair.ReasonNone {
		return fmt.Errorf("the backup may not be well: the domain is %s", s)
	}
	return d.request(ctx, pair.EventUserFailover)
}

// RestartBackup discards the backup of a domain and clones the domain anew. A
// peer other than "" is taken, and wanted, from then on; it is asked first
// whether it can, and the arbiter whether it answers. The domain has no backup
// meanwhile.
func (a *Agent) RestartBackup(ctx context.Context, name, peer string) error {
	d, info, err := a.primaryOf(ctx, name)
	if err != nil {
		return err
	}
	s, _, _, _ := d.snapshot()
	moves := peer != ""
	if !moves {
		peer = s.Peer
	} else {
		if _, err := a.cfg.Peer(peer); err != nil {
			return err
		}
		if peer == s.Peer {
			return fmt.Errorf("%w by host %s", ErrProtected, peer)
		}
		if err := a.checkPeer(ctx, peer); err != nil {
			return err
		}
	}
	if err := d.request(ctx, pair.EventUserDisable); err != nil {
		return err
	}
	if moves {
		if err := d.annotate(ctx, info, hooks.ModeProtected, peer); err != nil {
			return err
		}
	}
	if err := d.untilAlone(ctx); err != nil {
		return err
	}
	return d.enable(ctx, info, peer)
}

// untilAlone waits until the backup is given up.
func (d *domain) untilAlone(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, aloneTimeout)
	defer cancel()
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for !d.alone() {
		select {
		case <-t.C:
		case <-ctx.Done():
			s, _, _, _ := d.snapshot()
			return fmt.Errorf("the backup could not be given up in time: the domain is %s", s)
		}
	}
	return nil
}

// aloneTimeout bounds the end of a pair; it takes one answer of the arbiter.
const aloneTimeout = 10 * time.Second

// Suspend takes the protection of a domain away until Resume, and keeps its
// settings.
func (a *Agent) Suspend(ctx context.Context, name string) error {
	return a.setMode(ctx, name, hooks.ModeSuspended)
}

// Resume undoes Suspend.
func (a *Agent) Resume(ctx context.Context, name string) error {
	return a.setMode(ctx, name, hooks.ModeProtected)
}

func (a *Agent) setMode(ctx context.Context, name string, mode hooks.Mode) error {
	info, err := a.virt.Find(ctx, name)
	if err != nil {
		return err
	}
	d := a.domain(info.UUID)
	wish, _, err := d.wish(ctx)
	if err != nil {
		return err
	}
	if wish.Mode == "" {
		return fmt.Errorf("%w: it is not enabled; use 'ftvirt enable'", ErrNotProtected)
	}
	if wish.Backup() {
		return fmt.Errorf("%w, which has its backup: ask the agent of host %s", ErrNotPrimary, wish.Peer)
	}
	if mode == hooks.ModeSuspended {
		if err := d.request(ctx, pair.EventUserDisable); err != nil {
			return err
		}
	}
	if err := d.annotate(ctx, info, mode, wish.Peer); err != nil || mode == hooks.ModeSuspended {
		return err
	}
	if !info.Active || !d.alone() {
		return nil // its start protects it, or something is under way
	}
	return d.protectAgain(ctx)
}
