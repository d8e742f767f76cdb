// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/rrlog"
)

func newSpool(t *testing.T) (*Spool, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "log")
	s, err := NewSpool(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s, dir
}

// recoverStore is what a new agent does.
func recoverStore(t *testing.T, dir string, next plugin.Position) (*Store, error) {
	t.Helper()
	l, err := rrlog.LayoutFor(10, 0)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	return RecoverStore(ctx, l, DefaultStoreConfig(), dir, slog.New(slog.DiscardHandler), next)
}

// The agent dies again and again while a log passes through: nothing that was
// acknowledged is lost, nothing is given out twice, and what was consumed does
// not pile up.
func TestRecoverStore(t *testing.T) {
	t.Parallel()
	for seed := range uint64(5) {
		rng := rand.New(rand.NewPCG(seed, 5))
		var full []byte
		for len(full) < 8<<20 {
			full = append(full, packet(rng.IntN(60000))...)
		}
		spool, dir := newSpool(t)
		s := newStore(t, func(c *StoreConfig) { c.Spool = spool })
		var sent, acked, got plugin.Position
		deaths := 0
		for int(got) < len(full) {
			switch rng.IntN(12) {
			case 0:
				s, acked = die(t, s, dir, got, acked)
				// The primary sends from the last whole event on.
				sent = s.Boundary()
				deaths++
			case 1, 2, 3, 4, 5, 6:
				n := min(rng.IntN(100000), len(full)-int(sent))
				var err error
				if acked, err = s.Append(t.Context(), sent, full[sent:int(sent)+n]); err != nil {
					t.Fatal(err)
				}
				sent += plugin.Position(n)
			default:
				if got == s.Boundary() {
					continue
				}
				pos, data, err := s.Next(t.Context(), 1+rng.IntN(100000))
				if err != nil || pos != got || !bytes.Equal(data, full[pos:int(pos)+len(data)]) {
					t.Fatalf("seed %d: %d bytes at %d, want them at %d: %v", seed, len(data), pos, got, err)
				}
				got += plugin.Position(len(data))
				if err := s.Release(got); err != nil {
					t.Fatal(err)
				}
			}
		}
		s.Seal()
		if _, _, err := s.Next(t.Context(), 1); !errors.Is(err, io.EOF) {
			t.Errorf("seed %d: after the end: %v", seed, err)
		}
		if left := spooled(t, dir); left > 3*spoolSegment {
			t.Errorf("seed %d: %d bytes are left of a log that was consumed", seed, left)
		}
		if deaths < 10 {
			t.Errorf("seed %d: only %d deaths", seed, deaths)
		}
	}
}

// die forgets the store and makes it again from what is in the files.
func die(t *testing.T, s *hand, dir string, got, acked plugin.Position) (*hand, plugin.Position) {
	t.Helper()
	end, events := s.End(), s.Boundary()
	again, err := recoverStore(t, dir, got)
	if err != nil {
		t.Fatal(err)
	}
	if again.Boundary() != events || again.End() != end || again.Boundary() < acked {
		t.Fatalf("recovered up to %d (%d whole), had %d (%d whole, %d acknowledged)", again.End(), again.Boundary(), end, events, acked)
	}
	return inHand(t, again, got), again.Boundary()
}

func spooled(t *testing.T, dir string) int64 {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var n int64
	for _, e := range entries {
		i, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		n += i.Size()
	}
	return n
}

// Each of these must be an error: a backup that is fed a wrong log diverges.
func TestRecoverStoreRefuses(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		next   plugin.Position
		damage func(dir string) error
	}{
		"no directory":      {0, os.RemoveAll},
		"nothing in it":     {0, func(dir string) error { return os.Remove(filepath.Join(dir, "00000000000000000000.rrlog")) }},
		"a stranger's file": {0, func(dir string) error { return os.WriteFile(filepath.Join(dir, "core"), nil, 0o600) }},
		"a segment too much": {0, func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "00000000000000000999.rrlog"), nil, 0o600)
		}},
		"no log": {0, func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "00000000000000000000.rrlog"), []byte{255}, 0o600)
		}},
		"ahead of the log": {31, func(string) error { return nil }},
	} {
		spool, dir := newSpool(t)
		s := newStore(t, func(c *StoreConfig) { c.Spool = spool })
		appendTo(t, s, 0, packet(20), 30)
		if err := tc.damage(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := recoverStore(t, dir, tc.next); !errors.Is(err, ErrSpool) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A filesystem that is full costs the files, not the pair.
func TestSpoolThatCannotWrite(t *testing.T) {
	t.Parallel()
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	spool, dir := newSpool(t)
	_ = spool.file.Close()
	spool.file = full
	s := newStore(t, func(c *StoreConfig) { c.Spool = spool })
	appendTo(t, s, 0, packet(20), 30)
	appendTo(t, s, 30, packet(20), 60)
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the files are still there: %v", err)
	}
	if _, data, err := s.Next(t.Context(), 100); err != nil || len(data) != 60 {
		t.Errorf("Next: %d bytes, %v", len(data), err)
	}
	if err := s.Release(60); err != nil {
		t.Error(err)
	}
	if err := spool.Remove(); err != nil {
		t.Error(err)
	}
}
