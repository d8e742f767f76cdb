// SPDX-License-Identifier: Apache-2.0

// Package rrlog decodes the event log that QEMU's record/replay writes, as a
// stream: fed with bytes cut anywhere, it tells where each event begins and
// ends, what it is, and how many instructions were logged. It keeps no event
// data, so a log of any length is decoded in constant memory.
//
// FORMAT.md beside this file specifies the log byte by byte.
package rrlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"ftvirt.org/ftvirt/plugin"
)

// What may be wrong with a log. Each comes wrapped in a [FormatError].
var (
	// ErrUnknownKind: the code stands for no event of this QEMU.
	ErrUnknownKind = errors.New("unknown event kind")
	// ErrArrayTooLong: the event's data exceed the limit.
	ErrArrayTooLong = errors.New("event data too long")
	// ErrBadInput: an INPUT is of no type that QEMU knows.
	ErrBadInput = errors.New("unknown input event type")
	// ErrBadInstructions: an INSTRUCTION counts none, or more than QEMU's int.
	ErrBadInstructions = errors.New("impossible instruction count")
	// ErrAfterEnd: something follows the event END.
	ErrAfterEnd = errors.New("data after the end event")
)

// FormatError says where a log cannot be what QEMU wrote. It wraps one of the
// sentinels of this package.
type FormatError struct {
	// Position is that of the first byte of the offending event.
	Position plugin.Position
	// Code is the first byte of the offending event.
	Code byte
	// Value is what was found where the error is about a number.
	Value uint64
	Err   error
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("event log at position %d: %v (event code %d, value %d)", e.Position, e.Err, e.Code, e.Value)
}

func (e *FormatError) Unwrap() error { return e.Err }

// DefaultMaxArray bounds an event's variable data, in bytes. The largest that
// QEMU writes in practice are packets of 64 KiB plus headers.
const DefaultMaxArray = 1 << 20

// MaxEventOverhead is how many bytes an event can have besides its variable
// data; with the limit on these it bounds the length of every event.
const MaxEventOverhead = 1 + maxFixed

// Option adjusts a [Decoder] or [Scanner].
type Option func(*Decoder)

// MaxArray limits an event's variable data to n bytes instead of
// [DefaultMaxArray].
func MaxArray(n uint32) Option { return func(d *Decoder) { d.maxArray = uint64(n) } }

// StartAt lets the first byte fed be the one at position p, which must be a
// boundary, with icount instructions logged before it.
func StartAt(p plugin.Position, icount uint64) Option {
	return func(d *Decoder) {
		d.boundary, d.position, d.instructions = p, p, icount
	}
}

// OnEvent calls f for each whole event. The event is valid until f returns;
// f must not feed the decoder.
func OnEvent(f func(*Event)) Option { return func(d *Decoder) { d.onEvent = f } }

// Decoder finds the events in a log that is fed to it piece by piece. It does
// not allocate. It is for one goroutine at a time.
type Decoder struct {
	layout   Layout
	maxArray uint64
	onEvent  func(*Event)

	position     plugin.Position // after the last byte taken
	boundary     plugin.Position // after the last whole event
	instructions uint64
	events       uint64
	ended        bool
	guestEnd     bool            // the guest asked for its end, and was not reset since,
	guestEndAt   plugin.Position // with the event here
	hostEnd      bool            // somebody else ended QEMU,
	hostEndAt    plugin.Position // with the event here
	err          error

	// The event under construction.
	inside bool
	need   int    // fixed bytes known to belong to it
	skip   uint64 // bytes of data still to come
	ev     Event
}

// NewDecoder makes a decoder that stands at position 0, or where [StartAt] says.
func NewDecoder(l Layout, opts ...Option) *Decoder {
	d := &Decoder{layout: l, maxArray: DefaultMaxArray}
	for _, o := range opts {
		o(d)
	}
	return d
}

// Position is the offset after the last byte taken.
func (d *Decoder) Position() plugin.Position { return d.position }

// Boundary is the end of the last whole event seen. Only bytes below it may be
// given to a replaying QEMU, which exits at an event that is cut.
func (d *Decoder) Boundary() plugin.Position { return d.boundary }

// Trailing counts the bytes taken since the boundary.
func (d *Decoder) Trailing() uint64 { return uint64(d.position - d.boundary) }

// Instructions is the number of instructions in the whole events so far.
func (d *Decoder) Instructions() uint64 { return d.instructions }

// Events is the number of whole events so far.
func (d *Decoder) Events() uint64 { return d.events }

// Ended reports whether the event END was seen: QEMU closed its log.
func (d *Decoder) Ended() bool { return d.ended }

// GuestEnded reports whether the guest asked for its end, as by powering off. A
// log that ended without that was ended by a signal or a monitor's command.
func (d *Decoder) GuestEnded() bool { return d.guestEnd }

// Needed is up to where a copy must have replayed the log, that the guest's disks
// be those of its end.
func (d *Decoder) Needed() plugin.Position {
	if d.guestEnd {
		return d.guestEndAt
	}
	return d.Replayable()
}

// Replayable is the boundary, but for a log that the guest did not end: then it
// is before the event by which QEMU was told to end. A copy that is to go on in
// the place of that QEMU must not replay it.
func (d *Decoder) Replayable() plugin.Position {
	if d.hostEnd {
		return d.hostEndAt
	}
	return d.boundary
}

// Err is the error that stopped the decoder, if any.
func (d *Decoder) Err() error { return d.err }

// Feed takes the next bytes of the log; it keeps none of them. A log that
// cannot be QEMU's gives a [FormatError], now and for every later call; the
// boundary then stays before the offending event.
func (d *Decoder) Feed(p []byte) error {
	_, err := d.Write(p)
	return err
}

// Write is [Decoder.Feed] as an io.Writer. The count is that of bytes up to
// the one that showed the error.
func (d *Decoder) Write(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		took, ev, err := d.step(p[n:])
		n += took
		if err != nil {
			return n, err
		}
		if ev != nil && d.onEvent != nil {
			d.onEvent(ev)
		}
	}
	return n, d.err
}

// step takes bytes up to the end of the current event and returns the event
// if that end was reached.
func (d *Decoder) step(p []byte) (int, *Event, error) {
	if d.err != nil {
		return 0, nil, d.err
	}
	if len(p) == 0 {
		return 0, nil, nil
	}
	n := 0
	if !d.inside {
		if err := d.begin(p[0]); err != nil {
			return 0, nil, err
		}
		n = 1
	}
	for d.ev.fixedLen < d.need {
		c := copy(d.ev.fixed[d.ev.fixedLen:d.need], p[n:])
		d.ev.fixedLen += c
		n += c
		if d.ev.fixedLen < d.need {
			d.position += plugin.Position(n)
			return n, nil, nil
		}
		if err := d.measure(); err != nil {
			d.position += plugin.Position(n)
			return n, nil, err
		}
	}
	c := min(d.skip, uint64(len(p)-n))
	d.skip -= c
	n += int(c)
	d.position += plugin.Position(n)
	if d.skip > 0 {
		return n, nil, nil
	}
	d.finish()
	return n, &d.ev, nil
}

// begin starts an event from its code.
func (d *Decoder) begin(code byte) error {
	if d.ended {
		return d.fail(code, uint64(code), ErrAfterEnd)
	}
	kind, ok := d.layout.Kind(code)
	if !ok {
		return d.fail(code, uint64(code), ErrUnknownKind)
	}
	d.inside = true
	d.need = int(spec[kind].fixed)
	d.skip = 0
	d.ev.Position, d.ev.Kind, d.ev.Code = d.boundary, kind, code
	d.ev.Instructions, d.ev.DataLength, d.ev.fixedLen = 0, 0, 0
	return nil
}

// measure runs each time the fixed bytes needed so far are there: it tells how
// many more belong to the event, and how much data follow.
func (d *Decoder) measure() error {
	f := &d.ev.fixed
	switch spec[d.ev.Kind].shape {
	case shapeArray:
		return d.data(uint64(binary.BigEndian.Uint32(f[d.need-4:])), 1)
	case shapeAudioIn:
		return d.data(binary.BigEndian.Uint64(f[:]), audioFrame)
	case shapeInput:
		return d.measureInput()
	case shapeFixed:
		if d.ev.Kind == KindInstruction {
			count := binary.BigEndian.Uint32(f[:])
			if count == 0 || count > math.MaxInt32 {
				return d.fail(d.ev.Code, uint64(count), ErrBadInstructions)
			}
			d.ev.Instructions = count
		}
	}
	return nil
}

// data notes that count items of variable data follow.
func (d *Decoder) data(count, size uint64) error {
	// Dividing the limit keeps a hostile count from overflowing the product.
	if count > d.maxArray/size {
		return d.fail(d.ev.Code, count, ErrArrayTooLong)
	}
	d.skip = count * size
	d.ev.DataLength = d.skip
	return nil
}

// measureInput follows replay_save_input_event: a type, for keys a second
// type, then what these imply.
func (d *Decoder) measureInput() error {
	kind := binary.BigEndian.Uint32(d.ev.fixed[0:])
	switch d.need {
	case 4:
		switch kind {
		case inputKey:
			d.need += 4
		case inputBtn:
			d.need += 4 + 1
		case inputRel, inputAbs:
			d.need += 4 + 8
		case inputMtt:
			d.need += 4 + 8 + 8 + 4 + 8
		default:
			return d.fail(d.ev.Code, uint64(kind), ErrBadInput)
		}
	case 8: // only a key stops here
		switch key := binary.BigEndian.Uint32(d.ev.fixed[4:]); key {
		case keyNumber:
			d.need += 8 + 1
		case keyQcode:
			d.need += 4 + 1
		default:
			return d.fail(d.ev.Code, uint64(key), ErrBadInput)
		}
	}
	return nil
}

// finish completes the event under construction.
func (d *Decoder) finish() {
	d.inside = false
	d.instructions += uint64(d.ev.Instructions)
	d.events++
	switch d.ev.Kind {
	case KindShutdown:
		d.noteEnd(d.layout.GuestCause(d.ev.Code))
	case KindEnd:
		d.ended = true
		d.noteEnd(false)
	case KindCheckpointResetRequested, KindCheckpointReset:
		d.guestEnd = false // libvirt makes a reboot of a power-off
	}
	d.ev.Icount = d.instructions
	d.ev.Length = uint64(d.position - d.boundary)
	d.boundary = d.position
}

// noteEnd keeps who began the end of the log, of which the event under
// construction is a part. libvirt ends the QEMU of a guest that powered off by a
// signal.
func (d *Decoder) noteEnd(guest bool) {
	if guest {
		d.guestEnd, d.guestEndAt = true, d.ev.Position
	} else if !d.guestEnd && !d.hostEnd {
		d.hostEnd, d.hostEndAt = true, d.ev.Position
	}
}

func (d *Decoder) fail(code byte, value uint64, err error) error {
	d.err = &FormatError{Position: d.boundary, Code: code, Value: value, Err: err}
	return d.err
}
