// SPDX-License-Identifier: Apache-2.0

package checkpoint

// memory is what both sides remember of pages that were sent, alike: the encoder
// tells what changed of one, the decoder has it to change. It is bounded: a page
// has one place, by its number, and pushes out who was there before.
type memory struct {
	keys  []uint64 // entry + 1 of the table; 0: nobody is there
	pages []byte
}

// slots is how many pages are remembered: 32 MiB.
const slots = 8 << 10

func (m *memory) reset() {
	if m.keys == nil {
		m.keys, m.pages = make([]uint64, slots), make([]byte, slots*PageSize)
		return
	}
	clear(m.keys)
}

// place gives the room of a page, and whether the page is there.
func (m *memory) place(entry uint64) (page []byte, known bool, key *uint64) {
	// Neighbours get places of their own; blocks are spread.
	i := (entry ^ entry>>entryBlock*2654435761) % slots
	return m.pages[i*PageSize:][:PageSize:PageSize], m.keys[i] == entry+1, &m.keys[i]
}
