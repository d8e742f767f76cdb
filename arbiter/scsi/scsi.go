// SPDX-License-Identifier: Apache-2.0

// Package scsi speaks the few SCSI commands with which a block device can
// decide between hosts: COMPARE AND WRITE, persistent reservations, and what
// it takes to find out whether a device has them. Sections are those of SBC-4
// (block commands) and SPC-4 (primary commands).
package scsi

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
)

// Command is one SCSI command. At most one of Out and In is used.
type Command struct {
	CDB []byte
	// Out is sent to the device.
	Out []byte
	// In is filled by the device, perhaps not wholly.
	In []byte
}

// Result is what a device answered.
type Result struct {
	// Status is the status byte (SAM-5, 5.3).
	Status byte
	// Sense is the sense data, empty unless Status is StatusCheckCondition.
	Sense []byte
	// Received is how much of Command.In was filled.
	Received int
}

// Transport carries commands to one logical unit. Its methods may be called
// concurrently.
type Transport interface {
	// Do gives the device's answer. An error means that there is none: what
	// the command did, or may still do, is not known.
	Do(ctx context.Context, c Command) (Result, error)
	// Lock keeps all others out that use the same I_T nexus, which is as a
	// rule all processes of this host. To the device they are one.
	Lock(ctx context.Context) (unlock func(), err error)
	// Reset aborts all commands that the device has, whoever sent them, and
	// returns when none of them is left (SAM-5, 7.7, logical unit reset).
	// Registrations and reservations stay.
	Reset(ctx context.Context) error
}

// Status bytes (SAM-5, 5.3.1).
const (
	StatusGood                = 0x00
	StatusCheckCondition      = 0x02
	StatusConditionMet        = 0x04
	StatusBusy                = 0x08
	StatusReservationConflict = 0x18
	StatusTaskSetFull         = 0x28
	StatusACAActive           = 0x30
	StatusTaskAborted         = 0x40
)

// Sense keys (SPC-4, 4.5.6).
const (
	KeyNoSense        = 0x0
	KeyRecoveredError = 0x1
	KeyNotReady       = 0x2
	KeyMediumError    = 0x3
	KeyHardwareError  = 0x4
	KeyIllegalRequest = 0x5
	KeyUnitAttention  = 0x6
	KeyDataProtect    = 0x7
	KeyAbortedCommand = 0xB
	KeyMiscompare     = 0xE
)

var (
	// ErrMiscompare: COMPARE AND WRITE found something else, and wrote nothing.
	ErrMiscompare = errors.New("the block holds something else")
	// ErrReserved: a persistent reservation of another host forbids it.
	ErrReserved = errors.New("reservation conflict")
	// ErrUnsupported: the device does not know the command or its fields.
	ErrUnsupported = errors.New("not supported by the device")
	// ErrAttention: something happened to the device, such as a reset or the
	// loss of a reservation. The command was not carried out.
	ErrAttention = errors.New("unit attention")
	// ErrProtected: the medium takes no writes.
	ErrProtected = errors.New("write protected")
	// ErrBusy: the device has no room for the command now.
	ErrBusy = errors.New("device is busy")
	// ErrAborted: another host had the command aborted. Whether it was carried
	// out is not known, but it will not be any more.
	ErrAborted = errors.New("command was aborted by another host")
	// ErrShort: the device sent less than the command asks for.
	ErrShort = errors.New("short answer")
)

// StatusError is an answer other than success. It is one of the errors above
// if one of them fits.
type StatusError struct {
	Op     string
	Status byte
	// Key, ASC and ASCQ are of the sense data: what kind of error it is, and
	// its additional sense code (SPC-4, annex F.2).
	Key, ASC, ASCQ byte
}

func (e *StatusError) Error() string {
	if e.Status != StatusCheckCondition {
		return fmt.Sprintf("scsi %s: status %02xh", e.Op, e.Status)
	}
	return fmt.Sprintf("scsi %s: sense key %xh, code %02xh/%02xh", e.Op, e.Key, e.ASC, e.ASCQ)
}

// Is makes errors.Is find what kind of answer it was.
func (e *StatusError) Is(target error) bool {
	check := e.Status == StatusCheckCondition
	switch target {
	case ErrMiscompare:
		return check && e.Key == KeyMiscompare
	case ErrReserved:
		return e.Status == StatusReservationConflict
	case ErrUnsupported:
		return check && e.Key == KeyIllegalRequest
	case ErrAttention:
		return check && e.Key == KeyUnitAttention
	case ErrProtected:
		return check && e.Key == KeyDataProtect
	case ErrAborted:
		return e.Status == StatusTaskAborted
	case ErrBusy:
		return e.Status == StatusBusy || e.Status == StatusTaskSetFull || e.Status == StatusACAActive
	}
	return false
}

// decodeSense reads fixed and descriptor sense data (SPC-4, 4.5.2 and 4.5.3).
// What is missing stays zero.
func decodeSense(sense []byte) (key, asc, ascq byte) {
	at := func(i int) byte {
		if i < len(sense) {
			return sense[i]
		}
		return 0
	}
	switch at(0) & 0x7F {
	case 0x70, 0x71:
		return at(2) & 0x0F, at(12), at(13)
	case 0x72, 0x73:
		return at(1) & 0x0F, at(2), at(3)
	}
	return 0, 0, 0
}

// Check turns a result into an error unless it is a success.
func (r Result) Check(op string) error {
	if r.Status == StatusGood || r.Status == StatusConditionMet {
		return nil
	}
	e := &StatusError{Op: op, Status: r.Status}
	if r.Status == StatusCheckCondition {
		e.Key, e.ASC, e.ASCQ = decodeSense(r.Sense)
		// A retry inside the device that came good is no error.
		if e.Key == KeyRecoveredError {
			return nil
		}
	}
	return e
}

// Operation codes.
const (
	opInquiry         = 0x12
	opModeSense6      = 0x1A
	opPersistentIn    = 0x5E
	opPersistentOut   = 0x5F
	opRead16          = 0x88
	opCompareAndWrite = 0x89
	opWrite16         = 0x8A
	opSync16          = 0x91
	opServiceIn16     = 0x9E
	saReadCapacity16  = 0x10
	vpdBlockLimits    = 0xB0
	pageCaching       = 0x08
	bitNoDescriptors  = 0x08
	bitDPOFUA         = 0x10
	bitWCE            = 0x04
	bitEVPD           = 0x01
	bitFUA            = 0x08
)

// Device is a logical unit. Its methods send one command each, and retry
// nothing.
type Device struct {
	Transport
	// FUA makes reads and writes go to the medium (force unit access). Set it
	// only if Caching says that the device has it: others refuse it.
	FUA bool
}

func (d Device) fua() byte {
	if d.FUA {
		return bitFUA
	}
	return 0
}

func (d Device) do(ctx context.Context, op string, c Command) (int, error) {
	r, err := d.Do(ctx, c)
	if err != nil {
		return 0, fmt.Errorf("scsi %s: %w", op, err)
	}
	return r.Received, r.Check(op)
}

// receive does a command that must fill c.In.
func (d Device) receive(ctx context.Context, op string, c Command) error {
	n, err := d.do(ctx, op, c)
	if err == nil && n < len(c.In) {
		err = fmt.Errorf("scsi %s: %w: %d bytes of %d", op, ErrShort, n, len(c.In))
	}
	return err
}

// Identity says what a device is (SPC-4, 6.6.2).
type Identity struct {
	// Type is the peripheral device type; 0 is a disk.
	Type                      byte
	Vendor, Product, Revision string
}

// Inquiry asks what the device is.
func (d Device) Inquiry(ctx context.Context) (Identity, error) {
	in := make([]byte, 36)
	if err := d.receive(ctx, "inquiry", Command{CDB: []byte{opInquiry, 0, 0, 0, byte(len(in)), 0}, In: in}); err != nil {
		return Identity{}, err
	}
	text := func(b []byte) string {
		end := len(b)
		for end > 0 && (b[end-1] == ' ' || b[end-1] == 0) {
			end--
		}
		return string(b[:end])
	}
	return Identity{Type: in[0] & 0x1F, Vendor: text(in[8:16]), Product: text(in[16:32]), Revision: text(in[32:36])}, nil
}

// Capacity is the size of a device (SBC-4, 5.20).
type Capacity struct {
	Blocks    uint64
	BlockSize int // in bytes
}

// ReadCapacity asks for the size.
func (d Device) ReadCapacity(ctx context.Context) (Capacity, error) {
	in, cdb := make([]byte, 32), make([]byte, 16)
	cdb[0], cdb[1] = opServiceIn16, saReadCapacity16
	binary.BigEndian.PutUint32(cdb[10:], uint32(len(in)))
	n, err := d.do(ctx, "read capacity", Command{CDB: cdb, In: in})
	if err != nil {
		return Capacity{}, err
	}
	c := Capacity{Blocks: binary.BigEndian.Uint64(in) + 1, BlockSize: int(binary.BigEndian.Uint32(in[8:]))}
	if n < 12 || c.Blocks == 0 || c.BlockSize < 512 || c.BlockSize > 1<<16 || c.BlockSize&(c.BlockSize-1) != 0 {
		return Capacity{}, fmt.Errorf("scsi read capacity: %w: %d bytes, %d blocks of %d", ErrShort, n, c.Blocks, c.BlockSize)
	}
	return c, nil
}

// MaxCompareAndWrite gives how many blocks COMPARE AND WRITE takes at most, 0 if
// the device does not offer it (SBC-4, 6.6.4).
func (d Device) MaxCompareAndWrite(ctx context.Context) (int, error) {
	in := make([]byte, 64)
	cdb := []byte{opInquiry, bitEVPD, vpdBlockLimits, 0, byte(len(in)), 0}
	switch n, err := d.do(ctx, "inquiry of block limits", Command{CDB: cdb, In: in}); {
	case errors.Is(err, ErrUnsupported):
		return 0, nil
	case err != nil:
		return 0, err
	case n < 6 || in[1] != vpdBlockLimits:
		return 0, nil
	}
	return int(in[5]), nil
}

// Caching tells whether the device takes FUA, and whether what it calls written
// may still be in a volatile cache (SPC-4, 7.5; SBC-4, 6.5.5). A device that
// does not say is expected to cache and to know no FUA.
func (d Device) Caching(ctx context.Context) (fua, cached bool, err error) {
	in := make([]byte, 64)
	cdb := []byte{opModeSense6, bitNoDescriptors, pageCaching, 0, byte(len(in)), 0}
	n, err := d.do(ctx, "mode sense", Command{CDB: cdb, In: in})
	if errors.Is(err, ErrUnsupported) {
		return false, true, nil
	}
	if err != nil {
		return false, false, err
	}
	// A device may send block descriptors all the same.
	page := 4 + int(in[3])
	if n < page+3 || in[page]&0x3F != pageCaching {
		return n >= 4 && in[2]&bitDPOFUA != 0, true, nil
	}
	return in[2]&bitDPOFUA != 0, in[page+2]&bitWCE != 0, nil
}

func cdb16(op, flags byte, lba uint64, blocks int) []byte {
	cdb := make([]byte, 16)
	cdb[0], cdb[1] = op, flags
	binary.BigEndian.PutUint64(cdb[2:], lba)
	binary.BigEndian.PutUint32(cdb[10:], uint32(blocks))
	return cdb
}

// Read fills into, which must be whole blocks of the given size (SBC-4, 5.16).
// With FUA, what it reads is on the medium.
func (d Device) Read(ctx context.Context, lba uint64, into []byte, blockSize int) error {
	return d.receive(ctx, "read", Command{CDB: cdb16(opRead16, d.fua(), lba, len(into)/blockSize), In: into})
}

// Write writes whole blocks (SBC-4, 5.42).
func (d Device) Write(ctx context.Context, lba uint64, data []byte, blockSize int) error {
	_, err := d.do(ctx, "write", Command{CDB: cdb16(opWrite16, d.fua(), lba, len(data)/blockSize), Out: data})
	return err
}

// CompareAndWrite writes one block if it holds old; otherwise it fails with
// ErrMiscompare. Both in one step that nothing else can come between (SBC-4, 5.2).
func (d Device) CompareAndWrite(ctx context.Context, lba uint64, old, data []byte) error {
	cdb := cdb16(opCompareAndWrite, d.fua(), lba, 0)
	clear(cdb[10:])
	cdb[13] = 1 // its length field is one byte
	out := make([]byte, 0, len(old)+len(data))
	_, err := d.do(ctx, "compare and write", Command{CDB: cdb, Out: append(append(out, old...), data...)})
	return err
}

// Sync brings what the device has cached to the medium (SBC-4, 5.31). A device
// that has no such command has nothing to bring.
func (d Device) Sync(ctx context.Context) error {
	_, err := d.do(ctx, "synchronize cache", Command{CDB: cdb16(opSync16, 0, 0, 0)})
	if errors.Is(err, ErrUnsupported) {
		return nil
	}
	return err
}
