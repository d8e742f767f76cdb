// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/lab"
)

// steady is how long things run undisturbed before a kill and after a failover.
const steady = 3 * time.Second

// What a user may be made to wait, at most.
const (
	longestPause = time.Second
	longestGap   = 2 * time.Second
)

// ErrTooLong is wrapped when all went well, but slowly.
var ErrTooLong = errors.New("too slow")

// Demo protects a guest, kills its primary while a client is connected, and
// shows that nobody but the operator could tell.
func Demo(ctx context.Context, o Options) error { return Run(ctx, "demo", o, demo) }

func demo(ctx context.Context, r *run) (string, error) {
	const name = "guest"
	a, b := r.Pair()
	vm, err := r.DefineVM(ctx, a, 0, name, nil)
	if err != nil {
		return "", err
	}
	r.say("%s$ virsh define %s.xml", a.Name, name)
	if err := r.ftvirt(ctx, a, "enable", name, "--peer", b.Name); err != nil {
		return "", err
	}
	r.say("%s$ virsh start %s", a.Name, name)
	if err := vm.Boot(ctx, a); err != nil {
		return "", err
	}
	r.say("%s has booted; it writes %d lines a second to its disk and console, and does %d disk operations a second",
		name, LinesRate, LoadRate)

	before, err := r.Agent(a).StatusOf(ctx, name)
	if err != nil {
		return "", err
	}
	if err := r.ftvirt(ctx, a, "enable", name, "--peer", b.Name); err != nil {
		return "", err
	}
	traffic, err := vm.Traffic(ctx)
	if err != nil {
		return "", err
	}
	connected := time.Now()
	r.say("the client has a TCP connection to the guest's echo port and sends a numbered record every %v", trafficInterval)
	primary, err := vm.WaitProtected(ctx, a, b, before)
	if err != nil {
		return "", err
	}
	r.say("protected: primary on %s, backup on %s, epoch %d; the clone stopped the guest for %s ms",
		a.Name, b.Name, primary.Epoch, ms(millis(primary.ClonePause)))
	if err := Pause(ctx, steady); err != nil {
		return "", err
	}
	lag, err := vm.Lag(ctx, a)
	if err != nil {
		return "", err
	}
	r.say("the backup's execution is %s ms behind", ms(lag))
	if err := r.sayList(ctx); err != nil {
		return "", err
	}

	r.say("%s$ kill -9 $(cat /run/libvirt/qemu/%s.pid)", a.Name, name)
	failover, err := vm.FailOver(ctx, a, b, traffic)
	if err != nil {
		return "", err
	}
	r.say("the backup on %s was live %s ms after the kill; the client had its next reply after %s ms, on the same connection",
		b.Name, ms(failover.Live), ms(failover.Reply))
	if err := Pause(ctx, steady); err != nil {
		return "", err
	}
	if err := r.sayEvents(ctx, primary, vm); err != nil {
		return "", err
	}
	if err := r.sayList(ctx); err != nil {
		return "", err
	}

	gap := traffic.LongestGap(connected)
	if err := traffic.Stop(); err != nil {
		return "", err
	}
	replies, lost, duplicated := traffic.Counts()
	r.say("the client got %d replies, each once, in order and unaltered; the longest gap was %s ms", replies, ms(gap))
	lines, err := vm.Verify(ctx, a, b)
	if err != nil {
		return "", err
	}
	if err := r.sayLog(ctx, a, vm, primary.Epoch); err != nil {
		return "", err
	}
	r.say("the surviving disk passes fsck and has %d lines; the hosts' consoles have each of them, and agree", lines.Disk)
	pause := millis(primary.ClonePause)
	figures := fmt.Sprintf("clone_pause_ms=%s failover_ms=%s longest_gap_ms=%s lost=%d duplicated_lines=%d lag_ms=%s",
		ms(pause), ms(failover.Reply), ms(gap), lost+lines.Lost, duplicated+lines.Duplicated, ms(lag))
	if pause >= longestPause || gap >= longestGap {
		return figures, fmt.Errorf("%w: the clone may stop the guest for less than %v, and the client may be left without a reply for less than %v",
			ErrTooLong, longestPause, longestGap)
	}
	return figures, nil
}

// ftvirt runs the command line on a host, and shows it and what it says.
func (r *run) ftvirt(ctx context.Context, h *lab.Host, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, protectTimeout)
	defer cancel()
	out, err := h.Exec(ctx, append([]string{filepath.Join(lab.BinDir, "ftvirt")}, args...)...)
	if err != nil {
		return err
	}
	r.say("%s$ ftvirt %s\n%s", h.Name, strings.Join(args, " "), out)
	return nil
}

// logDir is where hosts keep the logs of epochs.
const logDir = "/var/log/ftvirt/epochs"

// sayLog sums the epoch's log up and keeps a copy of it.
func (r *run) sayLog(ctx context.Context, h *lab.Host, vm *VM, epoch plugin.Epoch) error {
	path := filepath.Join(logDir, fmt.Sprintf("%s-%d.rrlog", vm.UUID, epoch))
	if err := r.ftvirt(ctx, h, "log", "stat", path); err != nil {
		return err
	}
	if err := os.MkdirAll(r.Evidence, 0o755); err != nil {
		return err
	}
	keep := filepath.Join(r.Evidence, "demo.rrlog")
	text, err := os.ReadFile(h.Path(path))
	if err != nil {
		return err
	}
	if err := os.WriteFile(keep, text, 0o644); err != nil {
		return err
	}
	r.say("that log is kept in %s", keep)
	return nil
}

// sayEvents shows what the agents noted of the epoch.
func (r *run) sayEvents(ctx context.Context, s client.Status, vm *VM) error {
	for _, h := range r.Hosts() {
		events, err := vm.Events(ctx, h, s.Epoch)
		if err != nil {
			return err
		}
		text := h.Name + "$ ftvirt events"
		for _, e := range events {
			text += fmt.Sprintf("\n%s %s %s", e.Time.Format("15:04:05.000"), e.State, e.Reason)
		}
		r.say("%s", text)
	}
	return nil
}
