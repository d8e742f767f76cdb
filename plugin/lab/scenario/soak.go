// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/lab"
)

// session is a guest that a soak run uses round after round, with one client's
// connection, which stays the same however often the guest fails over.
type session struct {
	vm              *VM
	traffic         *Traffic
	primary, backup *lab.Host
}

// begin starts a guest of its own.
func (r *run) begin(ctx context.Context, number int) (*session, error) {
	a, b := r.Pair()
	// A new guest has a new name, so that nothing of the one before is taken
	// for its own; there is only one at a time, so it has the same address.
	vm, err := r.StartVM(ctx, a, b, 0, fmt.Sprintf("guest%d", number))
	if err != nil {
		return nil, err
	}
	traffic, err := vm.Traffic(ctx)
	if err != nil {
		return nil, errors.Join(err, vm.Remove(context.WithoutCancel(ctx)))
	}
	r.say("%s has booted on %s; a client is connected", vm.Name, a.Name)
	return &session{vm, traffic, a, b}, nil
}

// end removes the guest, whatever state it is in.
func (s *session) end(ctx context.Context) error {
	s.traffic.Close()
	return s.vm.Remove(context.WithoutCancel(ctx))
}

// rounds runs n rounds. One that fails leaves its logs, and the next gets a new
// guest. It returns how many were right, and the first failure.
func (r *run) rounds(ctx context.Context, name string, round func(context.Context, int, *session) error) (ok int, err error) {
	var s *session
	guests := 0
	for i := range r.Rounds {
		var failure error
		if s == nil {
			guests++
			s, failure = r.begin(ctx, guests)
		}
		if failure == nil {
			failure = round(ctx, i+1, s)
		}
		if ctx.Err() != nil {
			return ok, ctx.Err()
		}
		if failure == nil {
			ok++
			continue
		}
		r.say("round %d FAILED: %v", i+1, failure)
		r.keepEvidence(ctx, fmt.Sprintf("%s-%d", name, i+1))
		if err == nil {
			err = fmt.Errorf("round %d: %w", i+1, failure)
		}
		if s != nil {
			if removal := s.end(ctx); removal != nil {
				return ok, errors.Join(err, removal)
			}
			s = nil
		}
	}
	if s != nil {
		err = errors.Join(err, s.traffic.Stop())
	}
	return ok, err
}

// figures collects one figure over the rounds.
type figures []time.Duration

func (f figures) String() string { return ms(median(f)) }

// SoakFailover kills the primary again and again. The roles change each time:
// the survivor is protected by a new backup where the primary died.
func SoakFailover(ctx context.Context, o Options) error {
	return Run(ctx, "soak_failover", o, func(ctx context.Context, r *run) (string, error) {
		var pauses, failovers, gaps figures
		ok, err := r.rounds(ctx, "soak-failover", func(ctx context.Context, i int, s *session) error {
			start := time.Now()
			primary, err := s.vm.Protect(ctx, s.primary, s.backup)
			if err != nil {
				return err
			}
			// Killed at any moment of its life, also while the lag of the
			// clone is being worked off.
			if err := Pause(ctx, 500*time.Millisecond+rand.N(steady)); err != nil {
				return err
			}
			lag, err := s.vm.Lag(ctx, s.primary)
			if err != nil {
				return err
			}
			failover, lines, gap, err := s.failOver(ctx, start)
			if err != nil {
				return err
			}
			pauses, failovers, gaps = append(pauses, millis(primary.ClonePause)), append(failovers, failover.Reply), append(gaps, gap)
			r.say("round %d/%d ok: %s -> %s, clone_pause_ms=%s lag_ms=%s live_ms=%s failover_ms=%s longest_gap_ms=%s lines=%d, %.1f s",
				i, r.Rounds, s.backup.Name, s.primary.Name, ms(millis(primary.ClonePause)), ms(lag), ms(failover.Live),
				ms(failover.Reply), ms(gap), lines.Disk, time.Since(start).Seconds())
			return nil
		})
		if err == nil {
			err = within(failovers, failoverLimit)
		}
		return fmt.Sprintf("n=%d ok=%d failover_ms_median=%s failover_ms_max=%s longest_gap_ms_median=%s longest_gap_ms_max=%s clone_pause_ms_median=%s clone_pause_ms_max=%s",
			r.Rounds, ok, failovers, ms(longest(failovers)), gaps, ms(longest(gaps)), pauses, ms(longest(pauses))), err
	})
}

// Limits of the medians, to the client's next byte.
const (
	failoverLimit = 400 * time.Millisecond
	// crashLimit: that a host is dead shows only by its silence.
	crashLimit = 500*time.Millisecond + failoverLimit
)

// within demands that the median of the failovers is below a limit.
func within(failovers []time.Duration, limit time.Duration) error {
	if m := median(failovers); m >= limit {
		return fmt.Errorf("%w: the median failover took %s ms, and may take %s", ErrTooLong, ms(m), ms(limit))
	}
	return nil
}

// SoakCrash crashes the host of the primary again and again. When it is back,
// it gets the next backup.
func SoakCrash(ctx context.Context, o Options) error {
	return Run(ctx, "soak_crash", o, func(ctx context.Context, r *run) (string, error) {
		var failovers figures
		ok, err := r.rounds(ctx, "soak-crash", func(ctx context.Context, i int, s *session) error {
			start := time.Now()
			if _, err := s.vm.Protect(ctx, s.primary, s.backup); err != nil {
				return err
			}
			if err := Pause(ctx, 2*time.Second+rand.N(steady)); err != nil {
				return err
			}
			lag, err := s.vm.Lag(ctx, s.primary)
			if err != nil {
				return err
			}
			crashed := time.Now()
			if err := s.primary.Crash(ctx); err != nil {
				return err
			}
			reply, err := s.traffic.WaitReply(ctx, crashed, liveTimeout)
			if err != nil {
				return err
			}
			failovers = append(failovers, reply.Sub(crashed))
			if err := s.primary.Boot(ctx); err != nil {
				return err
			}
			if err := r.WaitAgent(ctx, s.primary); err != nil {
				return err
			}
			s.primary, s.backup = s.backup, s.primary
			lines, err := s.vm.VerifyDisk(ctx, s.primary)
			if err != nil {
				return err
			}
			r.say("round %d/%d ok: %s -> %s, lag_ms=%s failover_ms=%s lines=%d, %.1f s", i, r.Rounds, s.backup.Name, s.primary.Name,
				ms(lag), ms(reply.Sub(crashed)), lines, time.Since(start).Seconds())
			return errors.Join(s.traffic.Err(), s.vm.Load(ctx))
		})
		if err == nil {
			err = within(failovers, crashLimit)
		}
		return fmt.Sprintf("n=%d ok=%d failover_ms_median=%s failover_ms_max=%s", r.Rounds, ok, failovers, ms(longest(failovers))), err
	})
}

// failOver kills the primary, verifies what the survivor has, and swaps the
// roles. The gap is the longest since the instant.
func (s *session) failOver(ctx context.Context, since time.Time) (Failover, Lines, time.Duration, error) {
	failover, err := s.vm.FailOver(ctx, s.primary, s.backup, s.traffic)
	if err != nil {
		return failover, Lines{}, 0, err
	}
	if err := Pause(ctx, time.Second); err != nil {
		return failover, Lines{}, 0, err
	}
	gap := s.traffic.LongestGap(since)
	lines, err := s.vm.Verify(ctx, s.primary, s.backup)
	if err != nil {
		return failover, lines, gap, err
	}
	if err := s.vm.bed.WaitGone(ctx, s.primary, s.vm.Name); err != nil {
		return failover, lines, gap, err
	}
	s.primary, s.backup = s.backup, s.primary
	return failover, lines, gap, errors.Join(s.traffic.Err(), s.vm.Load(ctx))
}

// Faults of a clone, as SoakClone counts them.
var (
	errDiverged = errors.New("the backup diverged")
	errStuck    = errors.New("the backup does not follow")
	errSilent   = errors.New("a monitor does not answer")
)

// Limits of SoakClone.
const (
	followLimit  = 3 * time.Second
	lagLimit     = 2 * time.Second
	monitorLimit = 2 * time.Second
	// dwell is how long a clone runs at most before it is discarded or its
	// primary killed.
	dwell = 2 * time.Second
	// earliestKill is after the clone is complete.
	earliestKill = 50 * time.Millisecond
)

// SoakClone protects and discards again and again, under load, and fails over
// in every fourth round, soon after the clone.
func SoakClone(ctx context.Context, o Options) error {
	return Run(ctx, "soak_clone", o, func(ctx context.Context, r *run) (string, error) {
		var pauses, failoverTimes, gaps figures
		var failovers, diverged, stuck, silent int
		ok, err := r.rounds(ctx, "soak-clone", func(ctx context.Context, i int, s *session) error {
			start, backup := time.Now(), s.backup.Name
			primary, err := s.vm.Protect(ctx, s.primary, s.backup)
			if err != nil {
				return err
			}
			pauses = append(pauses, millis(primary.ClonePause))
			text := "discarded"
			if i%4 == 0 {
				failovers++
				text, err = s.failOverSoon(ctx, start, &failoverTimes, &gaps)
			} else {
				err = s.followAndDiscard(ctx, primary)
			}
			if err != nil {
				err = s.classify(ctx, primary, err)
				for fault, count := range map[error]*int{errDiverged: &diverged, errStuck: &stuck, errSilent: &silent} {
					if errors.Is(err, fault) {
						*count++
					}
				}
				return err
			}
			r.say("clone %d/%d ok: epoch %d on %s, clone_pause_ms=%s, %s, %.1f s", i, r.Rounds, primary.Epoch, backup,
				ms(millis(primary.ClonePause)), text, time.Since(start).Seconds())
			return s.traffic.Err()
		})
		return fmt.Sprintf("n=%d ok=%d failovers=%d diverged=%d stuck=%d silent=%d pause_ms_median=%s pause_ms_max=%s failover_ms_median=%s failover_ms_max=%s longest_gap_ms_max=%s",
			r.Rounds, ok, failovers, diverged, stuck, silent, pauses, ms(longest(pauses)),
			failoverTimes, ms(longest(failoverTimes)), ms(longest(gaps))), err
	})
}

func (s *session) failOverSoon(ctx context.Context, start time.Time, times, gaps *figures) (string, error) {
	after := earliestKill + rand.N(dwell)
	if err := Pause(ctx, after); err != nil {
		return "", err
	}
	failover, _, gap, err := s.failOver(ctx, start)
	if err != nil {
		return "", fmt.Errorf("killed %v after the clone: %w", after.Round(time.Millisecond), err)
	}
	*times, *gaps = append(*times, failover.Reply), append(*gaps, gap)
	return fmt.Sprintf("killed after %s ms, failover_ms=%s longest_gap_ms=%s", ms(after), ms(failover.Reply), ms(gap)), nil
}

// followAndDiscard checks that the backup follows and that both monitors
// answer, and takes the protection away.
func (s *session) followAndDiscard(ctx context.Context, primary client.Status) error {
	first, err := s.vm.bed.Agent(s.backup).StatusOf(ctx, s.vm.Name)
	if err != nil {
		return err
	}
	last, err := s.vm.bed.Wait(ctx, s.backup, s.vm.Name, "the backup to follow", followLimit, func(now client.Status) (bool, error) {
		if now.State != stateProtected {
			return false, fmt.Errorf("%w: %s", ErrState, now)
		}
		return now.Position > first.Position && millis(now.Lag) < lagLimit, nil
	})
	if err != nil {
		return fmt.Errorf("%w: %w; position %d, %d before, lag %.0f ms", errStuck, err, last.Position, first.Position, last.Lag)
	}
	for _, h := range []*lab.Host{s.primary, s.backup} {
		if _, err := s.vm.QueryMonitor(ctx, h, monitorLimit); err != nil {
			return fmt.Errorf("%w within %v on %s: %w", errSilent, monitorLimit, h.Name, err)
		}
	}
	if err := Pause(ctx, rand.N(dwell)); err != nil {
		return err
	}
	for _, h := range []*lab.Host{s.primary, s.backup} {
		if now, err := s.vm.bed.Agent(h).StatusOf(ctx, s.vm.Name); err != nil || now.State != stateProtected || now.Epoch != primary.Epoch {
			return errors.Join(fmt.Errorf("%w: %s", ErrState, now), err)
		}
	}
	return s.vm.Unprotect(ctx, s.primary, s.backup)
}

// classify finds out whether a divergence is behind an error.
func (s *session) classify(ctx context.Context, primary client.Status, err error) error {
	for _, h := range s.vm.bed.Hosts() {
		events, lookup := s.vm.Events(ctx, h, primary.Epoch)
		if lookup != nil {
			return errors.Join(err, lookup)
		}
		for _, e := range events {
			if e.Reason == reasonDivergence {
				return fmt.Errorf("%w: %w", errDiverged, err)
			}
		}
	}
	return err
}
