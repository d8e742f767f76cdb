// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/rrlog"
)

// session makes both ends of a session over TCP.
func session(t testing.TB, cfg Config, serving Handlers) (primary, backup *Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	a, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return newConn(t, a, cfg, nil), newConn(t, b, cfg, serving)
}

func newConn(t testing.TB, nc net.Conn, cfg Config, h Handlers) *Conn {
	t.Helper()
	c, err := NewConn(nc, cfg, h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestSessionCarriesLogAcksAndControl(t *testing.T) {
	primary, backup := session(t, DefaultConfig(), nil)
	log := bytes.Repeat([]byte("0123456789abcdef"), logChunk/8) // two frames and no more
	ctx := t.Context()
	if err := primary.SendLog(ctx, 100, log); err != nil {
		t.Fatal(err)
	}
	if err := primary.SendControl(ctx, map[string]any{"kind": "power-off", "at": 5}); err != nil {
		t.Fatal(err)
	}
	want := plugin.Position(100)
	var got []byte
	for {
		m, err := backup.Receive(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if m.Type == FrameControl {
			var entry struct{ At int }
			if err := json.Unmarshal(m.Data, &entry); m.Kind != "power-off" || err != nil || entry.At != 5 {
				t.Errorf("control entry %q %s, %v", m.Kind, m.Data, err)
			}
			break
		}
		if m.Type != FrameLog || m.Position != want {
			t.Fatalf("%v at %d, want LOG at %d", m.Type, m.Position, want)
		}
		got = append(got, m.Data...)
		want += plugin.Position(len(m.Data))
	}
	if !bytes.Equal(got, log) {
		t.Errorf("%d bytes of log differ from the %d sent", len(got), len(log))
	}
	if err := backup.SendAck(want); err != nil {
		t.Fatal(err)
	}
	if m, err := primary.Receive(ctx); err != nil || m.Type != FrameAck || m.Position != want {
		t.Errorf("%v %d, %v; want ACK %d", m.Type, m.Position, err, want)
	}
	if err := primary.SendControl(ctx, map[string]any{"at": 5}); !errors.Is(err, ErrMalformed) {
		t.Errorf("control entry without kind: %v", err)
	}
	if err := primary.SendControl(ctx, map[string]any{"kind": "x", "pad": make([]byte, 1<<20)}); !errors.Is(err, ErrFrameTooLong) {
		t.Errorf("long control entry: %v", err)
	}
}

func TestAcksAreCoalesced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		backup, err := NewConn(b, DefaultConfig(), nil)
		if err != nil {
			t.Fatal(err)
		}
		// Nobody reads yet, so the first ack occupies the writer.
		for pos := plugin.Position(1); pos <= 1000; pos++ {
			if err := backup.SendAck(pos); err != nil {
				t.Fatal(err)
			}
			if pos == 1 {
				synctest.Wait()
			}
		}
		if err := backup.SendAck(500); err != nil { // going back is dropped
			t.Fatal(err)
		}
		got := make([]byte, 2*ackFrame)
		if _, err := io.ReadFull(a, got); err != nil {
			t.Fatal(err)
		}
		for i, want := range []plugin.Position{1, 1000} {
			if pos, err := parseAck(got[i*ackFrame+frameHeader : (i+1)*ackFrame]); err != nil || pos != want {
				t.Errorf("ack %d is %d, %v; want %d", i, pos, err, want)
			}
		}
		if err := backup.Flush(t.Context()); err != nil {
			t.Error(err)
		}
		if n := backup.Queued(); n != 0 {
			t.Errorf("%d bytes queued after the flush", n)
		}
		_ = a.Close()
		_ = backup.Close()
	})
}

func TestFullQueueBlocksAndBrokenPeerIsFoundOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		cfg := DefaultConfig()
		cfg.MaxFrame = 64 << 10
		cfg.QueueBytes = 128 << 10
		primary, err := NewConn(a, cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		// The peer never reads: the third frame does not fit.
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		chunk := make([]byte, 60<<10)
		for i := range 2 {
			if err := primary.SendLog(ctx, plugin.Position(i*len(chunk)), chunk); err != nil {
				t.Fatal(err)
			}
		}
		if err := primary.SendLog(ctx, plugin.Position(2*len(chunk)), chunk); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("send into a full queue: %v", err)
		}
		// A sender without deadline, a flush and a call all end with the connection.
		var waiters sync.WaitGroup
		began := time.Now()
		for _, wait := range []func() error{
			func() error { return primary.SendLog(t.Context(), 0, chunk) },
			func() error { return primary.Flush(t.Context()) },
			func() error { return primary.Call(t.Context(), "m", nil, nil) },
			func() error { _, err := primary.Receive(t.Context()); return err },
		} {
			waiters.Go(func() {
				err := wait()
				var ce *ClosedError
				if !errors.Is(err, ErrClosed) || !errors.As(err, &ce) || ce.Cause == nil {
					t.Errorf("waiter got %v", err)
				}
			})
		}
		waiters.Wait()
		if d := time.Since(began); d > cfg.WriteTimeout+2*drainTimeout {
			t.Errorf("the broken peer was found out after %v", d)
		}
		<-primary.Done()
		if err := primary.SendAck(1); !errors.Is(err, ErrClosed) {
			t.Errorf("ack after the end: %v", err)
		}
		_ = b.Close()
		_ = primary.Close()
	})
}

func TestSlowReaderIsNotBroken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		cfg := DefaultConfig()
		primary, err := NewConn(a, cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := primary.SendLog(t.Context(), 0, make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		// Each chunk is taken just within the timeout, all together far beyond it.
		tick := time.NewTicker(cfg.WriteTimeout / 2)
		defer tick.Stop()
		buf := make([]byte, writeChunk)
		for range 10 {
			<-tick.C
			if _, err := io.ReadFull(b, buf); err != nil {
				t.Fatal(err)
			}
		}
		if err := primary.Err(); err != nil {
			t.Errorf("the connection broke: %v", err)
		}
		_ = b.Close()
		_ = primary.Close()
	})
}

func TestWhatADeadPeerSentIsStillReceived(t *testing.T) {
	primary, backup := session(t, DefaultConfig(), nil)
	const frames = 20 // more than the inbox holds
	for i := range frames {
		if err := primary.SendLog(t.Context(), plugin.Position(i), []byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := primary.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := primary.Close(); err != nil {
		t.Fatal(err)
	}
	for i := range frames {
		// The backup's acks hit a closed connection meanwhile.
		_ = backup.SendAck(plugin.Position(i + 1))
		m, err := backup.Receive(t.Context())
		if err != nil || m.Position != plugin.Position(i) {
			t.Fatalf("frame %d: position %d, %v", i, m.Position, err)
		}
	}
	if _, err := backup.Receive(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("at the end: %v", err)
	}
	<-backup.Done()
}

func TestCloseHasNoCause(t *testing.T) {
	primary, _ := session(t, DefaultConfig(), nil)
	if err := primary.Close(); err != nil {
		t.Fatal(err)
	}
	var ce *ClosedError
	if _, err := primary.Receive(t.Context()); !errors.As(err, &ce) || ce.Cause != nil {
		t.Errorf("after Close: %v", err)
	}
	if err := primary.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

func TestBadFramesEndTheSession(t *testing.T) {
	for name, tt := range map[string]struct {
		send []byte
		want error
	}{
		"hello in a session": {appendHeader(nil, FrameHello, 0), ErrMalformed},
		"short log":          {append(appendHeader(nil, FrameLog, 2), 1, 2), ErrMalformed},
		"log not packed":     {append(appendHeader(nil, FrameLog, 12), "\x00\x00\x00\x00\x00\x00\x00\x00\x1d\x1d\x1d\x1d"...), rrlog.ErrPacked},
		"short ack":          {append(appendHeader(nil, FrameAck, 2), 1, 2), ErrMalformed},
		"control no object":  {append(appendHeader(nil, FrameControl, 2), "[]"...), ErrMalformed},
		"short request":      {append(appendHeader(nil, FrameRequest, 2), 1, 2), ErrMalformed},
		"short response":     {append(appendHeader(nil, FrameResponse, 2), 1, 2), ErrMalformed},
		"long":               {appendHeader(nil, FrameLog, 1<<20+1), ErrFrameTooLong},
		"cut":                {append(appendHeader(nil, FrameLog, 20), 1), io.ErrUnexpectedEOF},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := net.Pipe()
			c := newConn(t, b, DefaultConfig(), nil)
			if _, err := a.Write(tt.send); err != nil {
				t.Fatal(err)
			}
			_ = a.Close()
			if _, err := c.Receive(t.Context()); !errors.Is(err, tt.want) || !errors.Is(err, ErrClosed) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
		})
	}
}

func TestCall(t *testing.T) {
	type point struct{ X, Y int }
	primary, _ := session(t, DefaultConfig(), Handlers{
		"swap": func(_ context.Context, params json.RawMessage) (any, error) {
			var p point
			err := json.Unmarshal(params, &p)
			return point{p.Y, p.X}, err
		},
		"fail": func(context.Context, json.RawMessage) (any, error) { return nil, errors.New("out of luck") },
		"coded": func(context.Context, json.RawMessage) (any, error) {
			return nil, &RemoteError{Code: "stale-epoch", Text: "epoch 3 is over"}
		},
		"huge": func(context.Context, json.RawMessage) (any, error) { return make([]byte, 2<<20), nil },
	})
	var calls sync.WaitGroup
	for i := range 10 {
		calls.Go(func() {
			var out point
			if err := primary.Call(t.Context(), "swap", point{i, -i}, &out); err != nil || out != (point{-i, i}) {
				t.Errorf("swap of %d: %v, %v", i, out, err)
			}
		})
	}
	calls.Wait()
	for method, code := range map[string]string{
		"fail": CodeFailed, "coded": "stale-epoch", "huge": CodeFailed, "nonsense": CodeUnknownMethod,
	} {
		var re *RemoteError
		if err := primary.Call(t.Context(), method, nil, nil); !errors.As(err, &re) || re.Code != code || re.Method != method {
			t.Errorf("%s: %v, want code %s", method, err, code)
		}
	}
	if err := primary.Call(t.Context(), "swap", point{}, new(string)); !errors.Is(err, ErrMalformed) {
		t.Errorf("response of another type: %v", err)
	}
	if err := primary.Call(t.Context(), "", nil, nil); !errors.Is(err, ErrMalformed) {
		t.Errorf("no method: %v", err)
	}
}

func TestRequestsAreBounded(t *testing.T) {
	cfg := DefaultConfig()
	cfg.MaxRequests = 1
	running := make(chan struct{})
	ended := make(chan struct{})
	primary, backup := session(t, cfg, Handlers{
		"wait": func(ctx context.Context, _ json.RawMessage) (any, error) {
			close(running)
			<-ctx.Done()
			close(ended)
			return nil, ctx.Err()
		},
	})
	first := make(chan error, 1)
	go func() { first <- primary.Call(t.Context(), "wait", nil, nil) }()
	<-running
	var re *RemoteError
	if err := primary.Call(t.Context(), "wait", nil, nil); !errors.As(err, &re) || re.Code != CodeBusy {
		t.Errorf("second request: %v, want code %s", err, CodeBusy)
	}
	if err := backup.Close(); err != nil {
		t.Error(err)
	}
	<-ended // Close cancels the handlers and waits for them
	if err := <-first; !errors.Is(err, ErrClosed) {
		t.Errorf("call over a closed connection: %v", err)
	}
}

func TestLogFramesDoNotAllocate(t *testing.T) {
	primary, backup := session(t, DefaultConfig(), nil)
	data := make([]byte, 4096)
	ctx := t.Context()
	var pos plugin.Position
	roundTrip := func() {
		if err := primary.SendLog(ctx, pos, data); err != nil {
			t.Fatal(err)
		}
		m, err := backup.Receive(ctx)
		if err != nil {
			t.Fatal(err)
		}
		pos += plugin.Position(len(m.Data))
		if err := backup.SendAck(pos); err != nil {
			t.Fatal(err)
		}
		if _, err := primary.Receive(ctx); err != nil {
			t.Fatal(err)
		}
	}
	// The signals of writers that have nothing to do cost one each; frames none.
	if n := testing.AllocsPerRun(500, roundTrip); n > 4 {
		t.Errorf("%v allocations per LOG and ACK", n)
	}
}

func BenchmarkSendLog(b *testing.B) {
	primary, backup := session(b, DefaultConfig(), nil)
	data := make([]byte, 16<<10)
	ctx := b.Context()
	go func() {
		for {
			if _, err := backup.Receive(ctx); err != nil {
				return
			}
		}
	}()
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if err := primary.SendLog(ctx, plugin.Position(i*len(data)), data); err != nil {
			b.Fatal(err)
		}
	}
}
