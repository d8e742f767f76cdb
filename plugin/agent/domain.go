// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"ftvirt.org/ftvirt/migrate"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/metrics"
	"ftvirt.org/ftvirt/plugin/pair"
	"ftvirt.org/ftvirt/plugin/virt"
)

// domain is the shell around the state machine of one domain on this host: it
// turns what happens into events and executes the machine's actions. The
// machine is touched by loop alone.
type domain struct {
	a  *Agent
	id plugin.UUID

	inbox chan pair.Event
	stops chan virt.Stopped // what libvirt told of ends of this domain

	mu       sync.Mutex
	name     string
	status   pair.Status
	vm       *vm           // the QEMU of this host, nil if none
	attached chan struct{} // closed and renewed when vm changes
	primary  *primary      // data path of the epoch in which this is the primary
	backup   *backup       // data path of the epoch in which this is the backup
	progress cloneProgress
	clones   int          // clones under way, those that are being undone included
	owned    plugin.Epoch // the newest epoch that the arbiter gave to this host
	asking   bool         // a call of the arbiter is under way
	resuming bool         // a call of libvirt to resume the copy here is
	yielded  plugin.Epoch // the newest for which the other host was let ask first
	networks []string     // bridges and cards of this host that the copy here is connected to
	cutOff   atomic.Bool  // one of them is cut off from the world
	closing  map[plugin.Epoch]bool
	failure  string // why the last clone failed
	avoid    string // the peer on which it failed
	wrong    string // what is not understood of the annotation
	retryAt  time.Time

	// Libvirt's definition here is to be looked at as often as wanted, and was
	// as often as settled; the next time not before settleAt.
	wanted, settled uint64
	settleAt        time.Time
	pending         [wishTold + 1]pending

	tally tally
	acks  *metrics.Histogram // how long pieces of the log waited for their acks

	adoptions int // of what an earlier agent left, under way
	removals  int // of copies here, under way

	waiters  []waiter // for what users asked for
	probeErr error    // why the arbiter would not answer them

	diagnosing sync.Mutex    // held while a diagnosis is written
	verifying  sync.Mutex    // held while both sides are compared
	enabling   sync.Mutex    // held while a clone is being begun
	kicked     chan struct{} // wakes keep
	redefined  chan struct{} // wakes tellDefinition
	keeping    sync.Mutex    // held while what is kept of the definition is replaced
	defining   sync.Mutex    // held while libvirt's definition is
}

func newDomain(a *Agent, id plugin.UUID) *domain {
	return &domain{
		a: a, id: id, name: id.String(), inbox: make(chan pair.Event, 256), stops: make(chan virt.Stopped, 8),
		attached: make(chan struct{}), kicked: make(chan struct{}, 1), redefined: make(chan struct{}, 1), closing: map[plugin.Epoch]bool{},
		acks:   metrics.NewHistogram(control.DelayBounds[:]),
		status: pair.Status{Role: plugin.RoleNone, Reason: pair.NotEnabled},
	}
}

// post hands an event to the machine.
func (d *domain) post(ev pair.Event) {
	select {
	case d.inbox <- ev:
	case <-d.a.ctx.Done():
	}
}

func (d *domain) loop(ctx context.Context) {
	cfg := pair.DefaultConfig()
	cfg.Grace = max(1, int(d.a.cfg.Channel.ReconnectGrace/pair.DefaultTick))
	cfg.Stopping = max(cfg.Stopping, cfg.Grace)
	m, err := pair.New(cfg)
	if err != nil {
		d.a.log.Error("state machine", "error", err)
		return
	}
	tick := time.NewTicker(pair.DefaultTick)
	defer tick.Stop()
	for {
		var ev pair.Event
		select {
		case <-ctx.Done():
			d.stopData()
			return
		case <-tick.C:
			ev = pair.Event{Kind: pair.EventTick}
		case ev = <-d.inbox:
		}
		d.prepareFor(ev)
		actions := m.Step(ev)
		d.publish(m.Status())
		for i, act := range actions {
			if i+1 < len(actions) && act.Kind == pair.ActionLog && actions[i+1].Kind == pair.ActionEmitEvent {
				// One line for each change of state, with its parts by name.
				to := actions[i+1]
				d.a.log.Info(act.Line, "domain", d.label(), "state", to.State, "reason", to.Reason, "epoch", to.Epoch)
				continue
			}
			d.execute(ctx, act)
		}
		d.settle()
	}
}

// prepareFor notes what the actions of an event rely on.
func (d *domain) prepareFor(ev pair.Event) {
	if ev.Kind == pair.EventArbiterWon {
		d.mu.Lock()
		d.owned = max(d.owned, ev.Epoch)
		d.mu.Unlock()
	}
}

func (d *domain) publish(s pair.Status) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.status = s
}

// snapshot gives what others may look at.
func (d *domain) snapshot() (pair.Status, *vm, *primary, *backup) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.status, d.vm, d.primary, d.backup
}

// settle opens the gate of a VM that records although its pair is over: the
// plugin may have switched in the moment in which the clone was given up. It
// takes an epoch that the arbiter gave to this host.
func (d *domain) settle() {
	d.mu.Lock()
	s, v, owned := d.status, d.vm, d.owned
	d.mu.Unlock()
	over := s.State == pair.Unprotected || s.State == pair.Live
	if v == nil || !over || s.Asking || s.Removing {
		return
	}
	if r := v.reports(); r.Mode == control.ModeRecord && r.Epoch == owned && owned != 0 && v.opened.CompareAndSwap(false, true) {
		d.a.log.Info("the domain records without a backup: opening its gate", "domain", d.label(), "epoch", owned)
		d.open(v, owned)
	}
}

// open lets the outputs of a primary pass, then leaves record.
func (d *domain) open(v *vm, epoch plugin.Epoch) {
	if err := errors.Join(v.Open(epoch), v.Idle()); err != nil {
		d.a.log.Error("cannot open the gate", "domain", d.label(), "epoch", epoch, "error", err)
	}
}

// paired tells whether there is a pair, be it in the making.
func (d *domain) paired() bool {
	s, _, _, _ := d.snapshot()
	return s.State == pair.Cloning || s.State == pair.Protected
}

func (d *domain) label() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.name
}

// learnName finds the domain's name, for people's sake: in libvirt's notes, or by
// asking it.
func (d *domain) learnName(ctx context.Context) {
	name := ""
	if d.a.owners != nil {
		name = nameIn(statusDir, d.id)
	}
	if name == "" {
		i, err := d.a.virt.Lookup(ctx, d.id)
		if err != nil {
			return
		}
		name = i.Name
	}
	d.mu.Lock()
	d.name = name
	d.mu.Unlock()
}

// attach takes a plugin that connected.
func (d *domain) attach(ctx context.Context, v *vm) {
	d.mu.Lock()
	again := d.vm != nil && d.status.State != pair.Unprotected
	d.vm = v
	close(d.attached)
	d.attached = make(chan struct{})
	p, b := d.primary, d.backup
	d.mu.Unlock()
	for len(d.stops) > 0 {
		<-d.stops // of a QEMU before this one
	}
	d.a.wg.Go(func() { d.learnName(ctx) })
	h := v.Hello()
	if h.Backup && h.Mode != control.ModeReplay {
		d.lookAtDefinition() // an earlier agent may not have come to it
	}
	switch {
	case h.Backup && h.Mode == control.ModeReplay:
		switch {
		case b == nil:
			d.adopting(func() { d.adoptBackup(ctx, v) })
		case b.attach(v):
			if again {
				d.post(pair.Event{Kind: pair.EventPluginRestored})
			}
		default:
			d.removeStray(ctx, v, "nobody feeds it")
		}
	case h.Backup && h.Mode == control.ModeLive && b != nil && b.epoch == h.Epoch:
		b.attachLive(v)
	case h.Mode == control.ModeRecord && p != nil && p.epoch == h.Epoch:
		p.attach(v)
		d.post(pair.Event{Kind: pair.EventPluginRestored})
	case h.Mode == control.ModeRecord || (h.Mode == control.ModeLive && h.Backup):
		d.adopting(func() { d.adoptPrimary(ctx, v) })
	default:
		d.welcome(v, h.Epoch, 0)
		if p == nil && h.Mode == control.ModeIdle {
			d.adopting(func() { d.cleanUp(ctx, v) })
		}
	}
}

// cleanUp ends a clone that this agent, or an earlier one of this host, had begun:
// the guest may stand still in the middle of it. It tries until libvirtd and QEMU
// have done it, or there is no such QEMU any more.
func (d *domain) cleanUp(ctx context.Context, v *vm) {
	retry := time.NewTicker(cleanUpPeriod)
	defer retry.Stop()
	for {
		try, cancel := context.WithTimeout(ctx, removeTimeout)
		err := errors.Join(v.Disarm(), migrate.CleanUp(try, d.a.virt, d.id))
		cancel()
		if err == nil || errors.Is(err, virt.ErrNoDomain) {
			return
		}
		d.a.log.Warn("cannot clean up after an interrupted clone", "domain", d.label(), "error", err)
		select {
		case <-retry.C:
		case <-v.done:
			return
		case <-ctx.Done():
			return
		}
	}
}

// cleanUpPeriod is between attempts to clean up.
const cleanUpPeriod = 500 * time.Millisecond

func (d *domain) welcome(v *vm, epoch plugin.Epoch, resume plugin.Position) {
	if err := v.Welcome(epoch, resume); err != nil {
		d.a.log.Warn("plugin", "domain", d.label(), "error", err)
		return
	}
	if err := v.Configure(d.a.cfg.Replay.DivergenceTimeout, d.a.cfg.Replay.TickInterval); err != nil {
		d.a.log.Warn("plugin", "domain", d.label(), "error", err)
	}
}

// destroy ends a QEMU for good: by its process, then at libvirt.
func (d *domain) destroy(ctx context.Context, v *vm) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	if v != nil {
		if err := v.Kill(); err != nil {
			d.a.log.Error("cannot kill QEMU", "domain", d.label(), "error", err)
		}
	}
	if err := d.a.virt.Destroy(ctx, d.id); err != nil {
		d.a.log.Error("cannot destroy the domain", "domain", d.label(), "error", err)
	}
}

// detach notes that a plugin's connection ended, and why.
func (d *domain) detach(ctx context.Context, v *vm, err error) {
	if ctx.Err() != nil {
		return
	}
	if err != nil && !errors.Is(err, io.EOF) {
		d.a.log.Warn("plugin", "domain", d.label(), "error", err)
	}
	if !v.ended(ctx, endTimeout) {
		d.mu.Lock()
		current := d.vm == v
		d.mu.Unlock()
		if current {
			d.post(pair.Event{Kind: pair.EventPluginLost})
		}
		// It may be ending still: a large guest's memory takes time to free.
		d.a.wg.Go(func() {
			if v.ended(ctx, 0) {
				d.ended(ctx, v)
			}
		})
		return
	}
	d.ended(ctx, v)
}

// endTimeout is how long a QEMU whose connection broke may take to be gone
// before it counts as one that lives without its connection.
const endTimeout = 100 * time.Millisecond

// ended tells the machine that a QEMU is gone, unless there is another by now.
func (d *domain) ended(ctx context.Context, v *vm) {
	d.mu.Lock()
	current := d.vm == v
	if current {
		d.vm = nil
	}
	p, b := d.primary, d.backup
	d.mu.Unlock()
	if !current {
		return
	}
	if d.wasOrdered(ctx, v, p, b) {
		d.post(pair.Event{Kind: pair.EventDomainStopped})
	}
	// Whether it was ordered by the machine or not, it is gone.
	d.post(pair.Event{Kind: pair.EventQEMUDied})
}

// deliberate waits for libvirt to tell how a domain ended, where its log does not.
func (d *domain) deliberate(ctx context.Context) bool {
	t := time.NewTimer(verdictTimeout)
	defer t.Stop()
	select {
	case s := <-d.stops:
		return s.Deliberate
	case <-t.C:
	case <-ctx.Done():
	}
	return false
}

// verdictTimeout is how long libvirt may take to tell of an end: it does once it
// has cleaned up behind QEMU. Without its word it was nobody's wish.
const verdictTimeout = 5 * time.Second

// waitAttached waits for a plugin that match accepts.
func (d *domain) waitAttached(ctx context.Context, match func(*vm) bool) (*vm, error) {
	for {
		d.mu.Lock()
		v, ch := d.vm, d.attached
		d.mu.Unlock()
		if v != nil && match(v) {
			return v, nil
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (d *domain) record(s pair.State, r pair.Reason, epoch plugin.Epoch) {
	e := Entry{
		Time: time.Now(), Host: d.a.cfg.Host, Domain: d.label(), UUID: d.id, Epoch: epoch, State: s.String(),
	}
	if r != pair.ReasonNone {
		e.Reason = r.String()
	}
	d.a.events.add(e)
}

func (d *domain) stopData() {
	d.mu.Lock()
	p, b := d.primary, d.backup
	d.mu.Unlock()
	if p != nil {
		p.stop()
	}
	if b != nil {
		b.stop()
	}
}
