// SPDX-License-Identifier: Apache-2.0

package plugintest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// guestRAM is the size of the guests' memory.
const guestRAM = 256 << 20

// process looks into a QEMU from outside: the backup holds its locks while it
// waits for the log, so that its monitor does not answer.
type process struct {
	pid int
	mem *os.File
}

func inspect(t *testing.T, m *machine) process {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/mem", m.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return process{m.cmd.Process.Pid, f}
}

// mapping finds a mapping by its size, or the lowest address of a file.
func (p process) mapping(t *testing.T, match func(start, end uint64, path string) bool) uint64 {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", p.pid))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	for s := bufio.NewScanner(f); s.Scan(); {
		var start, end uint64
		if _, err := fmt.Sscanf(s.Text(), "%x-%x", &start, &end); err != nil {
			t.Fatal(err)
		}
		path := ""
		if fields := strings.Fields(s.Text()); len(fields) > 5 {
			path = fields[5]
		}
		if match(start, end, path) {
			return start
		}
	}
	t.Fatal("no such mapping")
	return 0
}

func (p process) read(t *testing.T, at uint64, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := p.mem.ReadAt(b, int64(at)); err != nil {
		t.Fatal(err)
	}
	return b
}

func (p process) ram(t *testing.T) []byte {
	t.Helper()
	at := p.mapping(t, func(start, end uint64, _ string) bool { return end-start == guestRAM })
	return p.read(t, at, guestRAM)
}

// cpu gives the address of the first vCPU's CPUState.
func (p process) cpu(t *testing.T) uint64 {
	t.Helper()
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.pid))
	if err != nil {
		t.Fatal(err)
	}
	f, err := elf.Open(exe)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	symbols, err := f.DynamicSymbols()
	if err != nil {
		t.Fatal(err)
	}
	base := p.mapping(t, func(_, _ uint64, path string) bool { return path == exe })
	for _, s := range symbols {
		if s.Name == "cpus_queue" {
			return binary.LittleEndian.Uint64(p.read(t, base+s.Value, 8))
		}
	}
	t.Fatal("no cpus_queue")
	return 0
}

// registers are the sixteen general ones and RIP, as CPUX86State begins.
const registers = 17

// monitorRegisters asks a stopped QEMU for them.
func monitorRegisters(ctx context.Context, t *testing.T, m *machine) []byte {
	t.Helper()
	var text string
	if err := m.Monitor(ctx, plugin.UUID{}, "human-monitor-command", map[string]any{"command-line": "info registers"}, &text); err != nil {
		t.Fatal(err)
	}
	var b []byte
	for _, name := range []string{"RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8 ", "R9 ", "R10", "R11", "R12", "R13", "R14", "R15", "RIP"} {
		var v uint64
		_, after, ok := strings.Cut(text, name+"=")
		if _, err := fmt.Sscanf(after, "%x", &v); err != nil || !ok {
			t.Fatalf("no %s in %q", name, text)
		}
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

// TestLockstep runs a pair under load, lets the guest come to rest, stops the
// primary, and compares what both sides hold at the same instruction: memory,
// registers, disk and console.
func TestLockstep(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	p := boot(ctx, t)
	p.begin()
	p.clone(ctx, t)
	p.run(t, 15*time.Second)
	c := guest.Client{Dial: dial(p.ports), Address: netip.MustParseAddr("10.0.2.15")}
	digest, err := c.Quiesce(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the guest has %d lines and did %d disk operations", digest.Lines, digest.LoadOps)
	if digest.Lines == 0 || digest.LoadOps == 0 {
		t.Fatal("there was no load")
	}
	p.compare(ctx, t)
}

// TestPause stops and continues the primary under load, as 'virsh suspend' and
// 'virsh resume' do, while packets come in: the backup must follow.
func TestPause(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute+time.Duration(*pauses)*time.Second)
	defer cancel()
	p := boot(ctx, t)
	p.begin()
	p.clone(ctx, t)
	load, stop := context.WithCancel(ctx)
	defer stop()
	for range 4 {
		go p.echo(load)
	}
	defer func() {
		if t.Failed() {
			p.keep(0)
		}
	}()
	c := guest.Client{Dial: dial(p.ports), Address: netip.MustParseAddr("10.0.2.15")}
	for i := range *pauses {
		p.run(t, rand.N(300*time.Millisecond))
		if err := p.a.Monitor(ctx, plugin.UUID{}, "stop", nil, nil); err != nil {
			t.Fatal(err)
		}
		p.run(t, rand.N(300*time.Millisecond))
		if err := p.a.Monitor(ctx, plugin.UUID{}, "cont", nil, nil); err != nil {
			t.Fatal(err)
		}
		if i == *pauses/2 {
			// The rest while it is nearly idle.
			p.run(t, 2*time.Second)
			p.follow(t)
			stop()
			if _, err := c.Quiesce(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	p.run(t, 2*time.Second)
	p.follow(t)
	if _, err := c.Quiesce(ctx); err != nil {
		t.Fatal(err)
	}
	p.compare(ctx, t)
}

// TestReset resets the primary from outside, as 'virsh reset' does, while it has
// disk requests in flight or is paused: the backup boots as it does.
func TestReset(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute+time.Duration(*resets)*time.Minute)
	defer cancel()
	p := boot(ctx, t)
	p.begin()
	p.clone(ctx, t)
	c := guest.Client{Dial: dial(p.ports), Address: netip.MustParseAddr("10.0.2.15")}
	defer func() {
		if t.Failed() {
			p.keep(0)
		}
	}()
	for i := range *resets {
		p.run(t, time.Second)
		commands := []string{"system_reset"}
		if i%3 == 2 {
			commands = []string{"stop", "system_reset", "cont"}
		}
		for _, command := range commands {
			if err := p.a.Monitor(ctx, plugin.UUID{}, command, nil, nil); err != nil {
				t.Fatal(err)
			}
			p.run(t, time.Second)
		}
		boot, cancel := context.WithTimeout(ctx, time.Minute)
		err := c.WaitReady(boot)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		p.follow(t)
		for _, start := range []func() error{
			func() error { return c.StartLines(ctx, 10) }, func() error { return c.StartLoad(ctx, 20) },
		} {
			if err := start(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := c.Quiesce(ctx); err != nil {
		t.Fatal(err)
	}
	p.compare(ctx, t)
}

// TestResetLive resets a backup that has just gone live, which is in QEMU's
// record mode still, without a log: it boots again.
func TestResetLive(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	p := boot(ctx, t)
	p.begin()
	p.clone(ctx, t)
	p.run(t, time.Second)
	if err := p.goLive(ctx); err != nil {
		t.Fatal(err)
	}
	if err := p.b.Monitor(ctx, plugin.UUID{}, "system_reset", nil, nil); err != nil {
		t.Fatal(err)
	}
	for before := bytes.Count(read(t, p.b, "console"), []byte(guest.ReadyMessage)); ; {
		if bytes.Count(read(t, p.b, "console"), []byte(guest.ReadyMessage)) > before {
			return
		}
		if ctx.Err() != nil {
			t.Fatal("the guest does not boot again")
		}
		p.run(t, 100*time.Millisecond)
	}
}

// follow demands that the backup has not diverged so far.
func (p *pair) follow(t *testing.T) {
	t.Helper()
	p.b.state.Lock()
	defer p.b.state.Unlock()
	if p.b.diverged != nil {
		t.Fatalf("the backup diverged: %+v; it is at %+v now", *p.b.diverged, p.b.consumed)
	}
}

// run lets time pass for both.
func (p *pair) run(t *testing.T, d time.Duration) {
	t.Helper()
	select {
	case <-time.After(d):
	case <-p.a.done:
		t.Fatal("the primary's QEMU ended")
	case <-p.b.done:
		t.Fatal("the backup's QEMU ended")
	}
}

// compare stops the primary and demands that both sides are equal at the
// instruction at which it stands.
func (p *pair) compare(ctx context.Context, t *testing.T) {
	t.Helper()
	if err := p.a.Monitor(ctx, plugin.UUID{}, "stop", nil, nil); err != nil {
		t.Fatal(err)
	}
	p.settle(ctx, t)

	a, b := inspect(t, p.a), inspect(t, p.b)
	ramA, ramB := a.ram(t), b.ram(t)
	if !bytes.Equal(ramA, ramB) {
		pages := 0
		for at := 0; at < guestRAM; at += 4096 {
			if !bytes.Equal(ramA[at:at+4096], ramB[at:at+4096]) {
				if pages++; pages <= 8 {
					t.Errorf("page at %#x differs: %s", at, firstDifference(ramA[at:at+4096], ramB[at:at+4096]))
				}
			}
		}
		t.Errorf("%d of %d pages differ", pages, guestRAM/4096)
	}
	want := monitorRegisters(ctx, t, p.a)
	state := a.read(t, a.cpu(t), 64<<10)
	offset := bytes.Index(state, want)
	if offset < 0 {
		t.Fatal("the registers are not where they are thought to be")
	}
	if got := b.read(t, b.cpu(t)+uint64(offset), 8*registers); !bytes.Equal(got, want) {
		t.Errorf("registers: primary %x, backup %x", want, got)
	}
	diskA, diskB := sum(t, p.a), sum(t, p.b)
	if diskA != diskB {
		t.Error("the disks differ")
	}
	consoleA, consoleB := read(t, p.a, "console"), read(t, p.b, "console")
	if !bytes.HasSuffix(consoleA, consoleB) || len(consoleB) == 0 {
		t.Error("the consoles differ")
	}
	t.Logf("equal at instruction %d: memory %x, registers %x, disk %x, %d bytes of console", p.b.consumed.Icount,
		sha256.Sum256(ramB), sha256.Sum256(want), diskB, len(consoleB))
}

// settle waits until both sides stand at the same instruction, with all of the
// log consumed: the stopped primary logs no more than that time passes.
func (p *pair) settle(ctx context.Context, t *testing.T) {
	t.Helper()
	// A boot makes the backup lag.
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if err := p.a.wait(ctx, "primary is stopped", func() bool { return !p.a.last.Running }); err != nil {
		t.Fatal(err)
	}
	stopped, end := p.a.last.Icount, p.a.last.Pos
	var last control.Consumed
	err := p.b.wait(ctx, "both stand at the same instruction", func() bool {
		last = p.b.consumed
		// QEMU looks for the next event before it lets one happen, so there
		// must have been one since the stop.
		return last.Starving && last.Pos == last.Fed && last.Pos > end && last.Icount == stopped
	})
	if err != nil {
		t.Fatalf("%v: primary at %d, backup %+v", err, stopped, last)
	}
}

func firstDifference(a, b []byte) string {
	for i := range a {
		if a[i] != b[i] {
			i &^= 7
			return fmt.Sprintf("at %#x %x, %x", i, a[i:i+8], b[i:i+8])
		}
	}
	return "none"
}

func read(t *testing.T, m *machine, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(m.dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func sum(t *testing.T, m *machine) [sha256.Size]byte {
	t.Helper()
	return sha256.Sum256(read(t, m, "disk.raw"))
}
