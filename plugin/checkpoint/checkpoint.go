// SPDX-License-Identifier: Apache-2.0

// Package checkpoint makes a stream of bytes of what the plugin of a primary
// stages, and stages it again on the backup's host: pages of memory and the state
// of devices, as they changed since the checkpoint before. FORMAT.md has the
// stream byte by byte. It is pure: no I/O, no clock, no goroutine.
package checkpoint

import (
	"errors"
	"fmt"
)

// PageSize is the unit in which memory is copied, in bytes.
const PageSize = 4096

// Limits of what a stream may ask for.
const (
	// MaxDevice bounds the state of devices, as the plugin does.
	MaxDevice = 64 << 20
	// MaxBlocks bounds the RAM blocks of a guest, as the plugin does.
	MaxBlocks = 256
)

// Errors of a stream and of a staging. They are wrapped with where they are.
var (
	ErrDamaged = errors.New("checkpoint stream is damaged")
	ErrLayout  = errors.New("staging does not fit the guest's memory")
	ErrOrder   = errors.New("checkpoint out of order")
)

// Kind is what a record holds.
type Kind uint8

// The kinds of records.
const (
	// Round is a part of a live round: pages that the guest may have changed since.
	Round Kind = 1
	// Complete is a checkpoint: with all before it, the state of one instant.
	Complete Kind = 2
)

// Header is what a record says of itself.
type Header struct {
	Kind   Kind
	Number uint64 // of the checkpoint, 0 of a round
	// Running tells whether the guest runs after it.
	Running bool
	// Fresh: nothing of before is referred to from here on, as after one side lost
	// what it remembered.
	Fresh  bool
	Pages  uint32
	Device uint32 // bytes of device state; 0 of a round
}

// Block is one RAM block, by QEMU's name for it.
type Block struct {
	Name  string
	Pages uint64
}

// Layout says where things lie in a staging, in bytes from its beginning, and
// what the guest's memory is made of; plugin/qemu/PROTOCOL.md, BLOCKS.
type Layout struct {
	Table, Device, Pages uint64
	Blocks               []Block
}

// total is the number of pages of all blocks.
func (l Layout) total() (n uint64) {
	for _, b := range l.Blocks {
		n += b.Pages
	}
	return n
}

// room is how many bytes of device state there is room for.
func (l Layout) room() uint64 { return min(l.Pages-l.Device, MaxDevice) }

// Validate tells whether a staging of that many bytes has room for all of it.
func (l Layout) Validate(size int) error {
	if len(l.Blocks) == 0 || len(l.Blocks) > MaxBlocks {
		return fmt.Errorf("%w: %d RAM blocks", ErrLayout, len(l.Blocks))
	}
	for _, b := range l.Blocks {
		if b.Pages >= 1<<40 {
			return fmt.Errorf("%w: RAM block %s has %d pages", ErrLayout, b.Name, b.Pages)
		}
	}
	n := l.total()
	if l.Table > l.Device || l.Device-l.Table < 8*n || l.Device > l.Pages ||
		l.Pages > uint64(size) || (uint64(size)-l.Pages)/PageSize < n {
		return fmt.Errorf("%w: %d bytes for %d pages", ErrLayout, size, n)
	}
	return nil
}

// An entry of a staging's table: block, whether the page is all zeros and takes no
// room among the staged pages, page of the block; plugin/qemu/checkpoint.
const (
	entryBlock = 48
	entryZero  = 1 << 47
	entryPage  = entryZero - 1
)

// Map gives, for each block of from, which of to has its name. Both must have the
// same blocks, in whatever order.
func Map(from, to Layout) ([]int, error) {
	if len(from.Blocks) != len(to.Blocks) {
		return nil, fmt.Errorf("%w: %d RAM blocks on one side, %d on the other", ErrLayout, len(from.Blocks), len(to.Blocks))
	}
	list := make([]int, len(from.Blocks))
	used := make([]bool, len(to.Blocks))
	for i, b := range from.Blocks {
		list[i] = -1
		for j, k := range to.Blocks {
			if k == b && !used[j] {
				list[i], used[j] = j, true
				break
			}
		}
		if list[i] < 0 {
			return nil, fmt.Errorf("%w: the backup has no RAM block %s of %d pages", ErrLayout, b.Name, b.Pages)
		}
	}
	return list, nil
}
