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
// is at work, or was when it was last heard of. They serve as a lock that the
// device enforces: whoever preempts the holder takes from it, in one step, the
// right to write.
//
// A write that the device took while its sender held the reservation is carried
// out all the same, however much later. So a busy holder's commands are aborted
// by whoever takes its place, before that one reads. A key changes to one that
// is not busy only when no write is left unanswered: devices find the commands to
// abort by the key under which they came, and there is nothing to abort then.
const keyBusy = 1

// busyPatience is how long a holder at work is waited for at least. It is no
// matter of safety: a holder that is preempted while at work, and its commands
// aborted, starts over. But
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
		// What was aborted may have come through: that is looked at again.
		if !errors.Is(err, errPreempted) && !errors.Is(err, scsi.ErrReserved) && !errors.Is(err, scsi.ErrAttention) && !errors.Is(err, scsi.ErrAborted) {
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
	answered := true
	defer func() {
		// Those who wait need not run out of patience. If it fails, they do.
		if answered {
			_ = u.Reregister(context.WithoutCancel(ctx), own, own&^keyBusy)
		}
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
	var status *scsi.StatusError
	answered = err == nil || errors.As(err, &status)
	return err == nil, err
}

// reserve makes this host the holder, with the given key, while no other command
// of a holder before it can still write.
func (u unit) reserve(ctx context.Context, own scsi.Key) error {
	var before scsi.Reservation
	err := attentive(func() (err error) {
		before, err = u.ReadReservation(ctx)
		return err
	})
	if err == nil {
		err = attentive(func() error { return u.Register(ctx, own) })
	}
	if err != nil {
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
		case r.Holder == own && before.Holder&keyBusy != 0:
			// It was this host that was at work, before it was restarted
			// perhaps, or it preempted one whose commands could not be ended.
			if err := u.endCommands(ctx, own); err != nil {
				return err
			}
			before = scsi.Reservation{}
			continue
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
		if err := u.takeOver(ctx, own, r.Holder); err != nil {
			return err
		}
		before = scsi.Reservation{}
	}
}

// takeOver makes this host the holder in victim's place. If victim may have been
// at work, none of its commands is left.
func (u unit) takeOver(ctx context.Context, own, victim scsi.Key) error {
	preempt := u.PreemptAndAbort
	if victim&keyBusy == 0 {
		preempt = u.Preempt
	}
	err := preempt(ctx, own, victim)
	if errors.Is(err, scsi.ErrUnsupported) && victim&keyBusy != 0 {
		// The device has no such command. As own is busy, a reset that fails
		// now is made up for by whoever comes next.
		if err = u.Preempt(ctx, own, victim); err == nil {
			return u.reset(ctx)
		}
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errPreempted, err)
	}
	return nil
}

// endCommands makes sure that nothing of what this host sent before is left at
// the device.
func (u unit) endCommands(ctx context.Context, own scsi.Key) error {
	resets, err := u.needsReset(ctx, own)
	if err != nil || !resets {
		// This host's kernel aborts what it gives up, and the device what other
		// holders left when they were preempted.
		return err
	}
	return u.reset(ctx)
}

// needsReset tells that the device has no PREEMPT AND ABORT: it is asked to do that
// to a host that is not there.
func (u unit) needsReset(ctx context.Context, own scsi.Key) (bool, error) {
	err := attentive(func() error { return u.PreemptAndAbort(ctx, own, newReservationKey()) })
	switch {
	case errors.Is(err, scsi.ErrUnsupported):
		return true, nil
	case errors.Is(err, scsi.ErrReserved):
		return false, nil
	}
	return false, err
}

// reset ends all commands at the device, and takes note of the unit attention that
// this makes.
func (u unit) reset(ctx context.Context) error {
	if err := u.Reset(ctx); err != nil {
		return err
	}
	return attentive(func() error {
		_, err := u.ReadReservation(ctx)
		return err
	})
}

func newReservationKey() scsi.Key {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return scsi.Key(binary.BigEndian.Uint64(b[:])) | keyBusy
}
