// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"errors"
	"fmt"
	"time"

	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// A guest that reboots begins a new life: its connections break, and its memory is
// gone, and both are its own doing. What it said to be on its disk must be there
// nevertheless, whichever host it boots on.

// pastLives are the sums of the lives before.
type pastLives struct {
	lives, replies, acked, lost int
}

// lastReboot is the one that the guest was asked for last.
type lastReboot struct {
	at    time.Time
	boot  string // of the life that ended then
	lines int    // that were on the disk at least
}

// errSameLife is wrapped when a guest that was asked to reboot has not.
var errSameLife = errors.New("the guest did not reboot")

// begun judges what the guest says first in the life after a reboot.
func (r lastReboot) begun(s guest.Status) error {
	switch {
	case s.Boot == r.boot:
		return fmt.Errorf("%w within %v: it is up for %v", errSameLife, time.Since(r.at).Round(time.Second), s.Uptime)
	case s.Lines < r.lines:
		return fmt.Errorf("%w: the guest had %d on its disk when it rebooted, and now %d", ErrLines, r.lines, s.Lines)
	}
	return nil
}

// connect opens the connections of a life.
func (s *storm) connect(ctx context.Context) (err error) {
	if s.traffic, err = s.vm.Traffic(ctx); err != nil {
		return err
	}
	if s.ledger, err = s.vm.Ledger(ctx); err != nil {
		s.traffic.Close()
	}
	return err
}

func (s *storm) disconnect() {
	s.traffic.Close()
	s.ledger.Close()
}

// awake waits until the guest answers.
func (s *storm) awake(ctx context.Context) (status guest.Status, err error) {
	err = poll(ctx, bootTimeout, func(ctx context.Context) (bool, error) {
		ctx, cancel := context.WithTimeout(ctx, rebootTimeout)
		defer cancel()
		var err error
		status, err = s.vm.Guest.Status(ctx)
		return err == nil, nil
	})
	if err != nil {
		err = fmt.Errorf("the guest does not answer: %w", err)
	}
	return status, err
}

// rebootTimeout is for an answer of the guest that may never come, since it
// reboots.
const rebootTimeout = 5 * time.Second

// reboot makes the guest reboot at once, and returns when it was asked to.
func (s *storm) reboot(ctx context.Context) (time.Time, error) {
	for {
		before, err := s.awake(ctx)
		if err != nil {
			return time.Time{}, err
		}
		s.asked = lastReboot{time.Now(), before.Boot, before.Lines}
		lines, err := s.askReboot(ctx)
		if err == nil {
			s.asked.lines = max(s.asked.lines, lines)
			return s.asked.at, nil
		}
		if errors.Is(err, guest.ErrCommand) || ctx.Err() != nil {
			return time.Time{}, err
		}
		// Lost is the question, or the answer that was on its way when the primary
		// died.
		after, err := s.awake(ctx)
		if err != nil {
			return time.Time{}, err
		}
		if !errors.Is(s.asked.begun(after), errSameLife) {
			return s.asked.at, nil
		}
	}
}

func (s *storm) askReboot(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, rebootTimeout)
	defer cancel()
	return s.vm.Guest.Reboot(ctx)
}

// nextLife waits until the guest is back from its reboot, judges what it kept and
// what the connections of before were until then, and begins new ones.
func (s *storm) nextLife(ctx context.Context) error {
	var last error
	err := poll(ctx, bootTimeout, func(ctx context.Context) (bool, error) {
		status, err := s.awake(ctx)
		if err != nil {
			return false, err
		}
		last = s.asked.begun(status)
		return !errors.Is(last, errSameLife), nil
	})
	if err = errors.Join(err, last); err != nil {
		return err
	}
	err = errors.Join(s.traffic.End(s.asked.at), s.ledger.End(s.asked.at))
	replies, unanswered, _ := s.traffic.Counts()
	acked, unkept := s.ledger.Counts()
	s.past = pastLives{s.past.lives + 1, s.past.replies + replies, s.past.acked + acked, s.past.lost + unanswered + unkept}
	if err != nil {
		return err
	}
	if err := s.connect(ctx); err != nil {
		return err
	}
	return s.vm.Load(ctx)
}

// growth is what the guest writes at once where its disk was never written, in
// KiB: a few clusters of a qcow2 image.
const growth = 256

// grow makes the guest need room for its disk. A guest that cannot be reached
// needs it a little later.
func (s *storm) grow(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	_ = s.vm.Guest.Grow(ctx, growth)
}
