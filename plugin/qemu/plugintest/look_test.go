// SPDX-License-Identifier: Apache-2.0

package plugintest

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/control"
)

// lookChunk is small, so that a difference is found at its page.
const lookChunk = 4096

// look takes hashes of where a machine stands.
func (m *machine) look(ctx context.Context, t *testing.T, id uint64) control.Looked {
	t.Helper()
	m.update(func() { m.memory = map[string]string{} })
	if err := m.plugin.Look(id, lookChunk); err != nil {
		t.Fatal(err)
	}
	if err := m.wait(ctx, "looked at", func() bool { return m.looked.ID == id }); err != nil {
		t.Fatal(err)
	}
	return m.looked
}

// lookAtBoth makes the primary stand still and waits until the backup stands where it
// does, then looks at both. It gives the blocks of memory that differ.
func (p *pair) lookAtBoth(ctx context.Context, t *testing.T, id uint64) (differ []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := p.a.plugin.Hold(20 * time.Second); err != nil {
		t.Fatal(err)
	}
	if err := p.a.wait(ctx, "the primary is held", func() bool { return p.a.last.Text == control.Held }); err != nil {
		t.Fatal(err)
	}
	stands := p.a.last
	err := p.b.wait(ctx, "the backup is there", func() bool {
		return p.b.consumed.Pos >= stands.Pos && p.b.consumed.Icount == stands.Icount
	})
	if err != nil {
		t.Fatal(err)
	}
	a, b := p.a.look(ctx, t, id), p.b.look(ctx, t, id)
	if a.Running || b.Running || a.Busy || b.Busy || a.Moved || b.Moved || a.Icount != b.Icount || a.Icount != stands.Icount {
		t.Errorf("primary %+v, backup %+v, at %d", a, b, stands.Icount)
	}
	if a.Registers != b.Registers {
		t.Errorf("registers: primary %x, backup %x", a.Registers, b.Registers)
	}
	if len(p.a.memory) != len(p.b.memory) || len(p.a.memory) < guestRAM/lookChunk/512 {
		t.Errorf("%d parts of memory on the primary, %d on the backup", len(p.a.memory), len(p.b.memory))
	}
	for part, ours := range p.a.memory {
		if p.b.memory[part] != ours {
			differ = append(differ, part)
		}
	}
	if sum(t, p.a) != sum(t, p.b) {
		differ = append(differ, "disk")
	}
	if err := p.a.plugin.Hold(0); err != nil {
		t.Fatal(err)
	}
	if err := p.a.wait(ctx, "the primary runs", func() bool { return p.a.last.Running }); err != nil {
		t.Fatal(err)
	}
	return differ
}

// TestLook looks at both sides of a pair under load, again and again, and finds
// a byte of the backup's memory that was changed. A held primary goes on by
// itself if nobody lets it.
func TestLook(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	p := boot(ctx, t)
	defer func() {
		if t.Failed() {
			t.Logf("primary: %s", read(t, p.a, "stderr"))
		}
	}()
	p.begin()
	p.clone(ctx, t)
	for i := range 10 {
		p.run(t, 300*time.Millisecond)
		if differ := p.lookAtBoth(ctx, t, uint64(i)+1); differ != nil {
			t.Errorf("round %d: these differ: %q", i, differ)
		}
	}
	b := inspect(t, p.b)
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", b.pid), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = mem.Close() }()
	// Linux leaves the first 64 KiB alone.
	ram := b.mapping(t, func(start, end uint64, _ string) bool { return end-start == guestRAM })
	if _, err := mem.WriteAt([]byte("poison"), int64(ram+0x9000)); err != nil {
		t.Fatal(err)
	}
	if differ := p.lookAtBoth(ctx, t, 100); len(differ) != 1 || differ[0] != "pc.ram+0x0" {
		t.Errorf("a byte of the first pages was changed, and these differ: %q", differ)
	}
	if err := p.a.plugin.Hold(300 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
	for _, running := range []bool{false, true} {
		if err := p.a.wait(ctx, "held for a while", func() bool { return p.a.last.Running == running }); err != nil {
			t.Fatal(err)
		}
	}
}
