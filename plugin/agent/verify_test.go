// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"ftvirt.org/ftvirt/plugin/control"
)

func hashOf(b byte) []byte { return bytes.Repeat([]byte{b}, control.HashSize) }

func TestDiffering(t *testing.T) {
	make := func(chunks ...byte) *object {
		o := &object{Kind: partDisk, Name: "vda", Size: int64(len(chunks))*diskChunk - 100, Chunk: diskChunk}
		for _, c := range chunks {
			o.hashes = append(o.hashes, hashOf(c)...)
		}
		return o
	}
	ours, theirs := make(1, 2, 3, 4, 5), make(1, 9, 9, 4, 9)
	ranges, n := differing(ours, theirs)
	want := []Range{{diskChunk, 2 * diskChunk}, {4 * diskChunk, diskChunk - 100}}
	if !slices.Equal(ranges, want) || n != 3*diskChunk-100 {
		t.Errorf("%v, %d bytes", ranges, n)
	}
	if ranges, n = differing(ours, ours); ranges != nil || n != 0 {
		t.Errorf("of itself: %v, %d bytes", ranges, n)
	}
	var a, b []byte
	for i := range byte(200) {
		a, b = append(a, 0), append(b, i%2)
	}
	if ranges, n = differing(make(a...), make(b...)); len(ranges) != maxRanges || n != 100*diskChunk-100 {
		t.Errorf("%d ranges, %d bytes", len(ranges), n)
	}
}

func TestMemories(t *testing.T) {
	part := func(offset uint64, n int) control.Memory {
		return control.Memory{ID: 3, Size: 5 * memoryChunk, Offset: offset, Name: "pc.ram", Hashes: bytes.Repeat(hashOf(1), n)}
	}
	m := memories{id: 3}
	m.add(part(0, 2))
	other := part(0, 1)
	other.ID, other.Name = 2, "of an earlier look"
	m.add(other)
	if err := m.complete(); !errors.Is(err, errLook) {
		t.Errorf("a part only: %v", err)
	}
	m.add(part(2*memoryChunk, 3))
	if err := m.complete(); err != nil || len(m.objects) != 1 || m.objects[0].Digest == "" {
		t.Errorf("%v, %d objects", err, len(m.objects))
	}
	gap := memories{id: 3}
	gap.add(part(memoryChunk, 1))
	if err := gap.complete(); !errors.Is(err, errLook) {
		t.Errorf("a gap: %v", err)
	}
}

func TestRegisters(t *testing.T) {
	var a, b control.Looked
	a.Registers[16], b.Registers[16] = 0x10, 0x10
	if p := registers(a, b); !p.Equal || p.Different != 0 {
		t.Errorf("%+v", p)
	}
	b.Registers[16] = 0x20
	if p := registers(a, b); p.Equal || len(p.Detail) != 1 || p.Detail[0] != "RIP is 0x10 here and 0x20 on the backup" {
		t.Errorf("%+v", p)
	}
}
