// SPDX-License-Identifier: Apache-2.0

package plugintest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// recorder takes the log of a primary whose backup this test plays.
type recorder struct {
	mu  sync.Mutex
	log []byte
	err error
}

func (r *recorder) take(pos plugin.Position, b []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if int(pos) > len(r.log) {
		r.err = errors.New("the log has a gap")
		return r.err
	}
	known := r.log[pos:min(len(r.log), int(pos)+len(b))]
	if !bytes.Equal(known, b[:len(known)]) {
		r.err = errors.New("the log sent again differs")
		return r.err
	}
	r.log = append(r.log, b[len(known):]...)
	return nil
}

func (r *recorder) end() plugin.Position {
	r.mu.Lock()
	defer r.mu.Unlock()
	return plugin.Position(len(r.log))
}

// TestOutputRule: "the primary VM may not send an output to the external world,
// until the backup VM has received and acknowledged the log entry associated
// with the operation producing the output" (the paper, section 2.2); nor does
// the guest wait for that, nor does a lost connection to the agent lose a byte
// of the log.
func TestOutputRule(t *testing.T) {
	b := newBed(t)
	if err := b.guest.NewDisk(context.Background(), filepath.Join(mkdir(t, b.dir, "a"), "disk.raw"), "raw"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	a, err := b.start(ctx, "a", "primary")
	if err != nil {
		t.Fatal(err)
	}
	defer a.kill()
	rec := &recorder{}
	serve := func(s *control.Session, epoch plugin.Epoch, resume plugin.Position) {
		if err := s.Welcome(epoch, resume); err != nil {
			t.Fatal(err)
		}
		h := a.handler()
		h.Log = rec.take
		go func() { _ = s.Run(ctx, h) }()
	}
	serve(a.plugin, 0, 0)
	if err := a.Monitor(ctx, plugin.UUID{}, "cont", nil, nil); err != nil {
		t.Fatal(err)
	}
	c := guest.Client{Dial: dial(b.ports), Address: netip.MustParseAddr("10.0.2.15")}
	if err := c.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.StartLines(ctx, 20); err != nil {
		t.Fatal(err)
	}
	conn, err := dial(b.ports)(ctx, netip.AddrPortFrom(c.Address, guest.PortEcho))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()

	// echo tells whether a byte comes back within d.
	echo := func(d time.Duration) bool {
		t.Helper()
		if _, err := conn.Write([]byte{'x'}); err != nil {
			t.Fatal(err)
		}
		return answers(t, conn, d)
	}
	if !echo(2 * time.Second) {
		t.Fatal("no echo before the clone")
	}
	record(ctx, t, a)

	lines := consoleSize(t, a)
	if echo(time.Second) {
		t.Fatal("a reply left without an ack")
	}
	if got := consoleSize(t, a); got <= lines {
		t.Fatal("the guest waits for acks")
	}
	if err := a.plugin.Ack(rec.end()); err != nil {
		t.Fatal(err)
	}
	if !answers(t, conn, 2*time.Second) {
		t.Fatal("no reply after the ack")
	}
	// The reply waited for about the second in which none came.
	if err := a.wait(ctx, "the delays of packets are counted", func() bool {
		var all uint64
		for _, n := range a.stats.Delays {
			all += n
		}
		long := a.stats.Delays[control.DelayClasses-2] + a.stats.Delays[control.DelayClasses-1]
		return a.stats.Counted && all == a.stats.Released && long > 0
	}); err != nil {
		t.Fatal(err)
	}

	// QEMU stands still, as with its whole host, after the backup acknowledged: by
	// the time it goes on, the backup may be live.
	if echo(500 * time.Millisecond) {
		t.Fatal("a reply left without an ack")
	}
	stale := rec.end()
	for _, step := range []func() error{
		func() error { return a.cmd.Process.Signal(syscall.SIGSTOP) },
		func() error { return a.plugin.Ack(stale) },
		func() error { <-time.After(500 * time.Millisecond); return a.cmd.Process.Signal(syscall.SIGCONT) },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	if answers(t, conn, time.Second) {
		t.Fatal("a reply left for an ack of before a stand-still")
	}
	for deadline := time.Now().Add(5 * time.Second); ; {
		if err := a.plugin.Ack(rec.end()); err != nil {
			t.Fatal(err)
		}
		if answers(t, conn, 50*time.Millisecond) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no reply after an ack of later log")
		}
	}

	// The agent is gone for a while; its unacknowledged log comes again.
	acked := rec.end()
	if err := a.plugin.Ack(acked); err != nil {
		t.Fatal(err)
	}
	if err := a.plugin.Close(); err != nil {
		t.Fatal(err)
	}
	if a.plugin = <-b.accept["primary"]; a.plugin.Hello().Mode != control.ModeRecord || a.plugin.Hello().Epoch != 1 {
		t.Fatalf("hello after the loss of the agent: %+v", a.plugin.Hello())
	}
	if h := a.plugin.Hello(); h.Tail > acked || h.Head < acked {
		t.Fatalf("log from %d to %d is kept; %d was acknowledged", h.Tail, h.Head, acked)
	}
	if echo(time.Second) {
		t.Fatal("a reply left without an agent")
	}
	serve(a.plugin, 1, a.plugin.Hello().Tail)
	if err := a.wait(ctx, "log is sent again", func() bool { return rec.end() > a.plugin.Hello().Head }); err != nil {
		t.Fatal(err)
	}
	if err := a.plugin.Ack(rec.end()); err != nil {
		t.Fatal(err)
	}
	if !answers(t, conn, 2*time.Second) {
		t.Fatal("no reply after the agent came back")
	}

	// The backup is lost, the arbiter was won.
	if echo(500 * time.Millisecond) {
		t.Fatal("a reply left without an ack")
	}
	if err := a.plugin.Open(2); err != nil {
		t.Fatal(err)
	}
	if answers(t, conn, 500*time.Millisecond) {
		t.Fatal("the gate opened for another epoch")
	}
	if err := a.plugin.Open(1); err != nil {
		t.Fatal(err)
	}
	if !answers(t, conn, 2*time.Second) || !echo(2*time.Second) {
		t.Fatal("no reply after the gate was opened")
	}
	if rec.err != nil {
		t.Fatal(rec.err)
	}
}

// record brings a into record mode, its state going nowhere.
func record(ctx context.Context, t testing.TB, a *machine) {
	t.Helper()
	if err := a.plugin.Arm(1); err != nil {
		t.Fatal(err)
	}
	if err := a.Monitor(ctx, plugin.UUID{}, "migrate", map[string]any{"uri": "exec:cat >/dev/null"}, nil); err != nil {
		t.Fatal(err)
	}
	if err := a.wait(ctx, "primary records", func() bool { return a.last.Mode == control.ModeRecord && a.last.Text == "cloned" }); err != nil {
		t.Fatal(err)
	}
}

func answers(t *testing.T, conn io.Reader, d time.Duration) bool {
	t.Helper()
	c, ok := conn.(interface{ SetReadDeadline(time.Time) error })
	if !ok {
		t.Fatal("no deadline")
	}
	if err := c.SetReadDeadline(time.Now().Add(d)); err != nil {
		t.Fatal(err)
	}
	_, err := conn.Read(make([]byte, 1))
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	return err == nil
}

func consoleSize(t *testing.T, m *machine) int64 {
	t.Helper()
	st, err := os.Stat(filepath.Join(m.dir, "console"))
	if err != nil {
		t.Fatal(err)
	}
	return st.Size()
}
