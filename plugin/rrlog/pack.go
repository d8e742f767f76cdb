// SPDX-License-Identifier: Apache-2.0

package rrlog

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/bits"
)

// ErrPacked: the bytes are not what a [Packer] made, or not the next ones.
var ErrPacked = errors.New("packed event log is damaged")

// PackOverhead is by how much a packed piece can be longer than the piece.
const PackOverhead = 1 + 4 + 2*binary.MaxVarintLen32 + packSlack

// packSlack is by how much a piece may grow before it is stored: to forget what
// was learnt would cost more.
const packSlack = 32

// The flags of a packed piece.
const (
	// packFresh: what was learnt before is forgotten.
	packFresh = 1 << iota
	// packStored: the bytes follow as they are.
	packStored

	packFlags = packFresh | packStored
)

// The model of events. Tokens are the codes of events, but for literal, which
// stands for bytes that are no whole event of a form that is known.
const (
	tokenBits = 6
	literal   = 1<<tokenBits - 1
	// The next token is guessed from the last three, the size of a number from the
	// last two and which number of its event it is, its first bits from that size,
	// the last token and which number it is. These are the bits of the hashes.
	historyBits  = 10
	sizeBits     = 8
	mantissaBits = 5
	// leading is how many bits below the highest of a number are learnt.
	leading = 3
)

var packTable = crc32.MakeTable(crc32.Castagnoli)

// packLayout tells where events begin. Those of another QEMU are packed as well,
// but not as tight.
var packLayout = func() Layout {
	l, err := LayoutFor(newestMajor, 0)
	if err != nil {
		panic(err) // a constant
	}
	return l
}()

// model is what a Packer and an Unpacker learn alike.
type model struct {
	history  uint32 // the last tokens
	token    [1 << historyBits][1 << tokenBits]probability
	size     [1 << sizeBits][128]probability
	mantissa [1 << mantissaBits][65][1 << leading]probability
	last     [1 << tokenBits]uint64 // of each code, the last clock or id
}

func (m *model) reset() {
	even := probability{evenly, evenly}
	m.history = 0
	for i := range m.token {
		for j := range m.token[i] {
			m.token[i][j] = even
		}
	}
	for i := range m.size {
		for j := range m.size[i] {
			m.size[i][j] = even
		}
	}
	for i := range m.mantissa {
		for j := range m.mantissa[i] {
			for k := range m.mantissa[i][j] {
				m.mantissa[i][j][k] = even
			}
		}
	}
	clear(m.last[:])
}

// hash spreads what a guess depends on.
func hash(v uint32, size int) uint32 { return v * 2654435761 >> (32 - size) }

// codeToken codes or decodes a token.
func (m *model) codeToken(c *coder, token int) int {
	p := &m.token[hash(m.history&(1<<(3*tokenBits)-1), historyBits)]
	node := 1
	for i := tokenBits - 1; i > 0; i-- {
		node = node<<1 | c.bit(&p[node], token>>i&1)
	}
	node = node<<1 | c.bit(&p[node], token&1)
	token = node & (1<<tokenBits - 1)
	m.history = m.history<<tokenBits | uint32(token)
	return token
}

// codeNumber codes or decodes a number of the event whose token was last.
func (m *model) codeNumber(c *coder, field int, v uint64) uint64 {
	p := &m.size[hash(m.history&(1<<(2*tokenBits)-1)<<2|uint32(field), sizeBits)]
	size := bits.Len64(v)
	node := 1
	for i := 6; i >= 0; i-- {
		node = node<<1 | c.bit(&p[node&127], size>>i&1)
	}
	size = min(node&127, 64)
	if size < 2 {
		return uint64(size)
	}
	q := &m.mantissa[hash(m.history&(1<<tokenBits-1)<<2|uint32(field), mantissaBits)][size]
	got, node := uint64(1), 1
	for i := size - 2; i >= 0; i-- {
		bit := int(v >> i & 1)
		if node < 1<<leading {
			bit = c.bit(&q[node], bit)
			node = node<<1 | bit
		} else {
			bit = c.even(bit)
		}
		got = got<<1 | uint64(bit)
	}
	return got
}

// codeDelta codes or decodes a number by how it differs from the last of its
// kind.
func (m *model) codeDelta(c *coder, token int, v uint64) uint64 {
	d := v - m.last[token]
	z := m.codeNumber(c, 0, d<<1^uint64(int64(d)>>63))
	v = m.last[token] + (z>>1 ^ -(z & 1))
	m.last[token] = v
	return v
}

// number codes or decodes the number that is size bytes at p, big-endian.
func (m *model) number(c *coder, field int, p []byte, size int) uint64 {
	var v uint64
	for _, b := range p[:size] {
		v = v<<8 | uint64(b)
	}
	v = m.codeNumber(c, field, v)
	for i := range size {
		p[i] = byte(v >> (8 * (size - 1 - i)))
	}
	return v
}

// delta is number for 8 bytes that follow the last of their kind.
func (m *model) delta(c *coder, token int, p []byte) {
	v := m.codeDelta(c, token, binary.BigEndian.Uint64(p))
	binary.BigEndian.PutUint64(p, v)
}

// known tells whether events of a kind have a token of their own.
func known(k Kind) bool {
	switch k {
	case KindInstruction, KindBH, KindBHOneshot, KindBlock, KindNet, KindCharWrite, KindClockHost, KindClockVirtualRT:
		return true
	default:
		return spec[k].fixed == 0 && spec[k].shape == shapeFixed
	}
}

// event codes or decodes the fixed part of an event of a known kind, but for its
// code; it returns how much data follow it.
func (m *model) event(c *coder, k Kind, token int, fixed []byte) uint64 {
	switch k {
	case KindInstruction:
		m.number(c, 0, fixed, 4)
	case KindBH, KindBHOneshot, KindBlock, KindClockHost, KindClockVirtualRT:
		m.delta(c, token, fixed)
	case KindCharWrite:
		m.number(c, 0, fixed, 4)
		m.number(c, 1, fixed[4:], 4)
	case KindNet:
		m.number(c, 0, fixed, 1)
		m.number(c, 1, fixed[1:], 4)
		return m.number(c, 2, fixed[5:], 4)
	}
	return 0
}

// Packer makes a log smaller, piece by piece, for an [Unpacker] that gets the
// pieces in order, as PACKED.md specifies: what comes next is guessed from what came before, event by
// event, and coded in the fewer bits the better it was guessed. Data of packets
// and the like stay as they are. It packs any bytes, also if they are no log. It
// is for one goroutine at a time.
type Packer struct {
	m     model
	dec   *Decoder
	fresh bool
	raw   []byte
	coded []byte
	fixed [maxFixed]byte
}

// NewPacker makes one whose first byte is expected to begin an event.
func NewPacker() *Packer {
	p := &Packer{}
	p.Reset()
	return p
}

// Reset lets the next piece depend on none of those before, some of which may
// not arrive.
func (p *Packer) Reset() {
	p.fresh = true
	p.dec = NewDecoder(packLayout)
}

// Pack appends a piece of the log to dst, packed. It takes at most
// [PackOverhead] bytes more than the piece.
func (p *Packer) Pack(dst, piece []byte) []byte {
	flags := byte(0)
	if p.fresh {
		p.m.reset()
		p.fresh, flags = false, packFresh
	}
	c := startCoder(p.coded[:0])
	p.raw = p.raw[:0]
	for rest := piece; len(rest) > 0; {
		inside := p.dec.Trailing() > 0
		n, ev, err := p.dec.step(rest)
		if err != nil {
			n = len(rest) // and so for all that follows
		}
		token := int(rest[0])
		if inside || err != nil || ev == nil || !known(ev.Kind) || token >= literal {
			p.m.codeToken(&c, literal)
			p.m.codeNumber(&c, 0, uint64(n))
			p.raw = append(p.raw, rest[:n]...)
		} else {
			p.m.codeToken(&c, token)
			fixed := 1 + int(spec[ev.Kind].fixed)
			copy(p.fixed[:], rest[1:fixed])
			p.m.event(&c, ev.Kind, token, p.fixed[:])
			p.raw = append(p.raw, rest[fixed:n]...)
		}
		rest = rest[n:]
	}
	p.coded = c.finish()
	if len(p.raw)+len(p.coded) > len(piece)+packSlack {
		// The other side does not learn what was learnt here.
		flags |= packStored
		p.raw, p.coded, p.fresh = append(p.raw[:0], piece...), p.coded[:0], true
	}
	dst = append(dst, flags)
	dst = binary.BigEndian.AppendUint32(dst, crc32.Checksum(piece, packTable))
	dst = binary.AppendUvarint(dst, uint64(len(piece)))
	dst = binary.AppendUvarint(dst, uint64(len(p.raw)))
	dst = append(dst, p.raw...)
	return append(dst, p.coded...)
}

// Unpacker undoes what a [Packer] did. It is for one goroutine at a time.
type Unpacker struct {
	m     model
	begun bool
}

// NewUnpacker makes one for the pieces of a new Packer.
func NewUnpacker() *Unpacker { return &Unpacker{} }

// Unpack appends a piece to dst. It returns [ErrPacked] if that is none, or of
// more than limit bytes; the Unpacker is then of no more use.
func (u *Unpacker) Unpack(dst, packed []byte, limit int) ([]byte, error) {
	if len(packed) < 1+4 || packed[0]&^packFlags != 0 {
		return dst, ErrPacked
	}
	flags, sum := packed[0], binary.BigEndian.Uint32(packed[1:])
	size, n := binary.Uvarint(packed[5:])
	if n <= 0 || size > uint64(limit) {
		return dst, ErrPacked
	}
	packed = packed[5+n:]
	length, n := binary.Uvarint(packed)
	if n <= 0 || length > uint64(len(packed)-n) {
		return dst, ErrPacked
	}
	raw, coded := packed[n:n+int(length)], packed[n+int(length):]
	if flags&packFresh != 0 {
		u.m.reset()
		u.begun = true
	}
	from := len(dst)
	switch {
	case flags&packStored != 0:
		dst = append(dst, raw...)
		u.begun = false
		raw = nil
	case !u.begun:
		return dst, ErrPacked
	default:
		dst, raw = u.decode(dst, raw, coded, int(size))
	}
	if len(dst)-from != int(size) || len(raw) > 0 || crc32.Checksum(dst[from:], packTable) != sum {
		return dst[:from], ErrPacked
	}
	return dst, nil
}

// decode appends size bytes at most, and returns what it did not use of raw. It
// stops at what no Packer makes.
func (u *Unpacker) decode(dst, raw, coded []byte, size int) ([]byte, []byte) {
	c := startDecoder(coded)
	var fixed [maxFixed]byte
	for size > 0 {
		token := u.m.codeToken(&c, 0)
		var data uint64
		if token == literal {
			data = u.m.codeNumber(&c, 0, 0)
		} else {
			kind, ok := packLayout.Kind(byte(token))
			if !ok || !known(kind) {
				break
			}
			clear(fixed[:])
			data = u.m.event(&c, kind, token, fixed[:])
			length := 1 + int(spec[kind].fixed)
			if length > size {
				break
			}
			dst = append(append(dst, byte(token)), fixed[:length-1]...)
			size -= length
		}
		// A literal of nothing would go on for ever.
		if data > uint64(len(raw)) || data > uint64(size) || token == literal && data == 0 {
			break
		}
		dst = append(dst, raw[:data]...)
		raw, size = raw[data:], size-int(data)
	}
	return dst, raw
}
