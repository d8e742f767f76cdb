// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/migrate"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/channel"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/pair"
	"ftvirt.org/ftvirt/plugin/rrlog"
)

// adoptPrimary takes up a VM of a pair that an earlier agent of this host cared
// for: one that records, or that went live as a backup. All that is known of the
// pair is what the plugin and the arbiter say.
func (d *domain) adoptPrimary(ctx context.Context, v *vm) {
	h := v.Hello()
	d.a.log.Info("a domain of an interrupted pair is found", "domain", d.id, "epoch", h.Epoch, "mode", h.Mode)
	if s, _, _, _ := d.snapshot(); s.Epoch != 0 {
		// This agent knows the domain: its machine does what is to be done,
		// once the plugin may talk.
		d.welcome(v, h.Epoch, h.Tail)
		return
	}
	rec, err := d.lookup(ctx)
	if ctx.Err() != nil {
		return
	}
	paired := err == nil && rec.Epoch == h.Epoch && rec.Undecided() && rec.Primary == d.a.cfg.Host && h.Mode == control.ModeRecord
	ev := pair.Event{Kind: pair.EventAdopt, Epoch: h.Epoch, Peer: d.otherHost(rec), Role: plugin.RolePrimary, Alone: !paired}
	layout, err := rrlog.LayoutFor(h.QEMU.Major, h.QEMU.Minor)
	if err != nil || !paired {
		ev.Alone = true
		d.welcome(v, h.Epoch, h.Tail)
		d.post(ev)
		return
	}
	// Its log stays with the plugin until the session is back.
	d.welcome(v, h.Epoch, h.Tail)
	ctx, cancel := context.WithCancel(ctx)
	p := &primary{d: d, epoch: h.Epoch, peer: ev.Peer, ctx: ctx, cancel: cancel, vm: v, acked: h.Tail, layout: layout, guard: d.ackGuard()}
	p.cloning, p.abort = context.WithCancel(ctx)
	v.switched.Store(uint64(h.Epoch))
	d.mu.Lock()
	d.primary = p
	d.mu.Unlock()
	d.post(ev)
	if d.untilBegun(ctx, h.Epoch) != nil {
		return
	}
	v.ship(p.ship)
	v.watch(p.watch)
	d.a.wg.Go(func() { p.receive(p.reconnect(targetAdopt)) })
}

// adoptBackup takes up a VM that replays. It can go on if the log that the
// earlier agent acknowledged is still there.
func (d *domain) adoptBackup(ctx context.Context, v *vm) {
	h := v.Hello()
	d.a.log.Info("the backup of an interrupted pair is found", "domain", d.id, "epoch", h.Epoch, "position", h.Head)
	rec, err := d.lookup(ctx)
	if ctx.Err() != nil {
		return
	}
	status, _, _, _ := d.snapshot()
	mine := err == nil && rec.Epoch == h.Epoch && rec.Backup == d.a.cfg.Host && (rec.Undecided() || rec.Owner == d.a.cfg.Host && !rec.Closed)
	switch {
	case !mine:
		d.removeStray(ctx, v, "the arbiter does not have it as the backup of its epoch")
		return
	case h.Head == 0:
		// Whether its primary ever switched is not known.
		d.removeStray(ctx, v, "it has not begun to replay")
		return
	case status.Epoch != 0:
		d.removeStray(ctx, v, "nobody feeds it")
		return
	}
	b := d.newBackup(rec.Primary, h.Epoch)
	layout, err := rrlog.LayoutFor(h.QEMU.Major, h.QEMU.Minor)
	if err == nil {
		recovery, cancel := context.WithTimeout(ctx, controlTimeout)
		b.stored, err = channel.RecoverStore(recovery, layout, b.storeConfig(), b.spoolDir(), d.a.log, h.Head)
		cancel()
	}
	if err == nil {
		err = b.receiver.Adopt(h.Epoch, true)
	}
	if err != nil {
		d.removeStray(ctx, v, err.Error())
		return
	}
	// The machine is told once; what the plugin reports is no news.
	v.loaded.Store(true)
	v.running.Store(true)
	ev := pair.Event{Kind: pair.EventAdopt, Epoch: h.Epoch, Peer: rec.Primary, Role: plugin.RoleBackup, Alone: !rec.Undecided()}
	take := func() {
		d.mu.Lock()
		d.backup = b
		d.mu.Unlock()
	}
	if ev.Alone {
		take() // for the promotion, which may be ordered at once
		d.post(ev)
	} else {
		// From when it is taken, the session may come back, of which the
		// machine must not hear first.
		d.post(ev)
		if d.untilBegun(ctx, h.Epoch) != nil {
			return
		}
		take()
	}
	if !b.attach(v) {
		d.removeStray(ctx, v, "its plugin is not where the log is")
	}
}

// adopting runs f while nothing else may be begun with the domain.
func (d *domain) adopting(f func()) {
	d.mu.Lock()
	d.adoptions++
	d.mu.Unlock()
	d.a.wg.Go(func() {
		f()
		d.mu.Lock()
		d.adoptions--
		d.mu.Unlock()
	})
}

// lookup asks the arbiter for the domain's record until it answers. The copy is
// held meanwhile.
func (d *domain) lookup(ctx context.Context) (arbiter.Record, error) {
	var rec arbiter.Record
	var err error
	d.untilDecided(ctx, "looking for the domain's epoch", func(ctx context.Context) error {
		rec, err = d.a.arbiter.Lookup(ctx, d.id)
		return err
	})
	return rec, err
}

// otherHost is the other one of an epoch.
func (d *domain) otherHost(rec arbiter.Record) string {
	if rec.Primary == d.a.cfg.Host {
		return rec.Backup
	}
	return rec.Primary
}

// removeStray ends a copy that replays and cannot go on, and removes what was
// made for it.
func (d *domain) removeStray(ctx context.Context, v *vm, why string) {
	if ctx.Err() != nil {
		return // this agent stops; the next one will take it up
	}
	d.a.log.Warn("a backup is removed", "domain", d.id, "epoch", v.Hello().Epoch, "reason", why)
	d.removing(func() {
		d.destroy(ctx, v)
		b := d.newBackup("", v.Hello().Epoch)
		defer b.cancel()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
		defer cancel()
		if err := errors.Join(b.receiver.Adopt(b.epoch, v.Hello().Head > 0), b.discard(ctx)); err != nil {
			d.a.log.Warn("cannot remove what was made for a backup", "domain", d.id, "error", err)
		}
	})
}

// newBackup makes the data path of an epoch on the backup's host.
func (d *domain) newBackup(peer string, epoch plugin.Epoch) *backup {
	b := &backup{d: d, epoch: epoch, peer: peer, fed: make(chan struct{})}
	b.ctx, b.cancel = context.WithCancel(d.a.ctx)
	b.receiver = &migrate.Receiver{
		Local: hypervisor{d.a.virt}, Domain: d.id, Dir: d.a.cloneDir(d.id), Replicas: d.a.replicas,
		Describe: d.describeBackup, Attached: b.waitVM, Seed: d.seed, Keep: d.a.cfg.Clone.KeepReplicas > 0,
	}
	return b
}

// spoolDir holds the log of an epoch while it is not replayed. It is in the run
// directory, which is in memory. Each epoch has its own: the one before may end
// only after the next has begun.
func (b *backup) spoolDir() string {
	return b.spoolPrefix() + "-" + strconv.FormatUint(uint64(b.epoch), 10)
}

func (b *backup) spoolPrefix() string {
	return filepath.Join(b.d.a.cfg.Agent.RunDir, "log-"+b.d.id.String())
}

// newSpool makes the epoch's, and removes what agents that died left of epochs
// before.
func (b *backup) newSpool() (*channel.Spool, error) {
	old, err := filepath.Glob(b.spoolPrefix() + "*")
	if err != nil {
		return nil, err
	}
	for _, dir := range old {
		if err := os.RemoveAll(dir); err != nil {
			return nil, err
		}
	}
	return channel.NewSpool(b.spoolDir(), b.d.a.log)
}

func (b *backup) storeConfig() channel.StoreConfig {
	cfg := channel.DefaultStoreConfig()
	cfg.Limit = int(b.d.a.cfg.Channel.ReceiveBuffer)
	return cfg
}

// settleTime is how long after its start an agent may find copies that its
// predecessor left; plugins look for it each 100 ms.
const settleTime = 2 * time.Second
