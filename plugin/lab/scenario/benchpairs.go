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
)

// pairCounts are how many idle pairs there are at once.
var pairCounts = []int{1, 2, 4, 8}

// pairTime is how long they are watched.
const pairTime = 10 * time.Second

// Limits of an agent.
const (
	agentPerPair = 2.0  // percent of one core
	agentMemory  = 64.0 // MiB
	// agentLinear is how much more a pair among many may cost than one alone.
	agentLinear = 1.2
)

// benchPairs watches both hosts' agents while there are more and more idle
// pairs.
func benchPairs(ctx context.Context, b *benchmark) (err error) {
	hosta, hostb := b.Pair()
	var vms []*VM
	defer func() { err = errors.Join(err, removeAll(ctx, vms)) }()
	for _, n := range pairCounts {
		for i := len(vms); i < n; i++ {
			vm, err := b.startBench(ctx, hosta, hostb, i, fmt.Sprintf("pair%d", i), editBench(256))
			if err != nil {
				return err
			}
			vms = append(vms, vm)
			if _, err := b.protectPinned(ctx, vm, hosta, hostb); err != nil {
				return err
			}
		}
		if err := b.watchAgents(ctx, n); err != nil {
			return err
		}
		b.say("%d idle pairs", n)
	}
	for _, vm := range vms {
		if s, err := b.Agent(hosta).StatusOf(ctx, vm.Name); err != nil || s.State != stateProtected {
			return errors.Join(fmt.Errorf("%w: %s", ErrState, s), err)
		}
	}
	return nil
}

func (b *benchmark) watchAgents(ctx context.Context, n int) error {
	before := map[string]time.Duration{}
	start := time.Now()
	for _, h := range b.Hosts() {
		used, err := agentTime(ctx, h)
		if err != nil {
			return err
		}
		before[h.Name] = used
	}
	if err := Pause(ctx, pairTime); err != nil {
		return err
	}
	for _, h := range b.Hosts() {
		used, err := agentTime(ctx, h)
		if err != nil {
			return err
		}
		memory, err := agentResident(ctx, h)
		if err != nil {
			return err
		}
		share := 100 * (used - before[h.Name]).Seconds() / time.Since(start).Seconds()
		b.report.Add(pairsName("CPU", n), configProtected, "% of a core", false, share)
		b.report.Add(pairsName("resident", n), configProtected, "MiB", false, memory)
	}
	return nil
}

func pairsName(what string, n int) string { return fmt.Sprintf("agent's %s, %d idle pairs", what, n) }

// ticksPerSecond is the kernel's unit of processor time.
const ticksPerSecond = 100

// agentTime is the processor time that the host's agent has used.
func agentTime(ctx context.Context, h *lab.Host) (time.Duration, error) {
	text, err := agentFile(ctx, h, "stat")
	if err != nil {
		return 0, err
	}
	// The second field is a name in parentheses, and may have blanks.
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	const user, system = 11, 12
	if len(fields) <= system {
		return 0, fmt.Errorf("%s: agent's stat: %q", h.Name, text)
	}
	var ticks int
	for _, f := range []string{fields[user], fields[system]} {
		n, err := strconv.Atoi(f)
		if err != nil {
			return 0, fmt.Errorf("%s: agent's stat: %w", h.Name, err)
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / ticksPerSecond, nil
}

// agentResident is the agent's memory in MiB.
func agentResident(ctx context.Context, h *lab.Host) (float64, error) {
	text, err := agentFile(ctx, h, "status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.Atoi(strings.Fields(rest)[0])
			return float64(kib) / 1024, err
		}
	}
	return 0, fmt.Errorf("%s: agent's status has no VmRSS", h.Name)
}

func agentFile(ctx context.Context, h *lab.Host, name string) (string, error) {
	pid, err := h.AgentPID()
	if err != nil {
		return "", err
	}
	out, err := h.Exec(ctx, "cat", fmt.Sprintf("/proc/%d/%s", pid, name))
	return out, err
}

// judgePairs judges the agents. Of both hosts' the greater figure counts.
func (b *benchmark) judgePairs() {
	most := func(what string, n int) float64 {
		return b.report.Figures(pairsName(what, n), configProtected).Quantile(1)
	}
	last := pairCounts[len(pairCounts)-1]
	b.report.AtMost(fmt.Sprintf("agent's CPU for each of %d idle pairs", last), "%", agentPerPair, most("CPU", last)/float64(last))
	b.report.AtMost(fmt.Sprintf("agent's CPU for each of %d idle pairs, compared with %d", last, pairCounts[1]), "",
		agentLinear, most("CPU", last)/float64(last)/(most("CPU", pairCounts[1])/float64(pairCounts[1])))
	b.report.AtMost(fmt.Sprintf("agent's memory with %d idle pairs", last), "MiB", agentMemory, most("resident", last))
}
