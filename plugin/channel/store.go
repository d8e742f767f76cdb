// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sort"
	"sync"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/rrlog"
)

// Sentinels of the store.
var (
	// ErrGap: bytes of the log are missing. See [GapError].
	ErrGap = errors.New("gap in the event log")
	// ErrConflict: the peer sent other bytes for a position that is held. See
	// [ConflictError].
	ErrConflict = errors.New("event log contradicts what is held")
	// ErrSealed: the log was closed by Seal.
	ErrSealed = errors.New("event log is sealed")
	// ErrRange: a position is not where it can be. See [RangeError].
	ErrRange = errors.New("position out of the held event log")
	// ErrFenced: another writer or reader has taken the place of this one.
	ErrFenced = errors.New("another has taken over the event log")
)

// GapError wraps [ErrGap].
type GapError struct {
	// Want is the end of what was received, Got where the new bytes begin.
	Want, Got plugin.Position
}

func (e *GapError) Error() string {
	return fmt.Sprintf("%v: received up to %d, then bytes at %d", ErrGap, e.Want, e.Got)
}

func (e *GapError) Unwrap() error { return ErrGap }

// ConflictError wraps [ErrConflict].
type ConflictError struct {
	// Position is that of the first byte that differs.
	Position plugin.Position
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("%v: at position %d", ErrConflict, e.Position)
}

func (e *ConflictError) Unwrap() error { return ErrConflict }

// RangeError wraps [ErrRange].
type RangeError struct {
	// Position was asked for; From to To would have been possible.
	Position, From, To plugin.Position
}

func (e *RangeError) Error() string {
	return fmt.Sprintf("%v: %d is not within %d and %d", ErrRange, e.Position, e.From, e.To)
}

func (e *RangeError) Unwrap() error { return ErrRange }

// StoreConfig bounds a [Store].
type StoreConfig struct {
	// Limit is how many bytes it may hold; Append blocks beyond it.
	Limit int
	// MaxArray bounds the variable data of an event; see [rrlog.MaxArray].
	MaxArray uint32
	// Clock tells when bytes arrive.
	Clock func() time.Time
	// Spool, if not nil, gets a copy of what is held, before it may be
	// acknowledged.
	Spool *Spool
}

// DefaultStoreConfig holds minutes of a busy guest's log.
func DefaultStoreConfig() StoreConfig {
	return StoreConfig{Limit: 64 << 20, MaxArray: rrlog.DefaultMaxArray, Clock: time.Now}
}

const (
	// storeChunk is the unit in which memory is taken and given back.
	storeChunk = 64 << 10
	// spareChunks is how many are kept for reuse.
	spareChunks = 16
	// arrivals is how many samples of time are kept: at one a millisecond, at
	// least the last eight seconds.
	arrivals = 8192
	// arrivalStep is the resolution of the samples.
	arrivalStep = time.Millisecond
)

// arrival says when the log up to end had been received.
type arrival struct {
	end plugin.Position
	at  time.Time
}

// Store is the backup's copy of the log, in memory: from the channel until the
// replaying QEMU has consumed it. It knows where events end, so it can tell
// what may be acknowledged (section 2.2 of the paper: an output waits until the
// backup has received the log entry that produced it) and never gives QEMU a
// part of an event only.
//
// It has one [Writer] and one [Reader] at a time, each for one goroutine: what
// takes the place of one fences it, wherever it waits. The rest is for any.
type Store struct {
	cfg StoreConfig

	mu       sync.Mutex
	dec      *rrlog.Decoder
	base     plugin.Position // of chunks[0]; a multiple of storeChunk
	chunks   [][]byte
	spare    [][]byte
	released plugin.Position // below it nothing is held
	lent     plugin.Position // begin of what Next gave last
	next     plugin.Position // end of what Next gave last
	end      plugin.Position
	sealed   bool
	full     bool  // a writer waits for room
	err      error // what was wrong with the log
	writer   *Writer
	reader   *Reader

	samples []arrival // a ring
	first   int       // its oldest
	count   int

	more signal // the boundary moved, or sealed
	room signal // memory was released, or sealed
}

// NewStore makes a store for the log of an epoch, from position 0.
func NewStore(l rrlog.Layout, cfg StoreConfig) (*Store, error) {
	return makeStore(l, cfg, 0)
}

// makeStore makes one from a position on that is the end of an event.
func makeStore(l rrlog.Layout, cfg StoreConfig, start plugin.Position) (*Store, error) {
	if cfg.Clock == nil {
		return nil, fmt.Errorf("%w: the store has no clock", ErrConfig)
	}
	// An event that does not fit would never be whole, so never consumed, and
	// Append would wait for ever.
	if need := int64(cfg.MaxArray) + rrlog.MaxEventOverhead; int64(cfg.Limit) < need {
		return nil, fmt.Errorf("%w: a store of %d bytes cannot hold an event of %d", ErrConfig, cfg.Limit, need)
	}
	return &Store{
		cfg:     cfg,
		dec:     rrlog.NewDecoder(l, rrlog.MaxArray(cfg.MaxArray), rrlog.StartAt(start, 0)),
		samples: make([]arrival, arrivals),
		base:    start - start%storeChunk, released: start, lent: start, next: start, end: start,
	}, nil
}

// Writer adds to a store what a session receives.
type Writer struct{ store *Store }

// Resume gives the store a new writer, and tells from where on the log has to
// come: the end of what was received, or with whole, that of the last whole
// event. From then on the writer of before adds nothing any more, also if it
// waits for room.
func (s *Store) Resume(whole bool) (*Writer, plugin.Position) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writer = &Writer{store: s}
	s.full = false
	s.room.notify()
	if whole {
		return s.writer, s.dec.Boundary()
	}
	return s.writer, s.end
}

// Append adds the log's bytes at pos and returns what may be acknowledged: the
// end of the last whole event held that would be replayed. It copies data. Bytes that were received
// before, as after a reconnect, are skipped, having been compared with what is
// still held. It blocks while the store is full, until [Store.Release] makes
// room or ctx ends.
//
// Errors: [GapError], [ConflictError], [ErrSealed], [ErrFenced], ctx's, or for a
// log that QEMU cannot have written [rrlog.FormatError], which sticks. What
// precedes an error stays and may be acknowledged.
func (w *Writer) Append(ctx context.Context, pos plugin.Position, data []byte) (plugin.Position, error) {
	s := w.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.writer != w {
		return s.dec.Replayable(), ErrFenced
	}
	if s.err == nil && pos > s.end {
		return s.dec.Replayable(), &GapError{Want: s.end, Got: pos}
	}
	if s.err == nil && pos < s.end {
		known := min(len(data), int(s.end-pos))
		if err := s.compare(pos, data[:known]); err != nil {
			return s.dec.Replayable(), err
		}
		data = data[known:]
	}
	for {
		switch {
		case s.err != nil:
			return s.dec.Replayable(), s.err
		case len(data) == 0:
			return s.dec.Replayable(), nil
		case s.sealed:
			return s.dec.Replayable(), ErrSealed
		}
		if n := min(len(data), s.cfg.Limit-int(s.end-s.released)); n > 0 {
			s.add(data[:n])
			data = data[n:]
			continue
		}
		s.full = true
		room := s.room.wait()
		s.mu.Unlock()
		select {
		case <-room:
		case <-ctx.Done():
		}
		s.mu.Lock()
		if s.writer != w {
			return s.dec.Replayable(), ErrFenced
		}
		s.full = false
		if err := ctx.Err(); err != nil {
			return s.dec.Replayable(), err
		}
	}
}

// Full tells that log was received for which there is no room.
func (s *Store) Full() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.full
}

// compare checks what is received again, as far as it is still held.
func (s *Store) compare(pos plugin.Position, data []byte) error {
	if pos < s.released {
		gone := min(len(data), int(s.released-pos))
		pos, data = pos+plugin.Position(gone), data[gone:]
	}
	for len(data) > 0 {
		held := s.at(pos, pos+plugin.Position(len(data)))
		for i, b := range held {
			if data[i] != b {
				return &ConflictError{Position: pos + plugin.Position(i)}
			}
		}
		pos, data = pos+plugin.Position(len(held)), data[len(held):]
	}
	return nil
}

// at gives the held bytes from pos on, up to limit or the end of a chunk.
func (s *Store) at(pos, limit plugin.Position) []byte {
	off := int(pos - s.base)
	chunk := s.chunks[off/storeChunk]
	from := off % storeChunk
	return chunk[from:min(storeChunk, from+int(limit-pos))]
}

// add stores bytes for which there is room. The boundary does not pass bytes
// that are no event, so Next never gives these out.
func (s *Store) add(data []byte) {
	before := s.dec.Boundary()
	s.err = s.dec.Feed(data)
	if s.err != nil {
		// Keep up to the boundary what belongs to whole events.
		data = data[:max(0, int(s.dec.Boundary())-int(s.end))]
	}
	s.cfg.Spool.write(data)
	for len(data) > 0 {
		off := int(s.end - s.base)
		for off/storeChunk >= len(s.chunks) {
			s.chunks = append(s.chunks, s.newChunk())
		}
		n := copy(s.chunks[off/storeChunk][off%storeChunk:], data)
		s.end += plugin.Position(n)
		data = data[n:]
	}
	s.cfg.Spool.boundary(s.end, s.dec.Boundary())
	s.arrived()
	if s.dec.Boundary() != before {
		s.more.notify()
	}
}

func (s *Store) newChunk() []byte {
	if n := len(s.spare); n > 0 {
		chunk := s.spare[n-1]
		s.spare = s.spare[:n-1]
		return chunk
	}
	return make([]byte, storeChunk)
}

// arrived samples the time.
func (s *Store) arrived() {
	now := s.cfg.Clock()
	if s.count > 0 {
		last := &s.samples[(s.first+s.count-1)%len(s.samples)]
		if now.Sub(last.at) < arrivalStep {
			last.end = s.end
			return
		}
	}
	if s.count == len(s.samples) {
		s.first = (s.first + 1) % len(s.samples)
		s.count--
	}
	s.samples[(s.first+s.count)%len(s.samples)] = arrival{end: s.end, at: now}
	s.count++
}

// Reader gives out what a store holds, to feed it to QEMU.
type Reader struct{ store *Store }

// Rewind gives the store a new reader, which goes on from pos, as for a plugin
// that connected anew. The one of before gets nothing any more, also if it
// waits. The error is a [RangeError] if pos was released or not yet given out.
func (s *Store) Rewind(pos plugin.Position) (*Reader, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if pos < s.released || pos > s.next {
		return nil, &RangeError{Position: pos, From: s.released, To: s.next}
	}
	s.next, s.lent = pos, pos
	s.reader = &Reader{store: s}
	s.more.notify()
	return s.reader, nil
}

// Next waits for bytes that were not given out yet and belong to whole events,
// and returns at most limit of them and the position of the first. A long event
// may come in several pieces, but never before all of it is held. The bytes are
// valid until the next call of Next, even if released, or until Rewind. After
// [Store.Seal] it returns io.EOF once the last whole event was given out: to a
// reader that is not [ErrFenced], which so was given all of it. The event by which
// somebody but the guest ended the primary's QEMU is none of them.
func (r *Reader) Next(ctx context.Context, limit int) (plugin.Position, []byte, error) {
	s := r.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reader == r {
		s.lent = s.next
		s.trim()
	}
	for {
		if s.reader != r {
			return 0, nil, ErrFenced
		}
		if end := s.dec.Replayable(); s.next < end && limit > 0 {
			pos := s.next
			data := s.at(pos, min(end, pos+plugin.Position(limit)))
			s.next += plugin.Position(len(data))
			return pos, data, nil
		}
		if s.sealed {
			return s.next, nil, io.EOF
		}
		more := s.more.wait()
		s.mu.Unlock()
		select {
		case <-more:
		case <-ctx.Done():
		}
		s.mu.Lock()
		if err := ctx.Err(); err != nil {
			return s.next, nil, err
		}
	}
}

// Release frees the memory of the log below pos, which QEMU has consumed. A
// position that was released before is ignored; one that was never given out is
// a [RangeError].
func (s *Store) Release(pos plugin.Position) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if pos > s.next {
		return &RangeError{Position: pos, From: s.released, To: s.next}
	}
	if pos > s.released {
		s.released = pos
		s.cfg.Spool.release(pos)
		s.trim()
		s.room.notify()
	}
	return nil
}

// trim gives back the chunks that hold nothing of use. What Next gave last is
// not overwritten while its user may still read it.
func (s *Store) trim() {
	keep := min(s.released, s.lent)
	n := int(keep-s.base) / storeChunk
	if n == 0 {
		return
	}
	for _, chunk := range s.chunks[:n] {
		if len(s.spare) < spareChunks {
			s.spare = append(s.spare, chunk)
		}
	}
	kept := copy(s.chunks, s.chunks[n:])
	clear(s.chunks[kept:])
	s.chunks = s.chunks[:kept]
	s.base += plugin.Position(n * storeChunk)
}

// Seal says that no more of the log will come: the primary is dead or has ended
// the epoch. Bytes of a cut event at the end are never given out.
func (s *Store) Seal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sealed = true
	s.more.notify()
	s.room.notify()
}

// Boundary is the end of the last whole event received.
func (s *Store) Boundary() plugin.Position {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dec.Boundary()
}

// Replayable is the end of what Next will give out of what was received, and
// may be acknowledged.
func (s *Store) Replayable() plugin.Position {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dec.Replayable()
}

// Needed is up to where a copy must have replayed what was received, that its
// disks be those of the primary; see [rrlog.Decoder.Needed].
func (s *Store) Needed() plugin.Position {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dec.Needed()
}

// End is the end of what was received, be it within an event. On a reconnect
// the log is to be resumed from here.
func (s *Store) End() plugin.Position {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.end
}

// ReceivedAt tells when the log below pos had been received, to the
// millisecond, early rather than late. It is false if pos has not been
// received, or so long ago that it is forgotten.
func (s *Store) ReceivedAt(pos plugin.Position) (time.Time, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.receivedAt(pos)
}

func (s *Store) receivedAt(pos plugin.Position) (time.Time, bool) {
	i := sort.Search(s.count, func(i int) bool {
		return s.samples[(s.first+i)%len(s.samples)].end >= pos
	})
	// Below the oldest sample only a store that forgot none can tell.
	if i == s.count || (i == 0 && s.count == len(s.samples)) {
		return time.Time{}, false
	}
	return s.samples[(s.first+i)%len(s.samples)].at, true
}

// Lag is the execution lag of a QEMU that consumed the log up to pos: for how
// long the first byte it has not consumed has been here. It is 0 if QEMU has
// consumed all that it is given. If the arrival is forgotten, it is the age of the
// oldest that is known, a lower bound.
func (s *Store) Lag(pos plugin.Position) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if pos >= s.dec.Replayable() || s.count == 0 {
		return 0
	}
	at, ok := s.receivedAt(pos + 1)
	if !ok {
		at = s.samples[s.first].at
	}
	return max(0, s.cfg.Clock().Sub(at))
}

// StoreStats is a snapshot of a [Store].
type StoreStats struct {
	// Received counts the bytes received since the epoch began, those that an
	// earlier agent received included.
	Received uint64 `json:"received"`
	// Boundary is the end of the last whole event, Given that of what Next gave
	// out, Released that of what was consumed.
	Boundary plugin.Position `json:"boundary"`
	Given    plugin.Position `json:"given"`
	Released plugin.Position `json:"released"`
	// Held counts the bytes in memory, at most Limit.
	Held  int `json:"held"`
	Limit int `json:"limit"`
	// Events and Instructions are those of the whole events received.
	Events       uint64 `json:"events"`
	Instructions uint64 `json:"instructions"`
	// Ended: the log was closed by END. GuestEnded: the guest asked for its end.
	Ended      bool `json:"ended"`
	GuestEnded bool `json:"guest_ended"`
	Sealed     bool `json:"sealed"`
}

// Stats gives a snapshot.
func (s *Store) Stats() StoreStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return StoreStats{
		Received: uint64(s.end),
		Boundary: s.dec.Boundary(), Given: s.next, Released: s.released,
		Held: int(s.end - s.released), Limit: s.cfg.Limit,
		Events: s.dec.Events(), Instructions: s.dec.Instructions(),
		Ended: s.dec.Ended(), GuestEnded: s.dec.GuestEnded(), Sealed: s.sealed,
	}
}
