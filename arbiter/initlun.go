// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"ftvirt.org/ftvirt/arbiter/scsi"
)

// scratchBlock is where InitLUN tries out what the device does.
const scratchBlock = 1

// Races that InitLUN runs for the scratch block. A target that reads, compares
// and writes in several threads without a lock loses one in the first few.
const (
	probeRounds     = 64
	probeContenders = 8
)

// zeroChunk is how many blocks are read at a time to see that they are free.
const zeroChunk = 64

// LUNInfo is what InitLUN found, or made.
type LUNInfo struct {
	// ID is the random identity that all hosts must see.
	ID string
	// Device is what the device says it is.
	Device scsi.Identity
	// Reservation tells that decisions use persistent reservations, because
	// of Why.
	Reservation bool
	Why         string
	// Resets tells that the commands of a host that is preempted are ended by a
	// reset of the device, which has no PREEMPT AND ABORT.
	Resets bool
	// Domains is for how many domains there is room.
	Domains int
}

// InitLUN makes a LUN of zeroes an arbiter's, once. Repeating it, from any host,
// changes nothing and returns the same. It tries out whether COMPARE AND WRITE
// is there and is atomic, since not every target's is. It wraps ErrInvalid if
// the LUN holds something, is too small, or has no means of deciding.
func InitLUN(ctx context.Context, cfg LUNConfig) (LUNInfo, error) {
	l, err := newLUN(cfg)
	if err != nil {
		return LUNInfo{}, err
	}
	g := &guard{limit: 1, timeout: cmp.Or(cfg.Timeout, time.Minute)}
	return do(ctx, g, "initialising arbiter device "+l.path, func(ctx context.Context) (LUNInfo, error) {
		return l.init(ctx, cfg.Reservation)
	})
}

func (l *lun) init(ctx context.Context, reservation bool) (LUNInfo, error) {
	u, err := l.unit(ctx)
	if err != nil {
		return LUNInfo{}, err
	}
	var info LUNInfo
	if err := attentive(func() (err error) {
		info.Device, err = u.Inquiry(ctx)
		return err
	}); err != nil {
		return LUNInfo{}, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if info.Device.Type != 0 {
		return LUNInfo{}, fmt.Errorf("%w: %s is no disk, its device type is %d", ErrInvalid, l.path, info.Device.Type)
	}
	if u.Blocks < firstSlot+2*minSlots {
		return LUNInfo{}, fmt.Errorf("%w: %s has %d blocks, at least %d are needed", ErrInvalid, l.path, u.Blocks, firstSlot+2*minSlots)
	}
	u.slots = min(maxSlots, (u.Blocks-firstSlot)/2)
	header, err := u.read(ctx, 0)
	if err != nil {
		return LUNInfo{}, err
	}
	if isFree(header) {
		if u.untold {
			return LUNInfo{}, fmt.Errorf("%w: %s: %w; if no other host is initialising it, somebody uses it for something else",
				ErrUnavailable, l.path, scsi.ErrReserved)
		}
		if err := u.checkFree(ctx); err != nil {
			return LUNInfo{}, err
		}
		if info.Why, err = u.choose(ctx, reservation); err != nil {
			return LUNInfo{}, err
		}
		if header, err = u.writeHeader(ctx, header); err != nil {
			return LUNInfo{}, err
		}
	}
	if err := u.accept(header); err != nil {
		return LUNInfo{}, fmt.Errorf("%w: %s holds something else; if that is not needed, overwrite it with zeroes: %w", ErrInvalid, l.path, err)
	}
	if l.id != "" && l.id != u.identity {
		return LUNInfo{}, fmt.Errorf("%w: %s has identity %s, expected %s", ErrInvalid, l.path, u.identity, l.id)
	}
	info.ID, info.Reservation, info.Domains = u.identity, u.mode == modeReservation, int(u.slots)
	if info.Reservation {
		info.Resets, err = u.tryReservation(ctx)
	}
	return info, err
}

// checkFree makes sure that nothing is lost by using the LUN, and that all
// slots are free.
func (u unit) checkFree(ctx context.Context) error {
	end := u.record(u.slots)
	for lba := uint64(firstSlot); lba < end; lba += zeroChunk {
		raw := make([]byte, int(min(zeroChunk, end-lba))*u.size)
		if err := attentive(func() error { return u.Read(ctx, lba, raw, u.size) }); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrUnavailable, u.where(lba), err)
		}
		if !isFree(raw) {
			return fmt.Errorf("%w: %s holds something in its blocks %d to %d; if that is not needed, overwrite it with zeroes",
				ErrInvalid, u.path, lba, lba+zeroChunk-1)
		}
	}
	return nil
}

// choose sets the mode in which decisions are made, and tells why it is not the
// better one.
func (u *unit) choose(ctx context.Context, reservation bool) (why string, err error) {
	why = "asked for"
	if !reservation {
		if why, err = u.probe(ctx); err != nil || why == "" {
			u.mode = modeCompareAndWrite
			return "", err
		}
	}
	if u.cached && !u.fua {
		// Under a reservation, a host that reads cannot flush the cache that
		// another host's write may be in.
		return "", fmt.Errorf("%w: %s cannot decide: %s; reservations: its write cache cannot be bypassed, switch that off",
			ErrInvalid, u.path, why)
	}
	u.mode = modeReservation
	resets, err := u.tryReservation(ctx)
	if errors.Is(err, scsi.ErrUnsupported) {
		return "", fmt.Errorf("%w: %s cannot decide: %s; reservations: %w", ErrInvalid, u.path, why, err)
	}
	if err == nil && resets {
		if err := u.reset(ctx); err != nil {
			return "", fmt.Errorf("%w: %s cannot decide: %s; reservations: it has no PREEMPT AND ABORT, and this host cannot reset it: %w",
				ErrInvalid, u.path, why, err)
		}
	}
	return why, err
}

// tryReservation writes the scratch block under a reservation, and finds out how
// the commands of a holder that is preempted are ended.
func (u unit) tryReservation(ctx context.Context) (resets bool, err error) {
	for done := false; !done; {
		raw, err := u.read(ctx, scratchBlock)
		if err != nil {
			return false, err
		}
		if done, err = u.swap(ctx, scratchBlock, raw, u.noise()); err != nil {
			return false, err
		}
	}
	unlock, err := u.Lock(ctx)
	if err != nil {
		return false, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	defer unlock()
	own := newReservationKey() &^ keyBusy
	if err = attentive(func() error { return u.Register(ctx, own) }); err == nil {
		resets, err = u.needsReset(ctx, own)
	}
	if err != nil {
		err = fmt.Errorf("%w: %s: %w", ErrUnavailable, u.path, err)
	}
	return resets, err
}

// noise is a block that no other call made.
func (u unit) noise() []byte {
	raw := make([]byte, u.size)
	copy(raw, newToken())
	return raw
}

// probe finds out whether COMPARE AND WRITE can be trusted, and if not why.
func (u unit) probe(ctx context.Context) (why string, err error) {
	swap := func(old, next []byte) error {
		return attentive(func() error { return u.CompareAndWrite(ctx, scratchBlock, old, next) })
	}
	for round := range probeRounds {
		old, err := u.read(ctx, scratchBlock)
		if err != nil {
			return "", err
		}
		if round == 0 {
			switch err := swap(u.noise(), u.noise()); {
			case errors.Is(err, scsi.ErrUnsupported):
				return fmt.Sprintf("the device has no COMPARE AND WRITE (%v)", err), nil
			case err == nil:
				return "the device's COMPARE AND WRITE does not compare", nil
			case !errors.Is(err, scsi.ErrMiscompare):
				return "", fmt.Errorf("%w: %s: %w", ErrUnavailable, u.path, err)
			}
		}
		var racers sync.WaitGroup
		errs := make([]error, probeContenders)
		next := make([][]byte, probeContenders)
		for i := range errs {
			next[i] = u.noise()
			racers.Go(func() { errs[i] = swap(old, next[i]) })
		}
		racers.Wait()
		now, err := u.read(ctx, scratchBlock)
		if err != nil {
			return "", err
		}
		winners := 0
		for i, err := range errs {
			switch {
			case err == nil:
				winners++
				if winners > 1 || !bytes.Equal(now, next[i]) {
					return "the device's COMPARE AND WRITE is not atomic", nil
				}
			case !errors.Is(err, scsi.ErrMiscompare):
				return "", fmt.Errorf("%w: %s: %w", ErrUnavailable, u.path, err)
			}
		}
		if winners == 0 {
			return "", fmt.Errorf("%w: another host is initialising %s; ask again", ErrUnavailable, u.path)
		}
	}
	return "", nil
}

// writeHeader makes the LUN an arbiter's, and gives the header that it has then:
// another host may have been faster.
func (u unit) writeHeader(ctx context.Context, free []byte) ([]byte, error) {
	flags := u.mode
	if u.fua {
		flags |= flagFUA
	}
	raw, err := block{
		kind: blockHeader, flags: flags, epoch: u.slots, opened: timestamp(), token: newToken(),
	}.encode(u.size)
	if err != nil {
		return nil, err
	}
	done, err := u.swap(ctx, 0, free, raw)
	if err != nil {
		return nil, err
	}
	if done {
		return raw, u.sync(ctx)
	}
	return u.read(ctx, 0)
}
