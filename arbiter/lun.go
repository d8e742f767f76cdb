// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"ftvirt.org/ftvirt/arbiter/scsi"
	"ftvirt.org/ftvirt/plugin"
)

// LUNConfig configures the backend on a SCSI logical unit.
type LUNConfig struct {
	// Device is the block device of a LUN that all hosts see, best named by
	// its identity: /dev/disk/by-id/... It is used for nothing else, and made
	// ready by InitLUN. With several paths to it, name one of them: the kernel's
	// multipath device does not carry the commands. Required.
	Device string
	// ID is the LUN's identity as InitLUN gave it. If empty, the first one
	// that is seen is taken, and must not change afterwards.
	ID string
	// Timeout bounds each operation whose context sets no earlier deadline.
	// Default 5 s.
	Timeout time.Duration
	// MaxStuck is how many operations may hang in the kernel before further
	// ones fail at once. Default 8.
	MaxStuck int
	// Seen, if set, is what this host remembers, against which all that is read
	// is held.
	Seen *Seen
	// Reservation makes InitLUN choose persistent reservations where it would
	// choose COMPARE AND WRITE.
	Reservation bool
	// Transport replaces Device. For tests only.
	Transport scsi.Transport
}

// NewLUN gives the arbiter on a SCSI logical unit that both hosts reach, such as
// an iSCSI LUN. It decides by COMPARE AND WRITE of one block (SBC-4, 5.2), or,
// on a device that has no COMPARE AND WRITE or whose is not atomic, under a
// write-exclusive persistent reservation (SPC-4, 5.12); which of them is in the
// LUN's header, the same for all hosts. It does not touch the storage.
func NewLUN(cfg LUNConfig) (Arbiter, error) {
	l, err := newLUN(cfg)
	if err != nil {
		return nil, err
	}
	return registered{reg: l, seen: cfg.Seen, guard: &guard{
		limit:   cmp.Or(cfg.MaxStuck, 8),
		timeout: cmp.Or(cfg.Timeout, 5*time.Second),
	}}, nil
}

func newLUN(cfg LUNConfig) (*lun, error) {
	if cfg.Timeout < 0 || cfg.MaxStuck < 0 {
		return nil, fmt.Errorf("%w: negative limit for arbiter device %s", ErrInvalid, cfg.Device)
	}
	if (cfg.Device == "") == (cfg.Transport == nil) {
		return nil, fmt.Errorf("%w: no arbiter device", ErrInvalid)
	}
	return &lun{path: cfg.Device, id: cfg.ID, follow: cfg.Seen != nil, dev: scsi.Device{Transport: cfg.Transport}}, nil
}

// lun is the register on a logical unit.
type lun struct {
	path string
	// follow leaves it to others to notice another identity than before.
	follow bool

	mu  sync.Mutex
	dev scsi.Device // its Transport is nil until the device could be opened
	id  string      // the LUN's identity, empty until known
	// facts are what the device said of itself, nil until it did.
	facts *facts
}

// facts are what does not change while a device is there.
type facts struct {
	scsi.Capacity
	// fua tells that the device can be made to read from and write to the
	// medium, cached that it does not do so of itself.
	fua, cached bool
	// untold tells that neither is known, because a device that another host
	// has reserved does not say it. Then the header does.
	untold bool
}

// geometry is what the header and the capacity say.
type geometry struct {
	size  int // of a block, in bytes
	slots uint64
	mode  uint16
	// identity is the random one that InitLUN gave.
	identity string
}

func (g geometry) record(slot uint64) uint64 { return firstSlot + 2*slot }
func (g geometry) mark(slot uint64) uint64   { return firstSlot + 2*slot + 1 }

// where names a block in messages.
func (l *lun) where(lba uint64) string { return fmt.Sprintf("%s block %d", l.path, lba) }

// device opens the device if it was not there before.
func (l *lun) device() (scsi.Device, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dev.Transport == nil {
		sg, err := scsi.OpenSG(l.path)
		if err != nil {
			return scsi.Device{}, fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		l.dev.Transport = sg
	}
	return l.dev, nil
}

// unit is the LUN in one operation, with its header read.
type unit struct {
	*lun
	scsi.Device
	geometry
	facts
}

// unit gives the LUN with its facts, which are asked for once.
func (l *lun) unit(ctx context.Context) (unit, error) {
	dev, err := l.device()
	if err != nil {
		return unit{}, err
	}
	l.mu.Lock()
	f := l.facts
	l.mu.Unlock()
	if f == nil {
		f = &facts{}
		err := attentive(func() (err error) {
			f.Capacity, err = dev.ReadCapacity(ctx)
			return err
		})
		if err == nil {
			err = attentive(func() (err error) {
				f.fua, f.cached, err = dev.Caching(ctx)
				return err
			})
		}
		if errors.Is(err, scsi.ErrReserved) {
			f.untold, err = true, nil
		}
		if err != nil {
			l.reopen(dev)
			return unit{}, fmt.Errorf("%w: %s: %w", ErrUnavailable, l.path, err)
		}
		if !f.untold {
			l.mu.Lock()
			l.facts = f
			l.mu.Unlock()
		}
	}
	dev.FUA = f.fua
	return unit{lun: l, Device: dev, facts: *f, geometry: geometry{size: f.BlockSize}}, nil
}

// attach reads the header, and makes sure that it is the LUN known before.
func (l *lun) attach(ctx context.Context) (unit, error) {
	u, err := l.unit(ctx)
	if err != nil {
		return unit{}, err
	}
	raw, err := u.read(ctx, 0)
	if err != nil {
		// The disk may have gone, and come back as another device file.
		l.reopen(u.Device)
		return unit{}, err
	}
	if isFree(raw) {
		return unit{}, fmt.Errorf("%w: %s: %w", ErrUnavailable, l.path, ErrNotInitialised)
	}
	if err := u.accept(raw); err != nil {
		return unit{}, err
	}
	l.mu.Lock()
	if !l.follow {
		l.id = cmp.Or(l.id, u.identity)
	}
	known := l.id
	l.mu.Unlock()
	if known != "" && known != u.identity {
		return unit{}, fmt.Errorf("%w: device %s has identity %s, it had %s before; is it another LUN?", ErrUnavailable, l.path, u.identity, known)
	}
	return u, nil
}

// reopen lets the device go, whose file is of no use once the kernel dropped
// the disk behind it.
func (l *lun) reopen(dev scsi.Device) {
	sg, ok := dev.Transport.(*scsi.SG)
	if !ok {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dev.Transport == dev.Transport {
		l.dev.Transport, l.facts = nil, nil
		_ = sg.Close()
	}
}

// accept takes the geometry from a header.
func (u *unit) accept(raw []byte) error {
	h, err := decodeBlock(raw, u.where(0), blockHeader)
	if err != nil {
		return err
	}
	mode := h.flags &^ flagFUA
	switch {
	case mode != modeCompareAndWrite && mode != modeReservation:
		return &CorruptError{Path: u.where(0), Reason: fmt.Sprintf("mode %d is not known", h.flags)}
	case u.untold && mode == modeCompareAndWrite:
		return fmt.Errorf("%w: %s: somebody who is no arbiter holds it: %w", ErrUnavailable, u.path, scsi.ErrReserved)
	case u.untold:
		// A device in this mode takes FUA, or InitLUN found no cache.
		u.fua, u.cached = h.flags&flagFUA != 0, false
		u.FUA = u.fua
	}
	if h.epoch == 0 || h.epoch > maxSlots || firstSlot+2*h.epoch > u.Blocks {
		return &CorruptError{Path: u.where(0), Reason: fmt.Sprintf("%d slots on a device of %d blocks", h.epoch, u.Blocks)}
	}
	u.mode, u.slots, u.identity = mode, h.epoch, h.token
	return nil
}

// place is a slot as it was read: the one of a domain, one that it could have,
// or one of another domain.
type place struct {
	slot uint64
	// raw is the record's block; free tells that it is nobody's, mine that
	// record or mark say that it is the domain's.
	raw        []byte
	free, mine bool
	state      state
	// corrupt is why the record cannot be trusted. Then mark is the newest
	// epoch that may have existed, 0 if that is not known either.
	corrupt error
	mark    plugin.Epoch
}

// find looks for domain's slot. Slots are taken in a domain's own order and never
// given back, so the first free one ends the search.
func (u unit) find(ctx context.Context, domain plugin.UUID) (place, error) {
	var doubt error
	start := binary.BigEndian.Uint64(domain[:8]) ^ binary.BigEndian.Uint64(domain[8:])
	for i := range u.slots {
		p, err := u.look(ctx, (start+i)%u.slots, domain)
		switch {
		case err != nil:
			return place{}, err
		case p.free && doubt == nil, p.mine:
			return p, nil
		case p.free:
			return place{}, doubt
		case p.corrupt != nil && p.mark == 0:
			doubt = p.corrupt // Whose it was, nothing tells.
		}
	}
	if doubt != nil {
		return place{}, doubt
	}
	return place{}, fmt.Errorf("%w: the LUN's %d slots are all in use", ErrUnavailable, u.slots)
}

// look reads one slot.
func (u unit) look(ctx context.Context, slot uint64, domain plugin.UUID) (place, error) {
	p := place{slot: slot}
	path := u.where(u.record(slot))
	var mark []byte
	for {
		var err error
		if p.raw, err = u.read(ctx, u.record(slot)); err != nil {
			return place{}, err
		}
		if !isFree(p.raw) {
			b, err := decodeBlock(p.raw, path, blockRecord)
			if err == nil && b.domain != domain {
				return p, nil
			}
			if err == nil {
				p.mine = true
				p.state, err = b.state(path)
			}
			if p.corrupt = err; err == nil {
				return p, nil
			}
		}
		// The slot is taken before it is marked. So a record of zeroes that
		// has a mark was lost, unless both came about since it was read.
		if mark != nil {
			break
		}
		if mark, err = u.read(ctx, u.mark(slot)); err != nil {
			return place{}, err
		}
		if p.corrupt == nil && isFree(mark) {
			p.free = true
			return p, nil
		}
	}
	p.corrupt = cmp.Or(p.corrupt, error(&CorruptError{Path: path, Reason: "it is empty, but its mark is not"}))
	if m, err := decodeBlock(mark, u.where(u.mark(slot)), blockMark); err == nil {
		p.mark, p.mine = plugin.Epoch(m.epoch), m.domain == domain
	}
	return p, nil
}

func (l *lun) update(ctx context.Context, domain plugin.UUID, change func(state) (state, error)) error {
	u, err := l.attach(ctx)
	if err != nil {
		return err
	}
	for {
		p, err := u.find(ctx, domain)
		if err != nil {
			return err
		}
		if p.corrupt != nil {
			return p.corrupt
		}
		p.state.from = u.identity
		next, err := change(p.state)
		if err != nil || next == p.state {
			// Whoever wrote it may have crashed before it was durable.
			if syncErr := u.sync(ctx); syncErr != nil {
				return syncErr
			}
			return err
		}
		done, err := u.move(ctx, domain, p, next)
		if done || err != nil {
			return err
		}
	}
}

// move stores next in place of what p has, or reports that p has changed.
func (u unit) move(ctx context.Context, domain plugin.UUID, p place, next state) (done bool, err error) {
	if p.free {
		// The slot is taken first, or two domains could mark the same one.
		_, err := u.swapState(ctx, domain, p, state{})
		return false, err
	}
	if next.newest() > p.state.newest() {
		if err := u.raiseMark(ctx, domain, p.slot, next.newest()); err != nil {
			return false, err
		}
	}
	if done, err = u.swapState(ctx, domain, p, next); done {
		return true, u.sync(ctx)
	}
	return false, err
}

func (u unit) swapState(ctx context.Context, domain plugin.UUID, p place, next state) (bool, error) {
	raw, err := blockOf(domain, next).encode(u.size)
	if err != nil {
		return false, err
	}
	return u.swap(ctx, u.record(p.slot), p.raw, raw)
}

// raiseMark notes that epochs up to newest may be given out.
func (u unit) raiseMark(ctx context.Context, domain plugin.UUID, slot uint64, newest plugin.Epoch) error {
	want, err := block{kind: blockMark, domain: domain, epoch: uint64(newest)}.encode(u.size)
	if err != nil {
		return err
	}
	for {
		raw, err := u.read(ctx, u.mark(slot))
		if err != nil {
			return err
		}
		m, err := decodeBlock(raw, u.where(u.mark(slot)), blockMark)
		if err == nil && m.domain == domain && m.epoch >= uint64(newest) {
			return nil
		}
		if done, err := u.swap(ctx, u.mark(slot), raw, want); done || err != nil {
			return err
		}
	}
}

func (l *lun) forget(ctx context.Context, domain plugin.UUID) error {
	u, err := l.attach(ctx)
	if err != nil {
		return err
	}
	for {
		p, err := u.find(ctx, domain)
		if err != nil {
			return err
		}
		next := p.state.forget()
		if p.corrupt != nil {
			next = state{floor: p.mark}
		}
		if p.free || p.corrupt == nil && next == p.state {
			return u.sync(ctx)
		}
		if done, err := u.move(ctx, domain, p, next); done || err != nil {
			return err
		}
	}
}

// probe writes the scratch block. If another host was faster, that does as well.
func (l *lun) probe(ctx context.Context) error {
	u, err := l.attach(ctx)
	if err != nil {
		return err
	}
	raw, err := u.read(ctx, scratchBlock)
	if err != nil {
		return err
	}
	_, err = u.swap(ctx, scratchBlock, raw, u.noise())
	return err
}

// read reads one block.
func (u unit) read(ctx context.Context, lba uint64) ([]byte, error) {
	raw := make([]byte, u.size)
	err := attentive(func() error { return u.Read(ctx, lba, raw, u.size) })
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrUnavailable, u.where(lba), err)
	}
	return raw, nil
}

// sync makes what was read or written durable, where FUA does not see to it.
func (u unit) sync(ctx context.Context) error {
	if u.fua || !u.cached {
		return nil
	}
	if ctx.Err() != nil {
		return gone(ctx, "synchronize cache")
	}
	if err := attentive(func() error { return u.Sync(ctx) }); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrUnavailable, u.path, err)
	}
	return nil
}

// maxAttentions bounds what a device may have to tell.
const maxAttentions = 1000

// attentive repeats a command that was not carried out because the device had
// something else to tell first, as it does after each login or reset. Some keep
// one for each reset by another host.
func attentive(command func() error) error {
	for range maxAttentions {
		if err := command(); !errors.Is(err, scsi.ErrAttention) {
			return err
		}
	}
	return command()
}
