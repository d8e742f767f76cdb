// SPDX-License-Identifier: Apache-2.0

package rrlog

import (
	"errors"
	"testing"
)

func TestLayoutFor(t *testing.T) {
	for _, v := range [][2]int{{9, 1}, {9, 2}, {10, 0}, {10, 2}} {
		l, err := LayoutFor(v[0], v[1])
		if err != nil {
			t.Errorf("%v: %v", v, err)
			continue
		}
		if code, ok := l.Code(KindEnd); !ok || code != 39 {
			t.Errorf("%v: END is %d, want 39", v, code)
		}
		if l.Causes() != 11 {
			t.Errorf("%v: %d causes, want 11", v, l.Causes())
		}
	}
	for _, v := range [][2]int{{7, 2}, {8, 9}, {9, 0}, {11, 0}, {0, 0}, {10, -1}} {
		_, err := LayoutFor(v[0], v[1])
		var ue *UnsupportedQEMUError
		if !errors.Is(err, ErrUnsupportedQEMU) || !errors.As(err, &ue) || ue.Major != v[0] || ue.Minor != v[1] {
			t.Errorf("%v: error %v, want one that names the version", v, err)
		}
	}
}

func TestLayoutForCausesShiftsCodes(t *testing.T) {
	l, err := LayoutForCauses(append([]string{"brand-new"}, causesSince91...))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []struct {
		kind Kind
		code byte
	}{{KindNet, 9}, {KindShutdown, 10}, {KindCharWrite, 23}, {KindCheckpointClockVirtual, 35}, {KindEnd, 40}} {
		if code, ok := l.Code(want.kind); !ok || code != want.code {
			t.Errorf("%v: code %d, want %d", want.kind, code, want.code)
		}
		if k, ok := l.Kind(want.code); !ok || k != want.kind {
			t.Errorf("code %d: kind %v, want %v", want.code, k, want.kind)
		}
	}
	if got := l.CauseName(10); got != "BRAND_NEW" {
		t.Errorf("first cause %q, want BRAND_NEW", got)
	}
	for _, names := range [][]string{nil, make([]string, maxCauses+1)} {
		if _, err := LayoutForCauses(names); !errors.Is(err, ErrShutdownCauses) {
			t.Errorf("%d names: error %v, want %v", len(names), err, ErrShutdownCauses)
		}
	}
}

func TestZeroLayoutKnowsNothing(t *testing.T) {
	if err := NewDecoder(Layout{}).Feed([]byte{0}); !errors.Is(err, ErrUnknownKind) {
		t.Errorf("error %v, want %v", err, ErrUnknownKind)
	}
	if _, ok := (Layout{}).Code(KindEnd); ok {
		t.Error("the zero layout has a code for END")
	}
}

func TestKindText(t *testing.T) {
	for k := KindInstruction; k <= KindEnd; k++ {
		text, err := k.MarshalText()
		if err != nil || len(text) == 0 || string(text) != k.String() {
			t.Fatalf("%d: text %q, %v", k, text, err)
		}
		var back Kind
		if err := back.UnmarshalText(text); err != nil || back != k {
			t.Errorf("%v came back as %v, %v", k, back, err)
		}
	}
	if _, err := (KindEnd + 1).MarshalText(); !errors.Is(err, ErrUnknownKind) {
		t.Errorf("error %v, want %v", err, ErrUnknownKind)
	}
	if err := new(Kind).UnmarshalText([]byte("nonsense")); !errors.Is(err, ErrUnknownKind) {
		t.Errorf("error %v, want %v", err, ErrUnknownKind)
	}
}
