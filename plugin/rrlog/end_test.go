// SPDX-License-Identifier: Apache-2.0

package rrlog

import (
	"testing"

	"ftvirt.org/ftvirt/plugin"
)

// Codes of QEMU 9.1 to 10.x.
const (
	codeQuit, codeSignal, codeGuestOff, codeReset, codeEnd = 12, 14, 16, 32, 39
)

// Who ended the guest is told by the first event of the end: a backup replays
// what its guest did, and nothing that was done to the primary's QEMU.
func TestWhoEnded(t *testing.T) {
	l, err := LayoutFor(10, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what       string
		log        []byte
		guest      bool
		replayable plugin.Position
		needed     plugin.Position
	}{
		{"runs", []byte{1, 1}, false, 2, 2},
		{"killed by a signal", []byte{1, 1, codeSignal, codeEnd}, false, 2, 2},
		{"killed by a signal, some events later", []byte{1, 1, codeSignal, 1, 1, codeEnd}, false, 2, 2},
		{"told to quit", []byte{1, codeQuit, 1, codeEnd}, false, 1, 1},
		{"closed without a reason", []byte{1, 1, 1, codeEnd}, false, 3, 3},
		{"powered off", []byte{1, codeGuestOff}, true, 2, 1},
		{"powered off, then ended by libvirt", []byte{1, codeGuestOff, codeSignal, codeEnd}, true, 4, 1},
		{"powered off, which libvirt made a reboot of", []byte{1, codeGuestOff, codeReset, 1}, false, 4, 4},
		{"such a reboot, then a signal", []byte{1, codeGuestOff, codeReset, 1, codeSignal, codeEnd}, false, 4, 4},
	} {
		d := NewDecoder(l)
		if err := d.Feed(c.log); err != nil {
			t.Fatalf("%s: %v", c.what, err)
		}
		if d.GuestEnded() != c.guest || d.Replayable() != c.replayable || d.Needed() != c.needed {
			t.Errorf("%s: ended by the guest: %v, replayable up to %d, needed up to %d; want %v, %d, %d",
				c.what, d.GuestEnded(), d.Replayable(), d.Needed(), c.guest, c.replayable, c.needed)
		}
	}
}
