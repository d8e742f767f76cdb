// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"os"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/pair"
	"ftvirt.org/ftvirt/plugin/virt"
)

// execute does what the machine asks for. What may take time runs in a
// goroutine of its own, so that the machine never waits.
func (d *domain) execute(ctx context.Context, act pair.Action) {
	_, v, p, b := d.snapshot()
	switch act.Kind {
	case pair.ActionLog:
		d.a.log.Info(act.Line, "domain", d.label())
	case pair.ActionEmitEvent:
		d.record(act.State, act.Reason, act.Epoch)
		d.tally.happened(act.State, act.Reason, act.Epoch, b != nil && b.epoch == act.Epoch)
		if act.State == pair.Unprotected || act.State == pair.Live || act.State == pair.Failed {
			d.endData(p, b)
		}
	case pair.ActionStartClone:
		d.startClone(ctx, act.Epoch, act.Peer)
	case pair.ActionAbortClone:
		if p != nil {
			p.abort()
		}
	case pair.ActionAcquireArbiter:
		if b != nil && b.epoch == act.Epoch {
			b.leave()
		}
		d.acquire(ctx, act.Epoch)
	case pair.ActionCloseEpoch:
		d.closeEpoch(ctx, act.Epoch)
	case pair.ActionForget:
		// The record stays: should the domain ever have failed over, it is what
		// keeps the stale copy on the other host from being started.
		d.a.log.Info("protection ended; this host owns the domain", "domain", d.label(), "epoch", act.Epoch)
	case pair.ActionPromote:
		if b != nil {
			b.goLive()
		}
	case pair.ActionOpenGate:
		if v != nil && once(&v.opened) {
			d.open(v, act.Epoch)
		}
	case pair.ActionStopLogging:
		// OpenGate leaves record as well.
	case pair.ActionKillLocalVM:
		d.removing(func() { d.remove(ctx, v, nil) })
	case pair.ActionDiscardBackup:
		if b != nil && b.diskFailed.Load() {
			// It is no seed, and its room is wanted. One whose primary's disk failed
			// may be the best copy that there is.
			b.receiver.Keep = false
		}
		d.removing(func() { d.remove(ctx, v, b) })
	case pair.ActionEndBackup:
		if b != nil {
			d.removing(func() {
				if err := b.end(ctx); err != nil {
					d.a.log.Error("cannot end the backup", "domain", d.label(), "error", err)
					return
				}
				d.confirmGone()
			})
		}
	case pair.ActionKeepReplicas:
		d.keepReplicas()
	case pair.ActionNotifyPeer:
		c := entry{Kind: act.Notify.String(), Epoch: act.Epoch, Reason: act.Reason.String()}
		switch {
		case p != nil && p.epoch == act.Epoch:
			p.notify(c)
		case b != nil && b.epoch == act.Epoch:
			b.notify(c)
		}
	case pair.ActionAnnounce:
		d.a.wg.Go(func() { d.settleHere(ctx) })
	case pair.ActionResume:
		d.resumePaused(ctx, v)
	case pair.ActionCollectDiagnosis:
		d.diagnose(act.Epoch, v, b)
	case pair.ActionProbeArbiter:
		d.probe(ctx, act, p)
	case pair.ActionAnswer:
		d.answer(act)
	}
}

// endData ends the data path of an epoch that is over. What the machine still
// has to tell the peer was told before.
func (d *domain) endData(p *primary, b *backup) {
	d.a.wg.Go(func() {
		// Let the last notify out.
		t := time.NewTimer(lingerTime)
		defer t.Stop()
		select {
		case <-t.C:
		case <-d.a.ctx.Done():
		}
		if p != nil {
			p.stop()
		}
		if b != nil {
			b.stop()
			b.holding.Wait()
			if err := os.RemoveAll(b.spoolDir()); err != nil {
				d.a.log.Warn("the log of a pair that is over stays", "domain", d.label(), "error", err)
			}
		}
	})
}

// lingerTime is how long a session stays open after its pair is over.
const lingerTime = 500 * time.Millisecond

// acquire asks the arbiter once; the machine asks again if need be.
func (d *domain) acquire(ctx context.Context, epoch plugin.Epoch) {
	d.mu.Lock()
	busy := d.asking
	d.asking = true
	d.mu.Unlock()
	if busy {
		return
	}
	d.a.wg.Go(func() {
		if !d.letOther(ctx, epoch) {
			d.mu.Lock()
			d.asking = false
			d.mu.Unlock()
			return
		}
		err := d.mayOwn(ctx, epoch)
		if err == nil {
			ctx, cancel := context.WithTimeout(ctx, arbiterTimeout)
			err = d.a.arbiter.Acquire(ctx, d.id, epoch, d.a.cfg.Host)
			cancel()
		}
		d.mu.Lock()
		d.asking = false
		d.mu.Unlock()
		ev := pair.Event{Kind: pair.EventArbiterWon, Epoch: epoch}
		var lost *arbiter.LostError
		switch {
		case err == nil:
		case errors.As(err, &lost):
			ev.Kind, ev.Winner = pair.EventArbiterLost, lost.Winner
		case errors.Is(err, arbiter.ErrStale), errors.Is(err, arbiter.ErrNoRecord), errors.Is(err, arbiter.ErrNotMember):
			d.a.log.Error("arbiter", "domain", d.label(), "epoch", epoch, "error", err)
			ev.Kind = pair.EventArbiterLost
		default:
			d.a.log.Warn("arbiter", "domain", d.label(), "epoch", epoch, "error", err)
			ev.Kind = pair.EventArbiterUnavailable
		}
		d.tally.answered(ev.Kind)
		d.post(ev)
	})
}

// untilDecided repeats f while the arbiter cannot be asked.
func (d *domain) untilDecided(ctx context.Context, what string, f func(context.Context) error) {
	t := time.NewTicker(max(d.a.cfg.Arbiter.Retry, 50*time.Millisecond))
	defer t.Stop()
	for {
		attempt, cancel := context.WithTimeout(ctx, arbiterTimeout)
		err := f(attempt)
		cancel()
		if err == nil || !errors.Is(err, arbiter.ErrUnavailable) && !errors.Is(err, context.DeadlineExceeded) {
			if err != nil {
				d.a.log.Info(what, "domain", d.label(), "error", err)
			}
			return
		}
		d.a.log.Warn(what, "domain", d.label(), "error", err)
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

func (d *domain) closeEpoch(ctx context.Context, epoch plugin.Epoch) {
	d.mu.Lock()
	busy := d.closing[epoch]
	d.closing[epoch] = true
	d.mu.Unlock()
	if busy {
		return
	}
	d.a.wg.Go(func() {
		d.untilDecided(ctx, "closing the epoch", func(ctx context.Context) error {
			return d.a.arbiter.Close(ctx, d.id, epoch, d.a.cfg.Host)
		})
		d.mu.Lock()
		delete(d.closing, epoch)
		d.mu.Unlock()
	})
}

// removing runs f, which ends a copy here: until it is over no other is begun,
// which it could take for its own.
func (d *domain) removing(f func()) {
	d.mu.Lock()
	d.removals++
	d.mu.Unlock()
	d.a.wg.Go(func() {
		f()
		d.mu.Lock()
		d.removals--
		d.mu.Unlock()
	})
}

// remove ends the copy here, by process first: one that waits for the log does
// not answer libvirt. The end of the plugin's connection tells the machine; for
// a copy that has none, this does.
func (d *domain) remove(ctx context.Context, v *vm, b *backup) {
	if b != nil {
		if err := b.discard(ctx); err != nil {
			d.a.log.Error("cannot discard the backup", "domain", d.label(), "error", err)
			return
		}
	} else {
		d.destroy(ctx, v)
	}
	d.confirmGone()
}

// confirmGone tells the machine that the copy which it wanted to be ended is.
func (d *domain) confirmGone() {
	// The machine may know by now, and have begun another epoch, to which the
	// end of this copy does not belong.
	if s, now, _, _ := d.snapshot(); s.Removing && (now == nil || !now.Alive()) {
		d.post(pair.Event{Kind: pair.EventQEMUDied})
	}
}

// settleHere makes a backup that went live an ordinary domain of this host:
// libvirt gets its definition, see defineHere, and switches learn where its MACs
// are.
func (d *domain) settleHere(ctx context.Context) {
	d.setDefinition(wishHere, errors.New("libvirt on this host does not have it yet: without it the domain would be gone when it stops"))
	d.lookAtDefinition()
	d.kick()
	ctx, cancel := context.WithTimeout(ctx, virt.DefaultTimeout)
	defer cancel()
	err := d.a.virt.Monitor(ctx, d.id, "announce-self", map[string]any{"initial": 50, "max": 550, "rounds": 5, "step": 50}, nil)
	if err != nil {
		d.a.log.Warn("cannot announce the domain", "domain", d.label(), "error", err)
	}
}

func (a *Agent) hookOptions() hooks.Options {
	return hooks.Options{
		PluginFile: a.cfg.Agent.PluginFile, PluginSocket: a.cfg.Agent.PluginSocket, ICountShift: a.cfg.Replay.ICountShift,
	}
}

// describeBackup implements migrate.Receiver.Describe.
func (d *domain) describeBackup(xml string, epoch plugin.Epoch, disks map[string]string) (string, map[string]string, error) {
	live, err := hooks.Parse([]byte(xml))
	if err != nil {
		return "", nil, err
	}
	_, _, _, b := d.snapshot()
	if b == nil {
		return "", nil, errors.New("the clone was given up")
	}
	replicas := map[string]hooks.Replica{}
	for target, path := range disks {
		replicas[target] = hooks.Replica{File: path}
	}
	if err := b.keepReplicas(xml, disks); err != nil {
		d.a.log.Error("the definition is not kept: after a failover that of the running domain is taken", "domain", d.label(), "error", err)
	}
	dom, err := hooks.BackupXML(live, hooks.BackupOptions{
		Options: d.a.hookOptions(), Epoch: epoch, Primary: b.peer, Replicas: replicas,
	})
	if err != nil {
		return "", nil, err
	}
	nodes := map[string]string{}
	for _, n := range hooks.DiskNodes(dom) {
		nodes[n.Target] = n.Node
	}
	text, err := dom.Marshal()
	return text, nodes, err
}

// hypervisor gives the receiver what it needs of libvirt.
type hypervisor struct{ *virt.Conn }

func (h hypervisor) Create(ctx context.Context, xml string) error {
	_, err := h.Conn.Create(ctx, xml)
	return err
}

func (h hypervisor) Active(ctx context.Context, id plugin.UUID) (bool, error) {
	i, err := h.Lookup(ctx, id)
	if errors.Is(err, virt.ErrNoDomain) {
		return false, nil
	}
	return i.Active, err
}
