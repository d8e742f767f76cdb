// SPDX-License-Identifier: Apache-2.0

package checkpoint

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/klauspost/compress/s2"
)

// Decoder stages records for a backup's plugin. Its input is not trusted: it writes
// inside the staging only, and only pages that the guest has. It is for one
// goroutine.
type Decoder struct {
	stage  []byte
	layout Layout
	total  uint64
	memory memory
	device []byte

	buf    []byte // of an item that is not whole yet
	header *Header
	newest uint64 // number of the last whole checkpoint
	begun  bool   // a record was seen
	pages  uint64 // done of the record
	room   uint64 // of these with room among the staged pages
	state  int    // bytes of device state done
	last   uint64
	crc    uint32
	err    error
}

// NewDecoder makes one for a backup's staging. Its first record must be fresh.
func NewDecoder(stage []byte, layout Layout) (*Decoder, error) {
	if err := layout.Validate(len(stage)); err != nil {
		return nil, err
	}
	d := &Decoder{stage: stage, layout: layout, total: layout.total()}
	d.memory.reset()
	return d, nil
}

// Resume tells a decoder that has seen nothing which checkpoint its backup holds.
func (d *Decoder) Resume(newest uint64) { d.newest = newest }

// errShort: an item is not whole yet.
var errShort = errors.New("more is needed")

// Feed takes bytes of the stream, cut anywhere, up to the end of a record at most.
// It returns how many it took, and the header of the record that ended there, nil
// if it needs more. What lies in the staging then is the caller's until the next
// Feed. After an error it takes no more.
func (d *Decoder) Feed(p []byte) (taken int, whole *Header, err error) {
	if d.err != nil {
		return 0, nil, d.err
	}
	had := len(d.buf)
	in := p
	if had > 0 {
		d.buf = append(d.buf, p...)
		in = d.buf
	}
	at := 0
	for {
		n, end, err := d.item(in[at:])
		if errors.Is(err, errShort) {
			break
		}
		if err != nil {
			d.err = err
			return 0, nil, err
		}
		at += n
		if end {
			h := *d.header
			d.header = nil
			d.buf = d.buf[:0]
			return at - had, &h, nil
		}
	}
	d.buf = append(d.buf[:0], in[at:]...)
	return len(p), nil, nil
}

// item takes the next one of a record: its header, a page, a piece of device
// state, or the checksum.
func (d *Decoder) item(p []byte) (n int, end bool, err error) {
	switch {
	case d.header == nil:
		n, err = d.begin(p)
	case d.pages < uint64(d.header.Pages):
		n, err = d.page(p)
	case d.state < int(d.header.Device):
		n, err = d.piece(p)
	case len(p) < 4:
		err = errShort
	default:
		if got := binary.BigEndian.Uint32(p); got != d.crc {
			return 0, false, d.damaged("checksum %#x, not %#x", got, d.crc)
		}
		n, end = 4, true
		if d.header.Kind == Complete {
			d.newest = d.header.Number
		}
	}
	return n, end, err
}

func (d *Decoder) damaged(format string, args ...any) error {
	return fmt.Errorf("%w: after checkpoint %d, page %d: %s", ErrDamaged, d.newest, d.pages, fmt.Sprintf(format, args...))
}

func (d *Decoder) begin(p []byte) (int, error) {
	if len(p) < headerSize {
		return 0, errShort
	}
	h := &Header{
		Kind: Kind(p[5]), Number: binary.BigEndian.Uint64(p[8:]), Running: p[6]&flagRunning != 0, Fresh: p[6]&flagFresh != 0,
		Pages: binary.BigEndian.Uint32(p[16:]), Device: binary.BigEndian.Uint32(p[20:]),
	}
	if string(p[:4]) != magic || p[4] != version || p[6]&^(flagRunning|flagFresh) != 0 || p[7] != 0 {
		return 0, d.damaged("no record")
	}
	if uint64(h.Pages) > d.total || uint64(h.Device) > d.layout.room() {
		return 0, d.damaged("%d pages, %d bytes of device state", h.Pages, h.Device)
	}
	switch {
	case h.Kind == Round && h.Number == 0 && h.Device == 0 && d.newest == 0:
	case h.Kind == Complete && h.Number == d.newest+1 && h.Device > 0:
	default:
		return 0, fmt.Errorf("%w: kind %d, number %d after %d", ErrOrder, h.Kind, h.Number, d.newest)
	}
	if !d.begun && !h.Fresh {
		return 0, d.damaged("it refers to what was before")
	}
	if h.Fresh {
		d.memory.reset()
		d.device = d.device[:0]
	}
	d.begun = true
	d.header, d.pages, d.room, d.state, d.last, d.crc = h, 0, 0, 0, ^uint64(0), 0
	return headerSize, nil
}

// form reads how size bytes are told, and those, for which it has the reference
// known. It may write to into.
func (d *Decoder) form(p, into, known []byte) (n int, zero bool, err error) {
	if len(p) == 0 {
		return 0, false, errShort
	}
	how := p[0]
	n = 1
	var length uint64
	switch how {
	case asZero:
		return n, true, nil
	case asIs:
		length = uint64(len(into))
	case asDelta, asS2:
		v, m := binary.Uvarint(p[n:])
		if m == 0 && len(p)-n < binary.MaxVarintLen64 {
			return 0, false, errShort
		}
		if m <= 0 || v > uint64(len(into)) {
			return 0, false, d.damaged("a length of %d", v)
		}
		n += m
		length = v
	default:
		return 0, false, d.damaged("form %d", how)
	}
	if uint64(len(p)-n) < length {
		return 0, false, errShort
	}
	body := p[n : n+int(length)]
	n += int(length)
	switch how {
	case asIs:
		copy(into, body)
	case asDelta:
		if known == nil {
			return 0, false, d.damaged("it refers to what is not known")
		}
		copy(into, known)
		if !applyDelta(into, body) {
			return 0, false, d.damaged("no change of %d bytes", len(into))
		}
	case asS2:
		if size, err := s2.DecodedLen(body); err != nil || size != len(into) {
			return 0, false, d.damaged("no block of %d bytes", len(into))
		}
		if _, err := s2.Decode(into, body); err != nil {
			return 0, false, d.damaged("%v", err)
		}
	}
	return n, false, nil
}

func (d *Decoder) page(p []byte) (int, error) {
	step, n := binary.Uvarint(p)
	if n == 0 && len(p) < binary.MaxVarintLen64 {
		return 0, errShort
	}
	if n <= 0 {
		return 0, d.damaged("no step")
	}
	at := d.last + 1 + unzigzag(step)
	block, page := at>>entryBlock, at&entryPage
	if at&entryZero != 0 || block >= uint64(len(d.layout.Blocks)) || page >= d.layout.Blocks[block].Pages {
		return 0, d.damaged("block %d has no page %d", block, page)
	}
	into := d.stage[d.layout.Pages+d.room*PageSize:][:PageSize:PageSize]
	m, zero, err := d.form(p[n:], into, d.memory.known(at))
	if err != nil {
		return 0, err
	}
	entry := at
	var now []byte
	if zero {
		entry |= entryZero
	} else {
		now = into
		d.room++
	}
	d.memory.told(at, now, !zero && (p[n] == asDelta || d.header.Kind == Complete))
	binary.NativeEndian.PutUint64(d.stage[d.layout.Table+8*d.pages:], entry)
	d.crc = checksum(d.crc, at, now)
	d.last = at
	d.pages++
	return n + m, nil
}

func (d *Decoder) piece(p []byte) (int, error) {
	size := min(PageSize, int(d.header.Device)-d.state)
	into := d.stage[d.layout.Device+uint64(d.state):][:size:size]
	var known []byte
	if d.state+size <= len(d.device) && size%word == 0 {
		known = d.device[d.state : d.state+size]
	}
	n, zero, err := d.form(p, into, known)
	if err != nil {
		return 0, err
	}
	if zero {
		clear(into)
	}
	d.crc = crc32.Update(d.crc, castagnoli, into)
	d.state += size
	if d.state == int(d.header.Device) {
		d.device = append(d.device[:0], d.stage[d.layout.Device:][:d.state]...)
	}
	return n, nil
}
