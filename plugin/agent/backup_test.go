// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/channel"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/pair"
	"ftvirt.org/ftvirt/plugin/rrlog"
)

// A primary that was only stopped goes on to send its log while the backup asks the
// arbiter. It must get no ack for that: what it lets go for one would leave beside a
// copy that is live.
func TestLeavingBackupAcknowledgesNothing(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	a := &Agent{cfg: config.Config{Host: "hostb", Agent: config.Agent{RunDir: t.TempDir()}}, log: slog.New(slog.DiscardHandler), ctx: ctx}
	b := newDomain(a, plugin.UUID{1}).newBackup("hosta", 4)
	layout, err := rrlog.LayoutFor(10, 0)
	if err != nil {
		t.Fatal(err)
	}
	if b.stored, err = channel.NewStore(layout, channel.DefaultStoreConfig()); err != nil {
		t.Fatal(err)
	}
	near, far := net.Pipe()
	conn, err := channel.NewConn(near, channel.DefaultConfig(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	peer, err := channel.NewConn(far, channel.DefaultConfig(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = peer.Close() }()
	b.conn = conn

	events := []byte{0, 0, 0, 3, 232, 1} // 1000 instructions, then an interrupt
	got := func() channel.Message {
		t.Helper()
		m, err := peer.Receive(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	if err := b.append(conn, b.newest, channel.Message{Data: events}); err != nil {
		t.Fatal(err)
	}
	if m := got(); m.Type != channel.FrameAck || m.Position != 6 {
		t.Fatalf("got %+v, want the ack of 6", m)
	}
	b.leave()
	if err := b.append(conn, b.newest, channel.Message{Position: 6, Data: events}); err != nil {
		t.Fatal(err)
	}
	if end := b.log().Boundary(); end != 12 {
		t.Errorf("the log ends at %d: what came must be kept", end)
	}
	if err := conn.SendControl(ctx, entry{Kind: pair.NotifyStopping.String()}); err != nil {
		t.Fatal(err)
	}
	if m := got(); m.Type != channel.FrameControl {
		t.Errorf("got %+v after the arbiter was asked", m)
	}
}

// The primary may still let packets go for the last ack: only when that is over does
// this side go live, unless its QEMU is known to be dead.
func TestGoLiveWaitsForTheLastAck(t *testing.T) {
	t.Parallel()
	s := newSessions(t)
	const timeout = 300 * time.Millisecond
	s.d.a.cfg.Heartbeat.Timeout = timeout
	c, pos := s.dial()
	began := time.Now()
	if err := c.SendLog(s.ctx, pos, []byte{1}); err != nil {
		t.Fatal(err)
	}
	if m, err := c.Receive(s.ctx); err != nil || m.Type != channel.FrameAck {
		t.Fatalf("got %+v, %v; want an ack", m, err)
	}
	r, err := s.b.stored.Rewind(0)
	if err != nil {
		t.Fatal(err)
	}
	s.b.goLive()
	for err == nil {
		_, _, err = r.Next(s.ctx, 100)
	}
	if waited := time.Since(began); !errors.Is(err, io.EOF) || waited < timeout {
		t.Errorf("the log ended after %v: %v", waited, err)
	}
	s.b.control(entry{Kind: pair.NotifyQEMUDied.String(), Epoch: 1})
	if wait := s.b.fence(); wait != 0 {
		t.Errorf("with a dead primary it waits %v", wait)
	}
}
