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
	// settleLimit is how soon after that the domain must be defined for good.
	settleLimit = 30 * time.Second
	// imageBytes is the room that a host has for images: for some of the guest's
	// disk, so that a full one is filled soon.
	imageBytes = 256 << 20
	// lastStep is how long before the end of a run the last step may begin.
	lastStep = 15 * time.Second
)

// Chaos lets things go wrong at random on three hosts, for a given time, and
// judges all the while whether anybody could tell. In the last quarter of the
// time, or with SharedImages in all of it, the hosts have one directory of images.
func Chaos(ctx context.Context, o Options) error {
	o.HostCount = 3
	r := &run{Options: o, configure: func(*config.Config) {}, start: time.Now()}
	p, sum := newPlan(o.Seed), &tally{}
	return r.report("chaos", func() (string, error) {
		r.say("seed %d, %v of faults", o.Seed, o.Length)
		var err error
		if !o.SharedImages {
			err = r.chaosFor(ctx, o.Length*3/4, p, sum)
			r.Length, r.SharedImages = o.Length/4, true
		}
		if err == nil {
			err = r.chaosFor(ctx, r.Length, p, sum)
		}
		if err == nil && sum.faults == 0 {
			err = fmt.Errorf("%w: there was time for none, or there is none like %v", errNoFault, o.Only)
		}
		return fmt.Sprintf("%s seed=%d", sum, o.Seed), err
	})
}

// errNoFault is wrapped when nothing went wrong that should have.
var errNoFault = errors.New("no fault")

// chaosFor lets things go wrong in a lab of their own.
func (r *run) chaosFor(ctx context.Context, length time.Duration, p *plan, sum *tally) error {
	p.share(r.SharedImages)
	_, err := r.inLab(ctx, "chaos", func(ctx context.Context, r *run) (string, error) {
		s := &storm{run: r, plan: p}
		return "", s.blow(ctx, length, sum)
	})
	return err
}

// tally is what a run tells in the end.
type tally struct {
	faults, failovers, splits, lost int
	replies                         figures // after failovers that nothing else delays
	reprotect                       figures
}

func (t *tally) add(s *storm) {
	splits, _ := s.witness.Verdict()
	_, unanswered, _ := s.traffic.Counts()
	_, unkept := s.ledger.Counts()
	t.faults, t.failovers, t.splits = t.faults+s.faults, t.failovers+s.witness.Failovers(), t.splits+splits
	t.lost += s.past.lost + unanswered + unkept + s.lostLine
	t.replies, t.reprotect = append(t.replies, s.failovers...), append(t.reprotect, s.reprotect...)
}

func (t *tally) String() string {
	return fmt.Sprintf("faults=%d failovers=%d split=%d lost=%d median_failover_ms=%s p99_failover_ms=%s reprotect_s=%.1f",
		t.faults, t.failovers, t.splits, t.lost, t.replies, ms(percentile(t.replies, 99)), longest(t.reprotect).Seconds())
}

// storm is what goes wrong in one lab, with one guest.
type storm struct {
	*run
	plan    *plan
	vm      *VM
	traffic *Traffic
	ledger  *Ledger
	witness *Witness
	past    pastLives
	asked   lastReboot

	faults    int
	failovers figures // of steps that nothing else delays
	reprotect figures

	mu       sync.Mutex
	lines    int // the most that the guest said to be on its disk
	lostLine int
	err      error
}

// blow makes steps for so long.
func (s *storm) blow(ctx context.Context, length time.Duration, sum *tally) (err error) {
	if !s.SharedImages {
		for _, h := range s.Hosts() {
			if err := h.MountImages(ctx, imageBytes); err != nil {
				return err
			}
		}
	}
	a, b := s.Pair()
	if s.vm, err = s.StartVM(ctx, a, b, 0, "guest"); err != nil {
		return err
	}
	if s.witness, err = s.vm.Witness(ctx, a); err != nil {
		return err
	}
	defer s.witness.Close()
	if err := s.connect(ctx); err != nil {
		return err
	}
	defer s.disconnect()
	defer sum.add(s)
	watching, stop := context.WithCancel(ctx)
	var watch sync.WaitGroup
	defer watch.Wait()
	defer stop()
	watch.Go(func() { s.watchLines(watching) })
	if _, err := s.waitWhole(ctx, time.Now(), redundantLimit); err != nil {
		return err
	}
	s.say("the guest is protected")

	err = s.rage(ctx, length)
	if err == nil {
		stop()
		watch.Wait()
		err = s.settle(ctx)
	}
	if err != nil {
		s.say("%s", s.witness.History())
	}
	return err
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
func (s *storm) rage(ctx context.Context, length time.Duration) error {
	for begin := time.Now(); time.Since(begin) < length-lastStep; {
		step, ok := s.wanted()
		if !ok {
			return nil
		}
		if err := s.step(ctx, s.plan.steps, step); err != nil {
			return fmt.Errorf("step %d (%s): %w", s.plan.steps, step.Main, err)
		}
	}
	return nil
}

// wanted gives the next step that has a fault of which Only tells; false if the
// plan has none.
func (s *storm) wanted() (Step, bool) {
	const most = 1000
	for range most {
		step := s.plan.next()
		if s.Only == nil || slices.ContainsFunc(step.Faults(), func(f Fault) bool { return s.Only.MatchString(f.String()) }) {
			return step, true
		}
	}
	return Step{}, false
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
			var at time.Time
			err := s.await(ctx, &f, before)
			if err == nil {
				at, err = s.inflict(ctx, f, before)
			}
			if i == 0 {
				injected = at
			}
			if errors.Is(err, errLate) {
				s.say("step %d: %v", number, err)
				err = nil
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
	if injected.IsZero() { // it was too late
		s.faults--
		injected = healed
	}
	if err := s.makeGood(ctx, step, before); err != nil {
		return err
	}
	whole, err := s.waitWhole(ctx, healed, redundantLimit)
	if err != nil {
		return err
	}
	s.reprotect = append(s.reprotect, whole)
	if step.reboots() {
		if err := s.nextLife(ctx); err != nil {
			return err
		}
	}
	if _, err := s.traffic.WaitReply(ctx, healed, replyLimit); err != nil {
		return err
	}
	first, err := s.traffic.WaitReply(ctx, injected, replyLimit)
	if err != nil {
		return err
	}
	text := ""
	if step.Main.Fatal() && step.Main.Kind != StopHost && !delayed(step) {
		s.failovers = append(s.failovers, first.Sub(injected))
		text = fmt.Sprintf(", next reply after %s ms", ms(first.Sub(injected)))
	}
	s.say("step %d: whole again %.1f s after the last fault, longest gap %s ms%s", number, whole.Seconds(), ms(s.traffic.LongestGap(injected)), text)
	return errors.Join(s.check(ctx), s.settled(ctx))
}

// makeGood does what an operator has to do after faults that nobody else can undo.
func (s *storm) makeGood(ctx context.Context, step Step, before couple) error {
	for _, f := range step.Faults() {
		if f.Kind != FullDisk || f.Part != Primary {
			continue
		}
		// QEMU does not go on by itself when its disk has room again.
		state, err := before.primary.Virsh(ctx, "domstate", "--reason", s.vm.Name)
		if err != nil {
			return err
		}
		if strings.TrimSpace(state) != pausedByDisk {
			continue
		}
		s.say("%s$ virsh resume %s, which is %s", before.primary.Name, s.vm.Name, pausedByDisk)
		if _, err := before.primary.Virsh(ctx, "resume", s.vm.Name); err != nil {
			return err
		}
	}
	return nil
}

// pausedByDisk is what libvirt says of a domain whose disk failed.
const pausedByDisk = "paused (I/O error)"

// settled demands that the domain is defined for good where it runs: one that
// were not would be gone at its power-off.
func (s *storm) settled(ctx context.Context) error {
	last := "nothing"
	err := poll(ctx, settleLimit, func(ctx context.Context) (bool, error) {
		pair, ok := s.whole(s.ask(ctx))
		if !ok {
			return false, nil
		}
		out, err := pair.primary.Virsh(ctx, "dominfo", s.vm.Name)
		if err == nil {
			last = fmt.Sprintf("%s, its primary's host, says\n%s", pair.primary.Name, out)
		}
		return err == nil && persistent(out), nil
	})
	if err != nil {
		return fmt.Errorf("%w: %s is not defined for good: %w; %s", ErrState, s.vm.Name, err, last)
	}
	return nil
}

// persistent tells whether what dominfo says of a domain is that its definition
// stays.
func persistent(dominfo string) bool {
	for line := range strings.Lines(dominfo) {
		if key, value, _ := strings.Cut(line, ":"); key == "Persistent" {
			return strings.TrimSpace(value) == "yes"
		}
	}
	return false
}

// delayed tells whether a failover must wait for something else than itself.
func delayed(s Step) bool {
	return s.reboots() || slices.ContainsFunc(s.Others, func(f Fault) bool { return f.Kind == BadStorage || f.Network == lab.Service })
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
	s.say("the client got %d replies, the guest kept %d records in %d lives; its disk and the replica pass fsck and have %d lines",
		s.past.replies+replies, s.past.acked+acked, s.past.lives+1, n)
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
	case Guest:
		return []*lab.Host{c.primary}
	case Spare:
		return slices.DeleteFunc(s.Hosts(), func(h *lab.Host) bool { return h.Name == c.primary.Name || h.Name == c.backup.Name })
	}
	return s.Hosts()
}

// errLate is wrapped by what a fault does not come for any more.
var errLate = errors.New("the pair is not what it was")

// lateFault is after how long the pair may be another one, by what else goes
// wrong: then a second grave fault would be one too many.
const lateFault = 3 * time.Second

// await waits for a fault that comes late, as in a boot of the guest, and gives
// up one that would come to what is no pair any more.
func (s *storm) await(ctx context.Context, f *Fault, before couple) error {
	if f.After < lateFault || !f.Grave() {
		return nil
	}
	if err := Pause(ctx, f.After); err != nil {
		return err
	}
	if now, ok := s.whole(s.ask(ctx)); !ok || now.epoch != before.epoch {
		return fmt.Errorf("no %s: %w", *f, errLate)
	}
	f.After = 0
	return nil
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
	case KillQEMU, EndQEMU:
		signal := unix.SIGKILL
		if f.Kind == EndQEMU {
			signal = unix.SIGTERM
		}
		at, err = h.Signal(ctx, lab.QEMUProcess(s.vm.Name), signal)
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
	case StopHost:
		err, heal = h.PowerOff(ctx), h.Boot
	case FullDisk:
		heal, err = h.FillImages(ctx)
		if err == nil {
			s.grow(ctx)
		}
	case Reboot:
		at, err = s.reboot(ctx)
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
