// SPDX-License-Identifier: Apache-2.0

package rrlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"

	"ftvirt.org/ftvirt/plugin"
)

func layout(t testing.TB) Layout {
	t.Helper()
	l, err := LayoutFor(10, 0)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// pack builds a log from bytes, big-endian numbers and strings.
func pack(parts ...any) []byte {
	var b []byte
	for _, p := range parts {
		switch v := p.(type) {
		case int:
			b = append(b, byte(v))
		case string:
			b = append(b, v...)
		default:
			b, _ = binary.Append(b, binary.BigEndian, v)
		}
	}
	return b
}

// sample has one event of each kind, with the codes of QEMU 10.0.
var sample = []struct {
	bytes   []byte
	kind    Kind
	details string
}{
	{pack(0, uint32(1000)), KindInstruction, "count=1000"},
	{pack(1), KindInterrupt, ""},
	{pack(2), KindException, ""},
	{pack(3, uint64(7)), KindBH, "id=7"},
	{pack(4, uint64(8)), KindBHOneshot, "id=8"},
	{pack(5, uint32(0), uint32(0), uint64(30), 1), KindInput, "type=key number=30 down=true"},
	{pack(5, uint32(0), uint32(1), uint32(31), 0), KindInput, "type=key qcode=31 down=false"},
	{pack(5, uint32(1), uint32(2), 1), KindInput, "type=btn button=2 down=true"},
	{pack(5, uint32(2), uint32(1), int64(-3)), KindInput, "type=rel axis=1 value=-3"},
	{pack(5, uint32(3), uint32(0), int64(99)), KindInput, "type=abs axis=0 value=99"},
	{
		pack(5, uint32(4), uint32(1), int64(2), int64(3), uint32(1), int64(5)),
		KindInput, "type=mtt touch=1 slot=2 tracking=3 axis=1 value=5",
	},
	{pack(6), KindInputSync, ""},
	{pack(7, 2, uint32(3), "abc"), KindCharRead, "device=2 length=3"},
	{pack(8, uint64(1<<40)), KindBlock, "id=1099511627776"},
	{pack(9, 1, uint32(0), uint32(5), "hello"), KindNet, "filter=1 flags=0 length=5"},
	{pack(10), KindShutdown, "cause=NONE"},
	{pack(14), KindShutdown, "cause=HOST_SIGNAL"},
	{pack(21), KindShutdown, "cause=UNKNOWN_11"},
	{pack(22, uint32(5), uint32(5)), KindCharWrite, "result=5 offset=5"},
	{pack(23, uint32(0)), KindCharReadAll, "length=0"},
	{pack(24, int32(-5)), KindCharReadAllError, "error=-5"},
	{pack(25, uint64(441)), KindAudioOut, "played=441"},
	{pack(26, uint64(2), uint64(9), uint64(1), uint64(2), uint64(3), uint64(4)), KindAudioIn, "recorded=2 wpos=9"},
	{pack(27, int32(0), uint32(4), "\x00\x01\x02\x03"), KindRandom, "result=0 length=4"},
	{pack(28, int64(-1)), KindClockHost, "ns=-1"},
	{pack(29, int64(12345)), KindClockVirtualRT, "ns=12345"},
	{pack(30), KindCheckpointClockWarpStart, ""},
	{pack(31), KindCheckpointClockWarpAccount, ""},
	{pack(32), KindCheckpointResetRequested, ""},
	{pack(33), KindCheckpointSuspendRequested, ""},
	{pack(34), KindCheckpointClockVirtual, ""},
	{pack(35), KindCheckpointClockHost, ""},
	{pack(36), KindCheckpointClockVirtualRT, ""},
	{pack(37), KindCheckpointInit, ""},
	{pack(0, uint32(234)), KindInstruction, "count=234"},
	{pack(38), KindCheckpointReset, ""},
	{pack(39), KindEnd, ""},
}

func sampleLog() []byte {
	var b []byte
	for _, s := range sample {
		b = append(b, s.bytes...)
	}
	return b
}

// collect decodes the pieces and returns the events.
func collect(l Layout, pieces ...[]byte) ([]Event, *Decoder, error) {
	var got []Event
	d := NewDecoder(l, OnEvent(func(e *Event) { got = append(got, *e) }))
	for _, p := range pieces {
		if err := d.Feed(p); err != nil {
			return got, d, err
		}
	}
	return got, d, nil
}

// plain drops the bytes of the payload buffer that do not belong to the event.
func plain(evs []Event) []Event {
	out := make([]Event, len(evs))
	for i, e := range evs {
		out[i] = e
		clear(out[i].fixed[e.fixedLen:])
	}
	return out
}

func TestDecodeEachKind(t *testing.T) {
	l := layout(t)
	evs, d, err := collect(l, sampleLog())
	if err != nil {
		t.Fatal(err)
	}
	if len(evs) != len(sample) {
		t.Fatalf("%d events, want %d", len(evs), len(sample))
	}
	var pos plugin.Position
	seen := map[Kind]bool{}
	for i, e := range evs {
		want := sample[i]
		seen[e.Kind] = true
		if e.Position != pos || e.Length != uint64(len(want.bytes)) || e.Kind != want.kind || e.Code != want.bytes[0] {
			t.Errorf("event %d: position %d length %d kind %v, want %d %d %v",
				i, e.Position, e.Length, e.Kind, pos, len(want.bytes), want.kind)
		}
		var details []string
		for _, dt := range e.Details(l) {
			details = append(details, fmt.Sprintf("%s=%v", dt.Name, dt.Value))
		}
		if got := strings.Join(details, " "); got != want.details {
			t.Errorf("event %d: details %q, want %q", i, got, want.details)
		}
		pos = e.End()
	}
	if len(seen) != kindCount {
		t.Errorf("the sample has %d kinds of %d", len(seen), kindCount)
	}
	if d.Instructions() != 1234 || evs[len(evs)-1].Icount != 1234 {
		t.Errorf("instructions %d, want 1234", d.Instructions())
	}
	if d.Boundary() != pos || d.Trailing() != 0 || !d.Ended() || d.Events() != uint64(len(sample)) {
		t.Errorf("boundary %d trailing %d ended %v", d.Boundary(), d.Trailing(), d.Ended())
	}
}

func TestCutAtEveryByte(t *testing.T) {
	l := layout(t)
	log := sampleLog()
	want, _, err := collect(l, log)
	if err != nil {
		t.Fatal(err)
	}
	for cut := range len(log) + 1 {
		got, d, err := collect(l, log[:cut], nil, log[cut:])
		if err != nil {
			t.Fatalf("cut at %d: %v", cut, err)
		}
		if !reflect.DeepEqual(plain(got), plain(want)) {
			t.Fatalf("cut at %d: other events", cut)
		}
		if int(d.Boundary()) != len(log) {
			t.Fatalf("cut at %d: boundary %d, want %d", cut, d.Boundary(), len(log))
		}
		// The first half alone: the boundary is the end of the last whole event.
		half, d, err := collect(l, log[:cut])
		if err != nil {
			t.Fatal(err)
		}
		var end plugin.Position
		if len(half) > 0 {
			end = half[len(half)-1].End()
		}
		if d.Boundary() != end || int(d.Position()) != cut || d.Trailing() != uint64(cut)-uint64(end) {
			t.Fatalf("cut at %d: boundary %d trailing %d, want boundary %d", cut, d.Boundary(), d.Trailing(), end)
		}
	}
	var bytewise [][]byte
	for i := range log {
		bytewise = append(bytewise, log[i:i+1])
	}
	if got, _, err := collect(l, bytewise...); err != nil || !reflect.DeepEqual(plain(got), plain(want)) {
		t.Fatalf("byte by byte: %v", err)
	}
}

func TestDecodeErrors(t *testing.T) {
	good := pack(0, uint32(5), 1)
	tests := []struct {
		name  string
		bad   []byte
		want  error
		value uint64
	}{
		{"first unknown code", pack(40), ErrUnknownKind, 40},
		{"last unknown code", pack(255), ErrUnknownKind, 255},
		{"no instructions", pack(0, uint32(0)), ErrBadInstructions, 0},
		{"negative instructions", pack(0, uint32(1<<31)), ErrBadInstructions, 1 << 31},
		{"long packet", pack(9, 0, uint32(0), uint32(DefaultMaxArray+1)), ErrArrayTooLong, DefaultMaxArray + 1},
		{"overflowing audio", pack(26, uint64(1)<<60+1, uint64(0)), ErrArrayTooLong, 1<<60 + 1},
		{"input type", pack(5, uint32(5)), ErrBadInput, 5},
		{"key type", pack(5, uint32(0), uint32(2)), ErrBadInput, 2},
		{"after end", pack(39, 1), ErrAfterEnd, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := NewDecoder(layout(t))
			if err := d.Feed(good); err != nil {
				t.Fatal(err)
			}
			err := d.Feed(tt.bad)
			var fe *FormatError
			if !errors.Is(err, tt.want) || !errors.As(err, &fe) {
				t.Fatalf("error %v, want %v", err, tt.want)
			}
			if fe.Value != tt.value || fe.Position != d.Boundary() {
				t.Errorf("value %d position %d, want %d and the boundary %d", fe.Value, fe.Position, tt.value, d.Boundary())
			}
			boundary := d.Boundary()
			if again := d.Feed(good); !errors.Is(again, tt.want) || d.Boundary() != boundary {
				t.Errorf("the error does not stick: %v, boundary %d", again, d.Boundary())
			}
		})
	}
}

func TestOptions(t *testing.T) {
	d := NewDecoder(layout(t), MaxArray(4), StartAt(1000, 50))
	if err := d.Feed(pack(7, 0, uint32(4), "abcd", 0, uint32(6))); err != nil {
		t.Fatal(err)
	}
	if d.Boundary() != 1015 || d.Instructions() != 56 {
		t.Errorf("boundary %d instructions %d, want 1015 56", d.Boundary(), d.Instructions())
	}
	if err := d.Feed(pack(7, 0, uint32(5), "abcde")); !errors.Is(err, ErrArrayTooLong) {
		t.Errorf("error %v, want %v", err, ErrArrayTooLong)
	}
}

func TestFeedDoesNotAllocate(t *testing.T) {
	log := sampleLog()
	log = log[:len(log)-1] // without END, so that it can be fed again
	var n uint64
	d := NewDecoder(layout(t), OnEvent(func(e *Event) { n += e.Length }))
	if got := testing.AllocsPerRun(100, func() {
		if err := d.Feed(log); err != nil {
			t.Fatal(err)
		}
	}); got != 0 {
		t.Errorf("%v allocations per feed, want none", got)
	}
	if n != uint64(d.Boundary()) {
		t.Errorf("events add up to %d bytes, boundary %d", n, d.Boundary())
	}
}

func BenchmarkFeed(b *testing.B) {
	log := sampleLog()
	log = bytes.Repeat(log[:len(log)-1], 64)
	d := NewDecoder(layout(b))
	b.SetBytes(int64(len(log)))
	b.ReportAllocs()
	for b.Loop() {
		if err := d.Feed(log); err != nil {
			b.Fatal(err)
		}
	}
}

// FuzzDecoder checks on any input that the cuts do not matter and that what
// the decoder says about positions is consistent.
func FuzzDecoder(f *testing.F) {
	f.Add(sampleLog(), uint16(3))
	l, err := LayoutFor(10, 0)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, log []byte, at uint16) {
		cut := min(int(at), len(log))
		want, dw, errw := collect(l, log)
		got, dg, errg := collect(l, log[:cut], log[cut:])
		if !reflect.DeepEqual(plain(got), plain(want)) || dg.Boundary() != dw.Boundary() {
			t.Fatalf("cut at %d changes the events", cut)
		}
		if fmt.Sprint(errw) != fmt.Sprint(errg) {
			t.Fatalf("cut at %d changes the error: %v, %v", cut, errw, errg)
		}
		var pos plugin.Position
		for _, e := range want {
			if e.Position != pos || e.Length == 0 {
				t.Fatalf("event at %d, expected at %d", e.Position, pos)
			}
			pos = e.End()
		}
		if dw.Boundary() != pos || dw.Position() < pos || int(dw.Position()) > len(log) {
			t.Fatalf("boundary %d position %d, events end at %d of %d", dw.Boundary(), dw.Position(), pos, len(log))
		}
		if errw == nil && int(dw.Position()) != len(log) {
			t.Fatalf("took %d of %d bytes without error", dw.Position(), len(log))
		}
		for _, asJSON := range []bool{false, true} {
			_ = WriteDump(io.Discard, bytes.NewReader(log), l, DumpOptions{JSON: asJSON})
		}
	})
}
