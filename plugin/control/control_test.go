// SPDX-License-Identifier: Apache-2.0

package control

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

func frame(t frameType, payload ...byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(payload)))
	return append(append(b, byte(t)), payload...)
}

func hello() []byte {
	b := []byte{0, Protocol, 1, byte(ModeReplay)}
	b = append(b, bytes.Repeat([]byte{0x11}, 16)...)
	for _, v := range []uint64{7, 100, 200, 3000} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	b = binary.BigEndian.AppendUint32(b, 4242)
	b = append(b, 10, 0, 2)
	b = binary.BigEndian.AppendUint32(b, 4<<20)
	return append(b, "0.1.0"...)
}

// serve listens, connects as a plugin, and gives both ends.
func serve(t *testing.T, first []byte) (net.Conn, chan *Session, chan error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "plugin.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	sessions, refused := make(chan *Session, 1), make(chan error, 1)
	done := make(chan struct{})
	t.Cleanup(func() { close(done) })
	go func() {
		_ = l.Serve(func(s *Session) {
			sessions <- s
			<-done
		}, func(err error) { refused <- err })
	}()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(first); err != nil {
		t.Fatal(err)
	}
	return conn, sessions, refused
}

func TestHello(t *testing.T) {
	_, sessions, refused := serve(t, frame(frameHello, hello()...))
	select {
	case s := <-sessions:
		want := Hello{
			Protocol: Protocol, Backup: true, Mode: ModeReplay, Epoch: 7, Tail: 100, Head: 200, Icount: 3000, PID: 4242,
			QEMU: Version{10, 0, 2}, Window: 4 << 20, Build: "0.1.0",
		}
		copy(want.Domain[:], bytes.Repeat([]byte{0x11}, 16))
		if s.Hello() != want {
			t.Errorf("hello %+v, want %+v", s.Hello(), want)
		}
		// The process at the other end is this one, whatever the hello says.
		if !s.Alive() || s.User() != os.Getuid() {
			t.Errorf("alive %v, user %d", s.Alive(), s.User())
		}
	case err := <-refused:
		t.Fatal(err)
	}
}

// TestOwner: only the QEMU of a domain may speak for it, whatever HELLO says.
func TestOwner(t *testing.T) {
	own := plugin.UUID(bytes.Repeat([]byte{0x11}, 16))
	stranger := errors.New("no QEMU of libvirt's")
	for name, c := range map[string]struct {
		owner func(int) (plugin.UUID, error)
		want  error
	}{
		"own":      {func(int) (plugin.UUID, error) { return own, nil }, nil},
		"another":  {func(int) (plugin.UUID, error) { return plugin.UUID{1}, nil }, ErrOwner},
		"stranger": {func(int) (plugin.UUID, error) { return own, stranger }, stranger},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := Listen(filepath.Join(t.TempDir(), "plugin.sock"))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = l.Close() }()
			l.Owner = func(pid int) (plugin.UUID, error) {
				if pid != os.Getpid() {
					t.Errorf("process %d", pid)
				}
				return c.owner(pid)
			}
			result := make(chan error, 1)
			go func() {
				_ = l.Serve(func(*Session) { result <- nil }, func(err error) { result <- err })
			}()
			conn, err := net.Dial("unix", l.l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			_, _ = conn.Write(frame(frameHello, hello()...)) // it may be closed already
			if err := <-result; !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
}

func TestHelloRefused(t *testing.T) {
	old := hello()
	old[1] = Protocol + 1
	backwards := hello()
	binary.BigEndian.PutUint64(backwards[28:], 300) // tail behind head
	for name, c := range map[string]struct {
		first []byte
		want  error
	}{
		"version":   {frame(frameHello, old...), ErrVersion},
		"short":     {frame(frameHello, hello()[:40]...), ErrMalformed},
		"backwards": {frame(frameHello, backwards...), ErrMalformed},
		"not hello": {frame(frameLog, hello()...), ErrUnknown},
		"too long":  {[]byte{0xff, 0xff, 0xff, 0xff, byte(frameHello)}, ErrTooLong},
	} {
		t.Run(name, func(t *testing.T) {
			_, sessions, refused := serve(t, c.first)
			select {
			case <-sessions:
				t.Fatal("accepted")
			case err := <-refused:
				if !errors.Is(err, c.want) {
					t.Errorf("%v, want %v", err, c.want)
				}
			}
		})
	}
}

func TestCommands(t *testing.T) {
	conn, sessions, _ := serve(t, frame(frameHello, hello()...))
	s := <-sessions
	for _, c := range []struct {
		name string
		send func() error
		want []byte
	}{
		{"welcome", func() error { return s.Welcome(7, 9) }, frame(frameWelcome, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 9)},
		{"arm", func() error { return s.Arm(8) }, frame(frameArm, 0, 0, 0, 0, 0, 0, 0, 8)},
		{"disarm", s.Disarm, frame(frameDisarm)},
		{"ack", func() error { return s.Ack(513) }, frame(frameAck, 0, 0, 0, 0, 0, 0, 2, 1)},
		{"feed", func() error { return s.Feed(3, []byte("abc")) }, frame(frameFeed, 0, 0, 0, 0, 0, 0, 0, 3, 'a', 'b', 'c')},
		{"promote", func() error { return s.Promote(7) }, frame(framePromote, 0, 0, 0, 0, 0, 0, 0, 7)},
		{"open", func() error { return s.Open(7) }, frame(frameOpen, 0, 0, 0, 0, 0, 0, 0, 7)},
		{"idle", s.Idle, frame(frameIdle)},
		{"configure", func() error { return s.Configure(3*time.Second, 50*time.Millisecond) }, frame(frameConfig, 0, 0, 0x0b, 0xb8, 0, 0, 0, 50)},
		{"check", func() error { return s.Check(258) }, frame(frameCheck, 0, 0, 0, 0, 0, 0, 1, 2)},
		{"hold", func() error { return s.Hold(2 * time.Second) }, frame(frameHold, 0, 0, 7, 0xd0)},
		{"look", func() error { return s.Look(9, 4096) }, frame(frameLook, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0x10, 0)},
		{"pace", func() error { return s.Pace(0.3) }, frame(framePace, 1, 44)},
		{"pace too much", func() error { return s.Pace(2) }, frame(framePace, 3, 132)},
	} {
		if err := c.send(); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		got := make([]byte, len(c.want))
		if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, c.want) {
			t.Errorf("%s: % x, want % x (%v)", c.name, got, c.want, err)
		}
	}
}

func TestReports(t *testing.T) {
	conn, sessions, _ := serve(t, frame(frameHello, hello()...))
	s := <-sessions
	var log []byte
	var refused error
	var end plugin.Position
	result := make(chan error, 1)
	go func() {
		result <- s.Run(context.Background(), Handler{
			Log: func(pos plugin.Position, p []byte) error {
				end, log = pos+plugin.Position(len(p)), append(log, p...)
				return nil
			},
			Refused: func(err error) { refused = err },
		})
	}()
	for _, f := range [][]byte{
		frame(frameLog, 0, 0, 0, 0, 0, 0, 0, 5, 'x', 'y'),
		frame(frameConsumed, make([]byte, 25)...), // nobody listens
		frame(frameError, append([]byte{byte(framePromote)}, "not yet"...)...),
	} {
		if _, err := conn.Write(f); err != nil {
			t.Fatal(err)
		}
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-result; !errors.Is(err, io.EOF) {
		t.Errorf("the plugin's end gives %v", err)
	}
	if string(log) != "xy" || end != 7 || !errors.Is(refused, ErrPlugin) {
		t.Errorf("log %q to %d, refused %v", log, end, refused)
	}
}

// A QEMU that runs has the plugin of before an upgrade, which counts no delays.
func TestStatsOfAnOlderPlugin(t *testing.T) {
	numbers := func(n int) []byte {
		b := make([]byte, 8*n)
		for i := range n {
			b[8*i+7] = byte(i + 1)
		}
		return b
	}
	s, err := parseStats(numbers(9))
	if err != nil || s.Counted || s.Acked != 1 || s.Released != 5 || s.HeldNS != 9 {
		t.Errorf("before: %+v, %v", s, err)
	}
	s, err = parseStats(numbers(9 + DelayClasses))
	if err != nil || !s.Counted || s.HeldNS != 9 || s.Delays[0] != 10 || s.Delays[DelayClasses-1] != 21 {
		t.Errorf("now: %+v, %v", s, err)
	}
	for _, n := range []int{8, 10, 9 + DelayClasses + 1} {
		if _, err := parseStats(numbers(n)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%d numbers: %v", n, err)
		}
	}
}

func TestRunEndsWithContext(t *testing.T) {
	_, sessions, _ := serve(t, frame(frameHello, hello()...))
	s := <-sessions
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- s.Run(ctx, Handler{}) }()
	cancel()
	select {
	case err := <-result:
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("it does not end")
	}
}

// FuzzReports: whatever a plugin sends is understood or refused.
func FuzzReports(f *testing.F) {
	f.Add(byte(frameHello), hello())
	f.Add(byte(frameLog), make([]byte, 8))
	f.Add(byte(frameState), make([]byte, 42))
	f.Add(byte(frameConsumed), make([]byte, 25))
	f.Add(byte(frameStats), make([]byte, 72))
	f.Add(byte(frameStats), make([]byte, 72+8*DelayClasses))
	f.Add(byte(frameDiverged), make([]byte, 24))
	f.Add(byte(frameDigest), make([]byte, 24))
	f.Add(byte(frameMemory), append(append(make([]byte, 24), 1, 'm'), make([]byte, HashSize)...))
	f.Add(byte(frameLooked), make([]byte, 24+1+8*23))
	f.Add(byte(frameError), []byte{1})
	f.Add(byte(0xff), []byte{})
	f.Fuzz(func(t *testing.T, kind byte, payload []byte) {
		if h, err := parseHello(payload); err == nil && (h.Head < h.Tail || h.Mode > ModeLive) {
			t.Errorf("hello %+v was accepted", h)
		}
		h := Handler{State: func(s State) {
			if s.Mode > ModeLive {
				t.Errorf("state %+v was accepted", s)
			}
		}}
		err := h.dispatch(frameType(kind), payload)
		var frameErr *FrameError
		if err != nil && !errors.As(err, &frameErr) {
			t.Errorf("%T: %v", err, err)
		}
	})
}

// TestStrangersLeaveNothing: whoever is refused holds no file descriptor of the
// agent's.
func TestStrangersLeaveNothing(t *testing.T) {
	open := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	l, err := Listen(filepath.Join(t.TempDir(), "plugin.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	l.Owner = func(int) (plugin.UUID, error) { return plugin.UUID{}, ErrOwner }
	refused := make(chan error)
	go func() {
		_ = l.Serve(func(*Session) { t.Error("a stranger was let in") }, func(err error) { refused <- err })
	}()
	before := open()
	for range 200 {
		conn, err := net.Dial("unix", l.l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if err := <-refused; !errors.Is(err, ErrOwner) {
			t.Fatal(err)
		}
		_ = conn.Close()
	}
	if after := open(); after > before+10 {
		t.Errorf("%d file descriptors before, %d after", before, after)
	}
}

func TestLookReports(t *testing.T) {
	payload := []byte{0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 6}
	payload = append(append(payload, "pc.ram"...), bytes.Repeat([]byte{7}, HashSize)...)
	m, err := parseMemory(payload)
	if err != nil || m.ID != 9 || m.Size != 0x2000 || m.Offset != 0x1000 || m.Name != "pc.ram" || len(m.Hashes) != HashSize {
		t.Errorf("%+v, %v", m, err)
	}
	for _, cut := range []int{1, HashSize + 1, len(payload) - 20} {
		if _, err := parseMemory(payload[:len(payload)-cut]); !errors.Is(err, ErrMalformed) {
			t.Errorf("cut by %d bytes: %v", cut, err)
		}
	}
	looked := make([]byte, 24+1+8*23)
	looked[7], looked[24], looked[len(looked)-1] = 9, 6, 5
	l, err := parseLooked(looked)
	if err != nil || l.ID != 9 || l.Running || !l.Busy || !l.Moved || l.Registers[22] != 5 {
		t.Errorf("%+v, %v", l, err)
	}
}
