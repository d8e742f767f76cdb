// SPDX-License-Identifier: Apache-2.0

package detect

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"

	"ftvirt.org/ftvirt/plugin"
)

// A heartbeat is one datagram of Size bytes, all numbers big-endian:
//
//	offset  size
//	     0     4  magic "FTHB"
//	     4     1  version, 1
//	     5     1  flags
//	     6     2  zero
//	     8    16  domain UUID
//	    24     8  epoch
//	    32     8  sender: random, made when the sender registered the pair
//	    40     8  sequence: grows with each datagram of the pair's sender
//	    48    16  HMAC-SHA256 over bytes 0-47 with the pair's key, cut to 16
const (
	// Version of the datagram's format.
	Version = 1
	// Size of a datagram in bytes.
	Size = 64
	// MinKey is the least length of a pair's key in bytes.
	MinKey = 16

	magic   = "FTHB"
	macSize = 16
	signed  = Size - macSize
)

var (
	// ErrDatagram: the bytes are not a heartbeat of this version.
	ErrDatagram = errors.New("not a heartbeat")
	// ErrForged: the authentication code is not that of the pair's key.
	ErrForged = errors.New("heartbeat is not authentic")
	// ErrReplayed: the datagram was seen before, is too old, or is our own.
	ErrReplayed = errors.New("heartbeat is replayed")
)

// What is wrong with a datagram is said once, here, not put together for each:
// garbage must be cheap.
var (
	errSize     = fmt.Errorf("%w: not %d bytes", ErrDatagram, Size)
	errMagic    = fmt.Errorf("%w: wrong magic", ErrDatagram)
	errVersion  = fmt.Errorf("%w: not version %d", ErrDatagram, Version)
	errReserved = fmt.Errorf("%w: reserved bytes are set", ErrDatagram)
)

// Flags tell in each heartbeat how things are at its sender's.
type Flags uint8

const (
	// QEMUAlive: the sender's QEMU process of the domain runs.
	QEMUAlive Flags = 1 << iota
	// Stopping: the sender's agent or host is about to stop.
	Stopping
	// PoweredOff: the domain was stopped on purpose.
	PoweredOff
	// ServiceLost: the sender's links to the domain's clients are down.
	ServiceLost
	knownFlags = QEMUAlive | Stopping | PoweredOff | ServiceLost
)

func (f Flags) String() string {
	text := ""
	for _, n := range []struct {
		flag Flags
		name string
	}{{QEMUAlive, "qemu-alive"}, {Stopping, "stopping"}, {PoweredOff, "powered-off"}, {ServiceLost, "service-lost"}, {^knownFlags, "unknown"}} {
		if f&n.flag != 0 {
			if text != "" {
				text += ","
			}
			text += n.name
		}
	}
	if text == "" {
		return "none"
	}
	return text
}

// Datagram is a heartbeat's contents.
type Datagram struct {
	// Flags that this version does not know are kept: they are a later
	// version's business.
	Flags    Flags
	Domain   plugin.UUID
	Epoch    plugin.Epoch
	Sender   uint64
	Sequence uint64
}

// append encodes d, without its authentication code, at the end of b.
func (d Datagram) append(b []byte) []byte {
	b = append(b, magic...)
	b = append(b, Version, byte(d.Flags), 0, 0)
	b = append(b, d.Domain[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(d.Epoch))
	b = binary.BigEndian.AppendUint64(b, d.Sender)
	return binary.BigEndian.AppendUint64(b, d.Sequence)
}

// Decode reads a datagram. It says nothing about who sent it: see signer.
func Decode(b []byte) (Datagram, error) {
	switch {
	case len(b) != Size:
		return Datagram{}, errSize
	case string(b[:4]) != magic:
		return Datagram{}, errMagic
	case b[4] != Version:
		return Datagram{}, errVersion
	case b[6] != 0 || b[7] != 0:
		return Datagram{}, errReserved
	}
	return Datagram{
		Flags:    Flags(b[5]),
		Domain:   plugin.UUID(b[8:24]),
		Epoch:    plugin.Epoch(binary.BigEndian.Uint64(b[24:])),
		Sender:   binary.BigEndian.Uint64(b[32:]),
		Sequence: binary.BigEndian.Uint64(b[40:]),
	}, nil
}

// signer makes and checks authentication codes with one pair's key, without
// allocating for each datagram.
type signer struct {
	mac hash.Hash
	sum [sha256.Size]byte
}

func newSigner(key []byte) *signer { return &signer{mac: hmac.New(sha256.New, key)} }

func (s *signer) code(b []byte) []byte {
	s.mac.Reset()
	s.mac.Write(b[:signed])
	return s.mac.Sum(s.sum[:0])[:macSize]
}

// sign encodes d with its code at the end of b.
func (s *signer) sign(b []byte, d Datagram) []byte {
	b = d.append(b)
	return append(b, s.code(b[len(b)-signed:])...)
}

// authentic tells whether the code of the datagram b, of Size bytes, is right.
func (s *signer) authentic(b []byte) bool { return hmac.Equal(s.code(b), b[signed:Size]) }

// window remembers which sequence numbers came, so that none counts twice. A
// datagram may be overtaken by up to 63 others and still count.
type window struct {
	highest uint64
	// recent has bit n set if highest-n came.
	recent uint64
}

// accept tells whether the number is new, and remembers it.
func (w *window) accept(sequence uint64) bool {
	switch {
	case sequence == 0:
		return false
	case sequence > w.highest:
		// A shift by 64 or more gives 0, as it should.
		w.recent = w.recent<<(sequence-w.highest) | 1
		w.highest = sequence
		return true
	case w.highest-sequence >= 64:
		return false
	default:
		bit := uint64(1) << (w.highest - sequence)
		if w.recent&bit != 0 {
			return false
		}
		w.recent |= bit
		return true
	}
}
