// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/bench"
)

// trackInterval is how often an agent measures what it tells.
const trackInterval = 100 * time.Millisecond

// track is what the primary's agent tells of a protected guest while it does one
// work, again and again.
type track struct {
	name    string
	seconds float64 // how long it did
	samples []sample
}

// sample has the time for which the track's work had been done then.
type sample struct {
	seconds float64
	status  client.Status
}

// follow keeps asking until it is stopped.
func (b *benchmark) follow(ctx context.Context, name string, h *lab.Host, vm *VM) (stop func()) {
	var t *track
	for _, known := range b.tracks {
		if known.name == name {
			t = known
		}
	}
	if t == nil {
		t = &track{name: name}
		b.tracks = append(b.tracks, t)
	}
	ctx, cancel := context.WithCancel(ctx)
	start, before := time.Now(), t.seconds
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(trackInterval)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if s, err := b.Agent(h).StatusOf(ctx, vm.Name); err == nil && s.State == stateProtected {
				t.samples = append(t.samples, sample{before + time.Since(start).Seconds(), s})
				b.report.Add(lagName, configProtected, millisUnit, false, s.Lag)
				b.report.Add(lagName+", "+name, configProtected, millisUnit, false, s.Lag)
			}
		}
	})
	return func() {
		cancel()
		wg.Wait()
		t.seconds = before + time.Since(start).Seconds()
	}
}

// plots draws lag, output delay and log rate, with a curve for each work.
func (b *benchmark) plots() map[string]bench.Plot {
	plots := map[string]bench.Plot{}
	for name, p := range map[string]struct {
		title, y string
		of       func(before, now sample) float64
	}{
		"lag":          {"Execution lag of the backup", "ms", func(_, s sample) float64 { return s.status.Lag }},
		"output-delay": {"Longest wait in the output gate", "ms", func(_, s sample) float64 { return s.status.OutputDelayMax }},
		"log-rate": {"Log, before it is coded for the channel", "Mbit/s", func(before, s sample) float64 {
			return float64(s.status.Position-before.status.Position) * 8 / 1e6 / (s.seconds - before.seconds)
		}},
	} {
		plot := bench.Plot{Title: p.title, X: "s", Y: p.y}
		for _, t := range b.tracks {
			curve := bench.Curve{Name: t.name}
			for i := 1; i < len(t.samples); i++ {
				before, s := t.samples[i-1], t.samples[i]
				curve.Points = append(curve.Points, [2]float64{s.seconds, p.of(before, s)})
			}
			plot.Curves = append(plot.Curves, curve)
		}
		plots[name] = plot
	}
	return plots
}

// meter is how much log there was up to an instant.
type meter struct {
	at           time.Time
	wire         uint64 // bytes that the primary's host sent on the logging network
	log          uint64 // bytes of the log
	instructions uint64
	epoch        plugin.Epoch
	state        string
	reason       string
}

func (b *benchmark) meter(ctx context.Context, h *lab.Host, vm *VM) (meter, error) {
	wire, err := sentBytes(ctx, h, "log0")
	if err != nil {
		return meter{}, err
	}
	s, err := b.Agent(h).StatusOf(ctx, vm.Name)
	return meter{time.Now(), wire, uint64(s.Position), s.Instructions, s.Epoch, s.State, s.Reason}, err
}

// since gives what came after an earlier instant.
func (m meter) since(before meter) logFigures {
	seconds := m.at.Sub(before.at).Seconds()
	f := logFigures{
		wire: float64(m.wire-before.wire) * 8 / 1e6 / seconds,
		raw:  float64(m.log-before.log) * 8 / 1e6 / seconds,
	}
	if n := m.instructions - before.instructions; n > 0 {
		f.rawPerThousand = float64(m.log-before.log) * 1000 / float64(n)
		f.wirePerThousand = float64(m.wire-before.wire) * 1000 / float64(n)
	}
	return f
}

// logFigures are Mbit/s and bytes for each 1000 instructions: on the wire, with
// TLS, TCP, Ethernet and heartbeats, and of the log as QEMU writes it.
type logFigures struct {
	wire, raw, wirePerThousand, rawPerThousand float64
}

// sentBytes is what a host has sent on a network card.
func sentBytes(ctx context.Context, h *lab.Host, card string) (uint64, error) {
	out, err := h.Exec(ctx, "cat", "/proc/net/dev")
	if err != nil {
		return 0, err
	}
	const sent = 8 // after the eight columns of what was received
	for line := range strings.Lines(out) {
		if name, rest, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == card {
			if f := strings.Fields(rest); len(f) > sent {
				return strconv.ParseUint(f[sent], 10, 64)
			}
		}
	}
	return 0, fmt.Errorf("%s: no card %s", h.Name, card)
}
