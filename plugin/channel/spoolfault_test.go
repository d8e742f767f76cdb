// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"ftvirt.org/ftvirt/plugin"
)

// passage lets a log pass through a store with a spool: it comes in pieces, is
// given out, and consumed. before, unless nil, comes before each step on the
// filesystem. It returns the steps, in order, and what became of the log.
type passage struct {
	acked, got plugin.Position
	steps      []spoolStep
	out        []byte
}

func (p *passage) run(t *testing.T, dir string, full []byte, before func(n int, step spoolStep, path string, data []byte) error) {
	t.Helper()
	spool := &Spool{dir: dir, log: slog.New(slog.DiscardHandler)}
	spool.fault = func(step spoolStep, path string, data []byte) error {
		n := len(p.steps)
		p.steps = append(p.steps, step)
		if before == nil {
			return nil
		}
		return before(n, step, path, data)
	}
	if err := spool.make(); err != nil {
		spool = nil // as an agent does that cannot have one
	}
	s := newStore(t, func(c *StoreConfig) { c.Spool = spool })
	const piece = 150_000 // bytes, so that events are cut
	for sent := 0; sent < len(full) || int(p.got) < len(full); {
		if n := min(piece, len(full)-sent); n > 0 {
			acked, err := s.Append(t.Context(), plugin.Position(sent), full[sent:sent+n])
			if err != nil {
				t.Fatal(err)
			}
			p.acked, sent = acked, sent+n
		}
		if p.got == s.Boundary() {
			continue
		}
		pos, data, err := s.Next(t.Context(), piece/2)
		if err != nil || pos != p.got {
			t.Fatalf("at %d, want %d: %v", pos, p.got, err)
		}
		p.out = append(p.out, data...)
		p.got += plugin.Position(len(data))
		if err := s.Release(p.got); err != nil {
			t.Fatal(err)
		}
	}
	if err := spool.Remove(); err != nil {
		t.Fatal(err)
	}
}

func longLog() []byte {
	var full []byte
	for len(full) < 4<<20 {
		full = append(full, packet(50_000)...)
	}
	return full
}

// Each step on the filesystem fails in turn: the log goes on in memory, whole,
// and no file stays that a later agent would take for all of it.
func TestSpoolStepsFail(t *testing.T) {
	t.Parallel()
	full := longLog()
	var sound passage
	sound.run(t, filepath.Join(t.TempDir(), "log"), full, nil)
	seen := map[spoolStep]int{}
	for _, step := range sound.steps {
		seen[step]++
	}
	for _, step := range []spoolStep{spoolRemoveAll, spoolMkdir, spoolCreate, spoolWrite, spoolRemove} {
		if seen[step] == 0 {
			t.Errorf("no step %s among %v", step, seen)
		}
	}
	for n := range sound.steps {
		for _, cause := range []error{syscall.ENOSPC, syscall.EIO} {
			dir := filepath.Join(t.TempDir(), "log")
			var p passage
			p.run(t, dir, full, func(at int, _ spoolStep, path string, data []byte) error {
				if at != n {
					return nil
				}
				// A full disk takes a part of it.
				if len(data) > 0 {
					addToFile(t, path, data[:len(data)/2])
				}
				return cause
			})
			if !bytes.Equal(p.out, full) {
				t.Fatalf("step %d (%s) fails with %v: the log is not what came", n, sound.steps[n], cause)
			}
			if _, err := recoverStore(t, dir, 0); !errors.Is(err, ErrSpool) {
				t.Fatalf("step %d (%s) fails with %v: an agent takes up what is left: %v", n, sound.steps[n], cause, err)
			}
		}
	}
}

// The agent is killed before each step on the filesystem, and in the middle of
// each write. What it leaves holds all that was acknowledged and not consumed, or
// is refused where nothing was acknowledged yet.
func TestSpoolKilledAtEachStep(t *testing.T) {
	t.Parallel()
	full := longLog()
	root := t.TempDir()
	type corpse struct {
		what       string
		dir        string
		acked, got plugin.Position
	}
	var corpses []corpse
	dir := filepath.Join(root, "log")
	var p passage
	p.run(t, dir, full, func(n int, step spoolStep, path string, data []byte) error {
		if step == spoolRemoveAll {
			return nil // nothing is there
		}
		for i, torn := range [][]byte{nil, data[:len(data)/2], data[:len(data)-min(1, len(data))]} {
			if i > 0 && len(torn) == 0 {
				continue
			}
			c := corpse{fmt.Sprintf("step %d (%s), %d of %d bytes", n, step, len(torn), len(data)), filepath.Join(root, fmt.Sprintf("%d-%d", n, i)), p.acked, p.got}
			if _, err := os.Stat(dir); err == nil {
				if err := os.CopyFS(c.dir, os.DirFS(dir)); err != nil {
					t.Fatal(err)
				}
			}
			if len(torn) > 0 {
				addToFile(t, filepath.Join(c.dir, filepath.Base(path)), torn)
			}
			corpses = append(corpses, c)
		}
		return nil
	})
	if len(corpses) < 60 {
		t.Fatalf("only %d deaths", len(corpses))
	}
	recovered := 0
	for _, c := range corpses {
		s, err := recoverStore(t, c.dir, c.got)
		if err != nil {
			if c.acked > 0 {
				t.Errorf("%s: %d were acknowledged, %d consumed, and nothing is left: %v", c.what, c.acked, c.got, err)
			}
			continue
		}
		recovered++
		if s.Boundary() < c.acked {
			t.Errorf("%s: %d were acknowledged, %d are left", c.what, c.acked, s.Boundary())
		}
		r, err := s.Rewind(c.got)
		if err != nil {
			t.Fatal(err)
		}
		for at := c.got; at < s.Boundary(); {
			pos, data, err := r.Next(t.Context(), 1<<20)
			if err != nil || pos != at || !bytes.Equal(data, full[pos:int(pos)+len(data)]) {
				t.Fatalf("%s: %d bytes at %d, want them at %d: %v", c.what, len(data), pos, at, err)
			}
			at += plugin.Position(len(data))
		}
	}
	if recovered < len(corpses)-4 {
		t.Errorf("only %d of %d were taken up", recovered, len(corpses))
	}
}

func addToFile(t *testing.T, path string, data []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}
