// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"errors"
	"net"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// What was on the disk before a reboot must be there after it, and the guest
// must have rebooted: one that did not has lost nothing.
func TestNextLife(t *testing.T) {
	asked := lastReboot{at: time.Now(), boot: "first", lines: 100}
	for name, test := range map[string]struct {
		status guest.Status
		want   error
	}{
		"as it was":     {guest.Status{Boot: "second", Lines: 100}, nil},
		"one more":      {guest.Status{Boot: "second", Lines: 101}, nil},
		"one lost":      {guest.Status{Boot: "second", Lines: 99}, ErrLines},
		"an empty disk": {guest.Status{Boot: "second"}, ErrLines},
		"no reboot":     {guest.Status{Boot: "first", Lines: 100}, errSameLife},
	} {
		if err := asked.begun(test.status); !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
	}
}

// A connection may break when the guest reboots, but not before, and what came
// over it must be right.
func TestConnectionsEndWithALife(t *testing.T) {
	early, late := time.Now(), time.Now().Add(time.Minute)
	broke := func(what error) error { return errors.Join(what, errBroke, net.ErrClosed) }
	for name, test := range map[string]struct {
		err       error
		failed    time.Time
		lost, bad bool
	}{
		"still there":           {},
		"broke by the reboot":   {err: broke(ErrTraffic), failed: late},
		"broke before":          {err: broke(ErrTraffic), failed: early, bad: true},
		"altered":               {err: ErrTraffic, failed: late, bad: true},
		"a reply was left out":  {lost: true, bad: true},
		"left out, then broken": {err: broke(ErrTraffic), failed: late, lost: true, bad: true},
	} {
		here, there := net.Pipe()
		_ = there.Close()
		traffic := &Traffic{conn: here, cancel: func() {}, err: test.err, failed: test.failed, changed: make(chan struct{})}
		if test.lost {
			traffic.lost = 1
		}
		if err := traffic.End(early.Add(time.Second)); (err != nil) != test.bad {
			t.Errorf("traffic, %s: %v", name, err)
		}
		if test.lost {
			continue // a ledger knows it at once
		}
		ledger := &Ledger{conn: here, cancel: func() {}, err: test.err, failed: test.failed}
		if err := ledger.End(early.Add(time.Second)); (err != nil) != test.bad {
			t.Errorf("ledger, %s: %v", name, err)
		}
	}
}

// What virsh dominfo says, as of libvirt 9.
func TestPersistent(t *testing.T) {
	for text, want := range map[string]bool{
		"Id:             1\nName:           guest\nState:          running\nPersistent:     yes\nAutostart:      disable\n": true,
		"Id:             1\nName:           guest\nState:          running\nPersistent:     no\nAutostart:      disable\n":  false,
		"": false,
	} {
		if persistent(text) != want {
			t.Errorf("%q: %v", text, !want)
		}
	}
}
