// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

// The layout of a LUN. Numbers are big-endian.
//
//	block 0        the header: the LUN is an arbiter's
//	block 1        scratch, for finding out what the device does
//	block 2+2n     the record of slot n: one domain's state
//	block 3+2n     the mark of slot n: which domain it is, and that an epoch
//	               up to this number may have been given out
//
// A block of zeroes is free. All others have
//
//	 0  4  magic "FTVA"
//	 4  1  version, 1
//	 5  1  1 header, 2 record, 3 mark
//	 6  2  header: 1 COMPARE AND WRITE, 2 reservations; plus 256 if the device
//	       takes FUA;
//	       record: 1 owned by the primary, 2 owned by the backup, 4 closed
//	 8 16  domain; zero in the header
//	24  8  epoch; in the header the number of slots
//	32  8  record: the void, all epochs up to this
//	40  8  times of opening, deciding and closing in ms since 1970, 0 is none;
//	48  8  in the header only the first, of its making
//	56  8
//	64  1  length of the token; in the header that is the identity
//	65 31  token
//	96  2  lengths of the primary's and the backup's names
//	98  .  names
//
// and in the last 32 bytes the SHA-256 of all before. A decision is the change
// of one block. The mark is raised before the record, so that a record which
// was destroyed does not take the fence of its past epochs with it.
const (
	blockVersion = 1
	blockNames   = 98
	blockToken   = 31
	firstSlot    = 2
	maxSlots     = 4096
	minSlots     = 8
)

var blockMagic = [4]byte{'F', 'T', 'V', 'A'}

type blockKind byte

const (
	blockHeader blockKind = 1
	blockRecord blockKind = 2
	blockMark   blockKind = 3
)

// How hosts change a block of the LUN, in its header.
const (
	modeCompareAndWrite = 1
	modeReservation     = 2
	// flagFUA stands in the header beside the mode.
	flagFUA = 256
)

const (
	flagPrimary = 1
	flagBackup  = 2
	flagClosed  = 4
)

// block is any block of a LUN but a free one.
type block struct {
	kind                    blockKind
	flags                   uint16
	domain                  plugin.UUID
	epoch, floor            uint64
	opened, decided, closed time.Time
	token, primary, backup  string
}

// isFree tells whether nobody ever wrote the block.
func isFree(raw []byte) bool { return len(bytes.Trim(raw, "\x00")) == 0 }

func putTime(b []byte, t time.Time) {
	if !t.IsZero() {
		binary.BigEndian.PutUint64(b, uint64(t.UnixMilli()))
	}
}

func getTime(b []byte) time.Time {
	if ms := binary.BigEndian.Uint64(b); ms != 0 {
		return time.UnixMilli(int64(ms)).UTC()
	}
	return time.Time{}
}

// encode gives b as a block of the given size. It wraps ErrInvalid if the
// hosts' names are too long for it.
func (b block) encode(size int) ([]byte, error) {
	raw := make([]byte, size)
	names := size - sha256.Size - blockNames
	if n := len(b.primary) + len(b.backup); n > names {
		return nil, fmt.Errorf("%w: host names of %d bytes together, a block of the LUN has room for %d", ErrInvalid, n, names)
	}
	copy(raw, blockMagic[:])
	raw[4], raw[5] = blockVersion, byte(b.kind)
	binary.BigEndian.PutUint16(raw[6:], b.flags)
	copy(raw[8:], b.domain[:])
	binary.BigEndian.PutUint64(raw[24:], b.epoch)
	binary.BigEndian.PutUint64(raw[32:], b.floor)
	putTime(raw[40:], b.opened)
	putTime(raw[48:], b.decided)
	putTime(raw[56:], b.closed)
	raw[64] = byte(copy(raw[65:65+blockToken], b.token))
	raw[96], raw[97] = byte(len(b.primary)), byte(len(b.backup))
	copy(raw[blockNames:], b.primary+b.backup)
	sum := sha256.Sum256(raw[:size-sha256.Size])
	copy(raw[size-sha256.Size:], sum[:])
	return raw, nil
}

// decodeBlock is the inverse of encode, for a block that should be of kind k.
// The error is a *CorruptError that names path.
func decodeBlock(raw []byte, path string, k blockKind) (block, error) {
	corrupt := func(format string, args ...any) (block, error) {
		return block{}, &CorruptError{Path: path, Reason: fmt.Sprintf(format, args...)}
	}
	end := len(raw) - sha256.Size
	if end < blockNames || !bytes.Equal(raw[:4], blockMagic[:]) {
		return corrupt("it is no block of an arbiter")
	}
	if raw[4] != blockVersion {
		return corrupt("format version %d, this ftvirt knows %d", raw[4], blockVersion)
	}
	if sum := sha256.Sum256(raw[:end]); !bytes.Equal(sum[:], raw[end:]) {
		return corrupt("the checksum does not match")
	}
	if blockKind(raw[5]) != k {
		return corrupt("it is of kind %d, not %d", raw[5], k)
	}
	primary, backup, token := int(raw[96]), int(raw[97]), int(raw[64])
	if primary+backup > end-blockNames || token > blockToken {
		return corrupt("its lengths exceed it")
	}
	names := string(raw[blockNames : blockNames+primary+backup])
	return block{
		kind: k, flags: binary.BigEndian.Uint16(raw[6:]), domain: plugin.UUID(raw[8:24]),
		epoch: binary.BigEndian.Uint64(raw[24:]), floor: binary.BigEndian.Uint64(raw[32:]),
		opened: getTime(raw[40:]), decided: getTime(raw[48:]), closed: getTime(raw[56:]),
		token: string(raw[65 : 65+token]), primary: names[:primary], backup: names[primary:],
	}, nil
}

// blockOf gives the record that says s of domain.
func blockOf(domain plugin.UUID, s state) block {
	b := block{
		kind: blockRecord, domain: domain, epoch: uint64(s.rec.Epoch), floor: uint64(s.floor),
		opened: s.rec.OpenedAt, decided: s.rec.DecidedAt, closed: s.rec.ClosedAt,
		token: s.token, primary: s.rec.Primary, backup: s.rec.Backup,
	}
	switch s.rec.Owner {
	case "":
	case s.rec.Primary:
		b.flags |= flagPrimary
	default:
		b.flags |= flagBackup
	}
	if s.rec.Closed {
		b.flags |= flagClosed
	}
	return b
}

// state is the inverse of blockOf.
func (b block) state(path string) (state, error) {
	s := state{floor: plugin.Epoch(b.floor), token: b.token}
	if b.epoch == 0 {
		return s, nil
	}
	s.rec = Record{
		Domain: b.domain, Epoch: plugin.Epoch(b.epoch), Primary: b.primary, Backup: b.backup,
		Closed: b.flags&flagClosed != 0, OpenedAt: b.opened, DecidedAt: b.decided, ClosedAt: b.closed,
	}
	switch b.flags & (flagPrimary | flagBackup) {
	case 0:
	case flagPrimary:
		s.rec.Owner = b.primary
	case flagBackup:
		s.rec.Owner = b.backup
	default:
		return state{}, &CorruptError{Path: path, Reason: "it has two owners"}
	}
	if reason := s.flaw(b.domain); reason != "" {
		return state{}, &CorruptError{Path: path, Reason: reason}
	}
	return s, nil
}
