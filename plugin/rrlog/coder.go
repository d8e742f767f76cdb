// SPDX-License-Identifier: Apache-2.0

package rrlog

// probability is that of a bit being 1, learnt at two speeds: one follows what
// changes, the other is exact about what does not. In 1/65536.
type probability struct{ fast, slow uint16 }

const (
	fastShift, slowShift = 4, 7
	evenly               = 1 << 15
)

// one gives the probability of 1, never certain either way, in 1/4096.
func (p *probability) one() uint32 {
	return min(max((uint32(p.fast)+uint32(p.slow))>>5, 1), 4095)
}

func (p *probability) learn(bit int) {
	if bit == 1 {
		p.fast += (65535 - p.fast) >> fastShift
		p.slow += (65535 - p.slow) >> slowShift
	} else {
		p.fast -= p.fast >> fastShift
		p.slow -= p.slow >> slowShift
	}
}

// coder is a binary arithmetic coder, which codes or decodes: both do the same
// with each probability, so that they cannot learn different things. Between low
// and high are the numbers that the bits so far leave.
type coder struct {
	low, high uint32

	decoding bool
	out      []byte // coded so far
	in       []byte // still to be decoded
	value    uint32 // the next four bytes of it; behind its end are zeros
}

func startCoder(out []byte) coder { return coder{high: 1<<32 - 1, out: out} }

func startDecoder(in []byte) coder {
	c := coder{high: 1<<32 - 1, decoding: true, in: in}
	for range 4 {
		c.value = c.value<<8 | c.next()
	}
	return c
}

func (c *coder) next() uint32 {
	if len(c.in) == 0 {
		return 0
	}
	b := c.in[0]
	c.in = c.in[1:]
	return uint32(b)
}

// bit codes a bit, or decodes one and ignores the argument.
func (c *coder) bit(p *probability, bit int) int {
	middle := c.low + uint32(uint64(c.high-c.low)*uint64(p.one())>>12)
	if c.decoding {
		bit = 0
		if c.value <= middle {
			bit = 1
		}
	}
	p.learn(bit)
	c.narrow(middle, bit)
	return bit
}

// even is bit for one of which nothing can be learnt.
func (c *coder) even(bit int) int {
	middle := c.low + (c.high-c.low)>>1
	if c.decoding {
		bit = 0
		if c.value <= middle {
			bit = 1
		}
	}
	c.narrow(middle, bit)
	return bit
}

func (c *coder) narrow(middle uint32, bit int) {
	if bit == 1 {
		c.high = middle
	} else {
		c.low = middle + 1
	}
	for (c.low^c.high)>>24 == 0 {
		if c.decoding {
			c.value = c.value<<8 | c.next()
		} else {
			c.out = append(c.out, byte(c.high>>24))
		}
		c.low <<= 8
		c.high = c.high<<8 | 0xff
	}
}

// finish gives the coded bytes: as few more as tell what is between low and
// high, given that zeros follow.
func (c *coder) finish() []byte {
	for n := range 5 {
		keep := ^uint32(0) << (32 - 8*n) // shifts by 32 give 0
		v := uint64(c.low) + uint64(^keep)
		v &= uint64(keep)
		if v >= uint64(c.low) && v <= uint64(c.high) {
			for i := range n {
				c.out = append(c.out, byte(v>>(24-8*i)))
			}
			break
		}
	}
	return c.out
}
