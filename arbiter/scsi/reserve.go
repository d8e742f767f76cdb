// SPDX-License-Identifier: Apache-2.0

package scsi

import (
	"context"
	"encoding/binary"
	"fmt"
)

// Key is a reservation key. Zero is none.
type Key uint64

// WriteExclusive is the type of reservation under which everybody reads and
// the holder alone writes (SPC-4, 5.12.3).
const WriteExclusive = 0x1

// Reservation is the persistent reservation of a device (SPC-4, 6.15.3). The
// zero Reservation stands for none.
type Reservation struct {
	Holder Key
	Type   byte
}

// Service actions of PERSISTENT RESERVE IN and OUT (SPC-4, 6.15 and 6.16).
const (
	prReadReservation   = 0x01
	prRegister          = 0x00
	prReserve           = 0x01
	prPreempt           = 0x04
	prPreemptAndAbort   = 0x05
	prRegisterAndIgnore = 0x06
)

// ReadReservation tells who holds the device.
func (d Device) ReadReservation(ctx context.Context) (Reservation, error) {
	in, cdb := make([]byte, 24), make([]byte, 10)
	cdb[0], cdb[1] = opPersistentIn, prReadReservation
	binary.BigEndian.PutUint16(cdb[7:], uint16(len(in)))
	n, err := d.do(ctx, "read reservation", Command{CDB: cdb, In: in})
	if err != nil {
		return Reservation{}, err
	}
	if n < 8 {
		return Reservation{}, fmt.Errorf("scsi read reservation: %w: %d bytes", ErrShort, n)
	}
	if binary.BigEndian.Uint32(in[4:]) == 0 {
		return Reservation{}, nil
	}
	if n < len(in) {
		return Reservation{}, fmt.Errorf("scsi read reservation: %w: %d bytes of %d", ErrShort, n, len(in))
	}
	return Reservation{Holder: Key(binary.BigEndian.Uint64(in[8:])), Type: in[21] & 0x0F}, nil
}

// reserveOut does PERSISTENT RESERVE OUT. It fails with ErrReserved if own is
// not this host's registered key, where that matters.
func (d Device) reserveOut(ctx context.Context, op string, action, kind byte, own, other Key) error {
	cdb, out := make([]byte, 10), make([]byte, 24)
	cdb[0], cdb[1], cdb[2] = opPersistentOut, action, kind
	binary.BigEndian.PutUint32(cdb[5:], uint32(len(out)))
	binary.BigEndian.PutUint64(out, uint64(own))
	binary.BigEndian.PutUint64(out[8:], uint64(other))
	_, err := d.do(ctx, op, Command{CDB: cdb, Out: out})
	return err
}

// Register registers this host with key, whether it was registered or not. A
// reservation that it holds stays its own, under the new key.
func (d Device) Register(ctx context.Context, key Key) error {
	return d.reserveOut(ctx, "register", prRegisterAndIgnore, 0, 0, key)
}

// Reregister changes this host's key if it is old.
func (d Device) Reregister(ctx context.Context, old, key Key) error {
	return d.reserveOut(ctx, "change key", prRegister, 0, old, key)
}

// Reserve takes the write-exclusive reservation if nobody else has it.
func (d Device) Reserve(ctx context.Context, own Key) error {
	return d.reserveOut(ctx, "reserve", prReserve, WriteExclusive, own, 0)
}

// Preempt takes the reservation from the holder with key victim, and removes
// its registration, in one step. It fails with ErrReserved if that key is gone.
// Commands that the device took from the holder before may still be carried out.
func (d Device) Preempt(ctx context.Context, own, victim Key) error {
	return d.reserveOut(ctx, "preempt", prPreempt, WriteExclusive, own, victim)
}

// PreemptAndAbort is Preempt that also aborts the holder's commands, and returns
// when none of them is left (SPC-4, 5.12.11.5). Not every device has it.
func (d Device) PreemptAndAbort(ctx context.Context, own, victim Key) error {
	return d.reserveOut(ctx, "preempt and abort", prPreemptAndAbort, WriteExclusive, own, victim)
}
