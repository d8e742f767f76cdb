// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

func numbered(from, to int) string {
	var b strings.Builder
	for n := from; n <= to; n++ {
		fmt.Fprintf(&b, "L %010d %010d 00000000\n", n, n*100)
	}
	return b.String()
}

func TestCompareConsoles(t *testing.T) {
	tests := map[string]struct {
		old, young string
		disk       int
		want       Lines
	}{
		"overlap":        {numbered(1, 10), "0 00000000\n" + numbered(6, 20), 20, Lines{Disk: 20}},
		"adjoining":      {numbered(1, 10), numbered(11, 20), 20, Lines{Disk: 20}},
		"cut at the end": {numbered(1, 10) + "L 0000000011 00", numbered(8, 20), 20, Lines{Disk: 20}},
		"lost":           {numbered(1, 10), numbered(13, 20), 20, Lines{Disk: 20, Lost: 2}},
		"lost at the end": {
			numbered(1, 10), numbered(5, 18), 20,
			Lines{Disk: 20, Lost: 2},
		},
		"twice":   {numbered(1, 10), numbered(9, 20) + numbered(20, 20), 20, Lines{Disk: 20, Duplicated: 1}},
		"altered": {numbered(1, 10), strings.Replace(numbered(9, 20), "0000001000", "0000001001", 1), 20, Lines{Disk: 20, Altered: 1}},
	}
	for name, test := range tests {
		got := Lines{Disk: test.disk}
		got.compare(test.old, test.young)
		if got != test.want {
			t.Errorf("%s: got %+v, want %+v", name, got, test.want)
		}
	}
}

func TestOneLine(t *testing.T) {
	if got := oneLine(errors.New("a\n  b\t c")); got != "a b c" {
		t.Errorf("got %q", got)
	}
	if got := oneLine(errors.New(strings.Repeat("x", 1000))); len(got) > 310 {
		t.Errorf("%d bytes", len(got))
	}
}
