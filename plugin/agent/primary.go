// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"ftvirt.org/ftvirt/migrate"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/channel"
	ctl "ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/pair"
	"ftvirt.org/ftvirt/plugin/rrlog"
)

// cloneProgress is what status shows of a clone.
type cloneProgress struct {
	migrate.Progress
	Pause time.Duration
	told  time.Time // when the machines were told last
}

// primary is the data path of one epoch on the primary's host: the log from
// the plugin to the peer, acks and control entries back.
type primary struct {
	d        *domain
	epoch    plugin.Epoch
	peer     string
	ctx      context.Context
	cancel   context.CancelFunc
	stopping sync.Once
	// abort ends the clone, but not the session, over which the peer is told.
	cloning context.Context
	abort   context.CancelFunc
	beats   beats

	mu       sync.Mutex
	vm       *vm
	conn     *channel.Conn   // nil while the session is broken
	newest   uint64          // the number of the newest session
	fullAt   time.Time       // when the backup said last that it has no room
	expect   plugin.Position // of the next byte to send
	dec      *rrlog.Decoder  // of the log, to see who ended it
	layout   rrlog.Layout    // for one that is made later
	acked    plugin.Position // what the plugin was told
	held     plugin.Position // an ack in doubt, see ackGuard
	guard    ackGuard
	timer    ackTimer
	lag      time.Duration
	compared uint64 // times that both sides' registers were equal
	pacer    pacer
	paced    float64 // part of its time that the primary pauses
	rate     meter

	keptMu sync.Mutex
	kept   *os.File // copy of the log, if one is kept
}

// startClone begins an epoch as its primary; the machine asked for it.
func (d *domain) startClone(agent context.Context, epoch plugin.Epoch, peer string) {
	ctx, cancel := context.WithCancel(agent)
	p := &primary{d: d, epoch: epoch, peer: peer, ctx: ctx, cancel: cancel, guard: d.ackGuard()}
	p.cloning, p.abort = context.WithCancel(ctx)
	d.mu.Lock()
	if d.primary != nil {
		d.primary.stop()
	}
	if d.backup != nil {
		d.backup.stop()
	}
	d.primary, d.backup = p, nil
	d.progress = cloneProgress{}
	d.clones++
	v := d.vm
	d.mu.Unlock()
	d.a.wg.Go(func() {
		err := errors.New("the domain's plugin is not connected")
		if v != nil {
			err = p.clone(v)
		}
		if err != nil {
			d.a.log.Warn("clone failed", "domain", d.label(), "epoch", epoch, "peer", peer, "error", err)
			d.setFailure(err)
			d.setAvoid(peer)
			// The switch, if it came to it, is posted by p.watch before.
			p.watch()
			d.post(pair.Event{Kind: pair.EventCloneFailed, Epoch: epoch})
		}
		if errors.Is(err, migrate.ErrRevert) {
			d.cleanUp(agent, v)
		}
		d.mu.Lock()
		d.clones--
		d.mu.Unlock()
	})
}

// stop ends the data path. What the plugin still logs goes nowhere.
// It is done once: a later epoch may have the plugin by then.
func (p *primary) stop() { p.stopping.Do(p.halt) }

func (p *primary) halt() {
	p.cancel()
	p.mu.Lock()
	conn, v := p.conn, p.vm
	p.conn = nil
	p.mu.Unlock()
	p.keptMu.Lock()
	if p.kept != nil {
		_ = p.kept.Close()
		p.kept = nil
	}
	p.keptMu.Unlock()
	if v != nil {
		v.ship(nil)
		v.digests(nil)
		v.watch(nil)
	}
	if conn != nil {
		// Close waits for nothing of ours: this side serves no requests.
		_ = conn.Close()
	}
}

func (p *primary) clone(v *vm) error {
	cfg := p.d.a.cfg
	ctx, cancel := context.WithTimeout(p.cloning, cfg.Clone.Timeout)
	defer cancel()
	layout, err := rrlog.LayoutFor(v.Hello().QEMU.Major, v.Hello().QEMU.Minor)
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.dec = rrlog.NewDecoder(layout)
	p.mu.Unlock()
	p.keepLog()
	conn, _, err := p.d.a.dial(ctx, p.peer, p.d.id, p.epoch, "")
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.conn, p.vm = conn, v
	p.mu.Unlock()
	// Nobody reads from it yet, so that nobody else reports its end.
	number, err := p.beginBeats(ctx, conn, false)
	if err != nil {
		return err
	}
	p.d.a.wg.Go(func() { p.receive(conn, number) })
	p.d.a.wg.Go(func() { p.tellDefinition(conn) })
	v.digests(p.digest)
	v.ship(p.ship)
	v.watch(p.watch)
	if err := v.idle(ctx); err != nil {
		return err
	}
	source := migrate.Source{Local: p.d.a.virt, Peer: p, Plugin: v}
	_, err = source.Clone(ctx, migrate.Options{
		Domain: p.d.id, Epoch: p.epoch, Dir: p.d.a.cloneDir(p.d.id), QEMUUser: v.User(),
		Downtime: cfg.Clone.DowntimeLimit, Bandwidth: int64(cfg.Clone.Bandwidth),
		Progress: p.goesOn,
		Switched: func(pause time.Duration) {
			var equal int64
			p.progress(func(c *cloneProgress) { c.Pause, equal = pause, c.Equal })
			p.d.a.log.Info("cloned", "domain", p.d.label(), "epoch", p.epoch, "peer", p.peer, "pause", pause, "equal_disk_bytes", equal)
		},
	})
	return err
}

// beginBeats agrees on the heartbeats of a session with the peer, and gives the
// session its number.
func (p *primary) beginBeats(ctx context.Context, conn *channel.Conn, again bool) (uint64, error) {
	p.mu.Lock()
	v := p.vm
	p.newest++
	number := p.newest
	p.beats.stop()
	p.mu.Unlock()
	key := newKey()
	asking, cancel := context.WithTimeout(ctx, controlTimeout)
	defer cancel()
	if err := conn.Call(asking, methodHeartbeat, heartbeatRequest{Key: key, Filling: filling()}, nil); err != nil {
		return 0, fmt.Errorf("%s was reached, but the channel does not carry %d bytes there and back: %w; "+
			"'ftvirt doctor --peer %[1]s' tells whether large packets are lost", p.peer, fillingSize, err)
	}
	beating, cancel := context.WithCancel(p.ctx)
	h, err := p.d.beat(beating, pair.Event{Epoch: p.epoch, Session: number}, p.peer, key, again, v.Alive)
	h.cancel = cancel
	p.mu.Lock()
	p.beats = h
	p.mu.Unlock()
	return number, err
}

// goesOn shows how far the clone is, and tells both machines that it goes on.
func (p *primary) goesOn(m migrate.Progress) {
	var due bool
	p.progress(func(c *cloneProgress) {
		c.Progress = m
		due = time.Since(c.told) >= progressPeriod
		if due {
			c.told = time.Now()
		}
	})
	if due {
		p.d.post(pair.Event{Kind: pair.EventCloneProgress, Epoch: p.epoch})
		p.notify(entry{Kind: kindProgress, Epoch: p.epoch})
	}
}

// progressPeriod is between signs of life of a clone.
const progressPeriod = time.Second

func (p *primary) progress(f func(*cloneProgress)) {
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	f(&p.d.progress)
}

// Call and Tunnel implement migrate.Peer.
func (p *primary) Call(ctx context.Context, method string, in, out any) error {
	conn := p.session()
	if conn == nil {
		return errors.New("the connection to the peer is broken")
	}
	return conn.Call(ctx, method, in, out)
}

// Tunnel opens a raw connection to the backup's QEMU.
func (p *primary) Tunnel(ctx context.Context, purpose, target string) (net.Conn, error) {
	peer, err := p.d.a.cfg.Peer(p.peer)
	if err != nil {
		return nil, err
	}
	kind := channel.PurposeMigrate
	switch purpose {
	case "nbd":
		kind = channel.PurposeNBD
	case "resync":
		kind = channel.PurposeResync
	}
	conn, _, err := channel.Dial(ctx, p.d.a.transport, peer.Channel, channel.Hello{
		Purpose: kind, From: p.d.a.cfg.Host, To: p.peer, Domain: p.d.id, Epoch: p.epoch, Target: target,
	}, p.d.a.channel)
	return conn, err
}

// watch looks at the plugin's reports for the switch.
func (p *primary) watch() {
	p.mu.Lock()
	v := p.vm
	p.mu.Unlock()
	if v == nil {
		return
	}
	if r := v.reports(); r.Mode == ctl.ModeRecord && r.Epoch == p.epoch && v.switched.Swap(uint64(p.epoch)) != uint64(p.epoch) {
		p.d.post(pair.Event{Kind: pair.EventSwitched, Epoch: p.epoch})
	}
}

// ship sends a piece of the log on. It is called by the one goroutine that
// reads from the plugin, and blocks it when the channel is full. While the
// session is broken it drops: the plugin keeps what is not acknowledged, and
// sends it again from where the peer resumes.
func (p *primary) ship(pos plugin.Position, b []byte) error {
	p.mu.Lock()
	conn := p.conn
	end := pos + plugin.Position(len(b))
	fresh := p.decode(pos, b)
	if conn == nil || pos > p.expect || end <= p.expect {
		p.mu.Unlock()
		p.keep(fresh)
		return nil
	}
	b = b[p.expect-pos:] // sent before, as after the plugin was made to resume
	pos = p.expect
	p.expect += plugin.Position(len(b))
	now := time.Now()
	p.rate.add(len(b), now)
	p.timer.send(p.expect, now)
	p.mu.Unlock()
	p.keep(fresh)
	// Its error is the connection's, which receive reports.
	_ = conn.SendLog(p.ctx, pos, b)
	return nil
}

// decode follows the log, whether there is a session or not, since it tells how
// the domain ended. It returns what is new of the piece; p.mu is held.
func (p *primary) decode(pos plugin.Position, b []byte) []byte {
	if p.dec == nil || p.dec.Err() != nil {
		return nil
	}
	known := p.dec.Position()
	if pos > known || pos+plugin.Position(len(b)) <= known {
		return nil
	}
	fresh := b[known-pos:]
	if err := p.dec.Feed(fresh); err != nil {
		p.d.a.log.Error("the log is not understood", "domain", p.d.label(), "error", err)
	}
	return fresh
}

// keepLog opens the copy of the log, if one is wanted. Without it the domain is
// protected all the same.
func (p *primary) keepLog() {
	dir := p.d.a.cfg.Replay.LogDir
	if dir == "" {
		return
	}
	p.keptMu.Lock()
	defer p.keptMu.Unlock()
	err := os.MkdirAll(dir, 0o700)
	if err == nil {
		name := fmt.Sprintf("%s-%d.rrlog", p.d.id, p.epoch)
		// One of that name is another's: of another host, or of a time before
		// the arbiter was told to forget the domain.
		p.kept, err = os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	}
	if err != nil {
		p.d.a.log.Warn("the log is not kept", "domain", p.d.label(), "error", err)
	}
}

func (p *primary) keep(b []byte) {
	p.keptMu.Lock()
	defer p.keptMu.Unlock()
	if p.kept == nil {
		return
	}
	if _, err := p.kept.Write(b); err != nil {
		p.d.a.log.Warn("the log is kept no more", "domain", p.d.label(), "error", err)
		_ = p.kept.Close()
		p.kept = nil
	}
}

// ended tells whether QEMU closed the log, so that it did not crash, and
// guestEnded whether the guest asked for that.
func (p *primary) ended() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dec != nil && p.dec.Ended()
}

func (p *primary) guestEnded() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dec != nil && p.dec.GuestEnded()
}

// attached is the VM whose log this is.
func (p *primary) attached() *vm {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.vm
}

// receive serves a session until it breaks, then gets another. It does nothing
// without one.
func (p *primary) receive(conn *channel.Conn, number uint64) {
	for conn != nil {
		p.d.a.wg.Go(func() { p.watchStall(conn) })
		err := p.serve(conn)
		p.mu.Lock()
		if p.conn == conn {
			p.conn = nil
		}
		p.beats.stop() // so that a backup that holds the session for well hears of it
		p.mu.Unlock()
		_ = conn.Close()
		if p.ctx.Err() != nil {
			return
		}
		p.d.a.log.Warn("session with the peer broke", "domain", p.d.label(), "peer", p.peer, "error", err)
		p.d.post(pair.Event{Kind: pair.EventSessionLost, Epoch: p.epoch, Session: number})
		conn, number = p.reconnect(targetResume)
	}
}

// watchStall ends a session over which log is sent and nothing is acknowledged,
// whatever heartbeats say: outputs wait for that. A backup that has no room for
// more says so.
func (p *primary) watchStall(conn *channel.Conn) {
	limit := max(p.d.a.cfg.Channel.AckTimeout, p.d.a.cfg.Heartbeat.Timeout)
	t := time.NewTicker(limit / stallTicks)
	defer t.Stop()
	var s stall
	for {
		select {
		case <-t.C:
		case <-conn.Done():
			return
		}
		p.mu.Lock()
		// Of a QEMU that was ended not all is acknowledged, and nothing waits for it.
		waits := p.timer.waits() && time.Since(p.fullAt) > limit && !p.dec.Ended()
		acks := p.timer.acks
		p.mu.Unlock()
		if s.tick(waits, acks) {
			p.d.a.log.Error("the channel carries nothing, though it is open: no log was acknowledged; large packets may be lost, "+
				"see 'ftvirt doctor --peer'", "domain", p.d.label(), "epoch", p.epoch, "peer", p.peer, "for", limit)
			_ = conn.Close()
			return
		}
	}
}

// stallTicks is in how many parts the limit of a stall is counted.
const stallTicks = 20

// stall counts for how long log waits and no ack comes. An agent that did not run
// itself has fewer ticks, so it accuses nobody of its own silence.
type stall struct {
	acks  uint64
	ticks int
}

// tick tells that the limit is reached.
func (s *stall) tick(waits bool, acks uint64) bool {
	if !waits || acks != s.acks {
		*s = stall{acks: acks}
		return false
	}
	s.ticks++
	return s.ticks >= stallTicks
}

func (p *primary) serve(conn *channel.Conn) error {
	p.mu.Lock()
	p.guard.renew()
	p.held = 0
	p.mu.Unlock()
	for {
		m, err := conn.Receive(p.ctx)
		if err != nil {
			return err
		}
		p.mu.Lock()
		beats := p.beats
		p.mu.Unlock()
		beats.progress()
		switch m.Type {
		case channel.FrameAck:
			p.ack(conn, m.Position)
		case channel.FrameControl:
			c, err := decodeControl(m)
			if err != nil {
				return err
			}
			p.control(c)
		default:
			return errors.New("the backup sent a log")
		}
	}
}

// ack passes an ack on to the plugin, which lets packets go for it, unless the
// pair is over or the ack is in doubt.
func (p *primary) ack(conn *channel.Conn, pos plugin.Position) {
	p.mu.Lock()
	now := time.Now()
	p.timer.ack(pos, now, p.d.acks)
	ok, wait := p.guard.admit(pos, p.expect, bootTime())
	again := p.held == 0
	p.held = 0
	if !ok {
		p.held = pos
	}
	p.mu.Unlock()
	switch {
	case ok:
		p.tellAcked(conn, pos)
	case again:
		p.d.a.log.Info("an ack came after a silence: waiting for a fresh one", "domain", p.d.label(), "epoch", p.epoch)
		time.AfterFunc(wait, func() { p.ackLate(conn) })
	}
}

// ackLate passes on an ack that nothing fresher has replaced.
func (p *primary) ackLate(conn *channel.Conn) {
	p.mu.Lock()
	pos, rest := p.held, p.guard.until.Sub(bootTime())
	if rest <= 0 {
		p.held = 0
	}
	p.mu.Unlock()
	switch {
	case pos == 0:
	case rest > 0: // there was another silence
		time.AfterFunc(rest, func() { p.ackLate(conn) })
	default:
		p.tellAcked(conn, pos)
	}
}

// tellAcked tells the plugin, if the session still lives. A machine that has
// given the pair up leaves the gate to the arbiter.
func (p *primary) tellAcked(conn *channel.Conn, pos plugin.Position) {
	p.mu.Lock()
	v := p.vm
	current := p.conn == conn
	if current {
		p.acked = max(p.acked, pos)
	}
	p.mu.Unlock()
	if !current || !p.d.paired() {
		return
	}
	if err := v.Ack(pos); err != nil {
		p.d.a.log.Debug("plugin", "domain", p.d.label(), "error", err)
	}
}

// ackGuard gives one for an epoch of the domain.
func (d *domain) ackGuard() ackGuard {
	return ackGuard{silence: d.a.cfg.AckSilence()}
}

func (p *primary) control(c entry) {
	if c.Kind == kindFull {
		p.mu.Lock()
		p.fullAt = time.Now()
		p.mu.Unlock()
		return
	}
	if c.Kind == kindLag {
		p.mu.Lock()
		p.compared = c.Compared
		p.mu.Unlock()
		p.pace(time.Duration(c.LagMicros) * time.Microsecond)
		return
	}
	ev, ok := notifyEvent(c)
	if !ok {
		return
	}
	if ev.Kind == pair.EventPeerUnfit {
		p.d.a.log.Error("the backup is none any more", "domain", p.d.label(), "epoch", p.epoch, "peer", p.peer, "reason", ev.Reason)
		p.d.setAvoid(p.peer)
	}
	p.d.post(ev)
}

// pace takes a report of the backup's lag, and slows the primary down if need be.
func (p *primary) pace(lag time.Duration) {
	p.mu.Lock()
	part := p.pacer.update(lag, time.Now())
	changed := math.Abs(part-p.paced) >= paceChange || part == 0 && p.paced > 0
	p.lag = lag
	if changed {
		p.paced = part
	}
	v := p.vm
	p.mu.Unlock()
	if !changed {
		return
	}
	if err := v.Pace(part); err != nil {
		p.d.a.log.Debug("plugin", "domain", p.d.label(), "error", err)
	}
}

// reconnectPause is between tries to get the session back.
const reconnectPause = 20 * time.Millisecond

// reconnect gets a new session and makes the plugin resume where the peer is.
// It gives up when the pair is over.
func (p *primary) reconnect(target string) (*channel.Conn, uint64) {
	t := time.NewTicker(reconnectPause)
	defer t.Stop()
	var last string
	for p.d.paired() {
		conn, number, err := p.resume(target)
		if err != nil && err.Error() != last {
			// Fifty times a second the same is enough said once.
			last = err.Error()
			p.d.a.log.Info("no session with the peer yet", "domain", p.d.label(), "peer", p.peer, "error", err)
		}
		if err == nil {
			p.d.post(pair.Event{Kind: pair.EventSessionRestored, Epoch: p.epoch, Session: number})
			p.d.a.wg.Go(func() { p.tellDefinition(conn) })
			return conn, number
		}
		var refused *channel.RefusedError
		if errors.As(err, &refused) && refused.Code != channel.RefuseBusy {
			// Its agent was restarted, and the log that it held is lost.
			p.d.a.log.Warn("the peer has no backup any more", "domain", p.d.label(), "peer", p.peer, "error", err)
			p.d.post(pair.Event{Kind: pair.EventPeerQEMUDied, Epoch: p.epoch})
			return nil, 0
		}
		select {
		case <-t.C:
		case <-p.ctx.Done():
			return nil, 0
		}
	}
	return nil, 0
}

// resume tries once to get a session back.
func (p *primary) resume(target string) (*channel.Conn, uint64, error) {
	ctx, cancel := context.WithTimeout(p.ctx, controlTimeout)
	defer cancel()
	conn, from, err := p.d.a.dial(ctx, p.peer, p.d.id, p.epoch, target)
	if err != nil {
		return nil, 0, err
	}
	// Nobody reads from it yet, so that nobody else reports its end.
	number, err := p.beginBeats(ctx, conn, true)
	if err == nil {
		err = conn.SendControl(ctx, entry{Kind: kindResumed, Epoch: p.epoch})
	}
	if err != nil {
		_ = conn.Close()
		return nil, 0, err
	}
	p.mu.Lock()
	p.conn, p.expect = conn, from
	p.timer.reset()
	if target == targetAdopt {
		p.dec = rrlog.NewDecoder(p.layout, rrlog.StartAt(from, 0))
	}
	v := p.vm
	p.mu.Unlock()
	if v.reports().Mode == ctl.ModeRecord {
		p.d.welcome(v, p.epoch, from)
	}
	return conn, number, nil
}

// attach takes the plugin again after its connection broke. What the peer has
// acknowledged is where it goes on.
func (p *primary) attach(v *vm) {
	p.mu.Lock()
	p.vm = v
	resume := p.expect
	p.mu.Unlock()
	v.switched.Store(uint64(p.epoch))
	v.digests(p.digest)
	v.ship(p.ship)
	v.watch(p.watch)
	// Everything below expect was given to the channel, so the plugin may be
	// told that it need not be sent again, but not that it is acknowledged:
	// the position of the last ack is that.
	p.mu.Lock()
	acked := p.acked
	p.expect = min(resume, acked)
	p.mu.Unlock()
	p.d.welcome(v, p.epoch, acked)
}

// session gives the connection to the backup's agent, nil while it is broken.
func (p *primary) session() *channel.Conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.conn
}

// notify tells the backup's agent something.
func (p *primary) notify(c entry) { send(p.ctx, p.session(), c) }

func send(ctx context.Context, conn *channel.Conn, c entry) {
	if conn == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, controlTimeout)
	defer cancel()
	// A peer that cannot be reached finds out by its own means.
	_ = conn.SendControl(ctx, c)
}
