// SPDX-License-Identifier: Apache-2.0

package checkpoint

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/klauspost/compress/s2"
)

const (
	magic      = "FTCK"
	version    = 1
	headerSize = 24

	flagRunning = 1
	flagFresh   = 2
)

// How a page, or a piece of device state, is told.
const (
	asZero  = 0 // all zeros
	asIs    = 1 // the bytes
	asDelta = 2 // length, what changed since it was told last
	asS2    = 3 // length, a block of S2
)

// longEnough is how long a delta may be before another form is tried.
const longEnough = PageSize / 2

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Encoder makes records of what a primary's plugin stages. It is for one
// goroutine.
type Encoder struct {
	stage  []byte
	layout Layout
	blocks []int // of the layout, as the backup numbers them
	memory memory
	device []byte // the last state of devices
	fresh  bool
	packed []byte
}

// NewEncoder makes one for a primary's staging, and a backup whose memory is as
// the other layout says.
func NewEncoder(stage []byte, layout, backup Layout) (*Encoder, error) {
	if err := layout.Validate(len(stage)); err != nil {
		return nil, err
	}
	blocks, err := Map(layout, backup)
	if err != nil {
		return nil, err
	}
	e := &Encoder{stage: stage, layout: layout, blocks: blocks}
	e.Forget()
	return e, nil
}

// Forget makes the next record refer to nothing of before.
func (e *Encoder) Forget() {
	e.memory.reset()
	e.device, e.fresh = e.device[:0], true
}

// Append appends the record of what is staged. Of h, Fresh is not read. The
// staging may be in the hands of a hostile guest's QEMU: what is not a page of the
// guest is an error.
func (e *Encoder) Append(b []byte, h Header) ([]byte, error) {
	if uint64(h.Device) > e.layout.room() || uint64(h.Pages) > e.layout.total() {
		return b, fmt.Errorf("%w: %d pages, %d bytes of device state", ErrLayout, h.Pages, h.Device)
	}
	h.Fresh = e.fresh
	b = appendHeader(b, h)
	var crc uint32
	from := e.stage[e.layout.Pages:]
	table := e.stage[e.layout.Table:]
	last := ^uint64(0)
	for i := range uint64(h.Pages) {
		entry := binary.NativeEndian.Uint64(table[8*i:])
		block, page := entry>>entryBlock, entry&entryPage
		if block >= uint64(len(e.blocks)) || page >= e.layout.Blocks[block].Pages {
			return b, fmt.Errorf("%w: block %d has no page %d", ErrLayout, block, page)
		}
		at := uint64(e.blocks[block])<<entryBlock | page
		b = binary.AppendUvarint(b, zigzag(at-last-1))
		last = at
		var now []byte
		if entry&entryZero == 0 {
			if len(from) < PageSize {
				return b, fmt.Errorf("%w: more pages than it has room for", ErrLayout)
			}
			now, from = from[:PageSize], from[PageSize:]
			if isZero(now) {
				now = nil
			}
		}
		b = e.page(b, at, now, h.Kind == Complete)
		crc = checksum(crc, at, now)
	}
	device := e.stage[e.layout.Device:][:h.Device]
	b = e.state(b, device)
	crc = crc32.Update(crc, castagnoli, device)
	e.fresh = false
	return binary.BigEndian.AppendUint32(b, crc), nil
}

// checksum covers where a page is and what it holds.
func checksum(crc uint32, at uint64, page []byte) uint32 {
	var where [8]byte
	binary.BigEndian.PutUint64(where[:], at)
	return crc32.Update(crc32.Update(crc, castagnoli, where[:]), castagnoli, page)
}

// page appends one, nil for zeros. Those of rounds are not remembered: most do not
// change again soon.
func (e *Encoder) page(b []byte, at uint64, now []byte, remember bool) []byte {
	if now == nil {
		e.memory.told(at, nil, false)
		return append(b, asZero)
	}
	if before := e.memory.known(at); before != nil {
		var short bool
		if e.packed, short = appendDelta(e.packed[:0], before, now, longEnough); short {
			e.memory.told(at, now, true)
			b = append(b, asDelta)
			b = binary.AppendUvarint(b, uint64(len(e.packed)))
			return append(b, e.packed...)
		}
	}
	e.memory.told(at, now, remember)
	return e.pack(b, now)
}

// pack appends bytes as they are, or packed where that is shorter.
func (e *Encoder) pack(b, now []byte) []byte {
	if n := s2.MaxEncodedLen(len(now)); cap(e.packed) < n {
		e.packed = make([]byte, 0, n)
	}
	packed := s2.Encode(e.packed[:cap(e.packed)], now)
	if len(packed) < len(now)*7/8 {
		b = append(b, asS2)
		b = binary.AppendUvarint(b, uint64(len(packed)))
		return append(b, packed...)
	}
	return append(append(b, asIs), now...)
}

// state appends the state of devices, in pieces of a page; of each what changed, if
// the last state was as long up to there.
func (e *Encoder) state(b, now []byte) []byte {
	for at := 0; at < len(now); at += PageSize {
		piece := now[at:min(at+PageSize, len(now))]
		if at+len(piece) <= len(e.device) && len(piece)%word == 0 {
			var short bool
			if e.packed, short = appendDelta(e.packed[:0], e.device[at:at+len(piece)], piece, longEnough); short {
				b = append(b, asDelta)
				b = binary.AppendUvarint(b, uint64(len(e.packed)))
				b = append(b, e.packed...)
				continue
			}
		}
		if isZero(piece) {
			b = append(b, asZero)
		} else {
			b = e.pack(b, piece)
		}
	}
	if len(now) > 0 {
		e.device = append(e.device[:0], now...)
	}
	return b
}

func appendHeader(b []byte, h Header) []byte {
	var flags byte
	if h.Running {
		flags |= flagRunning
	}
	if h.Fresh {
		flags |= flagFresh
	}
	b = append(b, magic...)
	b = append(b, version, byte(h.Kind), flags, 0)
	b = binary.BigEndian.AppendUint64(b, h.Number)
	b = binary.BigEndian.AppendUint32(b, h.Pages)
	return binary.BigEndian.AppendUint32(b, h.Device)
}

func isZero(b []byte) bool {
	for ; len(b) >= word; b = b[word:] {
		if binary.NativeEndian.Uint64(b) != 0 {
			return false
		}
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// zigzag makes small numbers of small steps in both directions.
func zigzag(step uint64) uint64 { return step<<1 ^ uint64(int64(step)>>63) }

func unzigzag(v uint64) uint64 { return v>>1 ^ -(v & 1) }
