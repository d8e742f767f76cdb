// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/pair"
	"ftvirt.org/ftvirt/plugin/virt"
)

// end ends the backup's QEMU and keeps its replicas and its definition, over a
// restart of the agent and of the host. It may come again.
func (b *backup) end(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	if err := b.d.noteEnd(b.epoch); err != nil {
		b.d.a.log.Warn("that the domain was powered off cannot be written down: its replicas would not outlive this agent", "domain", b.d.label(), "error", err)
	}
	if v := b.attached(); v != nil {
		if err := v.Kill(); err != nil {
			b.d.a.log.Error("cannot kill QEMU", "domain", b.d.label(), "error", err)
		}
	}
	return b.receiver.End(ctx)
}

// noteEnd marks what is kept of an epoch as that of a domain that was powered off.
func (d *domain) noteEnd(epoch plugin.Epoch) error {
	d.keeping.Lock()
	defer d.keeping.Unlock()
	k, err := d.kept()
	switch {
	case err != nil:
		return err
	case k == nil || k.Epoch != epoch:
		return fmt.Errorf("%w: nothing is kept of epoch %d", errNoDefinition, epoch)
	case k.Ended:
		return nil
	}
	k.Ended = true
	return d.keepDefinition(k)
}

var errNoDefinition = errors.New("this host has no definition of the domain")

// mayOwn does what has to be done before this host acquires the epoch of a domain
// that was powered off: with the epoch the hook lets it be started, and what was
// defined here before has older disks.
func (d *domain) mayOwn(ctx context.Context, epoch plugin.Epoch) error {
	if s, _, _, _ := d.snapshot(); !s.Kept {
		return nil
	}
	lookup, cancel := context.WithTimeout(ctx, arbiterTimeout)
	rec, err := d.a.arbiter.Lookup(lookup, d.id)
	cancel()
	if err != nil || rec.Epoch != epoch || !rec.Undecided() {
		return err
	}
	ctx, cancel = context.WithTimeout(ctx, virt.DefaultTimeout)
	defer cancel()
	d.defining.Lock()
	defer d.defining.Unlock()
	k, err := d.kept()
	if err == nil && (k == nil || k.Epoch != epoch) {
		err = errNoDefinition
	}
	if err == nil {
		err = d.defineBest(ctx, k, nil, hooks.Annotation{})
	}
	if err != nil {
		return fmt.Errorf("the domain was powered off and the epoch is not acquired, since it cannot be defined on this host: %w", err)
	}
	return nil
}

// keepReplicas is told that a domain that was powered off is this host's.
func (d *domain) keepReplicas() {
	if _, _, _, b := d.snapshot(); b != nil {
		b.receiver.Won()
	}
	d.lookAtDefinition()
	d.kick()
}

// adoptEnd goes on with the end of a domain of which an earlier agent kept the
// replicas, if this host does not own it yet: else they may be its disks by now.
func (d *domain) adoptEnd(ctx context.Context) {
	k, err := d.kept()
	if err != nil || k == nil || !k.Ended {
		return
	}
	rec, err := d.lookup(ctx)
	if ctx.Err() != nil || err != nil || rec.Epoch != k.Epoch || rec.Backup != d.a.cfg.Host || rec.Closed || rec.Owner == d.a.cfg.Host {
		return
	}
	b := d.newBackup(k.Primary, k.Epoch)
	if err := b.receiver.AdoptEnded(k.Epoch, true); err != nil {
		d.a.log.Warn("replicas", "domain", d.label(), "error", err)
		return
	}
	d.mu.Lock()
	d.backup = b
	d.mu.Unlock()
	d.a.log.Info("the replicas of a domain that was powered off are kept", "domain", d.label(), "epoch", k.Epoch, "peer", k.Primary)
	d.post(pair.Event{Kind: pair.EventAdopt, Epoch: k.Epoch, Peer: k.Primary, Role: plugin.RoleBackup, Ended: true})
}

// wasOrdered tells whether the end of a QEMU that recorded or replayed was wanted.
// Its log tells what the guest did, and libvirt what an operator did: 'virsh
// destroy' ends QEMU by the same signal as a host that stops.
func (d *domain) wasOrdered(ctx context.Context, v *vm, p *primary, b *backup) bool {
	switch mode := v.reports().Mode; {
	case p != nil && p.attached() == v && p.ended():
		return p.guestEnded() || d.deliberate(ctx)
	case b != nil && b.attached() == v && mode == control.ModeReplay:
		return b.endedWithGuest(ctx, v)
	default:
		return mode != control.ModeRecord && mode != control.ModeReplay && d.deliberate(ctx)
	}
}

// endedWithGuest tells, of a backup whose QEMU is gone, whether that was because
// its guest powered off. While the primary may live that is not enough: libvirt
// makes a reboot of a power-off, for which 'virsh reboot' asks, and the primary
// goes on.
func (b *backup) endedWithGuest(ctx context.Context, v *vm) bool {
	store := b.log()
	if store == nil || !store.Stats().GuestEnded || !b.whole(v) {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, endingTimeout)
	defer cancel()
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for {
		s, _, _, _ := b.d.snapshot()
		switch st := store.Stats(); {
		case !st.GuestEnded: // it was reset
			return false
		case st.Ended || s.State == pair.GoingLive:
			return true
		case s.State != pair.Cloning && s.State != pair.Protected:
			return false
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return false
		}
	}
}

// endingTimeout is how long the primary's QEMU, whose guest has powered off, may
// take to write back its disks and to end.
const endingTimeout = 60 * time.Second

// whole tells whether a backup has replayed all that its guest did.
func (b *backup) whole(v *vm) bool {
	store := b.log()
	return store != nil && v.reports().consumed.Pos >= store.Needed()
}
