// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// What chaos demands.
const (
	// redundantLimit is how soon a pair must be whole again after the last
	// fault.
	redundantLimit = 60 * time.Second
	// wholeFor is how long a pair must be whole to be called so: agents need a
	// moment to notice a fault.
	wholeFor = 1500 * time.Millisecond
	// replyLimit is how soon the client's connection must go on after the last
	// fault: TCP waits longer the longer it was cut off.
	replyLimit = 30 * time.Second
	// askInterval is between two rounds of questions to the agents, which share
	// the machine with what they are asked about.
	askInterval = 50 * time.Millisecond
	// askTimeout bounds a question to an agent, which may be stopped.
	askTimeout = time.Second
	// lastStep is how long before the end of a run the last step may begin.
	lastStep = 15 * time.Second
)

// Chaos lets things go wrong at random on three hosts, for a given time, and
// judges all the while whether anybody could tell.
func Chaos(ctx context.Context, o Options) error {
	o.HostCount = 3
	r := &run{Options: o, configure: func(*config.Config) {}, start: time.Now()}
	return r.run(ctx, "chaos", chaos)
}

// storm is a run of chaos.
type storm struct {
	*run
	vm      *VM
	traffic *Traffic
	ledger  *Ledger
	witness *Witness

	faults    int
	failovers figures // of steps that nothing else delays
	reprotect figures

	mu       sync.Mutex
	lines    int // the most that the guest said to be on its disk
	lostLine int
	err      error
}

func chaos(ctx context.Context, r *run) (figures string, err error) {
	a, b := r.Pair()
	s := &storm{run: r}
	r.say("seed %d, %v of faults", r.Seed, r.Length)
	if s.vm, err = r.StartVM(ctx, a, b, 0, "guest"); err != nil {
		return "", err
	}
	if s.witness, err = s.vm.Witness(ctx, a); err != nil {
		return "", err
	}
	defer s.witness.Close()
	if s.traffic, err = s.vm.Traffic(ctx); err != nil {
		return "", err
	}
	defer s.traffic.Close()
	if s.ledger, err = s.vm.Ledger(ctx); err != nil {
		return "", err
	}
	defer s.ledger.Close()
	watching, stop := context.WithCancel(ctx)
	var watch sync.WaitGroup
	defer watch.Wait()
	defer stop()
	watch.Go(func() { s.watchLines(watching) })
	if _, err := s.waitWhole(ctx, time.Now(), redundantLimit); err != nil {
		return "", err
	}
	r.say("the guest is protected")

	err = s.rage(ctx)
	if err == nil {
		stop()
		watch.Wait()
		err = s.settle(ctx)
	}
	split, _ := s.witness.Verdict()
	_, unanswered, _ := s.traffic.Counts()
	_, unkept := s.ledger.Counts()
	if err != nil {
		r.say("%s", s.witness.History())
	}
	return fmt.Sprintf("faults=%d failovers=%d split=%d lost=%d median_failover_ms=%s p99_failover_ms=%s reprotect_s=%.1f seed=%d",
		s.faults, s.witness.Failovers(), split, unanswered+unkept+s.lostLine,
		s.failovers, ms(percentile(s.failovers, 99)), longest(s.reprotect).Seconds(), r.Seed), err
}

// percentile gives the smallest value that so many of a hundred do not exceed.
func percentile(list []time.Duration, of int) time.Duration {
	if len(list) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(list))
	return sorted[int(math.Ceil(float64(len(list)*of)/100))-1]
}

// rage makes steps until the time is over.
func (s *storm) rage(ctx context.Context) error {
	begin := time.Now()
	p := newPlan(s.Seed)
	for number := 1; time.Since(begin) < s.Length-lastStep; number++ {
		step := p.next()
		if err := s.step(ctx, number, step); err != nil {
			return fmt.Errorf("step %d (%s): %w", number, step.Main, err)
		}
	}
	return nil
}

// step lets one step's faults happen, and waits until all is well again.
func (s *storm) step(ctx context.Context, number int, step Step) error {
	if err := Pause(ctx, step.Rest); err != nil {
		return err
	}
	before, err := s.pair(ctx)
	if err != nil {
		return err
	}
	for _, f := range step.Faults() {
		s.faults++
		s.say("step %d, primary %s, backup %s, epoch %d: %s", number, before.primary.Name, before.backup.Name, before.epoch, f)
	}
	var injected time.Time // the main fault
	var errs []error
	var mu sync.Mutex
	var faults, again sync.WaitGroup
	fail := func(f Fault, err error) {
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", f, err))
		}
	}
	for i, f := range append([]Fault{step.Main}, step.Others...) {
		faults.Go(func() {
			at, err := s.inflict(ctx, f, before)
			if i == 0 {
				injected = at
			}
			fail(f, err)
		})
	}
	over := make(chan struct{})
	if f := step.Again; f != nil {
		again.Go(func() { fail(*f, s.inflictAgain(ctx, number, *f, before, over)) })
	}
	faults.Wait()
	close(over)
	again.Wait()
	healed := time.Now()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	whole, err := s.waitWhole(ctx, healed, redundantLimit)
	if err != nil {
		return err
	}
	s.reprotect = append(s.reprotect, whole)
	if _, err := s.traffic.WaitReply(ctx, healed, replyLimit); err != nil {
		return err
	}
	first, err := s.traffic.WaitReply(ctx, injected, replyLimit)
	if err != nil {
		return err
	}
	text := ""
	if step.Main.Fatal() && !delayed(step) {
		s.failovers = append(s.failovers, first.Sub(injected))
		text = fmt.Sprintf(", next reply after %s ms", ms(first.Sub(injected)))
	}
	s.say("step %d: whole again %.1f s after the last fault, longest gap %s ms%s", number, whole.Seconds(), ms(s.traffic.LongestGap(injected)), text)
	return s.check(ctx)
}

// delayed tells whether a failover must wait for something else than itself.
func delayed(s Step) bool {
	return slices.ContainsFunc(s.Others, func(f Fault) bool { return f.Kind == BadStorage || f.Network == lab.Service })
}

// check judges what can be judged at any time.
func (s *storm) check(ctx context.Context) error {
	_, split := s.witness.Verdict()
	s.mu.Lock()
	lines := s.err
	s.mu.Unlock()
	return errors.Join(split, s.traffic.Err(), s.ledger.Err(), s.ledger.Check(ctx), lines)
}

// settle judges, after the last step, what the guest did over all the time.
func (s *storm) settle(ctx context.Context) error {
	if err := s.check(ctx); err != nil {
		return err
	}
	if err := s.traffic.Stop(); err != nil {
		return err
	}
	pair, err := s.pair(ctx)
	if err != nil {
		return err
	}
	n, err := s.vm.VerifyDisk(ctx, pair.primary)
	if err != nil {
		return err
	}
	if n < s.lines {
		s.lostLine += s.lines - n
		return fmt.Errorf("%w: the guest once said that it had %d, its disk has %d", ErrLines, s.lines, n)
	}
	if err := s.replica(ctx, pair.backup, n); err != nil {
		return err
	}
	acked, _ := s.ledger.Counts()
	replies, _, _ := s.traffic.Counts()
	s.say("the client got %d replies, the guest kept %d records; its disk and the replica pass fsck and have %d lines", replies, acked, n)
	return nil
}

// replica demands that the backup's disk has all lines as well. The guest
// writes no more; its backup may be behind.
func (s *storm) replica(ctx context.Context, h *lab.Host, lines int) error {
	path, err := s.vm.DiskPath(ctx, h)
	if err != nil {
		return err
	}
	var last error
	err = poll(ctx, verifyTimeout, func(ctx context.Context) (bool, error) {
		// A flush puts on the disk where its clusters are.
		if _, last = s.vm.Quiesce(ctx); last != nil {
			return false, nil
		}
		var n int
		if n, last = guest.DiskLines(ctx, path); last == nil && n != lines {
			last = fmt.Errorf("%w: the replica on %s has %d, the disk %d", ErrLines, h.Name, n, lines)
		}
		return last == nil, nil
	})
	return errors.Join(err, last)
}

// watchLines asks the guest how many lines it has on its disk: it may never
// have fewer than it said.
func (s *storm) watchLines(ctx context.Context) {
	for Pause(ctx, 500*time.Millisecond) == nil {
		status, err := func() (guest.Status, error) {
			ctx, cancel := context.WithTimeout(ctx, askTimeout)
			defer cancel()
			return s.vm.Guest.Status(ctx)
		}()
		if err != nil {
			continue // it is cut off
		}
		s.mu.Lock()
		switch {
		case s.err != nil:
		case status.Lines < s.lines:
			s.lostLine += s.lines - status.Lines
			s.err = fmt.Errorf("%w: the guest had %d on its disk, and now %d", ErrLines, s.lines, status.Lines)
		case status.LineErrors > 0 || status.LoadErrors > 0:
			s.err = fmt.Errorf("%w: the guest saw %d errors writing lines and %d in its disk load", ErrLines, status.LineErrors, status.LoadErrors)
		default:
			s.lines = status.Lines
		}
		s.mu.Unlock()
	}
}

// couple says which host has which part.
type couple struct {
	primary, backup *lab.Host
	epoch           plugin.Epoch
}

// ask asks all agents at once. Who does not answer has no entry.
func (s *storm) ask(ctx context.Context) map[string]client.Status {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	answers := map[string]client.Status{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, h := range s.Hosts() {
		wg.Go(func() {
			status, err := s.Agent(h).StatusOf(ctx, s.vm.Name)
			if err == nil {
				mu.Lock()
				defer mu.Unlock()
				answers[h.Name] = status
			}
		})
	}
	wg.Wait()
	_ = Pause(ctx, askInterval)
	return answers
}

// whole finds the pair, if both of its sides say that it is as it should be.
func (s *storm) whole(answers map[string]client.Status) (couple, bool) {
	var c couple
	for _, h := range s.Hosts() {
		a, ok := answers[h.Name]
		if !ok || a.State != stateProtected || a.Reason != "none" {
			continue
		}
		switch peer := answers[a.Peer]; {
		case a.Role != plugin.RolePrimary, peer.State != stateProtected, peer.Reason != "none", peer.Role != plugin.RoleBackup, peer.Epoch != a.Epoch:
		default:
			c.primary, c.epoch = h, a.Epoch
			c.backup, _ = s.Host(a.Peer)
		}
	}
	return c, c.primary != nil && c.backup != nil
}

func (s *storm) pair(ctx context.Context) (couple, error) {
	answers := s.ask(ctx)
	c, ok := s.whole(answers)
	if !ok {
		return c, fmt.Errorf("%w: there is no pair: %s", ErrState, describe(answers))
	}
	return c, nil
}

func describe(answers map[string]client.Status) string {
	var texts []string
	for _, a := range answers {
		texts = append(texts, a.String())
	}
	slices.Sort(texts)
	return strings.Join(texts, "; ")
}

// waitWhole waits until a pair is whole and stays so, and tells how long after
// the instant that was.
func (s *storm) waitWhole(ctx context.Context, since time.Time, limit time.Duration) (time.Duration, error) {
	var epoch plugin.Epoch
	var from time.Time
	var answers map[string]client.Status
	err := poll(ctx, limit+wholeFor, func(ctx context.Context) (bool, error) {
		now := time.Now()
		if latest := s.ask(ctx); ctx.Err() == nil {
			answers = latest
		}
		c, ok := s.whole(answers)
		if !ok {
			epoch = 0
			return false, nil
		}
		if epoch != c.epoch {
			epoch, from = c.epoch, now
		}
		return now.Sub(from) >= wholeFor, nil
	})
	if err != nil {
		return 0, fmt.Errorf("waiting for the pair to be whole: %w: %s", err, describe(answers))
	}
	return max(from.Sub(since), 0), nil
}

// inflictAgain inflicts a fault on the pair that is made after the one of
// before, while it is being made. There may be none.
func (s *storm) inflictAgain(ctx context.Context, number int, f Fault, before couple, over <-chan struct{}) error {
	var now couple
	var calm time.Time // since when nothing speaks for a clone any more
	err := poll(ctx, redundantLimit, func(ctx context.Context) (bool, error) {
		answers := s.ask(ctx)
		for _, h := range s.Hosts() {
			if a := answers[h.Name]; a.State == stateCloning && a.Role == plugin.RolePrimary && a.Epoch > before.epoch {
				now = couple{primary: h, epoch: a.Epoch}
				now.backup, _ = s.Host(a.Peer)
				return now.backup != nil, nil
			}
		}
		c, ok := s.whole(answers)
		select {
		case <-over:
		default:
			ok = false
		}
		if !ok {
			calm = time.Time{}
			return false, nil
		}
		if calm.IsZero() {
			calm = time.Now()
		}
		return c.epoch > before.epoch || time.Since(calm) > wholeFor, nil
	})
	if err != nil {
		return err
	}
	if now.primary == nil {
		s.say("step %d: no time for %s", number, f)
		s.faults--
		return nil
	}
	_, err = s.inflict(ctx, f, now)
	return err
}

// on lists the hosts that a fault is put to.
func (s *storm) on(part Part, c couple) []*lab.Host {
	switch part {
	case Primary:
		return []*lab.Host{c.primary}
	case Backup:
		return []*lab.Host{c.backup}
	case Spare:
		return slices.DeleteFunc(s.Hosts(), func(h *lab.Host) bool { return h.Name == c.primary.Name || h.Name == c.backup.Name })
	}
	return s.Hosts()
}

// inflict lets a fault happen and undoes it. It returns when it happened.
func (s *storm) inflict(ctx context.Context, f Fault, c couple) (at time.Time, err error) {
	if err := Pause(ctx, f.After); err != nil {
		return at, err
	}
	at = time.Now()
	var undo []func(context.Context) error
	for _, h := range s.on(f.Part, c) {
		began, heal, failure := s.begin(ctx, f, h)
		if failure != nil {
			if f.Part == Each && !h.Up() {
				continue
			}
			err = errors.Join(err, failure)
			break
		}
		if !began.IsZero() {
			at = began
		}
		if heal != nil {
			undo = append(undo, heal)
		}
	}
	if err == nil {
		err = Pause(ctx, f.For)
	}
	// Undone in any case: the lab is to be taken down.
	for _, heal := range undo {
		err = errors.Join(err, heal(context.WithoutCancel(ctx)))
	}
	return at, err
}

// begin puts a fault to a host, and returns when it began, if it knows better
// than its caller, and what undoes it.
func (s *storm) begin(ctx context.Context, f Fault, h *lab.Host) (at time.Time, heal func(context.Context) error, err error) {
	switch f.Kind {
	case KillQEMU:
		at, err = h.Signal(ctx, lab.QEMUProcess(s.vm.Name), unix.SIGKILL)
		if errors.Is(err, fs.ErrNotExist) {
			err = nil // while a clone is being made there may be none
		}
	case StopQEMU:
		return s.stop(ctx, h, lab.QEMUProcess(s.vm.Name))
	case StopAgent:
		return s.stop(ctx, h, lab.AgentProcess)
	case StopLibvirt:
		return s.stop(ctx, h, lab.LibvirtProcess)
	case KillAgent:
		err = h.KillAgent(ctx)
		heal = func(ctx context.Context) error { return h.Start(ctx, lab.AgentProcess) }
	case EndAgent:
		err = h.StopAgent(ctx)
		heal = func(ctx context.Context) error { return h.Start(ctx, lab.AgentProcess) }
	case KillLibvirt:
		err = h.KillLibvirt(ctx)
		heal = func(ctx context.Context) error { return h.Start(ctx, lab.LibvirtProcess) }
	case Freeze:
		at, err = h.Freeze(ctx)
		heal = h.Thaw
	case Crash:
		err, heal = h.Crash(ctx), h.Boot
	case Unplug:
		err = h.CutLink(ctx, f.Network)
		heal = func(ctx context.Context) error { return h.RestoreLink(ctx, f.Network) }
	case BadWire:
		var w *lab.Wire
		if w, err = h.Disturb(ctx, f.Network, f.Out, f.In); err == nil {
			heal = w.Close
		}
	case BadStorage:
		heal, err = h.DisturbStorage(ctx, f.Storage, f.Delay)
	default:
		err = fmt.Errorf("unknown fault %s", f)
	}
	if err != nil {
		heal = nil
	}
	return at, heal, err
}

// stop stops a process, which continues when the fault is undone, if it still
// lives then.
func (s *storm) stop(ctx context.Context, h *lab.Host, p lab.Process) (time.Time, func(context.Context) error, error) {
	pid, err := h.PID(p)
	if err != nil {
		return time.Time{}, nil, err
	}
	at, err := h.Signal(ctx, p, unix.SIGSTOP)
	return at, func(ctx context.Context) error {
		_, err := h.Exec(ctx, "/bin/sh", "-euc", `! [ -d "/proc/$1" ] || kill -CONT "$1"`, "sh", strconv.Itoa(pid))
		return err
	}, err
}
