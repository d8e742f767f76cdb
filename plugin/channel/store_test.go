// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/rrlog"
)

// hand is a store with its writer and its reader.
type hand struct {
	*Store
	*Writer
	*Reader
}

func inHand(t testing.TB, s *Store, next plugin.Position) *hand {
	t.Helper()
	w, _ := s.Resume(false)
	r, err := s.Rewind(next)
	if err != nil {
		t.Fatal(err)
	}
	return &hand{s, w, r}
}

func newStore(t testing.TB, change func(*StoreConfig)) *hand {
	t.Helper()
	l, err := rrlog.LayoutFor(10, 0)
	if err != nil {
		t.Fatal(err)
	}
	cfg := DefaultStoreConfig()
	if change != nil {
		change(&cfg)
	}
	s, err := NewStore(l, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return inHand(t, s, 0)
}

// packet is a NET event with n bytes of data.
func packet(n int) []byte {
	b := append([]byte{9, 0, 0, 0, 0, 0}, binary.BigEndian.AppendUint32(nil, uint32(n))...)
	for i := range n {
		b = append(b, byte(i))
	}
	return b
}

// appendTo fails unless Append acknowledges as told.
func appendTo(t *testing.T, s *hand, pos plugin.Position, data []byte, acked plugin.Position) {
	t.Helper()
	got, err := s.Append(t.Context(), pos, data)
	if err != nil || got != acked {
		t.Fatalf("Append at %d: acked %d, %v; want %d", pos, got, err, acked)
	}
}

func TestOnlyWholeEventsAreAckedAndGivenOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(t, nil)
		ev := packet(20) // 30 bytes
		appendTo(t, s, 0, append(ev, ev[:11]...), 30)
		pos, data, err := s.Next(t.Context(), 1000)
		if err != nil || pos != 0 || !bytes.Equal(data, ev) {
			t.Fatalf("Next: %d bytes at %d, %v", len(data), pos, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, data, err := s.Next(ctx, 1000); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("a cut event was given out: %d bytes, %v", len(data), err)
		}
		woken := make(chan int, 1)
		go func() {
			_, data, _ := s.Next(t.Context(), 7)
			woken <- len(data)
		}()
		synctest.Wait()
		appendTo(t, s, 41, ev[11:], 60)
		if n := <-woken; n != 7 {
			t.Errorf("Next gave %d bytes, want the limit of 7", n)
		}
		if _, data, err := s.Next(t.Context(), 1000); err != nil || len(data) != 23 {
			t.Errorf("the rest: %d bytes, %v", len(data), err)
		}
	})
}

func TestSealEndsAfterTheLastWholeEvent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(t, nil)
		appendTo(t, s, 0, []byte{1, 1, 0, 0}, 2)
		s.Seal()
		if _, data, err := s.Next(t.Context(), 100); err != nil || len(data) != 2 {
			t.Fatalf("%d bytes, %v", len(data), err)
		}
		if _, _, err := s.Next(t.Context(), 100); !errors.Is(err, io.EOF) {
			t.Errorf("after the last event: %v", err)
		}
		if acked, err := s.Append(t.Context(), 4, []byte{1}); !errors.Is(err, ErrSealed) || acked != 2 {
			t.Errorf("append after seal: %d, %v", acked, err)
		}
		// A reader that waits is woken.
		s = newStore(t, nil)
		ended := make(chan error, 1)
		go func() {
			_, _, err := s.Next(t.Context(), 1)
			ended <- err
		}()
		synctest.Wait()
		s.Seal()
		if err := <-ended; !errors.Is(err, io.EOF) {
			t.Errorf("the waiting reader got %v", err)
		}
	})
}

// A signal to the primary's QEMU is none to the guest: neither it nor what came
// after it is acknowledged, or replayed by a backup that goes live.
func TestHostsEndIsNotGivenOut(t *testing.T) {
	const signal, end = 14, 39
	s := newStore(t, nil)
	appendTo(t, s, 0, []byte{1, 1, signal, 1, end}, 2)
	if _, data, err := s.Next(t.Context(), 100); err != nil || len(data) != 2 {
		t.Fatalf("%d bytes, %v", len(data), err)
	}
	if lag := s.Lag(2); lag != 0 {
		t.Errorf("a lag of %v behind what is never given out", lag)
	}
	s.Seal()
	if _, data, err := s.Next(t.Context(), 100); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v, %v", data, err)
	}
	if st := s.Stats(); !st.Ended || st.GuestEnded {
		t.Errorf("stats %+v", st)
	}
}

func TestGapsAndOverlaps(t *testing.T) {
	s := newStore(t, nil)
	ev := packet(20)
	appendTo(t, s, 0, ev[:25], 0)
	_, err := s.Append(t.Context(), 26, ev[26:])
	var gap *GapError
	if !errors.Is(err, ErrGap) || !errors.As(err, &gap) || gap.Want != 25 || gap.Got != 26 {
		t.Errorf("gap: %v", err)
	}
	appendTo(t, s, 10, ev[10:20], 0)  // wholly known
	appendTo(t, s, 20, ev[20:30], 30) // partly known
	changed := bytes.Clone(ev)
	changed[22]++
	_, err = s.Append(t.Context(), 0, changed)
	var conflict *ConflictError
	if !errors.Is(err, ErrConflict) || !errors.As(err, &conflict) || conflict.Position != 22 {
		t.Errorf("other bytes: %v", err)
	}
	// What was released cannot be compared, only skipped.
	if _, _, err := s.Next(t.Context(), 100); err != nil {
		t.Fatal(err)
	}
	if err := s.Release(28); err != nil {
		t.Fatal(err)
	}
	appendTo(t, s, 0, append(changed, 1), 31)
	if s.End() != 31 || s.Boundary() != 31 {
		t.Errorf("end %d boundary %d, want 31", s.End(), s.Boundary())
	}
}

func TestDamagedLogKeepsWhatIsWhole(t *testing.T) {
	s := newStore(t, nil)
	appendTo(t, s, 0, []byte{1}, 1)
	acked, err := s.Append(t.Context(), 1, []byte{2, 99, 1})
	var fe *rrlog.FormatError
	if acked != 2 || !errors.As(err, &fe) || fe.Position != 2 {
		t.Fatalf("acked %d, %v", acked, err)
	}
	if _, data, err := s.Next(t.Context(), 100); err != nil || !bytes.Equal(data, []byte{1, 2}) {
		t.Errorf("given out %v, %v", data, err)
	}
	if _, err := s.Append(t.Context(), 2, []byte{1}); !errors.Is(err, rrlog.ErrUnknownKind) {
		t.Errorf("the error does not stick: %v", err)
	}
}

func TestAppendWaitsForRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(t, func(c *StoreConfig) { c.MaxArray = 1000; c.Limit = 2000 })
		ev := packet(990) // 1000 bytes
		appendTo(t, s, 0, ev, 1000)
		appendTo(t, s, 1000, ev, 2000)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if acked, err := s.Append(ctx, 2000, ev); !errors.Is(err, context.DeadlineExceeded) || acked != 2000 {
			t.Fatalf("append to a full store: %d, %v", acked, err)
		}
		appended := make(chan plugin.Position, 1)
		go func() {
			acked, err := s.Append(t.Context(), 2000, ev)
			if err != nil {
				t.Error(err)
			}
			appended <- acked
		}()
		if _, data, err := s.Next(t.Context(), 1500); err != nil || len(data) != 1500 {
			t.Fatalf("%d bytes, %v", len(data), err)
		}
		if err := s.Release(1501); !errors.Is(err, ErrRange) {
			t.Errorf("release of what was not given out: %v", err)
		}
		if err := s.Release(600); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if st := s.Stats(); st.Held != 2000 || st.Boundary != 2000 || st.Received != 2600 || st.Released != 600 {
			t.Errorf("stats %+v", st)
		}
		if err := s.Release(1500); err != nil {
			t.Fatal(err)
		}
		if acked := <-appended; acked != 3000 {
			t.Errorf("acked %d, want 3000", acked)
		}
	})
}

func TestStoreMustHoldAnEvent(t *testing.T) {
	l, err := rrlog.LayoutFor(10, 0)
	if err != nil {
		t.Fatal(err)
	}
	for name, cfg := range map[string]StoreConfig{
		"too small": {Limit: 1000, MaxArray: 1000, Clock: time.Now},
		"no clock":  {Limit: 10000, MaxArray: 1000},
	} {
		if _, err := NewStore(l, cfg); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRewind(t *testing.T) {
	s := newStore(t, nil)
	appendTo(t, s, 0, []byte{1, 2, 1, 2}, 4)
	if _, _, err := s.Next(t.Context(), 4); err != nil {
		t.Fatal(err)
	}
	if err := s.Release(2); err != nil {
		t.Fatal(err)
	}
	for _, pos := range []plugin.Position{1, 5} {
		if _, err := s.Rewind(pos); !errors.Is(err, ErrRange) {
			t.Errorf("rewind to %d: %v", pos, err)
		}
	}
	before := s.Reader
	var err error
	if s.Reader, err = s.Rewind(3); err != nil {
		t.Fatal(err)
	}
	if _, _, err := before.Next(t.Context(), 4); !errors.Is(err, ErrFenced) {
		t.Errorf("the reader of before: %v", err)
	}
	if pos, data, err := s.Next(t.Context(), 4); err != nil || pos != 3 || !bytes.Equal(data, []byte{2}) {
		t.Errorf("%v at %d, %v", data, pos, err)
	}
}

// instructions is a log of n INSTRUCTION events, no two alike.
func instructions(n int) []byte {
	var log []byte
	for i := 1; i <= n; i++ {
		log = append(log, 0, byte(i>>24), byte(i>>16), byte(i>>8), byte(i))
	}
	return log
}

// A session breaks while what it received waits for room, and the next one goes
// on from where the store is: nothing more of the first comes in.
func TestOneWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 8192
		s := newStore(t, func(c *StoreConfig) { c.MaxArray = 1000; c.Limit = limit })
		log := instructions(6000)
		first := make(chan error, 1)
		go func() { _, err := s.Append(t.Context(), 0, log[:20000]); first <- err }()
		synctest.Wait()
		if !s.Full() {
			t.Error("the store is not full")
		}
		next, from := s.Resume(false)
		if err := <-first; from != limit || !errors.Is(err, ErrFenced) {
			t.Errorf("resumed at %d, the first append ended with %v", from, err)
		}
		second := make(chan error, 1)
		go func() { _, err := next.Append(t.Context(), from, log[from:30000]); second <- err }()
		var got []byte
		for len(got) < 30000 {
			pos, p, err := s.Next(t.Context(), 4096)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, p...)
			if err := s.Release(pos + plugin.Position(len(p))); err != nil {
				t.Fatal(err)
			}
		}
		if err := <-second; err != nil || !bytes.Equal(got, log[:30000]) || s.Full() {
			t.Errorf("the log that came out is another; %v", err)
		}
		if _, err := s.Append(t.Context(), s.End(), log[30000:]); !errors.Is(err, ErrFenced) || s.End() != 30000 {
			t.Errorf("the first writer goes on: %v, end %d", err, s.End())
		}
		if _, from := s.Resume(true); from != 30000 {
			t.Errorf("resumed at %d behind the last whole event", from)
		}
	})
}

// A plugin connects anew: what waits for log to feed to its dead connection gets
// none of it, and does not see the end either.
func TestOneReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := instructions(800)
		s := newStore(t, nil)
		appendTo(t, s, 0, log, 4000)
		if _, _, err := s.Next(t.Context(), 128<<10); err != nil {
			t.Fatal(err)
		}
		old := make(chan error, 1)
		go func() { _, _, err := s.Next(t.Context(), 128<<10); old <- err }()
		synctest.Wait()
		fresh, err := s.Rewind(1000)
		if err != nil {
			t.Fatal(err)
		}
		if err := <-old; !errors.Is(err, ErrFenced) {
			t.Errorf("the reader of before: %v", err)
		}
		s.Seal()
		if pos, p, err := fresh.Next(t.Context(), 128<<10); err != nil || pos != 1000 || !bytes.Equal(p, log[1000:]) {
			t.Errorf("%d bytes at %d, %v", len(p), pos, err)
		}
		if _, _, err := s.Next(t.Context(), 1); !errors.Is(err, ErrFenced) {
			t.Errorf("the reader of before at the end: %v", err)
		}
		if _, _, err := fresh.Next(t.Context(), 1); !errors.Is(err, io.EOF) {
			t.Errorf("the end: %v", err)
		}
	})
}

func TestReceivedAtAndLag(t *testing.T) {
	now := time.Unix(1000, 0)
	begin := now
	s := newStore(t, func(c *StoreConfig) { c.Clock = func() time.Time { return now } })
	if _, ok := s.ReceivedAt(1); ok {
		t.Error("an empty store knows an arrival")
	}
	for i := range 3 {
		appendTo(t, s, plugin.Position(i), []byte{1}, plugin.Position(i+1))
		now = now.Add(10 * time.Millisecond)
	}
	for pos, want := range map[plugin.Position]time.Duration{1: 0, 2: 10 * time.Millisecond, 3: 20 * time.Millisecond} {
		if at, ok := s.ReceivedAt(pos); !ok || at.Sub(begin) != want {
			t.Errorf("position %d received %v after the first, %v; want %v", pos, at.Sub(begin), ok, want)
		}
	}
	if _, ok := s.ReceivedAt(4); ok {
		t.Error("a position to come has an arrival")
	}
	for pos, want := range map[plugin.Position]time.Duration{0: 30, 1: 20, 2: 10, 3: 0} {
		if lag := s.Lag(pos); lag != want*time.Millisecond {
			t.Errorf("lag at %d is %v, want %vms", pos, lag, int64(want))
		}
	}
	// The ring forgets the oldest.
	for i := range arrivals {
		appendTo(t, s, plugin.Position(3+i), []byte{1}, plugin.Position(4+i))
		now = now.Add(time.Millisecond)
	}
	if _, ok := s.ReceivedAt(1); ok {
		t.Error("the oldest arrival is not forgotten")
	}
	if lag := s.Lag(0); lag != arrivals*time.Millisecond {
		t.Errorf("lag of a forgotten arrival is %v", lag)
	}
}

// TestStoreUnderLoad pipes a log through a small store with all parties at work.
func TestStoreUnderLoad(t *testing.T) {
	s := newStore(t, func(c *StoreConfig) { c.MaxArray = 100_000; c.Limit = 300_000 })
	rng := rand.New(rand.NewPCG(1, 2))
	var log []byte
	for len(log) < 3_000_000 {
		log = append(log, packet(rng.IntN(100_000))...)
	}
	consumed := make(chan plugin.Position, 8)
	var both sync.WaitGroup
	both.Go(func() {
		for rest := log; len(rest) > 0; {
			n := min(len(rest), 1+rng.IntN(50_000))
			if _, err := s.Append(t.Context(), plugin.Position(len(log)-len(rest)), rest[:n]); err != nil {
				t.Error(err)
				break
			}
			rest = rest[n:]
		}
		s.Seal()
	})
	both.Go(func() { // QEMU, which is behind
		for pos := range consumed {
			if err := s.Release(pos); err != nil {
				t.Error(err)
			}
		}
	})
	var got []byte
	for {
		pos, data, err := s.Next(t.Context(), 10_000)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil || int(pos) != len(got) {
			t.Fatalf("bytes at %d, want %d: %v", pos, len(got), err)
		}
		got = append(got, data...)
		consumed <- pos + plugin.Position(len(data))
	}
	close(consumed)
	both.Wait()
	if !bytes.Equal(got, log) {
		t.Errorf("%d bytes came out of %d, or others", len(got), len(log))
	}
	if n := len(s.chunks); n > 300_000/storeChunk+2 {
		t.Errorf("%d chunks are in use for a limit of 300000 bytes", n)
	}
}

func BenchmarkStore(b *testing.B) {
	s := newStore(b, nil)
	ev := packet(1500)
	b.SetBytes(int64(len(ev)))
	b.ReportAllocs()
	for pos := plugin.Position(0); b.Loop(); {
		acked, err := s.Append(b.Context(), pos, ev)
		if err != nil {
			b.Fatal(err)
		}
		for pos < acked {
			_, data, err := s.Next(b.Context(), 1<<20)
			if err != nil {
				b.Fatal(err)
			}
			pos += plugin.Position(len(data))
		}
		if err := s.Release(pos); err != nil {
			b.Fatal(err)
		}
	}
}
