// SPDX-License-Identifier: Apache-2.0

package plugintest

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// checkpointed is a machine of the checkpoint method, with what its plugin told.
type checkpointed struct {
	*machine
	staged  chan control.Staged
	applied chan uint64
	known   chan control.Blocks
	blocks  control.Blocks
	stage   []byte
}

func (b *bed) checkpointed(ctx context.Context, name, role string, args []string) *checkpointed {
	b.t.Helper()
	so, err := filepath.Abs("../../../bin/ftvirt.so")
	if err != nil {
		b.t.Fatal(err)
	}
	dir := mkdir(b.t, b.dir, name)
	m, err := b.launch(ctx, name, role, b.ports, append([]string{
		"-name", "debug-threads=on", "-S", "-nodefaults", "-no-user-config", "-display", "none",
		"-plugin", "file=" + so + ",method=checkpoint,socket=" + b.socket() + ",uuid=" + domain + ",role=" + role,
		"-chardev", "file,id=charserial0,path=" + dir + "/console", "-device", "isa-serial,chardev=charserial0",
	}, args...))
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(m.kill)
	c := &checkpointed{machine: m, staged: make(chan control.Staged, 4), applied: make(chan uint64, 4), known: make(chan control.Blocks, 1)}
	if err := m.plugin.Welcome(0, 0); err != nil {
		b.t.Fatal(err)
	}
	h := m.handler()
	h.Blocks = func(k control.Blocks) { c.known <- k }
	h.Staged = func(s control.Staged) { c.staged <- s }
	h.Applied = func(n uint64) { c.applied <- n }
	go func() { _ = m.plugin.Run(context.Background(), h) }()
	return c
}

// begin enters an epoch and maps the staging.
func (c *checkpointed) begin(ctx context.Context, epoch plugin.Epoch) {
	c.t.Helper()
	if err := c.plugin.Begin(epoch); err != nil {
		c.t.Fatal(err)
	}
	c.blocks = receive(ctx, c.t, c.machine, c.known)
	if c.plugin.Staging() == nil {
		c.t.Fatal("the plugin passed no staging")
	}
	var err error
	c.stage, err = unix.Mmap(int(c.plugin.Staging().Fd()), 0, int(c.blocks.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = unix.Munmap(c.stage) })
}

func receive[T any](ctx context.Context, t testing.TB, m *machine, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-m.done:
		text, _ := os.ReadFile(filepath.Join(m.dir, "stderr"))
		t.Fatalf("%s: QEMU ended: %s", m.dir, text)
	case <-ctx.Done():
		t.Fatalf("%s: %v", m.dir, ctx.Err())
	}
	panic("unreachable")
}

// checkpoints is a pair whose agents this test plays: what the primary stages is
// copied to the backup's staging as it is.
type checkpoints struct {
	*bed
	a, b *checkpointed

	mu    sync.Mutex
	taken []control.Staged
}

// pass carries what was staged to the backup and waits until it is there.
func (p *checkpoints) pass(ctx context.Context, s control.Staged) {
	a, b := p.a, p.b
	from, to := a.stage, b.stage
	table := 8 * s.Pages
	copy(to[b.blocks.Table:], from[a.blocks.Table:a.blocks.Table+table])
	var pages uint64
	for i := range s.Pages {
		if binary.LittleEndian.Uint64(from[a.blocks.Table+8*i:])&(1<<47) == 0 {
			pages++
		}
	}
	copy(to[b.blocks.Pages:], from[a.blocks.Pages:a.blocks.Pages+pages*control.PageSize])
	copy(to[b.blocks.Device:], from[a.blocks.Device:a.blocks.Device+s.Device])
	if err := b.plugin.Apply(s); err != nil {
		p.t.Fatal(err)
	}
	if n := receive(ctx, p.t, b.machine, b.applied); n != s.Number {
		p.t.Fatalf("applied %d, not %d", n, s.Number)
	}
}

// clone makes the backup: live rounds, then the first checkpoint.
func (p *checkpoints) clone(ctx context.Context, epoch plugin.Epoch, args []string) {
	p.t.Helper()
	p.b = p.checkpointed(ctx, fmt.Sprintf("b%d", epoch), "backup", args)
	p.a.begin(ctx, epoch)
	p.b.begin(ctx, epoch)
	if !slices.Equal(p.a.blocks.List, p.b.blocks.List) {
		p.t.Fatalf("memory differs:\n%+v\n%+v", p.a.blocks.List, p.b.blocks.List)
	}
	for rounds := 0; ; rounds++ {
		if err := p.a.plugin.Round(); err != nil {
			p.t.Fatal(err)
		}
		s := receive(ctx, p.t, p.a.machine, p.a.staged)
		p.pass(ctx, s)
		p.t.Logf("round %d: %d pages, %d left", rounds, s.Pages, s.Left)
		if s.Pages < 2000 && s.Left == 0 || rounds > 40 {
			break
		}
	}
	if err := p.a.plugin.First(); err != nil {
		p.t.Fatal(err)
	}
	s := receive(ctx, p.t, p.a.machine, p.a.staged)
	p.t.Logf("the clone stopped the guest for %v: %+v", s.Pause(), s)
	p.pass(ctx, s)
	p.ack(s)
}

func (p *checkpoints) ack(s control.Staged) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.taken = append(p.taken, s)
	if err := p.a.plugin.AckCheckpoint(s.Number); err != nil {
		p.t.Error(err)
	}
}

// protect carries checkpoints until ctx ends.
func (p *checkpoints) protect(ctx context.Context) {
	for {
		select {
		case s := <-p.a.staged:
			p.pass(context.WithoutCancel(ctx), s)
			p.ack(s)
		case <-p.a.done:
			return
		case <-ctx.Done():
			return
		}
	}
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// report prints what the guest's stops cost.
func (p *checkpoints) report(t *testing.T) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all, stop, drain, pages, save, resume []time.Duration
	var dirty uint64
	for _, s := range p.taken[1:] {
		all, stop, drain = append(all, s.Pause()), append(stop, s.Stop), append(drain, s.Drain)
		pages, save, resume = append(pages, s.Copy), append(save, s.Save), append(resume, s.Resume)
		dirty += s.Pages
	}
	if len(all) == 0 {
		t.Fatal("no checkpoint was taken")
	}
	slices.Sort(all)
	t.Logf("%d checkpoints, %d pages and %d bytes of device state each; pause median %v, p99 %v: stop %v, drain %v, copy %v, devices %v, resume %v",
		len(all), dirty/uint64(len(all)), p.taken[1].Device, all[len(all)/2], all[len(all)*99/100], median(stop), median(drain), median(pages), median(save), median(resume))
}

func consoleLines(t *testing.T, m *machine) []string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(m.dir, "console"))
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for line := range bytes.Lines(bytes.TrimLeft(text, "\x00")) {
		if bytes.HasSuffix(line, []byte("\n")) {
			lines = append(lines, string(bytes.TrimRight(line, "\r\n")))
		}
	}
	return lines
}

// TestCheckpoints: a guest with two vCPUs is copied while it runs, its memory is
// equal where both stand, and when the primary is killed the backup goes on from
// the newest complete checkpoint.
func TestCheckpoints(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	b := newBed(t)
	disk := filepath.Join(b.dir, "disk.raw")
	if err := b.guest.NewDisk(ctx, disk, "raw"); err != nil {
		t.Fatal(err)
	}
	// Both copies have the same disk, which the backup does not touch before it
	// is live.
	args := func(role string) []string {
		fwd := ""
		if role == "primary" {
			for g, h := range b.ports {
				fwd += fmt.Sprintf(",hostfwd=tcp:127.0.0.1:%d-10.0.2.15:%d", h, g)
			}
		}
		return []string{
			"-machine", "pc-q35-10.0", "-accel", "tcg,thread=multi", "-cpu", "qemu64", "-smp", "2", "-m", "256",
			"-kernel", b.guest.Kernel, "-initrd", b.guest.Initrd, "-append", "console=ttyS0 quiet ip=10.0.2.15/24,10.0.2.2",
			"-blockdev", `{"driver":"file","filename":"` + disk + `","node-name":"disk","locking":"off"}`,
			"-device", "virtio-blk-pci,drive=disk",
			"-netdev", "user,id=hostnet0" + fwd, "-device", "virtio-net-pci,netdev=hostnet0,mac=52:54:00:12:34:56",
			"-object", "filter-replay,id=ftvirt-nf-0,netdev=hostnet0",
		}
	}
	p := &checkpoints{bed: b, a: b.checkpointed(ctx, "a", "primary", args("primary"))}
	none := plugin.UUID{}
	if err := p.a.Monitor(ctx, none, "cont", nil, nil); err != nil {
		t.Fatal(err)
	}
	c := guest.Client{Dial: dial(b.ports), Address: netip.MustParseAddr("10.0.2.15")}
	if err := c.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.StartLines(ctx, 10); err != nil {
		t.Fatal(err)
	}
	if err := c.StartLoad(ctx, 20); err != nil {
		t.Fatal(err)
	}
	go (&pair{bed: b}).echo(ctx)
	p.clone(ctx, 1, args("backup"))
	run, stop := context.WithTimeout(ctx, 15*time.Second)
	defer stop()
	p.protect(run)

	// Where an operator pauses it, both sides are equal.
	if err := p.a.Monitor(ctx, none, "stop", nil, nil); err != nil {
		t.Fatal(err)
	}
	for {
		s := receive(ctx, t, p.a.machine, p.a.staged)
		p.pass(ctx, s)
		p.ack(s)
		if !s.Running {
			break
		}
	}
	p.report(t)
	mine, theirs := inspect(t, p.a.machine).ram(t), inspect(t, p.b.machine).ram(t)
	if !bytes.Equal(mine, theirs) {
		differ := 0
		for at := 0; at < len(mine); at += control.PageSize {
			if !bytes.Equal(mine[at:at+control.PageSize], theirs[at:at+control.PageSize]) {
				differ++
			}
		}
		t.Fatalf("%d pages of memory differ", differ)
	}
	if err := p.a.Monitor(ctx, none, "cont", nil, nil); err != nil {
		t.Fatal(err)
	}
	run, stop = context.WithTimeout(ctx, 3*time.Second)
	defer stop()
	p.protect(run)
	p.a.kill()
	began := time.Now()
	if err := p.b.plugin.Promote(1); err != nil {
		t.Fatal(err)
	}
	if err := p.b.wait(ctx, "the backup goes live", func() bool { return p.b.last.Mode == control.ModeLive && p.b.last.Running }); err != nil {
		t.Fatal(err)
	}
	t.Logf("live after %v", time.Since(began))
	before := consoleLines(t, p.a.machine)
	var after []string
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for len(after) < 10 {
		select {
		case <-poll.C:
			after = consoleLines(t, p.b.machine)
		case <-ctx.Done():
			t.Fatalf("the backup's console says %q", after)
		}
	}
	t.Logf("last of the primary %q, first of the backup %q", before[len(before)-1], after[:2])
}

// firmware makes a ROM of testdata/rom.S.
func firmware(ctx context.Context, t *testing.T, dir string) string {
	t.Helper()
	object, image := filepath.Join(dir, "rom.o"), filepath.Join(dir, "rom.bin")
	for _, args := range [][]string{
		{"gcc", "-c", "-m32", "-o", object, "testdata/rom.S"},
		{"ld", "-m", "elf_i386", "-Ttext", "0", "--oformat", "binary", "-o", image, object},
	} {
		if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	return image
}

// TestCheckpointsKVM does it under KVM, with a guest that any KVM can run, where
// there is one; and under TCG, so that the test itself is tested everywhere.
func TestCheckpointsKVM(t *testing.T) {
	for _, accel := range []string{"kvm", "tcg"} {
		t.Run(accel, func(t *testing.T) {
			if accel == "kvm" {
				f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
				if err != nil {
					t.Skipf("this machine has no KVM: %v", err)
				}
				_ = f.Close()
			}
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
			defer cancel()
			b := newBed(t)
			args := []string{
				"-machine", "pc-q35-10.0", "-accel", accel, "-smp", "2", "-m", "64",
				"-bios", firmware(ctx, t, b.dir),
			}
			p := &checkpoints{bed: b, a: b.checkpointed(ctx, "a", "primary", args)}
			if err := p.a.Monitor(ctx, plugin.UUID{}, "cont", nil, nil); err != nil {
				t.Fatal(err)
			}
			last := func(m *machine) int64 {
				lines := consoleLines(t, m)
				if len(lines) == 0 {
					return 0
				}
				n, err := strconv.ParseInt(lines[len(lines)-1], 16, 64)
				if err != nil {
					t.Fatalf("%s: %v", m.dir, err)
				}
				return n
			}
			poll := time.NewTicker(10 * time.Millisecond)
			defer poll.Stop()
			until := func(what string, cond func() bool) {
				t.Helper()
				for !cond() {
					select {
					case <-poll.C:
					case <-ctx.Done():
						t.Fatal(what)
					}
				}
			}
			until("the guest does not run", func() bool { return last(p.a.machine) > 0 })
			p.clone(ctx, 1, args)
			run, stop := context.WithTimeout(ctx, 5*time.Second)
			defer stop()
			p.protect(run)
			p.report(t)
			p.a.kill()
			if err := p.b.plugin.Promote(1); err != nil {
				t.Fatal(err)
			}
			ended := last(p.a.machine)
			until("the backup does not go on", func() bool { return last(p.b.machine) > ended })
			lines := consoleLines(t, p.b.machine)
			t.Logf("the primary ended at %#x, the backup began with %s", ended, lines[0])
			// What the primary had printed at its end may be a checkpoint ahead.
			first, err := strconv.ParseInt(lines[min(1, len(lines)-1)], 16, 64)
			if err != nil || first > ended+2*0x1000 {
				t.Fatalf("the backup went on at %q, the primary ended at %#x", lines[:min(3, len(lines))], ended)
			}
		})
	}
}
