// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"ftvirt.org/ftvirt/migrate"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/channel"
	ctl "ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/pair"
	"ftvirt.org/ftvirt/plugin/rrlog"
)

// backup is the data path of one epoch on the backup's host: the log from the
// peer into memory, acks back, and the log into the plugin.
type backup struct {
	d        *domain
	epoch    plugin.Epoch
	peer     string
	ctx      context.Context
	cancel   context.CancelFunc
	stopping sync.Once
	receiver *migrate.Receiver
	holding  sync.WaitGroup // a diagnosis that still has to take hold of the spool

	beating    atomic.Pointer[vm] // what vm is
	diskFailed atomic.Bool        // a request to one of the replicas failed

	attaching sync.Mutex // held while a plugin is taken
	opening   sync.Mutex // held while a session is made, before welcoming
	welcoming sync.Mutex // held while a session is given, before mu

	mu      sync.Mutex
	stored  *channel.Store  // nil until the backup's QEMU is there
	newest  uint64          // the number of the newest session
	writer  *channel.Writer // of that session, nil until it has sent log
	conn    *channel.Conn   // nil while it is broken
	feeding chan struct{}   // closed when the newest feeder has ended, nil before the first
	vm      *vm
	beats   beats
	ackedAt time.Time // when something was acknowledged last
	dead    bool      // the primary's host told that its QEMU is dead
	leaving bool      // the arbiter is asked: nothing is acknowledged any more
	promote bool
	rate    meter
	fed     chan struct{} // closed and renewed when the plugin consumed

	looked     *side           // of the last verification
	verdict    json.RawMessage // of one that found a difference
	comparison comparison      // of the registers with the primary's

	reached   plugin.Position // the newest position known to be consumed
	lag, peak time.Duration   // of the last period, and of this one so far
	lagged    time.Time       // when the lag was last reported
}

// serve takes a connection about this domain from the host of its primary.
func (d *domain) serve(ctx context.Context, in *channel.Incoming) {
	d.mu.Lock()
	b := d.backup
	d.mu.Unlock()
	mine := b != nil && b.epoch == in.Hello.Epoch && b.peer == in.Hello.From
	switch {
	case in.Hello.Purpose == channel.PurposeSession && mine:
		b.open(ctx, in, true)
	case in.Hello.Purpose == channel.PurposeSession && in.Hello.Target != "" && time.Since(d.a.started) < settleTime:
		_ = in.Refuse(ctx, channel.RefuseBusy, "this agent has just started; ask again")
	case in.Hello.Purpose == channel.PurposeSession && in.Hello.Target != "":
		_ = in.Refuse(ctx, channel.RefuseEpoch, fmt.Sprintf("this host has no log of epoch %d", in.Hello.Epoch))
	case in.Hello.Purpose == channel.PurposeSession:
		d.beginBackup(ctx, in)
	case mine:
		b.tunnel(ctx, in)
	default:
		_ = in.Refuse(ctx, channel.RefuseEpoch, fmt.Sprintf("epoch %d of domain %s is not being cloned to this host", in.Hello.Epoch, d.id))
	}
}

// beginBackup enters a new epoch as its backup, if the arbiter knows it and
// this host has nothing else to do with the domain.
func (d *domain) beginBackup(ctx context.Context, in *channel.Incoming) {
	h := in.Hello
	if d.a.leaving.Load() {
		_ = in.Refuse(ctx, channel.RefuseBusy, fmt.Sprintf("%s: %v", d.a.cfg.Host, errLeavingHost))
		return
	}
	lookup, cancel := context.WithTimeout(ctx, arbiterTimeout)
	defer cancel()
	rec, err := d.a.arbiter.Lookup(lookup, d.id)
	if err != nil {
		_ = in.Refuse(ctx, channel.RefuseInternal, fmt.Sprintf("the arbiter's storage on %s: %v", d.a.cfg.Host, err))
		return
	}
	if rec.Epoch != h.Epoch || !rec.Undecided() || rec.Backup != d.a.cfg.Host || rec.Primary != h.From {
		_ = in.Refuse(ctx, channel.RefuseEpoch, fmt.Sprintf("the arbiter does not know epoch %d with primary %s and backup %s; "+
			"do both hosts use the same storage?", h.Epoch, h.From, d.a.cfg.Host))
		return
	}
	if status, free := d.untilFree(ctx); !free {
		_ = in.Refuse(ctx, channel.RefuseBusy, fmt.Sprintf("domain %s is %s on %s", d.id, status, d.a.cfg.Host))
		return
	}
	b := d.newBackup(h.From, h.Epoch)
	d.mu.Lock()
	if d.backup != nil {
		d.backup.stop()
	}
	if d.primary != nil {
		d.primary.stop()
	}
	d.backup, d.primary = b, nil
	d.mu.Unlock()
	d.post(pair.Event{Kind: pair.EventPrepareBackup, Epoch: h.Epoch, Peer: h.From})
	b.open(ctx, in, false)
}

// untilFree waits until nothing of an earlier epoch is left here: the primary may
// ask for its next backup before the last one is gone.
func (d *domain) untilFree(ctx context.Context) (pair.Status, bool) {
	ctx, cancel := context.WithTimeout(ctx, freeTimeout)
	defer cancel()
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for {
		s, v, _, _ := d.snapshot()
		d.mu.Lock()
		busy := d.removals > 0
		d.mu.Unlock()
		if v == nil && !busy && !s.Removing && !s.Kept && (s.State == pair.Unprotected || s.State == pair.Failed) {
			return s, true
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return s, false
		}
	}
}

// freeTimeout is less than the primary waits for an answer.
const freeTimeout = 2 * time.Second

// begin makes a new session the only one that may add to the log, and tells from
// where on the log has to come. One that it takes the place of is lost, whether or
// not the new one comes about: nobody listens for the primary before that.
func (b *backup) begin(whole bool) (number uint64, end plugin.Position) {
	b.mu.Lock()
	old, lost := b.conn, b.newest
	b.conn, b.writer = nil, nil
	b.newest++
	number = b.newest
	if b.stored != nil {
		b.writer, end = b.stored.Resume(whole)
	}
	b.beats.stop() // those of the session before
	b.mu.Unlock()
	if old != nil {
		// The primary knows best that it broke. Requests of it that are still
		// served are not waited for.
		b.d.post(pair.Event{Kind: pair.EventSessionLost, Epoch: b.epoch, Session: lost})
		b.d.a.wg.Go(func() { _ = old.Close() })
	}
	return number, end
}

// adder gives the writer of a session, unless there is a newer one.
func (b *backup) adder(number uint64) (*channel.Writer, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.newest != number:
		return nil, channel.ErrFenced
	case b.writer == nil && b.stored == nil:
		return nil, errors.New("a log without a backup")
	case b.writer == nil:
		b.writer, _ = b.stored.Resume(false)
	}
	return b.writer, nil
}

var errLeaving = errors.New("this side is going live")

// welcome is not given while the arbiter is asked: it shows the primary that it
// has a backup.
func (b *backup) welcome(ctx context.Context, in *channel.Incoming, end plugin.Position) (net.Conn, error) {
	b.welcoming.Lock()
	defer b.welcoming.Unlock()
	b.mu.Lock()
	leaving := b.leaving
	b.mu.Unlock()
	if leaving {
		_ = in.Refuse(ctx, channel.RefuseEpoch, errLeaving.Error())
		return nil, errLeaving
	}
	return in.Welcome(ctx, end)
}

// open makes a session, again if it takes the place of one that broke.
func (b *backup) open(ctx context.Context, in *channel.Incoming, again bool) {
	b.opening.Lock()
	defer b.opening.Unlock()
	number, end := b.begin(in.Hello.Target == targetAdopt)
	nc, err := b.welcome(ctx, in, end)
	if err != nil {
		return
	}
	conn, err := channel.NewConn(nc, b.d.a.channel, channel.Handlers{
		methodHeartbeat: handler(func(_ context.Context, r heartbeatRequest) (any, error) {
			return b.beginHeartbeat(number, again, r)
		}),
		migrate.MethodPrepare: handler(b.prepare),
		migrate.MethodIncoming: handler(func(ctx context.Context, r migrate.EpochRequest) (any, error) {
			return nil, b.receiver.Incoming(ctx, r.Epoch)
		}),
		migrate.MethodSeeded: handler(func(ctx context.Context, r migrate.EpochRequest) (any, error) {
			return nil, b.receiver.Seeded(ctx, r.Epoch)
		}),
		migrate.MethodFinish: handler(func(ctx context.Context, r migrate.EpochRequest) (any, error) {
			return nil, b.receiver.Finish(ctx, r.Epoch)
		}),
		migrate.MethodDiscard: handler(b.discardRequest),
		methodArbiter:         handler(b.answersHere),
		methodDefinition:      handler(b.takeDefinition),
		methodLook:            handler(b.look),
		methodHashes:          handler(b.hashes),
		methodDiffers:         handler(b.differs),
	})
	if err != nil {
		return
	}
	b.mu.Lock()
	b.conn = conn
	b.mu.Unlock()
	b.d.a.wg.Go(func() { b.receive(conn, number, again) })
	b.d.a.wg.Go(func() { b.tellFull(conn) })
}

// alive is for the heartbeats, which wait for nothing: b.mu may be held while the
// log is written to its spool.
func (b *backup) alive() bool {
	v := b.beating.Load()
	return v == nil || v.Alive()
}

// beginHeartbeat agrees on the heartbeats of a session. The peer's request and
// this answer are large, so that a session whose path loses large packets does
// not come about.
func (b *backup) beginHeartbeat(number uint64, again bool, r heartbeatRequest) (any, error) {
	ctx, cancel := context.WithCancel(b.ctx)
	h, err := b.d.beat(ctx, pair.Event{Epoch: b.epoch, Session: number}, b.peer, r.Key, again, b.alive)
	h.cancel = cancel
	b.mu.Lock()
	current := b.newest == number
	if current {
		b.beats = h
	}
	b.mu.Unlock()
	if !current {
		cancel()
		return nil, channel.ErrFenced
	}
	return heartbeatReply{Filling: filling()}, err
}

// prepareTimeout bounds the start of the backup's QEMU by libvirt, which may
// have to learn first what that QEMU can do.
const prepareTimeout = 60 * time.Second

func (b *backup) prepare(ctx context.Context, r migrate.PrepareRequest) (any, error) {
	if r.Epoch != b.epoch {
		return nil, migrate.ErrEpoch
	}
	ctx, cancel := context.WithTimeout(ctx, prepareTimeout)
	defer cancel()
	return b.receiver.Prepare(ctx, r)
}

// discardRequest is the primary's: the clone failed before the switch.
func (b *backup) discardRequest(ctx context.Context, r migrate.EpochRequest) (any, error) {
	if r.Epoch != b.epoch {
		return nil, migrate.ErrEpoch
	}
	b.d.post(pair.Event{Kind: pair.EventCloneFailed, Epoch: b.epoch})
	return nil, b.discard(ctx)
}

// discard ends the backup and removes what was made for it. It kills QEMU
// first: one that waits for the log does not answer libvirt.
func (b *backup) discard(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	b.mu.Lock()
	v := b.vm
	b.mu.Unlock()
	if v != nil {
		if err := v.Kill(); err != nil {
			b.d.a.log.Error("cannot kill QEMU", "domain", b.d.label(), "error", err)
		}
	}
	// First, since it names the replicas.
	err := b.d.dropDefinition(b.epoch)
	err = errors.Join(err, b.receiver.Discard(ctx))
	b.holding.Wait()
	return errors.Join(err, os.RemoveAll(b.spoolDir()))
}

// tunnel connects the primary's QEMU with this host's.
func (b *backup) tunnel(ctx context.Context, in *channel.Incoming) {
	if in.Hello.Purpose == channel.PurposeResync {
		if nc, err := in.Welcome(ctx, 0); err == nil {
			if err := b.receiver.Resync(b.ctx, nc, in.Hello.Target); err != nil {
				b.d.a.log.Debug("resync", "domain", b.d.label(), "disk", in.Hello.Target, "error", err)
			}
		}
		return
	}
	qemu, err := b.receiver.Dial(ctx, in.Hello.Purpose.String())
	if err != nil {
		_ = in.Refuse(ctx, channel.RefuseInternal, err.Error())
		return
	}
	nc, err := in.Welcome(ctx, 0)
	if err != nil {
		_ = qemu.Close()
		return
	}
	// It ends with either QEMU, or with the epoch.
	if err := channel.Splice(b.ctx, nc, qemu); err != nil {
		b.d.a.log.Debug("tunnel", "domain", b.d.label(), "purpose", in.Hello.Purpose, "error", err)
	}
}

// stop ends the data path; QEMU is left as it is.
func (b *backup) stop() { b.stopping.Do(b.halt) }

func (b *backup) halt() {
	b.cancel()
	b.mu.Lock()
	conn, v := b.conn, b.vm
	b.conn = nil
	b.mu.Unlock()
	if v != nil {
		v.watch(nil)
		v.digests(nil)
	}
	if conn != nil {
		// It waits for requests that are served, which end with ctx.
		b.d.a.wg.Go(func() { _ = conn.Close() })
	}
}

// waitVM implements migrate.Receiver.Attached.
func (b *backup) waitVM(ctx context.Context) (migrate.Replayer, error) {
	ctx, cancel := context.WithTimeout(ctx, attachTimeout)
	defer cancel()
	v, err := b.d.waitAttached(ctx, func(v *vm) bool { return v.Hello().Backup && v.reports().Mode == ctl.ModeReplay })
	if err != nil {
		return nil, fmt.Errorf("the backup's QEMU has no working plugin: %w", err)
	}
	return v, nil
}

// attach takes the plugin of the backup's QEMU.
func (b *backup) attach(v *vm) bool {
	if h := v.Hello(); h.Epoch != 0 && h.Epoch != b.epoch {
		return false
	}
	b.attaching.Lock()
	defer b.attaching.Unlock()
	if b.ctx.Err() != nil {
		// It came up after the clone was given up, as when libvirt was slow.
		return false
	}
	b.mu.Lock()
	fresh := b.stored == nil
	before, fed := b.vm, b.feeding
	ended := make(chan struct{})
	b.vm, b.feeding = v, ended
	b.mu.Unlock()
	b.beating.Store(v)
	if before != nil && before != v {
		_ = before.Close() // QEMU has but one connection: its feeder must not wait for room there
	}
	started := false
	defer func() {
		if !started {
			close(ended)
		}
	}()
	if fresh {
		layout, err := rrlog.LayoutFor(v.Hello().QEMU.Major, v.Hello().QEMU.Minor)
		if err != nil {
			b.d.a.log.Error("backup", "error", err)
			return false
		}
		cfg := b.storeConfig()
		if cfg.Spool, err = b.newSpool(); err != nil {
			b.d.a.log.Warn("a restart of the agent would cost the backup", "domain", b.d.label(), "error", err)
			cfg.Spool = nil
		}
		store, err := channel.NewStore(layout, cfg)
		if err != nil {
			b.d.a.log.Error("backup", "error", err)
			return false
		}
		b.mu.Lock()
		b.stored = store
		b.mu.Unlock()
	}
	reader, err := b.log().Rewind(v.Hello().Head)
	if err != nil {
		b.d.a.log.Error("the backup's plugin is where the log is no more", "domain", b.d.label(), "error", err)
		return false
	}
	v.watch(func() { b.watch(v) })
	v.digests(func(g ctl.Digest) { b.compare(v, g) })
	b.d.welcome(v, b.epoch, 0)
	started = true
	b.d.a.wg.Go(func() {
		defer close(ended)
		if fed != nil {
			<-fed // it may still read what it was given
		}
		b.feed(v, reader)
	})
	return true
}

// attachLive takes the plugin of a copy that went live before its connection
// broke, so that it could not say so.
func (b *backup) attachLive(v *vm) {
	b.mu.Lock()
	b.vm = v
	b.mu.Unlock()
	v.watch(func() { b.watch(v) })
	b.d.welcome(v, b.epoch, 0)
	b.watch(v)
}

// watch follows the plugin's reports; it must not block.
func (b *backup) watch(v *vm) {
	r := v.reports()
	if r.Mode == ctl.ModeLive {
		if once(&v.live) {
			go b.d.post(pair.Event{Kind: pair.EventWentLive, Epoch: b.epoch})
		}
		return
	}
	if r.consumed.Loaded && once(&v.loaded) {
		go b.d.post(pair.Event{Kind: pair.EventCloneLoaded, Epoch: b.epoch})
	}
	if r.Running && once(&v.running) {
		go func() {
			b.d.post(pair.Event{Kind: pair.EventCloneLoaded, Epoch: b.epoch})
			b.d.post(pair.Event{Kind: pair.EventBackupRunning, Epoch: b.epoch})
		}()
	}
	if r.diverged != nil && once(&v.left) {
		b.d.a.log.Error("the backup diverged", "domain", b.d.label(), "epoch", b.epoch, "position", r.diverged.Pos,
			"instructions", r.diverged.Icount, "wanted_kind", r.diverged.Kind, "wanted_instructions", r.diverged.Instructions)
		go b.d.post(pair.Event{Kind: pair.EventLocalDiverged, Epoch: b.epoch})
	}
	b.consumed(r)
}

func (b *backup) consumed(r reports) {
	store := b.log()
	if err := store.Release(r.consumed.Pos); err != nil {
		b.d.a.log.Debug("store", "error", err)
	}
	now := time.Now()
	b.mu.Lock()
	close(b.fed)
	b.fed = make(chan struct{})
	if r.consumed.Pos > b.reached {
		b.reached = r.consumed.Pos
		if at, ok := store.ReceivedAt(b.reached); ok {
			b.peak = max(b.peak, now.Sub(at))
		}
	}
	b.peak = max(b.peak, store.Lag(b.reached))
	due := now.Sub(b.lagged) >= lagPeriod || b.peak > paceTarget && now.Sub(b.lagged) >= lagUrgent
	if due {
		b.lagged, b.lag, b.peak = now, b.peak, 0
	}
	conn, lag := b.conn, b.lag
	b.mu.Unlock()
	if due && conn != nil {
		equal, _ := b.comparison.result()
		c := entry{Kind: kindLag, Epoch: b.epoch, LagMicros: lag.Microseconds(), Consumed: r.consumed.Pos, Compared: equal}
		b.d.a.wg.Go(func() { send(b.ctx, conn, c) })
	}
}

// lagPeriod is between reports of the execution lag to the primary; each tells
// the largest of its period.
const lagPeriod = 100 * time.Millisecond

// lagUrgent is that period while the primary is to be slowed down.
const lagUrgent = 25 * time.Millisecond

// feed gives the plugin the log, at most its window ahead, and promotes it at
// the end if this side is to go live: it alone has given it all of the log. What
// ends it, but for a newer feeder or the end of the epoch, ends the plugin's
// connection too: the plugin connects again and is fed from where it is, or the
// machine hears that it does not.
func (b *backup) feed(v *vm, r *channel.Reader) {
	err := b.feedAll(v, r)
	if err == nil || errors.Is(err, channel.ErrFenced) || b.ctx.Err() != nil {
		return
	}
	b.d.a.log.Warn("the backup's plugin is not fed; it has to connect again", "domain", b.d.label(), "error", err)
	_ = v.Close()
}

func (b *backup) feedAll(v *vm, r *channel.Reader) error {
	for {
		pos, p, err := r.Next(b.ctx, 128<<10)
		if errors.Is(err, io.EOF) {
			return v.Promote(b.epoch)
		}
		if err != nil {
			return err
		}
		if err := b.room(v, pos+plugin.Position(len(p))); err != nil {
			return err
		}
		if err := v.Feed(pos, p); err != nil {
			return err
		}
	}
}

// room waits until the plugin's window reaches to end.
func (b *backup) room(v *vm, end plugin.Position) error {
	for {
		b.mu.Lock()
		ch := b.fed
		b.mu.Unlock()
		if end <= v.reports().consumed.Pos+plugin.Position(v.Hello().Window) {
			return nil
		}
		select {
		case <-ch:
		case <-v.done:
			return ErrVMEnded
		case <-b.ctx.Done():
			return b.ctx.Err()
		}
	}
}

// receive serves a session with the primary until it breaks.
func (b *backup) receive(conn *channel.Conn, number uint64, again bool) {
	err := b.serve(conn, number, again)
	b.mu.Lock()
	current := b.conn == conn
	if current {
		b.conn = nil
		b.beats.stop() // so that a primary that holds the session for well hears of it
	}
	b.mu.Unlock()
	if current && b.ctx.Err() == nil {
		b.d.a.log.Warn("session with the primary broke", "domain", b.d.label(), "peer", b.peer, "error", err)
		b.d.post(pair.Event{Kind: pair.EventSessionLost, Epoch: b.epoch, Session: number})
	}
	_ = conn.Close() // waits for requests that are served
}

func (b *backup) serve(conn *channel.Conn, number uint64, again bool) error {
	for {
		m, err := conn.Receive(b.ctx)
		if err != nil {
			return err
		}
		b.mu.Lock()
		h := b.beats
		b.mu.Unlock()
		h.progress()
		if again {
			// The primary says nothing before it has the answer of beginHeartbeat:
			// the session carries both ways.
			again = false
			b.d.post(pair.Event{Kind: pair.EventSessionRestored, Epoch: b.epoch, Session: number})
		}
		switch m.Type {
		case channel.FrameLog:
			if err := b.append(conn, number, m); err != nil {
				return err
			}
		case channel.FrameControl:
			c, err := decodeControl(m)
			if err != nil {
				return err
			}
			b.control(c)
		default:
			return errors.New("the primary sent an ack")
		}
	}
}

func (b *backup) append(conn *channel.Conn, number uint64, m channel.Message) error {
	w, err := b.adder(number)
	if err != nil {
		return err
	}
	acked, err := w.Append(b.ctx, m.Position, m.Data)
	var format *rrlog.FormatError
	if errors.As(err, &format) || errors.Is(err, channel.ErrConflict) {
		// Another session would bring the same.
		b.d.a.log.Error("the log cannot be replayed", "domain", b.d.label(), "epoch", b.epoch, "error", err)
		b.d.post(pair.Event{Kind: pair.EventLocalDiverged, Epoch: b.epoch})
	}
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rate.add(len(m.Data), time.Now())
	if b.leaving || b.newest != number {
		return nil
	}
	b.ackedAt = time.Now()
	return conn.SendAck(acked)
}

// tellFull tells the primary for as long as there is no room for its log: that is
// why nothing more is acknowledged.
func (b *backup) tellFull(conn *channel.Conn) {
	t := time.NewTicker(fullPeriod)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-conn.Done():
			return
		}
		if store := b.log(); store != nil && store.Full() {
			send(b.ctx, conn, entry{Kind: kindFull, Epoch: b.epoch})
		}
	}
}

// fullPeriod is between reports of a full store.
const fullPeriod = 100 * time.Millisecond

// leave is called before the arbiter is asked. From here on the primary, which
// was taken for dead and may live, gets no ack and no new session: a packet that
// it lets go for one could leave when this side is live.
func (b *backup) leave() {
	b.welcoming.Lock()
	defer b.welcoming.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.leaving = true
	if b.conn != nil {
		b.conn.DropAck()
	}
}

func (b *backup) control(c entry) {
	if c.Kind == kindDigest && c.Digest != nil {
		b.expect(*c.Digest)
		return
	}
	ev, ok := notifyEvent(c)
	if !ok {
		return
	}
	if ev.Kind == pair.EventPeerQEMUDied {
		b.mu.Lock()
		b.dead = true
		b.mu.Unlock()
	}
	if ev.Kind != pair.EventPeerPoweredOff {
		b.d.post(ev)
		return
	}
	// The replica of the disks is complete when the log is consumed.
	b.d.a.wg.Go(func() {
		ctx, cancel := context.WithTimeout(b.ctx, powerOffTimeout)
		defer cancel()
		b.mu.Lock()
		v := b.vm
		b.mu.Unlock()
		if v != nil && b.log() != nil {
			_ = v.wait(ctx, "waiting for the end of the log", func(reports) bool { return b.whole(v) })
		}
		ev.Behind = v == nil || !b.whole(v)
		b.d.post(ev)
	})
}

// powerOffTimeout bounds the wait for the replay of a deliberate end.
const powerOffTimeout = 5 * time.Second

// attached is the VM that replays here.
func (b *backup) attached() *vm {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.vm
}

// goLive lets the backup consume what there is of the log and then go live.
// The arbiter was won: nothing of the primary is taken any more.
func (b *backup) goLive() {
	b.mu.Lock()
	b.promote = true
	b.receiver.Won()
	conn := b.conn
	b.conn = nil
	store, wait := b.stored, b.fence()
	b.mu.Unlock()
	if store != nil {
		b.d.a.wg.Go(func() {
			t := time.NewTimer(wait)
			defer t.Stop()
			select {
			case <-t.C:
				store.Seal()
			case <-b.ctx.Done():
			}
		})
	}
	if conn != nil {
		b.d.a.wg.Go(func() { _ = conn.Close() })
	}
}

// fence is for how long the primary may still let packets go for the last ack, so
// that this side must not be live. b.mu is held.
func (b *backup) fence() time.Duration {
	if b.dead {
		return 0
	}
	return max(0, b.d.a.cfg.Heartbeat.Timeout-time.Since(b.ackedAt))
}

// session gives the connection to the primary's agent, nil while it is broken.
func (b *backup) session() *channel.Conn {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.conn
}

// notify tells the primary's agent something.
func (b *backup) notify(c entry) { send(b.ctx, b.session(), c) }

// log gives what is held of the log, nil before there is a QEMU to replay it.
func (b *backup) log() *channel.Store {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.stored
}
