// SPDX-License-Identifier: Apache-2.0

package control

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin"
)

// PageSize is the unit in which checkpoints copy memory, in bytes.
const PageSize = 4096

// Frames of the checkpoint method; plugin/qemu/PROTOCOL.md.
const (
	frameBlocks frameType = iota + 32
	frameStaged
	frameApplied
)

const (
	frameBegin frameType = iota + 96
	frameRound
	frameFirst
	frameSchedule
	frameApply
)

// Block is one RAM block of a guest, by QEMU's name for it.
type Block struct {
	Name  string
	Pages uint64
}

// Blocks says what a guest's memory is made of, and how the staging lies: a
// table of pages, room for device state, and the pages themselves, at offsets in
// bytes.
type Blocks struct {
	Size, Table, Device, Pages uint64
	List                       []Block
}

// Staged says that a part of a live round, or a checkpoint, lies in the staging.
type Staged struct {
	Number  uint64 // of the checkpoint, 0 of a live round
	Pages   uint64 // entries of the table
	Device  uint64 // bytes of device state
	Left    uint64 // pages that wait still
	Running bool   // the guest runs after it
	// How long the guest stood still, in parts: its vCPUs stopped, disks were
	// drained, pages copied, device state saved, and all resumed.
	Stop, Drain, Copy, Save, Resume time.Duration
}

// Pause is how long the guest stood still for a checkpoint.
func (s Staged) Pause() time.Duration { return s.Stop + s.Drain + s.Copy + s.Save + s.Resume }

// maxBlocks is the plugin's own limit, CK_BLOCKS.
const maxBlocks = 256

func parseBlocks(p []byte) (Blocks, error) {
	r := &reader{p: p}
	b := Blocks{Size: r.uint(8), Table: r.uint(8), Device: r.uint(8), Pages: r.uint(8)}
	var total uint64
	for len(r.p) > 0 && !r.bad {
		k := Block{Pages: r.uint(8)}
		n := int(r.uint(1))
		if r.bad || len(r.p) < n || len(b.List) == maxBlocks || k.Pages > 1<<40 {
			return b, ErrMalformed
		}
		k.Name, r.p = string(r.p[:n]), r.p[n:]
		b.List = append(b.List, k)
		total += k.Pages
	}
	if err := r.err(); err != nil {
		return b, err
	}
	if b.Table > b.Device || b.Device > b.Pages || b.Pages > b.Size || b.Device-b.Table < 8*total || (b.Size-b.Pages)/PageSize < total {
		return b, ErrMalformed
	}
	return b, nil
}

func parseStaged(p []byte) (Staged, error) {
	r := &reader{p: p}
	s := Staged{Number: r.uint(8), Pages: r.uint(8), Device: r.uint(8), Left: r.uint(8), Running: r.uint(1) != 0}
	for _, t := range []*time.Duration{&s.Stop, &s.Drain, &s.Copy, &s.Save, &s.Resume} {
		*t = time.Duration(r.uint(8))
	}
	return s, r.err()
}

func parseApplied(p []byte) (uint64, error) {
	r := &reader{p: p}
	n := r.uint(8)
	return n, r.err()
}

// Begin enters an epoch by checkpoints: the primary begins to track writes, and
// both plugins tell their Blocks. Nothing of the guest is held back yet.
func (s *Session) Begin(epoch plugin.Epoch) error { return s.send(frameBegin, uint64(epoch)) }

// Round asks a primary that has begun for pages that the backup lacks, while the
// guest runs. The answer is Staged, with the number 0; the staging is the agent's
// until the next Round or First.
func (s *Session) Round() error { return s.send(frameRound) }

// First asks for the first checkpoint. From then on the plugin takes the others
// by itself, each when the last has been acknowledged, and holds outputs back.
func (s *Session) First() error { return s.send(frameFirst) }

// Schedule sets the least and the longest time between checkpoints, and the
// number of dirty pages at which one is taken sooner.
func (s *Session) Schedule(least, longest time.Duration, watermark uint32) error {
	var p [12]byte
	binary.BigEndian.PutUint32(p[0:], uint32(least.Microseconds()))
	binary.BigEndian.PutUint32(p[4:], uint32(longest.Microseconds()))
	binary.BigEndian.PutUint32(p[8:], watermark)
	return s.sendBytes(frameSchedule, p[:])
}

// Apply tells a backup that what was staged for it is whole. The answer is
// Applied with its number; the staging is the plugin's until then.
func (s *Session) Apply(g Staged) error {
	running := []byte{0}
	if g.Running {
		running[0] = 1
	}
	return s.sendBytes(frameApply, running, g.Number, g.Pages, g.Device)
}

// AckCheckpoint tells the primary that the backup holds a checkpoint. Outputs of
// before it may leave, and the staging is the plugin's again.
func (s *Session) AckCheckpoint(number uint64) error { return s.send(frameAck, number) }

// Staging gives the file in memory in which a plugin of the checkpoint method
// stages pages, nil if it has none. It is open as long as the session is.
func (s *Session) Staging() *os.File { return s.staging }

// passed reads from a plugin's connection, with whose first bytes a descriptor
// may come.
type passed struct {
	conn *net.UnixConn
	file *os.File
}

func (p *passed) Read(b []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	if p.file != nil {
		oob = nil
	}
	n, oobn, _, _, err := p.conn.ReadMsgUnix(b, oob)
	if oobn > 0 {
		if taken := p.take(oob[:oobn]); taken != nil {
			return 0, taken
		}
	}
	if n <= 0 && err == nil {
		return 0, io.EOF
	}
	return max(n, 0), err
}

func (p *passed) take(oob []byte) error {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return fmt.Errorf("descriptor of the plugin: %w", err)
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return fmt.Errorf("descriptor of the plugin: %w", err)
		}
		for _, fd := range fds {
			if p.file != nil {
				_ = unix.Close(fd)
				continue
			}
			unix.CloseOnExec(fd)
			p.file = os.NewFile(uintptr(fd), "staging")
		}
	}
	return nil
}
