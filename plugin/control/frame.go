// SPDX-License-Identifier: Apache-2.0

package control

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

// Protocol is the version of the control protocol spoken here.
const Protocol = 1

// MaxFrame is the longest payload of a frame, in bytes, in either direction.
const MaxFrame = 1 << 20

const headerSize = 5

type frameType uint8

// Frames of the plugin, then those of the agent; plugin/qemu/PROTOCOL.md.
const (
	frameHello frameType = iota + 1
	frameLog
	frameState
	frameConsumed
	frameStats
	frameDiverged
	frameError
	frameDigest
	frameMemory
	frameLooked
)

const (
	frameWelcome frameType = iota + 64
	frameArm
	frameDisarm
	frameAck
	frameFeed
	framePromote
	frameOpen
	frameIdle
	frameConfig
	framePace
	frameCheck
	frameHold
	frameLook
)

// Errors of the protocol. A *FrameError wraps one of them.
var (
	ErrVersion   = errors.New("unsupported control protocol version")
	ErrMalformed = errors.New("malformed frame")
	ErrTooLong   = errors.New("frame too long")
	ErrUnknown   = errors.New("unknown frame")
)

// FrameError tells which frame of the plugin could not be used.
type FrameError struct {
	Type   uint8
	Length int
	Err    error
}

func (e *FrameError) Error() string {
	return fmt.Sprintf("control frame of type %d, %d bytes: %v", e.Type, e.Length, e.Err)
}

func (e *FrameError) Unwrap() error { return e.Err }

// Mode is what the plugin does with its VM.
type Mode uint8

// The modes, as in plugin/qemu/ftvirt.h.
const (
	ModeBoot       Mode = iota // loaded, not started yet
	ModeIdle                   // unprotected
	ModeRecord                 // primary
	ModeReplay                 // backup
	ModeLive                   // went live, or goes on alone
	ModeCheckpoint             // primary of the checkpoint method
	ModeStandby                // its backup
)

func (m Mode) String() string {
	names := [...]string{"boot", "idle", "record", "replay", "live", "checkpoint", "standby"}
	if int(m) < len(names) {
		return names[m]
	}
	return fmt.Sprintf("mode(%d)", uint8(m))
}

// Version is the version of the QEMU that loaded the plugin.
type Version struct{ Major, Minor, Micro int }

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro) }

// Hello is the plugin's first frame on a connection.
type Hello struct {
	Protocol uint16
	Backup   bool
	Mode     Mode
	Domain   plugin.UUID
	Epoch    plugin.Epoch
	// Tail and Head bound the log that the plugin holds: unacknowledged in
	// record mode, not yet consumed in replay mode.
	Tail, Head plugin.Position
	Icount     uint64 // instructions the guest has executed
	PID        int    // of QEMU
	QEMU       Version
	Window     int // bytes that may be fed beyond what was consumed
	Build      string
}

// State reports a change of mode, or of the VM's run state.
type State struct {
	Mode    Mode
	Running bool
	Epoch   plugin.Epoch
	Pos     plugin.Position
	Icount  uint64
	PauseNS int64 // how long the last clone stopped the guest
	Dropped uint64
	Text    string
}

// Pause tells why a VM does not run that was stopped, as QEMU calls it: "paused"
// by somebody, "io-error", "watchdog" or "guest-panicked". It is empty for one
// that runs, and for one that only stands still for a moment.
func (s State) Pause() string {
	why, ok := strings.CutPrefix(s.Text, "stopped: ")
	if s.Running || !ok {
		return ""
	}
	return why
}

// PauseIOError is what Pause says of a VM that an error of a disk stopped.
const PauseIOError = "io-error"

// Consumed reports how far the backup has replayed.
type Consumed struct {
	Pos, Fed                  plugin.Position
	Icount                    uint64
	Starving, Loaded, Running bool
}

// Stats reports on the primary's log and its output gate. Packets are counted
// since QEMU began.
type Stats struct {
	Acked, Head               plugin.Position
	Icount                    uint64
	Queued, Released, Dropped uint64 // packets
	DelayNS, DelayMaxNS       uint64 // sum over those released; largest since the last report
	HeldNS                    int64  // how long the guest has waited for room in the log
	// Delays counts the released packets by their delay: the first of
	// [DelayBounds] that is not less, or the last element. A plugin of before
	// tells none, which Counted tells apart.
	Delays  [DelayClasses]uint64
	Counted bool
}

// DelayBounds are the upper bounds of the classes of [Stats.Delays], but for the
// last, which has none.
var DelayBounds = [DelayClasses - 1]time.Duration{
	500 * time.Microsecond, time.Millisecond, 2 * time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond,
	20 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond, 200 * time.Millisecond, 500 * time.Millisecond, time.Second,
}

// DelayClasses is the number of classes of delay.
const DelayClasses = 12

// Diverged reports that the backup does not consume the log it has.
type Diverged struct {
	Pos          plugin.Position
	Icount       uint64
	Kind         uint32 // QEMU's event kind that the log wants next
	Instructions uint32 // instructions the log wants before it
}

// Digest is a hash of the registers when the event that ends at Pos had just
// been logged, on the primary, or consumed, on the backup.
type Digest struct {
	Pos       plugin.Position
	Icount    uint64
	Registers uint64
}

// HashSize is the length of the hash of a chunk, which is SHA-256.
const HashSize = 32

// Memory is a part of the answer to a Look: hashes of a block of memory.
type Memory struct {
	ID     uint64
	Size   uint64 // of the block, in bytes
	Offset uint64 // of the first chunk
	Name   string
	Hashes []byte // valid during the call only
}

// Looked ends the answer to a Look.
type Looked struct {
	ID      uint64
	Pos     plugin.Position
	Icount  uint64
	Running bool // it does not stand still, and is no backup
	Busy    bool // disk requests were in flight, and nothing was hashed
	Moved   bool // it executed something meanwhile, or memory could not be hashed
	// Registers are the general ones in the CPU's order, RIP, the flags of the
	// system, and CR0 to CR4.
	Registers [23]uint64
}

type reader struct {
	p   []byte
	bad bool
}

func (r *reader) uint(n int) uint64 {
	if len(r.p) < n {
		r.bad = true
		return 0
	}
	var v uint64
	for _, b := range r.p[:n] {
		v = v<<8 | uint64(b)
	}
	r.p = r.p[n:]
	return v
}

func (r *reader) pos() plugin.Position { return plugin.Position(r.uint(8)) }

func (r *reader) rest() string {
	s := string(r.p)
	r.p = nil
	return s
}

func (r *reader) err() error {
	if r.bad || len(r.p) != 0 {
		return ErrMalformed
	}
	return nil
}

func parseHello(p []byte) (Hello, error) {
	r := &reader{p: p}
	var h Hello
	h.Protocol = uint16(r.uint(2))
	if !r.bad && h.Protocol != Protocol {
		return h, fmt.Errorf("%w: plugin speaks %d, agent speaks %d", ErrVersion, h.Protocol, Protocol)
	}
	h.Backup = r.uint(1) != 0
	h.Mode = Mode(r.uint(1))
	for i := range h.Domain {
		h.Domain[i] = byte(r.uint(1))
	}
	h.Epoch = plugin.Epoch(r.uint(8))
	h.Tail, h.Head = r.pos(), r.pos()
	h.Icount = r.uint(8)
	h.PID = int(r.uint(4))
	h.QEMU = Version{int(r.uint(1)), int(r.uint(1)), int(r.uint(1))}
	h.Window = int(r.uint(4))
	h.Build = r.rest()
	if err := r.err(); err != nil {
		return h, err
	}
	if h.Mode > ModeStandby || h.Head < h.Tail || h.Window <= 0 {
		return h, ErrMalformed
	}
	return h, nil
}

func parseState(p []byte) (State, error) {
	r := &reader{p: p}
	s := State{
		Mode: Mode(r.uint(1)), Running: r.uint(1) != 0, Epoch: plugin.Epoch(r.uint(8)), Pos: r.pos(),
		Icount: r.uint(8), PauseNS: int64(r.uint(8)), Dropped: r.uint(8),
	}
	s.Text = r.rest()
	if s.Mode > ModeStandby {
		return s, ErrMalformed
	}
	return s, r.err()
}

func parseConsumed(p []byte) (Consumed, error) {
	r := &reader{p: p}
	c := Consumed{Pos: r.pos(), Fed: r.pos(), Icount: r.uint(8)}
	flags := r.uint(1)
	c.Starving, c.Loaded, c.Running = flags&1 != 0, flags&2 != 0, flags&4 != 0
	return c, r.err()
}

func parseStats(p []byte) (Stats, error) {
	r := &reader{p: p}
	s := Stats{
		Acked: r.pos(), Head: r.pos(), Icount: r.uint(8), Queued: r.uint(8), Released: r.uint(8),
		Dropped: r.uint(8), DelayNS: r.uint(8), DelayMaxNS: r.uint(8), HeldNS: int64(r.uint(8)),
	}
	if s.Counted = len(r.p) > 0; s.Counted {
		for i := range s.Delays {
			s.Delays[i] = r.uint(8)
		}
	}
	return s, r.err()
}

func parseDiverged(p []byte) (Diverged, error) {
	r := &reader{p: p}
	d := Diverged{Pos: r.pos(), Icount: r.uint(8), Kind: uint32(r.uint(4)), Instructions: uint32(r.uint(4))}
	return d, r.err()
}

func parseDigest(p []byte) (Digest, error) {
	r := &reader{p: p}
	d := Digest{Pos: r.pos(), Icount: r.uint(8), Registers: r.uint(8)}
	return d, r.err()
}

func parseMemory(p []byte) (Memory, error) {
	r := &reader{p: p}
	m := Memory{ID: r.uint(8), Size: r.uint(8), Offset: r.uint(8)}
	n := int(r.uint(1))
	if r.bad || len(r.p) < n || (len(r.p)-n)%HashSize != 0 {
		return m, ErrMalformed
	}
	m.Name, m.Hashes = string(r.p[:n]), r.p[n:]
	return m, nil
}

func parseLooked(p []byte) (Looked, error) {
	r := &reader{p: p}
	l := Looked{ID: r.uint(8), Pos: r.pos(), Icount: r.uint(8)}
	flags := r.uint(1)
	l.Running, l.Busy, l.Moved = flags&1 != 0, flags&2 != 0, flags&4 != 0
	for i := range l.Registers {
		l.Registers[i] = r.uint(8)
	}
	return l, r.err()
}

// readFrame reads one frame into buf, growing it if need be. The payload is
// valid until the next call.
func readFrame(r io.Reader, buf *[]byte) (frameType, []byte, error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return 0, nil, err
	}
	n := int(binary.BigEndian.Uint32(header[:]))
	t := frameType(header[4])
	if n > MaxFrame {
		return t, nil, &FrameError{Type: uint8(t), Length: n, Err: ErrTooLong}
	}
	if cap(*buf) < n {
		*buf = make([]byte, n)
	}
	p := (*buf)[:n]
	if _, err := io.ReadFull(r, p); err != nil {
		return t, nil, fmt.Errorf("control frame of type %d: %w", t, err)
	}
	return t, p, nil
}
