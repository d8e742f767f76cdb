// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/rrlog"
)

const (
	// spoolSegment is the size from which on a segment ends at the next chance.
	spoolSegment = 1 << 20
	spoolSuffix  = ".rrlog"
)

// ErrSpool is wrapped where a spool does not hold what it should.
var ErrSpool = errors.New("spool of the event log")

// Spool keeps a copy of what a [Store] holds in files, so that the agent's
// death does not lose what it acknowledged: [RecoverStore] makes the store
// again. It belongs on a filesystem in memory, such as /run: the host's death
// is not what it is for, and the guest's input must not get on a disk.
//
// Each file is a segment of the log, named after the position of its first byte,
// which begins an event. A segment that was consumed is deleted.
//
// A Spool that cannot write, as when the filesystem is full, removes its files
// and says so once: the pair goes on without it. A nil *Spool does nothing.
type Spool struct {
	dir string
	log *slog.Logger
	// fault, unless nil, comes before each step on the filesystem, and may fail
	// it. For tests only.
	fault func(step spoolStep, path string, data []byte) error

	mu       sync.Mutex
	segments []plugin.Position // where each begins
	file     *os.File          // of the last
	size     int               // of the last
	broken   bool
}

// spoolStep is what a spool does to the filesystem.
type spoolStep string

const (
	spoolRemoveAll spoolStep = "remove-all"
	spoolMkdir     spoolStep = "mkdir"
	spoolCreate    spoolStep = "create"
	spoolWrite     spoolStep = "write"
	spoolRemove    spoolStep = "remove"
)

// step takes one, unless a test objects.
func (s *Spool) step(step spoolStep, path string, data []byte, f func() error) error {
	if s.fault != nil {
		if err := s.fault(step, path, data); err != nil {
			return err
		}
	}
	return f()
}

// NewSpool makes an empty spool in a directory of its own. What an earlier one
// left there is removed.
func NewSpool(dir string, log *slog.Logger) (*Spool, error) {
	s := &Spool{dir: dir, log: log}
	return s, s.make()
}

func (s *Spool) make() error {
	if err := s.step(spoolRemoveAll, s.dir, nil, func() error { return os.RemoveAll(s.dir) }); err != nil {
		return fmt.Errorf("%w: %w", ErrSpool, err)
	}
	if err := s.step(spoolMkdir, s.dir, nil, func() error { return os.MkdirAll(s.dir, 0o700) }); err != nil {
		return fmt.Errorf("%w: %w", ErrSpool, err)
	}
	return s.begin(0)
}

func (s *Spool) path(from plugin.Position) string {
	return filepath.Join(s.dir, fmt.Sprintf("%020d%s", uint64(from), spoolSuffix))
}

// begin starts a segment.
func (s *Spool) begin(from plugin.Position) error {
	var f *os.File
	err := s.step(spoolCreate, s.path(from), nil, func() (err error) {
		f, err = os.OpenFile(s.path(from), os.O_CREATE|os.O_EXCL|os.O_WRONLY|os.O_APPEND, 0o600)
		return err
	})
	if err != nil {
		return fmt.Errorf("%w: %w", ErrSpool, err)
	}
	if s.file != nil {
		_ = s.file.Close()
	}
	s.file, s.size = f, 0
	s.segments = append(s.segments, from)
	return nil
}

// write adds bytes at the end.
func (s *Spool) write(data []byte) {
	if s == nil || len(data) == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken {
		return
	}
	err := s.step(spoolWrite, s.file.Name(), data, func() error {
		n, err := s.file.Write(data)
		s.size += n
		return err
	})
	if err != nil {
		s.fail(err)
	}
}

// boundary begins a new segment where that is due and the last event is whole.
func (s *Spool) boundary(end, whole plugin.Position) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken || end != whole || s.size < spoolSegment {
		return
	}
	if err := s.begin(end); err != nil {
		s.fail(err)
	}
}

// release deletes the segments that lie below pos.
func (s *Spool) release(pos plugin.Position) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.broken && len(s.segments) > 1 && s.segments[1] <= pos {
		first := s.path(s.segments[0])
		if err := s.step(spoolRemove, first, nil, func() error { return os.Remove(first) }); err != nil {
			s.fail(err)
			return
		}
		s.segments = s.segments[1:]
	}
}

func (s *Spool) fail(err error) {
	s.broken = true
	s.log.Warn("the log is kept in the agent's memory only: a restart of the agent costs the backup", "error", err)
	_ = s.file.Close()
	_ = s.step(spoolRemoveAll, s.dir, nil, func() error { return os.RemoveAll(s.dir) })
}

// Remove deletes all of it.
func (s *Spool) Remove() error {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.broken {
		s.broken = true
		_ = s.file.Close()
	}
	return os.RemoveAll(s.dir)
}

// RecoverStore makes the store again whose copy an earlier agent left in dir. It
// gives out what follows next, which is what the replaying QEMU has already.
// Errors wrap [ErrSpool], or say what is wrong with the log.
func RecoverStore(ctx context.Context, l rrlog.Layout, cfg StoreConfig, dir string, log *slog.Logger, next plugin.Position) (*Store, error) {
	spool := &Spool{dir: dir, log: log}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSpool, err)
	}
	for _, e := range entries {
		n, err := strconv.ParseUint(strings.TrimSuffix(e.Name(), spoolSuffix), 10, 64)
		if err != nil || spool.path(plugin.Position(n)) != filepath.Join(dir, e.Name()) {
			return nil, fmt.Errorf("%w: unexpected file %q", ErrSpool, e.Name())
		}
		spool.segments = append(spool.segments, plugin.Position(n))
	}
	if len(spool.segments) == 0 {
		return nil, fmt.Errorf("%w: %s is empty", ErrSpool, dir)
	}
	slices.Sort(spool.segments)
	// What is read back is not to be written again.
	cfg.Spool = nil
	s, err := makeStore(l, cfg, spool.segments[0])
	if err != nil {
		return nil, err
	}
	w, _ := s.Resume(false)
	for _, from := range spool.segments {
		if from != s.end {
			return nil, fmt.Errorf("%w: bytes from %d to %d are missing", ErrSpool, s.end, from)
		}
		data, err := os.ReadFile(spool.path(from))
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrSpool, err)
		}
		// It was held before, so there is room once what QEMU has is let go.
		if _, err := w.Append(ctx, from, data); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrSpool, err)
		}
		s.advance(min(next, s.dec.Boundary()))
		spool.size = len(data)
	}
	if next < spool.segments[0] || next > s.dec.Boundary() {
		return nil, fmt.Errorf("%w: %w", ErrSpool, &RangeError{Position: next, From: spool.segments[0], To: s.dec.Boundary()})
	}
	last := spool.segments[len(spool.segments)-1]
	if spool.file, err = os.OpenFile(spool.path(last), os.O_WRONLY|os.O_APPEND, 0o600); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSpool, err)
	}
	s.cfg.Spool = spool
	return s, nil
}

// advance takes everything below pos as given out and consumed.
func (s *Store) advance(pos plugin.Position) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next, s.lent = max(s.next, pos), max(s.lent, pos)
	s.released = max(s.released, pos)
	s.trim()
}
