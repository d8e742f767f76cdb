// SPDX-License-Identifier: Apache-2.0

package plugintest

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/control"
)

// compareRegisters hands each digest of the primary to the backup, as the agents
// do, before the log that leads to it.
func (p *pair) compareRegisters() {
	p.a.onDigest = func(d control.Digest) {
		p.mu.Lock()
		b := p.b
		p.mu.Unlock()
		if b != nil {
			_ = b.plugin.Check(d.Pos)
		}
	}
}

// compared counts positions at which both sides told their digests, and those at
// which these differ.
func (p *pair) compared() (same, other int) {
	p.a.state.Lock()
	ours := map[plugin.Position]control.Digest{}
	for pos, d := range p.a.digests {
		ours[pos] = d
	}
	p.a.state.Unlock()
	p.b.state.Lock()
	defer p.b.state.Unlock()
	for pos, d := range p.b.digests {
		if ours[pos] == d {
			same++
		} else {
			other++
		}
	}
	return same, other
}

// TestDigests compares the registers of a pair under load, at the same events,
// while it runs. Then a register of the backup is changed, and they differ.
func TestDigests(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	p := boot(ctx, t)
	p.begin()
	p.compareRegisters()
	p.clone(ctx, t)
	const period, most = 8 * time.Second, 10 // comparisons a second
	p.run(t, period)
	same, other := p.compared()
	p.a.state.Lock()
	told := len(p.a.digests)
	p.a.state.Unlock()
	t.Logf("%d positions told by the primary, %d equal, %d different", told, same, other)
	if least := int(period/time.Second) * 2; same < least || other != 0 {
		t.Fatalf("%d comparisons found equality, %d did not; want at least %d and none", same, other, least)
	}
	if told < same || told > int(period/time.Second+5)*most {
		t.Errorf("the primary told %d digests in %v", told, period)
	}
	b := inspect(t, p.b)
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", b.pid), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = mem.Close() }()
	cr2 := int64(b.cpu(t) + p.controlRegisters(ctx, t) + 2*8)
	// The guest sets it at its next page fault: it is set again and again.
	for other == 0 {
		if _, err := mem.WriteAt([]byte("poisoned"), cr2); err != nil {
			t.Fatal(err)
		}
		p.run(t, 2*time.Millisecond)
		if _, other = p.compared(); ctx.Err() != nil {
			t.Fatal("the difference was not found")
		}
	}
	if p.b.diverged != nil {
		t.Error("the log was not followed, either: it proves nothing")
	}
}

// controlRegisters gives their offset in CPUState: CR0 to CR4, of which there is
// no CR1. It stops the primary for a moment.
func (p *pair) controlRegisters(ctx context.Context, t *testing.T) uint64 {
	t.Helper()
	command := func(line string) (text string) {
		if err := p.a.Monitor(ctx, plugin.UUID{}, "human-monitor-command", map[string]any{"command-line": line}, &text); err != nil {
			t.Fatal(err)
		}
		return text
	}
	command("stop")
	defer command("cont")
	text := command("info registers")
	var want []byte
	for i := range 5 {
		var v uint64
		_, after, ok := strings.Cut(text, fmt.Sprintf("CR%d=", i))
		if _, err := fmt.Sscanf(after, "%x", &v); ok && err != nil {
			t.Fatal(err)
		}
		want = binary.LittleEndian.AppendUint64(want, v)
	}
	a := inspect(t, p.a)
	at := bytes.Index(a.read(t, a.cpu(t), 64<<10), want)
	if at < 0 {
		t.Fatalf("no control registers as in %q", text)
	}
	return uint64(at)
}
