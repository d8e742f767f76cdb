// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// coloTimeout bounds what COLO may take for one work, of a few seconds on plain
// TCG. It is known to hang for ever.
const coloTimeout = time.Minute

// errNoCOLO tells why there is no COLO.
var errNoCOLO = errors.New("QEMU 10.0 cannot: its migration is in the state \"device\" where migration_completion wants \"active\" " +
	"to go on to \"colo\", so that the primary stops for good; and this Debian has no older QEMU")

// coloSubject is a pair of COLO that is made anew when a work has broken it.
type coloSubject struct {
	b    *benchmark
	pair *colo
	made int
}

// subject gives what measure needs. Both QEMUs are stopped whole between turns,
// which COLO does not notice.
func (s *coloSubject) subject() subject {
	return subject{
		config: configCOLO, guest: s.b.coloClient(), limit: coloTimeout,
		enter: func(ctx context.Context) error {
			if s.pair == nil {
				return s.start(ctx)
			}
			return s.pair.signal(unix.SIGCONT)
		},
		leave: func(context.Context) error { return s.pair.signal(unix.SIGSTOP) },
		broken: func(ctx context.Context) (string, error) {
			why := s.pair.words(ctx)
			return why, s.end(ctx)
		},
	}
}

func (s *coloSubject) start(ctx context.Context) (err error) {
	s.made++
	s.pair, err = s.b.startCOLO(ctx, fmt.Sprintf("colo%d", s.made))
	if err != nil {
		s.pair = nil
		return err
	}
	_, _, err = s.pair.guest.Run(ctx, servers)
	return err
}

// end removes the pair, if there is one.
func (s *coloSubject) end(ctx context.Context) error {
	if s.pair == nil {
		return nil
	}
	defer func() { s.pair = nil }()
	return s.pair.end(context.WithoutCancel(ctx))
}

// hasCOLO tells whether there is a QEMU for it.
func (b *benchmark) hasCOLO() error {
	if _, err := os.Stat(b.COLO); errors.Is(err, fs.ErrNotExist) {
		return errNoCOLO
	}
	return nil
}

// benchCOLO kills primaries of COLO.
func benchCOLO(ctx context.Context, b *benchmark) error {
	if err := b.hasCOLO(); err != nil {
		b.report.Skip(replyName, configCOLO, err.Error())
		return nil
	}
	const rounds = 3
	for range rounds {
		if err := b.coloFailOver(ctx); err != nil {
			if ctx.Err() != nil {
				return err
			}
			b.say("COLO: %v", err)
			b.report.Skip(replyName, configCOLO, oneLine(err))
		}
	}
	return nil
}

func (b *benchmark) coloFailOver(ctx context.Context) (err error) {
	s := &coloSubject{b: b}
	defer func() { err = errors.Join(err, s.end(ctx)) }()
	if err := s.start(ctx); err != nil {
		return err
	}
	traffic, err := StartTraffic(ctx, s.pair.guest.Dial, s.pair.guest.Address)
	if err != nil {
		return err
	}
	defer traffic.Close()
	if err := Pause(ctx, steady); err != nil {
		return err
	}
	took, err := s.pair.failOver(ctx, traffic)
	if err != nil {
		return fmt.Errorf("%w%s", err, s.pair.words(ctx))
	}
	b.say("COLO: next reply %s ms after the kill", ms(took))
	b.report.Add(replyName, configCOLO, millisUnit, false, float64(took.Microseconds())/1000)
	return nil
}

// judgeCOLO compares with what a user would run instead.
func (b *benchmark) judgeCOLO() {
	for _, w := range works {
		if w.unit == "" || b.report.Find(w.name, configProtected) == nil {
			continue
		}
		b.beat(w.name)
	}
	b.beat(replyName)
}

func (b *benchmark) beat(name string) {
	target := name + ", FT protected/COLO"
	m := b.report.Find(name, configCOLO)
	switch {
	case m == nil:
		b.report.NotRun(target, "not measured")
	case len(m.Figures) == 0:
		b.report.NotRun(target, "COLO cannot run it")
	default:
		ours, theirs := b.report.Figures(name, configProtected).Median(), m.Figures.Median()
		if !m.Rate {
			ours, theirs = theirs, ours
		}
		b.report.AtLeast(target, "", 1, ours/theirs)
	}
}
