// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// ErrLines is wrapped when lines of the guest are not as they should be.
var ErrLines = errors.New("the guest's lines")

// Lines is the verdict on what the guest wrote.
type Lines struct {
	Disk       int // on the surviving replica
	Lost       int // on no console although on the disk
	Duplicated int // twice on one host's console
	Altered    int // differing between the two hosts' consoles
}

// Quiesce stops the guest's writers and returns what it holds.
func (vm *VM) Quiesce(ctx context.Context) (guest.Digest, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*commandTimeout)
	defer cancel()
	d, err := vm.Guest.Quiesce(ctx)
	if err == nil && (d.LineErrors > 0 || d.LoadErrors > 0) {
		err = fmt.Errorf("the guest saw %d errors writing lines and %d in its disk load", d.LineErrors, d.LoadErrors)
	}
	return d, err
}

// Verify stops the guest's writers and judges all that they wrote, after the
// domain failed over from dead to survivor: the survivor's disk must pass fsck
// and have every line once, and so must both hosts' consoles taken together,
// without contradicting each other. The writers stay stopped.
func (vm *VM) Verify(ctx context.Context, dead, survivor *lab.Host) (Lines, error) {
	ctx, cancel := context.WithTimeout(ctx, verifyTimeout)
	defer cancel()
	v := Lines{}
	var err error
	if v.Disk, err = vm.VerifyDisk(ctx, survivor); err != nil {
		return v, err
	}
	old, err := vm.Console(dead)
	if err != nil {
		return v, err
	}
	young, err := vm.waitConsole(ctx, survivor, v.Disk)
	if err != nil {
		return v, err
	}
	for _, c := range []struct{ host, text string }{{dead.Name, old}, {survivor.Name, young}} {
		if _, _, err := guest.VerifyConsole(strings.NewReader(c.text)); err != nil {
			return v, fmt.Errorf("console on %s: %w", c.host, err)
		}
	}
	v.compare(old, young)
	if v.Lost > 0 || v.Duplicated > 0 || v.Altered > 0 {
		return v, fmt.Errorf("%w on the consoles: %d lost, %d duplicated, %d altered", ErrLines, v.Lost, v.Duplicated, v.Altered)
	}
	return v, nil
}

// VerifyDisk stops the guest's writers, and demands that its disk on the host
// passes fsck and has every line that the guest wrote, once. It returns how
// many there are.
func (vm *VM) VerifyDisk(ctx context.Context, h *lab.Host) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, verifyTimeout)
	defer cancel()
	digest, err := vm.Quiesce(ctx)
	if err != nil {
		return 0, err
	}
	path, err := vm.DiskPath(ctx, h)
	if err != nil {
		return 0, err
	}
	n, err := guest.DiskLines(ctx, path)
	if err == nil && n != digest.Lines {
		err = fmt.Errorf("%w: the guest wrote %d, its disk on %s has %d", ErrLines, digest.Lines, h.Name, n)
	}
	return n, err
}

// waitConsole returns the domain's console once it holds the numbered line:
// the guest, QEMU and virtlogd each take a moment.
func (vm *VM) waitConsole(ctx context.Context, h *lab.Host, number int) (string, error) {
	var text string
	want := fmt.Sprintf("L %010d ", number)
	err := poll(ctx, commandTimeout, func(context.Context) (bool, error) {
		var err error
		text, err = vm.Console(h)
		at := strings.LastIndex(text, want)
		return number == 0 || at >= 0 && strings.Contains(text[at:], "\n"), err
	})
	if err != nil {
		return text, fmt.Errorf("waiting for line %d on the console of %s on %s: %w; it ends:\n%s", number, vm.Name, h.Name, err, tail(text, 3))
	}
	return text, nil
}

// compare counts what is wrong with the lines of two consoles, of which the
// young one continues the old one, up to the last on the disk.
func (v *Lines) compare(old, young string) {
	seen := map[int]string{}
	first := v.Disk + 1
	for _, console := range []string{old, young} {
		here := map[int]bool{}
		for number, line := range consoleLines(console) {
			if here[number] {
				v.Duplicated++
			}
			if text, ok := seen[number]; ok && text != line && !here[number] {
				v.Altered++
			}
			here[number], seen[number] = true, line
			first = min(first, number)
		}
	}
	for number := first; number <= v.Disk; number++ {
		if seen[number] == "" {
			v.Lost++
		}
	}
}

// consoleLines yields the complete numbered lines of a console.
func consoleLines(console string) func(yield func(int, string) bool) {
	return func(yield func(int, string) bool) {
		for line := range strings.Lines(console) {
			fields := strings.Fields(line)
			if len(fields) != 4 || fields[0] != "L" || !strings.HasSuffix(line, "\n") {
				continue
			}
			number, err := strconv.Atoi(fields[1])
			if err == nil && !yield(number, strings.TrimRight(line, "\r\n")) {
				return
			}
		}
	}
}

// CountLines tells how many complete lines a console has.
func CountLines(console string) int {
	n := 0
	for range consoleLines(console) {
		n++
	}
	return n
}

// LinesPerSecond measures how fast lines appear on the console, which needs
// no network and so tells whether the guest itself goes on.
func (vm *VM) LinesPerSecond(ctx context.Context, h *lab.Host, d time.Duration) (float64, error) {
	before, err := vm.Console(h)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	if err := Pause(ctx, d); err != nil {
		return 0, err
	}
	after, err := vm.Console(h)
	return float64(CountLines(after)-CountLines(before)) / time.Since(start).Seconds(), err
}
