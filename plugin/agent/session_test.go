// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"log/slog"
	"net"
	"testing"
	"time"

	"ftvirt.org/ftvirt/migrate"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/channel"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/detect"
	"ftvirt.org/ftvirt/plugin/pair"
	"ftvirt.org/ftvirt/plugin/rrlog"
)

// heldLocal is a libvirt whose monitor does not answer before it is released.
type heldLocal struct {
	asked   chan struct{}
	release chan struct{}
}

func (l heldLocal) Monitor(context.Context, plugin.UUID, string, any, any) error {
	l.asked <- struct{}{}
	<-l.release
	return nil
}
func (heldLocal) Create(context.Context, string) error              { return nil }
func (heldLocal) Destroy(context.Context, plugin.UUID) error        { return nil }
func (heldLocal) Active(context.Context, plugin.UUID) (bool, error) { return false, nil }

// sessions is a backup that has a store, its machine, and a primary's agent that
// dials it.
type sessions struct {
	t     *testing.T
	ctx   context.Context
	d     *domain
	b     *backup
	m     *pair.Machine
	addr  string
	local heldLocal
}

func newSessions(t *testing.T) *sessions {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	a := &Agent{
		cfg: config.Config{
			Host: "hostb", Agent: config.Agent{RunDir: t.TempDir()},
			Peers: map[string]config.Peer{"hosta": {Heartbeat: "127.0.0.1:9"}},
		},
		log: slog.New(slog.DiscardHandler), ctx: ctx, channel: channel.DefaultConfig(), started: time.Now().Add(-time.Hour),
	}
	var err error
	if a.detect, err = detect.Listen("127.0.0.1:0", detect.DefaultConfig()); err != nil {
		t.Fatal(err)
	}
	s := &sessions{t: t, ctx: ctx, d: newDomain(a, plugin.UUID{1}), local: heldLocal{make(chan struct{}), make(chan struct{})}}
	s.b = s.d.newBackup("hosta", 1)
	replicas := &migrate.Replicas{Records: t.TempDir()}
	s.b.receiver = &migrate.Receiver{Local: s.local, Domain: s.d.id, Dir: t.TempDir(), Replicas: replicas}
	if err := s.b.receiver.Adopt(1, true); err != nil {
		t.Fatal(err)
	}
	layout, err := rrlog.LayoutFor(10, 0)
	if err != nil {
		t.Fatal(err)
	}
	if s.b.stored, err = channel.NewStore(layout, channel.DefaultStoreConfig()); err != nil {
		t.Fatal(err)
	}
	s.d.backup = s.b
	if s.m, err = pair.New(pair.DefaultConfig()); err != nil {
		t.Fatal(err)
	}
	s.m.Step(pair.Event{Kind: pair.EventAdopt, Epoch: 1, Peer: "hosta", Role: plugin.RoleBackup})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = ln.Addr().String()
	serving, stop := context.WithCancel(ctx)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = channel.Serve(serving, channel.Plain(), ln, channel.DefaultConfig(), s.d.serve)
	}()
	t.Cleanup(func() {
		stop()
		<-served
		s.b.stop()
		_ = a.detect.Close()
	})
	return s
}

// dial is what a primary's agent does to get its session back.
func (s *sessions) dial() (*channel.Conn, plugin.Position) {
	s.t.Helper()
	nc, pos, err := channel.Dial(s.ctx, channel.Plain(), s.addr, channel.Hello{
		Purpose: channel.PurposeSession, From: "hosta", To: "hostb", Domain: s.d.id, Epoch: 1, Target: targetResume,
	}, channel.DefaultConfig())
	if err != nil {
		s.t.Fatal(err)
	}
	c, err := channel.NewConn(nc, channel.DefaultConfig(), nil)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := c.Call(s.ctx, methodHeartbeat, heartbeatRequest{Key: newKey(), Filling: filling()}, nil); err != nil {
		s.t.Fatal(err)
	}
	if err := c.SendControl(s.ctx, entry{Kind: kindResumed, Epoch: 1}); err != nil {
		s.t.Fatal(err)
	}
	return c, pos
}

// until steps the machine with what the backup posts, until it has posted kind.
func (s *sessions) until(kind pair.EventKind) {
	s.t.Helper()
	for {
		select {
		case ev := <-s.d.inbox:
			s.m.Step(ev)
			if ev.Kind == kind {
				return
			}
		case <-s.ctx.Done():
			s.t.Fatalf("no %s; the pair is %s", kind, s.m.Status())
		}
	}
}

// A request is still served when its session breaks, and the next session is there
// before it is done: what ends with the first does not end the second.
func TestLateEndOfASession(t *testing.T) {
	t.Parallel()
	s := newSessions(t)
	first, _ := s.dial()
	s.until(pair.EventSessionRestored)
	go func() { _ = first.Call(s.ctx, migrate.MethodSeeded, migrate.EpochRequest{Epoch: 1}, nil) }()
	<-s.local.asked
	_ = first.Close()
	next, _ := s.dial()
	defer func() { _ = next.Close() }()
	s.until(pair.EventSessionRestored)
	close(s.local.release)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for range 2 * pair.DefaultConfig().Grace {
		<-tick.C
		for len(s.d.inbox) > 0 {
			s.m.Step(<-s.d.inbox)
		}
		s.m.Step(pair.Event{Kind: pair.EventTick})
	}
	if st := s.m.Status(); st.State != pair.Protected || st.Reason != pair.ReasonNone || next.Err() != nil {
		t.Errorf("the pair is %s; session: %v", st, next.Err())
	}
}

// The primary's host dies while it makes a new session, which this side took in the
// place of one that it held for well: nothing but that tells of the loss.
func TestSessionThatIsReplacedByNone(t *testing.T) {
	t.Parallel()
	s := newSessions(t)
	c, _ := s.dial()
	defer func() { _ = c.Close() }()
	s.until(pair.EventSessionRestored)
	nc, _, err := channel.Dial(s.ctx, channel.Plain(), s.addr, channel.Hello{
		Purpose: channel.PurposeSession, From: "hosta", To: "hostb", Domain: s.d.id, Epoch: 1, Target: targetResume,
	}, channel.DefaultConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = nc.Close() }()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for range 10 * pair.DefaultConfig().Grace {
		<-tick.C
		for len(s.d.inbox) > 0 {
			s.m.Step(<-s.d.inbox)
		}
		s.m.Step(pair.Event{Kind: pair.EventTick})
	}
	if st := s.m.Status(); st.State != pair.GoingLive {
		t.Errorf("the pair is %s, and has no session", st)
	}
}

// A log that is none of QEMU's does not come again and again over new sessions: the
// backup is of no use.
func TestLogThatCannotBeReplayed(t *testing.T) {
	t.Parallel()
	s := newSessions(t)
	c, pos := s.dial()
	defer func() { _ = c.Close() }()
	if err := c.SendLog(s.ctx, pos, []byte{255, 1, 2, 3}); err != nil {
		t.Fatal(err)
	}
	s.until(pair.EventLocalDiverged)
	if st := s.m.Status(); st.State != pair.Failed || st.Reason != pair.Divergence {
		t.Errorf("the pair is %s", st)
	}
}

// A session that can be made and does not last is no session.
func TestSessionsThatDoNotLast(t *testing.T) {
	t.Parallel()
	s := newSessions(t)
	for n := 0; s.m.Status().State == pair.Protected; n++ {
		if n > 2*pair.DefaultConfig().Grace {
			t.Fatalf("after %d sessions the pair is %s", n, s.m.Status())
		}
		c, _ := s.dial()
		s.until(pair.EventSessionRestored)
		_ = c.Close()
		s.until(pair.EventSessionLost)
	}
	if st := s.m.Status(); st.State != pair.GoingLive || st.Reason != pair.LostConnection {
		t.Errorf("the pair is %s", st)
	}
}
