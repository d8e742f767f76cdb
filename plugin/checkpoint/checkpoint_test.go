// SPDX-License-Identifier: Apache-2.0

package checkpoint

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"
)

// testLayout is a staging for a guest of 40 pages in two blocks.
func testLayout(names ...string) Layout {
	l := Layout{Table: PageSize, Device: 2 * PageSize}
	l.Pages = l.Device + 5*PageSize
	for i, n := range names {
		l.Blocks = append(l.Blocks, Block{Name: n, Pages: uint64(8 + 24*i)})
	}
	return l
}

func newStage(l Layout) []byte { return make([]byte, l.Pages+l.total()*PageSize) }

// guest is memory whose changes are staged as the plugin does.
type guest struct {
	layout Layout
	pages  [][]byte // by number, of all blocks
	dirty  []bool
	device []byte
}

func newGuest(l Layout) *guest {
	g := &guest{layout: l, device: make([]byte, 3*PageSize+1000)}
	for range l.total() {
		g.pages = append(g.pages, make([]byte, PageSize))
		g.dirty = append(g.dirty, true)
	}
	return g
}

func (g *guest) change(r *rand.Rand) {
	for range r.IntN(12) {
		i := r.IntN(len(g.pages))
		p := g.pages[i]
		g.dirty[i] = true
		switch r.IntN(4) {
		case 0:
			clear(p)
		case 1:
			for at := range p {
				p[at] = byte(r.Uint32())
			}
		case 2:
			copy(p, bytes.Repeat([]byte("what compresses well "), 200))
		default:
			p[r.IntN(len(p))]++
		}
	}
	g.device[r.IntN(len(g.device))]++
}

// stage puts what changed into a staging.
func (g *guest) stage(to []byte, kind Kind, number uint64) Header {
	h := Header{Kind: kind, Number: number, Running: true}
	room := to[g.layout.Pages:]
	var at int
	for block, b := range g.layout.Blocks {
		for page := range b.Pages {
			if p := g.pages[at]; g.dirty[at] {
				entry := uint64(block)<<entryBlock | page
				if kind == Round && isZero(p) {
					entry |= entryZero
				} else {
					copy(room, p)
					room = room[PageSize:]
				}
				binary.NativeEndian.PutUint64(to[g.layout.Table+8*uint64(h.Pages):], entry)
				h.Pages++
				g.dirty[at] = false
			}
			at++
		}
	}
	if kind == Complete {
		h.Device = uint32(copy(to[g.layout.Device:], g.device))
	}
	return h
}

// apply does what the backup's plugin does.
func (g *guest) apply(from []byte, h Header) {
	room := from[g.layout.Pages:]
	for i := range uint64(h.Pages) {
		entry := binary.NativeEndian.Uint64(from[g.layout.Table+8*i:])
		at := entry & entryPage
		for _, b := range g.layout.Blocks[:entry>>entryBlock] {
			at += b.Pages
		}
		if entry&entryZero != 0 {
			clear(g.pages[at])
			continue
		}
		copy(g.pages[at], room[:PageSize])
		room = room[PageSize:]
	}
	if h.Kind == Complete {
		g.device = append(g.device[:0], from[g.layout.Device:][:h.Device]...)
	}
}

// page finds one by its block's name.
func (g *guest) page(name string, page uint64) []byte {
	for _, b := range g.layout.Blocks {
		if b.Name == name {
			return g.pages[page]
		}
		page += b.Pages
	}
	return nil
}

func (g *guest) equal(o *guest) bool {
	for _, b := range g.layout.Blocks {
		for page := range b.Pages {
			if !bytes.Equal(g.page(b.Name, page), o.page(b.Name, page)) {
				return false
			}
		}
	}
	return bytes.Equal(g.device, o.device)
}

// TestRoundTrip: what was staged on one side is staged on the other, however the
// stream is cut, and where the RAM blocks have another order; and either side may
// forget.
func TestRoundTrip(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	here, there := testLayout("ram", "rom"), testLayout("rom", "ram")
	there.Blocks[0].Pages, there.Blocks[1].Pages = 32, 8
	primary, backup := newGuest(here), newGuest(there)
	from, to := newStage(here), newStage(there)
	e, err := NewEncoder(from, here, there)
	if err != nil {
		t.Fatal(err)
	}
	d, err := NewDecoder(to, there)
	if err != nil {
		t.Fatal(err)
	}
	var raw, sent int
	for n := range uint64(400) {
		primary.change(r)
		kind, number := Complete, n
		if n == 0 {
			kind = Round
		}
		switch r.IntN(40) {
		case 0:
			e.Forget()
		case 1:
			e.Forget()
			if d, err = NewDecoder(to, there); err != nil {
				t.Fatal(err)
			}
			d.Resume(max(number, 1) - 1)
		}
		h := primary.stage(from, kind, number)
		raw += int(h.Pages)*PageSize + int(h.Device)
		b, err := e.Append(nil, h)
		if err != nil {
			t.Fatal(err)
		}
		sent += len(b)
		b = append(b, "of the next"...)
		for {
			n, whole, err := d.Feed(b[:min(len(b), 1+r.IntN(3000))])
			if err != nil {
				t.Fatal(err)
			}
			b = b[n:]
			if whole != nil {
				if whole.Number != number || whole.Pages != h.Pages || whole.Device != h.Device || !whole.Running || whole.Kind != kind {
					t.Fatalf("got %+v, want %+v", *whole, h)
				}
				backup.apply(to, *whole)
				break
			}
		}
		if string(b) != "of the next" {
			t.Fatalf("%d bytes are left", len(b))
		}
		if kind == Complete && !primary.equal(backup) {
			t.Fatalf("after checkpoint %d they differ", number)
		}
	}
	t.Logf("%d bytes of %d", sent, raw)
}

func testDecoder(t testing.TB) (*Decoder, []byte, Layout) {
	l := testLayout("ram", "rom")
	stage := newStage(l)
	// Nothing beyond the staging may be written.
	stage = stage[:len(stage):len(stage)]
	d, err := NewDecoder(stage, l)
	if err != nil {
		t.Fatal(err)
	}
	return d, stage, l
}

// stream gives a few records.
func stream(t testing.TB, l Layout, n uint64) (records [][]byte) {
	g, from := newGuest(l), newStage(l)
	r := rand.New(rand.NewPCG(3, 4))
	e, err := NewEncoder(from, l, l)
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		g.change(r)
		kind := Complete
		if i == 0 {
			kind = Round
		}
		b, err := e.Append(nil, g.stage(from, kind, i))
		if err != nil {
			t.Fatal(err)
		}
		records = append(records, b)
	}
	return records
}

func TestDamage(t *testing.T) {
	_, _, l := testDecoder(t)
	records := stream(t, l, 3)
	var whole int     // of the last call
	var staged []byte // by it
	feed := func(records ...[]byte) error {
		whole = 0
		d, stage, _ := testDecoder(t)
		staged = stage
		for _, b := range records {
			for len(b) > 0 {
				n, h, err := d.Feed(b)
				if err != nil {
					return err
				}
				if h != nil {
					whole++
				}
				b = b[n:]
			}
		}
		return nil
	}
	if err := feed(records...); err != nil {
		t.Fatal(err)
	}
	if err := feed(records[0], records[2]); !errors.Is(err, ErrOrder) {
		t.Errorf("a checkpoint is missing: %v", err)
	}
	if err := feed(records[0], records[1], records[1]); !errors.Is(err, ErrOrder) {
		t.Errorf("a checkpoint twice: %v", err)
	}
	if err := feed(records[1]); !errors.Is(err, ErrDamaged) {
		t.Errorf("the first is not fresh: %v", err)
	}
	_ = feed(records[0], records[1])
	good := bytes.Clone(staged)
	for i := range records[1] {
		bad := bytes.Clone(records[1])
		bad[i] ^= 0x10
		// A record that became longer waits for more, and there are several ways
		// to pack the same.
		if _ = feed(records[0], bad); whole > 1 && !bytes.Equal(staged, good) {
			t.Fatalf("byte %d of %d was changed, and it was taken", i, len(bad))
		}
	}
}

func TestLayout(t *testing.T) {
	l := testLayout("ram", "rom")
	if err := l.Validate(len(newStage(l))); err != nil {
		t.Fatal(err)
	}
	if err := l.Validate(len(newStage(l)) - 1); !errors.Is(err, ErrLayout) {
		t.Errorf("too small: %v", err)
	}
	other := testLayout("ram", "rom")
	other.Blocks[1].Pages++
	if _, err := Map(l, other); !errors.Is(err, ErrLayout) {
		t.Errorf("another size: %v", err)
	}
	if _, err := Map(l, testLayout("ram")); !errors.Is(err, ErrLayout) {
		t.Errorf("a block is missing: %v", err)
	}
	twice := testLayout("ram", "ram")
	twice.Blocks[1].Pages = 8
	if _, err := Map(twice, l); !errors.Is(err, ErrLayout) {
		t.Errorf("twice the same: %v", err)
	}
}

func FuzzFeed(f *testing.F) {
	d, _, l := testDecoder(f)
	_ = d
	records := stream(f, l, 3)
	f.Add(bytes.Join(records, nil), 1000)
	f.Add(records[0], 1)
	f.Fuzz(func(t *testing.T, b []byte, cut int) {
		d, stage, l := testDecoder(t)
		// What lies before the table is not the decoder's.
		for i := range stage[:l.Table] {
			stage[i] = 0xa5
		}
		cut = max(1, cut)
		for len(b) > 0 {
			n, whole, err := d.Feed(b[:min(len(b), cut)])
			if err != nil {
				break
			}
			if whole != nil {
				newGuest(l).apply(stage, *whole) // panics if a page is none of the guest's
			}
			b = b[n:]
		}
		for _, c := range stage[:l.Table] {
			if c != 0xa5 {
				t.Fatal("written outside")
			}
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	l := testLayout("ram", "rom")
	g, from := newGuest(l), newStage(l)
	e, err := NewEncoder(from, l, l)
	if err != nil {
		b.Fatal(err)
	}
	r := rand.New(rand.NewPCG(5, 6))
	for _, p := range g.pages {
		for at := range p {
			p[at] = byte(r.Uint32())
		}
	}
	var out []byte
	for n := uint64(1); b.Loop(); n++ {
		for i, p := range g.pages {
			p[r.IntN(len(p))]++
			g.dirty[i] = true
		}
		if out, err = e.Append(out[:0], g.stage(from, Complete, n)); err != nil {
			b.Fatal(err)
		}
		b.SetBytes(int64(len(g.pages)) * PageSize)
	}
}
