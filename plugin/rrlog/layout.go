// SPDX-License-Identifier: Apache-2.0

package rrlog

import (
	"errors"
	"fmt"
	"strings"
)

// ErrUnsupportedQEMU is wrapped by every error that refuses a QEMU release.
var ErrUnsupportedQEMU = errors.New("unsupported QEMU version")

// ErrShutdownCauses is returned for a list of ShutdownCause names from which
// no layout can be derived.
var ErrShutdownCauses = errors.New("unusable list of ShutdownCause names")

// UnsupportedQEMUError names a QEMU release whose log is not understood, or
// whose record/replay is known to be broken. It wraps [ErrUnsupportedQEMU].
type UnsupportedQEMUError struct {
	Major, Minor int
}

func (e *UnsupportedQEMUError) Error() string {
	return fmt.Sprintf("%v: %d.%d; use QEMU %d.%d or newer, up to %d.x", ErrUnsupportedQEMU,
		e.Major, e.Minor, oldestMajor, oldestMinor, newestMajor)
}

func (e *UnsupportedQEMUError) Unwrap() error { return ErrUnsupportedQEMU }

// The releases whose replay directory was read for this package.
const (
	oldestMajor, oldestMinor = 9, 1
	newestMajor              = 10
)

// asyncCodes is where EVENT_SHUTDOWN begins: three synchronous kinds and the
// seven asynchronous ones precede it in QEMU's enum.
const asyncCodes = 10

// maxCauses keeps every code within its byte with room to spare.
const maxCauses = 64

// causesSince91 are the names of ShutdownCause from QEMU 9.1 on, in order.
var causesSince91 = []string{
	"none", "host-error", "host-qmp-quit", "host-qmp-system-reset", "host-signal", "host-ui",
	"guest-shutdown", "guest-reset", "guest-panic", "subsystem-reset", "snapshot-load",
}

// Layout maps the codes of a QEMU's log to kinds. The codes depend on the QEMU
// because SHUTDOWN occupies one code for each ShutdownCause, and every kind
// after it shifts when the enum grows. QEMU does not bump the version in the
// file's header for that. The zero Layout knows no kind: use [LayoutFor] or
// [LayoutForCauses].
type Layout struct {
	// kinds holds the kind by code, plus one, so that the zero value is unknown.
	kinds  [256]uint8
	causes []string
}

// LayoutFor gives the layout of a QEMU release. It returns an
// [UnsupportedQEMUError] outside of 9.1 to 10.x: older releases have known
// record/replay bugs, newer ones have not been examined.
func LayoutFor(major, minor int) (Layout, error) {
	old := major < oldestMajor || (major == oldestMajor && minor < oldestMinor)
	if old || minor < 0 || major > newestMajor {
		return Layout{}, &UnsupportedQEMUError{Major: major, Minor: minor}
	}
	return LayoutForCauses(causesSince91)
}

// LayoutForCauses derives the layout from the names of the enum ShutdownCause
// as query-qmp-schema lists them, in that order. A distribution that added a
// cause to its QEMU is thus still decoded rightly, so prefer this to
// [LayoutFor] where a monitor is at hand.
func LayoutForCauses(names []string) (Layout, error) {
	if len(names) == 0 || len(names) > maxCauses {
		return Layout{}, fmt.Errorf("%w: %d names, expected 1 to %d", ErrShutdownCauses, len(names), maxCauses)
	}
	var l Layout
	code := 0
	add := func(k Kind) {
		l.kinds[code] = uint8(k) + 1
		code++
	}
	for k := KindInstruction; k < KindShutdown; k++ {
		add(k)
	}
	// The range is inclusive: EVENT_SHUTDOWN_LAST is EVENT_SHUTDOWN plus
	// SHUTDOWN_CAUSE__MAX, one code more than there are causes.
	for range len(names) + 1 {
		add(KindShutdown)
	}
	for k := KindShutdown + 1; k <= KindEnd; k++ {
		add(k)
	}
	l.causes = append([]string(nil), names...)
	return l, nil
}

// Kind gives the kind that a code stands for; false for a code that this
// QEMU does not write.
func (l Layout) Kind(code byte) (Kind, bool) {
	k := l.kinds[code]
	return Kind(k - 1), k != 0
}

// Code gives the first code of a kind; false if k is no kind or the layout is
// the zero value.
func (l Layout) Code(k Kind) (byte, bool) {
	for code, v := range l.kinds {
		if v == uint8(k)+1 {
			return byte(code), true
		}
	}
	return 0, false
}

// Causes counts the shutdown causes that the layout was made for.
func (l Layout) Causes() int { return len(l.causes) }

// CauseName names the shutdown cause of a code of kind SHUTDOWN, spelled as
// QEMU's SHUTDOWN_CAUSE_ constants are, such as HOST_SIGNAL.
func (l Layout) CauseName(code byte) string {
	if i := int(code) - asyncCodes; i >= 0 && i < len(l.causes) {
		return strings.ToUpper(strings.ReplaceAll(l.causes[i], "-", "_"))
	}
	return fmt.Sprintf("UNKNOWN_%d", int(code)-asyncCodes)
}

// GuestCause reports whether a code of kind SHUTDOWN stands for an end that the
// guest asked for.
func (l Layout) GuestCause(code byte) bool {
	i := int(code) - asyncCodes
	return i >= 0 && i < len(l.causes) && strings.HasPrefix(l.causes[i], "guest-")
}
