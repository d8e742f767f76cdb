// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"ftvirt.org/ftvirt/migrate"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/pair"
	"ftvirt.org/ftvirt/plugin/virt"
)

// ErrPaused: a domain that stands still cannot be given a backup, which would
// make it go on.
var ErrPaused = errors.New("the domain is paused")

// pauseError says what to do about a domain that is paused.
func pauseError(name, why string) error {
	if why == control.PauseIOError {
		return fmt.Errorf("%w, since a request to one of its disks failed: give the disk room, or mend it, and run 'virsh resume %s'", ErrPaused, name)
	}
	return fmt.Errorf("%w (%s): run 'virsh resume %s'", ErrPaused, why, name)
}

// pauseGrace is how long a backup may be paused, by something else than an error
// of its disk, before that is told: some commands pause a domain for a moment.
const pauseGrace = 500 * time.Millisecond

// watchPause tells the machine of a copy that QEMU paused, and of its resumption,
// in order. A primary may be paused by hand: its backup waits, as it should.
func (d *domain) watchPause(ctx context.Context, v *vm) {
	var told, seen string
	var since time.Time
	for {
		v.mu.Lock()
		why, mode, changed := v.pause, v.state.Mode, v.changed
		v.mu.Unlock()
		if why != seen {
			seen, since = why, time.Now()
		}
		due, wait := true, (<-chan time.Time)(nil)
		if rest := pauseGrace - time.Since(since); why != "" && why != control.PauseIOError && rest > 0 {
			due, wait = false, time.After(rest)
		}
		if due && why != told && (why == "" || why == control.PauseIOError || mode == control.ModeReplay) {
			d.tellPause(v, why)
			told = why
		}
		select {
		case <-changed:
		case <-wait:
		case <-v.done:
			return
		case <-ctx.Done():
			return
		}
	}
}

func (d *domain) tellPause(v *vm, why string) {
	if _, now, _, _ := d.snapshot(); now != v {
		return
	}
	ev := pair.Event{Kind: pair.EventLocalPaused, Reason: pair.Paused}
	switch why {
	case "":
		ev = pair.Event{Kind: pair.EventLocalResumed}
		d.a.log.Info("the domain's QEMU goes on", "domain", d.label())
	case control.PauseIOError:
		ev.Reason = pair.IOError
		d.noteDiskFailed()
		d.a.log.Error("the domain's QEMU is paused: a request to one of its disks failed", "domain", d.label())
	default:
		d.a.log.Warn("the domain's QEMU is paused", "domain", d.label(), "by", why)
	}
	d.post(ev)
}

// diskFailed takes libvirt's word that a request to a disk failed. If the guest
// was told of it, the other copy's guest was not.
func (a *Agent) diskFailed(e virt.DiskError) {
	a.mu.Lock()
	d := a.domains[e.UUID]
	a.mu.Unlock()
	if d == nil {
		return
	}
	a.log.Error("a request to a disk failed", "domain", d.label(), "image", e.Path, "reason", e.Reason, "guest_was_told", e.Told)
	d.noteDiskFailed()
	if e.Told {
		// libvirt's event loop calls this.
		go d.post(pair.Event{Kind: pair.EventLocalUnfit, Reason: pair.IOError})
	}
}

// noteDiskFailed notes that a disk of the copy here failed.
func (d *domain) noteDiskFailed() {
	if _, _, _, b := d.snapshot(); b != nil {
		b.diskFailed.Store(true)
	}
}

// leastRoom is how much room there must be for a copy, paused for want of it, to
// be worth another try.
const leastRoom = 8 << 20

// resumePaused lets a copy try again that is to go live and is paused.
func (d *domain) resumePaused(ctx context.Context, v *vm) {
	d.mu.Lock()
	busy := d.resuming
	d.resuming = true
	d.mu.Unlock()
	if busy {
		return
	}
	d.a.wg.Go(func() {
		defer func() {
			d.mu.Lock()
			d.resuming = false
			d.mu.Unlock()
		}()
		if v == nil {
			return
		}
		why := v.reports().pause
		if free, err := migrate.Free(d.a.cfg.Clone.DiskDir); why == "" || why == control.PauseIOError && err == nil && free < leastRoom {
			return // it would only fail once more
		}
		ctx, cancel := context.WithTimeout(ctx, controlTimeout)
		defer cancel()
		if err := d.a.virt.Resume(ctx, d.id); err != nil {
			d.a.log.Warn("the copy that is to go live cannot go on", "domain", d.label(), "paused_by", why, "error", err)
		}
	})
}
