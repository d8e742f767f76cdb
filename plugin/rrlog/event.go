// SPDX-License-Identifier: Apache-2.0

package rrlog

import (
	"encoding/binary"

	"ftvirt.org/ftvirt/plugin"
)

// Event is one whole event of the log.
type Event struct {
	// Position is where the event's code is.
	Position plugin.Position
	// Length counts all of its bytes, the code included.
	Length uint64
	// Kind is what it is, Code how this QEMU's log spells it. For SHUTDOWN the
	// code also tells the cause; see [Layout.CauseName].
	Kind Kind
	Code byte
	// Instructions is the number of instructions to execute before the next
	// event; nonzero for INSTRUCTION only.
	Instructions uint32
	// Icount is the number of instructions logged so far, this event included.
	Icount uint64
	// DataLength counts the bytes of variable data, which are not kept.
	DataLength uint64

	fixed    [maxFixed]byte
	fixedLen int
}

// End is the position after the event's last byte.
func (e *Event) End() plugin.Position { return e.Position + plugin.Position(e.Length) }

// Fixed gives the payload up to variable data, big-endian as logged; FORMAT.md
// has the offsets. It is valid as long as the event is.
func (e *Event) Fixed() []byte { return e.fixed[:e.fixedLen] }

// Detail is a named value of an event's payload.
type Detail struct {
	Name  string
	Value any
}

// Details names what the payload holds, in the order of the log. It is for
// people and allocates.
func (e *Event) Details(l Layout) []Detail {
	u32 := func(at int) uint32 { return binary.BigEndian.Uint32(e.fixed[at:]) }
	u64 := func(at int) uint64 { return binary.BigEndian.Uint64(e.fixed[at:]) }
	switch e.Kind {
	case KindInstruction:
		return []Detail{{"count", u32(0)}}
	case KindBH, KindBHOneshot, KindBlock:
		return []Detail{{"id", u64(0)}}
	case KindInput:
		return e.inputDetails()
	case KindCharRead:
		return []Detail{{"device", e.fixed[0]}, {"length", u32(1)}}
	case KindNet:
		return []Detail{{"filter", e.fixed[0]}, {"flags", u32(1)}, {"length", u32(5)}}
	case KindShutdown:
		return []Detail{{"cause", l.CauseName(e.Code)}}
	case KindCharWrite:
		return []Detail{{"result", int32(u32(0))}, {"offset", int32(u32(4))}}
	case KindCharReadAll:
		return []Detail{{"length", u32(0)}}
	case KindCharReadAllError:
		return []Detail{{"error", int32(u32(0))}}
	case KindAudioOut:
		return []Detail{{"played", u64(0)}}
	case KindAudioIn:
		return []Detail{{"recorded", u64(0)}, {"wpos", u64(8)}}
	case KindRandom:
		return []Detail{{"result", int32(u32(0))}, {"length", u32(4)}}
	case KindClockHost, KindClockVirtualRT:
		return []Detail{{"ns", int64(u64(0))}}
	default:
		return nil
	}
}

func (e *Event) inputDetails() []Detail {
	u32 := func(at int) uint32 { return binary.BigEndian.Uint32(e.fixed[at:]) }
	i64 := func(at int) int64 { return int64(binary.BigEndian.Uint64(e.fixed[at:])) }
	switch u32(0) {
	case inputKey:
		if u32(4) == keyNumber {
			return []Detail{{"type", "key"}, {"number", i64(8)}, {"down", e.fixed[16] != 0}}
		}
		return []Detail{{"type", "key"}, {"qcode", u32(8)}, {"down", e.fixed[12] != 0}}
	case inputBtn:
		return []Detail{{"type", "btn"}, {"button", u32(4)}, {"down", e.fixed[8] != 0}}
	case inputRel:
		return []Detail{{"type", "rel"}, {"axis", u32(4)}, {"value", i64(8)}}
	case inputAbs:
		return []Detail{{"type", "abs"}, {"axis", u32(4)}, {"value", i64(8)}}
	default:
		return []Detail{
			{"type", "mtt"}, {"touch", u32(4)}, {"slot", i64(8)}, {"tracking", i64(16)},
			{"axis", u32(24)}, {"value", i64(28)},
		}
	}
}
