// SPDX-License-Identifier: Apache-2.0

package rrlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// HeaderSize is the length of the header of a file that QEMU recorded. A
// stream that the plugin writes has none.
const HeaderSize = 12

// Version is the only version of the log that this package reads: QEMU's
// REPLAY_VERSION since 5.2.
const Version uint32 = 0x00e0200c

// ErrVersion is wrapped by every [VersionError].
var ErrVersion = errors.New("unsupported event log version")

// VersionError reports a file of another version than [Version].
type VersionError struct {
	Version uint32
}

func (e *VersionError) Error() string {
	return fmt.Sprintf("%v 0x%08x, expected 0x%08x: record with a supported QEMU", ErrVersion, e.Version, Version)
}

func (e *VersionError) Unwrap() error { return ErrVersion }

// Header says what was found before the first event.
type Header int

const (
	// HeaderNone: a bare stream.
	HeaderNone Header = iota
	// HeaderFinished: a file that QEMU closed properly.
	HeaderFinished
	// HeaderOpen: a file that QEMU never finished: it writes the version last,
	// so the header is all zeros.
	HeaderOpen
)

// AppendHeader appends the header of a finished file to dst.
func AppendHeader(dst []byte) []byte {
	dst = binary.BigEndian.AppendUint32(dst, Version)
	return append(dst, make([]byte, HeaderSize-4)...)
}

// Scanner reads a log from a reader, event by event. It takes a bare stream as
// well as a file with QEMU's header, which are told apart by their first
// bytes: none of the headers can begin a stream, as each would be an
// INSTRUCTION with an impossible count.
type Scanner struct {
	r      io.Reader
	dec    *Decoder
	header Header
	began  bool
	eof    bool
	buf    []byte
	rest   []byte
	ev     *Event
	err    error
}

// scanBuffer is how much is read at once.
const scanBuffer = 64 << 10

// NewScanner reads from r. Positions count from the first event, not from the
// header.
func NewScanner(r io.Reader, l Layout, opts ...Option) *Scanner {
	return &Scanner{r: r, dec: NewDecoder(l, opts...), buf: make([]byte, scanBuffer)}
}

// Scan goes to the next whole event. It returns false at the end of the input,
// also when that cuts an event (see [Scanner.Trailing]), and at an error.
func (s *Scanner) Scan() bool {
	if s.err != nil {
		return false
	}
	if !s.began {
		if s.err = s.begin(); s.err != nil {
			return false
		}
	}
	for {
		for len(s.rest) > 0 {
			n, ev, err := s.dec.step(s.rest)
			s.rest = s.rest[n:]
			if err != nil {
				s.err = err
				return false
			}
			if ev != nil {
				if s.dec.onEvent != nil {
					s.dec.onEvent(ev)
				}
				s.ev = ev
				return true
			}
		}
		if s.eof {
			return false
		}
		n, err := s.r.Read(s.buf)
		s.rest = s.buf[:n]
		if errors.Is(err, io.EOF) {
			s.eof = true
		} else if err != nil {
			s.err = fmt.Errorf("reading the event log: %w", err)
			return false
		}
	}
}

// begin reads up to a header's length and decides whether it is one.
func (s *Scanner) begin() error {
	s.began = true
	n, err := io.ReadFull(s.r, s.buf[:HeaderSize])
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("reading the event log: %w", err)
	}
	s.rest = s.buf[:n]
	if n < HeaderSize {
		s.eof = true
		return nil
	}
	version := binary.BigEndian.Uint32(s.rest)
	zeros := binary.BigEndian.Uint64(s.rest[4:]) == 0
	switch {
	case version == Version && zeros:
		s.header, s.rest = HeaderFinished, nil
	case version == 0 && zeros:
		s.header, s.rest = HeaderOpen, nil
	case version>>16 == Version>>16 && zeros:
		return &VersionError{Version: version}
	}
	return nil
}

// Event is the event that Scan went to, valid until the next Scan.
func (s *Scanner) Event() *Event { return s.ev }

// Decoder gives the running totals.
func (s *Scanner) Decoder() *Decoder { return s.dec }

// Header says what kind of input it is, once Scan was called.
func (s *Scanner) Header() Header { return s.header }

// Trailing counts the bytes of an event that the input's end cuts. A crash
// leaves such a log.
func (s *Scanner) Trailing() uint64 { return s.dec.Trailing() }

// Err is the error that stopped the scanner; the end of the input is none.
func (s *Scanner) Err() error { return s.err }
