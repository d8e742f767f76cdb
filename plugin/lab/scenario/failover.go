// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/lab"
)

// Failover is what a failover took, from the kill of the primary's QEMU on.
type Failover struct {
	Killed time.Time
	// Live: until the backup's agent noted that it was live.
	Live time.Duration
	// Reply: until the first reply to a request that was sent after the kill.
	Reply time.Duration
}

// FailOver kills the primary's QEMU and waits until the backup is live and
// answers on the connection that the client had.
func (vm *VM) FailOver(ctx context.Context, primary, backup *lab.Host, traffic *Traffic) (Failover, error) {
	return vm.FailOverAt(ctx, unix.SIGKILL, primary, backup, traffic)
}

// FailOverAt does so with another signal.
func (vm *VM) FailOverAt(ctx context.Context, signal unix.Signal, primary, backup *lab.Host, traffic *Traffic) (Failover, error) {
	before, err := vm.bed.Agent(backup).StatusOf(ctx, vm.Name)
	if err != nil {
		return Failover{}, err
	}
	killed, err := vm.SignalQEMU(ctx, primary, signal)
	if err != nil {
		return Failover{}, err
	}
	f := Failover{Killed: killed}
	if f.Live, err = vm.waitLive(ctx, backup, before, killed); err != nil {
		return f, err
	}
	reply, err := traffic.WaitReply(ctx, killed, liveTimeout)
	if err != nil {
		return f, fmt.Errorf("%s is live on %s after %v, but: %w", vm.Name, backup.Name, f.Live, err)
	}
	f.Reply = reply.Sub(killed)
	return f, nil
}

// waitLive waits for the state live in the epoch of before, and returns how
// long after the instant the agent noted it.
func (vm *VM) waitLive(ctx context.Context, h *lab.Host, before client.Status, since time.Time) (time.Duration, error) {
	_, err := vm.bed.Wait(ctx, h, vm.Name, vm.Name+" to go live on "+h.Name, liveTimeout, func(s client.Status) (bool, error) {
		switch s.State {
		case stateLive:
			return true, nil
		case stateProtected, stateGoingLive, stateCloning:
			return false, nil
		}
		return false, fmt.Errorf("%w: %s", ErrState, s)
	})
	if err != nil {
		return 0, err
	}
	events, err := vm.Events(ctx, h, before.Epoch)
	if err != nil {
		return 0, err
	}
	for _, e := range events {
		if e.State == stateLive {
			return e.Time.Sub(since), nil
		}
	}
	return 0, fmt.Errorf("%w: %s noted no event of %s going live in epoch %d", ErrState, h.Name, vm.Name, before.Epoch)
}

// Lag returns the median of some reports of the backup's lag.
func (vm *VM) Lag(ctx context.Context, primary *lab.Host) (time.Duration, error) {
	var lags []time.Duration
	for range 9 {
		s, err := vm.bed.Agent(primary).StatusOf(ctx, vm.Name)
		if err != nil {
			return 0, err
		}
		lags = append(lags, time.Duration(s.Lag*float64(time.Millisecond)))
		if err := Pause(ctx, 110*time.Millisecond); err != nil {
			return 0, err
		}
	}
	return median(lags), nil
}

func median(list []time.Duration) time.Duration {
	if len(list) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(list))
	return sorted[len(sorted)/2]
}

func longest(list []time.Duration) time.Duration {
	if len(list) == 0 {
		return 0
	}
	return slices.Max(list)
}

// ms formats a duration in milliseconds, as the RESULT lines have them.
func ms(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d.Microseconds())/1000) }

// millis makes a duration of what an agent tells in milliseconds.
func millis(v float64) time.Duration { return time.Duration(v * float64(time.Millisecond)) }
