// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"ftvirt.org/ftvirt/plugin/control"
)

// What is compared.
const (
	partMemory    = "memory"
	partDisk      = "disk"
	partRegisters = "registers"
)

const (
	// memoryChunk and diskChunk are how finely a difference is located.
	memoryChunk = 64 << 10
	diskChunk   = 1 << 20
	// maxHashes bounds what a plugin may make this agent keep: the hashes of
	// half a tebibyte of memory.
	maxHashes = 256 << 20
)

// object is one part of a side: a block of memory or a disk, as the hashes of
// its chunks.
type object struct {
	Kind  string `json:"kind"`
	Name  string `json:"name"`
	Size  int64  `json:"size"`
	Chunk int64  `json:"chunk"`
	// Digest is one hash over all.
	Digest string `json:"digest"`
	hashes []byte
}

func (o *object) seal() {
	sum := sha256.Sum256(o.hashes)
	o.Digest = hex.EncodeToString(sum[:])
}

// same tells whether both are of the same thing, be it equal or not.
func (o *object) same(p *object) bool {
	return o.Kind == p.Kind && o.Name == p.Name && o.Size == p.Size && o.Chunk == p.Chunk
}

// side is what one side of a pair holds where it stands.
type side struct {
	Looked  control.Looked `json:"looked"`
	Objects []*object      `json:"objects"`
}

// find gives the object with that name.
func (s *side) find(kind, name string) *object {
	i := slices.IndexFunc(s.Objects, func(o *object) bool { return o.Kind == kind && o.Name == name })
	if i < 0 {
		return nil
	}
	return s.Objects[i]
}

// errLook is wrapped by what keeps a side from being looked at.
var errLook = errors.New("cannot be looked at")

// memories collects what a plugin tells of memory, in answer to the Look with an
// id.
type memories struct {
	id      uint64
	objects []*object
	held    int
	err     error
}

func (m *memories) add(c control.Memory) {
	if c.ID != m.id || m.err != nil {
		return
	}
	i := slices.IndexFunc(m.objects, func(o *object) bool { return o.Name == c.Name })
	if i < 0 {
		i = len(m.objects)
		m.objects = append(m.objects, &object{Kind: partMemory, Name: c.Name, Size: int64(c.Size), Chunk: memoryChunk})
	}
	o := m.objects[i]
	m.held += len(c.Hashes)
	switch {
	case uint64(len(o.hashes))/control.HashSize*memoryChunk != c.Offset || int64(c.Size) != o.Size:
		m.err = fmt.Errorf("%w: the plugin left out a part of %s", errLook, c.Name)
	case m.held > maxHashes:
		m.err = fmt.Errorf("%w: more memory than %d GiB", errLook, maxHashes/control.HashSize*memoryChunk>>30)
	default:
		o.hashes = append(o.hashes, c.Hashes...)
	}
}

func (m *memories) complete() error {
	for _, o := range m.objects {
		if chunks := (o.Size + memoryChunk - 1) / memoryChunk; int64(len(o.hashes)) != chunks*control.HashSize {
			return fmt.Errorf("%w: the plugin told a part of %s only", errLook, o.Name)
		}
		o.seal()
	}
	return m.err
}

// look takes the memory and the registers of a VM that stands still. Its images
// are complete on disk then.
func (v *vm) look(ctx context.Context) (control.Looked, []*object, error) {
	v.looking.Lock()
	defer v.looking.Unlock()
	v.mu.Lock()
	id := v.memories.id + 1
	v.memories = memories{id: id}
	v.mu.Unlock()
	if err := v.Look(id, memoryChunk); err != nil {
		return control.Looked{}, nil, err
	}
	var looked control.Looked
	err := v.wait(ctx, "waiting for hashes of memory", func(r reports) bool {
		looked = r.looked
		return looked.ID == id
	})
	if err != nil {
		return looked, nil, errors.Join(err, v.Look(0, memoryChunk))
	}
	v.mu.Lock()
	m := v.memories
	v.mu.Unlock()
	switch {
	case looked.Busy:
		return looked, nil, fmt.Errorf("%w: disk requests are in flight", errLook)
	case looked.Running, looked.Moved:
		return looked, nil, fmt.Errorf("%w: it did not stand still", errLook)
	}
	return looked, m.objects, m.complete()
}

// look takes all that one side holds. The images are those of this host's copy.
func (d *domain) look(ctx context.Context, v *vm, images []image) (*side, error) {
	looked, objects, err := v.look(ctx)
	if err != nil {
		return nil, err
	}
	for _, i := range images {
		hashes, size, err := i.hash(ctx)
		if err != nil {
			return nil, fmt.Errorf("disk %s: %w", i.target, err)
		}
		o := &object{Kind: partDisk, Name: i.target, Size: size, Chunk: diskChunk, hashes: hashes}
		o.seal()
		objects = append(objects, o)
	}
	return &side{Looked: looked, Objects: objects}, nil
}
