// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"testing"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/pair"
	"ftvirt.org/ftvirt/plugin/virt"
)

// Frames of plugin/qemu/PROTOCOL.md.
const (
	plainHello   = 1
	plainFeed    = 68
	plainPromote = 69
)

// plugins connects stand-ins for the plugin of a backup's QEMU.
type plugins struct {
	*sessions
	path string
}

func newPlugins(t *testing.T) *plugins {
	t.Helper()
	p := &plugins{newSessions(t), filepath.Join(t.TempDir(), "plugin.sock")}
	var err error
	if p.d.a.virt, err = virt.Open("test:///default", virt.Events{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.d.a.virt.Close)
	l, err := control.Listen(p.path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = l.Serve(func(s *control.Session) {
			v := newVM(s)
			p.d.attach(p.ctx, v)
			_ = v.run(p.ctx)
		}, func(err error) { t.Log(err) })
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-served
	})
	return p
}

// connect says hello as a backup's plugin that has been fed up to head.
func (p *plugins) connect(mode control.Mode, head plugin.Position) net.Conn {
	p.t.Helper()
	c, err := net.Dial("unix", p.path)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = c.Close() })
	b := binary.BigEndian.AppendUint16(nil, control.Protocol)
	b = append(b, 1, byte(mode))
	b = append(b, p.d.id[:]...)
	for _, v := range []uint64{1, uint64(head), uint64(head), 0} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	b = append(b, 0, 0, 0, 1, 10, 0, 0)
	b = binary.BigEndian.AppendUint32(b, 1<<20)
	if _, err := c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), append([]byte{plainHello}, b...)...)); err != nil {
		p.t.Fatal(err)
	}
	return c
}

// fed reads until PROMOTE or the end, and gives the log that came.
func fed(c net.Conn) (log []byte, promoted bool, err error) {
	r := bufio.NewReader(c)
	for {
		var head [5]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return log, false, err
		}
		body := make([]byte, binary.BigEndian.Uint32(head[:]))
		if _, err := io.ReadFull(r, body); err != nil {
			return log, false, err
		}
		switch head[4] {
		case plainFeed:
			log = append(log, body[8:]...)
		case plainPromote:
			return log, true, nil
		}
	}
}

// A plugin connects anew while this side goes live: its new connection alone is fed
// and promoted, with no hole.
func TestPluginReconnectsAtGoLive(t *testing.T) {
	t.Parallel()
	p := newPlugins(t)
	w, _ := p.b.stored.Resume(false)
	log := instructions(800)
	first := p.connect(control.ModeReplay, 0)
	if _, err := w.Append(p.ctx, 0, log[:3000]); err != nil {
		t.Fatal(err)
	}
	var head [5]byte
	if _, err := io.ReadFull(first, head[:]); err != nil {
		t.Fatal(err)
	}
	second := p.connect(control.ModeReplay, 1000)
	if _, _, err := fed(first); err == nil {
		t.Error("the connection of before is promoted")
	}
	if _, err := w.Append(p.ctx, 3000, log[3000:]); err != nil {
		t.Fatal(err)
	}
	p.b.goLive()
	got, promoted, err := fed(second)
	if err != nil || !promoted || string(got) != string(log[1000:]) {
		t.Errorf("%d bytes were fed from 1000 on of 4000, promoted %v, %v", len(got), promoted, err)
	}
}

// instructions is a log of n INSTRUCTION events, 5 bytes each.
func instructions(n int) []byte {
	var log []byte
	for i := 1; i <= n; i++ {
		log = binary.BigEndian.AppendUint32(append(log, 0), uint32(i))
	}
	return log
}

// A plugin takes nothing more: that does not end its feeding alone, of which
// nobody would hear.
func TestFeedThatFails(t *testing.T) {
	t.Parallel()
	p := newPlugins(t)
	p.connect(control.ModeReplay, 0)
	v, err := p.d.waitAttached(p.ctx, func(*vm) bool { return true })
	if err != nil {
		t.Fatal(err)
	}
	w, _ := p.b.stored.Resume(false)
	if _, err := w.Append(p.ctx, 0, instructions(200_000)); err != nil {
		t.Fatal(err)
	}
	select {
	case <-v.done:
	case <-p.ctx.Done():
		t.Error("the plugin is not fed, and its connection stays")
	}
}

// A plugin went live while its connection was broken, and says so in its hello.
func TestLiveCopyConnectsAgain(t *testing.T) {
	t.Parallel()
	p := newPlugins(t)
	for _, kind := range []pair.EventKind{pair.EventPeerQEMUDied, pair.EventArbiterWon} {
		p.m.Step(pair.Event{Kind: kind, Epoch: 1})
	}
	p.connect(control.ModeLive, 0)
	p.until(pair.EventWentLive)
	if st := p.m.Status(); st.State != pair.Live {
		t.Errorf("the pair is %s", st)
	}
}

func TestStall(t *testing.T) {
	t.Parallel()
	var s stall
	tick := func(waits bool, acks uint64, want bool) {
		t.Helper()
		if got := s.tick(waits, acks); got != want {
			t.Fatalf("waits %v, acks %d: %v after %d ticks", waits, acks, got, s.ticks)
		}
	}
	for n := range uint64(3 * stallTicks) {
		tick(true, n, false) // acks come
		tick(false, n, false)
	}
	for range stallTicks - 1 {
		tick(true, 1, s.ticks+1 >= stallTicks)
	}
	tick(true, 2, false)
	for range stallTicks - 1 {
		tick(true, 2, false)
	}
	tick(true, 2, true)
}
