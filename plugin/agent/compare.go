// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"sync"

	ctl "ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/pair"
)

// comparison holds a backup's registers against its primary's, at events that
// the primary chose. A digest of the primary that the backup does not answer,
// as where it was not connected, is forgotten.
type comparison struct {
	mu       sync.Mutex
	expected []ctl.Digest // in the order of their positions
	equal    uint64
	mismatch *mismatch // the first
}

// mismatch is where both sides' registers are known to differ.
type mismatch struct {
	Primary ctl.Digest `json:"primary"`
	Backup  ctl.Digest `json:"backup"`
}

// maxExpected bounds what is kept for a backup that is behind. The plugin keeps
// fewer.
const maxExpected = 256

func (c *comparison) expect(d ctl.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.expected = append(c.expected, d)
	c.expected = c.expected[max(0, len(c.expected)-maxExpected):]
}

// answer takes the backup's digest, and returns the mismatch if it is the first.
func (c *comparison) answer(d ctl.Digest) *mismatch {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.expected) > 0 && c.expected[0].Pos < d.Pos {
		c.expected = c.expected[1:]
	}
	if len(c.expected) == 0 || c.expected[0].Pos != d.Pos {
		return nil
	}
	ours := c.expected[0]
	c.expected = c.expected[1:]
	switch {
	case ours == d:
		c.equal++
	case c.mismatch == nil:
		c.mismatch = &mismatch{Primary: ours, Backup: d}
		return c.mismatch
	}
	return nil
}

// result tells how often both were equal, and where they first were not.
func (c *comparison) result() (uint64, *mismatch) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.equal, c.mismatch
}

// digest hands the registers of the primary on to the backup's agent. It is
// called as ship is, so that they arrive before the log that leads there.
func (p *primary) digest(d ctl.Digest) {
	conn := p.session()
	if conn == nil {
		return
	}
	// Its error is the connection's, which receive reports.
	_ = conn.SendControl(p.ctx, entry{Kind: kindDigest, Epoch: p.epoch, Digest: &d})
}

// expect asks the backup for its registers where the primary told its own.
func (b *backup) expect(d ctl.Digest) {
	b.mu.Lock()
	v := b.vm
	b.mu.Unlock()
	if v == nil {
		return
	}
	b.comparison.expect(d)
	if err := v.Check(d.Pos); err != nil {
		b.d.a.log.Debug("plugin", "domain", b.d.label(), "error", err)
	}
}

// compare takes the registers of the backup; it must not block.
func (b *backup) compare(v *vm, d ctl.Digest) {
	m := b.comparison.answer(d)
	if m == nil || !once(&v.left) {
		return
	}
	b.d.a.log.Error("the backup diverged: its registers are not the primary's", "domain", b.d.label(), "epoch", b.epoch,
		"position", d.Pos, "instructions", d.Icount, "primary_instructions", m.Primary.Icount)
	b.d.a.wg.Go(func() { b.d.post(pair.Event{Kind: pair.EventLocalDiverged, Epoch: b.epoch}) })
}
