// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"time"

	"ftvirt.org/ftvirt/arbiter/scsi"
)

// swap replaces the block at lba if it holds old, in one step, durably. It
// gives false if the block holds something else.
func (u unit) swap(ctx context.Context, lba uint64, old, next []byte) (bool, error) {
	if ctx.Err() != nil {
		return false, gone(ctx, "compare and write")
	}
	if u.mode == modeReservation {
		return u.swapReserved(ctx, lba, old, next)
	}
	err := attentive(func() error { return u.CompareAndWrite(ctx, lba, old, next) })
	switch {
	case err == nil:
		return true, nil
	case !errors.Is(err, scsi.ErrMiscompare):
		return false, fmt.Errorf("%w: %s: %w", ErrUnavailable, u.where(lba), err)
	}
	// An initiator repeats a command whose answer was lost, and then finds its
	// own write. No two states are the same, so what is there tells.
	now, err := u.read(ctx, lba)
	return bytes.Equal(now, next), err
}

// Reservation keys are random, but for the lowest bit: it tells that the holder
// is at work. They serve as a lock that the device enforces: whoever preempts
// the holder takes from it, in one step, the right to write.
const keyBusy = 1

// busyPatience is how long a holder at work is waited for at least. It is no
// matter of safety: a holder that is preempted while at work starts over. But
// hosts must not preempt each other for ever, so that storage on which one
// command takes long gets busyCommands times as long.
const (
	busyPatience = 200 * time.Millisecond
	busyCommands = 6
	busyPoll     = 5 * time.Millisecond
)

// errPreempted: the reservation went to another host while this one was at work.
var errPreempted = errors.New("reservation was preempted")

// swapReserved is swap with a write-exclusive reservation. From the moment at
// which this host got it to the end of the write, nobody else has written, or
// the device refuses the write.
func (u unit) swapReserved(ctx context.Context, lba uint64, old, next []byte) (bool, error) {
	unlock, err := u.Lock(ctx)
	if err != nil {
		return false, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	defer unlock()
	for {
		done, err := u.tryReserved(ctx, lba, old, next)
		// After a unit attention the reservation may have come and gone.
		if !errors.Is(err, errPreempted) && !errors.Is(err, scsi.ErrReserved) && !errors.Is(err, scsi.ErrAttention) {
			if err != nil {
				err = fmt.Errorf("%w: %s: %w", ErrUnavailable, u.where(lba), err)
			}
			return done, err
		}
		if err := pause(ctx, mathrand.N(2*busyPoll)); err != nil {
			return false, err
		}
	}
}

func (u unit) tryReserved(ctx context.Context, lba uint64, old, next []byte) (bool, error) {
	own := newReservationKey()
	if err := u.reserve(ctx, own); err != nil {
		return false, err
	}
	defer func() {
		// Those who wait need not run out of patience. If it fails, they do.
		_ = u.Reregister(context.WithoutCancel(ctx), own, own&^keyBusy)
	}()
	now := make([]byte, u.size)
	if err := u.Read(ctx, lba, now, u.size); err != nil {
		return false, err
	}
	if !bytes.Equal(now, old) {
		return bytes.Equal(now, next), nil
	}
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	err := u.Write(ctx, lba, next, u.size)
	return err == nil, err
}

// reserve makes this host the holder, with the given key.
func (u unit) reserve(ctx context.Context, own scsi.Key) error {
	if err := attentive(func() error { return u.Register(ctx, own) }); err != nil {
		return err
	}
	var waitsFor scsi.Key
	var until time.Time
	for {
		asked := time.Now()
		r, err := u.ReadReservation(ctx)
		if err != nil {
			return err
		}
		switch {
		case r == scsi.Reservation{}:
			if err := u.Reserve(ctx, own); err != nil {
				return err
			}
			continue // What the device says it holds is what counts.
		case r.Type != scsi.WriteExclusive:
			return fmt.Errorf("the LUN is reserved by somebody else, with type %d and key %x", r.Type, uint64(r.Holder))
		case r.Holder == own:
			return nil
		case r.Holder&keyBusy != 0 && (r.Holder != waitsFor || time.Now().Before(until)):
			if r.Holder != waitsFor {
				patience := max(busyPatience, busyCommands*time.Since(asked))
				waitsFor, until = r.Holder, time.Now().Add(patience+mathrand.N(patience))
			}
			if err := pause(ctx, busyPoll/2+mathrand.N(busyPoll)); err != nil {
				return err
			}
			continue
		}
		if err := u.Preempt(ctx, own, r.Holder); err != nil {
			return fmt.Errorf("%w: %w", errPreempted, err)
		}
	}
}

func newReservationKey() scsi.Key {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return scsi.Key(binary.BigEndian.Uint64(b[:])) | keyBusy
}
