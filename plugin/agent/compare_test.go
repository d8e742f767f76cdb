// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"testing"

	"ftvirt.org/ftvirt/plugin"
	ctl "ftvirt.org/ftvirt/plugin/control"
)

func TestComparison(t *testing.T) {
	at := func(pos plugin.Position, registers uint64) ctl.Digest {
		return ctl.Digest{Pos: pos, Icount: 10 * uint64(pos), Registers: registers}
	}
	var c comparison
	for pos := range plugin.Position(5) {
		c.expect(at(pos, 7))
	}
	for _, d := range []ctl.Digest{at(0, 7), at(2, 7), at(1, 8) /* too late */, at(9, 7) /* not asked for */} {
		if m := c.answer(d); m != nil {
			t.Errorf("%+v does not differ from anything, but from %+v", d, m.Primary)
		}
	}
	c.expect(at(20, 7))
	c.expect(at(21, 7))
	other := at(20, 7)
	other.Icount++
	if m := c.answer(other); m == nil || m.Primary != at(20, 7) || m.Backup != other {
		t.Errorf("%+v differs, found %+v", other, m)
	}
	if m := c.answer(at(21, 8)); m != nil {
		t.Error("a second mismatch was told")
	}
	if n, m := c.result(); n != 2 || m == nil || m.Backup != other {
		t.Errorf("equal %d times, mismatch %+v", n, m)
	}
	for pos := range plugin.Position(2 * maxExpected) {
		c.expect(at(100+pos, 1))
	}
	if len(c.expected) > maxExpected {
		t.Errorf("%d digests are kept", len(c.expected))
	}
}
