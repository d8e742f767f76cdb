// SPDX-License-Identifier: Apache-2.0

package plugintest

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ftvirt.org/ftvirt/migrate"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/lab/guest"
	"ftvirt.org/ftvirt/plugin/rrlog"
)

var (
	boots = flag.Int("boots", 3, "how often TestBoot fails over")
	seed  = flag.Uint64("seed", 0, "what TestBoot's choices follow from, 0 for another each time")
)

// bootTime is what one boot may take on a machine that is busy.
const bootTime = 90 * time.Second

// bootPair starts a guest that works its disk from its start on, as its writers
// do after each reboot.
func bootPair(ctx context.Context, t *testing.T, iops int) *pair {
	t.Helper()
	p := &pair{bed: newBed(t)}
	p.iops = iops
	p.cond = sync.NewCond(&p.mu)
	// Linux breaks its devices when it reboots, and then its network driver may wait
	// for ever for a queue that is broken, on any QEMU (virtnet_poll_cleantx). Such
	// a guest is to find that out and to reboot all the same.
	p.params, p.reach = "ftguest.lines=20 ftguest.load=10000 watchdog_thresh=2 softlockup_panic=1 panic=-1", true
	// What the firmware says tells where it begins and ends.
	p.devices = func(dir string) []string {
		return []string{"-chardev", "file,id=firmware,path=" + dir + "/firmware", "-device", "isa-debugcon,iobase=0x402,chardev=firmware"}
	}
	if err := p.power(ctx, t, "a"); err != nil {
		t.Fatal(err)
	}
	return p
}

// protect clones what runs alone now.
func (p *pair) protect(ctx context.Context) error {
	if p.a.last.Mode == control.ModeLive {
		if err := p.a.plugin.Idle(); err != nil {
			return err
		}
		if err := p.a.wait(ctx, "primary idle", func() bool { return p.a.last.Mode == control.ModeIdle }); err != nil {
			return fmt.Errorf("%w\n%s", err, stacks(p.a))
		}
	}
	p.begin()
	s := migrate.Source{Local: p.a, Peer: p, Plugin: p}
	_, err := s.Clone(ctx, migrate.Options{
		Epoch: p.epoch, Dir: filepath.Join(p.dir, "clone"), QEMUUser: os.Getuid(), Downtime: 100 * time.Millisecond,
	})
	if err != nil {
		return fmt.Errorf("clone: %w", err)
	}
	return nil
}

// failOver kills the primary. Its backup has the log up to limit, is live when this
// returns, and the primary from then on; or it has ended, as the guest wanted.
func (p *pair) failOver(ctx context.Context) (ended bool, err error) {
	p.a.kill()
	p.mu.Lock()
	p.over = true
	p.cond.Broadcast()
	p.mu.Unlock()
	b := p.b
	err = b.wait(ctx, "backup goes live", func() bool { return b.last.Mode == control.ModeLive || b.diverged != nil })
	select {
	case <-b.done:
		return true, b.err
	default:
	}
	if err == nil && b.diverged != nil {
		err = fmt.Errorf("diverged: %+v", *b.diverged)
	}
	if err == nil {
		p.a = b
	}
	return false, err
}

// sound demands that the guest answers and has lost nothing of its disk.
func (m *machine) sound(ctx context.Context, lines int) error {
	if err := m.guest().WaitReady(ctx); err != nil {
		return err
	}
	s, err := m.guest().Status(ctx)
	if err == nil && (s.LineErrors != 0 || s.LoadErrors != 0 || s.Lines < lines) {
		err = fmt.Errorf("the guest's disk has lost something: %+v, of %d lines", s, lines)
	}
	return err
}

// worked waits until the guest has its disk busy, and tells how many lines are on
// it.
func (m *machine) worked(ctx context.Context) (lines int, err error) {
	for {
		s, err := m.guest().Status(ctx)
		if err != nil || s.LoadOps >= 50 {
			return s.Lines, err
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// TestGuestReset: a guest that resets its disk with requests under way, as Linux
// does when it reboots, goes on, and so does the backup; also if the log ends in
// the middle of that, before or after the completions.
func TestGuestReset(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	// So slow a disk has requests under way whenever the guest resets it.
	p := bootPair(ctx, t, 100)
	defer func() {
		if t.Failed() {
			p.keep(0)
		}
	}()
	for _, after := range []bool{false, true} {
		cut := make(chan struct{})
		p.onEvent = p.cutInReset(after, cut)
		if err := p.protect(ctx); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.b.kill)
		lines := p.reboot(ctx, t, cut)
		if ended, err := p.failOver(ctx); err != nil || ended {
			t.Fatalf("%v, ended: %v", err, ended)
		}
		if err := p.a.sound(ctx, lines); err != nil {
			t.Fatalf("after the failover: %v\n%s", err, stacks(p.a))
		}
	}
	p.onEvent = nil
	if err := p.protect(ctx); err != nil {
		t.Fatal(err)
	}
	p.b.kill()
}

// reboot has the guest reboot until it had requests under way, which it has most
// of the time, and tells how many lines were on its disk.
func (p *pair) reboot(ctx context.Context, t *testing.T, cut <-chan struct{}) int {
	t.Helper()
	for range 10 {
		if _, err := p.a.worked(ctx); err != nil {
			t.Fatal(err)
		}
		lines, err := p.a.guest().Reboot(ctx)
		if err != nil {
			t.Fatal(err)
		}
		boots := bytes.Count(read(t, p.a, "console"), []byte(guest.ReadyMessage))
		for late := time.After(bootTime); bytes.Count(read(t, p.a, "console"), []byte(guest.ReadyMessage)) == boots; {
			select {
			case <-cut:
				return lines
			case <-p.a.done:
				t.Fatal("the primary's QEMU ended")
			case <-late:
				t.Fatalf("the primary does not boot again\n%s", stacks(p.a))
			case <-time.After(50 * time.Millisecond):
			}
		}
		if err := p.a.sound(ctx, lines); err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal("the guest never reset its disk with requests under way")
	return 0
}

// cutInReset feeds no more than up to a reset of a disk by the guest, before or
// after the completions that it waits for. That is what is logged at one
// instruction, and ends with a checkpoint.
func (p *pair) cutInReset(after bool, cut chan<- struct{}) func(*rrlog.Event) {
	var instant, completion plugin.Position
	var machine, done bool
	p.limit = &instant
	return func(e *rrlog.Event) {
		switch {
		case done:
		case e.Kind == rrlog.KindInstruction:
			instant, completion, machine = e.End(), 0, false
			p.limit = &instant
		case e.Kind == rrlog.KindCheckpointResetRequested:
			machine = true
		case e.Kind == rrlog.KindBlock && completion == 0:
			completion = e.Position
		case e.Kind == rrlog.KindCheckpointReset && !machine && completion > 0:
			end := completion
			if after {
				end = e.Position
			}
			p.limit, done = &end, true
			close(cut)
		}
	}
}

// stacks tells where the threads of a QEMU stand.
func stacks(m *machine) string {
	if text, err := exec.Command("gdb", "-p", fmt.Sprint(m.cmd.Process.Pid), "-batch", "-ex", "thread apply all bt 20").Output(); err == nil {
		return string(text)
	}
	var out strings.Builder
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", m.cmd.Process.Pid))
	for _, task := range tasks {
		for _, name := range []string{"comm", "wchan", "syscall", "stack"} {
			text, _ := os.ReadFile(filepath.Join(task, name))
			fmt.Fprintf(&out, "%s: %s\n", name, strings.TrimSpace(string(text)))
		}
	}
	return out.String()
}

// Where a guest is when its primary is killed.
const (
	goingDown = iota
	inFirmware
	inKernel
	running
	poweringOff
	phases
)

var phaseNames = [phases]string{"going-down", "firmware", "kernel", "running", "powering-off"}

// soak is a guest that reboots and fails over again and again.
type soak struct {
	*pair
	t        *testing.T
	rand     *rand.Rand
	machines int
	// length is how long a phase lasted last.
	length [phases]time.Duration
	seen   [phases]int
}

// TestBoot fails over at random instants of reboots, resets and power-offs. Each
// time the guest must come up, or be off, with its disk right, and be protected
// again.
func TestBoot(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(*boots+2)*4*bootTime)
	defer cancel()
	if *seed == 0 {
		*seed = rand.Uint64N(1 << 32)
	}
	t.Logf("seed %d", *seed)
	s := &soak{
		pair: bootPair(ctx, t, 0), t: t, rand: rand.New(rand.NewPCG(*seed, 0)),
		length: [phases]time.Duration{300 * time.Millisecond, time.Second, 3 * time.Second, time.Second, 500 * time.Millisecond},
	}
	ok := 0
	for i := range *boots {
		err := s.round(ctx, i)
		if err == nil {
			ok++
			continue
		}
		t.Errorf("failover %d: %v", i, err)
		s.keepStacks(i)
		if ctx.Err() != nil {
			break
		}
		if err := s.afresh(ctx); err != nil {
			t.Fatal(err)
		}
	}
	verdict := "ok"
	if t.Failed() {
		verdict = "failed"
	}
	line := fmt.Sprintf("RESULT soak_boot=%s n=%d ok=%d seed=%d", verdict, *boots, ok, *seed)
	for phase, n := range s.seen {
		line += fmt.Sprintf(" %s=%d", strings.ReplaceAll(phaseNames[phase], "-", "_"), n)
	}
	fmt.Println(line)
}

func (s *soak) afresh(ctx context.Context) error {
	s.a.kill()
	if s.b != nil {
		s.b.kill()
	}
	s.machines++
	return s.power(ctx, s.t, fmt.Sprintf("a%d", s.machines))
}

func (s *soak) keepStacks(i int) {
	s.keep(i)
	for _, m := range []*machine{s.a, s.b} {
		if m != nil {
			m.log("%s", stacks(m))
		}
	}
}

func (s *soak) round(ctx context.Context, i int) error {
	ctx, cancel := context.WithTimeout(ctx, 3*bootTime)
	defer cancel()
	if err := s.protect(ctx); err != nil {
		return err
	}
	s.t.Cleanup(s.b.kill)
	a := s.a
	at := s.rand.IntN(phases)
	part := s.rand.Float64()
	off := at == poweringOff
	lines, err := s.trigger(ctx, off)
	if err != nil {
		return err
	}
	phase, err := s.await(ctx, a, at, part)
	if err != nil {
		return err
	}
	s.seen[phase]++
	ended, err := s.failOver(ctx)
	a.log("failover %d: killed while %s, its backup ended: %v", i, phaseNames[phase], ended)
	if err != nil {
		return fmt.Errorf("killed while %s: %w", phaseNames[phase], err)
	}
	if n, err := guest.DiskLines(ctx, filepath.Join(a.dir, "disk.raw")); err != nil || n < lines {
		return fmt.Errorf("killed while %s: the primary's disk: %d lines, of %d: %w", phaseNames[phase], n, lines, err)
	}
	defer func() { _ = os.RemoveAll(a.dir) }()
	if off {
		select {
		case <-s.b.done:
		case <-ctx.Done():
			return errors.New("the guest was to power off, and did not")
		}
	}
	if ended && !off {
		return errors.New("the backup's QEMU ended")
	}
	if off {
		if n, err := guest.DiskLines(ctx, filepath.Join(s.b.dir, "disk.raw")); err != nil || n < lines {
			return fmt.Errorf("after power-off: %d lines, of %d: %w", n, lines, err)
		}
		return s.afresh(ctx)
	}
	if err := s.a.sound(ctx, lines); err != nil {
		return fmt.Errorf("killed while %s: %w", phaseNames[phase], err)
	}
	return nil
}

// trigger makes the guest reboot or power off, tells how many lines were on its
// disk, and returns when the log says what is wanted.
func (s *soak) trigger(ctx context.Context, off bool) (lines int, err error) {
	c := s.a.guest()
	if lines, err = s.a.worked(ctx); err != nil {
		return 0, err
	}
	switch operator := s.rand.IntN(4) == 0; {
	case off && operator:
		pressed := make(chan struct{})
		s.mu.Lock()
		s.onEvent = func(e *rrlog.Event) {
			if e.Kind == rrlog.KindInput {
				s.onEvent = nil
				close(pressed)
			}
		}
		s.mu.Unlock()
		if err := s.a.Monitor(ctx, plugin.UUID{}, "system_powerdown", nil, nil); err != nil {
			return 0, err
		}
		select {
		case <-pressed:
		case <-ctx.Done():
			return 0, errors.New("no power button in the log")
		}
	case off:
		err = c.PowerOff(ctx)
	case operator:
		err = s.a.Monitor(ctx, plugin.UUID{}, "system_reset", nil, nil)
	default:
		lines, err = c.Reboot(ctx)
	}
	return lines, err
}

// await waits for a phase of the guest's reboot and then for a part of that, and
// tells in which it is.
func (s *soak) await(ctx context.Context, a *machine, want int, part float64) (int, error) {
	if want == poweringOff {
		<-time.After(time.Duration(part * float64(s.length[want])))
		return want, nil
	}
	phase, since := goingDown, time.Now()
	firmware, console := len(read(s.t, a, "firmware")), len(read(s.t, a, "console"))
	for late := time.After(bootTime); ; {
		now := phase
		said := read(s.t, a, "firmware")[firmware:]
		switch {
		case bytes.Contains(read(s.t, a, "console")[console:], []byte(guest.ReadyMessage)):
			now = running
		case bytes.Contains(said, []byte("Booting from")):
			now = inKernel
		case bytes.Contains(said, []byte("SeaBIOS")):
			now = inFirmware
		}
		if now != phase {
			s.length[phase] = time.Since(since)
			phase, since = now, time.Now()
		}
		if phase > want || phase == want && time.Since(since).Seconds() >= part*s.length[want].Seconds() {
			return phase, nil
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-a.done:
			return phase, errors.New("the primary's QEMU ended")
		case <-late:
			return phase, fmt.Errorf("the primary's guest does not boot; it is %s\n%s", phaseNames[phase], stacks(a))
		case <-ctx.Done():
			return phase, ctx.Err()
		}
	}
}
