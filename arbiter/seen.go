// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin"
)

// ErrOutdated: the arbiter is not the one that this host knew, or is behind what
// this host saw there: other storage is mounted, none is, or an old copy. It
// comes with ErrUnavailable: nothing is decided until a person has looked.
var ErrOutdated = errors.New("the arbiter cannot be believed")

// remedy ends each message of ErrOutdated.
const remedy = "bring the right storage back, or if it is meant to be so, run 'ftvirt arbiter accept' on this host"

// Seen is what a host remembers of its arbiter: who it is, and how far each domain
// was. Storage that is not mounted, or that was restored from a copy, looks like
// a sound arbiter that knows less; only who was there before can tell. It is a
// file that all processes of the host share, replaced as a whole. A nil *Seen
// remembers nothing.
//
// What cannot be written, as on a full disk, stops no decision: what is
// remembered is older then, and finds less.
type Seen struct {
	path string
	// failed is told what goes wrong with the file. It may be nil.
	failed func(error)

	writes sync.WaitGroup

	mu   sync.Mutex
	last memory // what this process knows, which may be newer than the file
}

// memory is what is remembered.
type memory struct {
	Version int `json:"version"`
	// Series is drawn at random whenever a person accepted what there is. What
	// was seen before that does not count.
	Series   string `json:"series"`
	Identity string `json:"identity"`
	// Domains are the newest states seen.
	Domains map[plugin.UUID]storedState `json:"domains"`
	Sum     string                      `json:"sha256,omitempty"`
}

const (
	seenFile    = "arbiter.json"
	seenVersion = 1
	// maxSeen bounds what is read of the file, in bytes.
	maxSeen = 16 << 20
)

// NewSeen gives what is remembered in a directory of this host's own. failed, if
// not nil, is told of a file that cannot be read or written.
func NewSeen(dir string, failed func(error)) *Seen {
	return &Seen{path: filepath.Join(dir, seenFile), failed: failed}
}

func (m memory) sum() (string, error) {
	m.Sum = ""
	text, err := json.Marshal(m)
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:]), err
}

// read gives what the file has; the zero memory if there is none.
func (s *Seen) read() (memory, error) {
	var m memory
	text, err := os.ReadFile(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	}
	if err == nil && len(text) > maxSeen {
		err = fmt.Errorf("it has %d bytes", len(text))
	}
	if err == nil {
		err = json.Unmarshal(text, &m)
	}
	if err == nil && m.Version != seenVersion {
		err = fmt.Errorf("format version %d, this ftvirt knows %d", m.Version, seenVersion)
	}
	if err == nil {
		var sum string
		if sum, err = m.sum(); err == nil && sum != m.Sum {
			err = errors.New("the checksum does not match")
		}
	}
	if err != nil {
		return memory{}, fmt.Errorf("%s, which says what this host saw of the arbiter: %w", s.path, err)
	}
	return m, nil
}

// write replaces the file.
func (s *Seen) write(m memory) error {
	m.Version = seenVersion
	var err error
	if m.Sum, err = m.sum(); err != nil {
		return err
	}
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(s.path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(s.path), "."+seenFile+"-*")
	if err != nil {
		return err
	}
	_, err = f.Write(append(text, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), s.path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

// recall gives what this host knows. It is asked before the storage is read, so
// that what others do meanwhile is not held against what was read.
func (s *Seen) recall() (memory, error) {
	if s == nil {
		return memory{}, nil
	}
	m, err := s.read()
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err != nil && s.last.Identity == "":
		return memory{}, fmt.Errorf("%w: %w: %w; %s", ErrUnavailable, ErrOutdated, err, remedy)
	case err != nil:
		s.complain(err)
		return s.last, nil
	}
	s.last = s.last.merge(m)
	return s.last, nil
}

// merge gives what follows from both; the file's series counts.
func (m memory) merge(file memory) memory {
	if m.Series != file.Series || file.Identity != "" && m.Identity != file.Identity {
		return file
	}
	domains := maps.Clone(m.Domains)
	if domains == nil {
		domains = make(map[plugin.UUID]storedState)
	}
	for id, now := range file.Domains {
		if before, ok := domains[id]; !ok || now.behind(before) == "" {
			domains[id] = now
		}
	}
	file.Domains, file.Identity = domains, m.Identity
	return file
}

func (s *Seen) complain(err error) {
	if s.failed != nil {
		s.failed(err)
	}
}

// check holds what was read of a domain against what was recalled.
func (m memory) check(domain plugin.UUID, now state) error {
	if m.Identity != "" && m.Identity != now.from {
		return fmt.Errorf("%w: %w: it has identity %s, and this host's had %s; %s", ErrUnavailable, ErrOutdated, now.from, m.Identity, remedy)
	}
	before, ok := m.Domains[domain]
	if !ok {
		return nil
	}
	if why := now.seen().behind(before); why != "" {
		return fmt.Errorf("%w: %w: of domain %s, %s; it may be an old copy; %s", ErrUnavailable, ErrOutdated, domain, why, remedy)
	}
	return nil
}

// newest is the last epoch that was given out.
func (s storedState) newest() plugin.Epoch {
	if s.Record == nil {
		return s.Floor
	}
	return max(s.Record.Epoch, s.Floor)
}

// behind tells what of before s lacks, although states only move on; "" if nothing.
func (s storedState) behind(before storedState) string {
	has, had := s.newest(), before.newest()
	switch {
	case has < had:
		return fmt.Sprintf("it has epoch %d, and this host has seen epoch %d", has, had)
	case has > had || s.Record == nil:
		return ""
	case before.Record == nil:
		return fmt.Sprintf("it has epoch %d, which was forgotten", has)
	case s.Token != before.Token:
		return fmt.Sprintf("its epoch %d is another than this host has seen", has)
	case before.Record.Owner != "" && s.Record.Owner != before.Record.Owner:
		return fmt.Sprintf("its epoch %d is owned by %q, and was by host %s", has, s.Record.Owner, before.Record.Owner)
	case before.Record.Closed && !s.Record.Closed:
		return fmt.Sprintf("its epoch %d is not closed, and was", has)
	}
	return ""
}

// note remembers what was found, or done, at the arbiter. It does not wait for the
// file: a decision is not to take longer for it.
func (s *Seen) note(domain plugin.UUID, now state) {
	if s == nil {
		return
	}
	stored, id := now.seen(), now.from
	s.mu.Lock()
	before, known := s.last.Domains[domain]
	if s.last.Identity == id && (known && before.equal(stored) || !known && stored.newest() == 0) {
		s.mu.Unlock()
		return
	}
	added := memory{Series: s.last.Series, Identity: id, Domains: map[plugin.UUID]storedState{}}
	if stored.newest() != 0 {
		added.Domains[domain] = stored
	}
	s.last.Identity = id
	s.last = s.last.merge(added)
	added = s.last // with what could not be written before
	s.mu.Unlock()
	s.writes.Go(func() {
		err := s.change(func(m memory) memory {
			if m.Series != added.Series || m.Identity != "" && m.Identity != id {
				return m // a person has decided otherwise meanwhile
			}
			m.Identity = id
			return m.merge(added)
		})
		if err != nil {
			s.complain(fmt.Errorf("what this host saw of the arbiter is not kept: %w", err))
		}
	})
}

// Flush waits until what was seen is in the file, or ctx ends. A process that ends
// soon calls it.
func (s *Seen) Flush(ctx context.Context) {
	done := make(chan struct{})
	go func() {
		s.writes.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// seen gives what is remembered of a state: without times, which decide nothing.
func (s state) seen() storedState {
	stored := storedState{Version: stateVersion, Floor: s.floor, Token: s.token}
	if rec := s.rec; rec.Epoch != 0 {
		rec.OpenedAt, rec.DecidedAt, rec.ClosedAt = time.Time{}, time.Time{}, time.Time{}
		stored.Record = &rec
	}
	return stored
}

func (s storedState) equal(o storedState) bool {
	if s.Floor != o.Floor || s.Token != o.Token || (s.Record == nil) != (o.Record == nil) {
		return false
	}
	return s.Record == nil || *s.Record == *o.Record
}

// change lets one process at a time replace what the file has.
func (s *Seen) change(f func(memory) memory) error {
	if err := os.MkdirAll(filepath.Dir(s.path), 0o700); err != nil {
		return err
	}
	// The directory is locked rather than the file, which is replaced.
	dir, err := os.Open(filepath.Dir(s.path))
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	for err = unix.EINTR; errors.Is(err, unix.EINTR); {
		err = unix.Flock(int(dir.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		return err
	}
	m, err := s.read()
	if err != nil {
		return err
	}
	next := f(m)
	if next.Series == m.Series && next.Identity == m.Identity && maps.EqualFunc(next.Domains, m.Domains, storedState.equal) {
		return nil
	}
	return s.write(next)
}

// Accept forgets what was seen, and believes the arbiter with that identity from
// now on. It gives the identity of before, "" if that is not known.
func (s *Seen) Accept(id string) (before string, err error) {
	if m, err := s.read(); err == nil {
		before = m.Identity
	} else if err := os.Remove(s.path); err != nil {
		return "", err
	}
	return before, s.change(func(memory) memory { return memory{Series: newToken(), Identity: id} })
}

// Domains lists those of which something was seen.
func (s *Seen) Domains() ([]plugin.UUID, error) {
	m, err := s.recall()
	if err != nil {
		return nil, err
	}
	list := make([]plugin.UUID, 0, len(m.Domains))
	for id := range m.Domains {
		list = append(list, id)
	}
	return list, nil
}
