// SPDX-License-Identifier: Apache-2.0

package checkpoint

// memory is what both sides remember of pages that were sent, alike: the encoder
// tells what changed of one, the decoder has it to change. It is bounded: a page
// has one place, by its number, and pushes out who was there before.
type memory struct {
	keys  []uint64 // entry + 1 of the table; 0: nobody is there
	pages []*[PageSize]byte
}

// slots is how many pages are remembered: 32 MiB.
const slots = 8 << 10

func (m *memory) reset() {
	if m.keys == nil {
		m.keys, m.pages = make([]uint64, slots), make([]*[PageSize]byte, slots)
		return
	}
	clear(m.keys)
}

func place(entry uint64) uint64 {
	// Neighbours get places of their own; blocks are spread.
	return (entry ^ entry>>entryBlock*2654435761) % slots
}

// known gives what is remembered of a page, nil if it is nothing.
func (m *memory) known(entry uint64) []byte {
	if i := place(entry); m.keys[i] == entry+1 {
		return m.pages[i][:]
	}
	return nil
}

// told notes how a page was told: one that is not remembered is forgotten.
func (m *memory) told(entry uint64, page []byte, remember bool) {
	i := place(entry)
	switch {
	case remember:
		if m.pages[i] == nil {
			m.pages[i] = new([PageSize]byte)
		}
		copy(m.pages[i][:], page)
		m.keys[i] = entry + 1
	case m.keys[i] == entry+1:
		m.keys[i] = 0
	}
}
