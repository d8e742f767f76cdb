// SPDX-License-Identifier: Apache-2.0

package rrlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"testing"
)

// packAll packs a log in pieces as the lengths say, and unpacks it; it returns
// how many bytes were sent.
func packAll(t *testing.T, log []byte, length func() int) int {
	t.Helper()
	p, u := NewPacker(), NewUnpacker()
	sent := 0
	for rest := log; len(rest) > 0; {
		n := min(length(), len(rest))
		packed := p.Pack(nil, rest[:n])
		if len(packed) > n+PackOverhead {
			t.Fatalf("%d bytes became %d", n, len(packed))
		}
		got, err := u.Unpack([]byte("x"), packed, n)
		if err != nil || got[0] != 'x' || !bytes.Equal(got[1:], rest[:n]) {
			t.Fatalf("at %d of %d: %d bytes came back as %d: %v", len(log)-len(rest), len(log), n, len(got)-1, err)
		}
		sent += len(packed)
		rest = rest[n:]
	}
	return sent
}

// idleLog is like that of a guest that mostly waits.
func idleLog(turns int) []byte {
	r := rand.New(rand.NewPCG(1, 2))
	var b []byte
	now := uint64(5_000_000_000)
	clock := func(d uint64) {
		now += d
		b = binary.BigEndian.AppendUint64(append(b, 29), now)
	}
	for i := range turns {
		b = append(b, 30)
		clock(1_000_000 + r.Uint64N(1_000_000))
		b = append(b, 36)
		clock(500 + r.Uint64N(500))
		clock(500 + r.Uint64N(500))
		if i%4 == 0 {
			b = append(b, 31, 34, 31, 1)
			b = binary.BigEndian.AppendUint32(append(b, 0), 1000+r.Uint32N(4000))
			b = append(b, 31)
		}
		if i%16 == 0 {
			b = append(b, 9, 0, 0, 0, 0, 0, 0, 0, 0, 64)
			b = append(b, bytes.Repeat([]byte{byte(i), 7}, 32)...)
		}
	}
	return b
}

func TestPack(t *testing.T) {
	log := idleLog(2000)
	r := rand.New(rand.NewPCG(3, 4))
	noise := make([]byte, 20000)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	for _, c := range []struct {
		name   string
		log    []byte
		length func() int
	}{
		{"whole", log, func() int { return len(log) }},
		{"bytes", log[:5000], func() int { return 1 }},
		{"cut anywhere", log, func() int { return 1 + r.IntN(200) }},
		{"noise", noise, func() int { return 1 + r.IntN(2000) }},
		{"log, noise, log", append(append(log[:len(log):len(log)], noise...), log...), func() int { return 1 + r.IntN(300) }},
	} {
		t.Run(c.name, func(t *testing.T) { packAll(t, c.log, c.length) })
	}
	// Pieces of about the size of what a millisecond logs.
	if sent := packAll(t, log, func() int { return 87 }); sent > len(log)/2 {
		t.Errorf("%d bytes of an idle guest's log were packed into %d only", len(log), sent)
	}
}

// TestPackFormat: whoever changes how the log is packed changes the version of
// the channel's protocol.
func TestPackFormat(t *testing.T) {
	p := NewPacker()
	h := crc32.NewIEEE()
	for _, piece := range [][]byte{idleLog(50), {22, 0, 0, 0, 1, 0, 0}, {0, 9, 200}, idleLog(2)} {
		_, _ = h.Write(p.Pack(nil, piece))
	}
	if got := h.Sum32(); got != 0x668408ce {
		t.Errorf("what is packed has the checksum %#x", got)
	}
}

// TestPackReset: after a piece was lost, the next are understood.
func TestPackReset(t *testing.T) {
	log := idleLog(10)
	p, u := NewPacker(), NewUnpacker()
	p.Pack(nil, log)
	p.Reset()
	if got, err := u.Unpack(nil, p.Pack(nil, log), len(log)); err != nil || !bytes.Equal(got, log) {
		t.Fatalf("a first piece after Reset: %v", err)
	}
}

func TestUnpackDamaged(t *testing.T) {
	log := idleLog(20)
	good := NewPacker().Pack(nil, log)
	for at := range good {
		bad := bytes.Clone(good)
		bad[at] ^= 1 << (at % 8)
		got, err := NewUnpacker().Unpack(nil, bad, len(log))
		if !errors.Is(err, ErrPacked) && !bytes.Equal(got, log) {
			t.Fatalf("bit %d of byte %d: another log came out, %v", at%8, at, err)
		}
	}
	p := NewPacker()
	p.Pack(nil, log)
	for name, packed := range map[string][]byte{
		"nothing": {}, "cut": good[:len(good)/2], "no first piece": p.Pack(nil, log), "unknown flag": append([]byte{8}, good[1:]...),
	} {
		if _, err := NewUnpacker().Unpack(nil, packed, len(log)); !errors.Is(err, ErrPacked) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := NewUnpacker().Unpack(nil, good, len(log)-1); !errors.Is(err, ErrPacked) {
		t.Errorf("a piece over the limit: %v", err)
	}
}

// BenchmarkPack tells what an idle guest's log becomes, in pieces of a few turns
// of its main loop.
func BenchmarkPack(b *testing.B) {
	const piece = 128
	log := idleLog(2000)
	p := NewPacker()
	var packed []byte
	in, out, at := 0, 0, 0
	b.SetBytes(piece)
	for b.Loop() {
		if at+piece > len(log) {
			at = 0
			p.Reset()
		}
		packed = p.Pack(packed[:0], log[at:at+piece])
		in, out, at = in+piece, out+len(packed), at+piece
	}
	b.ReportMetric(float64(out)/float64(in), "packed/raw")
}

// FuzzPack: any bytes, cut anywhere, come back.
func FuzzPack(f *testing.F) {
	f.Add(idleLog(3), uint8(40))
	f.Add([]byte{0, 0, 0, 0, 1, 39, 200}, uint8(3))
	f.Fuzz(func(t *testing.T, log []byte, n uint8) {
		packAll(t, log, func() int { return int(n) + 1 })
	})
}

// FuzzUnpack: no bytes make it panic, go on for ever, or exceed the limit.
func FuzzUnpack(f *testing.F) {
	f.Add(NewPacker().Pack(nil, idleLog(3)))
	f.Fuzz(func(t *testing.T, packed []byte) {
		got, err := NewUnpacker().Unpack(nil, packed, 1<<16)
		if len(got) > 1<<16 || err != nil && len(got) > 0 {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
	})
}
